"""Point rasteriser: z-buffered splats of a few pixels, all points of many pictures at once.

Camera frame: OpenCV, metres; pixel centres at +0.5. A point covers the pixels whose centres lie
within its radius (round splats), at least the one that it falls into. The nearest point wins; of
equally near ones the first, so the result does not depend on chunks or devices.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEAR = 0.02
"""Points nearer to a camera than this (metres) are not drawn."""
MAX_RADIUS = 6
"""Largest splat radius in pixels: what a zoom of about 10 needs to stay without holes."""
CHUNK = 2_000_000
"""Splat cells drawn at once; bounds the memory of a pass to about 120 MB."""
EMPTY = torch.iinfo(torch.int64).max


def splat(
    positions: Tensor,  # [N, 3] camera frame
    radii: Tensor,  # [N] metres
    picture: Tensor,  # [N] int64, which of the pictures a point is drawn into
    focal: Tensor,  # [N, 2] focal lengths of a point's camera, pixels
    centre: Tensor,  # [N, 2] its principal point, pixels
    pictures: int,
    width: int,
    height: int,
) -> Tensor:  # [pictures, H, W] int64, index of the nearest point; -1 = none
    """Draw every point into its picture."""
    z = positions[:, 2]
    ok = z > NEAR
    pixels = positions[:, :2] / z.clamp(min=NEAR)[:, None] * focal + centre
    reach = (radii / z.clamp(min=NEAR) * focal.amax(1)).clamp(max=MAX_RADIUS)
    # A splat has to reach the pixel centres between it and its neighbours: half a diagonal.
    # The hair more is for points on a pixel's very corner, which rounding would lose.
    reach = (reach * 2**0.5).clamp(min=0.5 * 2**0.5 + 1e-4)
    keys = torch.full((pictures * height * width,), EMPTY, device=z.device)
    bits = z.float().contiguous().view(torch.int32).long() << 32
    rings = torch.where(ok, reach.ceil().long(), 0)
    for ring in range(1, int(rings.max().item()) + 1 if len(rings) else 0):
        _draw_ring(
            keys, (rings == ring).nonzero()[:, 0], ring, pixels, reach, bits, picture, width, height
        )
    index = torch.where(keys == EMPTY, -1, keys & 0xFFFFFFFF)
    return index.view(pictures, height, width)


def _draw_ring(keys, chosen, ring, pixels, reach, bits, picture, width, height) -> None:
    """Draw the points whose splats fit into (2 ring + 1)² pixels."""
    steps = torch.arange(-ring, ring + 1, device=keys.device)
    offsets = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).reshape(-1, 2)
    for index in chosen.split(max(1, CHUNK // len(offsets))):
        u, v = pixels[index].unbind(1)
        home_x, home_y = u.floor(), v.floor()
        limit, key = reach[index].square(), bits[index] | index
        first = picture[index] * (height * width)
        for dx, dy in offsets.tolist():
            x, y = home_x + dx, home_y + dy
            inside = (x + 0.5 - u).square() + (y + 0.5 - v).square() <= limit
            inside &= (x >= 0) & (x < width) & (y >= 0) & (y < height)
            hit = inside.nonzero()[:, 0]
            # Integers: float32 cannot count the pixels of a picture beyond 4096 x 4096.
            place = first[hit] + y[hit].long() * width + x[hit].long()
            keys.scatter_reduce_(0, place, key[hit], "amin")
