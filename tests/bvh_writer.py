"""Writes BVH files, for tests: a skeleton at rest and how its joints turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MIXAMO = (
    "Hips", "Spine", "Spine1", "Neck", "Head",
    "LeftArm", "LeftForeArm", "LeftHand", "RightArm", "RightForeArm", "RightHand",
    "LeftUpLeg", "LeftLeg", "LeftFoot", "RightUpLeg", "RightLeg", "RightFoot",
)  # fmt: skip
"""Of the performers' joints."""
Y_UP = torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64))
Z_UP = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]], dtype=torch.float64)
"""From the pack's axes to those of files."""


def angles_zxy(rotations: Tensor) -> Tensor:  # [..., 3, 3] = Rz Rx Ry -> [..., 3] degrees z, x, y
    m = rotations
    x = torch.asin(m[..., 2, 1].clamp(-1, 1))
    z = torch.atan2(-m[..., 0, 1], m[..., 1, 1])
    y = torch.atan2(-m[..., 2, 0], m[..., 2, 2])
    return torch.stack([z, x, y], -1).rad2deg()


def bvh_text(
    names: Sequence[str],
    parents: Sequence[int],
    joints: Tensor,  # [J, 3] at rest, metres, the pack's axes
    rotations: Tensor,  # [F, J, 3, 3] from rest to the world
    root: Tensor,  # [F, 3] metres
    seconds: float,
    axes: Tensor = Y_UP,
    unit: float = 100.0,  # of a metre
) -> str:
    joints, rotations, root = (t.double() for t in (joints, rotations, root))
    rotations = axes @ rotations @ axes.T
    offsets, root = (t @ axes.T * unit for t in (joints, root))
    lines, order = ["HIERARCHY"], []

    def write(j: int, depth: int) -> None:
        pad, parent = "  " * depth, parents[j]
        order.append(j)
        offset = offsets[j] - offsets[parent] if parent >= 0 else offsets[j]
        places = "6 Xposition Yposition Zposition" if parent < 0 else "3"
        lines.append(f"{pad}{'ROOT' if parent < 0 else 'JOINT'} {names[j]}")
        lines.append(f"{pad}{{")
        lines.append(f"{pad}  OFFSET " + " ".join(f"{v:.6f}" for v in offset.tolist()))
        lines.append(f"{pad}  CHANNELS {places} Zrotation Xrotation Yrotation")
        below = [k for k, p in enumerate(parents) if p == j]
        for k in below:
            write(k, depth + 1)
        if not below:
            end = offset / offset.norm() * 0.08 * unit
            lines.append(f"{pad}  End Site\n{pad}  {{")
            lines.append(f"{pad}    OFFSET " + " ".join(f"{v:.6f}" for v in end.tolist()))
            lines.append(f"{pad}  }}")
        lines.append(f"{pad}}}")

    write(0, 0)
    numbers = [root]
    for j in order:
        above = rotations[:, parents[j]].mT if parents[j] >= 0 else torch.eye(3).double()
        numbers.append(angles_zxy(above @ rotations[:, j]))
    lines += ["MOTION", f"Frames: {len(root)}", f"Frame Time: {seconds:.8f}"]
    for row in torch.cat(numbers, 1).tolist():
        lines.append(" ".join(f"{v:.6f}" for v in row))
    return "\n".join(lines) + "\n"
