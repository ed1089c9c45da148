"""Multi-resolution hash encoding of points of a square or a cube (instant-ngp, Müller et al. 2022, Sec. 3).

Points lie in 0..1 along every axis. Level l is a lattice of `resolution(l)` cells along each axis;
its vertices carry learned features, which are interpolated multilinearly inside a cell. A lattice
whose vertices fit into the level's table is looked up directly; of a finer one the vertices share
entries by a spatial hash (Eq. 4).

Departs from the paper where it shows: the first vertex lies at 0 and the last at 1, without the
paper's shift by half a cell.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PRIMES = (1, 2654435761, 805459861)
"""Factors of the coordinates in the spatial hash, Eq. 4."""
SPREAD = 1e-4
"""Features begin uniformly within ± this, as in the paper's Sec. 4."""


class HashGrid(nn.Module):
    """Features of points of the unit square (dims = 2) or cube (dims = 3), all levels side by side.

    `base` cells along an axis on the coarsest level, `scale` times more on each finer one; every
    level has 2**log2_size entries of `features` numbers.
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
        self.dims, self.base, self.scale = dims, base, scale
        size = 2**log2_size
        table = torch.empty(levels, size, features)
        self.table = nn.Parameter(table.uniform_(-SPREAD, SPREAD, generator=generator))
        resolutions = [self.resolution(level) for level in range(levels)]
        # Multipliers of a vertex's coordinates; None = hashed.
        self.strides = [
            tuple((n + 1) ** axis for axis in range(dims)) if (n + 1) ** dims <= size else None
            for n in resolutions
        ]

    @property
    def levels(self) -> int:
        return self.table.shape[0]

    @property
    def features(self) -> int:
        return self.table.shape[2]

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
        return torch.cat([self._level(points, level) for level in range(self.levels)], 1)

    def _level(self, points: Tensor, level: int) -> Tensor:
        """Features of one level, [N, features]."""
        n = self.resolution(level)
        place = points.clamp(0, 1) * n
        # A point at 1 belongs to the last cell; what is no number still finds an entry.
        low = place.detach().floor().long().clamp_(0, n - 1)
        toward = place - low
        strides, size = self.strides[level], self.table.shape[1]
        total = 0.0
        for corner in range(2**self.dims):
            weight, index = 1.0, 0
            for axis in range(self.dims):
                upper = corner >> axis & 1
                weight = weight * (toward[:, axis] if upper else 1 - toward[:, axis])
                along = low[:, axis] + upper
                if strides is None:
                    index = index ^ along * PRIMES[axis]
                else:
                    index = index + along * strides[axis]
            if strides is None:
                index = index & (size - 1)
            total = total + weight[:, None] * self.table[level].index_select(0, index)
        return total
