"""What view sync costs: `.venv/bin/python tests/bench_sampler.py [--quick]`.

Method
- Turnaround-Tiny at its own size, 8 views x 13 frames of 192x240, through ComfyUI's own sampler
  (euler). The ways run in turn in one process; after a warm-up the median of the rounds counts.
  "s a step" is on the clock, "busy" processor time of all threads together: other work on the
  machine delays the one, hardly the other (of an accelerator "busy" says nothing).
- Every cost is a ratio to the same model with all views in one batch and no sync, which computes the
  views one by one, too: "of no sync". "of one by one" is the ratio to what a creator would do
  without the pack, KSampler once a view. Ratios are of the clock, "busy of it" of processor time.
- Peak memory is what one call needs above what was resident before it (on CUDA: of the allocator),
  weights not counted.
- Growth: one step, with 1, 2, 4, 8 and 16 views of 13 frames, and with 1, 4, 7 and 13 latent frames
  of 4 views. A way that has used up its seconds sits out the remaining rounds.
- On CUDA the same once more with random weights in the shape of Wan2.1-1.3B (dim 1536, 12 heads), at
  832x480 and 81 frames: two of its 30 blocks, each with a sync layer, so that the ratios hold for
  all.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import in_comfyui
import torch
from bench_geometry import Taken, machine, race, resident, start_counting
from torch import Tensor

VIEWS, LATENT = 8, (4, 30, 24)
"""T, h, w of 13 frames of 192x240."""
GROWTH_VIEWS, GROWTH_FRAMES = (1, 2, 4, 8, 16), (1, 4, 7, 13)
FRAMES_VIEWS = 4
"""Views while frames grow: dense attention over 8 of 49 frames would take minutes."""
WAN_LATENT, WAN_BLOCKS = (21, 60, 104), 2
GOAL = 1.3
ONE_BY_ONE, NO_SYNC = "KSampler, view by view", "all views, no sync"


def sample(model, conditions: Tensor | None, samples: Tensor, steps: int) -> None:
    import comfy.sample

    noise = comfy.sample.prepare_noise(samples, 0)
    extra = {} if conditions is None else {"concat_latent_image": conditions}
    text = [[torch.zeros(1, 1, 4096), extra]]
    comfy.sample.sample(
        model, noise, steps, 1.0, "euler", "simple", text, text, samples, disable_pbar=True
    )


def ways_to_sample(
    model,
    sync,
    views: int,
    latent: tuple[int, int, int],  # T, h, w
    steps: int,
    told: int = 32,  # channels of the conditions
) -> dict[str, Callable]:
    """Every way of sampling so many views, by its name."""
    from turnaround.nodes import patch

    generator = torch.Generator().manual_seed(0)
    conditions = torch.randn(views, told, *latent, generator=generator) if told else None
    empty = torch.zeros(views, 16, *latent)
    weights = torch.linspace(1.0, 0.4, views)

    def one_by_one() -> None:
        for v in range(views):
            part = None if conditions is None else conditions[v : v + 1]
            sample(model, part, empty[v : v + 1], steps)

    def synced(weights_of_sync, mode: str) -> Callable:
        extra = {"weights": weights} if mode == "weighted" else {}
        patched = patch.apply_view_sync(model, weights_of_sync, mode=mode, **extra)
        return lambda: sample(patched, conditions, empty, steps)

    modes = ("frame", "dense", "weighted")
    return {
        ONE_BY_ONE: one_by_one,
        NO_SYNC: lambda: sample(model, conditions, empty, steps),
        **{f"trained, {mode}": synced(sync, mode) for mode in modes},
        **{f"training-free, {mode}": synced(None, mode) for mode in modes},
    }


def peak_of(way: Callable) -> float | None:
    """MiB that one call needs on top; None where this system can't tell."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = start_counting(device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        way()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    way()
    return None if before is None else max(0.0, resident("VmHWM") - before) / 2**20


def report(ways: dict[str, Callable], steps: int, repeats: int) -> dict[str, Taken]:
    """One table: every way's time, its ratios and its memory."""
    results = race(ways, repeats)
    peaks = {name: peak_of(ways[name]) for name in results}
    print(f"{'':24} s a step   busy  of no sync  busy of it  of one by one  peak MiB")
    plain, apart = results[NO_SYNC], results[ONE_BY_ONE]
    for name, taken in results.items():
        peak = "–" if peaks[name] is None else f"{peaks[name]:.0f}"
        print(
            f"{name:24} {taken.median / steps:8.3f} {taken.busy / steps:6.2f} "
            f"{taken.median / plain.median:11.2f} {taken.busy / plain.busy:11.2f} "
            f"{taken.median / apart.median:14.2f} {peak:>9}"
        )
    return results


def growth(title: str, model, sync, sizes: list[tuple[str, int, tuple]], repeats: int) -> None:
    """Seconds of one step, and their ratio to no sync, for every size."""
    print(f"\n{title}: s a step (ratio to no sync)")
    for n, (name, views, latent) in enumerate(sizes):
        ways = ways_to_sample(model, sync, views, latent, steps=1)
        ways = {k: way for k, way in ways.items() if k != ONE_BY_ONE and "weighted" not in k}
        results = race(ways, repeats)
        if n == 0:
            print(f"{'':18}" + "".join(f"{k.replace('training-', ''):>20}" for k in results))
        base = results[NO_SYNC].median
        cells = (f"{t.median:.3f} ({t.median / base:.2f})" for t in results.values())
        print(f"{name:18}" + "".join(f"{c:>20}" for c in cells))


def wan_shaped(blocks: int, dim: int = 1536, ffn_dim: int = 8960):
    """Random weights in the shape of Wan2.1-1.3B as ComfyUI loads them, and sync layers for it."""
    import comfy.ops
    import comfy.sd
    from comfy.ldm.wan.model import WanModel
    from safetensors.torch import save_file
    from small_checkpoints import random_weights
    from turnaround.models.view_sync import ViewSync
    from turnaround.nodes import patch

    network = WanModel(
        model_type="t2v", dim=dim, ffn_dim=ffn_dim, num_heads=dim // 128, num_layers=blocks,
        operations=comfy.ops.disable_weight_init, dtype=torch.float32,
    )  # fmt: skip
    model = comfy.sd.load_diffusion_model_state_dict(random_weights(network))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random_sync.safetensors"
        weights = random_weights(ViewSync(dim, range(blocks)))
        save_file({k: v.half() for k, v in weights.items()}, path)
        return model, patch.load_sync(str(path))


def at_real_size(repeats: int, latent=WAN_LATENT, views: int = VIEWS, blocks: int = WAN_BLOCKS):
    tokens = latent[0] * latent[1] * latent[2] // 4
    print(f"\nWan2.1-1.3B's shape, {blocks} blocks: {views} views x {tokens:,} tokens")
    model, sync = wan_shaped(blocks)
    report(ways_to_sample(model, sync, views, latent, steps=1, told=0), 1, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of view sync.")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="2 rounds of one step, no growth")
    chosen = parser.parse_args()
    repeats, steps = (2, 1) if chosen.quick else (chosen.repeats, 2)
    threads = torch.get_num_threads()
    in_comfyui.start()
    torch.set_num_threads(threads)  # the tests keep to two
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    T, h, w = LATENT
    print(
        f"{machine(device)}, {threads} of {os.cpu_count()} threads, torch {torch.__version__}\n"
        f"Turnaround-Tiny: {VIEWS} views x {4 * T - 3} frames of {8 * w}x{8 * h}; median of "
        f"{repeats} rounds, all in turn after a warm-up"
    )
    with torch.inference_mode():
        model, _, sync = in_comfyui.tiny_models()
        results = report(ways_to_sample(model, sync, VIEWS, LATENT, steps), steps, repeats)
        frame, plain = results["trained, frame"], results[NO_SYNC]
        print(
            f"trained frame sync: {frame.median / plain.median:.2f} of no sync (busy "
            f"{frame.busy / plain.busy:.2f}); goal: at most {GOAL}"
        )
        if not chosen.quick:
            views = [(f"{v} views", v, LATENT) for v in GROWTH_VIEWS]
            growth(f"Growth with views, {T} latent frames", model, sync, views, 3)
            frames = [(f"{t} latent frames", FRAMES_VIEWS, (t, h, w)) for t in GROWTH_FRAMES]
            growth(f"Growth with frames, {FRAMES_VIEWS} views", model, sync, frames, 3)
        if torch.cuda.is_available():
            at_real_size(repeats)


if __name__ == "__main__":
    main()
