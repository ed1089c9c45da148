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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .points import GRAZING_COSINE, edge_jump, normals_from_depth, unproject_depth
from .relief import box

STEPS, TOLERANCE = 300, 1e-3
"""A tolerance of 1e-3 leaves 0.02 mm, on average, on a performer of 512x512; 1e-4 takes twice as long."""
FAINT = 0.3
"""A normal shorter than this before it is brought to unit length says nothing."""
FARTHEST = 0.15
"""Share of the depth by which no normal moves a pixel: such normals contradict themselves."""
SMOOTHING = 1 / 6
"""Of the reach, over which the depth's own normals are smoothed: 2 pixels by default, where 1.5 to 3
did best on noise and on 6 to 8 bits."""
CONTRARY = -0.2
"""Correlation with the depth's normals below which an axis looks turned round."""
CHUNK_PIXELS = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Pixels solved for at once: what a cache holds, or what keeps a GPU busy; 100 bytes each."""
EVERY = 10
"""Steps of the solver between two looks at progress and the cancel button."""


class _Pairs(NamedTuple):
    """Neighbours p, q along one axis of the picture: how the objective weighs their depths."""

    at_p: Tensor
    """[F, ...] normal . ray(p), metres across the surface a metre of depth; 0 = not counted."""
    at_q: Tensor
    dim: int


def refine_depth(
    depth: Tensor,  # [F, H, W] metres; not finite or <= 0 = unknown
    normals: Tensor,  # [F, 3, H, W] camera axes (x right, y down, z away), towards the camera
    masks: Tensor,  # [F, H, W] 0..1
    K: Tensor,  # [3, 3] pixels
    reach: float = 12.0,  # pixels
    on_step: Callable[[int, int], None] | None = None,  # counts frames
) -> Tensor:  # [F, H, W] metres; 0 = unknown
    """The depth that agrees with the normals, frame by frame."""
    inside = masks > 0.5
    known = inside & depth.isfinite() & (depth > 0)
    refined = torch.zeros_like(depth, dtype=torch.float32)
    if not known.any():
        return refined
    rays = unproject_depth(torch.ones_like(depth[:1]), K)
    unit = unit_normals(normals)
    rows, columns = box(inside)  # nobody solves for background
    size = (rows.stop - rows.start) * (columns.stop - columns.start)
    step = max(1, CHUNK_PIXELS.get(depth.device.type, 1 << 18) // size)
    for f in range(0, len(depth), step):
        part = (slice(f, f + step), ..., rows, columns)
        refined[part] = _refine(
            depth[part].float(), unit[part], inside[part], known[part],
            rays[..., rows, columns], reach, float(K[0, 0]),
            (lambda f=f: on_step(f, len(depth))) if on_step else lambda: None,
        )  # fmt: skip
    if on_step:
        on_step(len(depth), len(depth))
    return refined


def smoothed_normals(
    depth: Tensor,  # [F, H, W] metres; not finite or <= 0 = unknown
    masks: Tensor,  # [F, H, W] 0..1
    K: Tensor,  # [3, 3] pixels
    reach: float,  # pixels, as `refine_depth` gets it
) -> Tensor:  # [F, 3, H, W] unit, towards the camera; 0 = unknown
    """The depth's own normals without its noise and steps, for where nothing better is given.

    A plane n . P = c has 1/z = (n / c) . ray, linear in the picture: the slopes of 1/z are averaged,
    which stairs of a few grey levels do not bend as they bend an average of normals. Small holes get
    the slopes around them.
    """
    sigma = SMOOTHING * reach
    inside = masks > 0.5
    known = inside & depth.isfinite() & (depth > 0)
    rays = unproject_depth(torch.ones_like(depth[:1]), K)
    points = rays * torch.where(known, depth, 0.0).float()[:, None]
    normals = normals_from_depth(points, known, float(K[0, 0]))
    across = (normals * rays).sum(1)
    weights = (known & (across.abs() > GRAZING_COSINE * rays.norm(dim=1))).float()
    slopes = torch.where(weights[:, None] > 0, (normals / (across * depth)[:, None])[:, :2], 0.0)
    share = _blur(weights[:, None], sigma)
    slopes = _blur(slopes, sigma) / share.clamp(min=1e-6)
    told = inside & (share[:, 0] > 1e-3)
    ties = [_first(told, dim) & _second(told, dim) for dim in (-1, -2)]
    z, told = _grown(torch.where(known, depth, 0.0).float(), known, ties, lambda: None)
    last = 1 / z.clamp(min=1e-6) - (slopes * rays[:, :2]).sum(1)
    return -F.normalize(torch.cat([slopes, last[:, None]], 1), dim=1) * told[:, None]


def decode_normals(
    pictures: Tensor,  # [F, 3, H, W] 0..1
    right: float,  # 1 = red grows to the right, -1 = to the left
    up: float,  # 1 = green grows upwards, -1 = downwards
) -> Tensor:  # [F, 3, H, W] camera axes: x right, y down, z away
    """Normal colours to vectors; mid grey (no normal) becomes a short one."""
    n = 2 * pictures - 1
    return n * n.new_tensor([right, -up, -1.0])[:, None, None]


def likelier_axes(
    given: Tensor,  # [F, 3, H, W] camera axes
    surface: Tensor,  # [F, 3, H, W] the depth's own
    inside: Tensor,  # [F, H, W] bool
) -> tuple[float, float, bool]:
    """By what to multiply right and up (1 or -1) to agree with the depth; whether most face away."""
    both = inside & (given.norm(dim=1) > FAINT) & (surface.norm(dim=1) > FAINT)
    if not both.any():
        return 1.0, 1.0, False
    a, b = (torch.stack([t[:, i][both] for i in range(3)]) for t in (given, surface))
    signs = [
        -1.0 if float(torch.corrcoef(torch.stack([a[i], b[i]]))[0, 1]) < CONTRARY else 1.0
        for i in (0, 1)
    ]
    return signs[0], signs[1], bool((a[2] > 0).float().mean() > 0.5)


def _blur(t: Tensor, sigma: float) -> Tensor:  # [F, C, H, W]
    half = max(1, round(2.5 * sigma))
    x = torch.arange(-half, half + 1, device=t.device, dtype=t.dtype)
    bell = torch.exp(-0.5 * (x / sigma) ** 2)
    bell = (bell / bell.sum()).expand(t.shape[1], 1, 1, -1)
    t = F.conv2d(t, bell, padding=(0, half), groups=t.shape[1])
    return F.conv2d(t, bell.mT, padding=(half, 0), groups=t.shape[1])


def unit_normals(normals: Tensor) -> Tensor:  # [F, 3, H, W]
    """Unit length; 0 where a normal is too faint, or not a number, to say anything."""
    normals = normals.float().nan_to_num(0, 0, 0)
    return F.normalize(normals, dim=1) * (normals.norm(dim=1, keepdim=True) > FAINT)


def _refine(
    depth: Tensor, normals: Tensor, inside: Tensor, known: Tensor, rays: Tensor, reach: float,
    focal: float, on_look: Callable[[], None],
) -> Tensor:  # fmt: skip
    told = [_told(normals, inside, dim) for dim in (-1, -2)]
    start, reached = _grown(torch.where(known, depth, 0.0), known, told, on_look)
    pairs = [_pairs(normals, t, start, rays, focal, d) for t, d in zip(told, (-1, -2), strict=True)]
    solved = _conjugate_gradients(start, known, reached, pairs, reach, on_look)
    sane = (solved - start).abs() < FARTHEST * start
    return torch.where(reached & sane, solved, torch.where(known, start, 0.0))


def _told(normals: Tensor, inside: Tensor, dim: int) -> Tensor:
    """Neighbours along an axis that both have a normal."""
    good = inside & (normals.norm(dim=1) > FAINT)
    return _first(good, dim) & _second(good, dim)


def _grown(
    depth: Tensor, known: Tensor, told: list[Tensor], on_look: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """Unknown pixels take the depth of the nearest known one that normals tie them to, so that those
    between two surfaces fall to one of them; what nothing ties to a depth stays unknown."""
    depth, reached = depth.clone(), known.clone()
    for _ in range(sum(known.shape[-2:])):
        on_look()
        before = reached.clone()
        for dim, tie in zip((-1, -2), told, strict=True):
            for take, give in ((_first, _second), (_second, _first)):
                new = tie & give(before, dim) & ~take(reached, dim)
                take(depth, dim)[new] = give(depth, dim)[new]
                take(reached, dim)[new] = True
        if torch.equal(before, reached):
            break
    return depth, reached


def _first(t: Tensor, dim: int) -> Tensor:
    return t.narrow(dim, 0, t.shape[dim] - 1)


def _second(t: Tensor, dim: int) -> Tensor:
    return t.narrow(dim, 1, t.shape[dim] - 1)


def _pairs(
    normals: Tensor,
    told: Tensor,
    start: Tensor,
    rays: Tensor,
    focal: float,
    dim: int,
) -> _Pairs:
    """How much neighbours along an axis count; not across depth jumps."""
    n = F.normalize(_first(normals, dim) + _second(normals, dim), dim=1)
    p, q = _first(start, dim), _second(start, dim)
    counts = told & ((q - p).abs() <= edge_jump(focal) * torch.minimum(p, q))
    at_p, at_q = ((n * r).sum(1) * counts for r in (_first(rays, dim), _second(rays, dim)))
    return _Pairs(at_p, at_q, dim)


def _conjugate_gradients(
    start: Tensor,  # [F, H, W] metres
    known: Tensor,  # [F, H, W] bool
    free: Tensor,  # [F, H, W] bool
    pairs: list[_Pairs],
    reach: float,
    on_look: Callable[[], None],
) -> Tensor:
    """What has to be added to the start, Jacobi-preconditioned; every frame with its own steps."""
    data, free = known.float(), free.float()

    def apply(z: Tensor) -> Tensor:
        out = data * z
        for at_p, at_q, dim in pairs:
            step = reach**2 * (at_q * _second(z, dim) - at_p * _first(z, dim))
            _second(out, dim).add_(at_q * step)
            _first(out, dim).sub_(at_p * step)
        return out.mul_(free)

    diagonal = data.clone()
    for at_p, at_q, dim in pairs:
        _second(diagonal, dim).add_(reach**2 * at_q.square())
        _first(diagonal, dim).add_(reach**2 * at_p.square())
    inverse = free / diagonal.clamp(min=1e-12)
    residual = data * start * free - apply(start * free)
    added = torch.zeros_like(start)
    direction = inverse * residual
    product = _dot(residual, direction)
    # Metres of error that stay, against the size of the performer.
    middle = (data * start).sum((1, 2)) / data.sum((1, 2)).clamp(min=1)
    size = (data * (start - middle[:, None, None])).square().sum((1, 2))
    enough = TOLERANCE**2 * size.clamp(min=1e-12)
    for round_ in range(STEPS):
        if round_ % EVERY == 0:
            on_look()
            if (_dot(residual, residual) <= enough).all():
                break
        ahead = apply(direction)
        step = product / _dot(direction, ahead).clamp(min=1e-30)
        added += step[:, None, None] * direction
        residual -= step[:, None, None] * ahead
        scaled = inverse * residual
        product, before = _dot(residual, scaled), product
        direction = scaled + (product / before.clamp(min=1e-30))[:, None, None] * direction
    return start + added


def _dot(a: Tensor, b: Tensor) -> Tensor:  # [F]
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1))
