"""Small operations on pictures that several stages share: blurring, growing, reading between pixels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .metrics import sample


def gaussian(pictures: Tensor, sigma: float) -> Tensor:  # [C, h, w]
    """Blurred, with the border repeated outwards."""
    reach = math.ceil(3 * sigma)
    x = torch.arange(-reach, reach + 1, device=pictures.device, dtype=pictures.dtype)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    padded = F.pad(pictures[:, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel), kernel.mT)[:, 0]


def grown(masks: Tensor, reach: int) -> Tensor:  # [F, h, w]
    """The largest value within a square; its sides one after the other, which is quicker."""
    size = 2 * reach + 1
    wide = F.max_pool2d(masks[:, None], (1, size), 1, (0, reach))
    return F.max_pool2d(wide, (size, 1), 1, (reach, 0))[:, 0]


def read_at(field: Tensor, places: Tensor) -> Tensor:  # [C, h, w], [N, 2] -> [N, C]
    return sample(field[None], places[None, None, :, 0], places[None, None, :, 1])[0, :, 0].T
