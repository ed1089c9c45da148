"""What published video checkpoints are told of one view, in the layouts that they were trained with.

Stage: pictures of a view -> the clips that the VAE encodes, and masks over the latent's frames.

VACE: a mask divides a clip into what is kept (0, "inactive") and what is made (1, "reactive": a
control such as depth or a pose says how). Each part is grey where the other one is. The mask goes
along at full resolution: the 8 x 8 pixels of a latent pixel are 64 channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .views import latent_frames

GREY = 0.5
"""Of pictures 0..1: nothing is known here."""
MASK_STRIDE = 8
"""Pixels a side of a latent pixel of the VAE that VACE was trained with."""


def vace_parts(
    control: Tensor,  # [F, 3, H, W] 0..1, how to make what is not known
    partial: Tensor | None,  # [F, 3, H, W] 0..1, the known colours; None = nothing is known
    seen: Tensor | None,  # [F, H, W] bool, where they are known
) -> tuple[Tensor, Tensor, Tensor]:  # inactive, reactive [F, 3, H, W], make [F, H, W] 0 or 1
    """A clip that keeps what was seen and makes the rest, in VACE's two parts."""
    make = torch.ones_like(control[:, 0])
    if partial is not None:
        control = torch.where(seen[:, None], partial, control)
        make[seen] = 0
    around_grey = control - GREY
    return around_grey * (1 - make[:, None]) + GREY, around_grey * make[:, None] + GREY, make


def vace_mask(
    make: Tensor,  # [F, H, W]
) -> Tensor:  # [64, T, h, w]
    """The mask as channels: row by row of the 8 x 8 pixels; over time the nearest frame counts."""
    n = MASK_STRIDE
    channels = rearrange(make, "f (h y) (w x) -> (y x) f h w", y=n, x=n)
    size = (latent_frames(len(make)), *channels.shape[2:])
    return F.interpolate(channels[None], size=size, mode="nearest-exact")[0]


def start_clip(
    start: Tensor,  # [n, 3, H, W] 0..1
    frames: int,
) -> Tensor:  # [frames, 3, H, W]
    """A clip that begins so and is grey from there on."""
    clip = start.new_full((frames, *start.shape[1:]), GREY)
    clip[: len(start)] = start
    return clip


def unknown_frames(
    known: int,  # of the latent's frames, the first
    size: tuple[int, int, int],  # T, h, w
) -> Tensor:  # [1, 1, T, h, w], 0 = known, 1 = to be made
    mask = torch.ones(1, 1, *size)
    mask[:, :, :known] = 0
    return mask
