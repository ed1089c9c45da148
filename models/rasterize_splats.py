"""Gaussian rasteriser: pictures of Gaussian splats, with gradients to the Gaussians.

Elliptical weighted averaging (Zwicker et al. 2001, "EWA splatting") as 3D Gaussian Splatting (Kerbl
et al. 2023, Sec. 4 and 6) and gsplat (Ye et al. 2024, Sec. 3 and appendix) write it:

- A Gaussian's covariance is projected with the Jacobian J of the camera at its mean; where that
  lies far beside the picture, at 1.3 of the picture's half width or height at most. A low-pass filter
  adds 0.3 square pixels (or what is asked for) to the variance along both axes.
- At a pixel's centre (+0.5) the Gaussian has alpha = opacity exp(-sigma), at most 0.99, with
  sigma = dᵀ Sigma⁻¹ d / 2; below 1/255 it is left out.
- Gaussians are composited from the nearest mean to the farthest (of equals the first comes first),
  until one would leave a transmittance of at most 1e-4: that one and all behind are left out.

Departs where it is only cheaper: a Gaussian reaches exactly as far as its alpha does (gsplat:
3.33 standard deviations), and the determinant of the projected covariance is summed from terms
that are all positive, so that needles keep their shape in float32.

A picture does not depend on tiles, chunks or threads, and neither do gradients, but where gsplat
draws: it sums gradients in any order, and up to its version 1.5 it holds alpha at 0.999. What stands
here and in `rasterize_splats_torch.py` is the reference and runs everywhere;
`project_splats_numba.py` and `rasterize_splats_numba.py` do the same faster on a CPU where numba is
installed; on CUDA gsplat composites where it is installed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .splats import Splats, rotation_matrices

log = logging.getLogger("turnaround")

NEAR = 0.01
"""Gaussians whose means lie nearer to the camera's plane than this (metres) are not drawn."""
WIDEST = 1e6
"""Nor are those with a standard deviation of more pixels: they are mistakes, and overflow."""
LOW_PASS = 0.3
"""Square pixels added to the variances of a projected Gaussian, as published."""
PIXEL_LOW_PASS = 0.1
"""The same for avatars, learned and drawn: a pixel's own box has a variance of 1/12, so pictures of a
camera are sharper than the published 0.3 can draw (Mip-Splatting, Yu et al. 2024, Sec. 5.2)."""
BESIDE = 0.3
"""How far beside the picture J still follows the mean: this times half the picture's angle."""
LEAST_ALPHA, MOST_ALPHA = 1 / 255, 0.99
LEAST_LEFT = 1e-4
"""Transmittance at which a pixel is finished."""
MOST_PAIRS = 1 << 25
"""Gaussians times tiles that they reach, as many as are listed: a gradient keeps 52 bytes of each."""
COMPILING = 1_000_000
"""Gaussians times pictures from which numba's compiling, some 8 seconds once a process, pays off."""
LEARNING = 1000
"""Pictures that one with gradients stands for: they are drawn to fit Gaussians."""


@dataclass(frozen=True)
class SplatPicture:
    """What one camera sees of N Gaussians."""

    color: Tensor
    """[3, H, W] composited over the background; over black it is premultiplied with alpha."""
    alpha: Tensor
    """[H, W] 0..1."""
    depth: Tensor | None
    """[H, W] metres along the optical axis: the mean of what is seen, 0 where nothing is."""
    normals: Tensor | None
    """[3, H, W] camera frame: of the Gaussians' shortest axes, on the side that faces the camera,
    the sum weighted as colours are. Shorter than alpha where they differ."""
    radii: Tensor
    """[N] pixels from the mean to the farthest pixel reached; 0 = not drawn."""
    shifts: Tensor
    """[N, 2] zeros that were added to the projected means, pixels: after backward, the lengths of
    `shifts.grad` tell where a fit wants more Gaussians (3DGS, Sec. 5.2)."""

    @property
    def visible(self) -> Tensor:
        """[N] bool: which Gaussians were drawn."""
        return self.radii > 0


class Placed(NamedTuple):
    """M Gaussians as they lie on the picture."""

    centers: Tensor
    """[M, 2] pixels."""
    conics: Tensor
    """[M, 3] inverse covariance: xx, xy, yy."""
    opacities: Tensor
    """[M] 0..1."""
    features: Tensor
    """[M, C] what is composited."""


class Frame(NamedTuple):
    """What of the projected Gaussians has no gradient."""

    depths: Tensor
    """[M] metres along the optical axis: the order."""
    reach: Tensor
    """[M, 2] pixels from the centre to where alpha has fallen to 1/255, along x and y; 0 = nowhere."""
    width: int
    height: int


class Projected(NamedTuple):
    """M Gaussians as a camera sees them."""

    centers: Tensor
    """[M, 2] pixels."""
    conics: Tensor
    """[M, 3] inverse covariance on the picture: xx, xy, yy."""
    variances: Tensor
    """[M, 2] square pixels along x and y; without gradients."""
    depths: Tensor
    """[M] metres along the optical axis."""
    normals: Tensor
    """[M, 3] camera frame."""


class Lens(NamedTuple):
    """A camera's picture, pixels, along x and y."""

    focal: tuple[float, float]
    middle: tuple[float, float]
    size: tuple[int, int]

    def held(self) -> tuple[tuple[float, float], ...]:
        """Tangents of the directions, along x and y, between which J is taken: not far beside the
        picture, where a plane is no longer near a sphere."""
        return tuple(
            ((-c - BESIDE * size / 2) / f, (size - c + BESIDE * size / 2) / f)
            for f, c, size in zip(*self, strict=True)
        )


def render(
    splats: Splats,
    K: Tensor,  # [3, 3] pixels
    T_camera_world: Tensor,  # [4, 4]
    width: int,
    height: int,
    background: Tensor | None = None,  # [3] or [3, H, W]; None = black
    geometry: bool = True,  # False = without depth and normals
    way: str | None = None,  # one of WAYS; None = the quickest for a fit or for one picture
    low_pass: float = LOW_PASS,  # square pixels, above 0
) -> SplatPicture:
    """Draw Gaussians. Differentiable once, in the Gaussians and in the background."""
    if not low_pass > 0:
        raise ValueError(f"The low-pass filter of Gaussians has to be above 0, got {low_pass}.")
    (fx, skew, cx), (_, fy, cy), _ = K.tolist()
    if skew != 0:
        raise ValueError("Gaussians are drawn for cameras without skew: K[0, 1] has to be 0.")
    lens, T = Lens((fx, fy), (cx, cy), (width, height)), T_camera_world.to(splats.means)
    drawn = _drawable(splats, lens, T)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in splats.tensors())
    shifts = splats.means.new_zeros(len(splats), 2).requires_grad_(wanted)
    some, moved = splats, shifts
    if not drawn.all():
        some, moved = splats.select(drawn), shifts[drawn]
    pictures = LEARNING if wanted else 1
    way = way or fastest_way(splats.means.device, splats.means.dtype, len(splats) * pictures)
    placed, frame = _place(some, WAYS[way].project(some, lens, T, low_pass), lens, T, geometry)
    placed = placed._replace(centers=placed.centers + moved)
    sums, left = WAYS[way].draw(placed, frame)
    alpha = 1 - left
    radii = frame.reach.amax(1)
    if some is not splats:
        radii = radii.new_zeros(len(splats)).masked_scatter(drawn, radii)
    return SplatPicture(
        color=sums[:3] if background is None else sums[:3] + left * _shaped(background, sums),
        alpha=alpha,
        depth=sums[3] / alpha.clamp(min=LEAST_ALPHA) if geometry else None,
        normals=sums[4:] if geometry else None,
        radii=radii,
        shifts=shifts,
    )


def _shaped(background: Tensor, sums: Tensor) -> Tensor:
    given = background.to(sums)
    return given[:, None, None] if given.ndim == 1 else given


@torch.no_grad()
def _drawable(splats: Splats, lens: Lens, T: Tensor) -> Tensor:  # [N] bool
    """Which Gaussians have a place on the picture at all. The others must not come near autograd:
    what is infinite or no number would make gradients so."""
    z = splats.means @ T[2, :3] + T[2, 3]
    widest = splats.log_scales.amax(1).exp() * max(lens.focal)
    finite = sum(t.flatten(1).sum(1) if t.ndim > 1 else t for t in splats.tensors()).isfinite()
    return (z > NEAR) & (widest < WIDEST * z) & finite


def _place(
    splats: Splats, projected: Projected, lens: Lens, T: Tensor, geometry: bool
) -> tuple[Placed, Frame]:
    """Features are colours and, with geometry, depths and normals."""
    centers, conics, variances, depths, normals = projected
    opacities = splats.opacities.sigmoid()
    features = splats.colors(-T[:3, :3].T @ T[:3, 3])
    if geometry:
        features = torch.cat([features, depths[:, None], normals], 1)
    with torch.no_grad():
        spread = 2 * (opacities / LEAST_ALPHA).log().clamp(min=0)
        reach = (spread[:, None] * variances).sqrt()
        # From the first pixel's centre to the last one's.
        last = torch.tensor(lens.size, device=reach.device) - 0.5
        seen = ((centers + reach >= 0.5) & (centers - reach <= last)).all(1, keepdim=True)
    frame = Frame(depths.detach(), reach * seen, *lens.size)
    return Placed(centers, conics, opacities, features), frame


# Projection


def projected(splats: Splats, lens: Lens, T: Tensor, low_pass: float) -> Projected:
    R, t = T[:3, :3], T[:3, 3]
    places = torch.addmm(t[:, None], R, splats.means.T)
    inverse = 1 / places[2]
    tangents = places[:2] * inverse
    turned = rotation_matrices(splats.rotations).permute(1, 2, 0)
    turned = (R @ turned.flatten(1)).view_as(turned)  # [3, 3 axes, N] in the camera's frame
    axes = turned * splats.log_scales.T.contiguous().exp()
    # Rows of J R S: a Gaussian's covariance on the picture is their product with themselves.
    across, down = (
        (lens.focal[i] * inverse) * (axes[i] - tangents[i].clamp(*lens.held()[i]) * axes[2])
        for i in range(2)
    )
    xx, xy, yy = (across * across).sum(0), (across * down).sum(0), (down * down).sum(0)
    # Lagrange's identity: xx yy - xy xy without the difference of large numbers.
    area = torch.linalg.cross(across, down, dim=0).square().sum(0)
    determinant = area + low_pass * (xx + yy) + low_pass**2
    xx, yy = xx + low_pass, yy + low_pass
    return Projected(
        torch.stack([lens.focal[i] * tangents[i] + lens.middle[i] for i in range(2)], 1),
        torch.stack([yy, -xy, xx], 1) / determinant[:, None],
        torch.stack([xx, yy], 1).detach(),
        places[2],
        _normals(splats, turned, places),
    )


def _normals(
    splats: Splats,
    axes: Tensor,  # [3, 3 axes, N] of the Gaussians, in the camera's frame
    places: Tensor,  # [3, N] camera frame
) -> Tensor:  # [N, 3]
    shortest = splats.log_scales.detach().argmin(1)
    normals = axes.gather(1, shortest.expand(3, 1, -1))[:, 0]
    away = (normals * places).sum(0).detach() > 0
    return torch.where(away, -normals, normals).T


# Which way


def refuse_too_many(pairs: int, count: int) -> None:
    if pairs > MOST_PAIRS:
        raise ValueError(
            f"{count} Gaussians reach {pairs / count:.0f} tiles of the picture each, which needs too "
            "much memory: draw fewer, smaller ones or a smaller picture."
        )


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, module, frame, *placed):
        sums, left, lists = module.composite(Placed(*placed), frame)
        ctx.save_for_backward(*placed, sums, left)
        ctx.module, ctx.frame, ctx.lists = module, frame, lists
        return sums, left

    @staticmethod
    @once_differentiable
    def backward(ctx, pull_sums, pull_left):
        *placed, sums, left = ctx.saved_tensors
        # All that a pixel shows, weighted by its gradients: Gaussian after Gaussian is taken off, and
        # what remains lies behind.
        behind = (sums * pull_sums).sum(0) + left * pull_left
        found = ctx.module.slopes(Placed(*placed), ctx.frame, ctx.lists, pull_sums, behind)
        return None, None, *found


class Way(NamedTuple):
    """One implementation."""

    project: Callable[[Splats, Lens, Tensor, float], Projected]
    """Gaussians, lens, T_camera_world, low-pass -> as `projected`."""
    draw: Callable[[Placed, Frame], tuple[Tensor, Tensor]]
    """-> sums of features [C, H, W] and the transmittance that is left [H, W], differentiable."""


def _project_numba(splats: Splats, lens: Lens, T: Tensor, low_pass: float) -> Projected:
    from . import project_splats_numba

    return project_splats_numba.projected(splats, lens, T, low_pass)


def _draw_torch(placed: Placed, frame: Frame) -> tuple[Tensor, Tensor]:
    from . import rasterize_splats_torch

    return _Composite.apply(rasterize_splats_torch, frame, *placed)


def _draw_numba(placed: Placed, frame: Frame) -> tuple[Tensor, Tensor]:
    from . import rasterize_splats_numba

    return _Composite.apply(rasterize_splats_numba, frame, *placed)


def _draw_gsplat(placed: Placed, frame: Frame) -> tuple[Tensor, Tensor]:
    import gsplat

    side = 16
    tiles = -(-frame.width // side), -(-frame.height // side)
    centers, conics, opacities, features = (t[None].contiguous() for t in placed)
    _, keys, order = gsplat.isect_tiles(
        centers.detach(), frame.reach.ceil().int()[None], frame.depths[None], side, *tiles
    )
    starts = gsplat.isect_offset_encode(keys, 1, *tiles)
    sums, alpha = gsplat.rasterize_to_pixels(
        centers, conics, features, opacities, frame.width, frame.height, side, starts, order
    )
    return sums[0].permute(2, 0, 1), 1 - alpha[0, ..., 0]


WAYS = {
    "torch": Way(projected, _draw_torch),
    "numba": Way(_project_numba, _draw_numba),
    "gsplat": Way(projected, _draw_gsplat),
}


@cache
def _works(way: str, device: str) -> bool:
    """Whether it draws here: optional packages may be missing or broken."""
    one = torch.ones(1, 4, device=device)
    ahead = torch.tensor([[0.0, 0.0, 1.0]], device=device)
    splat = Splats(ahead, one, one[:, :3], 3 * one[0, :1], one[:, None, :3])
    K = torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]])
    try:
        with torch.no_grad():
            seen = render(splat, K, torch.eye(4), 8, 8, geometry=False, way=way)
        return bool(seen.alpha[4, 4] > 0.9 and seen.color[0, 4, 4] > 0.7)
    except Exception as reason:  # whatever an optional package raises, torch draws too
        log.info("Gaussians are drawn by torch, as %s does not work here: %s", way, reason)
        return False


def fastest_way(device: torch.device, dtype: torch.dtype, work: int) -> str:
    """The quickest of WAYS for so many Gaussians times pictures, all of which draw the same. Who draws
    many pictures without gradients should ask once and draw all in this way."""
    if dtype == torch.float32:
        if device.type == "cuda" and _works("gsplat", str(device)):
            return "gsplat"
        if device.type == "cpu" and work >= COMPILING and _works("numba", "cpu"):
            return "numba"
    return "torch"
