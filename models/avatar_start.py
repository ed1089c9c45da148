"""The first Gaussians of an avatar without a body: the skin of what the masks enclose.

Stage: VIEWS with masks and RIG -> for every frame the skin of the visual hull with the colours that
the views show there (`silhouettes`), and flat Gaussians all over the skin of one frame. World of the
pack, metres.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .avatar_free import nearest
from .avatar_mesh import FIRST_OPACITY, THICKNESS, WIDTH
from .quats import matrices_to_quats
from .silhouettes import hull_surface, shown_colors
from .splats import C0, Splats
from .views import Views, as_pictures

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Skin:
    """What the views enclose in one frame."""

    points: Tensor
    """[n, 3] world, metres."""
    normals: Tensor
    """[n, 3] outwards, of length 1."""
    colors: Tensor
    """[n, 3] 0..1, of the views that see a place best; grey where none does."""


def skins(
    views: Views,
    on_step: OnStep | None = None,  # counts frames
) -> list[Skin | None]:
    """Of all frames; None where fewer than two masks show somebody, or no place lies in all."""
    found: list[Skin | None] = []
    frames = views.frames.shape[1]
    for f in range(frames):
        surface = hull_surface(views.masks[:, f], views.rig)
        if surface is not None and len(surface.points):
            pictures = as_pictures(Views(views.frames[:, f : f + 1]))[:, 0]
            colors = shown_colors(surface, pictures, views.masks[:, f].float(), views.rig)
            found.append(Skin(surface.points, surface.normals, colors))
        else:
            found.append(None)
        if on_step:
            on_step(f + 1, frames)
    return found


def most_seen(
    masks: Tensor,  # [V, F, H, W] 0..1
    known: list[bool],  # F, frames that may be chosen
) -> int:
    """The frame whose outlines are largest in the most views: limbs that lie against the body, as
    those of small outlines do, would grow together. Of equals the one nearest to the middle."""
    areas = (masks > 0.5).float().flatten(2).mean(2)
    shares = (areas / areas.amax(1, keepdim=True).clamp(min=1e-9)).mean(0)
    middle = (len(known) - 1) / 2
    chosen = [f for f, there in enumerate(known) if there]
    return max(chosen, key=lambda f: (round(float(shares[f]), 2), -abs(f - middle)))


def thinned(skin: Skin, count: int) -> Skin:
    """So many points at most, evenly of the order in which voxels lie."""
    if len(skin.points) <= count:
        return skin
    chosen = torch.linspace(0, len(skin.points) - 1, count).round().long().to(skin.points.device)
    return Skin(skin.points[chosen], skin.normals[chosen], skin.colors[chosen])


def splats_on_skin(
    skin: Skin,
    degree: int = 0,
) -> Splats:
    """A flat Gaussian at every point, as wide as its neighbours are far."""
    away, _ = nearest(skin.points, skin.points, min(len(skin.points), 4))
    spacing = away[:, 1:].mean(1) if away.shape[1] > 1 else away.new_full((len(away),), 0.01)
    # Even spots on a plane have their three nearest at about one spacing.
    scales = skin.points.new_tensor([WIDTH, WIDTH, THICKNESS]) * spacing[:, None].clamp(min=1e-4)
    beside = torch.zeros_like(skin.normals)
    beside[torch.arange(len(beside)), skin.normals.abs().argmin(1)] = 1
    first = F.normalize(torch.linalg.cross(skin.normals, beside), dim=1)
    axes = torch.stack([first, torch.linalg.cross(skin.normals, first), skin.normals], 2)
    sh = skin.points.new_zeros(len(skin.points), (degree + 1) ** 2, 3)
    sh[:, 0] = (skin.colors - 0.5) / C0
    opacity = math.log(FIRST_OPACITY / (1 - FIRST_OPACITY))
    return Splats(
        skin.points.clone(),
        matrices_to_quats(axes),
        scales.log(),
        skin.points.new_full((len(skin.points),), opacity),
        sh,
    )
