"""Smoothing and sampling in turn: each corrects what the other can't (DiffPerformer Sec. 4.3).

The implicit video knows that things move without flicker, the diffusion model what they look like.
So the smoothed frames V_s, noised, are where the model begins anew, and what it makes of them, V_p,
is what the smoother fits next, with less and less noise. The last V_p is the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Fit(Protocol):
    """What the loop asks of a smoother; it keeps its optimiser's state between the calls."""

    def steps(self, count: int, on_step: Callable[..., None] | None = None) -> None: ...

    def render(self) -> Tensor: ...  # [V, F, 3, H, W] 0..1

    def retarget(self, frames: Tensor) -> None: ...  # [V, F, 3, H, W]


@dataclass(frozen=True)
class Looped:
    """What the last round made."""

    refined: Tensor
    """[V, F, 3, H, W] 0..1, V_p: the result."""
    smoothed: Tensor
    """[V, F, 3, H, W] 0..1, V_s: what the last refinement began with."""


def falling_strengths(first: float, last: float, rounds: int) -> tuple[float, ...]:
    """Noise of every round, in even steps from the first to the last; one round takes the last.

    The paper says that it falls, not from where to where.
    """
    if rounds == 1:
        return (last,)
    return tuple(first + (last - first) * r / (rounds - 1) for r in range(rounds))


def smooth_loop(
    fit: Fit,
    refine: Callable[[Tensor, float, int], Tensor],  # V_s, strength, round -> V_p
    strengths: Sequence[float],
    steps: int,  # of the fit, before every refinement
    on_fit: Callable[[], Callable[..., None] | None] = lambda: None,
) -> Looped:
    """Fit V_s to V_p, refine V_s into a new V_p, as often as there are strengths.

    `on_fit` gives the callback for the steps of the round that begins.
    """
    for r, strength in enumerate(strengths):
        fit.steps(steps, on_fit())
        smoothed = fit.render()
        refined = refine(smoothed, strength, r)
        if r + 1 < len(strengths):
            fit.retarget(refined)
    return Looped(refined, smoothed)
