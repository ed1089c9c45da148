"""Lights on a synthetic performer and what stands behind one, drawn from seeds.

Frame: world of the pack (x right, y down, z forward). A light is far away and has no shadow: it
adds strength x colour x max(0, normal . direction to the light) to the ambient light.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LIGHTS = ((0.4, -0.6, -0.7, 0.42), (-0.7, -0.3, 0.5, 0.22))
"""Directions to the default lights (x, y, z, not unit) and their strength; ambient 0.5."""
LIGHT_KINDS = ("sun", "studio", "night", "backlit")
BACKGROUND_KINDS = ("grey", "plain", "gradient", "indoor")
Color = tuple[float, float, float]
WHITE: Color = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Lighting:
    """Lights of a scene; plain numbers, so that it serves any device."""

    directions: tuple[tuple[float, float, float], ...]
    """To the lights, world, not necessarily unit."""
    strengths: tuple[float, ...]
    colors: tuple[Color, ...]
    ambient: Color = (0.5, 0.5, 0.5)
    exposure: float = 1.0
    kind: str = "default"

    def shade(
        self,
        colors: Tensor,  # [..., 3] of the surface
        normals: Tensor,  # [..., 3] world, unit
    ) -> Tensor:  # [..., 3] 0..1
        light = colors.new_tensor(self.ambient).expand_as(colors)
        lamps = zip(self.directions, self.strengths, self.colors, strict=True)
        for direction, strength, color in lamps:
            to_light = F.normalize(colors.new_tensor(direction), dim=0)
            lit = strength * (normals @ to_light).clamp(min=0)[..., None]
            light = light + (lit if color == WHITE else lit * colors.new_tensor(color))
        if self.exposure != 1:
            light = light * self.exposure
        return (colors * light).clamp(0, 1)


DEFAULT_LIGHTING = Lighting(
    directions=tuple((x, y, z) for x, y, z, _ in LIGHTS),
    strengths=tuple(strength for *_, strength in LIGHTS),
    colors=(WHITE,) * len(LIGHTS),
)


def _direction(azimuth: float, elevation: float) -> tuple[float, float, float]:
    """To a light at this azimuth (0 = behind the source camera) and elevation, radians."""
    return (
        math.sin(azimuth) * math.cos(elevation),
        -math.sin(elevation),
        -math.cos(azimuth) * math.cos(elevation),
    )


def _tint(rng: np.random.Generator, warm: float, spread: float) -> Color:
    """A light's colour: red over blue by `warm`, give or take `spread`."""
    shift = warm + rng.uniform(-spread, spread)
    return (1 + shift, 1.0, 1 - shift)


def draw_lighting(seed: int, kind: str | None = None) -> Lighting:
    """Lights from a seed; `kind` is one of LIGHT_KINDS, or drawn as well."""
    rng = np.random.default_rng(seed)
    drawn = LIGHT_KINDS[rng.integers(len(LIGHT_KINDS))]
    kind = kind or drawn
    side = float(rng.choice([-1, 1]))
    if kind == "sun":  # one hard light from above on any side, blue sky for the rest
        lamps = [(rng.uniform(-math.pi, math.pi), rng.uniform(0.3, 1.2), 0.75, (0.08, 0.05))]
        ambient, exposure = (0.36, 0.40, 0.46), rng.uniform(0.9, 1.1)
    elif kind == "studio":  # key, fill on the other side, rim from behind
        lamps = [
            (side * rng.uniform(0.3, 1.0), rng.uniform(0.3, 0.8), 0.5, (0.0, 0.06)),
            (-side * rng.uniform(0.5, 1.2), rng.uniform(0.0, 0.4), 0.2, (0.0, 0.06)),
            (-side * rng.uniform(2.2, 2.9), rng.uniform(0.3, 0.8), 0.3, (0.0, 0.06)),
        ]
        ambient, exposure = (0.42, 0.42, 0.42), rng.uniform(0.9, 1.1)
    elif kind == "night":  # one lamp, warm or cold, and little else
        warm = float(rng.choice([0.25, -0.2]))
        lamps = [(rng.uniform(-math.pi, math.pi), rng.uniform(0.2, 1.3), 0.7, (warm, 0.05))]
        ambient, exposure = (0.22, 0.25, 0.32), rng.uniform(0.35, 0.6)
    elif kind == "backlit":  # a strong light behind the performer, the front in its own shadow
        lamps = [(math.pi + rng.uniform(-0.7, 0.7), rng.uniform(0.1, 0.7), 0.9, (0.05, 0.08))]
        ambient, exposure = (0.36, 0.36, 0.38), rng.uniform(0.7, 1.0)
    else:
        raise ValueError(f"There is no light '{kind}': choose one of {', '.join(LIGHT_KINDS)}.")
    return Lighting(
        directions=tuple(_direction(azimuth, elevation) for azimuth, elevation, *_ in lamps),
        strengths=tuple(strength for _, _, strength, _ in lamps),
        colors=tuple(_tint(rng, *tint) for *_, tint in lamps),
        ambient=ambient,
        exposure=float(exposure),
        kind=kind,
    )


def _noise(rng: np.random.Generator, height: int, width: int, cells: int, channels: int) -> Tensor:
    """[channels, H, W] smooth noise of about unit spread with `cells` bumps along a side."""
    coarse = torch.from_numpy(rng.standard_normal((1, channels, cells, cells))).float()
    return F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)[0]


def draw_background(
    rng: np.random.Generator,
    height: int,
    width: int,
    kind: str | None = None,
    device: torch.device | str = "cpu",
    lighting: Lighting | None = None,
) -> Tensor:  # [3, H, W] 0..1
    """What stands behind a performer; `kind` is one of BACKGROUND_KINDS, or drawn as well.

    With `lighting`, as bright and tinted as its ambient light makes it.
    """
    drawn = BACKGROUND_KINDS[rng.choice(len(BACKGROUND_KINDS), p=[0.15, 0.2, 0.2, 0.45])]
    kind = kind or drawn
    if kind == "grey":
        picture = torch.full((3, height, width), 0.5)
    elif kind == "plain":
        picture = _random_color(rng).expand(3, height, width)
    elif kind == "gradient":
        angle, start = rng.uniform(0, 2 * math.pi), _random_color(rng)
        y, x = torch.linspace(-0.5, 0.5, height)[:, None], torch.linspace(-0.5, 0.5, width)
        share = 0.5 + (x * math.cos(angle) + y * math.sin(angle)) / math.sqrt(2)
        picture = start + (_random_color(rng) - start) * share
    elif kind == "indoor":
        picture = _indoor(rng, height, width)
    else:
        raise ValueError(
            f"There is no background '{kind}': choose one of {', '.join(BACKGROUND_KINDS)}."
        )
    if lighting is not None:  # the default's ambient light, 0.5, leaves a background as it is
        tint = torch.tensor(lighting.ambient)[:, None, None] / DEFAULT_LIGHTING.ambient[0]
        picture = picture * tint * lighting.exposure
    return picture.contiguous().clamp(0, 1).to(device)


def _random_color(rng: np.random.Generator) -> Tensor:  # [3, 1, 1]
    """Mostly dull, as rooms are: a grey with some hue; now and then a strong one."""
    dull = rng.uniform(0.08, 0.95) + rng.normal(0, 0.06, 3)
    color = rng.uniform(0, 1, 3) if rng.random() < 0.25 else dull
    return torch.from_numpy(color).float().clamp(0, 1)[:, None, None]


def _indoor(rng: np.random.Generator, height: int, width: int) -> Tensor:
    """A wall and a floor, things on and before the wall, uneven light, and grain."""
    horizon = round(height * rng.uniform(0.55, 0.88))
    picture = _random_color(rng).repeat(1, height, width)
    picture[:, horizon:] = _random_color(rng)
    if rng.random() < 0.4:  # boards that run towards the viewer
        y = torch.arange(height - horizon)[:, None] + 0.12 * height
        x = torch.arange(width) - width * rng.uniform(0.2, 0.8)
        boards = (x / y * rng.uniform(1.5, 4)).floor() % 2
        picture[:, horizon:] *= 1 - 0.15 * boards
    for _ in range(rng.integers(2, 8)):  # windows, doors, shelves, boxes
        h, w = rng.uniform(0.06, 0.5) * height, rng.uniform(0.05, 0.35) * width
        left = rng.uniform(-0.1, 1) * width
        stands = rng.random() < 0.5
        bottom = horizon + rng.uniform(0, 0.1) * height if stands else rng.uniform(0.1, 1) * horizon
        rows = slice(max(0, round(bottom - h)), max(0, round(bottom)))
        columns = slice(max(0, round(left)), max(0, round(left + w)))
        thing = _random_color(rng)
        if rng.random() < 0.3:  # with stripes: blinds, books
            stripe = torch.sin(torch.arange(width) * rng.uniform(0.3, 2.0)) > 0
            thing = torch.where(stripe[None, None, columns], thing, _random_color(rng))
        picture[:, rows, columns] = thing
    picture = picture * (1 + rng.uniform(0, 0.2) * _noise(rng, height, width, 3, 1))
    picture = picture + rng.uniform(0, 0.05) * _noise(rng, height, width, 12, 3)
    grain = torch.from_numpy(rng.standard_normal((3, height, width), dtype=np.float32))
    return picture + rng.uniform(0, 0.03) * grain
