"""What MV-Opt compares with what: places of two pictures that show the same piece of surface.

Stage: views, depth and rig -> pairs of places. Three kinds: the same moment in two views, found
through depth and rig (co-visible surface only); two neighbouring moments of one view, found by
optical flow; and how places speed up over three moments, against what all views together say.

Frames: places in pixels of the working window, pixel centres at +0.5; world as in cameras.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .cameras import Rig
from .filters import gaussian, grown, read_at
from .metrics import DEPTH_TOLERANCE, corresponding
from .points import unproject_depth

CELL = 32
"""Pixels a side of the cells over which colours are averaged before they are compared: finer
differences are texture that lies a little beside itself, which no colour correction should mend."""
STEADY_CELL = 48
"""The same over time, where flow is rough and a body turns in the light."""
FEWEST = 40
"""Places that two pictures must share to be compared."""
MOST = 600
"""Places a pair of pictures that are looked at; drawn at random, with a fixed seed."""
RETURNED = 1.0
"""Pixels by which flow there and back may miss the place where it began."""
GRID = 0.25
"""Metres between the nodes of the field of accelerations."""


@dataclass(frozen=True)
class Link:
    """N places of one picture and the same surface in another."""

    here: tuple[int, int]
    """View and frame."""
    there: tuple[int, int]
    places_here: Tensor
    """[N, 2] pixels."""
    places_there: Tensor
    cells: Tensor
    """[N] which cell of the picture `here` a place lies in, numbered from 0."""
    counts: Tensor
    """[C] places in every cell."""
    share: float
    """How many places each of these stands for."""
    over_time: bool


@dataclass(frozen=True)
class Bend:
    """How M places of one view speed up around frame `frame`, beyond what all views agree on."""

    view: int
    frame: int
    places: tuple[Tensor, Tensor, Tensor]
    """[M, 2] pixels one frame before, now, one frame after."""
    excess: Tensor
    """[M, 2] pixels a frame²."""


def _link(here, there, p: Tensor, q: Tensor, width: int, over_time: bool, seed: int) -> Link | None:
    if len(p) < FEWEST:
        return None
    share = max(1.0, len(p) / MOST)
    if len(p) > MOST:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(p), generator=generator)[:MOST].to(p.device)
        p, q = p[chosen], q[chosen]
    cell = STEADY_CELL if over_time else CELL
    number = (p[:, 1] / cell).long() * -(-width // cell) + (p[:, 0] / cell).long()
    _, cells, counts = number.unique(return_inverse=True, return_counts=True)
    return Link(here, there, p, q, cells, counts.to(p), share, over_time)


def across_views(
    depth: Tensor,  # [V, F, H, W] metres, 0 = nothing
    rig: Rig,
    chunk: int = 16,  # frames at a time: some 100 bytes a pixel; the same links with any
    tick: Callable[[], None] | None = None,  # called now and then: may raise to stop
) -> list[Link]:
    """Co-visible surface of every two views at every moment.

    Both must see it at their nearest surface, so nothing hidden is compared (the paper compares
    whole pictures, L_mvS)."""
    V, count = depth.shape[:2]
    links = []
    for v in range(V):
        for w in range(v + 1, V):
            pair = rig.select([v, w])
            for some in torch.arange(count).split(chunk):
                if tick:
                    tick()
                x, y, both = corresponding(depth[v, some], depth[w, some], pair, DEPTH_TOLERANCE)
                for n, f in enumerate(some.tolist()):
                    rows, columns = both[n].nonzero().unbind(1)
                    p = torch.stack([columns, rows], -1) + 0.5
                    q = torch.stack([x[n][rows, columns], y[n][rows, columns]], -1)
                    seed = (f * V + v) * V + w
                    links.append(_link((v, f), (w, f), p, q, rig.width, False, seed))
    return [link for link in links if link]


def _places(inside: Tensor) -> Tensor:  # [h, w] bool -> [N, 2]
    rows, columns = inside.nonzero().unbind(1)
    return torch.stack([columns, rows], -1) + 0.5


def over_time(there: Tensor, back: Tensor, masks: Tensor, view: int) -> list[Link]:
    """Neighbouring frames of one view; masks [F, h, w] bool."""
    links = []
    for f in range(len(there)):
        p = _places(masks[f])
        step = read_at(there[f], p)
        q = p + step
        kept = (step + read_at(back[f], q)).norm(dim=1) < RETURNED
        kept &= read_at(masks[f + 1][None].to(p), q)[:, 0] > 0.5
        width = masks.shape[-1]
        links.append(_link((view, f), (view, f + 1), p[kept], q[kept], width, True, f))
    return [link for link in links if link]


# --- how far colours are off ----------------------------------------------------------------------

FLOOR = 0.1
"""Added to colours before their ratio is taken: black has no colour."""


USUAL_CASTS = 2.3
"""Times the links' typical disagreement: geometry errs in the same way in many links of a view."""


def casts_of(pictures: Tensor, links: list[Link]) -> Tensor:  # [V, F, 3, h, w] -> [V]
    """Standard deviation of the factors by which every view's colours are off over the clip.

    One factor a picture and channel (as logarithms) by least squares from the ratios of linked
    places' mean colours, robustly; then less what the links' own disagreement would give as well
    (James and Stein's shrinkage): light and geometry make ratios differ without any fault."""
    V, count = pictures.shape[:2]
    if not links:
        return pictures.new_zeros(V)
    ends = torch.tensor([[v * count + f for v, f in (k.here, k.there)] for k in links])
    ratios = torch.stack(
        [
            (read_at(pictures[k.here], k.places_here).mean(0) + FLOOR).log()
            - (read_at(pictures[k.there], k.places_there).mean(0) + FLOOR).log()
            for k in links
        ]
    ).double()
    D = ratios.new_zeros(len(links), V * count)
    row = torch.arange(len(links), device=D.device)
    D[row, ends[:, 0]], D[row, ends[:, 1]] = 1, -1
    weight = torch.ones_like(ratios[:, :1])
    ridge = 1e-2 * torch.eye(V * count, device=D.device, dtype=D.dtype)
    for _ in range(4):
        factors = torch.linalg.solve(D.T @ (weight * D) + ridge, D.T @ (weight * ratios))
        left = D @ factors - ratios
        size = 1.48 * left.abs().median().clamp(min=1e-4)
        weight = 1 / (1 + (left / (3 * size)).square().mean(1, keepdim=True))
    factors = factors.view(V, count, 3)
    factors = factors - factors[0].mean(0)
    found = factors.square().mean((1, 2))
    views = ends // count
    own = torch.stack(
        [
            left[(views == v).any(1)].abs().flatten().median() if (views == v).any() else size
            for v in range(V)
        ]
    )
    usual = USUAL_CASTS * torch.maximum(1.48 * own, size)
    return (found - usual.square()).clamp(min=0).sqrt().to(pictures)


# --- where the performer stands ---------------------------------------------------------------------

NEAR_OUTLINE = 6
"""Pixels from the outline that are compared."""


def outline_shifts(alpha: Tensor, solid: Tensor) -> Tensor:  # [F, h, w] 0..1 twice -> [F, 2] pixels
    """How far p + shift must be read in every picture for its performer to fill the geometry's
    outline (Lucas and Kanade's steps on blurred silhouettes); NaN where either is empty."""
    shifts = alpha.new_zeros(len(alpha), 2)
    for sigma in (4.0, 2.0):
        soft, goal = gaussian(alpha, sigma), gaussian(solid, sigma)
        slope = torch.stack(torch.gradient(soft, dim=(2, 1)), 1)  # d/dx, d/dy
        band = (grown(solid, NEAR_OUTLINE) > 0.5) & (grown(1 - solid, NEAR_OUTLINE) > 0.5)
        for f in range(len(alpha)):
            if not band[f].any() or not (alpha[f] > 0.5).any():
                shifts[f] = torch.nan
                continue
            shifts[f] = _one_outline(soft[f], goal[f], slope[f], _places(band[f]), shifts[f])
    return shifts


def _one_outline(
    soft: Tensor, goal: Tensor, slope: Tensor, places: Tensor, shift: Tensor
) -> Tensor:
    wanted = read_at(goal[None], places)[:, 0]
    for _ in range(8):
        away = read_at(soft[None], places + shift)[:, 0] - wanted
        J = read_at(slope, places + shift)
        weight = (1 / (1 + (away / 0.2).square()))[:, None]  # hair and cloth that no geometry has
        step = torch.linalg.solve(
            J.T @ (weight * J) + 1e-4 * torch.eye(2, device=J.device), J.T @ (weight[:, 0] * away)
        )
        shift = shift - step.clamp(-2, 2)
    return shift


STANDING = 0.4
"""Pixels by which outlines of steady pictures seem to move."""


def drift_of(shifts: Tensor, usual: float = STANDING) -> Tensor:  # [F, 2] -> [F, 2]
    """What changes over time: what is always so is the geometry's error, and what is no larger than
    `usual` (pixels) is the reading's own (James and Stein's shrinkage). 0 where nothing is known."""
    known = shifts.isfinite().all(1)
    if int(known.sum()) < 3:
        return torch.zeros_like(shifts)
    away = shifts - shifts[known].median(0).values
    size = float(away[known].square().mean().sqrt())
    return torch.where(known[:, None], away, 0.0) * max(0.0, 1 - (usual / max(size, 1e-6)) ** 2)


# --- how the performer speeds up ------------------------------------------------------------------


FOLLOWED = 0.3
"""Share of the performer that flow must follow both ways: what it says of the rest of a fast or blotched
moment is as wrong as what was thrown away."""


def _bends_of_view(
    there: Tensor, back: Tensor, masks: Tensor, depth: Tensor, rig: Rig, view: int
) -> list[tuple[Bend, Tensor]]:
    """Accelerations as flow tells them, not yet lessened, and [M, 3] where they are in the world."""
    found = []
    points = unproject_depth(depth, rig.K[0])
    inverse = torch.linalg.inv(rig.T_camera_world[0])
    for f in range(1, len(masks) - 1):
        inside = masks[f] & (depth[f] > 0)
        p = _places(inside)
        if len(p) < FEWEST:
            continue
        forward, backward = read_at(there[f], p), read_at(back[f - 1], p)
        kept = (forward + read_at(back[f], p + forward)).norm(dim=1) < RETURNED
        kept &= (backward + read_at(there[f - 1], p + backward)).norm(dim=1) < RETURNED
        if int(kept.sum()) < max(FEWEST, FOLLOWED * len(p)):
            continue
        # One a cell of five pixels: neighbours say the same.
        number = (p[:, 1] / 5).long() * masks.shape[-1] + (p[:, 0] / 5).long()
        number = torch.where(kept, number, -1)
        names, cells = number.unique(return_inverse=True)
        sums = torch.zeros(len(names), 2 + 2 + 2 + 3 + 1, device=p.device)
        world = points[f][:, inside].T @ inverse[:3, :3].T + inverse[:3, 3]
        one = torch.ones_like(p[:, :1])
        sums.index_add_(0, cells, torch.cat([p, forward, backward, world, one], 1))
        mean = (sums / sums[:, -1:])[names >= 0]
        middle, fore, aft = mean[:, :2], mean[:, 2:4], mean[:, 4:6]
        bend = Bend(view, f, (middle + aft, middle, middle + fore), fore + aft)
        found.append((bend, mean[:, 6:9]))
    return found


def _projection(points: Tensor, rig: Rig) -> Tensor:  # [M, 3] -> [M, 2, 3] pixels a metre
    """How a small step in the world moves a place of the picture."""
    K, T = rig.K[0], rig.T_camera_world[0]
    x, y, z = (points @ T[:3, :3].T + T[:3, 3]).unbind(-1)
    zero = torch.zeros_like(x)
    across = torch.stack([K[0, 0] / z, zero, -K[0, 0] * x / z**2], -1)
    down = torch.stack([zero, K[1, 1] / z, -K[1, 1] * y / z**2], -1)
    return torch.stack([across, down], 1) @ T[:3, :3]


def node_weights(points: Tensor, low: Tensor, counts: tuple[int, int, int]) -> Tensor:
    """Trilinear weights [M, nodes] of points [M, 3] in a grid that begins at `low`."""
    place = ((points - low) / GRID).clamp(min=0)
    size = torch.tensor(counts, device=points.device)
    place = torch.minimum(place, size - 1 - 1e-3)
    first = place.floor().long()
    share = place - first
    weights = points.new_zeros(len(points), int(size.prod()))
    for corner in range(8):
        step = torch.tensor([corner >> 2 & 1, corner >> 1 & 1, corner & 1], device=points.device)
        i, j, k = (first + step).unbind(-1)
        weight = torch.where(step.bool(), share, 1 - share).prod(-1)
        number = (i * counts[1] + j) * counts[2] + k
        weights.scatter_add_(1, number[:, None], weight[:, None])
    return weights


ALIKE, AT_ALL = 0.04, 0.2
"""Metres a frame²: how differently neighbouring nodes speed up, and how much at all."""


def _smoothness(counts: tuple[int, int, int], device) -> Tensor:  # [nodes, nodes]
    """The prior's curvature: differences of neighbouring nodes, and a little of the nodes."""
    number = torch.arange(counts[0] * counts[1] * counts[2], device=device).view(counts)
    matrix = torch.eye(number.numel(), device=device) / AT_ALL**2
    for axis in range(3):
        a = number.narrow(axis, 0, counts[axis] - 1).flatten()
        b = number.narrow(axis, 1, counts[axis] - 1).flatten()
        one = torch.ones(len(a), device=device) / ALIKE**2
        for i, j, sign in ((a, a, 1), (b, b, 1), (a, b, -1), (b, a, -1)):
            matrix.index_put_((i, j), sign * one, accumulate=True)
    return matrix


def _agreed(bends: list[tuple[Bend, Tensor]], rig: Rig) -> list[Tensor]:
    """[M, 2] a bend: the acceleration that one field in space gives all views of one moment.

    A view that shakes disagrees with the others, so weights fall with what is left (IRLS)."""
    points = torch.cat([world for _, world in bends])
    low = points.amin(0)
    counts = tuple(int(n) + 2 for n in ((points.amax(0) - low) / GRID).tolist())
    weights = node_weights(points, low, counts)
    rows = torch.cat([_projection(world, rig.select([bend.view])) for bend, world in bends])
    # [M, 2, 3 nodes]: each axis of the world has its own nodes.
    matrix = (rows[..., None] * weights[:, None, None]).flatten(2).flatten(0, 1)
    seen = torch.cat([bend.excess for bend, _ in bends]).flatten()
    trust = torch.ones_like(seen)
    ridge = torch.block_diag(*[_smoothness(counts, points.device)] * 3)
    for _ in range(3):
        weighted = matrix * trust[:, None]
        field = torch.linalg.solve(matrix.T @ weighted + ridge, weighted.T @ seen)
        left = matrix @ field - seen
        trust = 1 / (1 + left.square())  # pixels a frame²
    return list((matrix @ field).view(-1, 2).split([len(world) for _, world in bends]))


def bends(
    flows: list[tuple[Tensor, Tensor]],
    masks: Tensor,
    depth: Tensor,
    rig: Rig,
    drift: Tensor,
    tick: Callable[[], None] = lambda: None,  # called now and then: may raise to stop
) -> list[Bend]:
    """All views' accelerations less those that they agree on; flows one pair a view.

    drift [V, F, 2]: shifts that are known already; they don't blur what the views agree on."""
    V, count = masks.shape[:2]
    found: list[tuple[Bend, Tensor]] = []
    for v in range(V):
        tick()
        for bend, world in _bends_of_view(*flows[v], masks[v], depth[v], rig.select([v]), v):
            steady = bend.excess - _second_difference(drift[v], bend.frame)
            found.append((replace(bend, excess=steady), world))
    left, common = [], []
    for f in range(1, count - 1):
        tick()
        now = [pair for pair in found if pair[0].frame == f]
        if len({bend.view for bend, _ in now}) < 2:
            continue
        for (bend, _), agreed in zip(now, _agreed(now, rig), strict=True):
            left.append(bend)
            common.append(agreed)
    result = []
    for v in range(V):
        mine = [(b, c) for b, c in zip(left, common, strict=True) if b.view == v]
        for bend in _beyond_usual(mine):
            known = _second_difference(drift[v], bend.frame)
            result.append(replace(bend, excess=bend.excess + known))
    return result


def _second_difference(values: Tensor, f: int) -> Tensor:
    return values[f + 1] - 2 * values[f] + values[f - 1]


USUAL, USUAL_SHARE = 0.2, 0.65
"""Pixels a frame², and share of the common acceleration, that views differ by although nothing
shakes: flow errs, and a field of so few nodes leaves some of fast limbs behind."""


def _beyond_usual(pairs: list[tuple[Bend, Tensor]]) -> list[Bend]:
    """One view's excess, the middle one of the picture (what flow says of single places is mostly its
    own error, and sometimes wild) and lessened by what is usual (James and Stein's shrinkage)."""
    if not pairs:
        return []
    whole = torch.stack([(bend.excess - common).median(0).values for bend, common in pairs])
    drive = torch.cat([common for _, common in pairs])
    usual = USUAL + USUAL_SHARE * float(drive.square().mean().sqrt())
    size = float(whole.square().mean().sqrt())
    share = max(0.0, 1 - (usual / max(size, 1e-6)) ** 2)
    return [
        replace(bend, excess=(share * middle).expand_as(bend.excess))
        for (bend, _), middle in zip(pairs, whole, strict=True)
    ]


class Basis(NamedTuple):
    """How N places read a grid: four nodes each, bilinearly."""

    nodes: Tensor
    """[N, 4] numbers of the nodes."""
    weights: Tensor
    """[N, 4]"""

    def read(self, grid: Tensor) -> Tensor:  # [C, rows, columns] -> [N, C]
        return (grid.flatten(1).T[self.nodes] * self.weights[..., None]).sum(1)

    def mean(self, nodes: int) -> Tensor:  # [nodes]
        """The weights of the places' mean."""
        total = self.weights.new_zeros(nodes)
        total.index_add_(0, self.nodes.flatten(), self.weights.flatten())
        return total / len(self.nodes)

    def dense(self, nodes: int) -> Tensor:  # [N, nodes]
        return self.weights.new_zeros(len(self.nodes), nodes).scatter_add_(
            1, self.nodes, self.weights
        )


def basis(places: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Basis:
    """How places [N, 2] read a grid (rows, columns) whose corners are those of a window of `size`
    (height, width)."""
    (h, w), (rows, columns) = size, grid
    x = (places[:, 0] / w * (columns - 1)).clamp(0, columns - 1 - 1e-3)
    y = (places[:, 1] / h * (rows - 1)).clamp(0, rows - 1 - 1e-3)
    j, i = x.floor().long(), y.floor().long()
    u, v = x - j, y - i
    first = i * columns + j
    nodes = torch.stack([first, first + 1, first + columns, first + columns + 1], 1)
    weights = torch.stack([(1 - u) * (1 - v), u * (1 - v), (1 - u) * v, u * v], 1)
    return Basis(nodes, weights)


def add_normal(
    curvature: Tensor,  # [2 n, 2 n], added to
    slope: Tensor,  # [2 n], added to
    at: Basis,
    J: Tensor,  # [N, 2] derivative of a residual by the x and y of the field at its place
    weight: Tensor,  # [N]
    residual: Tensor,  # [N]
) -> None:
    """Least squares' normal equations of a field of two components; a place touches eight numbers."""
    n = len(slope) // 2
    columns = torch.cat([at.nodes, at.nodes + n], 1)  # [N, 8]
    row = torch.cat([J[:, :1] * at.weights, J[:, 1:] * at.weights], 1)
    slope.index_add_(0, columns.flatten(), (row * (weight * residual)[:, None]).flatten())
    products = (row * weight[:, None])[:, :, None] * row[:, None]
    where = columns[:, :, None] * (2 * n) + columns[:, None]
    curvature.view(-1).index_add_(0, where.flatten(), products.flatten())


def spread(values: Tensor, size: tuple[int, int]) -> Tensor:  # [C, rows, columns] -> [C, h, w]
    """The same grid read at every pixel of the window."""
    down, across = (_reading(*n) for n in zip(values.shape[-2:], size, strict=True))
    return down.to(values) @ values @ across.to(values).T


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _reading(nodes: int, size: int) -> Tensor:  # [size, nodes]
    """How every pixel of a row reads a row of nodes, of which the outer ones lie at its ends."""
    place = (torch.arange(size) + 0.5) / size * (nodes - 1)
    return (1 - (place[:, None] - torch.arange(nodes)).abs()).clamp(min=0)
