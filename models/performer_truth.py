"""Ground truth beside the pictures of a synthetic performer: keypoints, normals, surface flow.

All of it is exact at pixel centres. Frame: world of the pack (x right, y down, z forward, metres);
camera frames are OpenCV. Everything is computed on the device of the posed body.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .cameras import Rig
from .performer import (
    EYE_FRONT,
    EYE_HEIGHT,
    JOINTS,
    PerformerBank,
    PosedPerformer,
    bank_on,
)
from .rasterize_mesh import rasterize_mesh

LANDMARKS = (
    "nose", "eye.L", "eye.R", "ear.L", "ear.R", "hand.L", "hand.R", "toe.L", "toe.R",
)  # fmt: skip
"""Places on the skin; a hand is the tip of its longest finger. L is the performer's left."""
KEYPOINTS = JOINTS + LANDMARKS


class KeypointSet(NamedTuple):
    """A choice of KEYPOINTS under the names that others give them."""

    names: tuple[str, ...]
    indices: tuple[int, ...]


COCO17 = KeypointSet(
    (
        "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder",
        "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip",
        "right_hip", "left_knee", "right_knee", "left_ankle", "right_ankle",
    ),
    tuple(
        KEYPOINTS.index(name)
        for name in (
            "nose", "eye.L", "eye.R", "ear.L", "ear.R", "shoulder.L", "shoulder.R", "elbow.L",
            "elbow.R", "wrist.L", "wrist.R", "hip.L", "hip.R", "knee.L", "knee.R", "ankle.L",
            "ankle.R",
        )
    ),
)  # fmt: skip
"""The 17 points of COCO in COCO's order: `points[..., list(COCO17.indices), :]`."""

KEYPOINT_TOLERANCE = 0.04
"""Metres that the surface may lie in front of a visible keypoint, beyond the keypoint's own depth
below the skin: clothes and hair stand off by up to 0.02, builds differ by about as much again."""
FLOW_TOLERANCE = 0.01
"""Metres between a surface point and the surface that its target pixel shows, to be the same."""


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def landmark_vertices(bank: PerformerBank) -> tuple[Tensor, ...]:
    """Vertices whose mean is the landmark, for each of LANDMARKS."""
    place = bank.canonical
    x, y, z = place.unbind(-1)
    weights = bank.tensors["weights"].float()
    owner = weights.argmax(1)
    head = owner == JOINTS.index("head")
    is_eye = torch.zeros_like(head)
    is_eye[bank.faces[bank.tensors["face_is_eye"]].unique()] = True
    up = EYE_HEIGHT - y

    def first(where: Tensor, score: Tensor) -> Tensor:
        """The vertex of `where` with the lowest score."""
        return torch.where(where, score, torch.inf).argmin()[None]

    sides = {}
    for side, sign in (("L", 1), ("R", -1)):
        wrist, elbow, ankle = (JOINTS.index(f"{n}.{side}") for n in ("wrist", "elbow", "ankle"))
        joints = bank.tensors["rest_joints"].mean(0)
        along = F.normalize(joints[wrist] - joints[elbow], dim=0)
        level = head & (up > -0.06) & (up < 0.03) & (z > EYE_FRONT + 0.04)
        sides["eye", side] = (is_eye & (x * sign > 0)).nonzero()[:, 0]
        sides["ear", side] = first(level, -x * sign)
        sides["hand", side] = first(owner == wrist, -(place @ along))
        sides["toe", side] = first(owner == ankle, z)
    nose = first(head & (x.abs() < 0.02) & (up > -0.055) & (up < 0), z)
    pairs = (sides[name, side] for name in ("eye", "ear", "hand", "toe") for side in "LR")
    return (nose, *pairs)


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def keypoint_depths(bank: PerformerBank) -> Tensor:  # [P] metres, in the order of KEYPOINTS
    """How deep a keypoint lies below the skin of the mean body, front or back, whichever is more."""
    skin = bank.canonical
    marks = [skin[chosen].mean(0) for chosen in landmark_vertices(bank)]
    points = torch.cat([bank.tensors["rest_joints"].mean(0), torch.stack(marks)])
    away = skin - points[:, None]  # [P, N, 3]
    # Skin before and behind a joint of the trunk, no farther than a body is thick. Limbs are as
    # thick on all sides, and landmarks lie on the skin itself, or an eye's radius below.
    column = (away[..., :2].norm(dim=-1) < 0.03) & (away[..., 2].abs() < 0.2)
    thick = torch.where(column, away[..., 2].abs(), 0.0).amax(1)
    nearest = away.norm(dim=-1).amin(1)
    limbs = ("elbow", "wrist", "knee", "ankle", *LANDMARKS)
    trunk = torch.tensor([not name.startswith(limbs) for name in KEYPOINTS], device=skin.device)
    return torch.where(trunk, torch.maximum(thick, nearest), nearest)


def keypoints_3d(posed: PosedPerformer) -> Tensor:  # [F, P, 3] world
    """Where the KEYPOINTS are."""
    chosen = landmark_vertices(bank_on(posed.vertices.device))
    marks = [posed.vertices[:, index].mean(1) for index in chosen]
    return torch.cat([posed.joints, torch.stack(marks, 1)], dim=1)


def project_keypoints(
    points: Tensor,  # [F, P, 3] world
    rig: Rig,
) -> tuple[Tensor, Tensor]:  # pixels [V, F, P, 2], depth [V, F, P] metres
    """Keypoints in every picture; pixel centres are at +0.5; meaningless where depth <= 0."""
    T, K = rig.T_camera_world.to(points.device), rig.K.to(points.device)
    camera = points @ T[:, None, :3, :3].mT + T[:, None, None, :3, 3]
    depth = camera[..., 2]
    return (camera @ K[:, None].mT)[..., :2] / depth[..., None], depth


def keypoint_visibility(
    pixels: Tensor,  # [V, F, P, 2]
    depth: Tensor,  # [V, F, P]
    surface: Tensor,  # [V, F, H, W] metres at pixel centres, 0 = background
    tolerance: float = KEYPOINT_TOLERANCE,
) -> Tensor:  # [V, F, P] bool
    """In the picture, and no surface in front of it but the skin that it lies below."""
    H, W = surface.shape[-2:]
    inside = (depth > 0) & ((pixels >= 0) & (pixels < pixels.new_tensor([W, H]))).all(-1)
    x, y = (pixels[..., i].nan_to_num().clamp(0, n - 1).long() for i, n in ((0, W), (1, H)))
    seen = surface.flatten(2).gather(2, y * W + x)
    below = keypoint_depths(bank_on(surface.device)) + tolerance
    return inside & ((seen == 0) | (depth - seen < below))


@dataclass(frozen=True)
class SurfaceTruth:
    """What every pixel of V views and F frames shows, at its centre."""

    depth: Tensor
    """[V, F, H, W] metres; 0 = background."""
    normals_world: Tensor
    """[V, F, 3, H, W] unit; 0 = background."""
    normals_camera: Tensor
    """[V, F, 3, H, W] unit, in each camera's frame (x right, y down, z away); 0 = background."""
    faces: Tensor
    """[V, F, H, W] int64 triangle of the body, the surface's id; -1 = background."""
    barycentrics: Tensor
    """[V, F, H, W, 3] where in the triangle."""

    @property
    def places(self) -> Tensor:  # [V, F, 3, H, W] metres; 0 = background
        """The place on the mean rest body: the same for one spot of skin on anybody, anywhere."""
        bank = bank_on(self.faces.device)
        hit = self.faces >= 0
        corners = bank.canonical[bank.faces[self.faces[hit]]]
        places = self.depth.new_zeros(*hit.shape, 3)
        places[hit] = (corners * self.barycentrics[hit][..., None]).sum(-2)
        return rearrange(places, "v f h w c -> v f c h w")


def _pictures(rig: Rig, frames: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """T_camera_world, K and frame number of every picture, view by view."""
    T = rig.T_camera_world.to(device).repeat_interleave(frames, 0)
    K = rig.K.to(device).repeat_interleave(frames, 0)
    return T, K, torch.arange(frames, device=device).repeat(len(rig))


def surface_truth(posed: PosedPerformer, rig: Rig, batch: int | None = None) -> SurfaceTruth:
    """Depth, normals and surface of every view and frame; `batch` pictures at once."""
    device, frames = posed.vertices.device, len(posed.vertices)
    faces = bank_on(device).faces
    T, K, frame = _pictures(rig, frames, device)
    batch = batch or (1 if device.type == "cpu" else 64)
    parts = []
    for at in range(0, len(frame), batch):
        chosen = slice(at, at + batch)
        R, t = T[chosen, :3, :3], T[chosen, None, :3, 3]
        vertices = posed.vertices[frame[chosen]] @ R.mT + t
        drawn = rasterize_mesh(vertices, faces, K[chosen], rig.width, rig.height)
        hit = drawn.faces >= 0
        world = posed.normals.new_zeros(*hit.shape, 3)
        world[hit] = F.normalize(
            drawn.interpolate_hits(posed.normals[frame[chosen]], faces), dim=-1
        )
        camera = world @ R[:, None].mT
        normals = (rearrange(n, "b h w c -> b c h w") for n in (world, camera))
        parts.append((drawn.depth, *normals, drawn.faces, drawn.barycentrics))
    joined = (torch.cat(part) for part in zip(*parts, strict=True))
    return SurfaceTruth(*(part.unflatten(0, (len(rig), frames)) for part in joined))


def surface_flow(
    truth: SurfaceTruth,
    posed: PosedPerformer,
    rig: Rig,
    source: tuple[int | Tensor, int | Tensor],
    target: tuple[int | Tensor, int | Tensor],
    tolerance: float = FLOW_TOLERANCE,
) -> tuple[Tensor, Tensor]:  # flow [2, H, W] pixels, visible [H, W] bool
    """Where the surface behind every pixel of `source` (view, frame) is in `target` (view, frame).

    The same view: optical flow. The same frame: correspondence across views. Views and frames may
    be index tensors [P]; the results then have P in front. Flow is exact and 0 on the background
    and behind the target camera. Visible: the nearest pixel of the target shows this very surface;
    its triangle, continued to the exact place, is within `tolerance` metres of the point's depth.
    """
    device = posed.vertices.device
    single = not any(isinstance(i, Tensor) for i in (*source, *target))
    v, f, w, g = torch.broadcast_tensors(
        *(torch.as_tensor(i, device=device).reshape(-1) for i in (*source, *target))
    )
    T, K = rig.T_camera_world.to(device)[w], rig.K.to(device)[w]
    faces = bank_on(device).faces
    vertices = posed.vertices[g] @ T[:, :3, :3].mT + T[:, None, :3, 3]  # [P, N, 3]
    found = truth.faces[v, f]
    P, H, W = found.shape
    pair, y, x = (found >= 0).nonzero().unbind(-1)
    corners = vertices[pair[:, None], faces[found[pair, y, x]]]  # [n, 3, 3]
    points = (corners * truth.barycentrics[v, f][pair, y, x][..., None]).sum(-2)
    in_front = points[:, 2] > 0
    places = (K[pair] @ points[..., None])[..., :2, 0] / points[:, 2:]
    shift = places - torch.stack([x, y], -1) - 0.5
    flow = points.new_zeros(P, H, W, 2)
    flow[pair, y, x] = torch.where(in_front[:, None], shift, 0.0)

    inside = in_front & ((places >= 0) & (places < places.new_tensor([W, H]))).all(-1)
    to_x, to_y = (places[:, i].nan_to_num().clamp(0, n - 1).long() for i, n in ((0, W), (1, H)))
    shown = truth.faces[w, g][pair, to_y, to_x]
    plane = vertices[pair[:, None], faces[shown.clamp(min=0)]]
    a, b, c = plane.unbind(1)
    normal = torch.linalg.cross(b - a, c - a)
    ray = points / points[:, 2:]
    depth = (normal * a).sum(-1) / (normal * ray).sum(-1)
    # A triangle seen edge on says little half a pixel off: its depth at the centre serves as well.
    centre = truth.depth[w, g][pair, to_y, to_x]
    gap = torch.minimum((depth - points[:, 2]).abs(), (centre - points[:, 2]).abs())
    visible = torch.zeros_like(found, dtype=torch.bool)
    visible[pair, y, x] = inside & (shown >= 0) & (gap < tolerance)
    flow = rearrange(flow, "p h w c -> p c h w")
    return (flow[0], visible[0]) if single else (flow, visible)
