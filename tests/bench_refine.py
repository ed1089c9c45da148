"""What MV-Opt Refine costs: `.venv/bin/python tests/bench_refine.py [--quick]`.

Method
- A synthetic performer, all faults of tests/faults.py together, exact depth and the true keypoints in
  3D; default settings, so that it stops when a round gains nothing, as it does for a creator. One
  clip is drawn, with 16 views x 25 frames of 256x256; others are parts of it, or it scaled.
- One of views, frames, size and the chunk setting changes at a time, around 8 views x 13 frames of
  256x256. Every row is one call in one process, after a warm-up with a small clip: a call takes
  seconds to minutes, and repeats would say little more. "s" is on the clock, "busy" processor time of
  all threads together: other work on the machine delays the one, hardly the other (of an accelerator
  "busy" says nothing). "µs a pixel" is of the clock, by views x frames x pixels.
- Peak memory is what the call needs above what was resident before it (on CUDA: of the allocator);
  the pictures that it is given are not counted, those that it returns are.
- Stages: Python's profiler over one call, by the functions of models/mv_opt*.py and models/pose.py,
  each with what it calls; so shares overlap where one calls another.
"""

import argparse
import cProfile
import math
import os
import pstats
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import evaluate_refine
import torch
from bench_geometry import load_pack, machine, resident, seconds_of, start_counting
from torch import Tensor

MOST_VIEWS, MOST_FRAMES, SIZE = 16, 25, 256
VIEWS, FRAMES = 8, 13
GROWTH = {"views": (4, 8, 16), "frames": (7, 13, 25), "size": (128, 256, 512)}
CHUNKS = (1, 4, 16)
GOAL = 60.0
"""Seconds for 8 views x 13 frames of 256x256 on two cores."""
STAGES, LEAST_SHARE = ("mv_opt", "pose"), 0.02
"""How files begin whose functions are listed, and the share below which one is left out."""


@dataclass(frozen=True)
class Scene:
    """What the refiner is given."""

    views: object
    depth: Tensor  # [V, F, H, W] metres
    pose: object


def draw(views: int, frames: int, size: int) -> Scene:
    """A performer with all faults."""
    from turnaround.models.cameras import orbit_angles, orbit_rig
    from turnaround.models.performer import draw_appearance, pose_performer, render_performer
    from turnaround.models.performer_truth import KEYPOINTS, keypoints_3d, project_keypoints
    from turnaround.models.pose import Pose
    from turnaround.models.views import Views

    look = draw_appearance(7)
    posed = pose_performer("kira", "dance_a", torch.arange(frames) / 16, look)
    angles = orbit_angles(views, 0.0, 2 * math.pi, 0.0)
    rig = orbit_rig(*angles, 4.1, math.radians(35), size, size)
    clip = render_performer(posed, look, rig)
    points = keypoints_3d(posed)
    hands = project_keypoints(points, rig)[0][:, :, KEYPOINTS.index("wrist.L")]
    faulty = evaluate_refine.faulty(clip.frames, hands, evaluate_refine.ALL)
    pose = Pose(points, torch.ones(points.shape[:2]), None, None, KEYPOINTS)
    return Scene(Views(faulty, clip.masks, rig, 16.0), clip.depth, pose)


def part(scene: Scene, views: int, frames: int, size: int) -> Scene:
    """Fewer views, evenly spread, and frames, at another size."""
    from torch.nn.functional import interpolate
    from turnaround.models.pose import Pose
    from turnaround.models.views import Views, resize_frames

    chosen = list(range(0, len(scene.views), len(scene.views) // views))

    def scaled(pictures: Tensor) -> Tensor:
        cut = pictures[chosen, :frames].clone()
        return torch.stack([resize_frames(view, size, size) for view in cut])

    full = scene.views
    # Depth is taken, never mixed: a mean of two surfaces lies on neither.
    depth = interpolate(scene.depth[chosen, :frames], size=(size, size), mode="nearest-exact")
    masks = scaled(full.masks[:, :, None])[:, :, 0]
    rig = full.rig.select(chosen).resized(size, size)
    pose = Pose(scene.pose.points[:frames], scene.pose.found[:frames], None, None, scene.pose.names)
    return Scene(Views(scaled(full.frames), masks, rig, full.fps), depth, pose)


def call(scene: Scene, device: torch.device, **settings) -> Callable[[], object]:
    from turnaround.models.mv_opt import Settings, refine

    views = scene.views
    views = replace(views, frames=views.frames.to(device), masks=views.masks.to(device))
    depth = scene.depth.to(device)
    return lambda: refine(views, depth, scene.pose, None, Settings(**settings))


@dataclass(frozen=True)
class Cost:
    """Of one call."""

    seconds: float
    busy: float
    peak: float | None
    """MiB on top; None where this system can't tell."""


def cost(way: Callable, device: torch.device) -> Cost:
    before = start_counting(device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
    kept = []
    seconds, busy = seconds_of(lambda: kept.append(way()))
    if device.type == "cuda":
        return Cost(seconds, busy, (torch.cuda.max_memory_allocated() - before) / 2**20)
    peak = None if before is None else max(0.0, resident("VmHWM") - before) / 2**20
    return Cost(seconds, busy, peak)


def row(name: str, scene: Scene, device: torch.device, **settings) -> Cost:
    """Measure and print one line."""
    taken = cost(call(scene, device, **settings), device)
    V, count, _, H, W = scene.views.frames.shape
    peak = "–" if taken.peak is None else f"{taken.peak:.0f}"
    print(
        f"{name:34} {taken.seconds:8.1f} {taken.busy:8.1f} "
        f"{1e6 * taken.seconds / (V * count * H * W):10.2f} {peak:>9}",
        flush=True,
    )
    return taken


def stages(scene: Scene, device: torch.device) -> None:
    """Which functions the time goes to."""
    profile = cProfile.Profile()
    profile.runcall(call(scene, device))
    table = pstats.Stats(profile)
    print("\nStages (share of the call, each with what it calls)")
    found = [
        (whole / table.total_tt, Path(file).name, name)
        for (file, _, name), (_, _, _, whole, _) in table.stats.items()
        if Path(file).name.startswith(STAGES) and not name.startswith("<")
    ]
    for share, file, name in sorted(found, reverse=True):
        if share >= LEAST_SHARE:
            print(f"{file.removesuffix('.py') + '.' + name:42} {100 * share:5.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of MV-Opt Refine.")
    parser.add_argument("--quick", action="store_true", help="4 views x 5 frames of 128x128 alone")
    quick = parser.parse_args().quick
    threads = torch.get_num_threads()
    load_pack()
    torch.set_num_threads(threads)  # the tests keep to two
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{machine(device)}, {threads} of {os.cpu_count()} threads, torch {torch.__version__}")
    with torch.inference_mode():
        if quick:
            scene = draw(4, 5, 128)
        else:
            print(f"Drawing {MOST_VIEWS} views x {MOST_FRAMES} frames of {SIZE}x{SIZE}", flush=True)
            scene = draw(MOST_VIEWS, MOST_FRAMES, SIZE)
        call(part(scene, 4, 3, 64), device)()
        print(f"\n{'':34} {'s':>8} {'busy':>8} {'µs a pixel':>10} {'peak MiB':>9}")
        if quick:
            row("4 views x 5 frames of 128x128", scene, device)
            stages(scene, device)
            return
        usual = part(scene, VIEWS, FRAMES, SIZE)
        taken = row(f"{VIEWS} views x {FRAMES} frames of {SIZE}x{SIZE}", usual, device)
        for views in GROWTH["views"]:
            if views != VIEWS:
                row(f"{views} views", part(scene, views, FRAMES, SIZE), device)
        for frames in GROWTH["frames"]:
            if frames != FRAMES:
                row(f"{frames} frames", part(scene, VIEWS, frames, SIZE), device)
        for size in GROWTH["size"]:
            if size != SIZE:
                row(f"{size}x{size}", part(scene, VIEWS, FRAMES, size), device)
        for chunk in CHUNKS:
            row(f"chunk {chunk}", usual, device, chunk=chunk)
        stages(usual, device)
        met = "met" if taken.seconds <= GOAL else "missed"
        print(f"\nGoal: at most {GOAL:.0f} s on two cores: {met} ({taken.seconds:.1f} s)")


if __name__ == "__main__":
    main()
