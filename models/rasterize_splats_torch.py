"""Compositing of projected Gaussians in plain torch, many tiles of the picture at once.

The definition is that of `rasterize_splats.py`. Gaussians are listed by tile, from near to far, and
composited a stretch of the lists at a time. Backward goes through the lists in the same order: what
lies behind a Gaussian is what the whole pixel shows less what came so far. So nothing of the size of
all Gaussians times their pixels is ever kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .rasterize_splats import LEAST_ALPHA, LEAST_LEFT, MOST_ALPHA, Frame, Placed, refuse_too_many

TILE = 8
"""Pixels along a tile's sides: a Gaussian of an avatar is about as wide."""
STRETCH = 32
"""Gaussians of a list composited at once."""
AT_ONCE, AT_ONCE_ELSEWHERE = 1 << 16, 1 << 22
"""Gaussians times pixels that are worked on at a time on a CPU, for its cache, and elsewhere, for its
memory."""
SLACK = 1e-3
"""Pixels by which rounding may move a Gaussian's border."""
SHAPE = 6
"""Slopes of a Gaussian's place and shape: centre, conic, opacity."""


class Lists(NamedTuple):
    """Which Gaussians reach which tiles, from near to far: E pairs."""

    order: Tensor
    """[M] Gaussians from near to far; their ranks are numbers in this."""
    counts: Tensor
    """[M] how many tiles each reaches, by rank; 0 of those that reach no pixel."""
    ranks: Tensor
    """[E] by tile: whose turn it is."""
    slots: Tensor
    """[E] by tile: the same pair's place when pairs are told by rank."""
    starts: Tensor
    """[tiles + 1] where a tile's list begins."""


def tile_lists(frame: Frame, centers: Tensor) -> Lists:
    order = frame.depths.argsort(stable=True)
    middle, reach = centers[order], frame.reach[order]
    sizes = torch.tensor([frame.width, frame.height], device=centers.device)
    # The first and the last pixel whose centres lie within reach.
    first = (middle - reach - 0.5 - SLACK).ceil().clamp(min=0).minimum(sizes).long()
    last = (middle + reach - 0.5 + SLACK).floor().clamp(min=-1).minimum(sizes - 1).long()
    low, high = first // TILE, last // TILE
    reached = (first <= last).all(1) & (reach > 0).all(1)
    spans = torch.where(reached[:, None], high - low + 1, 0)
    counts = spans.prod(1)
    refuse_too_many(int(counts.sum()), len(order))
    ranks = torch.repeat_interleave(counts)
    step = torch.arange(len(ranks), device=ranks.device) - (counts.cumsum(0) - counts)[ranks]
    along = spans[ranks, 0]
    columns = -(-frame.width // TILE)
    tiles = (low[ranks, 1] + step // along) * columns + low[ranks, 0] + step % along
    tiles, slots = tiles.sort(stable=True)
    number = columns * -(-frame.height // TILE)
    starts = torch.searchsorted(tiles, torch.arange(number + 1, device=tiles.device))
    return Lists(order, counts, ranks[slots], slots, starts)


def composite(
    placed: Placed, frame: Frame
) -> tuple[Tensor, Tensor, Lists]:  # sums [C, H, W], what is left [H, W]
    lists = tile_lists(frame, placed.centers)
    C, tiles = placed.features.shape[1], len(lists.starts) - 1
    sums = placed.features.new_zeros(tiles, C, TILE * TILE)
    left = placed.features.new_ones(tiles, TILE * TILE)
    for some in _batches(lists):
        open_ = torch.ones_like(left[some])
        for part in _stretches(placed, frame, lists, some):
            alpha, before, after = _transmittance(part, open_)
            shown = after > LEAST_LEFT
            weights = alpha * before * shown
            sums[some] += part.features.mT @ weights
            left[some] = torch.where(shown, after, 1.0).amin(1).minimum(left[some])
            open_ = after[:, -1]
            if not shown[:, -1].any():
                break
    picture = _untiled(torch.cat([sums, left[:, None]], 1), frame)
    return picture[:-1], picture[-1], lists


def slopes(
    placed: Placed,
    frame: Frame,
    lists: Lists,
    pull: Tensor,  # [C, H, W] gradient of the sums
    behind: Tensor,  # [H, W] all that a pixel shows, weighted by its gradients
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # as placed
    pulls, behinds = _tiled(pull, frame), _tiled(behind[None], frame)[:, 0]
    pairs = pulls.new_zeros(len(lists.slots), SHAPE + len(pull))
    for some in _batches(lists):
        open_, rest, pulled = torch.ones_like(behinds[some]), behinds[some], pulls[some]
        for part in _stretches(placed, frame, lists, some):
            alpha, before, after = _transmittance(part, open_)
            weights = alpha * before * (after > LEAST_LEFT)
            along = part.features @ pulled  # what a Gaussian's colour does to the loss
            shares = weights * along
            rests = rest[:, None] - shares.cumsum(1)
            to_alpha = (before * along - rests / (1 - alpha)) * (weights > 0)
            found = _slopes_of_pairs(part, alpha, to_alpha)
            found = torch.cat([found, weights @ pulled.mT], 2)
            pairs[part.slots[part.listed]] = found[part.listed]
            open_, rest = after[:, -1], rests[:, -1]
            if not (open_ > LEAST_LEFT).any():
                break
    return _summed(pairs, lists)


def _summed(pairs: Tensor, lists: Lists) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of every Gaussian over its tiles, in their order: the same outcome every time."""
    if not len(lists.counts):
        by_rank = pairs
    else:
        by_rank = torch.segment_reduce(pairs, "sum", lengths=lists.counts, initial=0)
    out = torch.empty_like(by_rank)
    out[lists.order] = by_rank
    return out[:, :2], out[:, 2:5], out[:, 5], out[:, SHAPE:]


class Part(NamedTuple):
    """The same stretch of n Gaussians of B tiles' lists; P pixels a tile."""

    dx: Tensor
    """[B, n, P] from the Gaussians to the pixels."""
    dy: Tensor
    conics: Tensor
    """[B, n, 3]"""
    opacities: Tensor
    """[B, n]"""
    features: Tensor
    """[B, n, C]"""
    slots: Tensor
    """[B, n]"""
    listed: Tensor
    """[B, n] bool: short lists are filled up with Gaussians that are invisible."""


def _batches(lists: Lists) -> Iterator[Tensor]:
    """Tiles that are worked on together: lists of about one length, the long ones first."""
    lengths = lists.starts.diff()
    tiles = lengths.argsort(descending=True, stable=True)[: int((lengths > 0).sum())]
    limit = AT_ONCE if lengths.device.type == "cpu" else AT_ONCE_ELSEWHERE
    at_once = max(1, limit // (STRETCH * TILE * TILE))
    return (tiles[first : first + at_once] for first in range(0, len(tiles), at_once))


def _stretches(placed: Placed, frame: Frame, lists: Lists, tiles: Tensor) -> Iterator[Part]:
    first, last = lists.starts[tiles], lists.starts[tiles + 1]
    inside = torch.arange(TILE * TILE, device=tiles.device)
    columns = -(-frame.width // TILE)
    x = ((tiles % columns)[:, None] * TILE + inside % TILE) + 0.5
    y = ((tiles // columns)[:, None] * TILE + inside // TILE) + 0.5
    for ahead in range(0, int((last - first).amax()), STRETCH):
        places = (first + ahead)[:, None] + torch.arange(STRETCH, device=tiles.device)
        listed = places < last[:, None]
        places = places.clamp(max=len(lists.ranks) - 1)
        who = lists.order[lists.ranks[places]]
        centers = placed.centers[who]
        yield Part(
            x[:, None] - centers[..., :1],
            y[:, None] - centers[..., 1:],
            placed.conics[who],
            placed.opacities[who] * listed,
            placed.features[who],
            lists.slots[places],
            listed,
        )


def _transmittance(part: Part, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Alpha, and the transmittance before and after every Gaussian, [B, n, P] each."""
    a, b, c = part.conics[..., None].unbind(2)
    sigma = (0.5 * a * part.dx + b * part.dy) * part.dx + 0.5 * c * part.dy.square()
    alpha = (part.opacities[..., None] * (-sigma).exp()).clamp(max=MOST_ALPHA)
    alpha = torch.where(alpha >= LEAST_ALPHA, alpha, 0.0)
    kept = torch.cat([before[:, None], 1 - alpha], 1).cumprod(1)
    return alpha, kept[:, :-1], kept[:, 1:]


def _slopes_of_pairs(part: Part, alpha: Tensor, to_alpha: Tensor) -> Tensor:  # [B, n, SHAPE]
    # Where alpha is held at its most, neither shape nor opacity changes it.
    pull = torch.where(alpha < MOST_ALPHA, to_alpha * alpha, 0.0)  # of -sigma
    x, y = pull * part.dx, pull * part.dy
    total, sx, sy = pull.sum(2), x.sum(2), y.sum(2)
    sxx, sxy, syy = (x * part.dx).sum(2), (x * part.dy).sum(2), (y * part.dy).sum(2)
    a, b, c = part.conics.unbind(2)
    opacities = torch.where(part.opacities > 0, part.opacities, 1.0)
    return torch.stack(
        [a * sx + b * sy, b * sx + c * sy, -0.5 * sxx, -sxy, -0.5 * syy, total / opacities], 2
    )


def _tiled(picture: Tensor, frame: Frame) -> Tensor:  # [C, H, W] -> [tiles, C, P]
    right, below = -frame.width % TILE, -frame.height % TILE
    blocks = F.pad(picture, (0, right, 0, below)).unfold(1, TILE, TILE).unfold(2, TILE, TILE)
    return blocks.permute(1, 2, 0, 3, 4).reshape(-1, len(picture), TILE * TILE)


def _untiled(tiles: Tensor, frame: Frame) -> Tensor:  # [tiles, C, P] -> [C, H, W]
    columns, rows = -(-frame.width // TILE), -(-frame.height // TILE)
    blocks = tiles.view(rows, columns, -1, TILE, TILE).permute(2, 0, 3, 1, 4)
    picture = blocks.reshape(-1, rows * TILE, columns * TILE)
    return picture[:, : frame.height, : frame.width].contiguous()
