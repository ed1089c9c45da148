"""MV-Opt's descent: one block after the other, each step accepted only when the objective falls.

Stage: inside the refiner. What is minimised is in mv_opt_objective.py. MVAnimate, Theorem IV.3: when
every block falls by at least c |x' - x|², the objective never rises and the steps die away.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .filters import read_at
from .mv_opt_links import Basis, add_normal, spread
from .mv_opt_objective import (
    ANCHORS,
    BEND,
    BENDS_INDEPENDENT,
    GAIN,
    GAIN_STEP,
    OFFSET,
    OFFSET_STEP,
    OUTLINE,
    SHIFT,
    SHIFT_ANCHOR,
    SHIFT_STEP,
    Block,
    Fields,
    History,
    Problem,
    huber,
    moved,
)  # fmt: skip

SUFFICIENT = 1e-4
"""c of the test F(x') <= F(x) - c |x' - x|² of a block, fields in standard deviations."""
HALVINGS = 1
"""Shorter steps that are tried; after the last the block stays as it is. More end at the same F."""
ROUND_ENOUGH, VIEW_ENOUGH = 1e-3, 3e-3
"""Shares of F, a moment or a view of it, below which another round is not worth it: two thirds of the
steps would gain a fortieth."""


DAMPING = 1e-7
"""Share of the mean curvature that is added to all directions: without fidelity some have none."""


def _solve(curvature: Tensor, slope: Tensor) -> Tensor:
    least = (DAMPING * curvature.diagonal().mean()).clamp(min=1e-12)
    damped = curvature + least * torch.eye(len(slope)).to(slope)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:  # rounding
        return torch.linalg.solve(damped, slope)
    return torch.cholesky_solve(slope[:, None], factor)[:, 0]


def colour_target(problem: Problem, block: Block, values: Tensor, others: Tensor) -> Tensor:
    """[3, 2, rows, columns]: where Gauss and Newton's step would take gain and offset."""
    fields, looks = problem.fields[block], problem.looks[block]
    x = problem.pictures[block]
    if fields.shift.any():
        x = moved(x, spread(fields.shift, problem.size))
    raw = read_at(x, looks.places)
    mean = looks.means(values[:, :3] - others[:, :3])
    weight = looks.cell_weight[:, None] * huber(mean * looks.cell_weight[:, None].sqrt())[1]
    prior, anchor = _colour_prior(problem, block)
    sums = problem.colour_sum() if block[0] == 0 else None
    per_cell = looks.means(looks.colour_basis)
    result = torch.empty_like(fields.colour)
    for c in range(3):
        J = torch.cat([looks.means(raw[:, c : c + 1] * looks.colour_basis), per_cell], 1)
        theta, W = fields.colour[c].flatten(), weight[:, c : c + 1]
        slope = (J.T @ (W * mean[:, c : c + 1]))[:, 0] + prior @ theta
        if sums is not None:
            slope = slope + anchor * sums[c].flatten()
        step = _solve(J.T @ (W * J) + prior + torch.diag(anchor), slope)
        result[c] = (theta - step).view_as(result[c])
    return result


def _colour_prior(problem: Problem, block: Block) -> tuple[Tensor, Tensor]:
    """Curvature [2 n, 2 n] of fidelity, and what the front view's anchor adds on its diagonal."""
    rough = problem.colour_rough
    n, one = len(rough), torch.ones(len(rough), device=rough.device)
    trust = float(problem.trust[block[0]]) * problem.settings.fidelity
    cast = float(problem.casts[block[0]])
    parts = [
        (torch.diag(one * (trust / (n * whole**2))) + rough / step**2) / cast**2
        for whole, step in ((GAIN, GAIN_STEP), (OFFSET, OFFSET_STEP))
    ]
    count = problem.pictures.shape[1]
    anchored = [1 / (n * (s * count) ** 2) if block[0] == 0 else 0.0 for s in ANCHORS]
    return torch.block_diag(*parts), torch.cat([one * a for a in anchored])


def shift_target(
    problem: Problem,
    block: Block,
    values: Tensor | None,
    others: Tensor | None,
    shown: Tensor | None = None,  # what the block shows, if it is at hand
) -> Tensor:
    """[2, rows, columns]: where Gauss and Newton's step would take the shift."""
    shift, settings = problem.fields[block].shift, problem.settings
    n = shift[0].numel()
    trust = float(problem.trust[block[0]]) * settings.fidelity
    one = torch.eye(n, device=shift.device) * (trust / (n * SHIFT**2))
    one = one + problem.shift_rough / SHIFT_STEP**2
    curvature = torch.block_diag(one, one)
    slope = curvature @ shift.flatten()
    centre = 1 / (n * (SHIFT_ANCHOR * problem.pictures.shape[1]) ** 2)
    curvature += centre * torch.eye(2 * n, device=shift.device)
    slope += centre * problem.shift_sum(block[0]).flatten()
    for _, left, factor, at in problem.curvature(block, shift):
        weight = settings.temporal * BENDS_INDEPENDENT / BEND**2 * huber(left / BEND)[1]
        _add_axes(curvature, slope, at, factor, weight, left)
    if block in problem.body:
        b, away = problem.body[block], problem.stands(block, shift)
        weight = settings.pose / OUTLINE**2 * huber(away / OUTLINE)[1]
        for axis, part in enumerate((slice(None, n), slice(n, None))):
            curvature[part, part] += weight[axis] * torch.outer(b, b)
            slope[part] += weight[axis] * away[axis] * b
    if values is not None and problem.texture_counts:
        if shown is None:
            shown = problem.shown(block, problem.fields[block])
        _add_texture(problem, block, shown[3:], values - others, curvature, slope)
    return shift - _solve(curvature, slope).view_as(shift)


def _add_axes(
    curvature: Tensor, slope: Tensor, at: Basis, factor: float, weight: Tensor, left: Tensor
) -> None:
    """Residuals [M, 2] whose x and y depend on the shift's x and y alone."""
    for axis in (0, 1):
        J = torch.zeros_like(left)
        J[:, axis] = factor
        add_normal(curvature, slope, at, J, weight[:, axis], left[:, axis])


def _add_texture(
    problem: Problem, block: Block, greys: Tensor, away: Tensor, curvature: Tensor, slope: Tensor
) -> None:
    """Lucas and Kanade's equations of the surface term: texture moves along its slope."""
    looks = problem.looks[block]
    mean = looks.means(away[:, 3:])
    for k, grey in enumerate(greys):
        slopes = torch.stack(torch.gradient(grey)[::-1])  # d/dx, d/dy
        e = away[:, 3 + k] - mean[looks.cells, k]
        w = looks.place_weight * huber(e * looks.place_weight.sqrt())[1]
        kept = w > 0
        at = Basis(looks.shift_basis.nodes[kept], looks.shift_basis.weights[kept])
        add_normal(curvature, slope, at, read_at(slopes, looks.places[kept]), w[kept], e[kept])


def _accepted(problem: Problem, block: Block, target: Fields, start: float, others: Tensor | None):
    """The target, or half the way and so on, where the objective falls by enough.

    (fields, values, what is shown, objective), or None when nothing on the way is better."""
    old = problem.fields[block]
    share = 1.0
    for _ in range(1 + HALVINGS):
        trial = Fields(
            old.colour + share * (target.colour - old.colour),
            old.shift + share * (target.shift - old.shift),
        )
        away = ((trial.colour - old.colour) / GAIN).square().mean()
        away = away + ((trial.shift - old.shift) / SHIFT).square().mean()
        shown, values = None, None
        if block in problem.looks:
            shown = problem.shown(block, trial)
            values = problem.read(block, shown)
        reached = float(problem.local(block, trial, values, others))
        if reached < start and reached <= start - SUFFICIENT * float(away):
            return trial, values, shown, reached
        share /= 2
    return None


def descend(problem: Problem, block: Block) -> float:
    """One step on colours and one on the shift; by how much the objective fell."""
    linked = block in problem.looks
    if not linked and not problem.moves(block):
        return 0.0
    others = problem.others(block) if linked else None
    values = problem.kept(block) if linked else None
    shown = None
    first = start = float(problem.local(block, problem.fields[block], values, others))
    for part in ("colour", "shift"):
        old = problem.fields[block]
        if part == "shift":
            target = Fields(old.colour, shift_target(problem, block, values, others, shown))
        elif linked:
            target = Fields(colour_target(problem, block, values, others), old.shift)
        else:
            continue
        found = _accepted(problem, block, target, start, others)
        if found:
            problem.fields[block], values, shown, start = found
    if linked:
        problem.keep(block, values)
    return first - start


def minimise(
    problem: Problem,
    order: list[int],
    history: History,
    on_step: Callable[[int, int], None],  # sweep, frame
) -> None:
    """Sweeps over time, rounds over the views of a moment; stops where nothing is gained."""
    settings, count = problem.settings, problem.pictures.shape[1]
    history.start(problem.total())
    for sweep in range(settings.sweeps):
        before = history.total[-1]
        for f in range(count):
            settled: set[int] = set()
            for _ in range(settings.iterations):
                begin = history.total[-1]
                for v in order:
                    fell = 0.0 if v in settled else descend(problem, (v, f))
                    if fell < VIEW_ENOUGH * begin / count / len(order):
                        settled.add(v)
                    history.add((sweep, f, v), fell)
                    on_step(sweep, f)
                if begin - history.total[-1] < ROUND_ENOUGH * begin / count:
                    break
        history.terms.append(problem.total())
        if before - history.total[-1] < settings.enough * before:
            break
