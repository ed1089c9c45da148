"""A rig as text that a creator reads and writes: one camera a line.

    # azimuth elevation distance [fov] [# name]
    0    0   3.2
    90  20   3.2  50   # close, right

Degrees and metres; every camera looks at the origin with the world's up upwards. Empty lines and
lines that begin with # are passed over; commas count as spaces. js/rig_lines.js reads the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .cameras import MAX_VIEWS, Rig, has_plain_lenses, orbit_rig

NUMBERS = ("azimuth", "elevation", "distance", "field of view")
RANGES = {"elevation": (-90, 90), "distance": (0.1, 100), "field of view": (1, 170)}
EXAMPLE = "write azimuth, elevation and distance (degrees, degrees, metres), such as 90 0 3.2"


@dataclass(frozen=True)
class CameraLine:
    """One camera of the text."""

    azimuth: float
    """Degrees, 0 = where the source camera stands, 90 = to its right."""
    elevation: float
    """Degrees above the performer's middle."""
    distance: float
    """Metres from the performer's middle."""
    fov: float | None
    """Vertical field of view in degrees; None = the rig's."""
    name: str
    """"" = called by its angles."""


def parse_camera_lines(text: str) -> list[CameraLine]:
    """The cameras of a text, in its order; a text without any gives []."""
    cameras = []
    for number, line in enumerate(text.splitlines(), 1):
        numbers, _, name = line.partition("#")
        if words := numbers.replace(",", " ").split():
            cameras.append(CameraLine(*_numbers(words, number), name.strip()))
    if len(cameras) > MAX_VIEWS:
        raise ValueError(
            f"'cameras' has {len(cameras)} lines with a camera, but a rig has at most {MAX_VIEWS}: "
            "remove some."
        )
    return cameras


def _numbers(words: list[str], line: int) -> list[float | None]:
    """Azimuth, elevation, distance and fov (or None) of one line."""
    said = f"Line {line} of 'cameras' is '{' '.join(words)[:60]}'"
    try:
        values = [float(word) for word in words]
    except ValueError:
        values = []
    if len(values) not in (3, 4) or not all(map(math.isfinite, values)):
        raise ValueError(f"{said}: {EXAMPLE}; a fourth number is this camera's field of view.")
    for name, value in zip(NUMBERS, values, strict=False):
        low, high = RANGES.get(name, (-math.inf, math.inf))
        if not low <= value <= high:
            raise ValueError(
                f"{said}, so its {name} is {value:g}, but it must lie between {low} and {high}."
            )
    return [*values, *[None] * (4 - len(values))]


def rig_from_lines(
    text: str,
    fov: float,  # degrees, vertical; of the cameras that name none
    width: int,
    height: int,
) -> Rig:
    """The rig of a text with at least one camera; names are those given, else the angles."""
    cameras = parse_camera_lines(text)
    rigs = [
        orbit_rig(
            torch.tensor([math.radians(c.azimuth)]),
            torch.tensor([math.radians(c.elevation)]),
            c.distance,
            math.radians(fov if c.fov is None else c.fov),
            width,
            height,
        )
        for c in cameras
    ]
    if not rigs:
        raise ValueError(f"'cameras' names no camera: {EXAMPLE}, one camera a line.")
    K = torch.cat([rig.K for rig in rigs])
    T = torch.cat([rig.T_camera_world for rig in rigs])
    unnamed = Rig(K, T, width, height)
    if not any(c.name for c in cameras):
        return unnamed
    names = (c.name or label for c, label in zip(cameras, unnamed.labels, strict=True))
    return Rig(K, T, width, height, tuple(names))


def _word(number: float) -> str:
    """A number to four digits after the point, as short as it can be said."""
    word = f"{number:.4f}".rstrip("0").rstrip(".")
    return "0" if word == "-0" else word


def rig_to_lines(rig: Rig) -> tuple[str, bool]:
    """Any rig as text, and whether the text says all of it.

    It says no roll, no look past the origin, no off-centre lens; distances below 0.1 m are raised.
    """
    azimuths, elevations = (torch.rad2deg(a.double()) for a in (rig.azimuths, rig.elevations))
    distances = rig.centers.double().norm(dim=1).clamp(*RANGES["distance"])
    fovs = torch.rad2deg(2 * torch.atan(rig.height / 2 / rig.K[:, 1, 1].double()))
    table = torch.stack([azimuths, elevations, distances, fovs.clamp(*RANGES["field of view"])], 1)
    names = rig.names or ("",) * len(rig)
    lines = []
    for (azimuth, *others), name in zip(table.tolist(), names, strict=True):
        words = [_word(round(azimuth, 4) % 360), *map(_word, others)]
        lines.append(" ".join([*words, "#", *name.split()] if name else words))
    text = "\n".join(lines)
    again = rig_from_lines(text, 35.0, rig.width, rig.height)
    same = torch.allclose(again.T_camera_world, rig.T_camera_world, atol=2e-3)
    focal = torch.allclose(again.K[:, 1, 1], rig.K[:, 1, 1], rtol=5e-3)
    return text, same and focal and has_plain_lenses(rig)
