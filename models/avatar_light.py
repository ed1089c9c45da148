"""The light that an avatar stands in: how bright skin is that faces this way or that.

An avatar that turns a limb changes its brightness. Far lights without shadows, and any sky, give a
matte surface an irradiance that second-order harmonics of its normal tell to a few percent
(Ramamoorthi and Hanrahan 2001); so nine numbers a colour, shared by all Gaussians, stand for the
light. It stands in the world: in poses that were never seen it is right as well. Departure: MVP4D
leaves this to the net.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .splats import C0, Splats, sh_basis

NUMBERS = 9
DARKEST = 0.02


def even_light(like: Tensor) -> Tensor:  # [9, 3]
    """Everything as bright as it is."""
    light = like.new_zeros(NUMBERS, 3)
    light[0] = 1 / C0
    return light


def lit(
    splats: Splats,  # [n]
    normals: Tensor,  # [n, 3] world, of length 1
    light: Tensor,  # [9, 3]
) -> Splats:
    """Gaussians with their colours times the light at them."""
    bright = (sh_basis(normals, 2) @ light).clamp(min=DARKEST)[:, None]
    # A colour is 0.5 + harmonics: the half is lit, too.
    first = bright * splats.sh[:, :1] + (bright - 1) * (0.5 / C0)
    sh = torch.cat([first, bright * splats.sh[:, 1:]], 1)
    return Splats(*splats.tensors()[:4], sh)
