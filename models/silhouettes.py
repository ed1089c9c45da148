"""Depth from masks: where there is no depth, the performer's outlines from all sides give its shape.

Stage: VIEWS with masks and rig -> metres in every view. Two steps, a frame at a time:

1. The visual hull. A place belongs to the performer when it lies within the mask of every camera
   that sees it. Places are voxels, coarse ones first and fine ones within;
   a voxel keeps the smallest mask value it meets, so that the surface at one half lies between
   voxels and not on their steps. The depth of a pixel is where its ray enters. A hole in one mask
   would cut a piece off: where rays of two or more masks end in nothing, one mask is overruled.
2. The hull is too fat: hollows show in no outline. So every pixel tries places behind the hull's
   surface and takes the one whose colours the neighbouring views repeat (plane sweep along the
   hull). Going deeper costs, and the more so the less the views agree anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import Rig
from .filters import read_at
from .relief import box, mask_from_plain_background
from .views import Views, as_pictures

OnStep = Callable[[int, int], None]

PLAIN = (0.005, 0.7)
"""Shares of a picture between which what differs from its border is taken for a performer."""
NEEDED = 3
"""Cameras that must see a performer: two outlines bound no shape along the line between them."""
COARSE, SPLIT = (8, 48), 4
"""Fewest and most coarse voxels across the searched cube, and fine ones across a coarse one: up to 192
across a cube of little more than the performer's height, about a centimetre."""
FINE = 0.7
"""Pixels that a fine voxel spans at least: masks know nothing finer."""
MARGIN = 1.1
"""Of the cube around what the masks show."""
FARTHEST = 2.0
"""Times what the median camera shows: a mask that failed and fills its picture enlarges no cube."""
SKIPS = 6
"""Coarse voxels that a ray passes at once where nothing is near."""
ROUNDS = 2
"""Pixels of the mask's rim that take the depth beside them where their rays just miss the hull."""
LOST = 2
"""Masks whose rays must end in nothing at a place before it is given back against another mask."""

DEEPER = (0.0, 0.01, 0.02, 0.03, 0.045, 0.06, 0.08, 0.1, 0.13, 0.17, 0.22)
"""Metres behind the hull that are tried: crotches and armpits lie to 0.2 m behind an outline's hull."""
NEIGHBOURS = 2
"""Views that a colour is looked for in; the better one counts, since the other may not see it."""
SIDEWAYS = -0.2
"""Cosine between two cameras' axes below which they share next to no surface (100 degrees)."""
PATCH = 3
"""Pixels across the patches that are compared: on true clips 3 did better than 5 or 7."""
OFF = 0.2
"""Colour difference beyond which a match is no worse: something else is seen there."""
EVEN = 0.75
"""How much the patch's mean colour counts beside its pattern: views differ in brightness."""
COST, COST_OF_NOISE = 0.2, 15.0
"""Colour difference that a metre deeper must win: always, and times the median difference of the
best matches. Where pictures shake or waver against each other, the second keeps the hull's word."""
STEADY = 5
"""Pixels across the median that takes out single pixels' choices."""


class _Hull(NamedTuple):
    """Mask values of a frame's voxels."""

    field: Tensor
    """[X, Y, Z] fine voxels, 0..1; the surface is at 0.5."""
    free: Tensor
    """[x, y, z] coarse voxels: how many around are empty in every direction, 0 = none."""
    corner: Tensor
    """[3] world, where the first voxel begins."""
    edge: float
    """Metres of a fine voxel."""


def masks_of_views(
    views: Views,
    on_step: OnStep | None = None,  # counts views
) -> Tensor | None:  # [V, F, H, W]
    """Their masks, or those of the plain background that generated views have; None = not plain."""
    if views.masks is not None:
        return views.masks
    masks = []
    for v in range(len(views)):
        masks.append(mask_from_plain_background(as_pictures(views, v)))
        if on_step:
            on_step(v + 1, len(views))
    plain = all(PLAIN[0] < float(m.mean()) < PLAIN[1] for m in masks)
    return torch.stack(masks).to(views.frames.device) if plain else None


def depth_from_silhouettes(
    masks: Tensor,  # [V, F, H, W] 0..1
    rig: Rig,
    on_step: OnStep | None = None,  # counts frames
) -> Tensor:  # [V, F, H, W] metres, 0 = nothing
    """Where the rays of every view's mask meet the performer's visual hull.

    Frames in which fewer than three masks show anyone stay empty.
    """
    V, count, H, W = masks.shape
    if V < NEEDED:
        raise ValueError(
            f"Outlines give a shape only from at least {NEEDED} cameras around the performer, but "
            f"'views' has {V}: connect more views, or depth from a depth node."
        )
    depth = torch.zeros(V, count, H, W, device=masks.device)
    for f in range(count):
        frame = masks[:, f].float().nan_to_num(0)
        shown = [v for v in range(V) if bool((frame[v] > 0.5).any())]
        if len(shown) >= NEEDED:
            depth[shown, f] = _hull_depth(frame[shown], rig.select(shown))
        if on_step:
            on_step(f + 1, count)
    return depth


def _hull_depth(masks: Tensor, rig: Rig) -> Tensor:  # [V, H, W] metres
    """One frame; all masks show somebody."""
    return _hull_and_depth(masks, rig)[1]


def _hull_and_depth(masks: Tensor, rig: Rig) -> tuple[_Hull | None, Tensor]:  # .., [V, H, W] metres
    inside = masks > 0.5
    hull = _carved(masks, rig)
    if hull is None:
        return None, torch.zeros_like(masks)
    depth = _filled(_marched(hull, masks, rig), inside)
    # Single pixels are the rim's.
    core = -F.max_pool2d(-(inside & (depth == 0)).float(), 3, 1, 1)
    lost = F.max_pool2d(core, 3, 1, 1)
    if int(lost.flatten(1).any(1).sum()) >= LOST:
        hull = _carved(masks, rig, lost)
        depth = _filled(_marched(hull, masks, rig), inside)
    return hull, depth


class HullSurface(NamedTuple):
    """The skin of a frame's visual hull."""

    points: Tensor
    """[n, 3] world, metres: about one a fine voxel."""
    normals: Tensor
    """[n, 3] outwards, of length 1."""
    depth: Tensor
    """[V, H, W] metres in every view, 0 = nothing."""


def hull_surface(
    masks: Tensor,  # [V, H, W] 0..1, one frame
    rig: Rig,
) -> HullSurface | None:
    """Where the field of the hull passes one half; None = no place lies within all masks. Two views
    are enough to be asked, but what they bound is wide."""
    masks = masks.float().nan_to_num(0)
    shown = [v for v in range(len(rig)) if bool((masks[v] > 0.5).any())]
    if len(shown) < 2:
        return None
    hull, depth = _hull_and_depth(masks[shown], rig.select(shown))
    if hull is None:
        return None
    padded = F.pad(hull.field, [1] * 6)
    inside = padded > 0.5
    buried = -F.max_pool3d(-inside.float()[None, None], 3, 1, 1)[0, 0] > 0
    cells = (inside & ~buried).nonzero()
    smooth = F.avg_pool3d(F.avg_pool3d(padded[None, None], 3, 1, 1), 3, 1, 1)[0, 0]
    slopes = torch.stack(torch.gradient(smooth), -1)[cells.unbind(1)]
    normals = -F.normalize(slopes, dim=1)
    points = hull.corner + (cells - 1 + 0.5) * hull.edge
    everywhere = torch.zeros_like(masks)
    everywhere[shown] = depth
    known = normals.norm(dim=1) > 0.5
    return HullSurface(points[known], normals[known], everywhere)


# ---------------------------------------------------------------- the hull


def _pixels(
    points: Tensor,  # [N, 3] world
    rig: Rig,
    v: int,
) -> tuple[Tensor, Tensor]:  # [N, 2], [N]
    """Where a camera sees world points, and how far before it they are."""
    T, K = rig.T_camera_world[v].to(points), rig.K[v].to(points)
    ahead = points @ T[:3, :3].mT + T[:3, 3]
    far = ahead[:, 2]
    return (ahead @ K.mT)[:, :2] / far.clamp(min=1e-6)[:, None], far


def _cube(masks: Tensor, rig: Rig) -> tuple[Tensor, float]:  # [3] world, metres
    """The middle of the performer, and how far it reaches from there."""
    normal, side = torch.zeros(3, 3), torch.zeros(3)
    rays, spreads = [], []
    for v in range(len(rig)):
        y, x = (masks[v] > 0.5).nonzero().cpu().unbind(1)
        places = torch.stack([x, y], 1) + 0.5
        middle = places.median(0).values
        focal = rig.K[v].diagonal()[:2].cpu()
        ray = torch.cat([(middle - rig.K[v, :2, 2].cpu()) / focal, torch.ones(1)])
        ray = F.normalize(rig.T_camera_world[v, :3, :3].mT.cpu() @ ray, dim=0)
        off = torch.eye(3) - ray[:, None] * ray
        normal, side = normal + off, side + off @ rig.centers[v].cpu()
        rays.append(ray)
        spreads.append(float(((places - middle) / focal).norm(dim=1).amax()))
    # The point nearest to all rays; parallel cameras leave its distance open, so damped a little.
    middle = torch.linalg.solve(normal + 1e-6 * torch.eye(3), side)
    far = (middle - rig.centers.cpu()).norm(dim=1)
    reaches = (torch.tensor(spreads) * far).sort().values
    return middle, MARGIN * float(reaches[-1].clamp(max=FARTHEST * reaches[len(reaches) // 2]))


def _agreed(
    points: Tensor,  # [N, 3] world
    masks: Tensor,  # [V, H, W]
    rig: Rig,
    lost: Tensor | None = None,  # [V, H, W] 0 or 1, rays that end in nothing
) -> Tensor:  # [N] 0..1
    """The smallest mask value at each point; where rays are lost, the second smallest.

    Places that fewer than three cameras see are empty; of two cameras, those that not both see.
    """
    least, second = torch.ones(2, len(points), device=points.device)
    seen, missed = torch.zeros(2, len(points), device=points.device)
    for v in range(len(rig)):
        pixels, far = _pixels(points, rig, v)
        inside = (far > 0) & (pixels >= 0).all(1)
        inside &= (pixels[:, 0] <= rig.width) & (pixels[:, 1] <= rig.height)
        seen += inside
        value = torch.where(inside, read_at(masks[v, None], pixels)[:, 0], 1.0)
        least, value = torch.minimum(least, value), torch.maximum(least, value)
        if lost is not None:
            second = torch.minimum(second, value)
            missed += inside & (read_at(lost[v, None], pixels)[:, 0] > 0)
    value = torch.where(missed >= LOST, second, least)
    return torch.where(seen >= min(NEEDED, len(rig)), value, 0.0)


def _centres(cells: Tensor, corner: Tensor, edge: float) -> Tensor:  # [N, 3] int -> world
    return corner + (cells + 0.5) * edge


def _carved(
    masks: Tensor,  # [V, H, W]
    rig: Rig,
    lost: Tensor | None = None,  # [V, H, W] 0 or 1
) -> _Hull | None:
    """The hull of one frame; None = no place lies within all masks."""
    middle, reach = _cube(masks, rig)
    device = masks.device
    far = (rig.centers.cpu() - middle).norm(dim=1)
    focal = rig.K.diagonal(dim1=1, dim2=2)[:, :2].amax(1).cpu()
    finest = 2 * reach / (SPLIT * FINE * float((far / focal).amin()))
    across = min(max(math.ceil(finest), COARSE[0]), COARSE[1])
    wide = 2 * reach / across
    corner = middle.to(device) - reach
    axis = torch.arange(across, device=device)
    cells = torch.cartesian_prod(axis, axis, axis)
    # Masks grown by the half diagonal of the nearest coarse voxel: what its middle then misses, all
    # of it misses.
    nearest = (far - reach).clamp(min=0.1 * far)
    grow = (0.87 * wide * focal / nearest).ceil() + 1
    near = [_grown(pictures, grow.int().tolist()) for pictures in (masks, lost)]
    kept = cells[_agreed(_centres(cells, corner, wide), near[0], rig, near[1]) > 0.5]
    if not len(kept):
        return None
    # A coarse voxel of air around, so that rays enter from outside.
    low, high = kept.amin(0) - 1, kept.amax(0) + 2
    shape = (high - low).tolist()
    kept, corner, edge = kept - low, corner + low * wide, wide / SPLIT
    within = torch.arange(SPLIT, device=device)
    fine = (kept[:, None] * SPLIT + torch.cartesian_prod(within, within, within)).flatten(0, 1)
    field = torch.zeros([n * SPLIT for n in shape], device=device)
    field[fine.unbind(1)] = _agreed(_centres(fine, corner, edge), masks, rig, lost)
    near = torch.zeros(shape, device=device)
    near[kept.unbind(1)] = 1
    free = torch.zeros(shape, device=device)
    for _ in range(SKIPS):
        free += near == 0
        near = F.max_pool3d(near[None, None], 3, 1, 1)[0, 0]
    return _Hull(field, free, corner, edge)


def _grown(pictures: Tensor | None, by: list[int]) -> Tensor | None:  # [V, H, W]
    """Every view's bright parts, grown by so many pixels."""
    if pictures is None:
        return None
    grown = []
    for picture, n in zip(pictures[:, None], by, strict=True):
        across = F.max_pool2d(picture, (1, 2 * n + 1), 1, (0, n))
        grown.append(F.max_pool2d(across, (2 * n + 1, 1), 1, (n, 0))[0])
    return torch.stack(grown)


# ---------------------------------------------------------------- rays


def _rays(inside: Tensor, rig: Rig) -> tuple[Tensor, Tensor, Tensor]:
    """Of all pixels inside, view after view: where the camera stands, the way per metre of depth
    (both [N, 3], world), and the pixels [N, 3] as view, row, column."""
    places = inside.nonzero()
    v, y, x = places.unbind(1)
    K, T = rig.K.to(inside.device), rig.T_camera_world.to(inside.device)
    pixels = torch.stack([x + 0.5, y + 0.5, torch.ones_like(x)], 1)
    inverse = torch.linalg.inv(K)
    to_world = T[:, :3, :3].mT @ inverse
    ways = torch.empty_like(pixels)
    for view, matrix in enumerate(to_world):
        ways[v == view] = pixels[v == view] @ matrix.mT
    return rig.centers.to(inside.device)[v], ways, places


def _within(hull: _Hull, points: Tensor) -> Tensor:  # [N]
    """The field between voxels, trilinear."""
    size = hull.edge * points.new_tensor(hull.field.shape)
    grid = 2 * (points - hull.corner) / size - 1
    # grid_sample's last axis is named first.
    return F.grid_sample(
        hull.field[None, None], grid.flip(1)[None, None, None], align_corners=False
    ).flatten()


def _marched(hull: _Hull, masks: Tensor, rig: Rig) -> Tensor:  # [V, H, W] metres, 0 = missed
    """The depth at which the ray of every pixel of the masks enters the hull."""
    eyes, ways, places = _rays(masks > 0.5, rig)
    size = hull.edge * eyes.new_tensor(hull.field.shape)
    ends = torch.stack([hull.corner - eyes, hull.corner + size - eyes]) / ways
    near, far = ends.amin(0).amax(1).clamp(min=1e-3), ends.amax(0).amin(1)
    step = hull.edge / ways.norm(dim=1)  # metres of depth that take a ray one voxel on
    depth = torch.zeros_like(near)
    coarse = torch.tensor(hull.free.shape, device=near.device)
    before = torch.zeros_like(near)  # the field one step ago
    alive = (near < far).nonzero()[:, 0]
    at = near.clone()
    while len(alive):
        t = at[alive]
        points = eyes[alive] + t[:, None] * ways[alive]
        cells = ((points - hull.corner) / (hull.edge * SPLIT)).long()
        cells = torch.minimum(cells.clamp(min=0), coarse - 1)
        free = hull.free[cells.unbind(1)]
        value = torch.zeros_like(t)
        close = (free == 0).nonzero()[:, 0]
        value[close] = _within(hull, points[close])
        hit = value > 0.5
        # Between this step and the one before, where a straight line passes one half.
        share = (value - 0.5) / (value - before[alive]).clamp(min=1e-6)
        depth[alive[hit]] = (t - share.clamp(0, 1) * step[alive])[hit]
        before[alive] = value
        # n empty voxels in every direction: n of them are passed without touching anything.
        at[alive] = t + step[alive] * torch.where(free > 0, free * SPLIT - 1, 1).clamp(min=1)
        alive = alive[~hit & (at[alive] < far[alive])]
    result = torch.zeros_like(masks)
    result[places.unbind(1)] = depth
    return result


def _filled(depth: Tensor, inside: Tensor) -> Tensor:  # [V, H, W]
    """Pixels inside without depth take the mean of those beside them."""
    depth = depth[:, None]
    for _ in range(ROUNDS):
        known = (depth > 0).float()
        share = F.avg_pool2d(known, 3, 1, 1)
        mean = F.avg_pool2d(depth, 3, 1, 1) / share.clamp(min=1e-6)
        depth = torch.where((known == 0) & (share > 0) & inside[:, None], mean, depth)
    return depth[:, 0]


def shown_at(
    pixels: Tensor,  # [..., 2] of view v
    depth: Tensor,  # [...] metres; may have more dimensions in front
    rig: Rig,
    v: int,
    n: int,
) -> tuple[Tensor, Tensor]:  # [..., 2], [...]
    """Where view n shows what view v shows at these pixels, and how far before it that is."""
    K, T = rig.K.to(depth), rig.T_camera_world.to(depth)
    between = T[n] @ torch.linalg.inv(T[v])
    pixels = torch.cat([pixels, torch.ones_like(pixels[..., :1])], -1)
    across = pixels @ (K[n] @ between[:3, :3] @ torch.linalg.inv(K[v])).mT
    ahead = depth[..., None] * across + K[n] @ between[:3, 3]
    return ahead[..., :2] / ahead[..., 2:].clamp(min=1e-3), ahead[..., 2]


# ---------------------------------------------------------------- colour


def refine_depth_by_colour(
    frames: Tensor,  # [V, F, 3, H, W] 0..1, or bytes
    depth: Tensor,  # [V, F, H, W] metres, 0 = nothing; of a visual hull: never behind the surface
    rig: Rig,
    on_step: OnStep | None = None,  # counts frames
) -> Tensor:  # [V, F, H, W]
    """The depth behind the hull's at which neighbouring views repeat each pixel's colours."""
    refined = depth.clone()
    axes = rig.T_camera_world[:, 2, :3]
    alike = axes @ axes.mT - 3 * torch.eye(len(rig)).to(axes)  # itself last
    count = depth.shape[1]
    for f in range(count):
        pictures = frames[:, f].float().nan_to_num(0) / (255 if frames.dtype == torch.uint8 else 1)
        for v in range(len(rig)):
            near = alike[v].topk(min(NEIGHBOURS, len(rig) - 1))
            near = near.indices[near.values > SIDEWAYS].tolist()
            if near and (depth[v, f] > 0).any():
                refined[v, f] = _swept(pictures, depth[:, f], rig, v, near)
        if on_step:
            on_step(f + 1, count)
    return refined


def _swept(
    pictures: Tensor,  # [V, 3, H, W]
    depth: Tensor,  # [V, H, W]
    rig: Rig,
    v: int,
    near: list[int],
) -> Tensor:  # [H, W]
    """One view of one frame: every pixel's best place behind the hull."""
    inside = depth[v] > 0
    rows, columns = box(inside[None])
    inside, start = inside[rows, columns], depth[v, rows, columns]
    deeper = start.new_tensor(DEEPER)
    own = pictures[v, :, rows, columns]
    places = start + deeper[:, None, None]
    costs = torch.stack(
        [
            _difference(own, inside, *_warped(pictures, depth, rig, v, n, places, (rows, columns)))
            for n in near
        ]
    ).amin(0)  # [K, h, w]
    noise = costs.amin(0)[inside].median()
    costs += (COST + COST_OF_NOISE * noise) * deeper[:, None, None]
    chosen = torch.where(inside, deeper[costs.argmin(0)], 0.0)
    result = depth[v].clone()
    result[rows, columns] = torch.where(inside, start + _steadied(chosen, inside), 0.0)
    return result


def _warped(
    pictures: Tensor,
    depth: Tensor,
    rig: Rig,
    v: int,
    n: int,
    places: Tensor,  # [K, h, w] metres in view v
    window: tuple[slice, slice],  # of view v
) -> tuple[Tensor, Tensor]:  # [K, 3, h, w], [K, h, w] bool
    """The colours that view n shows at these places, and whether it shows the performer there."""
    H, W = depth.shape[-2:]
    rows, columns = window
    y = torch.arange(H, device=depth.device)[rows] + 0.5
    x = torch.arange(W, device=depth.device)[columns] + 0.5
    pixels = torch.stack(torch.meshgrid(x, y, indexing="xy"), 2)  # [h, w, 2]
    pixels, far = shown_at(pixels, places, rig, v, n)
    grid = (pixels * pixels.new_tensor([2 / W, 2 / H]) - 1).view(1, -1, places.shape[-1], 2)
    colours = F.grid_sample(pictures[n, None], grid, padding_mode="border", align_corners=False)
    shown = F.grid_sample(depth[n, None, None], grid, mode="nearest", align_corners=False) > 0
    colours = colours.view(3, *places.shape).transpose(0, 1)
    return colours, shown.view_as(places) & (far > 0)


def _difference(
    own: Tensor,  # [3, h, w]
    inside: Tensor,  # [h, w] bool
    colours: Tensor,  # [K, 3, h, w]
    shown: Tensor,  # [K, h, w] bool
) -> Tensor:  # [K, h, w]
    """How much the patches around each pixel differ in pattern and in mean colour."""
    both = inside & shown[0]
    if both.any():
        colours = _toned(colours, colours[0][:, both], own[:, both])
    here, there = _patch_mean(own[None], inside), _patch_mean(colours, inside)
    pattern = ((own - here) - (colours - there)).abs().mean(1)
    cost = (pattern + EVEN * (here - there).abs().mean(1)).clamp(max=OFF)
    return _patch_mean(torch.where(shown, cost, OFF)[:, None], inside)[:, 0]


def _toned(
    colours: Tensor,  # [K, 3, h, w]
    theirs: Tensor,  # [3, N]
    ours: Tensor,  # [3, N]
) -> Tensor:
    """Colours with our brightness and contrast: those of a view as a whole tell nothing of depth."""
    middle, wanted = theirs.median(1).values[:, None], ours.median(1).values[:, None]
    spread, other = ((c - m).abs().mean(1) for c, m in ((theirs, middle), (ours, wanted)))
    gain = ((other + 0.01) / (spread + 0.01)).clamp(0.5, 2)
    return (colours - middle[:, None]) * gain[:, None, None] + wanted[:, None]


def _patch_mean(values: Tensor, inside: Tensor) -> Tensor:  # [N, C, h, w], [h, w]
    """Over the pixels of the patch that lie inside."""
    inside = inside.float()[None, None]
    share = F.avg_pool2d(inside, PATCH, 1, PATCH // 2)
    return F.avg_pool2d(values * inside, PATCH, 1, PATCH // 2) / share.clamp(min=1e-6)


def _steadied(chosen: Tensor, inside: Tensor) -> Tensor:  # [h, w]
    """Median over the pixels inside, then a small mean."""
    known = torch.where(inside, chosen, torch.nan)[None, None]
    around = F.unfold(F.pad(known, [STEADY // 2] * 4, value=torch.nan), STEADY)[0]
    middle = around.nanmedian(0).values.view_as(chosen).nan_to_num(0)
    return _patch_mean(middle[None, None], inside)[0, 0]


BEHIND = 2.0
"""Pixels' widths that a place of the hull may lie behind its surface in a view and still be seen."""


def shown_colors(
    surface: HullSurface,
    pictures: Tensor,  # [V, 3, H, W] 0..1
    masks: Tensor,  # [V, H, W] 0..1
    rig: Rig,
) -> Tensor:  # [n, 3] 0..1
    """What the views show at the hull's places; those that look straight at one count most. Grey
    where none does."""
    n = len(surface.points)
    sums, total = surface.points.new_zeros(n, 3), surface.points.new_full((n, 1), 1e-6)
    for v in range(len(rig)):
        pixels, far = _pixels(surface.points, rig, v)
        value = read_at(torch.cat([pictures[v], masks[v, None], surface.depth[v, None]]), pixels)
        inside = (pixels >= 0).all(1) & (pixels[:, 0] <= rig.width) & (pixels[:, 1] <= rig.height)
        behind = BEHIND * far / rig.K[v, 0, 0].to(far)
        seen = inside & (far > 0) & (value[:, 3] > 0.9) & (far < value[:, 4] + behind)
        towards = F.normalize(rig.centers[v].to(surface.points) - surface.points, dim=1)
        facing = (towards * surface.normals).sum(1).clamp(min=0).square()
        weight = (facing * seen)[:, None]
        sums += weight * value[:, :3]
        total += weight
    return torch.where(total > 1e-4, sums / total, 0.5)
