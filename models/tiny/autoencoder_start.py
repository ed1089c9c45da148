"""A starting point for the tiny VAE that is computed, not trained.

The encoder becomes a principal component analysis of 8x8x4 blocks of pixels, split over its three
levels (a block of a block has the components of its components); it is linear, and rotated so that
ComfyUI's linear preview of Wan 2.1 latents shows the picture. The decoder becomes a least-squares
fit, level by level: a quarter-size, a half-size and the full-size picture from 3x3 windows of what
the level below knows. All other channels start random (He 2015) and small, for training to use.
On the tiny family's scenes this start is about as good as an hour of training from random weights.

Both sides are built of ReLUs; a channel that holds the constant 1 shifts every linear quantity into
their positive range.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .autoencoder import (
    ENCODER_WIDTH,
    LATENT_CHANNELS,
    STRIDE,
    JoinFrames,
    MemoryBlock,
    SplitFrames,
    TinyVAE,
)
from .layout import WAN21_LATENT_MEAN, WAN21_LATENT_STD, WAN21_RGB_BIAS, WAN21_RGB_FACTORS

SHIFT = 1.5
"""Lifts signed components of pictures in 0..1 above zero."""
LATENT_STD = 0.4
"""Over pictures that are mostly background; on a performer it is about 1. The decoder's soft clamp
cuts what is far beyond it."""
COMPONENTS = (44, 48)
"""Kept after joining frames, and after joining 2x2 pixels; at the first level all 6 and 24 fit."""
SAMPLES = 60_000
ROUGH = 0.1
"""Gain of a residual branch at the start."""


def _randomise(side: nn.Module) -> None:
    for module in side.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.normal_(0, (2 / module.weight[0].numel()) ** 0.5)
            if module.bias is not None:
                module.bias.zero_()
        if isinstance(module, MemoryBlock):
            module.conv[4].weight.mul_(ROUGH)


def _components(samples: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], principal axes [C, count] and deviations [count] of rows [N, C]."""
    samples = samples[torch.randperm(len(samples))[:SAMPLES]]
    mean = samples.mean(0)
    centred = (samples - mean).double()
    values, axes = torch.linalg.eigh(centred.T @ centred / len(centred))
    axes = axes.flip(1)[:, :count].float()
    return mean, axes, values.flip(0)[:count].clamp(min=1e-12).sqrt().float()


def _spare(blocks: nn.Sequential, kept: slice | list[int]) -> None:
    """Let residual blocks leave these channels alone."""
    for block in blocks:
        block.conv[4].weight[kept] = 0


def _start_level(join: JoinFrames, down: nn.Conv2d, blocks, x: Tensor, used: int) -> int:
    """One encoder level: components of joined frames, then of joined pixels. Gives their number."""
    last = ENCODER_WIDTH - 1
    if join.stride == 1:
        join.conv.weight.copy_(torch.eye(ENCODER_WIDTH)[:, :, None, None])
        count = used
    else:
        chosen = [*range(used), *range(ENCODER_WIDTH, ENCODER_WIDTH + used)]
        rows = rearrange(x, "(n s) c h w -> (n h w) (s c)", s=2)[:, chosen]
        mean, axes, _ = _components(rows, min(len(chosen), COMPONENTS[0]))
        axes, count = axes / 2**0.5, axes.shape[1]
        join.conv.weight[:count] = 0
        join.conv.weight[:count, chosen, 0, 0] = axes.T
        join.conv.weight[:count, last, 0, 0] = SHIFT - mean @ axes
        join.conv.weight[last] = 0
        join.conv.weight[last, last] = 1
    y = join(x)
    rows = rearrange(y[:, :count], "n c (h a) (w b) -> (n h w) (c a b)", a=2, b=2)
    mean, axes, _ = _components(rows, min(rows.shape[1], COMPONENTS[1]))
    axes, kept = axes / 2, axes.shape[1]
    down.weight[:kept] = down.weight[last] = 0
    # Row 2i and 2i + 1 lie under the last two taps of a kernel at stride 2 and padding 1.
    down.weight[:kept, :count, 1:, 1:] = rearrange(axes, "(c a b) o -> o c a b", a=2, b=2)
    down.weight[:kept, last, 1, 1] = SHIFT - mean @ axes
    down.weight[kept:, last] = 0
    down.weight[last, last, 1, 1] = 1
    _spare(blocks, [*range(kept), last])
    return kept


def _preview_rotation(whitened: Tensor, colors: Tensor) -> Tensor:
    """[16, 16] orthogonal, so that ComfyUI's preview of rotated latents is nearest to colours."""
    linear = torch.linalg.lstsq(whitened, colors - colors.mean(0)).solution  # [16, 3]
    u, _, vh = torch.linalg.svd((WAN21_RGB_FACTORS @ linear.T).double())
    return (u @ vh).float()


@torch.no_grad()
def start_encoder(
    vae: TinyVAE,
    clips: Tensor,  # [B, 3, F, H, W] 0..1; F a multiple of 4, H and W of 8
) -> None:
    """Set the encoder to the block components of these clips."""
    encoder, batch, last = vae.encoder, len(clips), ENCODER_WIDTH - 1
    _randomise(encoder)
    first = encoder[0]
    first.weight[[0, 1, 2, last]] = 0
    first.weight[[0, 1, 2], [0, 1, 2], 1, 1] = 1
    first.bias[last] = 1
    x, used = F.relu(first(clips.movedim(1, 2).flatten(0, 1))), 3
    for start in (2, 7, 12):
        join, down, *blocks = encoder[start : start + 5]
        used = _start_level(join, down, blocks, x, used)
        x = down(join(x))
        for block in blocks:
            x = block(x, len(x) // batch)
    rows = rearrange(x, "n c h w -> (n h w) c")[:, :used]
    mean, axes, deviations = _components(rows, LATENT_CHANNELS)
    colors = F.avg_pool3d(clips, (STRIDE, 8, 8)).movedim(1, -1).flatten(0, -2) * 2 - 1
    turn = _preview_rotation((rows - mean) @ (axes / deviations), colors)
    # Mid grey in the preview at the mean latent.
    middle = WAN21_RGB_FACTORS @ torch.linalg.solve(
        WAN21_RGB_FACTORS.T @ WAN21_RGB_FACTORS, -WAN21_RGB_BIAS
    )
    weight = WAN21_LATENT_STD[:, None] * LATENT_STD * (turn @ (axes / deviations).T)
    final = encoder[17]
    final.weight.zero_()
    final.weight[:, :used, 1, 1] = weight
    final.bias.copy_(WAN21_LATENT_MEAN + WAN21_LATENT_STD * middle - weight @ mean)


def _fit_windows(x: Tensor, target: Tensor) -> Tensor:
    """[O, C, 3, 3] kernel that makes `target` [N, O, H, W] of x [N, C, H, W] (ridge regression)."""
    O, C = target.shape[1], x.shape[1]
    gram = torch.zeros(9 * C, 9 * C, dtype=torch.float64)
    right = torch.zeros(9 * C, O, dtype=torch.float64)
    for part, wanted in zip(x.split(8), target.split(8), strict=True):
        rows = rearrange(F.unfold(part, 3, padding=1), "n k p -> (n p) k")
        chosen = torch.randperm(len(rows))[: SAMPLES // 3]
        rows, wanted = rows[chosen], rearrange(wanted, "n c h w -> (n h w) c")[chosen]
        gram += (rows.T @ rows).double()
        right += (rows.T @ wanted).double()
    gram += torch.eye(len(gram)) * gram.diagonal().mean() * 1e-4
    return torch.linalg.solve(gram, right).T.reshape(O, C, 3, 3).float()


def _pass_on(conv: nn.Conv2d, to: int, since: int, count: int) -> None:
    """Carry channels through a convolution behind an enlargement, smoothed over its steps."""
    smooth = torch.tensor([0.25, 0.5, 0.25])
    conv.weight[to : to + count] = 0
    rows = torch.arange(count)
    conv.weight[to + rows, since + rows] = smooth[:, None] * smooth


def _fit_level(up: nn.Conv2d, x: Tensor, known: int, target: Tensor) -> None:
    up.weight[: target.shape[1]] = 0
    up.weight[: target.shape[1], :known] = _fit_windows(x[:, :known], target)


def _quieten(up: nn.Conv2d, x: Tensor, known: int) -> None:
    """Random channels at half the deviation of a normal one."""
    up.weight[known:].mul_(0.5 / up(x)[:, known:].std())


def _start_split(split: SplitFrames, pictures: int, known: int) -> None:
    """Of 2n pictures in the first channels, each half gets its own n first and the others next."""
    width = split.conv.in_channels
    weight = torch.eye(width).repeat(2, 1)
    own = torch.arange(pictures)
    for half in (0, 1):
        rows = half * width + own
        weight[rows] = F.one_hot(half * pictures + own, width).float()
        weight[rows + pictures] = F.one_hot((1 - half) * pictures + own, width).float()
        noise = torch.randn(width - known, width) * 0.5 * width**-0.5
        weight[half * width + known : (half + 1) * width] += noise
    split.conv.weight.copy_(weight[:, :, None, None])


def _start_bottom(decoder: nn.Sequential, raw: Tensor, frames: int) -> tuple[Tensor, int]:
    """Signed latents as two channels each, with the constant; the same of the moment before."""
    first, known = decoder[1], 2 * LATENT_CHANNELS + 1
    first.weight[: 2 * known] = 0
    rows = torch.arange(LATENT_CHANNELS)
    first.weight[2 * rows, rows, 1, 1] = 1
    first.weight[2 * rows + 1, rows, 1, 1] = -1
    first.bias[known - 1] = 1
    memory, rows = decoder[3], torch.arange(known)
    memory.conv[0].weight[:known] = memory.conv[2].weight[:known] = 0
    memory.conv[4].weight[known : 2 * known] = 0
    memory.conv[0].weight[rows, first.out_channels + rows, 1, 1] = 1
    memory.conv[2].weight[rows, rows, 1, 1] = 1
    memory.conv[4].weight[known + rows, rows, 1, 1] = 1
    _spare(decoder[4:6], slice(2 * known))
    x = F.relu(first(decoder[0](raw)))
    for block in decoder[3:6]:
        x = block(x, frames)
    return x, 2 * known


@torch.no_grad()
def start_decoder(
    vae: TinyVAE,
    clips: Tensor,  # [B, 3, 4n + 1, H, W] 0..1
) -> None:
    """Fit the decoder's linear part to these clips, from the encoder's latents."""
    decoder = vae.decoder
    _randomise(decoder)
    latents = vae.encode(clips)
    scale, shift = (t.view(1, -1, 1, 1, 1) for t in (WAN21_LATENT_STD, WAN21_LATENT_MEAN))
    raw, T = (latents * scale + shift).movedim(1, 2).flatten(0, 1), latents.shape[2]
    # What decode drops is the first frame once more.
    truth = torch.cat([clips[:, :, :1].expand(-1, -1, STRIDE - 1, -1, -1), clips], 2)

    def pictures(group: int, size: int) -> Tensor:  # [B groups, 3 group, H / size, W / size]
        together = rearrange(truth, "b c (t s) h w -> (b t) (s c) h w", s=group)
        return F.avg_pool2d(together, size) if size > 1 else together

    x, latent_rows = _start_bottom(decoder, raw, T)
    enlarge, split, up = decoder[6:9]
    split.conv.weight.copy_(torch.eye(split.conv.in_channels)[:, :, None, None])
    x, target = enlarge(x), pictures(STRIDE, 4)
    _fit_level(up, x, latent_rows, target)
    _pass_on(up, to=12, since=0, count=latent_rows)
    _quieten(up, x, known := 12 + latent_rows)
    x = up(x)
    _spare(decoder[9:12], slice(known))
    for block in decoder[9:12]:
        x = block(x, T)
    enlarge, split, up = decoder[12:15]
    _start_split(split, 6, known)
    x = split(enlarge(x))
    _fit_level(up, x, known, pictures(2, 2))
    _pass_on(up, to=6, since=12, count=2 * LATENT_CHANNELS + 1)
    _quieten(up, x, known := 6 + 2 * LATENT_CHANNELS + 1)
    x = up(x)
    _spare(decoder[15:18], slice(known))
    for block in decoder[15:18]:
        x = block(x, 2 * T)
    enlarge, split, up = decoder[18:21]
    _start_split(split, 3, known)
    x = split(enlarge(x))
    _fit_level(up, x, known, pictures(1, 1))
    _quieten(up, x, 3)
    final = decoder[22]
    final.weight.mul_(0.05)
    final.weight[:, :3] = 0
    final.weight[[0, 1, 2], [0, 1, 2], 1, 1] = 1
