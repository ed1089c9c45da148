"""Body flow: how the surface of a body in motion moves in every camera's pictures.

Stage: BODY + RIG -> FLOW (DiffPerformer, Sec. 4.2, "3D-aware human flow": a mesh with the driving
pose and the reference's shape, its depth rendered, every pixel given a place on the mesh, and its
way to the next frame).

Departure: the paper takes the motion of the nearest visible vertex; we take that of the very point
that the pixel shows, by its barycentric coordinates. It costs the same and is exact: with a vertex,
neighbouring pixels jump by the difference of two vertices' ways, a pixel and more on a limb that turns.

Frames: world of the pack (x right, y down, z forward, metres); pixels with centres at +0.5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .body import Body
from .cameras import Rig
from .flow import Flow, Step, flow_picture
from .rasterize_mesh import NEAR, Fragments, rasterize_mesh

SAME = 0.01
"""Metres between a point and the surface that the other frame shows there, to be the same."""


def body_flow(
    body: Body,
    rig: Rig,
    device: torch.device | None = None,  # where to draw; the flow comes back to the body's
    on_step: Step | None = None,
) -> Flow:
    """The body's motion in every view, both ways; 0 and confidence 0 where it is not.

    Confidence is 1 where the point is seen in the other frame as well (depth-tested there), else 0:
    hidden by another part, turned away, or outside of the picture. The flow itself is exact there
    too. Raises ValueError when the body has one frame, or when no camera sees it."""
    count = body.frame_count
    if count < 2:
        raise ValueError(
            "'body' has one frame, but flow is motion between frames: give it two or more."
        )
    home = body.vertices.device
    body = body.to(device or home)
    total = len(rig) * count
    views = []
    for v in range(len(rig)):
        now = _drawn(body, rig, v, 0)
        pairs = []
        for f in range(count - 1):
            then = _drawn(body, rig, v, f + 1)
            pair = [
                part.to(home)
                for one, other in ((now, then), (then, now))
                for part in _steps(one, other, body.faces)
            ]
            pairs.append(pair)
            if on_step:
                on_step(v * count + f + 1, total, flow_picture(pair[0][None])[0])
            now = then
        views.append([torch.stack(part) for part in zip(*pairs, strict=True)])
    if on_step:
        on_step(total, total)
    there, sure_there, back, sure_back = (torch.stack(part) for part in zip(*views, strict=True))
    if not (sure_there.any() or sure_back.any()):
        raise ValueError(
            "No camera of 'rig' sees the body in two frames: the cameras look elsewhere or stand "
            "inside it; use the rig of the clip, or an Orbit Rig some metres away."
        )
    return Flow(there, back, sure_there, sure_back)


class _Drawn:
    """One frame of the body in one view."""

    def __init__(self, vertices: Tensor, K: Tensor, fragments: Fragments) -> None:
        self.vertices, self.K, self.fragments = vertices, K, fragments


def _drawn(body: Body, rig: Rig, view: int, frame: int) -> _Drawn:
    T, K = (part[view].to(body.vertices) for part in (rig.T_camera_world, rig.K))
    vertices = body.vertices[frame] @ T[:3, :3].T + T[:3, 3]
    return _Drawn(vertices, K, rasterize_mesh(vertices, body.faces, K, rig.width, rig.height))


def _steps(now: _Drawn, then: _Drawn, faces: Tensor) -> tuple[Tensor, Tensor]:
    """How far every surface point moves [2, H, W], and whether it is seen then [H, W] 0 or 1."""
    hit = now.fragments.faces >= 0
    points = now.fragments.interpolate_hits(then.vertices, faces)
    z = points[:, 2].clamp(min=NEAR)
    places = (points @ then.K.T)[:, :2] / z[:, None]
    y, x = hit.nonzero().unbind(1)
    shift = places - torch.stack([x, y], 1) - 0.5
    ahead = points[:, 2] > NEAR
    flow = points.new_zeros(2, *hit.shape)
    flow[:, hit] = torch.where(ahead[:, None], shift, 0.0).T
    sure = points.new_zeros(hit.shape)
    sure[hit] = (ahead & _seen(points, places, then, faces)).to(sure)
    return flow, sure


def _seen(points: Tensor, places: Tensor, drawn: _Drawn, faces: Tensor) -> Tensor:  # [n] bool
    """Whether the picture shows these points [n, 3] (camera axes) at their places [n, 2] (pixels).

    The triangle that the nearest pixel shows, continued to the exact place, must be as far away; or
    the pixel's centre, as a triangle that is seen edge on says little half a pixel off."""
    H, W = drawn.fragments.faces.shape
    within = ((places >= 0) & (places < places.new_tensor([W, H]))).all(1)
    x, y = (places[:, i].nan_to_num().clamp(0, n - 1).long() for i, n in ((0, W), (1, H)))
    shown = drawn.fragments.faces[y, x]
    a, b, c = drawn.vertices[faces[shown.clamp(min=0)]].unbind(1)
    normal = torch.linalg.cross(b - a, c - a)
    z = points[:, 2]
    plane = (normal * a).sum(1) / (normal * points).sum(1) * z
    gap = torch.minimum((plane - z).abs(), (drawn.fragments.depth[y, x] - z).abs())
    return within & (shown >= 0) & (gap < SAME)
