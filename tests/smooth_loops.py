"""Smoothing and sampling in turn on Turnaround-Tiny, for tests/evaluate_smooth.py."""

import math
import time
from dataclasses import replace

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


def looped(task: evaluate.Task, single: Tensor, models) -> tuple[Tensor, Tensor]:
    """What **Smooth Loop** makes of sampled views, with the model, the conditioning and the sync that
    they were sampled with: the result, and the smoothed frames that its last round began with."""
    from turnaround.models.views import Views
    from turnaround.nodes import conditioning, patch, smooth_loop

    model, vae, sync = models
    positive, negative, _, _, reference = conditioning.MultiViewConditioning.execute(
        vae, task.partial, task.normals, reference=task.source
    ).args
    synced = patch.apply_view_sync(model, sync, strength=1.0, reference=reference["samples"])
    result, _, smoothed, *_ = smooth_loop.SmoothLoop.execute(
        synced, positive, negative, vae, ROUNDS, FIRST, LAST, evaluate.STEPS, 1.0, "euler",
        "simple", evaluate.SEED, "fast", 0, views=Views(single, None, task.rig, task.truth.fps),
    ).args  # fmt: skip
    return result.frames, smoothed.frames


def flickering(task: evaluate.Task, fault: str) -> evaluate.Task:
    """The task with flicker in the colours that the model is given: so its views flicker, too."""
    from turnaround.models.views import as_pictures

    frames = as_pictures(task.partial)
    spoiled = clip_faults.flickering(frames.flatten(0, 1), fault, evaluate.SEED).view_as(frames)
    return replace(task, partial=replace(task.partial, frames=spoiled))


def of_task(task: evaluate.Task, models, name: str) -> dict[str, dict[str, float]]:
    """Scores of views sampled once, and in turn with smoothing."""
    began = [time.monotonic()]
    single = evaluate.sampled(task, evaluate.METHODS[0], models).float().cpu()
    began.append(time.monotonic())
    smooth = smooth_ways.of_fit(single)
    began.append(time.monotonic())
    result, before = looped(task, single, models)
    began.append(time.monotonic())
    once, smoothing, turns = (b - a for a, b in zip(began[:-1], began[1:], strict=True))
    pictures = {
        "single pass": (single, once),
        "single pass, smoothed": (smooth, once + smoothing),
        "what the loop's last round began with": (before, math.nan),
        "loop": (result, once + turns),
    }
    found = {}
    for way, (frames, seconds) in pictures.items():
        detail = evaluate_sync.detail(frames, task.truth.frames, task.truth.masks)
        scored = evaluate.scores(frames, task) | {"detail": detail, "seconds": seconds}
        evaluate.say(f"  {name}, {way}: {scored['person']:.2f} dB, {scored['flicker']:.2f}")
        found[f"{name}: {way}"] = scored
    return found


@torch.no_grad()
def rows(n: int, amount: evaluate.Amount) -> dict[str, dict[str, float]]:
    """One of evaluate.CLIPS: with the colours as they are drawn, and with flickering ones."""
    evaluate.SIZE, evaluate.SOURCE_SIZE = SIZE, (2 * SIZE[0], 2 * SIZE[1])
    task = evaluate.synthetic_task(*evaluate.CLIPS[n], evaluate.FIRST_CLOTHES + n, amount)
    models = in_comfyui.tiny_models()
    found = of_task(task, models, "as drawn")
    found |= of_task(flickering(task, FAULT), models, f"given {FAULT}")
    truth = evaluate.scores(task.truth.frames, task)
    return found | {"*the truth*": truth | {"detail": 100.0, "seconds": math.nan}}
