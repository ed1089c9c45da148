"""Point rasteriser: z-buffered splats of a few pixels, all points of many pictures at once.

Pixel centres are at +0.5. A point covers the pixels whose centres lie within its radius (round
splats), at least the one that it falls into. The nearest point wins; of equally near ones the first,
so the result does not depend on chunks or devices. This is the reference in plain torch;
`rasterize_numba.py` and `rasterize_triton.py` draw the same faster where those are installed.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEAR = 0.02
"""Points nearer to a camera than this (metres) are not drawn."""
MAX_RADIUS = 6
"""Largest splat radius in pixels: what a zoom of about 10 needs to stay without holes."""
LEAST_REACH = 0.5 * 2**0.5 + 1e-4
"""A splat has to reach the pixel centres between it and its neighbours: half a diagonal. The hair
more is for points on a pixel's very corner, which rounding would lose."""
PAD = 20
"""Pixels around a picture that splats at its border may write to without being asked."""
CHUNK = 1 << 16
"""Points drawn at once: a pass stays in a CPU's cache. An accelerator takes all it is given."""
EMPTY = torch.iinfo(torch.int64).max


def splat(
    positions: Tensor,  # [3, N] world
    radii: Tensor,  # [N] metres
    picture: Tensor,  # [N] int64, which of the pictures a point is drawn into
    M: Tensor,  # [3, 4] world to pixels, K [R | t]
    focal: float,  # pixels
    pictures: int,
    width: int,
    height: int,
) -> Tensor:  # [pictures, H, W] int64: (bits of the depth << 32) | point; EMPTY = none
    """Draw every point into its picture."""
    rows, columns = height + 2 * PAD, width + 2 * PAD
    keys = torch.full((pictures, rows, columns), EMPTY, device=positions.device)
    chunk = CHUNK if positions.device.type == "cpu" else max(1, len(radii))
    for first in range(0, len(radii), chunk):
        part = slice(first, first + chunk)
        base = picture[part] * (rows * columns) if pictures > 1 else 0
        _draw(keys.view(-1), first, positions[:, part], radii[part], base, M, focal, width, height)
    return keys[:, PAD:-PAD, PAD:-PAD]


def _draw(keys, first, positions, radii, base, M, focal, width, height) -> None:
    """Draw a chunk of points: the 2 x 2 nearest pixels of all, then the next ring of the larger."""
    x, y, z = torch.addmm(M[:, 3:], M[:, :3], positions)
    inverse = 1 / z
    u, v = x * inverse, y * inverse
    reach = (radii * inverse * focal).clamp_(max=MAX_RADIUS).mul_(2**0.5).clamp_(min=LEAST_REACH)
    shown = (z > NEAR) & (u > -reach) & (u < width + reach) & (v > -reach) & (v < height + reach)
    index = torch.arange(first, first + len(z), dtype=torch.int32, device=z.device)
    # Positive floats keep their order when their bits are read as integers.
    key = torch.stack([index, z.view(torch.int32)], 1).view(torch.int64)[:, 0]
    key = torch.where(shown, key, EMPTY)
    u, v = torch.where(shown, u, 0.0), torch.where(shown, v, 0.0)
    left, top = (u - 0.5).floor(), (v - 0.5).floor()
    # Integers: float32 cannot count the pixels of a picture beyond 4096 x 4096.
    stride = width + 2 * PAD
    place = (top.long() + PAD) * stride + left.long() + PAD + base
    dx, dy, limit, ring = left + 0.5 - u, top + 0.5 - v, reach.square(), 1
    while len(place):
        _draw_ring(keys, ring, key, place, dx, dy, limit, stride)
        larger = ((reach >= ring) & (key < EMPTY)).nonzero()[:, 0]
        parts = (key, place, dx, dy, limit, reach)
        key, place, dx, dy, limit, reach = (t.index_select(0, larger) for t in parts)
        ring += 1


def _draw_ring(keys, ring, key, place, dx, dy, limit, stride) -> None:
    """The pixels of the (2 ring)² nearest that were not among the (2 ring - 2)² nearest."""
    offsets, inner = range(1 - ring, ring + 1), range(2 - ring, ring)
    squares = {across: (dx + across).square_() for across in offsets}
    for down in offsets:
        rest = limit - (dy + down).square_()
        for across in offsets:
            if across not in inner or down not in inner:
                # Writing "nothing" where a splat doesn't reach is quicker than picking who does.
                hit = torch.where(squares[across] <= rest, key, EMPTY)
                keys.scatter_reduce_(0, place + (down * stride + across), hit, "amin")
