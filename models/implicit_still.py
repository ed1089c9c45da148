"""What stands still in a clip, and how each frame strays from it: its cast and its jitter.

Stage: part of where an implicit video begins (implicit_start.py). Where the camera stands, most of a
picture shows the same in every frame but for flicker, and the mean of all frames says it far better
than flow from frame to frame: each frame's cast and jitter are told against that mean, which then is
taken again. What moves is left out by looking different.

Frames: pixels of small pictures of one view and one shot, without regard to masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .filters import gaussian
from .implicit_start import (
    cast_between,
    correct,
    hats,
    inverse,
    lasting,
    smoothed,
    structure,
    warped_sharp,
)

STILL_PATCH = 7
"""Pixels a side over which a frame is compared with the mean."""
EDGE = 3
"""Pixels a side by which what moves is widened."""
SWAYS = (0.02, 0.016, 0.0137, 0.011, 0.0094, 0.0075)
"""Share of the longer side by which what stands still may be bent beyond the jitter known by then, turn
by turn: much until it is known, or the places that are bent most pass for motion; then less."""
FAR = 2.5
"""Times the usual difference from the mean beyond which something else is seen."""
LEAST = 2e-5
"""Mean squared difference of colours that means nothing: the step of 8 bits."""
USUAL_BEND = 0.7
"""Pixels: what jitter is expected to be, against which noise is weighed."""
NOISE_ALIKE = 4.0
"""Pixels of noise that stand for one: blotches are wider than a pixel."""


@dataclass(frozen=True)
class Still:
    """What `find_still` tells."""

    share: Tensor
    """[F, h, w] 0..1, how surely a pixel shows what stands still."""
    gain: Tensor
    """[F, 3, cells, cells]"""
    offset: Tensor
    jitter: Tensor
    """[F, 2, h, w] pixels: what a frame shows at q belongs to q + jitter(q)."""


def find_still(
    pictures: Tensor,  # [F, 3, h, w]
    cells: int,
    tick,
) -> Still:
    """Mean picture, casts, jitter and what takes part, in turns."""
    count, (h, w) = len(pictures), pictures.shape[-2:]
    weights = hats((h, w), cells, pictures)
    gain = pictures.new_ones(count, 3, cells**2)
    offset = torch.zeros_like(gain)
    jitter = pictures.new_zeros(count, 2, h, w)
    share = pictures.new_ones(count, h, w)
    plate = pictures.median(0).values
    for sway in SWAYS:
        straight = torch.stack(
            [warped_sharp(p, inverse(j)) for p, j in zip(pictures, jitter, strict=True)]
        )
        found = []
        for picture, sure in zip(straight, share, strict=True):
            tick()
            found.append(
                cast_between(picture.flatten(1), plate.flatten(1), sure.flatten(), weights)
            )
        gain, offset = (torch.stack(part) for part in zip(*found, strict=True))
        steady = torch.stack(
            [correct(p, g, o, weights) for p, g, o in zip(straight, gain, offset, strict=True)]
        )
        share = _share(steady, plate, sway)
        jitter = _nearer(steady, plate, jitter, share, tick)
        jitter = jitter - jitter.mean(0)  # on average the clip stands where it should
        total = share.sum(0)
        mean = (steady * share[:, None]).sum(0) / total.clamp(min=1e-6)
        plate = torch.lerp(steady.median(0).values, mean, (total / (count / 4)).clamp(0, 1))
    lasts = lasting(jitter)
    return Still(
        share * (lasts < MOTION),
        *(t.view(count, 3, cells, cells) for t in (gain, offset)),
        jitter * _worth(jitter) * ((MOTION - lasts) / MOTION).clamp(0, 1),
    )


MOTION = 0.4
"""Likeness of displacements from frame to frame from which they are motion."""


UNSURE = 0.25
"""Pixels by which still pictures seem to be bent."""


def _worth(jitter: Tensor) -> Tensor:  # [F, 2, h, w] -> [h, w]
    """0..1: what is no larger than usual is an estimate's error (James and Stein's shrinkage)."""
    size = jitter.square().sum(1).mean(0)[None]
    around = smoothed(size, torch.ones_like(size[0]), max(size.shape[-2:]) / 12)[0]
    return (1 - UNSURE**2 / around.clamp(min=1e-8)).clamp(min=0)


def _patches(values: Tensor) -> Tensor:  # [F, h, w]
    return F.avg_pool2d(values[:, None], STILL_PATCH, 1, STILL_PATCH // 2, count_include_pad=False)[
        :, 0
    ]


def _share(steady: Tensor, plate: Tensor, sway: float) -> Tensor:  # [F, h, w]
    """Whether patches differ from the mean by no more than flicker and a small bend make them."""
    away = _patches((steady - plate).square().sum(1))
    xx, _, yy = structure(plate)
    bent = _patches(((sway * max(plate.shape[-2:])) ** 2 / 2 * (xx + yy))[None])[0]
    noise = away.flatten(1).median(1).values.clamp(min=LEAST)[:, None, None]
    like = torch.exp(-(away / (FAR * noise + bent)).square())
    # Not at the edge of what moves either, which blurs into the mean.
    return 1 - F.max_pool2d(1 - (2 * like - 1).clamp(min=0), EDGE, 1, EDGE // 2)


def _nearer(steady: Tensor, plate: Tensor, jitter: Tensor, share: Tensor, tick) -> Tensor:
    """One step of Gauss and Newton for the jitter of all frames, smooth over the picture: first in
    wide, then in narrow surroundings, which take from the wide what they don't tell themselves."""
    side = max(plate.shape[-2:])
    away = steady - plate
    noise = (away.square().sum(1) * share).sum() / share.sum().clamp(min=1.0) + LEAST
    dy, dx = torch.gradient(plate, dim=(1, 2))
    xx, xy, yy = structure(plate)
    out = []
    for e, j, w in zip(away, jitter, share, strict=True):
        tick()
        u, v = j
        sums = torch.stack([
            xx, xy, yy, (dx * e).sum(0) + xx * u + xy * v, (dy * e).sum(0) + xy * u + yy * v,
        ]) * w  # fmt: skip
        known = torch.zeros_like(j)
        for sigma in (side / 10, side / 20, side / 40, side / 70):
            a, b, c, p, q = gaussian(sums, sigma)
            ridge = noise / (USUAL_BEND**2 * 12.6 * sigma**2) * NOISE_ALIKE
            a, c, p, q = a + ridge, c + ridge, p + ridge * known[0], q + ridge * known[1]
            known = torch.stack([c * p - b * q, a * q - b * p]) / (a * c - b * b)
        out.append(known)
    return torch.stack(out)
