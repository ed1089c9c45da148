"""Seconds a step and peak memory of synchronised sampling: `.venv/bin/python tests/bench_sampling.py`.

Turnaround-Tiny, 8 views x 13 frames at 192x240, against what a creator would do without the pack:
ComfyUI's KSampler, once a view. Each way runs in turn, three times; the median counts.
"""

import platform
import resource
import statistics
import time

import in_comfyui
import torch

VIEWS, STEPS = 8, 4
SHAPE = (VIEWS, 16, 4, 30, 24)


def sample(model, conditions, samples) -> None:
    import comfy.sample

    noise = comfy.sample.prepare_noise(samples, 0)
    text = [[torch.zeros(1, 1, 4096), {"concat_latent_image": conditions}]]
    comfy.sample.sample(
        model, noise, STEPS, 1.0, "euler", "simple", text, text, samples, disable_pbar=True
    )


def main() -> None:
    in_comfyui.start()
    from turnaround.nodes import patch

    with torch.inference_mode():
        model, _, sync = in_comfyui.tiny_models()
        conditions = torch.randn(VIEWS, 32, *SHAPE[2:], generator=torch.Generator().manual_seed(0))
        empty = torch.zeros(SHAPE)

        def one_by_one() -> None:
            for v in range(VIEWS):
                sample(model, conditions[v : v + 1], empty[v : v + 1])

        ways = {
            "KSampler, view by view": one_by_one,
            "all views, no sync": lambda: sample(model, conditions, empty),
            "trained sync": lambda: sample(patch.apply_view_sync(model, sync), conditions, empty),
            "training-free sync": lambda: sample(patch.apply_view_sync(model), conditions, empty),
        }
        seconds = {name: [] for name in ways}
        for round_ in range(4):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                if round_:  # the first one warms up
                    seconds[name].append((time.perf_counter() - start) / STEPS)
    base = statistics.median(seconds["KSampler, view by view"])
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    print(
        f"{where or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:24} {median:.3f} s a step, {median / base:.2f} x")
    if torch.cuda.is_available():
        print(f"peak CUDA memory {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")
    else:
        print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
