"""Per-view conditions: what the source camera's points look like from every camera of a rig.

Stage: oriented points -> partial colour, camera-dependent normals, visibility, depth
(MV-Performer, camera-dependent normal map: with o = n . d, points that face the target camera are
drawn with their normal as colour, points that face away are black). That tells the sampler the seen
side of the body from its unseen side. The background is mid grey, not black, so that the silhouette
of the unseen side stays readable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .cameras import Rig
from .points import OrientedPoints
from .rasterize import splat

BACKGROUND = 0.5
SEEN, UNSEEN_SIDE, EMPTY = 1.0, 0.5, 0.0

BackColors = Literal["blanked", "kept"]


@dataclass(frozen=True)
class Conditions:
    """What V cameras are told about F frames."""

    partial: Tensor
    """[V, F, 3, H, W] the seen colours; grey where nothing is; on the unseen side black, or the colours
    of the seen side, shining through."""
    normals: Tensor
    """[V, F, 3, H, W] 0.5 + 0.5 n with x right, y up, z towards the target camera."""
    visibility: Tensor
    """[V, F, H, W] 1 = seen side, 0.5 = the body's unseen side, 0 = nothing."""
    depth: Tensor
    """[V, F, H, W] metres from the target camera; 0 = nothing."""


def encode_normals(
    normals: Tensor,  # [..., 3] camera frame, unit
) -> Tensor:  # [..., 3] 0..1
    """Normal as colour: red = right, green = up, blue = towards the camera."""
    return 0.5 + 0.5 * normals * normals.new_tensor([1.0, -1.0, -1.0])


def _render_view(
    points: OrientedPoints,
    K: Tensor,  # [3, 3]
    T_camera_world: Tensor,  # [4, 4]
    width: int,
    height: int,
    back_colors: BackColors,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All frames from one camera: partial, normals [F, 3, H, W], visibility, depth [F, H, W]."""
    R, t = T_camera_world[:3, :3], T_camera_world[:3, 3]
    positions = points.positions @ R.T + t
    normals = points.normals @ R.T
    frame = torch.repeat_interleave(
        torch.arange(points.frame_count, device=positions.device), points.frame_offsets.diff()
    )
    N = len(positions)
    index = splat(
        positions,
        points.radii,
        frame,
        K.diagonal()[:2].expand(N, 2),
        K[:2, 2].expand(N, 2),
        points.frame_count,
        width,
        height,
    )
    drawn, chosen = index >= 0, index.clamp(min=0)
    facing = (normals * positions).sum(-1) < 0  # o = n . d > 0, d from the point to the camera
    facing &= points.confidences > 0  # the far side is a guess, never a seen one
    seen = drawn & facing[chosen]
    colors = points.colors[chosen]
    if back_colors == "blanked":
        colors = torch.where(seen[..., None], colors, 0.0)
    normal_colors = torch.where(seen[..., None], encode_normals(normals)[chosen], 0.0)

    def picture(values: Tensor) -> Tensor:
        return torch.where(drawn[..., None], values, BACKGROUND).permute(0, 3, 1, 2)

    visibility = torch.where(seen, SEEN, torch.where(drawn, UNSEEN_SIDE, EMPTY))
    depth = torch.where(drawn, positions[chosen][..., 2], 0.0)
    return picture(colors), picture(normal_colors), visibility, depth


def render_conditions(
    points: OrientedPoints,
    rig: Rig,
    back_colors: BackColors = "blanked",
    on_step: Callable[[int, int], None] | None = None,
) -> Conditions:
    """Draw the points into every camera of the rig, one view at a time."""
    if not len(points.positions):
        raise ValueError("The cloud has no points: check the mask and the depth it was made from.")
    views = []
    for v in range(len(rig)):
        views.append(
            _render_view(
                points, rig.K[v], rig.T_camera_world[v], rig.width, rig.height, back_colors
            )
        )
        if on_step:
            on_step(v + 1, len(rig))
    return Conditions(*(torch.stack(part) for part in zip(*views, strict=True)))
