"""The hash encoding in one pass over the points, for CPUs where numba is installed.

The same definition as `hash_grid.py`, which is the reference. What makes it fast is that neither the
entries nor the weights of a point's corners are ever written down. A thread has points of its own, or
levels of its own, so sums do not depend on how many threads there are. It is compiled anew in every
process: numba's files of compiled code are pickles, and name the folder that they were made in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .hash_grid import Lattices, zeros_like

BLOCK = 512
"""Points that go through all levels together: what is read and written for them stays in the cache."""
SHARE = 8192
"""Points that a thread takes at once."""


def encode(points: Tensor, table: Tensor, lattices: Lattices) -> Tensor:  # [N, L * features]
    L, _, features = table.shape
    x, values, *lattice = _arrays(points, table, lattices)
    # Large pages of memory, as for `zeros_like`.
    out = np.empty((len(x), L * features), values.dtype)
    work = kernels(x.shape[1], features).encode
    _side_by_side(lambda part: work(x[part], values, *lattice, out[part]), _shares(x))
    return torch.from_numpy(out)


def slope_of_points(
    points: Tensor, table: Tensor, lattices: Lattices, pull: Tensor
) -> Tensor:  # [N, dims]
    x, values, *lattice, g = _arrays(points, table, lattices, pull)
    out = np.zeros_like(x)
    work = kernels(x.shape[1], values.shape[2]).slope_of_points
    _side_by_side(lambda part: work(x[part], values, *lattice, g[part], out[part]), _shares(x))
    return torch.from_numpy(out)


def slope_of_table(
    points: Tensor, table: Tensor, lattices: Lattices, pull: Tensor
) -> Tensor:  # as the table
    x, _, *lattice, g = _arrays(points, table, lattices, pull)
    out = zeros_like(table)
    y = out.numpy()
    work = kernels(x.shape[1], y.shape[2]).slope_of_table
    _side_by_side(lambda level: work(x, *lattice, g, level, y[level]), range(len(y)))
    return out


def _arrays(points: Tensor, table: Tensor, lattices: Lattices, *others: Tensor) -> tuple:
    """The same memory as numpy's arrays. Unsigned factors: entries below zero would cost a test each."""
    x, values, cells, factors, *more = (
        t.detach().contiguous().numpy()
        for t in (points, table, lattices.cells, lattices.factors, *others)
    )
    return x, values, cells, factors.view(np.uint64), lattices.direct, *more


def _shares(points: np.ndarray) -> list[slice]:
    return [slice(first, first + SHARE) for first in range(0, len(points), SHARE)]


def _side_by_side(work: Callable, parts: Iterable) -> None:
    """On as many threads as torch has."""
    threads = torch.get_num_threads()
    list(map(work, parts) if threads == 1 else _pool(threads).map(work, parts))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "hash-grid")


@njit(nogil=True, error_model="numpy")
def _cell(x, cells):
    """Number of a coordinate's cell and the place in it, 0..1; what is no number gets a cell too."""
    # Of the coordinate's own type: with numba's literals it would all become float64.
    one, zero = cells / cells, cells - cells
    x = (zero if x < zero else one if x > one else x) * cells
    low = np.floor(x)
    low = low if low > zero else zero
    low = low if low < cells - one else cells - one
    return np.uint64(low), x - low


@njit(nogil=True, error_model="numpy")
def _joined(hashed, a, b):
    return a ^ b if hashed else a + b


@njit(nogil=True, error_model="numpy")
def _square(points, i, cells, factors, hashed):
    """Place in the cell in x and y, and what its four corners in x and y add to their entries."""
    a, x = _cell(points[i, 0], cells)
    b, y = _cell(points[i, 1], cells)
    a0, b0 = a * factors[0], b * factors[1]
    a1, b1 = a0 + factors[0], b0 + factors[1]
    corners = (
        _joined(hashed, a0, b0), _joined(hashed, a1, b0),
        _joined(hashed, a0, b1), _joined(hashed, a1, b1),
    )  # fmt: skip
    return x, y, corners


@njit(nogil=True, error_model="numpy")
def _corners_2d(points, i, cells, factors, hashed, mask):
    """Place in the cell, and the entries of the cell's corners."""
    x, y, (e0, e1, e2, e3) = _square(points, i, cells, factors, hashed)
    return (x, y), (e0 & mask, e1 & mask, e2 & mask, e3 & mask)


@njit(nogil=True, error_model="numpy")
def _corners_3d(points, i, cells, factors, hashed, mask):
    x, y, (e0, e1, e2, e3) = _square(points, i, cells, factors, hashed)
    c, z = _cell(points[i, 2], cells)
    near = c * factors[2]
    far = near + factors[2]
    entries = (
        _joined(hashed, e0, near) & mask, _joined(hashed, e1, near) & mask,
        _joined(hashed, e2, near) & mask, _joined(hashed, e3, near) & mask,
        _joined(hashed, e0, far) & mask, _joined(hashed, e1, far) & mask,
        _joined(hashed, e2, far) & mask, _joined(hashed, e3, far) & mask,
    )  # fmt: skip
    return (x, y, z), entries


@njit(nogil=True, error_model="numpy")
def _weights_2d(place, one):
    x, y = place
    return (one - x) * (one - y), x * (one - y), (one - x) * y, x * y


@njit(nogil=True, error_model="numpy")
def _weights_3d(place, one):
    x, y, z = place
    w0, w1, w2, w3 = _weights_2d((x, y), one)
    far, near = z, one - z
    return w0 * near, w1 * near, w2 * near, w3 * near, w0 * far, w1 * far, w2 * far, w3 * far


@njit(nogil=True, error_model="numpy")
def _slopes_2d(place, one, v):
    """Slopes in a cell whose corners have the values v."""
    x, y = place
    return (
        (v[1] - v[0]) * (one - y) + (v[3] - v[2]) * y,
        (v[2] - v[0]) * (one - x) + (v[3] - v[1]) * x,
    )


@njit(nogil=True, error_model="numpy")
def _slopes_3d(place, one, v):
    x, y, z = place
    ax, ay = _slopes_2d((x, y), one, (v[0], v[1], v[2], v[3]))
    bx, by = _slopes_2d((x, y), one, (v[4], v[5], v[6], v[7]))
    w = _weights_2d((x, y), one)
    rise = w[0] * (v[4] - v[0]) + w[1] * (v[5] - v[1]) + w[2] * (v[6] - v[2]) + w[3] * (v[7] - v[3])
    return ax * (one - z) + bx * z, ay * (one - z) + by * z, rise


class Kernels(NamedTuple):
    encode: Callable
    slope_of_points: Callable
    slope_of_table: Callable


@cache
def kernels(dims: int, features: int) -> Kernels:
    """Compiled at their first call; loops of known length are written out by the compiler."""
    corners, weights_of, slopes_of = (
        (_corners_2d, _weights_2d, _slopes_2d)
        if dims == 2
        else (_corners_3d, _weights_3d, _slopes_3d)
    )

    @njit(nogil=True, error_model="numpy")
    def encode(points, table, cells, factors, direct, out):
        """points [N, dims], table [L, size, features] -> out [N, L * features]."""
        mask = np.uint64(table.shape[1] - 1)
        for start in range(0, len(points), BLOCK):
            stop = min(start + BLOCK, len(points))
            for level in range(len(table)):
                n, f, own, first = cells[level], factors[level], table[level], level * features
                one = n / n
                for i in range(start, stop):
                    place, entries = corners(points, i, n, f, level >= direct, mask)
                    weights = weights_of(place, one)
                    for k in range(features):
                        total = weights[0] * own[entries[0], k]
                        for j in range(1, len(entries)):
                            total += weights[j] * own[entries[j], k]
                        out[i, first + k] = total

    @njit(nogil=True, error_model="numpy")
    def slope_of_table(points, cells, factors, direct, pull, level, out):
        """points [N, dims], pull [N, L * features] -> out [size, features] of a level, added to."""
        mask, n, f, first = np.uint64(len(out) - 1), cells[level], factors[level], level * features
        for i in range(len(points)):
            place, entries = corners(points, i, n, f, level >= direct, mask)
            weights = weights_of(place, n / n)
            for j in range(len(entries)):
                for k in range(features):
                    out[entries[j], k] += weights[j] * pull[i, first + k]

    @njit(nogil=True, error_model="numpy")
    def pulled(own, entry, pull, first):
        """How much a corner's features go along with the gradient."""
        total = own[entry, 0] * pull[first]
        for k in range(1, features):
            total += own[entry, k] * pull[first + k]
        return total

    if dims == 2:

        @njit(nogil=True, error_model="numpy")
        def values_of(own, e, pull, first):
            return (
                pulled(own, e[0], pull, first), pulled(own, e[1], pull, first),
                pulled(own, e[2], pull, first), pulled(own, e[3], pull, first),
            )  # fmt: skip
    else:

        @njit(nogil=True, error_model="numpy")
        def values_of(own, e, pull, first):
            return (
                pulled(own, e[0], pull, first), pulled(own, e[1], pull, first),
                pulled(own, e[2], pull, first), pulled(own, e[3], pull, first),
                pulled(own, e[4], pull, first), pulled(own, e[5], pull, first),
                pulled(own, e[6], pull, first), pulled(own, e[7], pull, first),
            )  # fmt: skip

    @njit(nogil=True, error_model="numpy")
    def slope_of_points(points, table, cells, factors, direct, pull, out):
        """points [N, dims], pull [N, L * features] -> out [N, dims], added to."""
        mask = np.uint64(table.shape[1] - 1)
        for start in range(0, len(points), BLOCK):
            stop = min(start + BLOCK, len(points))
            for level in range(len(table)):
                n, f, own, first = cells[level], factors[level], table[level], level * features
                for i in range(start, stop):
                    place, entries = corners(points, i, n, f, level >= direct, mask)
                    slopes = slopes_of(place, n / n, values_of(own, entries, pull[i], first))
                    for axis in range(dims):
                        out[i, axis] += slopes[axis] * n
            for i in range(start, stop):
                for axis in range(dims):
                    if points[i, axis] < 0 or points[i, axis] > 1:
                        out[i, axis] = 0

    return Kernels(encode, slope_of_points, slope_of_table)
