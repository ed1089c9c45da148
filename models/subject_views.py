"""A learned subject and the cameras of a rig: which references are used, who sees it, what its fields see.

Stage: Apply Subject and Render Subject, before anything is sampled. Frames and units: the subject's
space of feature_rays.py; a token is subject.TOKEN pixels a side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import Rig
from .feature_rays import camera_rays, span
from .geometry import BACKGROUND
from .subject import TOKEN, Features, Known, Subject, SubjectNet, directions

RAYS_AT_ONCE = 512
"""Of a picture, between two looks at the cancel button."""


def spread(
    directions: Tensor,  # [R, 3] any length
    count: int,
) -> list[int]:  # rising
    """The first and, one by one, the one farthest by angle from all chosen; of equals the first."""
    towards = F.normalize(directions.double(), dim=1)
    chosen = [0]
    nearest = towards @ towards[0]
    while len(chosen) < min(count, len(towards)):
        # Rounded, to half a degree at most, so that of two at one angle their order decides.
        chosen.append(min(range(len(towards)), key=lambda n: (round(float(nearest[n]), 4), n)))
        nearest = torch.maximum(nearest, towards @ towards[chosen[-1]])
    return sorted(chosen)


def directions_of(subject: Subject, rig: Rig) -> Tensor:  # [V, 3] unit, float64
    """Where the cameras stand, seen from the subject's middle."""
    return directions(subject.space.normalised(rig.T_camera_world.double().cpu()))


def references_of(subject: Subject, count: int) -> list[int]:
    """So many of its pictures, spread over the directions they were taken from; rising."""
    rig = subject.pictures.rig
    return (
        list(range(len(rig))) if count >= len(rig) else spread(directions_of(subject, rig), count)
    )


def from_nearest(subject: Subject, rig: Rig) -> Tensor:  # [V] radians
    """How far round the subject every camera stands from the nearest learned picture."""
    known, wanted = (directions_of(subject, r) for r in (subject.pictures.rig, rig))
    return torch.arccos((wanted @ known.T).amax(1).clamp(-1, 1))


def check_sees(subject: Subject, rig: Rig) -> None:
    """One sentence when a camera's picture holds nothing of the ball in which the subject is."""
    K, T = (t.double().cpu() for t in subject.cameras(rig))
    size = max(1, round(rig.height / TOKEN)), max(1, round(rig.width / TOKEN))
    between = span(camera_rays(K, T, size), subject.net.shape.reach)
    blind = ((between[..., 1] - between[..., 0]).amax(1) <= 0).nonzero()[:, 0].tolist()
    if blind:
        middle = ", ".join(f"{x:.2f}" for x in subject.space.centre.tolist())
        names = ", ".join(rig.labels[v] for v in blind[:4])
        raise ValueError(
            f"{len(blind)} of {len(rig)} cameras of 'rig' ({names}) don't see the subject, which was "
            f"learned round ({middle}) metres: use cameras of the world of the pictures that it was "
            "learned from, turned towards it."
        )


def fitted(rig: Rig, size: tuple[int, int]) -> Rig:  # rows, columns of tokens
    """The rig with pictures of so many tokens; one sentence when they are of another shape."""
    h, w = size
    # A side of so many tokens may be nearly one too long.
    if abs(w / h / (rig.width / rig.height) - 1) >= 1 / min(h, w):
        raise ValueError(
            f"The latent's pictures have {w}x{h} tokens, but those of 'rig' are {rig.width}x"
            f"{rig.height} pixels, another shape: sample the size of the rig, or change it with "
            "Resize Rig."
        )
    near = abs(rig.height - h * TOKEN) < TOKEN and abs(rig.width - w * TOKEN) < TOKEN
    return rig if near else rig.resized(w * TOKEN, h * TOKEN)


def bands(size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """First row and number of rows, one part of a picture after another."""
    h, w = size
    rows = max(1, RAYS_AT_ONCE // w)
    for top in range(0, h, rows):
        yield top, min(rows, h - top)


def look(
    net: SubjectNet,
    features: Features,
    known: Known,  # the references that the features are of
    wanted: tuple[Tensor, Tensor],  # of V cameras; K of rays
    size: tuple[int, int],  # rows and columns of rays
    after: Callable[[int], None] = lambda done: None,  # after every part of every picture
) -> tuple[
    Tensor, Tensor, Tensor
]:  # rgb [V, 3, h, w] times alpha, alpha [V, h, w], depth [V, h, w]
    """What the field sees, ray by ray; median depths in units of the subject's space, 0 where alpha is
    below one half."""
    K, T = wanted
    pictures, done = [], 0
    for v in range(len(K)):
        parts = []
        for top, rows in bands(size):
            lens = K[v : v + 1].clone()
            lens[:, 1, 2] -= top
            seen = net.look(features, known, (lens, T[v : v + 1]), (rows, size[1]))
            parts.append(torch.cat([seen.rgb[0], seen.alpha, seen.median_depth]))
            done += 1
            after(done)
        pictures.append(torch.cat(parts, 1))
    rgb, alpha, depth = torch.stack(pictures).split([3, 1, 1], 1)
    return rgb, alpha[:, 0], torch.where(alpha < 0.5, 0.0, depth)[:, 0]


def on_grey(
    rgb: Tensor,  # [V, 3, h, w] times alpha
    alpha: Tensor,  # [V, h, w]
) -> Tensor:  # [V, 3, h, w]
    """What fields see, before the grey that stands for nothing."""
    return rgb + BACKGROUND * (1 - alpha[:, None])
