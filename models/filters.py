"""Small operations that several stages share: blurring, growing, reading between pixels, smoothing over
time."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .metrics import sample

MATRIX = 512
"""Pixels a side up to which blurring is two products of matrices: for few channels several times as
quick as a convolution, since a processor's libraries are tuned for that."""


def gaussian(pictures: Tensor, sigma: float) -> Tensor:  # [C, h, w]
    """Blurred, with the border repeated outwards."""
    h, w = pictures.shape[-2:]
    if max(h, w) <= MATRIX:
        down, across = (_blurring(n, sigma).to(pictures) for n in (h, w))
        return down @ pictures @ across.T
    kernel = _bell(sigma).to(pictures).view(1, 1, 1, -1)
    padded = F.pad(pictures[:, None], (kernel.shape[-1] // 2,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel), kernel.mT)[:, 0]


@torch.inference_mode(False)
def _bell(sigma: float) -> Tensor:  # [2 reach + 1], sum 1
    reach = math.ceil(3 * sigma)
    x = torch.arange(-reach, reach + 1, dtype=torch.float64)
    bell = torch.exp(-(x**2) / (2 * sigma**2))
    return bell / bell.sum()


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _blurring(size: int, sigma: float) -> Tensor:  # [size, size]
    """What every place of a row weighs in every blurred one."""
    bell = _bell(sigma)
    reach = len(bell) // 2
    place = torch.arange(size)
    matrix = torch.zeros(size, size)
    for k, weight in zip(range(-reach, reach + 1), bell, strict=True):
        matrix[place, (place + k).clamp(0, size - 1)] += weight
    return matrix


def grown(masks: Tensor, reach: int) -> Tensor:  # [F, h, w]
    """The largest value within a square; its sides one after the other, which is quicker."""
    size = 2 * reach + 1
    wide = F.max_pool2d(masks[:, None], (1, size), 1, (0, reach))
    return F.max_pool2d(wide, (size, 1), 1, (reach, 0))[:, 0]


def read_at(field: Tensor, places: Tensor) -> Tensor:  # [C, h, w], [N, 2] -> [N, C]
    return sample(field[None], places[None, None, :, 0], places[None, None, :, 1])[0, :, 0].T


def local_fit(frames: int, reach: float, degree: int, like: Tensor) -> Tensor:  # [F, F]
    """What every frame's value weighs in every frame's smoothed one: a mean (degree 0) or a line
    (degree 1, of two frames or more) under a Gaussian of `reach` frames around it. A line does not lag
    behind at the ends."""
    t = torch.arange(frames, device=like.device, dtype=like.dtype)
    apart = t[None] - t[:, None]
    weight = torch.exp(-apart.square() / (2 * reach**2))
    s0, s1, s2 = ((weight * apart**k).sum(1, keepdim=True) for k in range(3))
    if degree == 0:
        return weight / s0
    return weight * (s2 - s1 * apart) / (s0 * s2 - s1**2)
