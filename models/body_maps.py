"""Body maps: what every camera of a rig is told about a body that moves (MVP4D, animatable route).

Stage: BODY + RIG -> pictures per view and frame. The paper names the maps: 3D pose, deformation,
sub-frame motion, ray directions, reference mask, crop mask; how they are encoded is our reading.
Pictures are bytes for 0..1: six maps of many views would be gigabytes more. The normals have the pack's normal colours; all other vectors d are stored as
0.5 + 0.5 d / scale in the axes x right, y down, z forward: red, green, blue.

Departure: a Wan VAE packs 4 frames into a latent frame, so we read "sub-frame motion" as the way
of a surface point since the first frame of its latent frame: what the latent pose maps, taken once
a latent frame, can't tell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .body import Body, deformation
from .cameras import Rig
from .geometry import BACKGROUND, EMPTY, SEEN, UNSEEN_SIDE, encode_normals
from .performer import vertex_normals
from .rasterize_mesh import NEAR, Fragments, rasterize_mesh
from .views import LATENT_STRIDE, to_bytes

UnseenNormals = Literal["kept", "black"]
OnStep = Callable[[int, int], None]

PIXELS_AT_ONCE = {"cpu": 1 << 19}
"""Pixels drawn together on a device: on a CPU two pictures of 512², about 100 MB."""
PIXELS_AT_ONCE_ELSEWHERE = 1 << 23
"""32 pictures of 512², about 2 GB."""
CORNERS_AT_ONCE = 1 << 24
"""Triangle corners drawn together, for bodies of more triangles than pixels."""
SEEN_MARGIN = 0.01
"""Metres that a seen point may lie behind the surface that the reference camera saw there."""
SMALLEST_SCALE = 1e-3
"""Metres: a body that doesn't deform or move must not have its rounding errors blown up."""


@dataclass(frozen=True)
class MapSettings:
    """What is clean reference, and how displacements are coloured."""

    reference_view: int = 0
    """The view whose pictures are given; its camera decides what is seen. -1 = all views are given,
    and view 0 decides."""
    reference_frames: int = 0
    """How many frames of it are given, from the first."""
    deformation_scale: float = 0.0
    """Metres that fill the colour range; 0 = the largest of this clip."""
    motion_scale: float = 0.0
    """Metres that fill the colour range; 0 = the largest of this clip."""
    unseen_normals: UnseenNormals = "kept"
    """Normals of the surface that faces away from the reference camera: drawn, or black."""
    margins: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Pixels of the reference pictures at left, top, right, bottom that no original covers."""


@dataclass(frozen=True)
class BodyMaps:
    """The maps of V views and F frames; those that are the same in all frames are expanded."""

    pose: Tensor
    """[V, F, 3, H, W] uint8, template coordinates of the visible surface; black = nothing."""
    deformation: Tensor
    """[V, F, 3, H, W] uint8, how far it is from the placed template, template axes; grey = not at all."""
    motion: Tensor
    """[V, F, 3, H, W] uint8, its way since its latent frame began, camera axes; grey = none."""
    rays: Tensor
    """[V, F, 3, H, W] uint8, direction of every pixel's ray, world axes."""
    normals: Tensor
    """[V, F, 3, H, W] uint8, normal colours; grey where nothing is, unseen side black if wanted."""
    visibility: Tensor
    """[V, F, H, W] uint8: 255 = seen by the reference camera, 128 = body that it doesn't see, 0 = nothing."""
    depth: Tensor
    """[V, F, H, W] metres from the camera; 0 = nothing."""
    reference_mask: Tensor
    """[V, F, H, W] bool: this picture is given, clean."""
    crop_mask: Tensor
    """[V, F, H, W] bool: in a given picture, but not covered by the original."""
    deformation_scale: float
    """Metres of a deformation that is 0 or 1 in colour."""
    motion_scale: float
    """Metres of a motion that is 0 or 1 in colour."""
    longest: tuple[float, float]
    """Longest deformation and motion of the clip, in scales: above 1, colours may be cut off."""


def pose_colors(
    rest: Tensor,  # [N, 3]
) -> Tensor:  # [N, 3] 0..1
    """Template coordinates with the box's middle at 0.5; one scale for all axes, the longest's."""
    low, high = rest.amin(0), rest.amax(0)
    return 0.5 + (rest - (low + high) / 2) / (high - low).amax()


def latent_starts(frames: int) -> Tensor:  # [F] int64
    """The first frame of each frame's latent frame: frame 0 is alone, then every 4 belong together."""
    f = torch.arange(frames)
    packed = torch.div(f - 1, LATENT_STRIDE, rounding_mode="floor") * LATENT_STRIDE + 1
    return torch.where(f == 0, 0, packed)


def subframe_motion(
    vertices: Tensor,  # [F, N, 3]
) -> Tensor:  # [F, N, 3] metres, world
    """The way of every vertex since the first frame of its latent frame."""
    return vertices - vertices[latent_starts(len(vertices)).to(vertices.device)]


def ray_directions(rig: Rig) -> Tensor:  # [V, 3, H, W] unit, world
    """The direction through every pixel centre."""
    y, x = torch.meshgrid(
        torch.arange(rig.height, device=rig.K.device) + 0.5,
        torch.arange(rig.width, device=rig.K.device) + 0.5,
        indexing="ij",
    )
    pixels = torch.stack([x, y, torch.ones_like(x)], -1)
    rays = pixels @ torch.linalg.inv(rig.K).mT[:, None]  # [V, H, W, 3], camera axes
    return F.normalize(rays @ rig.T_camera_world[:, None, :3, :3], dim=-1).movedim(-1, 1)


def reference_masks(rig: Rig, frames: int, settings: MapSettings) -> tuple[Tensor, Tensor]:
    """Reference and crop mask, [V, F, H, W] each, expanded."""
    V, H, W = len(rig), rig.height, rig.width
    given = torch.zeros(V, frames, dtype=torch.bool, device=rig.K.device)
    views = slice(None) if settings.reference_view < 0 else settings.reference_view
    given[views, : settings.reference_frames] = True
    left, top, right, bottom = settings.margins
    if left + right >= W or top + bottom >= H:
        raise ValueError(
            f"The margins leave nothing of the {W}x{H} reference picture: left + right must stay "
            f"below {W} and top + bottom below {H}."
        )
    padding = torch.ones(H, W, dtype=torch.bool, device=rig.K.device)
    padding[top : H - bottom, left : W - right] = False
    given = given[..., None, None]
    # Without padding there is nothing to store a picture each for.
    crop = given & padding if any(settings.margins) else torch.zeros_like(given)
    return given.expand(V, frames, H, W), crop.expand(V, frames, H, W)


def _in_camera(vertices: Tensor, T: Tensor) -> Tensor:  # [B, N, 3] world -> camera
    return vertices @ T[:3, :3].T + T[:3, 3]


def _chunks(body: Body, rig: Rig) -> list[slice]:
    """Runs of frames that are drawn together."""
    device = body.vertices.device.type
    pixels = PIXELS_AT_ONCE.get(device, PIXELS_AT_ONCE_ELSEWHERE)
    size = min(pixels // (rig.width * rig.height), CORNERS_AT_ONCE // (3 * len(body.faces)))
    size = max(1, size)
    return [slice(at, min(at + size, body.frame_count)) for at in range(0, body.frame_count, size)]


def _draw(body: Body, rig: Rig, view: int, frames: slice) -> Fragments:
    vertices = _in_camera(body.vertices[frames], rig.T_camera_world[view])
    return rasterize_mesh(vertices, body.faces, rig.K[view], rig.width, rig.height)


def _seen(
    points: Tensor,  # [hits, 3] world
    normals: Tensor,  # [hits, 3] world, unit
    picture: Tensor,  # [hits] which frame of the chunk
    reference_depth: Tensor,  # [B, H, W] metres, 0 = nothing
    rig: Rig,
    view: int,
) -> tuple[Tensor, Tensor]:  # seen, facing: [hits] bool
    """Whether the reference camera sees a point: it faces the camera and nothing lies before it.

    The pixel it falls into holds the depth of its centre, so a slanted surface may differ from it
    by the slope times half the pixel's footprint: that much more is allowed.
    """
    T, K = rig.T_camera_world[view], rig.K[view]
    local = _in_camera(points, T)
    z = local[:, 2].clamp(min=NEAR)
    x, y = ((local @ K.T)[:, :2] / z[:, None]).unbind(-1)
    # Cosine between the normal and the ray to the camera.
    cosine = -(normals * F.normalize(points - rig.centers[view], dim=-1)).sum(-1)
    inside = (local[:, 2] > NEAR) & (x >= 0) & (y >= 0) & (x < rig.width) & (y < rig.height)
    column, row = x.long().clamp(0, rig.width - 1), y.long().clamp(0, rig.height - 1)
    before = reference_depth[picture, row, column]
    slope = (1 - cosine.square()).clamp(min=0).sqrt() / cosine.clamp(min=0.1)
    margin = SEEN_MARGIN + slope * z / K[0, 0]
    facing = cosine > 0
    return facing & inside & ((before == 0) | (z - before < margin)), facing


@dataclass(frozen=True)
class _Scene:
    """A body with all that is drawn of it, computed once for all views."""

    body: Body
    pose: Tensor  # [N, 3] 0..1
    deformation: Tensor  # [F, N, 3] in scales
    motion: Tensor  # [F, N, 3] in scales, world axes
    normals: Tensor  # [F, N, 3]


def _scaled(shift: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """Displacements in scales, the scale, and the longest in scales.

    By length, not by component: so none is cut off in whatever axes it is drawn.
    """
    largest = float(shift.norm(dim=-1).amax())
    scale = scale or max(largest, SMALLEST_SCALE)
    return shift / scale, scale, largest / scale


def _render_chunk(
    scene: _Scene,
    rig: Rig,
    view: int,
    frames: slice,
    reference: int,
    reference_depth: Tensor,  # [B, H, W]
    unseen_normals: UnseenNormals,
) -> dict[str, Tensor]:
    """All maps of one view's frames that depend on the body, [B, C, H, W] each."""
    body, R = scene.body, rig.T_camera_world[view, :3, :3]
    vertices = body.vertices[frames]
    drawn = _draw(body, rig, view, frames)
    attributes = torch.cat(
        [
            scene.pose.expand_as(vertices), scene.deformation[frames], scene.motion[frames],
            scene.normals[frames], vertices,
        ],
        dim=-1,
    )  # fmt: skip
    values = drawn.interpolate_hits(attributes, body.faces)
    pose, shift, motion, normals, points = values.split(3, dim=-1)
    normals = F.normalize(normals, dim=-1)
    hits = (drawn.faces.flatten() >= 0).nonzero()[:, 0]
    picture = torch.div(hits, rig.width * rig.height, rounding_mode="floor")
    seen, facing = _seen(points, normals, picture, reference_depth, rig, reference)
    if view == reference:
        # What it draws it sees, though at the rim smooth normals may turn away already.
        seen, facing = torch.ones_like(seen), torch.ones_like(facing)
    normal_colors = encode_normals(normals @ R.T)
    if unseen_normals == "black":
        normal_colors = torch.where(facing[:, None], normal_colors, 0.0)

    def pictures(values: Tensor, ground: float) -> Tensor:  # [hits, C] 0..1 -> [B, C, H, W] uint8
        shape = (drawn.faces.numel(), values.shape[-1])
        flat = torch.full(shape, round(ground * 255), dtype=torch.uint8, device=values.device)
        flat.index_copy_(0, hits, to_bytes(values))
        return flat.view(*drawn.faces.shape, -1).movedim(-1, 1)

    visibility = torch.where(seen, SEEN, UNSEEN_SIDE)[:, None] / 255
    return {
        "pose": pictures(pose, 0.0),
        "deformation": pictures(0.5 + 0.5 * shift, BACKGROUND),
        "motion": pictures(0.5 + 0.5 * motion @ R.T, BACKGROUND),
        "normals": pictures(normal_colors, BACKGROUND),
        "visibility": pictures(visibility, EMPTY / 255)[:, 0],
        "depth": drawn.depth,
    }


def _check(settings: MapSettings, views: int) -> None:
    if not -1 <= settings.reference_view < views:
        raise ValueError(
            f"'reference_view' is {settings.reference_view}, but the rig has {views} cameras: use "
            f"0 to {views - 1}, or -1 for all."
        )


def _scene(body: Body, settings: MapSettings) -> tuple[_Scene, dict[str, float], list[float]]:
    """What is drawn, the two scales, and the longest displacements in scales."""
    shift, deformation_scale, most = _scaled(deformation(body), settings.deformation_scale)
    motion, motion_scale, fastest = _scaled(subframe_motion(body.vertices), settings.motion_scale)
    normals = vertex_normals(body.vertices, body.faces)
    scales = {"deformation_scale": deformation_scale, "motion_scale": motion_scale}
    return _Scene(body, pose_colors(body.rest), shift, motion, normals), scales, [most, fastest]


def render_body_maps(
    body: Body,
    rig: Rig,
    settings: MapSettings = MapSettings(),  # noqa: B008 (frozen)
    device: torch.device | None = None,
    on_step: OnStep | None = None,
) -> BodyMaps:
    """Draw all maps of a body into every camera, a few frames at a time.

    `device`: where to draw; the maps come back to the body's. How many frames are drawn at once
    depends on the device and changes no pixel.
    """
    _check(settings, len(rig))
    given, crop = reference_masks(rig, body.frame_count, settings)
    V, frames, H, W = len(rig), body.frame_count, rig.height, rig.width
    home = body.vertices.device
    device = device or home
    rig = replace(rig, K=rig.K.to(device).float(), T_camera_world=rig.T_camera_world.to(device))
    scene, scales, longest = _scene(body.to(device), settings)
    chunks = _chunks(scene.body, rig)
    done, total = 0, (V + 1) * len(chunks)

    def step() -> None:
        nonlocal done
        done += 1
        if on_step:
            on_step(done, total)

    reference = max(settings.reference_view, 0)
    reference_depth = torch.empty(frames, H, W, device=device)
    for chunk in chunks:
        reference_depth[chunk] = _draw(scene.body, rig, reference, chunk).depth
        step()
    colors = ("pose", "deformation", "motion", "normals")
    room = {"dtype": torch.uint8, "device": home}
    maps = {name: torch.empty(V, frames, 3, H, W, **room) for name in colors}
    maps["visibility"] = torch.empty(V, frames, H, W, **room)
    maps["depth"] = torch.empty(V, frames, H, W, device=home)
    for view in range(V):
        for chunk in chunks:
            pictures = _render_chunk(
                scene, rig, view, chunk, reference, reference_depth[chunk], settings.unseen_normals
            )
            for name, values in pictures.items():
                maps[name][view, chunk] = values.to(home)
            step()
    rays = to_bytes(0.5 + 0.5 * ray_directions(rig)).to(home)[:, None].expand(V, frames, 3, H, W)
    return BodyMaps(
        **maps,
        **scales,
        rays=rays,
        reference_mask=given.to(home),
        crop_mask=crop.to(home),
        longest=tuple(longest),
    )
