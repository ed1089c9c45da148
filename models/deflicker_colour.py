"""Deflicker, colours: what every frame's exposure and tint is off, compared along the motion.

Stage: clip of one shot -> a factor and an addend a frame, channel and place, smooth over the
picture. What changes fast in time is flicker; what changes slowly, or once and for good (the sun
sets, a lamp goes on), stays.

Frames: pixels of the working pictures, centres at +0.5; colours 0..1 as displayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .filters import local_fit

GRID, SPLINE = 7, 4
"""Nodes of the fields (cubic splines) along the longer side; the fewest."""
DARKEST, BRIGHTEST = 0.01, 0.985
"""Colours that are compared."""
ALIKE, AT_ALL = 2e-3, 1e-5
"""Weight of the differences of neighbouring nodes, and of the nodes themselves, against one frame's
comparisons: the fields are smooth, and where nothing is known, as their surroundings."""
STIFF = 10.0
"""Times the weight for the factors' part, which plain surfaces hardly tell from the addends'."""
ROUNDS, STEPS = 3, 60
"""Reweighted fits, and conjugate gradient steps in each."""
CERTAIN = 0.004
"""Typical difference (of 1) below which comparisons are not told apart."""
BREAK = 4.0
"""Standard errors by which colours before and after a moment must differ for it to be a change of
light that stays."""
HALF = 8
"""Frames before and after such a moment that are compared."""
FEWEST = 5
"""Frames that tell a slope from flicker."""
WIDTHS = (3.0, 6.0, 12.0, 24.0, 96.0)
"""Frames (sigma) over which light may change and is kept; the clip itself says which."""
LEVELS = (0.25, 0.75)
"""Colours at which curves are compared."""
USUAL = 0.002
"""Root mean square by which frames without flicker seem to differ."""
TOGETHER = 2.0
"""Neighbouring places that share their noise."""


class Pair(NamedTuple):
    """N places of frame `here` and where frame `there` shows them."""

    here: int
    there: int
    places_here: Tensor
    """[N, 2] shares 0..1 of width and height."""
    places_there: Tensor
    colours_here: Tensor
    """[N, 3]"""
    colours_there: Tensor


@dataclass(frozen=True)
class Tints:
    """What is to be done with every frame's colours: frame * gain + offset."""

    gain: Tensor
    """[F, 3, rows, columns] at the nodes of a spline over the picture."""
    offset: Tensor
    """[F, 3, rows, columns]"""
    size: float
    """Root mean square of the flicker, of 1, before it was lessened."""

    @property
    def any(self) -> bool:
        return bool((self.gain != 1).any() or (self.offset != 0).any())

    def apply(self, pictures: Tensor, numbers: Tensor | slice) -> Tensor:  # [N, 3, H, W]
        """The frames of these numbers, corrected."""
        if not self.any:
            return pictures
        gain, offset = (
            _drawn(field[numbers], *pictures.shape[-2:])
            for field in (self.gain.to(pictures), self.offset.to(pictures))
        )
        return pictures * gain + offset

    def mean_gain(self) -> Tensor:  # [F, 3]
        return self.gain.mean((2, 3))


def grid_of(pictures: Tensor) -> tuple[int, int]:  # [..., H, W] -> rows, columns
    sides = pictures.shape[-2:]
    return tuple(max(SPLINE, round(GRID * side / max(sides))) for side in sides)


def readable(colours: Tensor) -> Tensor:  # [N, 3] -> [N] bool
    """Neither black nor burnt out: those have lost what they were."""
    return (colours.amin(1) > DARKEST) & (colours.amax(1) < BRIGHTEST)


def _spline(at: Tensor, count: int) -> Tensor:  # [N] 0..1 -> [N, count]
    """Shares of the nodes of a cubic B-spline whose inner nodes span 0..1."""
    away = (at[:, None] * (count - 3) + 1 - torch.arange(count, device=at.device)).abs()
    near = 2 / 3 - away.square() * (1 - away / 2)
    return torch.where(away < 1, near, (2 - away).clamp(min=0) ** 3 / 6)


def _weights(places: Tensor, grid: tuple[int, int]) -> Tensor:  # [N, 2] -> [N, nodes]
    down, across = _spline(places[:, 1], grid[0]), _spline(places[:, 0], grid[1])
    return (down[:, :, None] * across[:, None, :]).flatten(1)


def _drawn(nodes: Tensor, height: int, width: int) -> Tensor:  # [..., rows, columns] -> [..., H, W]
    """The spline at the centre of every pixel."""
    sides = [
        _spline((torch.arange(n, device=nodes.device) + 0.5) / n, count).to(nodes)
        for n, count in zip((height, width), nodes.shape[-2:], strict=True)
    ]
    return sides[0] @ nodes @ sides[1].T


class _System(NamedTuple):
    """Normal equations; blocks of K x K, the same for all three channels."""

    own: Tensor
    """[F, K, K]"""
    ends: Tensor
    """[P, 2] frames of every pair."""
    mixed: Tensor
    """[P, K, K] here's rows, there's columns."""
    right: Tensor
    """[F, K, 3]"""

    def times(self, x: Tensor) -> Tensor:  # [F, K, 3]
        here, there = self.ends.unbind(1)
        y = self.own @ x
        y.index_add_(0, here, self.mixed @ x[there])
        return y.index_add_(0, there, self.mixed.mT @ x[here])

    def solved(self) -> Tensor:  # [F, K, 3]
        """Conjugate gradients, preconditioned by the frames' own blocks. What is common to all
        frames converges slowly, but is not flicker either."""
        inverse = torch.linalg.inv(self.own)
        x = torch.zeros_like(self.right)
        left, step, before = self.right.clone(), torch.zeros_like(x), torch.inf
        for _ in range(STEPS):
            z = inverse @ left
            now = (left * z).sum((0, 1)).clamp(min=1e-30)
            step = z + step * (now / before)
            before = now
            turned = self.times(step)
            rate = now / (step * turned).sum((0, 1)).clamp(min=1e-30)
            x += rate * step
            left -= rate * turned
        return x


def _prior(grid: tuple[int, int], dtype, device) -> Tensor:  # [K, K]
    """Differences of neighbouring nodes, and a little of the nodes; K = 2 x nodes."""
    nodes = grid[0] * grid[1]
    number = torch.arange(nodes, device=device).view(grid)
    matrix = AT_ALL * torch.eye(nodes, dtype=dtype, device=device)
    for a, b in ((number[1:], number[:-1]), (number[:, 1:], number[:, :-1])):
        rows = torch.zeros(a.numel(), nodes, dtype=dtype, device=device)
        rows.scatter_(1, a.reshape(-1, 1), 1.0).scatter_(1, b.reshape(-1, 1), -1.0)
        matrix += ALIKE * rows.T @ rows
    return torch.block_diag(matrix, STIFF * matrix)


def _fit(pairs: Sequence[Pair], count: int, gain: Tensor, offset: Tensor, scale: float):
    """One reweighted step: changes [F, 2, nodes, 3] of gain and offset [F, 3, rows, columns], and
    the typical difference that was left before it."""
    grid = (gain.shape[-2], gain.shape[-1])
    nodes = grid[0] * grid[1]
    prior = _prior(grid, torch.float64, gain.device)
    own = prior.repeat(count, 1, 1)
    right = torch.zeros(count, 2 * nodes, 3, dtype=torch.float64, device=gain.device)
    ends, mixed, sizes = [], [], []
    for pair in pairs:
        shares = [_weights(p, grid) for p in (pair.places_here, pair.places_there)]
        colours = [
            c * (s @ gain[f].flatten(1).T) + s @ offset[f].flatten(1).T
            for c, s, f in zip(
                (pair.colours_here, pair.colours_there), shares, pair[:2], strict=True
            )
        ]
        away = colours[0] - colours[1]  # [N, 3]
        size = away.square().mean(1)
        weight = 1 / (1 + size / scale**2) / len(size)
        sizes.append(size.median())
        # Both read the curve at the mean of their colours: the noise of their difference is then
        # not that of where they read it, which would make every factor too small.
        level = ((colours[0] + colours[1]) / 2).mean(1, keepdim=True) - 0.5
        a, b = (torch.cat([s, s * level], 1) for s in shares)
        wa, wb = a * weight[:, None], b * weight[:, None]
        own[pair.here] += (wa.T @ a).double()
        own[pair.there] += (wb.T @ b).double()
        right[pair.here] -= (wa.T @ away).double()
        right[pair.there] += (wb.T @ away).double()
        ends.append((pair.here, pair.there))
        mixed.append(-(wa.T @ b).double())
    system = _System(own, torch.tensor(ends, device=gain.device), torch.stack(mixed), right)
    return system.solved().view(count, 2, nodes, 3), float(torch.stack(sizes).median().sqrt())


def tints(
    pairs: Sequence[Pair],
    count: int,
    grid: tuple[int, int],
    strength: float,  # 0..1
) -> Tints:
    """The corrections of all frames of a shot."""
    if not pairs:
        return Tints(torch.ones(count, 3, *grid), torch.zeros(count, 3, *grid), 0.0)
    gain = torch.ones(count, 3, *grid, device=pairs[0].colours_here.device)
    offset = torch.zeros_like(gain)
    scale = 0.1
    for _ in range(ROUNDS):
        change, size = _fit(pairs, count, gain, offset, scale)
        change = change.float().permute(1, 0, 3, 2).unflatten(-1, grid)  # [2, F, 3, rows, columns]
        slope, level = change[1], change[0] - 0.5 * change[1]
        gain, offset = gain * (1 + slope), offset * (1 + slope) + level
        scale = max(3 * size, CERTAIN)
    # Least squares' own error: as many factors as a frame has, from as many places as tell of it.
    told = 2 * sum(len(pair.places_here) for pair in pairs) / count
    usual = (USUAL**2 + TOGETHER * size**2 * 2 * grid[0] * grid[1] / told) ** 0.5
    return _fast_part(gain, offset, usual, strength)


def _fast_part(gain: Tensor, offset: Tensor, usual: float, strength: float) -> Tints:
    """What is left of the corrections when what changes slowly is taken out of them."""
    # Two colours of the curve, rather than factor and addend, which are hardly known apart.
    ends = torch.stack([gain * v + offset for v in LEVELS], 1)  # [F, 2, 3, rows, columns]
    steady = slow(ends.flatten(1)).view_as(ends)
    (gain, offset), (gain_slow, offset_slow) = _curve(ends), _curve(steady)
    # There and back: by the frame's own curve to common colours, from there by the slow one.
    gain, offset = gain / gain_slow, (offset - offset_slow) / gain_slow
    away = torch.stack([gain * v + offset - v for v in LEVELS])
    size = float(away.square().mean().sqrt())
    share = strength * max(0.0, 1 - (usual / max(size, 1e-9)) ** 2)
    return Tints(1 + share * (gain - 1), share * offset, size)


def _curve(ends: Tensor) -> tuple[Tensor, Tensor]:  # [F, 2, ...] -> gain, offset [F, ...]
    """The straight curve through two colours."""
    slope = (ends[:, 1] - ends[:, 0]) / (LEVELS[1] - LEVELS[0])
    return slope.clamp(min=0.1), ends[:, 0] - LEVELS[0] * slope


def slow(values: Tensor) -> Tensor:  # [F, N] -> [F, N]
    """Smoothed over time, as far as the values allow, but not across lasting changes."""
    starts = [0, *lasting_changes(values), len(values)]
    parts = [values[a:b].double() for a, b in zip(starts, starts[1:], strict=False)]
    return torch.cat([_smoothed(part) for part in parts]).to(values)


def _smoothed(values: Tensor) -> Tensor:
    """By local means or lines under a Gaussian, whichever tells best what every frame has from the
    others (leave-one-out cross-validation)."""
    best, lowest = values, torch.inf
    for degree in (0, 1) if len(values) >= FEWEST else (0,):
        for reach in WIDTHS:
            kernel = local_fit(len(values), reach, degree, values)
            smooth = kernel @ values
            own = kernel.diagonal().clamp(max=1 - 1e-3)[:, None]
            error = float(((values - smooth) / (1 - own)).square().mean())
            if error < lowest:
                best, lowest = smooth, error
    return best


def lasting_changes(values: Tensor) -> list[int]:  # [F, N]
    """Frames from which on the values are others than before, by far more than they flicker, and
    than they rise or fall anyway: a step fitted together with a line, and its standard error."""
    score = torch.zeros(len(values))
    for f in range(3, len(values) - 2):
        start, end = max(0, f - HALF), min(len(values), f + HALF)
        t = torch.arange(start - f, end - f, dtype=torch.float64, device=values.device)
        X = torch.stack([torch.ones_like(t), t, (t >= 0).to(t)], 1)
        inverse = torch.linalg.inv(X.T @ X)
        factors = inverse @ X.T @ values[start:end].double()
        left = (values[start:end] - X @ factors).square().sum(0).mean() / max(1, len(t) - 3)
        error = (left + CERTAIN**2) * inverse[2, 2]
        score[f] = (factors[2].square().mean() / error).sqrt()
    peak = F.max_pool1d(score[None, None], 2 * HALF - 1, 1, HALF - 1)[0, 0]
    return ((score == peak) & (score > BREAK)).nonzero()[:, 0].tolist()
