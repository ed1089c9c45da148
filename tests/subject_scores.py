"""How well pictures show a subject that is known exactly: who it is, from where, and whether views agree.

Neither score needs a trained net, so both are blind to what such a net would know of the world; both
are checked on the truth, on what the VAE leaves of it, and on other subjects (docs/SUBJECT.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import subjects
import torch
import torch.nn.functional as F
from torch import Tensor
from turnaround.models.cameras import Rig, orbit_rig
from turnaround.models.metrics import cross_view_consistency, psnr

SMALL = 4
"""Pixels along a pixel of the pictures that are compared as a whole."""
PATCH = 3
"""Of those along a patch: 12 pixels, about a head, a wheel, a window."""
DIRECTIONS, QUANTILES = 128, 256
AZIMUTHS, ELEVATIONS = range(0, 360, 5), range(-15, 36, 10)
"""Degrees of the poses that a picture is compared with."""
NEAR = 15.0
"""Degrees from the true direction within which a camera counts as right."""
INNER = 2
"""Pixels from the outline that count as detail: inside, not the outline itself."""

Drawn = Callable[[Rig, Tensor], subjects.Seen]
"""A subject from any cameras, before backgrounds [V, 3, H, W]."""
Scores = dict[str, float]


def small(pictures: Tensor) -> Tensor:  # [..., C, H, W]
    return F.avg_pool2d(pictures.float(), SMALL)


# Who it is


def patches(
    frames: Tensor,  # [V, 3, H, W] 0..1
    masks: Tensor,  # [V, H, W]
) -> Tensor:  # [N, 27]
    """Of the subject, of all views together."""
    values = F.unfold(small(frames), PATCH, padding=PATCH // 2).mT.flatten(0, 1)
    inside = small(masks[:, None])[:, 0].flatten() > 0.9
    return values[inside]


def identity_distance(a: Tensor, b: Tensor) -> float:  # patches [N, D], [M, D]
    """Sliced Wasserstein distance of two sets of patches, times 100: root mean square, over random
    directions, of the difference between equal quantiles.

    Which colors a subject has, how much of each, and what stands beside what; not where in the picture,
    so that views may differ. 0 = the same set."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(a.shape[1], DIRECTIONS, generator=generator)
    # Unit length times the root of their number: a change of every number by x is a distance of x.
    directions = F.normalize(directions, dim=0)
    levels = (torch.arange(QUANTILES) + 0.5) / QUANTILES
    lines = [torch.quantile(x.cpu() @ directions, levels, dim=0) for x in (a, b)]
    return 100 * float((lines[0] - lines[1]).square().mean().sqrt())


# From where


@dataclass(frozen=True)
class Poses:
    """A subject from everywhere, small, for the estimation of a camera's direction."""

    towards: Tensor
    """[G, 3] unit: where the camera stands."""
    colors: Tensor
    """[G, 3, h, w] times the mask."""
    masks: Tensor
    """[G, h, w]"""


def directions(rig: Rig) -> Tensor:  # [V, 3]
    return F.normalize(rig.centers.double(), dim=1)


def poses_of(drawn: Drawn, like: Rig) -> Poses:
    """From the distance and with the lens of the first camera of `like`."""
    azimuths = torch.tensor(AZIMUTHS).deg2rad()
    W, H = like.width // SMALL, like.height // SMALL
    fov = 2 * math.atan(like.height / 2 / float(like.K[0, 1, 1]))
    distance = float(like.centers[0].norm())
    parts = []
    for elevation in ELEVATIONS:
        elevations = torch.full((len(azimuths),), math.radians(elevation))
        rig = orbit_rig(azimuths, elevations, distance, fov, W, H)
        seen = drawn(rig, torch.zeros(len(rig), 3, H, W))
        parts.append((directions(rig), seen.frames, seen.masks))
    return Poses(*(torch.cat(part) for part in zip(*parts, strict=True)))


def differences(picture: Tensor, poses: Poses) -> Tensor:  # [3, h, w] -> [G]
    """Squared error of every pose, before the surroundings that suit it best: a plane in every color,
    so that whatever smooth surroundings there are have no say."""
    h, w = picture.shape[1:]
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    plane = torch.stack([torch.ones_like(x), x, y], -1).flatten(0, 1).double()  # [P, 3]
    rest = (picture - poses.colors).flatten(2).double()  # [G, 3, P]
    shown = (1 - poses.masks.flatten(1).double())[..., None] * plane  # [G, P, 3]
    right = rest @ shown  # [G, 3, 3]
    inner = shown.mT @ shown + 1e-6 * torch.eye(3, dtype=torch.float64)
    best = torch.linalg.solve(inner, right.mT)  # [G, 3, 3]
    return rest.square().sum((1, 2)) - (right.mT * best).sum((1, 2))


def camera_errors(
    frames: Tensor,  # [V, 3, H, W]
    poses: Poses,
    rig: Rig,
) -> Tensor:  # [V] degrees
    """Between the true direction of every camera and that of the pose that its picture is most like."""
    found = torch.stack([differences(p, poses).argmin() for p in small(frames)])
    return _degrees(poses.towards[found], directions(rig))


def _degrees(a: Tensor, b: Tensor) -> Tensor:  # [..., 3] unit
    return torch.arccos((a * b).sum(-1).clamp(-1, 1)).rad2deg()


def chance(poses: Poses, rig: Rig) -> float:
    """Share of right cameras, in percent, if one pose were as good as another."""
    away = _degrees(poses.towards[:, None], directions(rig)[None])
    return 100 * float((away <= NEAR).double().mean())


# All of it


@dataclass(frozen=True)
class Known:
    """What pictures of a subject are compared with."""

    seen: subjects.Seen
    """From the same cameras, before the same surroundings."""
    rig: Rig
    poses: Poses
    patches: Tensor
    """Of the pictures that it was learned from."""


def detail(frames: Tensor, known: Known) -> float:
    """Gradient energy inside the subject, in percent of the truth's: blur lowers it, noise raises it."""
    outside = F.max_pool2d((known.seen.masks < 0.5)[:, None].float(), 2 * INNER + 1, 1, INNER)
    inside = outside[..., 1:, 1:] == 0

    def energy(pictures: Tensor) -> float:
        down = (pictures[..., 1:, 1:] - pictures[..., :-1, 1:]).square()
        across = (pictures[..., 1:, 1:] - pictures[..., 1:, :-1]).square()
        return float(((down + across) * inside).double().sum())

    return 100 * energy(frames) / energy(known.seen.frames)


def scores(frames: Tensor, known: Known) -> Scores:  # [V, 3, H, W]
    """Of V pictures from the cameras of `known.rig`."""
    seen, away = known.seen, camera_errors(frames, known.poses, known.rig)
    surface = seen.depth[:, None]
    return {
        "psnr": psnr(frames, seen.frames, seen.masks),
        "identity": identity_distance(patches(frames, seen.masks), known.patches),
        "right": 100 * float((away <= NEAR).double().mean()),
        "away": float(away.median()),
        "cross": 100 * cross_view_consistency(frames[:, None], surface, known.rig).rmse,
        "detail": detail(frames, known),
    }
