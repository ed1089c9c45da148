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

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, reduce

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

log = logging.getLogger("turnaround")

PRIMES = (1, 2654435761, 805459861)
"""Factors of the coordinates in the spatial hash, Eq. 4."""
SPREAD = 1e-4
"""Features begin uniformly within ± this, as in the paper's Sec. 4."""
COMPILING = 100_000
"""Corners looked up in one call from which numba's compiling, some 3 seconds once a process, pays
off: where so many are asked for at once, hundreds of such calls follow."""
AT_ONCE, AT_ONCE_ELSEWHERE = 1 << 12, 1 << 16
"""Points that torch looks up at a time on a CPU, for its cache, and elsewhere, for its memory."""
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


def _parts(points: Tensor, lattices: Lattices) -> Iterator[tuple[slice, slice]]:
    """Points and levels that are looked up together: as many as memory or a CPU's cache hold."""
    direct, L = lattices.direct, len(lattices.cells)
    kinds = [part for part in (slice(0, direct), slice(direct, L)) if part.start < part.stop]
    limit = AT_ONCE if points.device.type == "cpu" else AT_ONCE_ELSEWHERE
    for first in range(0, len(points), limit):
        for levels in kinds:
            yield slice(first, first + limit), levels


def _corners(
    points: Tensor,  # [N, dims]
    lattices: Lattices,
    levels: slice,  # l of them, all direct or all hashed
    table: Tensor,  # [L, size, features]
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the features of the points' cells' corners begin in the levels' tables as one row of
    numbers, and the corners' weights, both [(2 in z,) 2 in y, 2 in x, l, N]; the points' places in
    their cells [dims, l, N]."""
    _, size, features = table.shape
    cells, factors = lattices.cells[levels, None], lattices.factors[levels].T[..., None]
    place = points.T[:, None].clamp(0, 1) * cells
    # A point at 1 belongs to the last cell; what is no number gets an entry too.
    low = place.floor().minimum(cells - 1).long().clamp_(min=0)
    place = place - low
    near = low * factors
    ends, sides = torch.stack([near, near + factors], 1), torch.stack([1 - place, place], 1)
    hashed = levels.start >= lattices.direct
    entries, weights = ends[0], sides[0]
    for axis in range(1, len(ends)):
        outer = (slice(None), *[None] * axis)
        join = torch.bitwise_xor if hashed else torch.add
        entries, weights = join(entries, ends[axis][outer]), weights * sides[axis][outer]
    if hashed:
        entries &= size - 1
    entries += torch.arange(len(cells), device=cells.device)[:, None] * size
    return entries.mul_(features), weights, place


def _encode(points: Tensor, table: Tensor, lattices: Lattices) -> Tensor:  # [N, L * features]
    L, _, features = table.shape
    out = table.new_empty(len(points), L, features)
    for some, levels in _parts(points, lattices):
        starts, weights, _ = _corners(points[some], lattices, levels, table)
        numbers = table[levels].flatten()
        # A feature at a time: torch is slow where the innermost axis is short.
        for k in range(features):
            shares = numbers.index_select(0, starts.flatten() + k).view_as(weights) * weights
            # One after the other, for the same rounding as in one pass.
            total = reduce(torch.add, shares.flatten(0, -3))
            out[some, levels, k] = total.T
    return out.flatten(1)


def _slope_of_table(
    points: Tensor, table: Tensor, lattices: Lattices, pull: Tensor
) -> Tensor:  # as the table
    out = zeros_like(table)
    for some, levels, pulls in _pulled_parts(points, table, lattices, pull):
        starts, weights, _ = _corners(points[some], lattices, levels, table)
        add_numbers(
            out[levels].flatten(),
            [starts.flatten() + k for k in range(len(pulls))],
            [(weights * p).flatten() for p in pulls],
        )
    return out


def _slope_of_points(
    points: Tensor, table: Tensor, lattices: Lattices, pull: Tensor
) -> Tensor:  # [N, dims]
    out = torch.zeros_like(points)
    for some, levels, pulls in _pulled_parts(points, table, lattices, pull):
        starts, weights, place = _corners(points[some], lattices, levels, table)
        numbers = table[levels].flatten()
        values = [
            numbers.index_select(0, starts.flatten() + k).view_as(weights) * p
            for k, p in enumerate(pulls)
        ]
        slopes = _slopes(reduce(torch.add, values), place) * lattices.cells[levels, None]
        out[some] += slopes.sum(1).T
    return out * ((points >= 0) & (points <= 1))


def _slopes(
    values: Tensor,  # [(2,) 2, 2, l, N] at the corners of cells
    place: Tensor,  # [dims, l, N] 0..1 in the cells
) -> Tensor:  # [dims, l, N] for one cell's length
    """Slopes of what is interpolated between the corners."""
    slopes = []
    for axis in range(len(place)):
        inside = values
        for other in reversed(range(len(place))):
            first, last = inside
            inside = last - first if other == axis else torch.lerp(first, last, place[other])
        slopes.append(inside)
    return torch.stack(slopes)


def _pulled_parts(points: Tensor, table: Tensor, lattices: Lattices, pull: Tensor):
    """Points and levels that are looked up together, and by feature the gradient [l, N] of theirs."""
    pull = pull.reshape(len(points), *table.shape[::2])
    for some, levels in _parts(points, lattices):
        yield some, levels, pull[some, levels].permute(2, 1, 0).contiguous()


def zeros_like(table: Tensor) -> Tensor:
    """On a CPU by numpy, which asks for large pages: a hundred megabytes anew in each step, given
    out in pages of four kilobytes, take longer than the gradient."""
    if table.device.type != "cpu":
        return torch.zeros_like(table)
    return torch.from_numpy(np.zeros(table.shape, str(table.dtype).removeprefix("torch.")))


def add_numbers(
    out: Tensor,  # [M], added to
    places: Sequence[Tensor],  # [n] int64 each
    values: Sequence[Tensor],  # [n] each
) -> None:
    """Add values at places, with the same outcome every time."""
    if out.device.type != "cpu":
        out += summed_in_integers(len(out), torch.cat(places), torch.cat(values))
        return
    for place, value in zip(places, values, strict=True):
        out.index_add_(0, place, value)


def summed_in_integers(
    count: int,
    places: Tensor,  # [n] 0..count - 1
    values: Tensor,  # [n]
) -> Tensor:  # [count]
    """Sums of floats depend on their order, which an accelerator leaves to chance; those of integers
    do not."""
    step = values.abs().amax().clamp(min=torch.finfo(values.dtype).tiny).double() / STEPS
    total = torch.zeros(count, dtype=torch.int64, device=values.device)
    total.index_add_(0, places, (values.double() / step).round().long())
    return (total * step).to(values.dtype)


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
    # Two features, as grids have by habit: what is compiled for this serves them too.
    points, table = torch.tensor([[0.3, 0.6]]), torch.ones(1, 4, 2)
    lattices = Lattices(torch.ones(1), torch.tensor([[1, 2]]), 1)
    try:
        return bool(WAYS["numba"].encode(points, table, lattices)[0, 1] > 0.99)
    except Exception as reason:  # whatever an optional package raises, torch works too
        log.info("Hash grids are read by torch, as numba does not work here: %s", reason)
        return False


def fastest_way(device: torch.device, corners: int) -> str:
    """The quickest of WAYS for so many corners in a call; features are the same from each."""
    if device.type == "cpu" and corners >= COMPILING and _numba_works():
        return "numba"
    return "torch"
