"""Looks: where one camera stands, in five words that a creator reads and writes.

"azimuth 30, elevation 10, distance 3.2, fov 35, at 0 0.1 0": degrees and metres; `at` is the point
that stands in the picture's middle. The viewer of Preview Avatar writes them, a rig is made of them.
Frame: world of the pack; a look is level, its lens centred.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .cameras import Rig, orbit_rig

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
PART = re.compile(
    rf"\s*(?:(azimuth|elevation|distance|fov)\s+({NUMBER})|at((?:\s+{NUMBER}){{3}}))\s*", re.I
)
STEEPEST = 89.0
"""Degrees: straight above or below there is no horizon."""
LIMITS = {"distance": (0.01, 1000.0), "fov": (1.0, 150.0)}


@dataclass(frozen=True)
class Look:
    """A level camera that looks at a point."""

    azimuth: float
    """Degrees, 0 = where the source camera stands, positive towards +x."""
    elevation: float
    """Degrees above the point."""
    distance: float
    """Metres from it."""
    fov: float
    """Degrees, of the picture's height."""
    at: tuple[float, float, float]
    """Metres, world."""

    def rig(self, width: int, height: int) -> Rig:
        """The rig of this one camera."""
        around, above = (torch.tensor([math.radians(v)]) for v in (self.azimuth, self.elevation))
        return orbit_rig(
            around, above, self.distance, math.radians(self.fov), width, height,
            torch.tensor(self.at),
        )  # fmt: skip

    def numbers(self) -> list[float]:
        """[7] for the page: azimuth, elevation, distance, fov, at."""
        return [self.azimuth, self.elevation, self.distance, self.fov, *self.at]


def read_look(text: str, missing: Look) -> Look:
    """The look that a text names; what it leaves out is as in `missing`."""
    found: dict[str, float | tuple[float, ...]] = {}
    for part in re.split(r"[,;\n]", text):
        if not part.strip():
            continue
        match = PART.fullmatch(part)
        if match is None:
            raise ValueError(
                f"'camera' holds '{part.strip()}', which is no part of a camera: write for example "
                "azimuth 30, elevation 10, distance 3, fov 35, at 0 0 0, or press the camera in the "
                "view."
            )
        if match[3]:
            found["at"] = tuple(float(v) for v in match[3].split())
        else:
            found[match[1].lower()] = float(match[2])
    look = replace(missing, **found)
    for name, (low, high) in LIMITS.items():
        if not low <= getattr(look, name) <= high:
            raise ValueError(
                f"'camera' has {name} {getattr(look, name):g}; it must lie between {low:g} and "
                f"{high:g}."
            )
    if not all(map(math.isfinite, look.numbers())):
        raise ValueError("'camera' holds a number too large to stand anywhere.")
    return replace(look, elevation=min(max(look.elevation, -STEEPEST), STEEPEST))


def looks_of(
    rig: Rig,
    middle: Tensor,  # [3] world: what the cameras are there for
) -> list[Look]:
    """The rig's cameras, level and with centred lenses: each turns about the point of its optical axis
    that is nearest to the middle."""
    centers = rig.centers.double().cpu()
    forward = rig.T_camera_world[:, 2, :3].double().cpu()
    middle = middle.double().cpu()
    looks = []
    for eye, axis, K in zip(centers, forward, rig.K.tolist(), strict=True):
        distance = max(float((middle - eye) @ axis), 0.1)
        away = -axis
        level = math.hypot(float(away[0]), float(away[2]))
        looks.append(
            Look(
                math.degrees(math.atan2(float(away[0]), -float(away[2]))) if level > 1e-9 else 0.0,
                math.degrees(math.atan2(-float(away[1]), level)),
                distance,
                math.degrees(2 * math.atan(rig.height / 2 / K[1][1])),
                tuple((eye + distance * axis).tolist()),
            )
        )
    return looks
