"""Deflicker, places: how every frame is bent beside where its motion would have it.

Stage: flow of a clip of one shot -> a field of shifts a frame, smooth over the picture. Points are
followed through the frames around; smooth motion is fitted to where they are seen, as long and as
stiff as they allow, and what every frame's points lie beside it is its wobble.

Frames: pixels of the working pictures, centres at +0.5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .filters import gaussian, read_at
from .implicit_start import structure
from .metrics import sample

STRIDE, REACH = 4, 8
"""Pixels between the points that are followed; frames both ways over which they are."""
RETURNED, NEARLY = 2.0, 1.0
"""Pixels by which flow there and back may miss the place where it began; and where it must tell less
than a pixel."""
MOTIONS = ((0, 1.0), (1, 1.0), (1, 0.5), (2, 1.0), (2, 0.6), (2, 0.4))
"""Smooth motions that are tried: degree of a polynomial, and over which share of the reach."""
POOLED = 2.0
"""Cells of points (sigma) over which it is judged how well motions fit."""
NARROWING = (0.1, 0.05, 0.025, 0.0125)
"""Shares of the longer side (sigma) over which points agree about a bend: first widely, then narrowly,
as far as they tell of it themselves."""
FAINT = 1e-4
"""Squared difference of colours below which a bend as large as usual is not told by a place."""
FARTHEST = 1.5
"""Times the usual wobble that a point lies beside its motion at most: more is a flow's error."""
USUAL, MISSED = 0.1, 3.0
"""Pixels by which frames without wobble seem to be beside smooth motion, since flow errs; and more,
a pixel by which flow there and back misses the place where it began: noise misleads it."""
FEWEST = 40
"""Points that can tell something."""
QUIET = 0.25
"""Share of the points that move most smoothly: their jerks are wobble alone."""
CONTRAST = 0.02
"""Standard deviation of colours around a point at which its flow is half trusted."""


@dataclass(frozen=True)
class Tracks:
    """Where the points of one frame are seen in the frames around it."""

    offsets: Tensor
    """[T] frames after (or, negative, before) it."""
    places: Tensor
    """[T, N, 2] pixels."""
    seen: Tensor
    """[T, N] 0 or 1."""


def grid_points(h: int, w: int, device=None) -> tuple[Tensor, tuple[int, int]]:
    """Points [N, 2] in cells of STRIDE pixels, and how many rows and columns there are."""
    y = torch.arange(STRIDE / 2, h, STRIDE, device=device)
    x = torch.arange(STRIDE / 2, w, STRIDE, device=device)
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1)
    return grid.view(-1, 2), (len(y), len(x))


def follow(there: Tensor, back: Tensor, f: int, reach: int, returned: float = RETURNED) -> Tracks:
    """The grid's points of frame f, up to `reach` frames both ways; flows [F - 1, 2, h, w]."""
    h, w = there.shape[-2:]
    start, _ = grid_points(h, w, there.device)
    found = {0: (start, torch.ones_like(start[:, 0]))}
    for way, ahead, home, step in ((1, there, back, 0), (-1, back, there, -1)):
        p, seen = found[0]
        for k in range(1, reach + 1):
            n = f + way * (k - 1) + step  # the flow between these two frames
            if not 0 <= n < len(there):
                break
            move = read_at(ahead[n], p)
            q = p + move
            missed = (move + read_at(home[n], q)).norm(dim=1)
            inside = ((q > 0) & (q < q.new_tensor([w, h]))).all(1)
            seen = seen * ((missed < returned) & inside)
            found[way * k], p = (q, seen), q
    order = sorted(found)
    return Tracks(
        torch.tensor(order, device=start.device),
        torch.stack([found[k][0] for k in order]),
        torch.stack([found[k][1] for k in order]),
    )


def contrast_of(pictures: Tensor) -> Tensor:  # [F, 3, h, w] -> [F, h, w]
    """Standard deviation of the brightness around every pixel."""
    grey = pictures.mean(1)
    mean = gaussian(grey, 3.0)
    return (gaussian(grey.square(), 3.0) - mean.square()).clamp(min=0).sqrt()


def wobble_of(flows: tuple[Tensor, Tensor], contrast: Tensor) -> tuple[float, float]:
    """Standard deviation of the wobble along an axis, and what flow's errors alone would look like;
    pixels. Of the points that move most smoothly: jerks of the others are the performer's own."""
    there, back = flows
    jerks, misses = [], []
    points, _ = grid_points(*there.shape[-2:], there.device)
    for f in range(len(there)):
        clear = read_at(contrast[f][None], points)[:, 0] > CONTRAST
        move = read_at(there[f], points)
        misses.append((move + read_at(back[f], points + move))[clear].square().sum(1))
        if 0 < f < len(there) - 1:
            jerks.append(_jerk(follow(there, back, f, 2), clear))
    found, missed = torch.cat([*jerks, there.new_zeros(0)]), torch.cat(misses)
    if len(found) < FEWEST:
        return 0.0, USUAL
    wobble = float(found.quantile(QUIET)) / (-2 * math.log(1 - QUIET) * 20)
    return math.sqrt(wobble), USUAL + MISSED * math.sqrt(float(missed.median()))


def _jerk(tracks: Tracks, clear: Tensor) -> Tensor:  # [M] pixels a frame^3, squared
    """Third differences: smooth motion has next to none, wobble 20 times its own variance."""
    i = int((tracks.offsets == -1).nonzero()[0])
    signs = tracks.places.new_tensor([-1, 3, -3, 1])[:, None, None]
    third = (tracks.places[i : i + 4] * signs).sum(0)
    return third[clear & tracks.seen[i : i + 4].all(0)].square().sum(1)


def beside(
    flows: tuple[Tensor, Tensor],  # there, back [F - 1, 2, h, w]
    f: int,
    picture: Tensor,  # [3, h, w] frame f
    moves: Tensor,  # [h, w] 0..1, what may lie beside; the rest is known to be in its place
    sigma: float,  # pixels, how far places wobble
) -> Tensor:  # [2, h, w] pixels
    """How far frame f's points lie beside their smooth motion."""
    h, w = moves.shape
    points, grid = grid_points(h, w, moves.device)
    tracks = follow(*flows, f, REACH, NEARLY)
    k = tracks.offsets.to(tracks.places)
    away = tracks.places - points  # [T, N, 2]
    fits, risks = [torch.zeros_like(points)], [torch.full_like(points[:, 0], sigma**2)]
    for degree, share in MOTIONS:
        weight = tracks.seen * (k.abs() <= share * REACH)[:, None]
        middle, lever, left = _polynomial(k / REACH, away, weight, degree)
        pooled = gaussian(left.view(1, *grid), POOLED).flatten()
        fits.append(middle)
        risks.append(sigma**2 * lever + (pooled - sigma**2).clamp(min=0))
    risk = torch.stack(risks)
    chosen = (risk / sigma**2).clamp(min=1e-3).pow(-4)
    chosen = chosen / chosen.sum(0)
    shift = -(torch.stack(fits) * chosen[..., None]).sum(0)
    won = (1 - (risk * chosen).sum(0) / sigma**2).clamp(min=0)  # over doing nothing
    far = shift.norm(dim=1, keepdim=True) / (FARTHEST * sigma)
    cells = F.interpolate(torch.cat([structure(picture), moves[None]])[None], grid, mode="area")[0]
    field = _agreed(
        (shift / far.clamp(min=1)).T.view(2, *grid), won.view(grid), cells[:3], cells[3], sigma
    )  # fmt: skip
    return F.interpolate(field[None], (h, w), mode="bicubic")[0] * moves


def _polynomial(t: Tensor, away: Tensor, weight: Tensor, degree: int):
    """Least squares of every point: its value at 0 [N, 2], that value's variance against one
    sighting's [N], and the variance that is left [N]; where too few are seen, no gain (1)."""
    X = torch.stack([t**j for j in range(degree + 1)], 1)  # [T, d]
    normal = torch.einsum("ti,tj,tn->nij", X, X, weight)
    normal = normal + 1e-6 * torch.eye(degree + 1, device=t.device)
    right = torch.einsum("ti,tn,tnc->nic", X, weight, away)
    inverse = torch.linalg.inv(normal)
    factors = inverse @ right
    left = (torch.einsum("ti,nic->tnc", X, factors) - away).square().mean(-1) * weight
    seen = weight.sum(0)
    free = (seen - degree - 1).clamp(min=1)
    enough = seen >= degree + 3
    lever = torch.where(enough, inverse[:, 0, 0].clamp(max=1.0), 1.0)
    return factors[:, 0] * enough[:, None], lever, left.sum(0) / free


def _agreed(
    away: Tensor,  # [2, h, w] pixels
    trust: Tensor,  # [h, w]
    slopes: Tensor,  # [3, h, w] as `structure` gives them
    moves: Tensor,  # [h, w]
    sigma: float,  # pixels
) -> Tensor:  # [2, h, w]
    """What neighbouring points agree about, each as far as it is trusted and as its edges tell (the
    sums of Lucas and Kanade 1981); what does not move says that there is no bend, and so does a
    little everything, where edges tell nothing."""
    xx, xy, yy = slopes * trust * moves
    u, v = away
    said = torch.stack([xx * u + xy * v, xy * u + yy * v])
    sums = torch.cat([torch.stack([xx, xy, yy]) + slopes * (1 - moves), said])
    weak, known = FAINT / sigma**2, torch.zeros_like(away)
    for share in NARROWING:
        a, b, c, p, q = gaussian(sums, share * max(away.shape[-2:]))
        a, c, p, q = a + weak, c + weak, p + weak * known[0], q + weak * known[1]
        known = torch.stack([c * p - b * q, a * q - b * p]) / (a * c - b * b)
    return known


def undone(field: Tensor) -> Tensor:  # [N, 2, h, w] pixels of that size -> the same
    """Where to read a bent picture so that it is straight: the field says it of places in the bent
    picture, this of places in the straight one (fixed point)."""
    h, w = field.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(h, device=field.device) + 0.5,
        torch.arange(w, device=field.device) + 0.5,
        indexing="ij",
    )
    shift = field
    for _ in range(4):
        shift = sample(field, x + shift[:, 0], y + shift[:, 1])
    return shift
