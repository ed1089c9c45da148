"""Ways to take flicker out of a clip, for tests/evaluate_smooth.py: the pack's, and what stands beside.

A way takes a clip [V, F, 3, H, W] and gives one of the same shape; nothing is told it of the clean
clip. Nothing knows the masks.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from evaluate_refine import of_flow_blend
from torch import Tensor

Way = Callable[[Tensor], Tensor]
SEED = 5


def of_median(frames: Tensor, reach: int) -> Tensor:
    """Every pixel's middle value of 2 reach + 1 frames; the ends are repeated."""
    count = frames.shape[1]
    around = torch.arange(count)[:, None] + torch.arange(-reach, reach + 1)
    return frames[:, around.clamp(0, count - 1)].median(2).values


def of_blend(frames: Tensor) -> Tensor:
    """A Gaussian mean over time along the DIS flow of the flickering pictures themselves."""
    return of_flow_blend(frames, None)


def of_deflicker(frames: Tensor) -> Tensor:
    from turnaround.models.deflicker import deflicker

    return torch.stack([deflicker(view).frames for view in frames])


def of_fit(frames: Tensor, **others) -> Tensor:
    """*Implicit Video Fit*, by default as its node has it; `others` are of ImplicitFit."""
    from turnaround.models.implicit_fit import ImplicitFit

    fit = ImplicitFit(frames, seed=SEED, **others)
    fit.steps(fit.planned)
    return fit.render()


def of_fields(frames: Tensor) -> Tensor:
    """The same, what the fields say alone: without the detail that lasts along the motion."""
    from turnaround.models.implicit_fit import ImplicitFit

    fit = ImplicitFit(frames, seed=SEED)
    fit.steps(fit.planned)
    return fit.video.render(range(fit.video.count))


WARM_UP, PROBE = 2, 3
"""Steps that are taken, and then timed, before CoDeF's schedule is laid into its time."""


def of_codef(frames: Tensor, seconds: float, **others) -> tuple[Tensor, int]:
    """CoDeF's published sizes and losses, given so much time; pictures and steps.

    It starts from noise. Its schedule (learning rate, annealing) is shrunk to the steps that the time
    allows; timing a step, preparing and rendering are not counted. `others` are of its settings.
    """
    from turnaround.models.implicit_fit import PAPER, ImplicitFit

    settings = replace(PAPER, **others)
    probe = ImplicitFit(frames, settings, seed=SEED)
    probe.steps(WARM_UP)
    began = time.monotonic()
    probe.steps(PROBE)
    planned = max(1, int(seconds * PROBE / (time.monotonic() - began)))
    fit = ImplicitFit(frames, replace(settings, steps=planned), flow=probe.material.flow, seed=SEED)
    began = time.monotonic()
    while fit.done < planned and time.monotonic() - began < seconds:
        fit.steps(1)
    return fit.render(), fit.done


SIMPLE: dict[str, Way] = {
    "median of 3 frames": lambda frames: of_median(frames, 1),
    "median of 5 frames": lambda frames: of_median(frames, 2),
    "blended along optical flow": of_blend,
}
