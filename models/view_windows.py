"""Many views and long clips in parts: who is worked on with whom at which step, and how to join.

A latent [n V, C, T, h, w] is cut into tiles, a group of neighbouring views times a window of latent
frames. Groups follow the cameras around the performer, overlap, and move on by one view every step,
so that in time every view has met all its neighbours; for the last fifth of the steps they stand
still (4DAnyone's inference rule, there without overlaps). Windows cover the clip evenly and stand
still; each is a clip of its own to the model, though only the first begins with a latent frame of
one picture. Where tiles overlap, the model's results are mixed by linear ramps whose sum is 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FIXED_SHARE = 1 / 5
"""Of the steps, at the end: groups no longer move, so that details settle."""
SAME_SIGMA = 1e-4
"""Relative; samplers round."""
GAP = 2.1
"""A gap this many times as wide as the others' mean opens a ring: where one camera is left out of
an even ring, it still closes."""


@dataclass(frozen=True)
class Span:
    """Neighbours on one axis that are worked on together."""

    items: list[int]
    weights: Tensor
    """[len(items)] float32; all spans of an axis together give every item 1."""


@dataclass(frozen=True)
class Tile:
    """A group of views during a window of latent frames."""

    views: Span
    frames: Span
    """Its items follow one another."""

    @property
    def weights(self) -> Tensor:  # [v, 1, t, 1, 1]
        return self.views.weights[:, None, None, None, None] * self.frames.weights[:, None, None]


def spans(
    length: int,
    size: int,  # 0 = all
    overlap: int,
    closed: bool = False,  # the last item is the first one's neighbour
    shift: int = 0,
) -> list[Span]:
    """An axis in equal spans that overlap by at least so many items, spread evenly."""
    if not 0 < size < length:
        return [Span(list(range(length)), torch.ones(length))]
    stride = size - overlap
    if closed:
        count = math.ceil(length / stride)
        starts = [i * length // count + shift for i in range(count)]
        gaps = [(b - a) % length for a, b in zip(starts, [*starts[1:], starts[0]], strict=True)]
        overlaps = [size - gap for gap in gaps]
    else:
        starts = _open_starts(length, size, stride, shift)
        # The ends have no neighbour to share with.
        overlaps = [a + size - b for a, b in zip(starts, starts[1:], strict=False)] + [0]
    items = [[(start + j) % length for j in range(size)] for start in starts]
    # overlaps[i] is shared with the next span, overlaps[i - 1] with the one before.
    ramps = [_ramp(size, overlaps[i - 1], overlaps[i]) for i in range(len(starts))]
    total = torch.zeros(length, dtype=torch.float64)
    for own, ramp in zip(items, ramps, strict=True):
        total[own] += ramp
    return [Span(own, (ramp / total[own]).float()) for own, ramp in zip(items, ramps, strict=True)]


def pieces(length: int, size: int) -> list[Span]:
    """An axis in parts that share nothing."""
    parts = [list(range(i, min(i + size, length))) for i in range(0, length, size)]
    return [Span(part, torch.ones(len(part))) for part in parts]


def _open_starts(length: int, size: int, stride: int, shift: int) -> list[int]:
    last = length - size
    count = math.ceil(last / stride)
    starts = [i * last // count for i in range(count + 1)]
    moved = [min(start + shift % starts[1], last) for start in starts]
    return sorted({0, *moved})


def _ramp(size: int, before: int, after: int) -> Tensor:  # [size] float64 in (0, 1]
    """Rises over the items shared with the span before, falls over those shared with the next."""
    place = torch.arange(1, size + 1, dtype=torch.float64)
    return torch.minimum(place / (before + 1), place.flip(0) / (after + 1)).clamp(max=1)


@dataclass(frozen=True)
class Plan:
    """How the views and latent frames of a clip are divided."""

    views_per_group: int = 0
    """0 = all."""
    view_overlap: int = 0
    frames_per_window: int = 0
    """Latent frames, 0 = all."""
    frame_overlap: int = 0
    """Latent frames."""
    order: tuple[int, ...] = ()
    """The views as they stand around the performer; () = as they come."""
    closed: bool = True
    """The last view of the order is the first one's neighbour."""

    def groups(self, views: int, step: int, steps: int) -> list[Span]:
        """Who is with whom at a step; every view is in at least one group."""
        order = self.order or tuple(range(views))
        size, overlap = self.views_per_group, self.view_overlap
        return [
            Span([order[i] for i in group.items], group.weights)
            for group in spans(views, size, overlap, self.closed, shift_at(step, steps))
        ]

    def windows(self, frames: int) -> list[Span]:
        """The latent frames that are worked on together, at every step the same."""
        return spans(frames, self.frames_per_window, self.frame_overlap)

    def largest(self, views: int, frames: int) -> tuple[int, int]:
        """Views and latent frames of a tile."""
        size, length = self.views_per_group or views, self.frames_per_window or frames
        return min(size, views), min(length, frames)


def shift_at(step: int, steps: int) -> int:
    """By how many views the groups have moved: one a step, back in place for the last fifth."""
    return step if step < steps - math.ceil(FIXED_SHARE * steps) else 0


def step_of(sigma: float, sigmas: list[float]) -> tuple[int, int]:  # step, number of steps
    """Which step of a schedule a noise level belongs to, whatever the sampler calls in between."""
    steps = max(1, len(sigmas) - 1)
    reached = sum(sigma <= s * (1 + SAME_SIGMA) for s in sigmas[:steps])
    return max(0, reached - 1), steps


def around(
    azimuths: Tensor,  # [V] radians
    elevations: Tensor,  # [V] radians
) -> tuple[tuple[int, ...], bool]:  # order, whether it closes to a ring
    """The views in order of azimuth, stacked ones from below; an open arc begins at its gap."""
    angles = [round(math.degrees(a), 1) % 360 for a in azimuths.tolist()]
    heights = elevations.tolist()
    order = sorted(range(len(angles)), key=lambda v: (angles[v], heights[v]))
    distinct = sorted(set(angles))
    gaps = [(b - a) % 360 for a, b in zip(distinct, [*distinct[1:], distinct[0]], strict=True)]
    if len(distinct) == 1:
        return tuple(order), False
    widest = max(gaps)
    closed = widest <= GAP * (360 - widest) / (len(gaps) - 1) + 0.1
    if not closed:
        first = distinct[(gaps.index(widest) + 1) % len(distinct)]
        order = sorted(order, key=lambda v: ((angles[v] - first) % 360, heights[v]))
    return tuple(order), closed


def take(
    value: Tensor,  # [n V, ...]
    tile: Tile,
    chunks: int,
    time_axis: int | None = None,
) -> Tensor:  # [n v, ...]
    """A tile's part of what has a row for every view of every chunk."""
    if time_axis is not None:
        value = value.narrow(time_axis, tile.frames.items[0], len(tile.frames.items))
    return value.unflatten(0, (chunks, -1))[:, tile.views.items].flatten(0, 1)


def add(
    total: Tensor,  # [n V, C, T, h, w], changed
    result: Tensor,  # [n v, C, t, h, w]
    tile: Tile,
    chunks: int,
) -> None:
    """Adds a tile's result by its weights; after all tiles the total is the joined result."""
    frames = total.narrow(2, tile.frames.items[0], len(tile.frames.items))
    views = torch.tensor(tile.views.items, device=total.device)
    weighted = result.unflatten(0, (chunks, -1)) * tile.weights.to(result)
    frames.unflatten(0, (chunks, -1)).index_add_(1, views, weighted)


# --- memory ---------------------------------------------------------------------------------------

STREAM_COPIES = 3.2
"""Of an item's tokens, alive while blocks work on other items: measured 3.1 in Wan 1.3B and 14B."""
SYNC_COPIES = 10.3
"""Of the tokens that a trained sync layer works on at a time: measured 10.1."""


@dataclass(frozen=True)
class Memory:
    """What the model takes for the views of a tile."""

    item: float
    """Bytes that the host asks for one item (a view, or a reference)."""
    tokens: float
    """Bytes of one copy of an item's tokens."""
    items: int
    together: bool
    """The items look at each other, so all of them are held while blocks work on some."""
    moments: int = 1
    """Parts in which a sync layer takes the tokens of all items."""

    def needed(self, at_once: int) -> float:
        """Bytes, when the model works on so many items at a time."""
        whole = self.item * self.items
        if at_once >= self.items:
            return whole
        if not self.together:
            return self.item * at_once
        in_block = self.item * at_once + STREAM_COPIES * self.tokens * self.items
        copies = SYNC_COPIES if self.moments == 1 else STREAM_COPIES + SYNC_COPIES / self.moments
        return min(whole, max(in_block, copies * self.tokens * self.items))

    def fitting(self, room: float) -> int:
        """As many items at a time as fit into so many bytes, in parts of one size; at least 1."""
        fit = [k for k in range(1, self.items + 1) if self.needed(k) <= room]
        return math.ceil(self.items / math.ceil(self.items / max(fit, default=1)))
