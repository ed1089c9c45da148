"""Smoothing and sampling in turn on Turnaround-Tiny, for tests/evaluate_smooth.py."""

import math
import time
from dataclasses import dataclass, replace

import clip_faults
import evaluate
import evaluate_sync
import in_comfyui
import smooth_ways
import torch
from torch import Tensor

ROUNDS, FIRST, LAST = 3, 0.5, 0.2
"""Of Smooth Loop: rounds, and the noise of the first and of the last one."""
SIZE = (192, 240)
"""What Turnaround-Tiny was trained at; smaller pictures are beyond it."""
FAULT = "together"
COLUMNS = {
    "person": ("PSNR person ↑", 2), "ssim": ("SSIM ↑", 3), "flicker": ("warping ×100 ↓", 2),
    "cross": ("cross-view ×100 ↓", 2), "detail": ("detail %", 1), "seconds": ("s", 0),
}  # fmt: skip


@dataclass(frozen=True)
class Told:
    """Turnaround-Tiny with its sync, and what it is told of a clip."""

    model: object
    vae: object
    positive: list
    negative: list

    @classmethod
    def of(cls, task: evaluate.Task, models) -> "Told":
        from turnaround.nodes import conditioning, patch

        model, vae, sync = models
        positive, negative, _, _, reference = conditioning.MultiViewConditioning.execute(
            vae, task.partial, task.normals, reference=task.source
        ).args
        synced = patch.apply_view_sync(model, sync, strength=1.0, reference=reference["samples"])
        return cls(synced, vae, positive, negative)


def looped(first: Tensor, told: Told) -> Tensor:  # [V, F, 3, H, W]
    """What **Smooth Loop** makes of views."""
    from turnaround.models.views import Views
    from turnaround.nodes.smooth_loop import SmoothLoop

    return SmoothLoop.execute(
        told.model, told.positive, told.negative, told.vae, ROUNDS, FIRST, LAST, evaluate.STEPS,
        1.0, "euler", "simple", evaluate.SEED, "fast", 0, views=Views(first),
    ).args[0].frames  # fmt: skip


def refined(first: Tensor, told: Told) -> Tensor:  # [V, F, 3, H, W]
    """The same without smoothing: as often noised and sampled anew, with the same noise."""
    import comfy.sample
    from turnaround.models.smooth_loop import falling_strengths
    from turnaround.models.views import Views
    from turnaround.nodes import views

    frames = first
    for r, strength in enumerate(falling_strengths(FIRST, LAST, ROUNDS)):
        clips, _ = views.fit_to_vae(Views(frames))
        latents = views.encode_views(told.vae, clips, len(frames))
        noise = comfy.sample.prepare_noise(latents, evaluate.SEED + r)
        samples = comfy.sample.sample(
            told.model, noise, math.ceil(evaluate.STEPS * strength), 1.0, "euler", "simple",
            told.positive, told.negative, latents, denoise=strength, seed=evaluate.SEED + r,
            disable_pbar=True,
        )  # fmt: skip
        frames = views.decode_views(told.vae, samples.split(1)).float().cpu()
    return frames


def flickering(task: evaluate.Task, fault: str) -> evaluate.Task:
    """The task with flicker in the colours that the model is given: so its views flicker, too."""
    from turnaround.models.views import as_pictures

    frames = as_pictures(task.partial)
    spoiled = clip_faults.flickering(frames.flatten(0, 1), fault, evaluate.SEED).view_as(frames)
    return replace(task, partial=replace(task.partial, frames=spoiled))


def after(first: Tensor, task: evaluate.Task, models, name: str) -> dict[str, dict[str, float]]:
    """Scores of what comes after a first pass."""
    told = Told.of(task, models)
    ways = {
        "first pass": lambda x: x,
        "smoothed": smooth_ways.of_fit,
        "sampled anew, not smoothed": lambda x: refined(x, told),
        "loop": lambda x: looped(x, told),
    }
    found = {}
    for way, make in ways.items():
        began = time.monotonic()
        frames = make(first).float().cpu()
        seconds = time.monotonic() - began
        detail = evaluate_sync.detail(frames, task.truth.frames, task.truth.masks)
        scored = evaluate.scores(frames, task) | {"detail": detail, "seconds": seconds}
        evaluate.say(f"  {name}, {way}: {scored['person']:.2f} dB, {scored['flicker']:.2f}")
        found[f"{name}: {way}"] = scored
    return found


@torch.no_grad()
def rows(n: int, amount: evaluate.Amount) -> dict[str, dict[str, float]]:
    """One of evaluate.CLIPS: first passes that flicker, by themselves and for what the model is told."""
    evaluate.SIZE, evaluate.SOURCE_SIZE = SIZE, (2 * SIZE[0], 2 * SIZE[1])
    task = evaluate.synthetic_task(*evaluate.CLIPS[n], evaluate.FIRST_CLOTHES + n, amount)
    models = in_comfyui.tiny_models()

    def sampled(given: evaluate.Task) -> Tensor:
        return evaluate.sampled(given, evaluate.METHODS[0], models).float().cpu()

    steady = sampled(task)
    spoiled = clip_faults.flickering(steady.flatten(0, 1), FAULT, evaluate.SEED).view_as(steady)
    found = after(spoiled, task, models, "its views spoiled")
    worse = flickering(task, FAULT)
    found |= after(sampled(worse), worse, models, "its conditions spoiled")
    ends = {"*sampled, nothing spoiled*": steady, "*the truth*": task.truth.frames}
    for name, frames in ends.items():
        detail = evaluate_sync.detail(frames, task.truth.frames, task.truth.masks)
        found[name] = evaluate.scores(frames, task) | {"detail": detail, "seconds": math.nan}
    return found
