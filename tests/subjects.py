"""Subjects to learn, drawn exactly: a person who stands still and two simple objects, from any camera,
before any background. Kept apart from training: people and clothes of the test split."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from turnaround.models.cameras import Rig, orbit_rig
from turnaround.models.performer import draw_appearance, pose_performer, render_colors
from turnaround.models.performer import render_geometries as performer_geometries
from turnaround.models.rasterize_mesh import rasterize_mesh

FIRST_CLOTHES = 1_000_003
LIGHT = F.normalize(torch.tensor([-0.4, -0.8, -0.5]), dim=0)
"""From where the objects are lit, world."""
AMBIENT = 0.55
TURNED = 2.399963
"""Golden angle, radians: azimuths that never line up, however many there are."""


@dataclass(frozen=True)
class Seen:
    """A subject from V cameras."""

    frames: Tensor
    """[V, 3, H, W] 0..1."""
    masks: Tensor
    """[V, H, W] 0..1."""
    depth: Tensor
    """[V, H, W] metres; 0 where the subject is not."""


def person(rig: Rig, grey: Tensor, name: str = "kira", clothes: int = 0) -> Seen:
    """One moment of a motion that no training saw."""
    look = draw_appearance(FIRST_CLOTHES + clothes)
    posed = pose_performer(name, "dance_a", torch.tensor([0.2]), look)
    V = len(rig)
    vertices, normals = (t.expand(V, -1, -1) for t in (posed.vertices, posed.normals))
    camera = rig.K, rig.T_camera_world, rig.width, rig.height
    frames, masks = render_colors(vertices, normals, [look] * V, *camera, list(grey))
    return Seen(frames, masks, performer_geometries(vertices, normals, *camera)[0])


def _box(centre, size, color) -> tuple[Tensor, Tensor, Tensor]:
    corners = torch.tensor([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) / 2.0
    sides = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    vertices = torch.cat([corners[list(side)] for side in sides])
    faces = torch.tensor(
        [[4 * s + a, 4 * s + b, 4 * s + c] for s in range(6) for a, b, c in ((0, 1, 2), (0, 2, 3))]
    )
    vertices = vertices * torch.tensor(size) + torch.tensor(centre)
    return vertices, faces, torch.tensor(color).expand(len(vertices), 3)


def _turned(profile, centre, axis: int, colors) -> tuple[Tensor, Tensor, Tensor]:
    """A profile [(along, radius)] turned round an axis; a color from one ring to the next."""
    around = torch.arange(24) * (2 * math.pi / 24)
    vertices, faces, tints = [], [], []
    for (a, r), (b, s), color in zip(profile[:-1], profile[1:], colors, strict=True):
        start = sum(len(v) for v in vertices)
        for along, radius in ((a, r), (b, s)):
            ring = torch.stack(
                [radius * around.cos(), torch.full((24,), float(along)), radius * around.sin()], 1
            )
            vertices.append(ring.roll(axis - 1, 1) + torch.tensor(centre))
            tints.append(torch.tensor(color).expand(24, 3))
        i, j = torch.arange(24), (torch.arange(24) + 1) % 24
        faces += [
            torch.stack([i, j, j + 24], 1) + start,
            torch.stack([i, j + 24, i + 24], 1) + start,
        ]
    return torch.cat(vertices), torch.cat(faces), torch.cat(tints)


def _joined(parts) -> tuple[Tensor, Tensor, Tensor]:
    starts = np.cumsum([0] + [len(v) for v, _, _ in parts])
    faces = [f + int(start) for (_, f, _), start in zip(parts, starts, strict=False)]
    return torch.cat([v for v, _, _ in parts]), torch.cat(faces), torch.cat([c for *_, c in parts])


def truck() -> tuple[Tensor, Tensor, Tensor]:
    """A toy: every side has another color, so that a view can't be taken for another."""
    wheel = [(-0.06, 0.0), (-0.06, 0.2), (0.06, 0.2), (0.06, 0.0)]
    wheels = [
        _turned(wheel, (x, 0.35, z), 0, [(0.8, 0.8, 0.8), (0.1, 0.1, 0.1), (0.8, 0.8, 0.8)])
        for x in (-0.33, 0.33)
        for z in (-0.45, 0.45)
    ]
    return _joined([
        _box((0, 0.15, 0.0), (0.6, 0.25, 1.5), (0.75, 0.15, 0.12)),
        _box((0, -0.2, -0.45), (0.55, 0.5, 0.5), (0.15, 0.3, 0.75)),
        _box((0, -0.25, -0.68), (0.4, 0.25, 0.08), (0.9, 0.95, 1.0)),
        _box((0.0, -0.1, 0.3), (0.5, 0.3, 0.8), (0.95, 0.8, 0.2)),
        _box((0.27, -0.1, 0.3), (0.06, 0.2, 0.5), (0.1, 0.6, 0.3)),
        _box((-0.27, -0.1, 0.3), (0.06, 0.2, 0.5), (0.6, 0.2, 0.7)),
        *wheels,
    ])  # fmt: skip


def lamp() -> tuple[Tensor, Tensor, Tensor]:
    """Turned parts, and one arm that tells its sides apart."""
    body = [(0.8, 0.0), (0.8, 0.45), (0.7, 0.4), (0.6, 0.08), (-0.3, 0.06), (-0.3, 0.5), (-0.8, 0.2),
            (-0.8, 0.0)]  # fmt: skip
    colors = [(0.3, 0.2, 0.1), (0.5, 0.35, 0.2), (0.2, 0.5, 0.5), (0.85, 0.8, 0.7), (0.9, 0.4, 0.2),
              (0.95, 0.85, 0.3), (0.95, 0.95, 0.9)]  # fmt: skip
    return _joined([
        _turned(body, (0, 0, 0), 1, colors),
        _box((0.25, 0.15, 0.0), (0.5, 0.07, 0.07), (0.2, 0.3, 0.8)),
        _turned([(-0.1, 0.0), (-0.1, 0.12), (0.1, 0.12), (0.1, 0.0)], (0.5, 0.15, 0), 2,
                [(0.1, 0.7, 0.3), (0.8, 0.2, 0.5), (0.1, 0.7, 0.3)]),
    ])  # fmt: skip


def thing(mesh: tuple[Tensor, Tensor, Tensor], rig: Rig, grey: Tensor) -> Seen:
    """A mesh of vertices [N, 3], faces [M, 3] and colors [N, 3], drawn at twice the size."""
    vertices, faces, colors = mesh
    W, H = rig.width, rig.height
    corners = vertices[faces]
    normals = F.normalize(
        torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), dim=1
    )
    camera = vertices @ rig.T_camera_world[:, :3, :3].mT + rig.T_camera_world[:, None, :3, 3]
    K = rig.K * torch.tensor([[2.0], [2.0], [1.0]])
    seen = rasterize_mesh(camera, faces, K, 2 * W, 2 * H)
    hit = seen.faces >= 0
    # Thin parts are seen from both sides: the normal that faces the light's side counts.
    shade = AMBIENT + (1 - AMBIENT) * (normals[seen.faces] @ LIGHT).abs()
    drawn = seen.interpolate(colors, faces) * shade[..., None]
    ground = F.interpolate(grey, (2 * H, 2 * W), mode="bilinear").movedim(1, -1)
    frames = torch.where(hit[..., None], drawn, ground).movedim(-1, 1)
    masks = F.avg_pool2d(hit[:, None].float(), 2)
    depth = F.avg_pool2d(torch.where(hit, seen.depth, 0.0)[:, None], 2) / masks.clamp(min=1e-6)
    return Seen(F.avg_pool2d(frames, 2), masks[:, 0], torch.where(masks > 0.5, depth, 0.0)[:, 0])


def spiral_rig(
    views: int, width: int, height: int, lowest: float = -0.15, highest: float = 0.5,
    first: float = 0.0, distance: float = 3.2, fov: float = 0.66,
) -> Rig:  # fmt: skip
    """Cameras all round, at changing elevations (radians)."""
    n = torch.arange(views)
    elevations = lowest + (highest - lowest) * ((n * 0.618034) % 1)
    return orbit_rig(first + n * TURNED, elevations, distance, fov, width, height)


def plain(views: int, width: int, height: int, grey: float = 0.5) -> Tensor:  # [V, 3, H, W]
    return torch.full((views, 3, height, width), grey)


def rooms(views: int, width: int, height: int, seed: int) -> Tensor:  # [V, 3, H, W]
    """Smooth colors, another for every view: surroundings that tell nothing of the subject."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(views, 3, 5, 4, generator=generator)
    return F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False).clamp(0, 1)
