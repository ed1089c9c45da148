"""Pictures to learn a subject from: cameras of a turntable, and which pictures can be used.

Stage: before Train Subject (subject.py, subject_training.py). Cameras are OpenCV, as everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import MAX_VIEWS, Rig, orbit_rig, project
from .feature_rays import subject_space

LEAST_SEEN = 0.002
"""Share of a picture that the subject must fill: a token or two."""
TURNTABLE_DISTANCE = 3.0
"""Any will do: a subject's space is scaled to its cameras."""
SAME, OPPOSITE = math.radians(1), math.radians(120)
"""Angles round the subject between which two cameras have one between them."""
CLOSED = 1e-3
"""Turns by which a clip may miss a whole turn and still be one."""


@dataclass(frozen=True)
class Usable:
    """Which of R pictures a subject can be learned from."""

    chosen: list[int]
    note: str
    """What was left out and why; empty if nothing was."""


def turntable(
    count: int,
    width: int,
    height: int,
    turns: float = 1.0,  # negative = the other way round
    elevation: float = 0.0,  # radians
    fov: float = math.radians(40),  # vertical
    chosen: Sequence[int] | None = None,  # of the clip's pictures; None = all
) -> Rig:
    """Cameras of a clip in which a subject turns evenly, or is walked around, seen from the subject.

    A whole turn ends a step before where it began: the last picture is not the first one again."""
    if count < 2:
        raise ValueError(
            f"'images' has {count} picture, and a turn needs two or more: connect a clip in which the "
            "subject turns, or VIEWS with their cameras."
        )
    whole = abs(abs(turns) - round(abs(turns))) < CLOSED
    steps = count if whole else count - 1
    pictures = torch.tensor(range(count) if chosen is None else list(chosen))
    if len(pictures) > MAX_VIEWS:
        raise ValueError(
            f"'images' has {len(pictures)} pictures, and a rig holds {MAX_VIEWS} cameras at most: use "
            "every second one, or fewer."
        )
    azimuths = pictures * (2 * math.pi * turns / steps)
    elevations = torch.full((len(pictures),), float(elevation))
    return orbit_rig(azimuths, elevations, TURNTABLE_DISTANCE, fov, width, height)


def usable(
    masks: Tensor,  # [R, H, W] 0..1
    rig: Rig,
    socket: str = "views",  # that the pictures came from
) -> Usable:
    """Leaves out pictures without the subject, and cameras that look past where the others look."""
    if len(rig) < 2:
        raise ValueError(
            f"'{socket}' has one picture, and one shows nothing of depth: connect two or more from "
            "different sides; eight or more all round are better."
        )
    corners = masks[:, [0, 0, -1, -1], [0, -1, 0, -1]].float().amin(1)
    if float((corners > 0.5).float().mean()) > 0.5:
        raise ValueError(
            f"The masks of '{socket}' are white in all corners of most pictures: the subject must be "
            "white and all else black; if they are the wrong way round, put Invert Mask in between."
        )
    empty = [v for v in range(len(rig)) if float(masks[v].float().mean()) < LEAST_SEEN]
    kept = [v for v in range(len(rig)) if v not in empty]
    if len(kept) < 2:
        raise ValueError(
            f"The masks of '{socket}' show the subject in {len(kept)} of {len(rig)} pictures: connect "
            "masks in which the subject is white."
        )
    past: list[int] = []
    while len(kept) >= 2 and (worst := _looks_past(rig.select(kept))) is not None:
        past.append(kept.pop(worst))
    if len(kept) < 2:
        raise ValueError(
            f"The cameras of '{socket}' don't look at a common place, so the subject can't be "
            "placed: connect the rig that belongs to the pictures, in their order."
        )
    told = [f"{_listed(empty)} without the subject"] if empty else []
    told += [f"{_listed(sorted(past))} whose camera looks past it"] if past else []
    return Usable(kept, f"left out: {'; '.join(told)}" if told else "")


def evenly(count: int, most: int) -> list[int]:
    """At most so many of `count`, as far apart in their order as can be."""
    if count <= most:
        return list(range(count))
    return [round(n * count / most) for n in range(most)]


def learning_size(width: int, height: int, longest: int) -> tuple[int, int]:
    """Width and height in multiples of 16, no larger than they are and at most `longest`."""
    scale = min(1.0, longest / max(width, height))
    return tuple(max(32, int(n * scale / 16 + 0.5) * 16) for n in (width, height))


def between(
    rig: Rig,
    count: int,
) -> tuple[Rig, list[int]]:
    """At most `count` cameras, each halfway from one of the rig to the one that stands nearest to it,
    at the mean of their distances; and the number of the one."""
    space = subject_space(rig.T_camera_world)
    eyes = rig.centers.double() - space.centre.to(rig.centers.device)
    distances = eyes.norm(dim=1)
    towards = eyes / distances[:, None]
    R = rig.T_camera_world[:, :3, :3].double()
    near = evenly(len(rig), count)
    cameras, lenses = [], []
    for a in near:
        angles = torch.arccos((towards @ towards[a]).clamp(-1, 1))
        angles[a] = math.inf
        # A camera at the same place would give the picture itself; one beyond, none between.
        angles[angles < SAME] = math.inf
        b = int(angles.argmin())
        b = b if float(angles[b]) < OPPOSITE else a
        U, _, Vh = torch.linalg.svd(R[a] + R[b])
        turned = U @ Vh
        eye = F.normalize(towards[a] + towards[b], dim=0)
        eye = eye * (distances[a] + distances[b]) / 2 + space.centre.to(eye)
        T = torch.eye(4, dtype=torch.float64)
        T[:3, :3], T[:3, 3] = turned, -turned @ eye
        cameras.append(T)
        lenses.append((rig.K[a] + rig.K[b]) / 2)
    T = torch.stack(cameras).to(rig.T_camera_world)
    return Rig(torch.stack(lenses), T, rig.width, rig.height), near


def _looks_past(rig: Rig) -> int | None:
    """The camera that looks farthest past the place that all look at, if it is not in its picture."""
    try:
        centre = subject_space(rig.T_camera_world).centre
    except ValueError:  # they look away from each other
        return 0
    pixels, depth = project(centre[None].to(rig.T_camera_world), rig)
    size = pixels.new_tensor([rig.width, rig.height])
    inside = ((pixels >= 0) & (pixels <= size)).all(-1) & (depth > 0)  # [V, 1]
    if bool(inside.all()):
        return None
    away = (pixels[:, 0] - size / 2).norm(dim=-1)
    return int(torch.where(depth[:, 0] > 0, away, torch.inf).argmax())


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(str(n + 1) for n in numbers[:8])
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"picture{'s' if len(numbers) > 1 else ''} {shown}{more}"
