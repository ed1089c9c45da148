"""Triangle rasteriser: z-buffer by scatter-min, one picture at a time, all triangles at once.

Camera frame: OpenCV (x right, y down, z forward), metres; pixel centres at +0.5. Not
differentiable: it makes ground truth and body conditions, never gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEAR = 0.02
"""Triangles with a corner nearer than this (metres) are dropped."""
MAX_CELLS = 4_000_000
"""Pixel candidates tested at once; bounds the memory of a pass to about 200 MB."""


@dataclass(frozen=True)
class Fragments:
    """The nearest triangle behind every pixel."""

    faces: Tensor
    """[H, W] int64, -1 = none."""
    barycentrics: Tensor
    """[H, W, 3] perspective-correct weights of the triangle's corners; 0 where there is none."""
    depth: Tensor
    """[H, W] metres along the optical axis; 0 where there is none."""

    def interpolate(
        self,
        attributes: Tensor,  # [N, C] per vertex
        faces: Tensor,  # [M, 3]
    ) -> Tensor:  # [H, W, C], 0 where there is no triangle
        corners = attributes[faces[self.faces.clamp(min=0)]]  # [H, W, 3, C]
        return (corners * self.barycentrics[..., None]).sum(-2)


def rasterize_mesh(
    vertices: Tensor,  # [N, 3] camera frame
    faces: Tensor,  # [M, 3] int64
    K: Tensor,  # [3, 3] pixels
    width: int,
    height: int,
) -> Fragments:
    """Find the nearest triangle at every pixel centre. Both sides of a triangle are seen."""
    z = vertices[:, 2]
    pixels = (vertices @ K.T)[:, :2] / z.clamp(min=NEAR)[:, None]
    corners = pixels[faces]  # [M, 3, 2]
    # A pixel index p is covered when its centre p + 0.5 lies inside the bounding box.
    size = torch.tensor([width, height], device=pixels.device)
    low = (corners.amin(1) - 0.5).ceil().long().clamp(min=0)
    high = torch.minimum((corners.amax(1) - 0.5).floor().long(), size - 1)
    extent = high - low + 1
    useful = (z[faces] > NEAR).all(1) & (extent > 0).all(1)
    keys = torch.full((height * width,), torch.iinfo(torch.int64).max, device=vertices.device)
    longest = extent.amax(1)
    edge = 1
    while useful.any():
        chosen = useful & (longest <= edge)
        for index in chosen.nonzero()[:, 0].split(max(1, MAX_CELLS // edge**2)):
            _draw(
                keys, index, edge, low[index], high[index], corners[index], z[faces[index]], width
            )
        useful = useful & ~chosen
        edge *= 2
    return _resolve(keys.view(height, width), corners, z[faces])


def _edge_functions(corners: Tensor, points: Tensor) -> Tensor:
    """[..., 3] signed areas opposite to each corner; corners [..., 3, 2], points [..., 2]."""
    a, b, c = corners.unbind(-2)

    def area(p: Tensor, q: Tensor) -> Tensor:
        u, v = q - p, points - p
        return u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]

    return torch.stack([area(b, c), area(c, a), area(a, b)], dim=-1)


def _inverse_depth(weights: Tensor, z: Tensor) -> Tensor:
    return (weights / z).sum(-1)


def _draw(keys, index, edge, low, high, corners, z, width) -> None:
    """Write (depth, face) keys of the triangles whose boxes are at most `edge` pixels long."""
    steps = torch.arange(edge, device=keys.device)
    offsets = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).reshape(-1, 2)
    pixel = low[:, None] + offsets  # [m, e*e, 2]
    areas = _edge_functions(corners[:, None], pixel + 0.5)
    total = areas.sum(-1)
    weights = areas / torch.where(total == 0, torch.ones_like(total), total)[..., None]
    inside = (weights >= 0).all(-1) & (total != 0) & (pixel <= high[:, None]).all(-1)
    triangle, cell = inside.nonzero(as_tuple=True)
    depth = 1 / _inverse_depth(weights[triangle, cell], z[triangle])
    # Positive floats keep their order when their bits are read as integers.
    bits = depth.float().contiguous().view(torch.int32).long()
    pixel = pixel[triangle, cell]
    keys.scatter_reduce_(
        0, pixel[:, 1] * width + pixel[:, 0], (bits << 32) | index[triangle], "amin"
    )


def _resolve(keys: Tensor, corners: Tensor, z: Tensor) -> Fragments:
    """Turn the winning keys into faces, barycentrics and depth."""
    H, W = keys.shape
    hit = keys != torch.iinfo(torch.int64).max
    face = torch.where(hit, keys & 0xFFFFFFFF, -1)
    y, x = torch.meshgrid(
        torch.arange(H, device=keys.device), torch.arange(W, device=keys.device), indexing="ij"
    )
    winner = face.clamp(min=0)
    areas = _edge_functions(corners[winner], torch.stack([x, y], -1) + 0.5)
    weights = areas / areas.sum(-1, keepdim=True) / z[winner]
    depth = 1 / weights.sum(-1)
    return Fragments(
        faces=face,
        barycentrics=torch.where(hit[..., None], weights * depth[..., None], 0.0),
        depth=torch.where(hit, depth, 0.0),
    )
