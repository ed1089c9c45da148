"""The order of the loop, and how its noise falls."""

import pytest
import torch
from torch import Tensor
from turnaround.models.smooth_loop import falling_strengths, smooth_loop


def test_strengths_fall_evenly():
    assert falling_strengths(0.6, 0.2, 5) == pytest.approx((0.6, 0.5, 0.4, 0.3, 0.2))
    assert falling_strengths(0.6, 0.2, 2) == pytest.approx((0.6, 0.2))
    assert falling_strengths(0.6, 0.2, 1) == (0.2,)


class Halving:
    """A smoother whose steps each go half the way to its target, and that writes down what it did."""

    def __init__(self, frames: Tensor) -> None:
        self.shown, self.target, self.log = torch.zeros_like(frames), frames, []

    def steps(self, count: int, on_step=None) -> None:
        for n in range(count):
            self.shown = (self.shown + self.target) / 2
            if on_step:
                on_step(n + 1, count)
        self.log.append(f"fit {count}")

    def render(self) -> Tensor:
        self.log.append("render")
        return self.shown

    def retarget(self, frames: Tensor) -> None:
        self.target = frames
        self.log.append("retarget")


def test_fit_and_refinement_take_turns():
    """By hand: 1 - 1/4 = 0.75, refined 1.75; half the way to it twice: 1.5, refined 2.5."""
    fit, seen, rounds = Halving(torch.ones(1, 2, 3, 4, 4)), [], []

    def refine(smoothed: Tensor, strength: float, r: int) -> Tensor:
        seen.append((strength, r, float(smoothed.mean())))
        fit.log.append("refine")
        return smoothed + 1

    def on_fit():
        rounds.append([])
        return lambda done, total: rounds[-1].append((done, total))

    made = smooth_loop(fit, refine, (0.6, 0.2), 2, on_fit)
    assert fit.log == ["fit 2", "render", "refine", "retarget", "fit 2", "render", "refine"]
    assert seen == [(0.6, 0, 0.75), (0.2, 1, 1.5)]
    assert float(made.smoothed.mean()) == 1.5 and float(made.refined.mean()) == 2.5
    assert rounds == [[(1, 2), (2, 2)]] * 2
