"""Rays of a feature field: the subject's space, samples along rays, volume rendering.

Stage: the geometry under feature_field.py (MVCustom's pose-conditioned blocks, after
CustomDiffusion360). Cameras are OpenCV; the subject's space is the world moved and scaled so that the
optical axes meet at the origin and the farthest reference camera stands at distance 1.

A place on a ray is origin + t * direction with a direction whose depth along the optical axis is 1, so
t is depth, in units of that space. A ray is divided by the edges of its bins, which tile all of it, and
each bin has one sample: a constant density gives its exact opacity however the bins lie. The published
code leaves gaps between samples; otherwise the quadrature is NeRF's (Mildenhall et al. 2020, Eq. 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import meeting_point

UNIFORM_SHARE = 0.2
"""This share of the importance samples is spread evenly, so that a first block that is wrong about a
place does not hide it from the next."""


@dataclass(frozen=True)
class SubjectSpace:
    """Where the subject is in the world, and how far away it was looked at from."""

    centre: Tensor
    """[3] world, float64: where the optical axes of the references meet."""
    scale: float
    """World units (metres) from there to the farthest reference camera."""

    def normalised(
        self,
        T_camera_world: Tensor,  # [N, 4, 4]
    ) -> Tensor:  # [N, 4, 4], the same dtype
        """Cameras of the world as cameras of the subject's space; they turn with the world."""
        T = T_camera_world.double().clone()
        centre = self.centre.to(T)
        T[:, :3, 3] = (T[:, :3, 3] + T[:, :3, :3] @ centre) / self.scale
        return T.to(T_camera_world.dtype)


def subject_space(
    T_camera_world: Tensor,  # [R, 4, 4]
) -> SubjectSpace:
    """The space of a subject that these cameras look at.

    Raises ValueError if the cameras look away from each other, or all stand in the same place.
    """
    T = T_camera_world.double().cpu()
    eyes = -(T[:, :3, :3].mT @ T[:, :3, 3:])[..., 0]
    try:
        centre = meeting_point(eyes, T[:, 2, :3])
    except ValueError:
        raise ValueError(
            "The cameras of 'references' look away from each other, so they show no common subject: "
            "give cameras that stand around it and look at it."
        ) from None
    scale = float((eyes - centre).norm(dim=1).amax())
    if not 1e-6 < scale < float("inf"):
        raise ValueError(
            "The cameras of 'references' all stand in the subject's middle: check their positions."
        )
    return SubjectSpace(centre, scale)


NEAREST = 0.95
"""A ball of this share of the nearest camera's distance leaves that camera outside."""


def visible_reach(
    K: Tensor,  # [R, 3, 3] pixels
    T_camera_world: Tensor,  # [R, 4, 4] of the subject's space
    size: tuple[int, int],  # rows, columns
) -> float:
    """Radius of the ball around the origin in which a subject lies that is in the pictures: half
    their longer side at the origin's depth, of the camera that sees farthest, but short of the nearest
    camera.

    Samples outside the subject are lost, and fog there must be unlearned: with the radius to the
    corners instead (0.40 for 0.31) the error of alpha was 0.046 instead of 0.032 after 250 steps.
    """
    h, w = size
    corners = K.new_tensor([[0, 0, 1], [w, 0, 1], [0, h, 1], [w, h, 1]]).double()
    spread = (corners @ torch.linalg.inv(K.double()).mT)[..., :2].abs().flatten(1).amax(1)
    distance = T_camera_world[:, :3, 3].double().norm(dim=1)
    return float(torch.minimum((spread * distance).amax(), NEAREST * distance.amin()))


@dataclass(frozen=True)
class Rays:
    """One ray a token, L = h w of each of N cameras, row after row; geometry's dtype."""

    origins: Tensor
    """[N, 1, 3]"""
    directions: Tensor
    """[N, L, 3] with depth 1 along the camera's optical axis."""


def camera_rays(
    K: Tensor,  # [N, 3, 3] pixels
    T_camera_world: Tensor,  # [N, 4, 4]
    size: tuple[int, int],  # rows, columns
) -> Rays:
    """Rays through the pixel centres; float32, or float64 if the cameras are."""
    h, w = size
    dtype = torch.promote_types(K.dtype, torch.float32)
    K, T = K.to(dtype), T_camera_world.to(dtype)
    y, x = torch.meshgrid(
        torch.arange(h, dtype=dtype, device=K.device) + 0.5,
        torch.arange(w, dtype=dtype, device=K.device) + 0.5,
        indexing="ij",
    )
    pixels = torch.stack([x, y, torch.ones_like(x)], -1).view(1, -1, 3)
    R = T[:, :3, :3]
    directions = pixels @ torch.linalg.inv(K).mT @ R
    return Rays(-(T[:, None, :3, 3] @ R), directions)


def span(rays: Rays, reach: float) -> Tensor:  # [N, L, 2]
    """Depths at which a ray enters and leaves the ball of radius `reach` around the origin, in front
    of its camera; the same depth twice for a ray that does not pass it."""
    o, d = rays.origins, rays.directions
    square = d.square().sum(-1)
    closest = -(o * d).sum(-1) / square
    half = ((reach**2 - o.square().sum(-1)) / square + closest.square()).clamp(min=0).sqrt()
    return torch.stack([closest - half, closest + half], -1).clamp(min=0)


def even_edges(between: Tensor, bins: int) -> Tensor:  # [N, L, 2] -> [N, L, bins + 1]
    """Bins of equal length."""
    share = torch.linspace(0, 1, bins + 1, dtype=between.dtype, device=between.device)
    return torch.lerp(between[..., :1], between[..., 1:], share)


def importance_edges(
    edges: Tensor,  # [N, L, B + 1] depths
    weights: Tensor,  # [N, L, B] of an earlier rendering of the same rays
    bins: int,
) -> Tensor:  # [N, L, bins + 1]
    """Bins that each hold an equal part of the weight, by the inverse of its cumulated distribution
    (NeRF, Sec. 5.2, with evenly spaced quantiles). No gradient."""
    edges, weights = edges.detach(), weights.detach().to(edges)
    widths = edges.diff(dim=-1)
    even = widths / (edges[..., -1:] - edges[..., :1]).clamp(min=1e-12)
    total = weights.sum(-1, keepdim=True)
    peaks = torch.where(total > 1e-6, weights / total.clamp(min=1e-6), even)
    share = torch.lerp(peaks, even, UNIFORM_SHARE)
    below = F.pad(share.cumsum(-1), (1, 0))
    below = below / below[..., -1:].clamp(min=1e-12)
    quantiles = torch.linspace(0, 1, bins + 1, dtype=edges.dtype, device=edges.device)
    wanted = quantiles.expand(*edges.shape[:-1], -1).contiguous()
    upper = torch.searchsorted(below, wanted, right=True).clamp(1, edges.shape[-1] - 1)
    start, end = below.gather(-1, upper - 1), below.gather(-1, upper)
    within = ((wanted - start) / (end - start).clamp(min=1e-12)).clamp(0, 1)
    return torch.lerp(edges.gather(-1, upper - 1), edges.gather(-1, upper), within)


def places_in(
    edges: Tensor,  # [N, L, S + 1]
    generator: torch.Generator | None = None,
) -> Tensor:  # [N, L, S] depths
    """One place in each bin: at random where a generator is given (stratified), else its middle."""
    shape, device = (*edges.shape[:-1], edges.shape[-1] - 1), edges.device
    if generator is None:
        return (edges[..., :-1] + edges[..., 1:]) / 2
    share = torch.rand(shape, generator=generator, device=generator.device).to(edges)
    return torch.lerp(edges[..., :-1], edges[..., 1:], share.to(device))


def ray_weights(
    density: Tensor,  # [..., S] >= 0, a unit of length
    lengths: Tensor,  # [..., S] of the bins
) -> Tensor:  # [..., S], their sum is the opacity
    """w_i = T_i (1 - exp(-density_i length_i)), T_i = exp(-sum of what lies before) (NeRF, Eq. 3)."""
    thickness = density * lengths
    before = thickness.cumsum(-1) - thickness
    return torch.exp(-before) * -torch.expm1(-thickness)


def median_depth(edges: Tensor, weights: Tensor) -> Tensor:  # [..., S + 1], [..., S] -> [...]
    """Depth at which half of a ray's weight lies before; 0 where it has none."""
    below = F.pad(weights.cumsum(-1), (1, 0))
    half = below[..., -1:] / 2
    upper = torch.searchsorted(below.contiguous(), half.contiguous()).clamp(1, weights.shape[-1])
    start, end = below.gather(-1, upper - 1), below.gather(-1, upper)
    within = (half - start) / (end - start).clamp(min=1e-12)
    depth = torch.lerp(edges.gather(-1, upper - 1), edges.gather(-1, upper), within)
    return torch.where(half > 0, depth, 0)[..., 0]
