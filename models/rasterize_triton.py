"""The point rasteriser and its shading as two Triton kernels, for CUDA where triton is installed.

The same definition as `rasterize.py` and `geometry.py`, which are the reference: one program a block
of points lowers the (depth, point) keys of the pixels it covers, one a block of pixels turns keys
into pictures. Smallest keys win whatever the order, so the result does not depend on scheduling.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rasterize import EMPTY, LEAST_REACH, MAX_RADIUS, NEAR

POINTS, PIXELS = 256, 512
"""A program's share."""


@triton.jit
def _splat(
    keys, positions, radii, frame, M, N, focal, width, height,
    NEAR: tl.constexpr, MAX_RADIUS: tl.constexpr, LEAST_REACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    x = tl.load(positions + i, inside, 0.0)
    y = tl.load(positions + N + i, inside, 0.0)
    z = tl.load(positions + 2 * N + i, inside, 0.0)
    depth = tl.load(M + 8) * x + tl.load(M + 9) * y + tl.load(M + 10) * z + tl.load(M + 11)
    inverse = 1.0 / tl.where(depth > NEAR, depth, 1.0)
    u = (tl.load(M) * x + tl.load(M + 1) * y + tl.load(M + 2) * z + tl.load(M + 3)) * inverse
    v = (tl.load(M + 4) * x + tl.load(M + 5) * y + tl.load(M + 6) * z + tl.load(M + 7)) * inverse
    reach = tl.minimum(tl.load(radii + i, inside, 0.0) * inverse * focal, MAX_RADIUS)
    reach = tl.maximum(reach * 1.4142135623730951, LEAST_REACH)
    shown = inside & (depth > NEAR) & (u > -reach) & (u < width + reach)
    shown = shown & (v > -reach) & (v < height + reach)
    u, v = tl.where(shown, u, 0.0), tl.where(shown, v, 0.0)
    left = tl.ceil(u - reach - 0.5).to(tl.int32)
    top = tl.ceil(v - reach - 0.5).to(tl.int32)
    key = (depth.to(tl.int32, bitcast=True).to(tl.int64) << 32) | i
    base = tl.load(frame + i, inside, 0) * (width * height)
    cells = tl.max(tl.where(shown, tl.ceil(2.0 * reach).to(tl.int32), 0), 0)
    for down in range(0, cells):
        row = top + down
        dy = row.to(tl.float32) + 0.5 - v
        rest = reach * reach - dy * dy
        in_rows = shown & (row >= 0) & (row < height)
        for across in range(0, cells):
            column = left + across
            dx = column.to(tl.float32) + 0.5 - u
            hit = in_rows & (column >= 0) & (column < width) & (dx * dx <= rest)
            tl.atomic_min(keys + base + row * width + column, key, hit, sem="relaxed")


@triton.jit
def _shade(
    keys, positions, normals, front, rgb, E, d, partial, colors, state, depth, N, size, total,
    EMPTY: tl.constexpr, PER_POINT: tl.constexpr, SHOW_BACK: tl.constexpr, BLANK: tl.constexpr,
    GROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    p = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = p < total
    key = tl.load(keys + p, inside, EMPTY)
    drawn = key != EMPTY
    i = key & 0xFFFFFFFF
    a = tl.load(normals + i, drawn, 0.0)
    b = tl.load(normals + N + i, drawn, 0.0)
    c = tl.load(normals + 2 * N + i, drawn, 0.0)
    dx, dy, dz = tl.load(d), tl.load(d + 1), tl.load(d + 2)
    if PER_POINT:
        dx = dx - tl.load(positions + i, drawn, 0.0)
        dy = dy - tl.load(positions + N + i, drawn, 0.0)
        dz = dz - tl.load(positions + 2 * N + i, drawn, 0.0)
    seen = drawn & (a * dx + b * dy + c * dz > 0) & (tl.load(front + i, drawn, 0) != 0)
    shown = drawn if SHOW_BACK else seen
    color = tl.load(rgb + i, drawn, 0)
    kept = seen if BLANK else drawn
    f = p // size
    place = f * (3 * size) + p - f * size
    for channel in tl.static_range(3):
        e0, e1, e2 = (tl.load(E + 3 * channel), tl.load(E + 3 * channel + 1),
                      tl.load(E + 3 * channel + 2))  # fmt: skip
        byte = (128.0 + 127.5 * (e0 * a + e1 * b + e2 * c)).to(tl.int32)
        byte = tl.where(drawn, tl.where(shown, byte, 0), GROUND)
        tl.store(colors + place + channel * size, byte.to(tl.uint8), inside)
        value = (color >> (8 * channel)) & 255
        value = tl.where(drawn, tl.where(kept, value, 0), GROUND)
        tl.store(partial + place + channel * size, value.to(tl.uint8), inside)
    tl.store(state + p, tl.where(seen, 255, tl.where(drawn, 128, 0)).to(tl.uint8), inside)
    bits = tl.where(drawn, key >> 32, 0).to(tl.int32)
    tl.store(depth + p, bits.to(tl.float32, bitcast=True), inside)


def draw_frames(
    positions: Tensor,  # [3, N] world
    normals: Tensor,  # [3, N] world
    radii: Tensor,  # [N] metres
    front: Tensor,  # [N] bool
    rgb: Tensor,  # [N] int32, three bytes
    frame: Tensor,  # [N] int64
    M: Tensor,  # [3, 4] world to pixels
    focal: float,  # pixels
    axes: Tensor,  # [3, 3] world to normal colours
    place: Tensor,  # [3] the camera's place, or the opposite of its axis
    per_point: bool,
    show_back: bool,
    blank: bool,
    ground: int,
    count: int,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Partial, normals [F, 3, H, W], state, depth [F, H, W] of one camera."""
    device, N, size = radii.device, len(radii), height * width
    keys = torch.full((count * size,), EMPTY, device=device)
    partial, colors = (
        torch.empty(count, 3, height, width, dtype=torch.uint8, device=device) for _ in range(2)
    )
    state = torch.empty(count, height, width, dtype=torch.uint8, device=device)
    depth = torch.empty(count, height, width, device=device)
    if N:
        _splat[(triton.cdiv(N, POINTS),)](
            keys, positions.contiguous(), radii, frame, M.contiguous(), N, focal, width, height,
            NEAR, MAX_RADIUS, LEAST_REACH, POINTS,
        )  # fmt: skip
    _shade[(triton.cdiv(count * size, PIXELS),)](
        keys, positions.contiguous(), normals.contiguous(), front.to(torch.uint8), rgb,
        axes.contiguous(), place.contiguous(), partial, colors, state, depth, N, size,
        count * size, EMPTY, per_point, show_back, blank, ground, PIXELS,
    )  # fmt: skip
    return partial, colors, state, depth
