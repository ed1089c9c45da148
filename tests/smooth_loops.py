"""Smoothing and sampling in turn on Turnaround-Tiny, for tests/evaluate_smooth.py."""

import time

import evaluate
import evaluate_sync
import in_comfyui
import smooth_ways
import torch
from torch import Tensor

ROUNDS, FIRST, LAST = 3, 0.5, 0.2
"""Of Smooth Loop: rounds, and the noise of the first and of the last one."""
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


@torch.no_grad()
def rows(n: int, amount: evaluate.Amount, size: tuple[int, int]) -> dict[str, dict[str, float]]:
    """Scores of one of evaluate.CLIPS, sampled once and in turn with smoothing."""
    evaluate.SIZE, evaluate.SOURCE_SIZE = size, (2 * size[0], 2 * size[1])
    task = evaluate.synthetic_task(*evaluate.CLIPS[n], evaluate.FIRST_CLOTHES + n, amount)
    models = in_comfyui.tiny_models()
    began = [time.monotonic()]
    single = evaluate.sampled(task, evaluate.METHODS[0], models).float().cpu()
    began.append(time.monotonic())
    smooth = smooth_ways.of_fit(single)
    began.append(time.monotonic())
    result, before = looped(task, single, models)
    began.append(time.monotonic())
    seconds = [b - a for a, b in zip(began[:-1], began[1:], strict=True)]
    pictures = {
        "single pass": (single, seconds[0]),
        "single pass, smoothed": (smooth, sum(seconds[:2])),
        "loop, what its last round began with": (before, float("nan")),
        "loop": (result, seconds[0] + seconds[2]),
        "*the truth*": (task.truth.frames, float("nan")),
    }
    found = {}
    for name, (frames, spent) in pictures.items():
        detail = evaluate_sync.detail(frames, task.truth.frames, task.truth.masks)
        found[name] = evaluate.scores(frames, task) | {"detail": detail, "seconds": spent}
        evaluate.say(f"  {name}: {found[name]['person']:.2f} dB, {found[name]['flicker']:.2f}")
    return found
