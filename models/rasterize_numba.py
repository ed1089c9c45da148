"""The point rasteriser and its shading in one pass a picture, for CPUs where numba is installed.

The same definition as `rasterize.py` and `geometry.py`, which are the reference. What makes it fast
is that a picture's z-buffer stays in the cache between drawing and shading, and that nothing in the
inner loop branches on data: which pixels a splat covers can't be predicted. It is compiled anew in
every process: numba's files of compiled code are pickles, and name the folder that they were made in.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .rasterize import LEAST_REACH, MAX_RADIUS, NEAR, PAD

BLOCK = 1024
"""Points projected at once: five numbers each stay in the innermost cache."""
EMPTY = np.int64(np.iinfo(np.int64).max)
f32 = np.float32
HALF, ONE, TWO, ZERO, ROOT_2 = f32(0.5), f32(1), f32(2), f32(0), f32(2**0.5)
CLOSEST, MOST, LEAST = f32(NEAR), f32(MAX_RADIUS), f32(LEAST_REACH)
SEEN, UNSEEN_SIDE = np.uint32(255), np.uint32(128)


@njit(nogil=True, error_model="numpy")
def _project(start, count, x, y, z, radii, M, focal, u, v, depth, reach):
    """Pixel coordinates, depth and splat radius of a block; plain arithmetic that vectorises."""
    a0, a1, a2, a3 = M[0, 0], M[0, 1], M[0, 2], M[0, 3]
    b0, b1, b2, b3 = M[1, 0], M[1, 1], M[1, 2], M[1, 3]
    c0, c1, c2, c3 = M[2, 0], M[2, 1], M[2, 2], M[2, 3]
    for j in range(count):
        X, Y, Z = x[start + j], y[start + j], z[start + j]
        d = c0 * X + c1 * Y + c2 * Z + c3
        inverse = ONE / d
        u[j] = (a0 * X + a1 * Y + a2 * Z + a3) * inverse
        v[j] = (b0 * X + b1 * Y + b2 * Z + b3) * inverse
        depth[j] = d
        r = radii[start + j] * inverse * focal
        r = (r if r < MOST else MOST) * ROOT_2
        reach[j] = r if r > LEAST else LEAST


@njit(nogil=True, error_model="numpy")
def _scatter(first, count, width, height, keys, u, v, depth, bits, reach):
    """Keep the smallest (depth, point) key at every pixel centre that a splat covers."""
    stride = np.uint64(width + 2 * PAD)
    one, two = np.uint64(1), np.uint64(2)
    w, h = f32(width), f32(height)
    for j in range(count):
        x, y, r = u[j], v[j], reach[j]
        if not (depth[j] > CLOSEST and x > -r and x < w + r and y > -r and y < h + r):
            continue  # NaN fails too
        key = (np.int64(bits[j]) << 32) | (first + j)
        left, top = np.int64(np.ceil(x - r - HALF)), np.int64(np.ceil(y - r - HALF))
        cells = np.int64(np.ceil(r + r))
        dx0, dy, limit = f32(left) + HALF - x, f32(top) + HALF - y, r * r
        row = np.uint64((top + PAD) * (width + 2 * PAD) + left + PAD)
        if cells <= 3:
            # The usual cases, without loops: the pixels of a row are written side by side.
            x0, x1, x2 = dx0 * dx0, (dx0 + ONE) * (dx0 + ONE), (dx0 + TWO) * (dx0 + TWO)
            for _ in range(cells):
                rest = limit - dy * dy
                keys[row] = min(keys[row], key if x0 <= rest else EMPTY)
                keys[row + one] = min(keys[row + one], key if x1 <= rest else EMPTY)
                if cells == 3:
                    keys[row + two] = min(keys[row + two], key if x2 <= rest else EMPTY)
                dy += ONE
                row += stride
            continue
        for _ in range(cells):
            rest, dx, place = limit - dy * dy, dx0, row
            for _ in range(cells):
                keys[place] = min(keys[place], key if dx * dx <= rest else EMPTY)
                dx += ONE
                place += one
            dy += ONE
            row += stride


@njit(nogil=True, error_model="numpy")
def _shade(start, count, x, y, z, nx, ny, nz, front, E, d, per_point, show_back, shades):
    """Normal colour in three bytes and visibility in the fourth, for every point of a frame."""
    e00, e01, e02 = E[0, 0], E[0, 1], E[0, 2]
    e10, e11, e12 = E[1, 0], E[1, 1], E[1, 2]
    e20, e21, e22 = E[2, 0], E[2, 1], E[2, 2]
    px, py, pz = d[0], d[1], d[2]
    w = ONE if per_point else ZERO
    for j in range(count):
        i = start + j
        a, b, c = nx[i], ny[i], nz[i]
        o = a * (w * x[i] - px) + b * (w * y[i] - py) + c * (w * z[i] - pz)
        seen = (o < ZERO) & front[i]
        scale = f32(127.5) if seen | show_back else ZERO
        middle = f32(128) if seen | show_back else ZERO
        red = np.uint32(np.int32(middle + scale * (e00 * a + e01 * b + e02 * c)))
        green = np.uint32(np.int32(middle + scale * (e10 * a + e11 * b + e12 * c)))
        blue = np.uint32(np.int32(middle + scale * (e20 * a + e21 * b + e22 * c)))
        state = SEEN if seen else UNSEEN_SIDE
        shades[j] = red | (green << 8) | (blue << 16) | (state << 24)


@njit(nogil=True, error_model="numpy")
def _resolve(
    first, width, height, keys, shades, rgb, blank, ground, partial, normals, state, depth
):
    """Turn winning keys into pictures."""
    for line in range(height):
        row, out = (line + PAD) * (width + 2 * PAD) + PAD, line * width
        for across in range(width):
            key, p = keys[row + across], np.uint64(out + across)
            empty = key == EMPTY
            i = np.int64(0) if empty else key & 0xFFFFFFFF
            shade, color = shades[i - first if not empty else 0], rgb[i]
            if blank and (shade >> 24) != SEEN:
                color = np.uint32(0)
            if empty:
                shade, color = ground & np.uint32(0xFFFFFF), ground
            normals[0, p] = shade & 255
            normals[1, p] = (shade >> 8) & 255
            normals[2, p] = (shade >> 16) & 255
            state[p] = shade >> 24
            partial[0, p] = color & 255
            partial[1, p] = (color >> 8) & 255
            partial[2, p] = (color >> 16) & 255
            depth[p] = 0 if empty else key >> 32


@njit(nogil=True, error_model="numpy")
def draw_frames(
    offsets, x, y, z, radii, nx, ny, nz, front, rgb, M, focal, E, d, per_point, show_back, blank,
    ground, width, height, partial, normals, state, depth,
):  # fmt: skip
    """All frames of one camera: partial, normals [F, 3, H * W], state, depth (as bits) [F, H * W].

    x .. front [N], rgb [N] three bytes in a number; offsets [F + 1] of the frames to draw; M [3, 4]
    world to pixels; E [3, 3] world to normal colours; d [3] the camera's place (per point) or the
    opposite of its axis.
    """
    keys = np.empty((height + 2 * PAD) * (width + 2 * PAD), np.int64)
    u, v = np.empty(BLOCK, f32), np.empty(BLOCK, f32)
    away, reach = np.empty(BLOCK, f32), np.empty(BLOCK, f32)
    bits = away.view(np.int32)
    most = 1
    for f in range(len(offsets) - 1):
        most = max(most, offsets[f + 1] - offsets[f])
    shades = np.empty(most, np.uint32)
    for f in range(len(offsets) - 1):
        first, last = offsets[f], offsets[f + 1]
        keys[:] = EMPTY
        for start in range(first, last, BLOCK):
            count = min(BLOCK, last - start)
            _project(start, count, x, y, z, radii, M, focal, u, v, away, reach)
            _scatter(start, count, width, height, keys, u, v, away, bits, reach)
        _shade(first, last - first, x, y, z, nx, ny, nz, front, E, d, per_point, show_back, shades)
        _resolve(
            first, width, height, keys, shades, rgb, blank, ground,
            partial[f], normals[f], state[f], depth[f],
        )  # fmt: skip
