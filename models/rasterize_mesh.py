"""Triangle rasteriser: z-buffer by scatter-min, all triangles of all pictures at once.

Camera frame: OpenCV (x right, y down, z forward), metres; pixel centres at +0.5. Not
differentiable: it makes ground truth and body conditions, never gradients. A batch of pictures
takes as many launches as one picture, and every picture of it is that of its own call to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEAR = 0.02
"""Triangles with a corner nearer than this (metres) are dropped."""
MAX_CELLS = {"cpu": 1 << 16}
"""Pixel candidates tested at once on a device: on a CPU a pass stays in the cache (a few MB)."""
MAX_CELLS_ELSEWHERE = 1 << 23
"""On an accelerator a pass should be large; this many take about 1 GB."""
NO_FACE = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Fragments:
    """The nearest triangle behind every pixel, of one picture or, with B in front, of a batch."""

    faces: Tensor
    """[H, W] or [B, H, W] int64, -1 = none."""
    barycentrics: Tensor
    """[..., H, W, 3] perspective-correct weights of the triangle's corners; 0 where none is."""
    depth: Tensor
    """[..., H, W] metres along the optical axis; 0 where there is none."""

    def interpolate(
        self,
        attributes: Tensor,  # [N, C] per vertex, or [B, N, C]
        faces: Tensor,  # [M, 3]
    ) -> Tensor:  # [..., H, W, C], 0 where there is no triangle
        values = attributes.new_zeros(*self.faces.shape, attributes.shape[-1])
        values[self.faces >= 0] = self.interpolate_hits(attributes, faces)
        return values

    def interpolate_hits(
        self,
        attributes: Tensor,  # [N, C] per vertex, or [B, N, C]
        faces: Tensor,  # [M, 3]
    ) -> Tensor:  # [hits, C], in the order of `faces >= 0`
        """The same, only of the pixels with a triangle."""
        found = self.faces.flatten()
        hit = (found >= 0).nonzero()[:, 0]
        weights = self.barycentrics.flatten(0, -2).index_select(0, hit)
        corners = faces.index_select(0, found.index_select(0, hit))  # [hits, 3]
        if attributes.dim() == 3:
            size = self.faces.shape[-2] * self.faces.shape[-1]
            picture = torch.div(hit, size, rounding_mode="floor") * attributes.shape[1]
            corners, attributes = corners + picture[:, None], attributes.flatten(0, 1)
        a, b, c = (
            attributes.index_select(0, corners[:, i]) * weights[:, i, None] for i in range(3)
        )
        return a + b + c


def rasterize_mesh(
    vertices: Tensor,  # [N, 3] camera frame, or [B, N, 3]
    faces: Tensor,  # [M, 3] int64
    K: Tensor,  # [3, 3] pixels, or [B, 3, 3]
    width: int,
    height: int,
) -> Fragments:
    """Find the nearest triangle at every pixel centre. Both sides of a triangle are seen."""
    single = vertices.dim() == 2
    if single:
        vertices, K = vertices[None], K[None]
    elif K.dim() == 2:
        K = K.expand(len(vertices), 3, 3)
    pixels, z = _project(vertices, K)
    # Corner by corner, one row a number: [3, B * M], triangle t = picture * M + face.
    x, y, z = (_corners(part, faces) for part in (pixels[..., 0], pixels[..., 1], z))
    # A pixel index p is covered when its centre p + 0.5 lies inside the bounding box.
    left, right = _span(x, width)
    top, bottom = _span(y, height)
    useful = (z > NEAR).all(0) & (right >= left) & (bottom >= top)
    keys = torch.full((len(vertices) * height * width,), NO_FACE, device=vertices.device)
    index = useful.nonzero()[:, 0]
    left, right, top, bottom = (
        edge.index_select(0, index).double() for edge in (left, right, top, bottom)
    )
    columns = right - left + 1
    cells = (columns * (bottom - top + 1)).long()
    first = (index // len(faces)) * (height * width)  # of the picture, in `keys`
    for part in _passes(cells):
        _draw(
            keys, index[part], left[part], top[part], columns[part], cells[part], first[part],
            x, y, z, width,
        )  # fmt: skip
    fragments = _resolve(keys.view(-1, height, width), x, y, z, len(faces))
    return Fragments(*(t[0] for t in vars(fragments).values())) if single else fragments


def _project(vertices: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:  # [B, N, 2], [B, N]
    z = vertices[..., 2]
    return (vertices @ K.mT)[..., :2] / z.clamp(min=NEAR)[..., None], z


def _corners(values: Tensor, faces: Tensor) -> Tensor:  # [B, N] -> [3, B * M]
    return torch.stack([values.index_select(1, faces[:, i]).flatten() for i in range(3)])


def _span(corners: Tensor, size: int) -> tuple[Tensor, Tensor]:  # [3, T] -> whole numbers, float
    """First and last pixel whose centre lies between the outermost corners."""
    low, high = corners.amin(0), corners.amax(0)
    return (low - 0.5).ceil().clamp(0, size), (high - 0.5).floor().clamp(-1, size - 1)


def _passes(cells: Tensor) -> list[slice]:
    """Cut the triangles into runs of at most the device's number of pixel candidates."""
    limit = MAX_CELLS.get(cells.device.type, MAX_CELLS_ELSEWHERE)
    ends = cells.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    if total <= limit:
        return [slice(0, len(cells))] if total else []
    marks = torch.arange(limit, total, limit, device=cells.device)
    cuts = [0, *torch.searchsorted(ends, marks).unique().tolist(), len(cells)]
    return [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False) if b > a]


Corners = tuple[Tensor, Tensor, Tensor]
"""One number of each corner of a triangle, [n] each."""


def _pick(values: Tensor | Corners, index: Tensor) -> Corners:
    """`values[:, index]`; row by row, which a CPU does several times faster."""
    a, b, c = (row.index_select(0, index) for row in values)
    return a, b, c


def _edge_functions(x: Corners, y: Corners, px: Tensor, py: Tensor) -> Corners:
    """Signed areas opposite to each corner, at points [n]."""
    dx, dy = [px - part for part in x], [py - part for part in y]

    def area(p: int, q: int) -> Tensor:
        return (x[q] - x[p]) * dy[p] - (y[q] - y[p]) * dx[p]

    return area(1, 2), area(2, 0), area(0, 1)


def _draw(keys, index, left, top, columns, cells, first, x, y, z, width) -> None:
    """Write (depth, triangle) keys of these triangles, at every pixel of their boxes."""
    ends = cells.cumsum(0)
    total = int(ends[-1])
    row = torch.repeat_interleave(cells, output_size=total)  # which triangle of `index`, by cell
    # Whole numbers as double: exact, and faster than integers to divide.
    place = torch.arange(total, dtype=torch.float64, device=keys.device)
    place -= (ends - cells).double().index_select(0, row)
    across = columns.index_select(0, row)
    down = ((place + 0.5) / across).floor_()
    px = (left.index_select(0, row) + (place - down * across)).float()
    py = (top.index_select(0, row) + down).float()
    corners_x, corners_y = _pick(_pick(x, index), row), _pick(_pick(y, index), row)
    a, b, c = _edge_functions(corners_x, corners_y, px + 0.5, py + 0.5)
    # Inside: the three areas agree in sign (0 with either); a triangle without area has no inside.
    low, high = torch.minimum(torch.minimum(a, b), c), torch.maximum(torch.maximum(a, b), c)
    inside = (((low >= 0) & (high > 0)) | ((high <= 0) & (low < 0))).nonzero()[:, 0]
    row, px, py, a, b, c = (t.index_select(0, inside) for t in (row, px, py, a, b, c))
    triangle, whole = index.index_select(0, row), a + b + c
    za, zb, zc = _pick(z, triangle)
    depth = 1 / (a / whole / za + b / whole / zb + c / whole / zc)
    # Positive floats keep their order when their bits are read as integers.
    bits = depth.float().contiguous().view(torch.int32).long()
    cell = first.index_select(0, row) + (py.double() * width + px).long()
    keys.scatter_reduce_(0, cell, (bits << 32) | triangle, "amin")


def _resolve(keys: Tensor, x: Tensor, y: Tensor, z: Tensor, faces: int) -> Fragments:
    """Turn the winning keys [B, H, W] into faces, barycentrics and depth."""
    B, H, W = keys.shape
    cell = (keys.flatten() != NO_FACE).nonzero()[:, 0]
    triangle = keys.flatten().index_select(0, cell) & 0xFFFFFFFF
    across, down = cell % W, torch.div(cell, W, rounding_mode="floor") % H
    corners_x, corners_y, corners_z = (_pick(part, triangle) for part in (x, y, z))
    areas = _edge_functions(corners_x, corners_y, across + 0.5, down + 0.5)
    whole = areas[0] + areas[1] + areas[2]
    weights = [area / whole / corner for area, corner in zip(areas, corners_z, strict=True)]
    depth = 1 / (weights[0] + weights[1] + weights[2])
    face_map = torch.full((B * H * W,), -1, device=keys.device)
    depth_map = z.new_zeros(B * H * W)
    weight_map = z.new_zeros(B * H * W, 3)
    face_map[cell] = triangle % faces
    depth_map[cell] = depth
    weight_map[cell] = torch.stack([w * depth for w in weights], -1)
    return Fragments(face_map.view(B, H, W), weight_map.view(B, H, W, 3), depth_map.view(B, H, W))
