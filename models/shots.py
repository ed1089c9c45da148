"""Where one shot of a clip ends and the next begins.

Stage: before anything that follows motion, since nothing moves across a cut. Two neighbouring
pictures belong to one shot when blocks of the one are found again near their place in the other,
compared by normalised correlation: a factor or an offset of the colours changes nothing, so neither
exposure jumps nor flicker are cuts. A flash or a spoilt frame is bridged: the shot goes on when a
frame before it and a frame after it match.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .filters import gaussian

SIDE = 64
"""Pixels of the shorter side at which pictures are compared: finer is grain and texture."""
COARSE = 3.0
"""Pixels there (sigma of a Gaussian): what is coarser is left out, since any two slopes match."""
BLOCK, REACH = 16, 8
"""Pixels there: a block's edge, and how far it may move in a frame."""
STEADY = 0.8
"""Correlation of blocks that did not move at all above which none is searched for."""
FALL, USUAL = 0.65, 0.62
"""A cut is where the correlation falls below this share of what is usual around it; and what is
usual where nothing is known: dancers and noise come to 0.5, other shots to 0.15 to 0.4."""
LOWEST, HIGHEST = 0.3, 0.6
"""The limit's own limits."""
AROUND = 8
"""Neighbours to either side that say what is usual."""
BRIDGED = 3
"""Frames from one to the other of a pair that may show that the shot goes on: flashes and spoilt
frames, up to two in a row, are bridged."""
QUIETER, NOISIEST, HUM = 0.25, 0.05, 2.0
"""A clip's noise is at most what the plainest quarter of the blocks shows, at most this standard
deviation; blocks must vary by so much more than it to count."""
FAINT = 0.004
"""Standard deviation of a block that shows nothing (one step of 8 bits)."""


def cuts(
    frames: Tensor,  # [F, 3, H, W] 0..1
    tick: Callable[[], None] | None = None,  # called now and then: may raise to stop
) -> list[int]:
    """First frames of new shots, in order; empty for a clip of one shot.

    A fade or a dissolve is no cut, nor is a change of light, however sudden."""
    small = _details(frames)
    score = torch.ones(len(small) - 1)
    for f in range(len(score)):
        if tick:
            tick()
        score[f] = _alike(small[f], small[f + 1])
    found: list[int] = []
    for f in range(1, len(small)):
        limit = _limit(score, f - 1)
        if score[f - 1] < limit and not _bridged(small, f, found[-1] if found else 0, limit):
            found.append(f)
    return found


def shots(frames: Tensor, tick: Callable[[], None] | None = None) -> list[range]:
    """The frames [F, 3, H, W] of every shot, in order; together they are the clip."""
    starts = [0, *cuts(frames, tick)]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(frames)], strict=True)]


def _details(frames: Tensor) -> Tensor:
    """Small pictures without what is coarse; a few at a time, since clips may be huge."""
    H, W = frames.shape[-2:]
    scale = SIDE / min(H, W)
    size = (max(BLOCK, round(H * scale)), max(BLOCK, round(W * scale)))
    mode = {"mode": "area"} if scale < 1 else {"mode": "bilinear", "align_corners": False}
    parts = [F.interpolate(p.float().nan_to_num(0.5), size=size, **mode) for p in frames.split(16)]
    small = torch.cat(parts)
    return small - gaussian(small.flatten(0, 1), COARSE).view_as(small)


def _limit(score: Tensor, n: int) -> float:
    """Below which pair n is no pair of one shot, by the other pairs around it."""
    others = torch.cat([score[max(0, n - AROUND) : n], score[n + 1 : n + 1 + AROUND]])
    usual = float(torch.cat([others, torch.tensor([USUAL])]).median())
    return min(max(FALL * usual, LOWEST), HIGHEST)


def _bridged(small: Tensor, f: int, first: int, limit: float) -> bool:
    """Whether a frame of the shot just before f is found again in f or just after."""
    pairs = [
        (a, a + gap)
        for gap in range(2, BRIDGED + 1)
        for a in range(max(first, f - gap), f)
        if a + gap < len(small)
    ]
    return any(_alike(small[a], small[b]) > limit for a, b in pairs)


def _alike(a: Tensor, b: Tensor) -> float:  # [3, h, w] twice
    """-1..1: how well blocks of each picture are found again in the other."""
    still = _correlation(a, b, 0)
    return still if still > STEADY else min(_correlation(a, b, REACH), _correlation(b, a, REACH))


def _correlation(a: Tensor, b: Tensor, reach: int) -> float:
    """The blocks' best normalised correlations within `reach` pixels, weighted by contrast."""
    size = BLOCK + 2 * reach
    blocks = _blocks(a, BLOCK, 0)  # [N, 3, s, s]
    windows = _blocks(b, size, reach)  # [N, 3, s + 2r, s + 2r]
    N, n = len(blocks), BLOCK**2
    blocks = blocks - blocks.mean((2, 3), keepdim=True)
    products = F.conv2d(windows.flatten(0, 1)[None], blocks, groups=N)[0]  # [N, 2r + 1, 2r + 1]
    sums = F.avg_pool2d(windows, BLOCK, 1)
    squares = F.avg_pool2d(windows.square(), BLOCK, 1)
    variance = (squares - sums.square()).sum(1).clamp(min=0)  # [N, 2r + 1, 2r + 1]
    own = blocks.square().mean((2, 3)).sum(1)
    faint = 3 * FAINT**2
    score = products / n / ((own[:, None, None] + faint) * (variance + faint)).sqrt()
    # What only one of the two shows counts as well; what all blocks show is noise, not picture.
    shown = torch.maximum(own, variance[:, reach, reach])
    hum = min(float(shown.quantile(QUIETER)), NOISIEST**2)
    weight = (shown - HUM * hum).clamp(min=0).sqrt()
    if not weight.any():
        weight = shown.sqrt()
    if float(weight.max()) < FAINT:
        return 1.0  # two blank pictures
    return float((score.amax((1, 2)) * weight).sum() / weight.sum())


def _blocks(picture: Tensor, size: int, pad: int) -> Tensor:  # [N, 3, size, size]
    """Windows around every block, with the border repeated outwards."""
    padded = F.pad(picture[None], (pad,) * 4, mode="replicate")[0]
    windows = padded.unfold(1, size, BLOCK).unfold(2, size, BLOCK)  # [3, rows, columns, s, s]
    return windows.flatten(1, 2).movedim(0, 1)
