"""Compositing of projected Gaussians, for CPUs where numba is installed.

The same definition as `rasterize_splats_torch.py`, which is the reference. What makes it fast is that a
tile's pixels stay in the innermost cache, and that the lines of a tile that a Gaussian reaches are
one stretch of memory: as nothing branches on data and exp is a polynomial, the compiler works on 8 or
16 pixels at once, and sums over pixels are taken once for all lines. A thread has tiles of its own;
what a Gaussian gets from its tiles is summed afterwards in their order, so gradients do not depend on
threads. It is compiled anew in every process: numba's files of compiled code are pickles, and name
the folder that they were made in.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .rasterize_splats import LEAST_ALPHA, LEAST_LEFT, MOST_ALPHA, Frame, Placed, refuse_too_many

WIDE, TALL = 16, 32
"""Pixels across and down a tile."""
PLANE = WIDE * TALL
DIGIT = 11
"""Bits by which depths are sorted in one pass; three do for 32."""
LOOK = 32
"""Gaussians between two looks at whether a tile is finished."""
SHAPE = 6
"""Numbers of a Gaussian beside its features: centre, half conic (xx, xy, yy), opacity; and their
slopes."""
f32 = np.float32
ZERO, HALF, ONE = f32(0), f32(0.5), f32(1)
SLACK = f32(1e-3)
"""Pixels by which rounding may move a Gaussian's border."""
MOST, LEFT, FLOOR = f32(MOST_ALPHA), f32(LEAST_LEFT), f32(LEAST_ALPHA)
DEEPEST = np.log(1 / LEAST_ALPHA)
"""The largest sigma that can be seen."""
HALVINGS = 3
"""exp(-sigma) is the polynomial of sigma / 8, squared three times."""
POLYNOMIAL = tuple(
    f32(c)
    for c in np.polynomial.Chebyshev.interpolate(
        lambda x: np.exp(-x), 6, (0, DEEPEST / 2**HALVINGS)
    )
    .convert(kind=np.polynomial.Polynomial)
    .coef
)
E0, E1, E2, E3, E4, E5, E6 = POLYNOMIAL
SHRINK = f32(0.5**HALVINGS)


class Lists(NamedTuple):
    """Which Gaussians reach which tiles, from near to far: E pairs."""

    order: np.ndarray
    """[M] Gaussians from near to far; their ranks are numbers in this."""
    boxes: np.ndarray
    """[M, 4] by rank: first column and row of tiles, columns, rows; no rows = reaches no pixel."""
    slots: np.ndarray
    """[M + 1] by rank: where a Gaussian's pairs begin."""
    starts: np.ndarray
    """[tiles + 1] where a tile's list begins."""
    ranks: np.ndarray
    """[E] by tile: whose turn it is."""
    gaussians: np.ndarray
    """[M, SHAPE + C] by rank: all that compositing asks of a Gaussian, side by side."""
    tall: np.ndarray
    """[M] by rank: pixels above and below its centre that a Gaussian reaches."""


def composite(
    placed: Placed, frame: Frame
) -> tuple[Tensor, Tensor, Lists]:  # sums [C, H, W], what is left [H, W]
    centers, conics, opacities, features = _arrays(*placed)
    depths, reach = _arrays(frame.depths, frame.reach)
    order = _nearest_first(depths.view(np.uint32))
    boxes, slots, starts = _boxes(order, centers, reach, frame.width, frame.height)
    refuse_too_many(int(slots[-1]), len(order))
    ranks = _ranks(boxes, starts, slots[-1], -(-frame.width // WIDE))
    gaussians = _packed(order, centers, conics, opacities, features)
    lists = Lists(order, boxes, slots, starts, ranks, gaussians, reach[order, 1])
    sums = np.empty((features.shape[1], frame.height, frame.width), f32)
    left = np.empty((frame.height, frame.width), f32)
    work = kernels(features.shape[1]).composite
    _side_by_side(
        lambda first, last: work(first, last, starts, ranks, gaussians, lists.tall, sums, left),
        len(starts) - 1,
    )
    return torch.from_numpy(sums), torch.from_numpy(left), lists


def slopes(
    placed: Placed,
    frame: Frame,
    lists: Lists,
    pull: Tensor,  # [C, H, W] gradient of the sums
    behind: Tensor,  # [H, W] all that a pixel shows, weighted by its gradients
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # as placed
    pulls, behinds = _arrays(pull, behind)
    order, boxes, slots, starts, ranks, gaussians, tall = lists
    pairs = np.zeros((len(ranks), gaussians.shape[1]), f32)
    work = kernels(len(pulls)).slopes
    _side_by_side(
        lambda first, last: work(
            first, last, starts, ranks, boxes, slots, gaussians, tall, pulls, behinds, pairs
        ),
        len(starts) - 1,
    )
    out = np.empty_like(gaussians)
    _sum_pairs(order, slots, pairs, gaussians, out)
    found = torch.from_numpy(out)
    return found[:, :2], found[:, 2:5], found[:, 5], found[:, SHAPE:]


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [t.detach().contiguous().numpy() for t in tensors]


def _side_by_side(work: Callable, tiles: int) -> None:
    """On as many threads as torch has."""
    threads = torch.get_num_threads()
    if threads == 1:
        return work(0, tiles)
    share = max(1, tiles // (4 * threads))
    parts = range(0, tiles, share)
    list(_pool(threads).map(lambda first: work(first, min(first + share, tiles)), parts))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "splats")


@njit(nogil=True, error_model="numpy")
def _nearest_first(keys):
    """The stable order of depths, all above 0, from their bits: positive floats keep their order when
    read as integers. Sorted by DIGIT bits at a time, from the last."""
    order, target = np.arange(len(keys)), np.empty(len(keys), np.int64)
    for shift in range(0, 32, DIGIT):
        ends = np.zeros(2**DIGIT + 1, np.int64)
        for key in keys:
            ends[((key >> np.uint32(shift)) & np.uint32(2**DIGIT - 1)) + np.uint32(1)] += 1
        for digit in range(2**DIGIT):
            ends[digit + 1] += ends[digit]
        for i in order:
            digit = (keys[i] >> np.uint32(shift)) & np.uint32(2**DIGIT - 1)
            target[ends[digit]] = i
            ends[digit] += 1
        order, target = target, order
    return order


@njit(nogil=True, error_model="numpy")
def _boxes(order, centers, reach, width, height):
    """boxes, slots and starts of Lists."""
    M = len(order)
    columns, rows = -(-width // WIDE), -(-height // TALL)
    boxes, slots = np.zeros((M, 4), np.int32), np.zeros(M + 1, np.int64)
    starts = np.zeros(columns * rows + 1, np.int64)
    for rank in range(M):
        i = order[rank]
        rx, ry = reach[i, 0], reach[i, 1]
        x, y = centers[i, 0] - HALF, centers[i, 1] - HALF
        # Compared before they become integers, which very large numbers do not.
        near = (
            rx > ZERO and ry > ZERO
            and x + rx > -ONE and x - rx < width and y + ry > -ONE and y - ry < height
        )  # fmt: skip
        if near:
            x0 = np.int64(np.ceil(max(x - rx - SLACK, ZERO)))
            y0 = np.int64(np.ceil(max(y - ry - SLACK, ZERO)))
            x1 = np.int64(np.floor(min(x + rx + SLACK, f32(width - 1))))
            y1 = np.int64(np.floor(min(y + ry + SLACK, f32(height - 1))))
            if x0 <= x1 and y0 <= y1:
                c, r = x0 // WIDE, y0 // TALL
                boxes[rank, 0], boxes[rank, 1] = c, r
                boxes[rank, 2], boxes[rank, 3] = x1 // WIDE - c + 1, y1 // TALL - r + 1
        slots[rank + 1] = slots[rank] + boxes[rank, 2] * boxes[rank, 3]
        for r in range(boxes[rank, 1], boxes[rank, 1] + boxes[rank, 3]):
            for c in range(boxes[rank, 0], boxes[rank, 0] + boxes[rank, 2]):
                starts[r * columns + c + 1] += 1
    for tile in range(len(starts) - 1):
        starts[tile + 1] += starts[tile]
    return boxes, slots, starts


@njit(nogil=True, error_model="numpy")
def _ranks(boxes, starts, pairs, columns):
    ranks, ends = np.empty(pairs, np.int32), starts[:-1].copy()
    for rank in range(len(boxes)):
        for r in range(boxes[rank, 1], boxes[rank, 1] + boxes[rank, 3]):
            for c in range(boxes[rank, 0], boxes[rank, 0] + boxes[rank, 2]):
                ranks[ends[r * columns + c]] = rank
                ends[r * columns + c] += 1
    return ranks


@njit(nogil=True, error_model="numpy")
def _packed(order, centers, conics, opacities, features):
    out = np.empty((len(order), SHAPE + features.shape[1]), np.float32)
    for rank in range(len(order)):
        i = order[rank]
        out[rank, 0], out[rank, 1] = centers[i, 0], centers[i, 1]
        out[rank, 2], out[rank, 3] = HALF * conics[i, 0], conics[i, 1]
        out[rank, 4], out[rank, 5] = HALF * conics[i, 2], opacities[i]
        for k in range(features.shape[1]):
            out[rank, SHAPE + k] = features[i, k]
    return out


@njit(nogil=True, error_model="numpy")
def _sum_pairs(order, slots, pairs, gaussians, out):
    """Slopes of Gaussians from the moments of their pairs."""
    for rank in range(len(order)):
        i, g = order[rank], gaussians[rank]
        total, sx, sy, sxx, sxy, syy = ZERO, ZERO, ZERO, ZERO, ZERO, ZERO
        for k in range(SHAPE, out.shape[1]):
            out[i, k] = ZERO
        for pair in range(slots[rank], slots[rank + 1]):
            p = pairs[pair]
            total += p[0]
            sx += p[1]
            sy += p[2]
            sxx += p[3]
            sxy += p[4]
            syy += p[5]
            for k in range(SHAPE, out.shape[1]):
                out[i, k] += p[k]
        out[i, 0] = (g[2] + g[2]) * sx + g[3] * sy
        out[i, 1] = g[3] * sx + (g[4] + g[4]) * sy
        out[i, 2], out[i, 3], out[i, 4] = -HALF * sxx, -sxy, -HALF * syy
        out[i, 5] = total / g[5] if total != ZERO else ZERO


@njit(nogil=True, error_model="numpy")
def _finished(state):
    """Whether no pixel of the tile is open; mostly one of the first is."""
    for i in range(PLANE):  # noqa: SIM110 - numba compiles no generators here
        if state[i] > ZERO:
            return False
    return True


@njit(nogil=True, error_model="numpy")
def _lines(y, reach):
    """Of a tile's lines the first that is reached and how many are; y from the tile's top."""
    top = max(np.int64(np.ceil(max(y - HALF - reach - SLACK, ZERO))), 0)
    end = np.int64(np.floor(min(y - HALF + reach + SLACK, f32(TALL - 1))))
    return np.uint64(top * WIDE), np.uint64(max(end + 1 - top, 0) * WIDE)


@njit(nogil=True, error_model="numpy")
def _lay_out(state, x0, y0, width, height):
    """Begin a tile: transmittance 1 inside the picture; pixels outside are finished. The last two
    planes are the pixels' centres."""
    state[:] = ZERO
    across, down = state[-2 * PLANE : -PLANE], state[-PLANE:]
    for line in range(TALL):
        for column in range(WIDE):
            at = line * WIDE + column
            state[at] = ONE if x0 + column < width and y0 + line < height else -ONE
            across[at], down[at] = f32(column) + HALF, f32(line) + HALF


class Kernels(NamedTuple):
    composite: Callable
    slopes: Callable


VECTORS = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "nsz", "reassoc"}}


@njit(inline="always", **VECTORS)
def _weighed(T, sigma, opacity, cut):
    """Of a Gaussian at a pixel: opacity exp(-sigma), alpha, weight, and the transmittance that is
    left; of a finished pixel that is kept below zero, and nothing is added to it."""
    r = sigma * SHRINK
    e = E0 + r * (E1 + r * (E2 + r * (E3 + r * (E4 + r * (E5 + r * E6)))))
    e *= e
    e *= e
    e *= e
    e *= opacity
    alpha = min(e, MOST)
    alpha = alpha if sigma <= cut else ZERO
    weight = alpha * max(T, ZERO)
    after = T - weight
    ends = (T > ZERO) & (after <= LEFT)
    return e, alpha, ZERO if ends else weight, -T if ends else after


@cache
def kernels(C: int) -> Kernels:
    """For 3 or 7 features; compiled at their first call. Features are written out one by one, as the
    compiler does not work on many pixels at once where it has to look them up."""
    p1, p2, p3, p4, p5, p6, p7, p8, p9, p10 = (np.uint64(k * PLANE) for k in range(1, 11))
    more = C == 7

    @njit(**VECTORS)
    def composite_lines(state, first, count, mx, my, g, cut):
        """A Gaussian's share of `count` pixels. state: transmittance, C sums and the centres, a plane
        each."""
        a, b, c, opacity = g[2], g[3], g[4], g[5]
        f0, f1, f2 = g[SHAPE], g[SHAPE + 1], g[SHAPE + 2]
        px, py = (p8, p9) if more else (p4, p5)
        if more:
            f3, f4, f5, f6 = g[SHAPE + 3], g[SHAPE + 4], g[SHAPE + 5], g[SHAPE + 6]
        for i in range(count):
            at = first + i
            x, y = state[at + px] - mx, state[at + py] - my
            sigma = (a * x + b * y) * x + c * (y * y)
            _, _, weight, after = _weighed(state[at], sigma, opacity, cut)
            state[at] = after
            state[at + p1] += weight * f0
            state[at + p2] += weight * f1
            state[at + p3] += weight * f2
            if more:
                state[at + p4] += weight * f3
                state[at + p5] += weight * f4
                state[at + p6] += weight * f5
                state[at + p7] += weight * f6

    @njit(**VECTORS)
    def slopes_lines(state, first, count, mx, my, g, cut, pair):
        """What `count` pixels do to a Gaussian: moments of their pulls and C features. state:
        transmittance, what lies behind, C gradients and the centres, a plane each."""
        a, b, c, opacity = g[2], g[3], g[4], g[5]
        f0, f1, f2 = g[SHAPE], g[SHAPE + 1], g[SHAPE + 2]
        px, py = (p9, p10) if more else (p5, p6)
        total, sx, sy, sxx, sxy, syy = ZERO, ZERO, ZERO, ZERO, ZERO, ZERO
        c0, c1, c2 = ZERO, ZERO, ZERO
        if more:
            f3, f4, f5, f6 = g[SHAPE + 3], g[SHAPE + 4], g[SHAPE + 5], g[SHAPE + 6]
            c3, c4, c5, c6 = ZERO, ZERO, ZERO, ZERO
        for i in range(count):
            at = first + i
            x, y = state[at + px] - mx, state[at + py] - my
            sigma = (a * x + b * y) * x + c * (y * y)
            T = state[at]
            e, alpha, weight, after = _weighed(T, sigma, opacity, cut)
            state[at] = after
            g0, g1, g2 = state[at + p2], state[at + p3], state[at + p4]
            color = f0 * g0 + f1 * g1 + f2 * g2
            c0 += weight * g0
            c1 += weight * g1
            c2 += weight * g2
            if more:
                g3, g4, g5, g6 = state[at + p5], state[at + p6], state[at + p7], state[at + p8]
                color += f3 * g3 + f4 * g4 + f5 * g5 + f6 * g6
                c3 += weight * g3
                c4 += weight * g4
                c5 += weight * g5
                c6 += weight * g6
            behind = state[at + p1] - weight * color
            state[at + p1] = behind
            pull = (T * color - behind / (ONE - alpha)) * alpha
            pull = pull if (weight > ZERO) & (e < MOST) else ZERO
            total += pull
            pull_x, pull_y = pull * x, pull * y
            sx += pull_x
            sy += pull_y
            sxx += pull_x * x
            sxy += pull_x * y
            syy += pull_y * y
        pair[0], pair[1], pair[2], pair[3], pair[4], pair[5] = total, sx, sy, sxx, sxy, syy
        pair[6], pair[7], pair[8] = c0, c1, c2
        if more:
            pair[9], pair[10], pair[11], pair[12] = c3, c4, c5, c6

    @njit(nogil=True, error_model="numpy")
    def composite(first, last, starts, ranks, gaussians, tall, sums, left):
        _, height, width = sums.shape
        columns = -(-width // WIDE)
        state = np.empty((3 + C) * PLANE, np.float32)
        for tile in range(first, last):
            x0, y0 = tile % columns * WIDE, tile // columns * TALL
            _lay_out(state, x0, y0, width, height)
            for turn in range(starts[tile], starts[tile + 1]):
                if (turn - starts[tile]) % LOOK == LOOK - 1 and _finished(state):
                    break
                g = gaussians[ranks[turn]]
                mx, my = g[0] - f32(x0), g[1] - f32(y0)
                start, count = _lines(my, tall[ranks[turn]])
                composite_lines(state, start, count, mx, my, g, np.log(g[5] / FLOOR))
            for line in range(y0, min(y0 + TALL, height)):
                for column in range(x0, min(x0 + WIDE, width)):
                    at = (line - y0) * WIDE + column - x0
                    left[line, column] = abs(state[at])
                    for k in range(C):
                        sums[k, line, column] = state[(k + 1) * PLANE + at]

    @njit(nogil=True, error_model="numpy")
    def slopes(first, last, starts, ranks, boxes, slots, gaussians, tall, pulls, behinds, pairs):
        _, height, width = pulls.shape
        columns = -(-width // WIDE)
        state = np.empty((4 + C) * PLANE, np.float32)
        for tile in range(first, last):
            x0, y0 = tile % columns * WIDE, tile // columns * TALL
            _lay_out(state, x0, y0, width, height)
            for line in range(y0, min(y0 + TALL, height)):
                for column in range(x0, min(x0 + WIDE, width)):
                    at = (line - y0) * WIDE + column - x0
                    state[at + PLANE] = behinds[line, column]
                    for k in range(C):
                        state[at + (k + 2) * PLANE] = pulls[k, line, column]
            for turn in range(starts[tile], starts[tile + 1]):
                if (turn - starts[tile]) % LOOK == LOOK - 1 and _finished(state):
                    break
                rank = ranks[turn]
                g, box = gaussians[rank], boxes[rank]
                down, across = tile // columns - box[1], tile % columns - box[0]
                pair = pairs[slots[rank] + down * box[2] + across]
                mx, my = g[0] - f32(x0), g[1] - f32(y0)
                start, count = _lines(my, tall[rank])
                slopes_lines(state, start, count, mx, my, g, np.log(g[5] / FLOOR), pair)

    return Kernels(composite, slopes)
