"""How noisy every view is: the part of its pictures that no other view repeats.

Stage: VIEWS -> a variance per view, for weights (MVAnimate, proposition IV.1: views that err
independently are fused best with weights inverse to the variance of their noise).

Across views: where two views see the same place of the performer (depth from the outlines), the
squared difference of their colours is fitted by

    r^2 = s^2 + d^2 g^2,    g = slope of the picture,

so that s^2 is noise, blotches, a colour cast, and d (pixels) how far things are misplaced; real
texture is in g and counts as neither. A pair's variance is the sum of its two views', solved for by
least squares in which small sums count most, so that one bad view doesn't make its neighbours bad.

Without masks, rig or shared surface, over time: second differences in flat parts. It can't tell
motion from flicker, but motion is about the same in all views.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import Rig
from .silhouettes import NEEDED, depth_from_silhouettes, shown_at
from .views import Views

OnStep = Callable[[int, int], None]

MOMENTS = 5
"""Frames that are compared across views, evenly spaced."""
NEIGHBOURS, SIDEWAYS = 4, -0.2
"""Views that a view is compared with: rings need odd circles, so more than the two beside it; and the
cosine between axes below which two share next to no surface."""
SAME = 0.02
"""Metres within which two views' depths are the same place: on true clips, noise of 5 to 20 grey
levels came out right to one or two with it."""
RIM = 2
"""Pixels of the mask's edge that mix with the background."""
ENOUGH, BINS = 200, 8
"""Places a pair must share, and classes of slope in which their differences are averaged."""
CHI3 = 0.789 * 3
"""Median of the squared length of three independent normal numbers."""
PLACED = 0.7
"""Pixels of misplacement between two views that outlines' depth and nearest pixels make by
themselves. Higher, wavering views pass for clean; lower, clean ones for wavering."""
FLOOR = (2 / 255) ** 2
"""Variance that a clean view has too: rounding, shading, and what the estimate is off by."""
POWER = 2
"""Of a sum of two variances, by which it counts less: 0 and 1 let one bad pair make its views bad."""
ROUNDS = 100
"""Of the solver; 30 were enough for a ring of eight."""
FLAT = 0.3
"""Share of the flattest pixels that are compared over time."""


def noise_of_views(
    views: Views,  # colour; with masks and rig where they are known
    on_step: OnStep | None = None,  # counts frames
) -> tuple[Tensor, bool]:  # [V] variance of a channel, 0..1 squared; across views?
    """The variance of every view's noise, and whether views were compared with each other."""
    found = None
    if views.masks is not None and views.rig is not None and len(views) >= NEEDED:
        found = _across_views(views, on_step)
    if found is not None:
        return found, True
    if views.frames.shape[1] < 3:
        raise ValueError(
            f"'by noise' can't compare these {len(views)} views with each other, and "
            f"{views.frames.shape[1]} frames are too few to compare over time: connect at least 3 "
            "views with masks that overlap, or at least 3 frames."
        )
    return _over_time(views) + FLOOR, False


def _pictures(views: Views, v: int, frames: list[int] | slice) -> Tensor:  # [F, 3, H, W] 0..1
    chosen = views.frames[v, frames].float().nan_to_num(0)
    return chosen / 255 if views.frames.dtype == torch.uint8 else chosen


def _core(masks: Tensor, rim: int) -> Tensor:  # [F, H, W] bool
    """The mask without its edge."""
    return F.max_pool2d(-masks.float()[:, None], 2 * rim + 1, 1, rim)[:, 0] < -0.5


def _slope(pictures: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, H, W]
    """Mean over the channels of the squared gradient, per pixel, of the slightly blurred picture."""
    soft = F.pad(
        F.avg_pool2d(pictures, 3, 1, 1, count_include_pad=False), (1, 1, 1, 1), "replicate"
    )
    across = (soft[..., 1:-1, 2:] - soft[..., 1:-1, :-2]) / 2
    down = (soft[..., 2:, 1:-1] - soft[..., :-2, 1:-1]) / 2
    return (across.square() + down.square()).mean(1)


# ---------------------------------------------------------------- across views


def _across_views(views: Views, on_step: OnStep | None) -> Tensor | None:  # [V]
    """None = some view shares too little with others."""
    V, count = views.frames.shape[:2]
    frames = torch.linspace(0, count - 1, min(MOMENTS, count)).round().long().tolist()
    masks = views.masks[:, frames]
    depth = depth_from_silhouettes(masks, views.rig, on_step)
    pictures = torch.stack([_pictures(views, v, frames) for v in range(V)])
    slopes = torch.stack([_slope(p) for p in pictures])
    core = torch.stack([_core(m, RIM) for m in masks]) & (depth > 0)
    axes = views.rig.T_camera_world[:, 2, :3]
    alike = (axes @ axes.mT).cpu() - 3 * torch.eye(V)
    pairs, sums = [], []
    for v in range(V):
        near = alike[v].topk(min(NEIGHBOURS, V - 1))
        for n in near.indices[near.values > SIDEWAYS].tolist():
            squares, steep = _differences(pictures, slopes, depth, core, views.rig, v, n)
            if len(squares) >= ENOUGH:
                pairs.append((v, n))
                sums.append(_fitted(squares, steep))
    if len({v for pair in pairs for v in pair}) < V:
        return None
    level, misplaced = torch.stack(sums).unbind(1)
    # Misplacement costs what it does on the texture of all views, so plain clothes gain nothing.
    texture = torch.stack([s[c].mean() for s, c in zip(slopes, core, strict=True)]).nanmedian()
    return _solved(pairs, level + (misplaced - PLACED**2).clamp(min=0) * texture, V)


def _differences(
    pictures: Tensor,  # [V, F, 3, H, W]
    slopes: Tensor,  # [V, F, H, W]
    depth: Tensor,  # [V, F, H, W]
    core: Tensor,  # [V, F, H, W] bool
    rig: Rig,
    v: int,
    n: int,
) -> tuple[Tensor, Tensor]:  # both [N]
    """Squared colour differences (all channels) and slopes at the places that two views share."""
    squares, steep = [], []
    H, W = depth.shape[-2:]
    for f in range(depth.shape[1]):
        y, x = core[v, f].nonzero().unbind(1)
        pixels, far = shown_at(torch.stack([x, y], 1) + 0.5, depth[v, f, y, x], rig, v, n)
        # The nearest pixel, since a mean of four would take three quarters of the noise away.
        column, row = pixels.floor().long().unbind(1)
        same = (far > 0) & (column >= 0) & (column < W) & (row >= 0) & (row < H)
        x, y, column, row, far = (t[same] for t in (x, y, column, row, far))
        same = core[n, f, row, column] & ((depth[n, f, row, column] - far).abs() < SAME)
        here, there = (y[same], x[same]), (row[same], column[same])
        off = pictures[v, f][:, *here] - pictures[n, f][:, *there]
        squares.append(off.square().sum(0))
        steep.append((slopes[v, f][here] + slopes[n, f][there]) / 2)
    return torch.cat(squares), torch.cat(steep)


def _fitted(squares: Tensor, steep: Tensor) -> Tensor:  # [N], [N] -> [2]
    """s^2 and d^2 of r^2 = s^2 + d^2 g^2, a channel; neither below 0."""
    parts = steep.argsort().chunk(BINS)
    y = torch.stack([squares[p].median() for p in parts]) / CHI3
    x = torch.stack([steep[p].median() for p in parts])
    weight = (y + 1e-6) ** -2  # medians err in proportion to themselves
    mean_x, mean_y = (weight * x).sum() / weight.sum(), (weight * y).sum() / weight.sum()
    spread = (weight * (x - mean_x).square()).sum().clamp(min=1e-20)
    misplaced = (weight * (x - mean_x) * (y - mean_y)).sum() / spread
    if misplaced < 0:
        return torch.stack([mean_y, torch.zeros_like(mean_y)])
    level = mean_y - misplaced * mean_x
    if level < 0:
        steepest = (weight * x * y).sum() / (weight * x * x).sum().clamp(min=1e-20)
        return torch.stack([torch.zeros_like(level), steepest])
    return torch.stack([level, misplaced])


def _solved(pairs: list[tuple[int, int]], sums: Tensor, views: int) -> Tensor:  # [V]
    """What each view adds to the sums of its pairs, by least squares; at least FLOOR.

    Sums err in proportion to themselves, so a small one, which clears both views, counts more.
    """
    of_pairs = (sums + 2 * FLOOR).tolist()
    mine = [
        [
            (a + b - v, s, s**-POWER)
            for (a, b), s in zip(pairs, of_pairs, strict=True)
            if v in (a, b)
        ]
        for v in range(views)
    ]
    found = [min(s for _, s, _ in rows) / 2 for rows in mine]
    for _ in range(ROUNDS):
        for v in range(views):
            left = sum(w * (s - found[other]) for other, s, w in mine[v])
            found[v] = max(FLOOR, left / sum(w for *_, w in mine[v]))
    return torch.tensor(found)


# ---------------------------------------------------------------- over time


def _over_time(views: Views) -> Tensor:  # [V]
    """The part of flat places that differs from the mean of the frames before and after."""
    return torch.stack([_flicker(views, v) for v in range(len(views))])


def _flicker(views: Views, v: int) -> Tensor:
    pictures = _pictures(views, v, slice(None))
    # Steep places near by, in any of the three frames, may come by.
    steep = F.max_pool2d(_slope(F.avg_pool2d(pictures, 3, 1, 1))[:, None], 5, 1, 2)[:, 0]
    steep = torch.stack([steep[:-2], steep[1:-1], steep[2:]]).amax(0)
    inside = torch.ones_like(steep, dtype=torch.bool)
    if views.masks is not None:
        core = _core(views.masks[v], RIM)
        inside = core[:-2] & core[1:-1] & core[2:]
    if not inside.any():
        return steep.new_zeros(())
    off = pictures[1:-1] - (pictures[:-2] + pictures[2:]) / 2  # 1.5 times the variance
    chosen = steep[inside].argsort()[: max(1, int(FLAT * inside.sum()))]
    return off.square().sum(1)[inside][chosen].median() / CHI3 / 1.5
