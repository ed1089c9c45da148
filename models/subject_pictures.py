"""Pictures to learn a subject from: cameras of a turntable, and which pictures can be used.

Stage: before Train Subject (subject.py, subject_training.py). Cameras are OpenCV, as everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .cameras import Rig, orbit_rig, project
from .feature_rays import subject_space

LEAST_SEEN = 0.002
"""Share of a picture that the subject must fill: a token or two."""
TURNTABLE_DISTANCE = 3.0
"""Any will do: a subject's space is scaled to its cameras."""
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
    azimuths = torch.arange(count) * (2 * math.pi * turns / steps)
    elevations = torch.full((count,), float(elevation))
    return orbit_rig(azimuths, elevations, TURNTABLE_DISTANCE, fov, width, height)


def usable(
    masks: Tensor,  # [R, H, W] 0..1
    rig: Rig,
) -> Usable:
    """Leaves out pictures without the subject, and cameras that look past where the others look."""
    if len(rig) < 2:
        raise ValueError(
            "'references' has one picture, and one shows nothing of depth: connect two or more from "
            "different sides; eight or more all round are better."
        )
    empty = [v for v in range(len(rig)) if float(masks[v].float().mean()) < LEAST_SEEN]
    kept = [v for v in range(len(rig)) if v not in empty]
    if len(kept) < 2:
        raise ValueError(
            f"The masks of 'references' show the subject in {len(kept)} of {len(rig)} pictures: "
            "connect masks in which the subject is white."
        )
    past: list[int] = []
    while (worst := _looks_past(rig.select(kept))) is not None:
        past.append(kept.pop(worst))
        if len(kept) < 2:
            raise ValueError(
                "The cameras of 'references' don't look at a common place, so the subject can't be "
                "placed: connect the rig that belongs to the pictures, in their order."
            )
    told = [f"{_listed(empty)} without the subject"] if empty else []
    told += [f"{_listed(sorted(past))} whose camera looks past it"] if past else []
    return Usable(kept, f"left out: {'; '.join(told)}" if told else "")


def _looks_past(rig: Rig) -> int | None:
    """The camera that looks farthest past the place that all look at, if it is not in its picture."""
    centre = subject_space(rig.T_camera_world).centre
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
