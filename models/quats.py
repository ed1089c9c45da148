"""Quaternions [..., 4] in the order w, x, y, z: the turns of Gaussians, skin and control nodes.

`splats.rotation_matrices` goes the other way, to matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unit(
    quats: Tensor,  # [..., 4] of any length above 0
) -> Tensor:  # [..., 4] of length 1
    """Several times as quick as torch's norm, which is made for longer rows."""
    return quats * quats.square().sum(-1, keepdim=True).clamp(min=1e-24).rsqrt()


def multiplied(
    after: Tensor,  # [..., 4]
    before: Tensor,  # [..., 4]
) -> Tensor:  # [..., 4]
    """The turn `before`, followed by the turn `after`."""
    a, b, c, d = after.unbind(-1)
    w, x, y, z = before.unbind(-1)
    return torch.stack(
        [
            a * w - b * x - c * y - d * z,
            a * x + b * w + c * z - d * y,
            a * y - b * z + c * w + d * x,
            a * z + b * y - c * x + d * w,
        ],
        -1,
    )


def matrices_to_quats(
    matrices: Tensor,  # [..., 3, 3] rotations
) -> Tensor:  # [..., 4] of length 1
    """From the row of q qᵀ that is largest, so that nothing small is divided by."""
    xx, yy, zz = matrices.diagonal(dim1=-2, dim2=-1).unbind(-1)
    m = matrices
    squares = torch.stack([1 + xx + yy + zz, 1 + xx - yy - zz, 1 - xx + yy - zz, 1 - xx - yy + zz])
    w, x, y, z = squares
    wx, wy, wz = (
        m[..., 2, 1] - m[..., 1, 2],
        m[..., 0, 2] - m[..., 2, 0],
        m[..., 1, 0] - m[..., 0, 1],
    )
    xy, xz, yz = (
        m[..., 1, 0] + m[..., 0, 1],
        m[..., 2, 0] + m[..., 0, 2],
        m[..., 2, 1] + m[..., 1, 2],
    )
    rows = [[w, wx, wy, wz], [wx, x, xy, xz], [wy, xy, y, yz], [wz, xz, yz, z]]
    rows = torch.stack([torch.stack(row, -1) for row in rows], -2)  # [..., 4, 4] = 4 q qᵀ
    best = squares.argmax(0)[..., None, None].expand(*squares.shape[1:], 1, 4)
    return unit(rows.gather(-2, best)[..., 0, :])


def rotvecs_to_quats(
    rotvecs: Tensor,  # [..., 3] axis times radians
) -> Tensor:  # [..., 4] of length 1
    """Differentiable at no turn, too."""
    half = rotvecs.square().sum(-1, keepdim=True).clamp(min=1e-24).sqrt() / 2
    return torch.cat([half.cos(), rotvecs * (half.sin() / (2 * half))], -1)


def blended(
    quats: Tensor,  # [..., k, 4] of length 1
    weights: Tensor,  # [..., k], sum 1
) -> Tensor:  # [..., 4] of length 1
    """The mean turn of several that differ by less than half a turn from the first."""
    same = (quats * quats[..., :1, :]).sum(-1, keepdim=True) >= 0
    return unit((torch.where(same, quats, -quats) * weights[..., None]).sum(-2))


def turned(
    quats: Tensor,  # [..., 4] of length 1
    vectors: Tensor,  # [..., 3]
) -> Tensor:  # [..., 3]
    """v + 2 w (q x v) + 2 q x (q x v)."""
    q, vectors = torch.broadcast_tensors(quats[..., 1:], vectors)
    across = 2 * torch.linalg.cross(q, vectors)
    return vectors + quats[..., :1] * across + torch.linalg.cross(q, across)
