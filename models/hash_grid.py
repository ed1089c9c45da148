"""Multi-resolution hash encoding of points of a square or a cube (instant-ngp, Müller et al. 2022).

Points lie in 0..1 along every axis. Level l (Sec. 3) is a lattice of `resolution(l)` cells along each
axis; its vertices carry learned features, which are interpolated multilinearly inside a cell. A
lattice whose vertices fit into the level's table has an entry for each; of a finer one vertices share
entries by a spatial hash (Eq. 4). Departs from the paper where it shows: the first vertex lies at 0
and the last at 1, without the paper's shift by half a cell.

Gradients are written by hand: autograd would keep entries and weights of all corners of all points.
This is the reference in plain torch; `hash_grid_numba.py` does the same faster on a CPU where numba
is installed.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, reduce
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

log = logging.getLogger("turnaround")

PRIMES = (1, 2654435761, 805459861)
"""Factors of the coordinates in the spatial hash, Eq. 4."""
SPREAD = 1e-4
"""Features begin uniformly within ± this, as in the paper's Sec. 4."""
COMPILING = 1 << 17
"""Corners looked up in one call from which numba's compiling, some 4 seconds once a process, pays
off: where so many are asked for at once, hundreds of such calls follow."""
STEPS = 1 << 36
"""Into so many the largest number is divided where a sum is taken in integers."""


@dataclass(frozen=True)
class Lattices:
    """The levels of a grid."""

    cells: Tensor
    """[L] along an axis, in the points' dtype."""
    factors: Tensor
    """[L, dims] int64: coordinates times these, added or (hashed) joined by exclusive or, lead to a
    vertex's entry."""
    direct: int
    """The first so many levels have an entry for each vertex, the others are hashed."""


class HashGrid(nn.Module):
    """Features of points of the unit square (dims = 2) or cube (dims = 3), all levels side by side.

    `base` cells along an axis on the coarsest level, `scale` times more on each finer one; every
    level has 2**log2_size entries of `features` numbers. Differentiable once, in the table and in the
    points, whose gradient is zero along an axis on which they lie outside. Neither features nor
    gradients depend on the number of threads or, on CUDA, on the order of work.
    """

    def __init__(
        self,
        dims: int,
        levels: int,
        features: int,
        log2_size: int,
        base: int,
        scale: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if dims not in (2, 3):
            raise ValueError(f"A hash grid has 2 or 3 axes, not {dims}.")
        self.dims, self.levels, self.features = dims, levels, features
        self.base, self.scale = base, scale
        table = torch.empty(levels, 2**log2_size, features)
        self.table = nn.Parameter(table.uniform_(-SPREAD, SPREAD, generator=generator))
        vertices = [self.resolution(level) + 1 for level in range(levels)]
        self.direct = sum(n**dims <= 2**log2_size for n in vertices)
        strides = [[n**axis for axis in range(dims)] for n in vertices[: self.direct]]
        hashed = [list(PRIMES[:dims])] * (levels - self.direct)
        self.register_buffer("factors", torch.tensor(strides + hashed), persistent=False)
        self.register_buffer("cells", torch.tensor(vertices) - 1.0, persistent=False)

    def resolution(self, level: int) -> int:
        """Cells along an axis."""
        return int(self.base * self.scale**level)

    def forward(
        self,
        points: Tensor,  # [N, dims] 0..1; those outside count as at the border
    ) -> Tensor:  # [N, levels * features], the coarsest level first
        if points.ndim != 2 or points.shape[1] != self.dims:
            raise ValueError(
                f"The hash grid takes points [N, {self.dims}], not {list(points.shape)}."
            )
        lattices = Lattices(self.cells, self.factors, self.direct)
        way = fastest_way(points.device, len(points) * self.levels * 2**self.dims)
        return _Encode.apply(points.to(self.table.dtype), self.table, lattices, way)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, points, table, lattices, way):
        # Backward finds the corners again, which is quicker than writing and reading them.
        ctx.save_for_backward(points, table)
        ctx.lattices, ctx.way = lattices, way
        return WAYS[way].encode(points, table, lattices)

    @staticmethod
    @once_differentiable
    def backward(ctx, pull):
        points, table = ctx.saved_tensors
        to_points, to_table, *_ = ctx.needs_input_grad
        way, given = WAYS[ctx.way], (points, table, ctx.lattices, pull)
        return (
            way.slope_of_points(*given) if to_points else None,
            way.slope_of_table(*given) if to_table else None,
            None,
            None,
        )


# In plain torch


class Corners(NamedTuple):
    """One corner of the cells that points lie in, on some levels."""

    entries: Tensor
    """[l * N] rows of the levels' tables, one below the other."""
    sides: list[Tensor]
    """An [l, N] per axis, 0..1: how near the point is; the corner's weight is their product."""
    upper: tuple[int, ...]
    """Per axis, whether the corner is the far one."""


def _parts(lattices: Lattices) -> list[slice]:
    """Levels that are looked up together: one on a CPU, whose cache holds its table; else a kind."""
    direct, L = lattices.direct, len(lattices.cells)
    if lattices.cells.device.type == "cpu":
        return [slice(level, level + 1) for level in range(L)]
    return [part for part in (slice(0, direct), slice(direct, L)) if part.start < part.stop]


def _corners(points: Tensor, lattices: Lattices, part: slice, size: int) -> Iterator[Corners]:
    """All 2**dims corners of the points' cells, x changing fastest."""
    cells, factors = lattices.cells[part, None], lattices.factors[part].T[..., None]
    place = points.T[:, None].clamp(0, 1) * cells  # [dims, l, N]
    # A point at 1 belongs to the last cell; what is no number gets an entry too.
    low = place.floor().long().clamp_(min=0).minimum(cells.long() - 1)
    toward = place - low
    near = low * factors
    ends, sides = (near, near + factors), (1 - toward, toward)
    first = torch.arange(len(cells), device=cells.device)[:, None] * size
    hashed = part.start >= lattices.direct
    for backwards in itertools.product((0, 1), repeat=points.shape[1]):
        upper = backwards[::-1]
        along = [ends[end][axis] for axis, end in enumerate(upper)]
        if hashed:
            entries = reduce(torch.bitwise_xor, along) & (size - 1)
        else:
            entries = reduce(torch.add, along)
        yield Corners(
            (entries + first).flatten(), [sides[end][a] for a, end in enumerate(upper)], upper
        )


def _encode(points: Tensor, table: Tensor, lattices: Lattices) -> Tensor:  # [N, L * features]
    L, size, features = table.shape
    out = table.new_empty(len(points), L, features)
    for part in _parts(lattices):
        own, total = table[part].flatten(0, 1), 0.0
        for entries, sides, _ in _corners(points, lattices, part, size):
            values = own.index_select(0, entries).view(*sides[0].shape, features)
            total = total + math.prod(sides)[..., None] * values
        out[:, part] = total.transpose(0, 1)
    return out.flatten(1)


def _slope_of_table(
    points: Tensor, table: Tensor, lattices: Lattices, pull: Tensor
) -> Tensor:  # as the table
    out, pull = zeros_like(table), _by_level(pull, table)
    for part in _parts(lattices):
        shares = [
            (corner.entries, (math.prod(corner.sides)[..., None] * pull[part]).flatten(0, 1))
            for corner in _corners(points, lattices, part, table.shape[1])
        ]
        add_rows(out[part].flatten(0, 1), *map(torch.cat, zip(*shares, strict=True)))
    return out


def _slope_of_points(
    points: Tensor, table: Tensor, lattices: Lattices, pull: Tensor
) -> Tensor:  # [N, dims]
    out, pull = torch.zeros_like(points), _by_level(pull, table)
    for part in _parts(lattices):
        own, cells = table[part].flatten(0, 1), lattices.cells[part, None]
        for entries, sides, upper in _corners(points, lattices, part, table.shape[1]):
            pulled = (own.index_select(0, entries).view_as(pull[part]) * pull[part]).sum(-1) * cells
            for axis, end in enumerate(upper):
                others = math.prod(side for a, side in enumerate(sides) if a != axis)
                out[:, axis] += (pulled * others).sum(0) * (1 if end else -1)
    return out * ((points >= 0) & (points <= 1))


def _by_level(pull: Tensor, table: Tensor) -> Tensor:  # [N, L * features] -> [L, N, features]
    return pull.reshape(len(pull), *table.shape[::2]).transpose(0, 1)


def zeros_like(table: Tensor) -> Tensor:
    """On a CPU by numpy, which asks for large pages: a hundred megabytes anew in each step, given
    out in pages of four kilobytes, take longer than the gradient."""
    if table.device.type != "cpu":
        return torch.zeros_like(table)
    return torch.from_numpy(np.zeros(table.shape, str(table.dtype).removeprefix("torch.")))


def add_rows(
    out: Tensor,  # [rows, features], added to
    entries: Tensor,  # [M] rows
    values: Tensor,  # [M, features]
) -> None:
    """Add values to rows, with the same outcome every time."""
    if out.device.type == "cpu":
        out.index_add_(0, entries, values)
    else:
        out += summed_in_integers(len(out), entries, values)


def summed_in_integers(rows: int, entries: Tensor, values: Tensor) -> Tensor:  # [rows, features]
    """Sums of floats depend on their order, which an accelerator leaves to chance; those of integers
    do not."""
    step = values.abs().amax().clamp(min=torch.finfo(values.dtype).tiny) / STEPS
    total = torch.zeros(rows, values.shape[1], dtype=torch.int64, device=values.device)
    total.index_add_(0, entries, (values.double() / step).round().long())
    return (total * step.double()).to(values.dtype)


# Which way


@dataclass(frozen=True)
class Way:
    """One implementation."""

    encode: Callable[[Tensor, Tensor, Lattices], Tensor]
    """points, table, lattices -> features [N, L * features]"""
    slope_of_points: Callable[[Tensor, Tensor, Lattices, Tensor], Tensor]
    """points, table, lattices, gradient of the features [N, L * features] -> [N, dims]"""
    slope_of_table: Callable[[Tensor, Tensor, Lattices, Tensor], Tensor]
    """The same -> as the table."""


def _numba(name: str) -> Callable:
    def call(*given):
        from . import hash_grid_numba

        return getattr(hash_grid_numba, name)(*given)

    return call


WAYS = {
    "torch": Way(_encode, _slope_of_points, _slope_of_table),
    "numba": Way(*map(_numba, ("encode", "slope_of_points", "slope_of_table"))),
}


@cache
def _numba_works() -> bool:
    """Whether numba is installed and finds what torch finds: compilers may be missing or fail."""
    points, table = torch.tensor([[0.3, 0.6]]), torch.ones(1, 4, 1)
    lattices = Lattices(torch.ones(1), torch.tensor([[1, 2]]), 1)
    try:
        return bool(WAYS["numba"].encode(points, table, lattices)[0, 0] > 0.99)
    except Exception as reason:  # whatever an optional package raises, torch works too
        log.info("Hash grids are read by torch, as numba does not work here: %s", reason)
        return False


def fastest_way(device: torch.device, corners: int) -> str:
    """The quickest of WAYS for so many corners in a call; features are the same from each."""
    if device.type == "cpu" and corners >= COMPILING and _numba_works():
        return "numba"
    return "torch"
