"""Depth refined by normals: coarse shape from the depth, fine shape from the normals.

Stage: metres -> metres, before the points: MV-Performer's normal-guided refinement, whose objective
is unpublished; this is the screened Poisson form of integrating normals. Over the performer's
pixels, with P(p) = z(p) ray(p) and n the normal between two neighbours,

    E(z) = sum_p (z(p) - z0(p))^2 + reach^2 sum_(p, q) (n . (P(q) - P(p)))^2,

quadratic in z and solved by conjugate gradients. `reach` is a length in pixels: larger shapes keep
the depth's word, smaller ones follow the normals. Pairs across depth jumps don't count; pixels
without depth have only the second term, so normals fill holes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .points import EDGE_JUMP, unproject_depth

STEPS, TOLERANCE = 300, 1e-4
FAINT = 0.3
"""A normal shorter than this before it is brought to unit length says nothing."""


def refine_depth(
    depth: Tensor,  # [F, H, W] metres; not finite or <= 0 = unknown
    normals: Tensor,  # [F, 3, H, W] camera axes (x right, y down, z away), towards the camera
    masks: Tensor,  # [F, H, W] 0..1
    K: Tensor,  # [3, 3] pixels
    reach: float = 12.0,  # pixels
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:  # [F, H, W] metres; 0 = unknown
    """The depth that agrees with the normals, frame by frame."""
    refined = []
    for f in range(len(depth)):
        refined.append(_refine_frame(depth[f], normals[f], masks[f] > 0.5, K, reach))
        if on_step:
            on_step(f + 1, len(depth))
    return torch.stack(refined)


def _refine_frame(
    depth: Tensor, normals: Tensor, inside: Tensor, K: Tensor, reach: float
) -> Tensor:
    known = inside & depth.isfinite() & (depth > 0)
    if not known.any():
        return torch.zeros_like(depth)
    middle = depth[known].median()
    start = torch.where(known, depth, middle)
    across = _pairs(normals, inside, known, start, K, dim=1)
    down = _pairs(normals, inside, known, start, K, dim=0)
    reached = known.clone()  # pixels that no chain of pairs ties to a known depth stay unknown
    for _ in range(sum(depth.shape)):
        grown = reached.clone()
        for (_, _, tied), dim in ((across, 1), (down, 0)):
            a, b = _first(reached, dim), _second(reached, dim)
            _first(grown, dim).logical_or_(b & tied)
            _second(grown, dim).logical_or_(a & tied)
        if torch.equal(grown, reached):
            break
        reached = grown
    z = _conjugate_gradients(start, known, reached, (across, down), reach)
    return torch.where(reached, z, 0.0)


def _first(t: Tensor, dim: int) -> Tensor:
    return t.narrow(dim, 0, t.shape[dim] - 1)


def _second(t: Tensor, dim: int) -> Tensor:
    return t.narrow(dim, 1, t.shape[dim] - 1)


def _pairs(
    normals: Tensor, inside: Tensor, known: Tensor, start: Tensor, K: Tensor, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """For neighbours p, q along an axis: n . ray(p), n . ray(q), and whether the pair counts."""
    rays = unproject_depth(torch.ones_like(start)[None], K)[0]
    p, q = _first(normals, dim + 1), _second(normals, dim + 1)
    told = (p.norm(dim=0) > FAINT) & (q.norm(dim=0) > FAINT)
    n = F.normalize(F.normalize(p, dim=0) + F.normalize(q, dim=0), dim=0)
    near = torch.minimum(_first(start, dim), _second(start, dim))
    jump = (_second(start, dim) - _first(start, dim)).abs() > EDGE_JUMP * near
    jump &= _first(known, dim) & _second(known, dim)
    counts = told & ~jump & _first(inside, dim) & _second(inside, dim)
    at_p, at_q = ((n * _first(rays, dim + 1)).sum(0), (n * _second(rays, dim + 1)).sum(0))
    return at_p * counts, at_q * counts, counts


def _conjugate_gradients(
    start: Tensor, known: Tensor, free: Tensor, pairs: tuple, reach: float
) -> Tensor:
    """Jacobi-preconditioned, in the depth's difference from its middle, in float64."""
    middle = start[known].median().double()
    data = known.double()

    def apply(z: Tensor) -> Tensor:
        out = data * z
        for dim, (at_p, at_q, _) in zip((1, 0), pairs, strict=True):
            step = reach**2 * (at_q * _second(z, dim) - at_p * _first(z, dim))
            _second(out, dim).add_(at_q * step)
            _first(out, dim).sub_(at_p * step)
        return out

    diagonal = data.clone()
    for dim, (at_p, at_q, _) in zip((1, 0), pairs, strict=True):
        _second(diagonal, dim).add_(reach**2 * at_q.square())
        _first(diagonal, dim).add_(reach**2 * at_p.square())
    inverse = torch.where(free, 1 / diagonal.clamp(min=1e-12), 0.0)
    z = torch.where(free, start.double(), 0.0)
    goal = data * z
    residual = (goal - apply(z)) * free
    direction = inverse * residual
    product = (residual * direction).sum()
    # Metres of error that stay, against the size of the performer.
    enough = TOLERANCE**2 * (goal - data * middle).square().sum().clamp(min=1e-12)
    for _ in range(STEPS):
        if residual.square().sum() <= enough:
            break
        ahead = apply(direction) * free
        step = product / (direction * ahead).sum().clamp(min=1e-300)
        z = z + step * direction
        residual = residual - step * ahead
        scaled = inverse * residual
        product, before = (residual * scaled).sum(), product
        direction = scaled + product / before * direction
    return z.float()


WINDOW = 5
LEAST = 0.01
"""Share of the depth: differences below it are one surface."""
COMPANY = 0.35
"""Share of the known neighbourhood that must lie on a pixel's surface: a straight edge has half, a
line of pixels that floats along an edge a fifth."""


def without_floaters(
    depth: Tensor,  # [F, H, W] metres; not finite or <= 0 = unknown
    masks: Tensor,  # [F, H, W] 0..1
) -> Tensor:  # [F, H, W] metres; 0 = unknown or dropped
    """Drops pixels that have too little company at their depth: what floats between two surfaces."""
    cleaned = []
    for z, mask in zip(depth, masks, strict=True):
        known = (mask > 0.5) & z.isfinite() & (z > 0)
        values = F.pad(torch.where(known, z, torch.inf), (WINDOW // 2,) * 4, value=torch.inf)
        near = values.unfold(0, WINDOW, 1).unfold(1, WINDOW, 1).flatten(2)
        company = ((near - z[..., None]).abs() < LEAST * z[..., None]).sum(-1)
        lonely = company < COMPANY * near.isfinite().sum(-1)
        cleaned.append(torch.where(known & ~lonely, z, 0.0))
    return torch.stack(cleaned)
