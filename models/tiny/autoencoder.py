"""The tiny VAE: a small video autoencoder in the layout of TAEHV, which ComfyUI loads natively.

Convolutions in space; time enters by blocks that also see the frame before (zeros before the first)
and by joining or splitting neighbouring frames. Much cheaper than Wan's causal 3D VAE (a seventh of
the time for a 128x160 frame on a CPU) with the same latent: 8x8 in space, 4x in time, 16 channels.

Like the host, `encode` repeats the last frame until their number is a multiple of 4, and `decode`
drops the three frames before the first one, so 4n + 1 frames give n + 1 latent frames and come back.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layout import WAN21_LATENT_MEAN, WAN21_LATENT_STD

LATENT_CHANNELS = 16
ENCODER_WIDTH = 64
DECODER_WIDTHS = (256, 128, 64, 64)
STRIDE = 4
"""Frames of one latent frame."""


def _conv(n_in: int, n_out: int, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, padding=1, **kwargs)


class SoftClamp(nn.Module):
    """3 tanh(x / 3), so that no latent can break the decoder."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemoryBlock(nn.Module):
    """A residual block over this frame and the one before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, x: Tensor, frames: int) -> Tensor:  # [B frames, C, H, W], twice
        clip = x.unflatten(0, (-1, frames))
        before = F.pad(clip[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0)).flatten(0, 1)
        return F.relu(self.conv(torch.cat([x, before], 1)) + x)


class JoinFrames(nn.Module):
    """`stride` neighbouring frames become one."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(stride * width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.reshape(-1, self.stride * x.shape[1], *x.shape[2:]))


class SplitFrames(nn.Module):
    """One frame becomes `stride` neighbouring ones."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, stride * width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(-1, x.shape[1], *x.shape[2:])


def _encoder() -> nn.Sequential:
    width = ENCODER_WIDTH
    layers = [_conv(3, width), nn.ReLU()]
    for stride in (2, 2, 1):
        layers += [JoinFrames(width, stride), _conv(width, width, stride=2, bias=False)]
        layers += [MemoryBlock(width) for _ in range(3)]
    return nn.Sequential(*layers, _conv(width, LATENT_CHANNELS))


def _decoder() -> nn.Sequential:
    widths = DECODER_WIDTHS
    layers = [SoftClamp(), _conv(LATENT_CHANNELS, widths[0]), nn.ReLU()]
    for width, after, stride in zip(widths, widths[1:], (1, 2, 2), strict=False):
        layers += [MemoryBlock(width) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), SplitFrames(width, stride)]
        layers += [_conv(width, after, bias=False)]
    return nn.Sequential(*layers, nn.ReLU(), _conv(widths[-1], 3))


def _run(layers: nn.Sequential, clip: Tensor) -> Tensor:  # [B, frames, C, H, W], twice
    x, batch = clip.flatten(0, 1), len(clip)
    for layer in layers:
        x = layer(x, len(x) // batch) if isinstance(layer, MemoryBlock) else layer(x)
    return x.unflatten(0, (batch, -1))


class TinyVAE(nn.Module):
    """Pixels 0..1 to latents of about zero mean and unit deviation (what a DiT sees) and back.

    The file's own latents are Wan 2.1's raw ones, which ComfyUI normalises itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = _encoder(), _decoder()

    def encode(
        self,
        clip: Tensor,  # [B, 3, F, H, W] 0..1; H, W multiples of 8
    ) -> Tensor:  # [B, 16, ceil(F / 4), H / 8, W / 8]
        clip = clip.movedim(1, 2)
        missing = -clip.shape[1] % STRIDE
        clip = torch.cat([clip, clip[:, -1:].expand(-1, missing, -1, -1, -1)], 1)
        raw = _run(self.encoder, clip).movedim(1, 2)
        return (raw - _column(WAN21_LATENT_MEAN, raw)) / _column(WAN21_LATENT_STD, raw)

    def decode(
        self,
        latents: Tensor,  # [B, 16, T, h, w]
    ) -> Tensor:  # [B, 3, 4 T - 3, 8 h, 8 w], about 0..1
        raw = latents * _column(WAN21_LATENT_STD, latents) + _column(WAN21_LATENT_MEAN, latents)
        return _run(self.decoder, raw.movedim(1, 2))[:, STRIDE - 1 :].movedim(1, 2)


@torch.no_grad()
def encoder_as_convolution(vae: TinyVAE) -> tuple[Tensor, Tensor]:  # [16, 3, 4, 8, 8], [16]
    """The encoder that `autoencoder_start.py` computes, which is linear in blocks, as the one convolution
    it amounts to; hundreds of times cheaper where whole data sets are encoded."""
    block = (3, STRIDE, 8, 8)
    size = math.prod(block)
    probes = torch.cat([torch.zeros(1, size), torch.eye(size)]).view(-1, *block).double()
    bias, columns = copy.deepcopy(vae).double().encode(probes).flatten(1).split([1, size])
    return (columns - bias).T.reshape(LATENT_CHANNELS, *block).float(), bias[0].float()


def encode_linearly(
    clip: Tensor,  # [B, 3, F, H, W] 0..1
    weight: Tensor,
    bias: Tensor,
) -> Tensor:  # [B, 16, ceil(F / 4), H / 8, W / 8]
    """What `TinyVAE.encode` gives, by `encoder_as_convolution`."""
    missing = -clip.shape[2] % STRIDE
    clip = torch.cat([clip, clip[:, :, -1:].expand(-1, -1, missing, -1, -1)], 2)
    return F.conv3d(clip, weight, bias, stride=weight.shape[2:])


def _column(per_channel: Tensor, like: Tensor) -> Tensor:
    return per_channel.to(like).view(1, -1, 1, 1, 1)
