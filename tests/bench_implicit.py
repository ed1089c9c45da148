"""What fitting an implicit video costs: `.venv/bin/python tests/bench_implicit.py [--quick]`.

The peer, nerfstudio's hash encoding in plain torch, is fetched into the cache (its one file; what
that imports beside torch and numpy is replaced by empty names). On CUDA tiny-cuda-nn takes part too
where it is installed.

Method
- CoDeF's published size: a canonical field in 2D (16 levels x 2 features, 2^19 entries each, 16 cells
  on the coarsest, 1.44 times more on each finer one; MLP 64 x 2) and a deformation field in 3D (the
  same, 1.38; MLP 64 x 8). A step takes all pixels of one frame of 256x256. And the pack's default
  size, where a step takes a patch.
- Encoding: the pixels of a frame at one time (3D), and the same a little astray (2D) with the
  gradient of the places, which the deformation learns from; the features' gradient is noise. Of ours
  both ways; nerfstudio's is 3D only, so it reads a plane of a cube. "fwd" has no gradients, "both" is
  forward and backward. A fresh gradient a call, as an optimiser's step leaves it.
- Step: both fields as the pack has them (models/implicit_video.py), mean absolute error to a frame,
  backward, fused Adam. Contenders differ in the encoding alone: MLPs and optimiser are the same.
- All contenders run in turn in one process, on as many threads as torch has (OMP_NUM_THREADS); after
  a warm-up, in which numba compiles, the median of the rounds counts. "busy" is processor time of all
  threads together: other work on the machine delays the clock, hardly this (of an accelerator it says
  nothing). A contender that has used up its seconds sits out the remaining rounds.
- Whole fits: a drawn performer of 8 frames of 128x160; the default size trains for some seconds, the
  published one ten times as long, both from noise and both from what flow tells (the warm start,
  models/implicit_start.py). From noise the default also with one canonical picture a shot, as the
  published one has: pieces share the steps, and count on the warm start. The learning rate falls over
  the steps that the time allows; what is prepared before the first step is not counted. PSNR of what
  the fields say to the clip itself.
- Floor: the bytes that must move at least once, through the bandwidth that this machine shows when
  torch copies a tensor larger than its caches. Forward reads the points and every entry that a corner
  falls on, and writes the features; backward reads the points and the features' gradient, writes the
  whole gradient of the table and, in 2D, reads the entries again and writes the points' gradient.
"""

import argparse
import importlib.util
import os
import sys
import time
import types
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import in_comfyui
import torch
from bench_geometry import COPIED, Taken, load_pack, machine, race
from torch import Tensor, nn

SIDE, FRAMES = 256, 16
WARM_UP, PROBE = 2, 3
"""Steps that are taken, and then timed, to know how many the time of a whole fit allows."""
PACKAGE = "nerfstudio==1.1.5"  # Apache-2.0
SOURCE = "nerfstudio/field_components/encodings.py"
OURS, IN_TORCH, PEER, ON_CUDA = (
    "Turnaround",
    "Turnaround, plain torch",
    "nerfstudio",
    "tiny-cuda-nn",
)
GOAL = 3.0
"""Optimisation steps of the published size in the time that nerfstudio's encoding takes for one."""


# The contenders: each is a layer [N, dims] -> [N, levels * features]


def nerfstudio_source() -> Path:
    """The encoding's file, in the cache."""
    dev = sys.modules.get("turnaround_dev") or in_comfyui._load(
        "turnaround_dev", in_comfyui.HERE.parent / "dev.py"
    )
    target = dev.cache_folder() / PACKAGE.replace("==", "-") / Path(SOURCE).name
    if target.exists():
        return target
    downloads = dev.cache_folder() / "downloads"
    dev.run_visibly(
        "Fetching nerfstudio (without what it needs)",
        [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(downloads), PACKAGE],
    )
    wheel_file = next(downloads.glob("nerfstudio-*.whl"))
    target.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel_file) as wheel:
        target.write_bytes(wheel.read(SOURCE))
    wheel_file.unlink()
    return target


def nerfstudio_encoding() -> type[nn.Module]:
    """Its class, without the package around it."""

    class Shape:
        def __class_getitem__(cls, _):
            return cls

    class FieldComponent(nn.Module):
        def __init__(self, in_dim=None, out_dim=None) -> None:
            super().__init__()

    stand_ins = {
        "jaxtyping": {"Float": Shape, "Int": Shape, "Shaped": Shape},
        "nerfstudio": {},
        "nerfstudio.field_components": {},
        "nerfstudio.field_components.base_field_component": {"FieldComponent": FieldComponent},
        "nerfstudio.utils": {},
        "nerfstudio.utils.external": {"TCNN_EXISTS": False, "tcnn": None},
        "nerfstudio.utils.math": dict.fromkeys(
            ("components_from_spherical_harmonics", "expected_sin", "generate_polyhedron_basis")
        ),
        "nerfstudio.utils.printing": {"print_tcnn_speed_warning": None},
    }
    source = nerfstudio_source()
    for name, names in stand_ins.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(names)
    spec = importlib.util.spec_from_file_location("nerfstudio_encodings", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in stand_ins:
        del sys.modules[name]
    return module.HashEncoding


class Nerfstudio(nn.Module):
    def __init__(self, dims: int, size) -> None:
        super().__init__()
        finest = int(size.base * size.scale ** (size.levels - 1))
        self.grid = nerfstudio_encoding()(
            size.levels, size.base, finest, size.log2_size, size.features, implementation="torch"
        )

    def forward(self, points: Tensor) -> Tensor:
        if points.shape[1] == 2:
            points = torch.cat([points, torch.zeros_like(points[:, :1])], 1)
        return self.grid(points)


class TinyCudaNN(nn.Module):
    def __init__(self, dims: int, size) -> None:
        super().__init__()
        import tinycudann

        settings = {
            "otype": "HashGrid", "n_levels": size.levels, "n_features_per_level": size.features,
            "log2_hashmap_size": size.log2_size, "base_resolution": size.base,
            "per_level_scale": size.scale,
        }  # fmt: skip
        self.grid = tinycudann.Encoding(dims, settings, dtype=torch.float32)

    def forward(self, points: Tensor) -> Tensor:
        return self.grid(points)


class Ours(nn.Module):
    """As the pack chooses, or in plain torch."""

    def __init__(self, dims: int, size, plain: bool = False) -> None:
        super().__init__()
        from turnaround.models.hash_grid import HashGrid

        self.grid = HashGrid(
            dims, size.levels, size.features, size.log2_size, size.base, size.scale
        )
        self.plain = plain

    def forward(self, points: Tensor) -> Tensor:
        from turnaround.models import hash_grid

        if not self.plain:
            return self.grid(points)
        usual = hash_grid.fastest_way
        hash_grid.fastest_way = lambda *_: "torch"
        found = self.grid(points)
        hash_grid.fastest_way = usual
        return found


def plain_ours(dims: int, size) -> nn.Module:
    return Ours(dims, size, plain=True)


def contenders(device: torch.device) -> dict[str, Callable[..., nn.Module]]:
    """Those that can be made here."""
    from turnaround.models.implicit_fit import FAST

    found = {OURS: Ours, IN_TORCH: plain_ours, PEER: Nerfstudio}
    if device.type == "cuda":
        found[ON_CUDA] = TinyCudaNN
    for name, make in list(found.items()):
        try:
            make(3, FAST.deformation)
        except (SystemExit, Exception) as reason:  # not installed, not to be had, changed
            print(f"  {name}: left out, {str(reason).splitlines()[-1]}")
            del found[name]
    return found


# What is measured


def pixels(side: int, device: torch.device) -> Tensor:  # [side * side, 2] 0..1
    along = (torch.arange(side, device=device) + 0.5) / side
    return torch.stack(torch.meshgrid(along, along, indexing="xy"), -1).view(-1, 2)


def places_of(dims: int, device: torch.device) -> Tensor:  # [N, dims] 0..1
    """What a frame asks the deformation for (3D), and the canonical picture (2D)."""
    points = pixels(SIDE, device)
    if dims == 3:
        return torch.cat([points, torch.full_like(points[:, :1], 0.37)], 1)
    astray = torch.randn(points.shape, generator=torch.Generator().manual_seed(1))
    return ((points + 2e-3 * astray.to(device) + 0.3) / 1.6).requires_grad_()


def forward(layer: nn.Module, points: Tensor) -> Callable[[], None]:
    @torch.no_grad()
    def call() -> None:
        layer(points)

    return call


def both(layer: nn.Module, points: Tensor) -> Callable[[], None]:
    shape = len(points), layer(points[:1]).shape[1]
    pull = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(points.device)

    def call() -> None:
        layer.zero_grad(set_to_none=True)
        points.grad = None
        layer(points).backward(pull)

    return call


@dataclass(frozen=True)
class Task:
    """A fit's step."""

    name: str
    canonical: object
    deformation: object
    """FieldSize of the pack."""
    side: int
    """Pixels along a side of what a step looks at."""


def tasks() -> list[Task]:
    from turnaround.models.implicit_fit import FAST, PAPER

    return [
        Task("published", PAPER.canonical, PAPER.deformation, PAPER.patch or SIDE),
        Task("default", FAST.canonical, FAST.deformation, FAST.patch or SIDE),
    ]


def stepper(task: Task, make: Callable, device: torch.device) -> Callable[[], None]:
    """A step of a fit to frames of noise: how long it takes does not depend on them."""
    from turnaround.models.implicit_video import DIVISOR, MARGIN, Field

    generator = torch.Generator().manual_seed(0)
    fields = []
    for dims, outputs, size in ((3, 2, task.deformation), (2, 3, task.canonical)):
        # A grid of one entry: the contender takes its place.
        field = Field(dims, outputs, replace(size, log2_size=0), generator, False)
        field.grid = make(dims, size)
        fields.append(field.to(device))
    deformation, canonical = fields
    layers = [*deformation.parameters(), *canonical.parameters()]
    optimiser = torch.optim.Adam(layers, lr=1e-3, fused=True)
    points = pixels(task.side, device)
    frames = torch.rand(FRAMES, len(points), 3, generator=generator).to(device)

    def step() -> None:
        frame = int(torch.randint(FRAMES, (1,), generator=generator))
        moment = torch.full_like(points[:, :1], frame / (FRAMES - 1))
        places = points + deformation(torch.cat([points, moment], 1)) / DIVISOR
        colours = canonical(((places + MARGIN) / (1 + 2 * MARGIN)).clamp(0, 1))
        optimiser.zero_grad(set_to_none=True)
        (colours - frames[frame]).abs().mean().backward()
        optimiser.step()

    return step


def touched(layer: nn.Module, points: Tensor) -> int:
    """Entries of ours that some corner falls on."""
    layer.zero_grad(set_to_none=True)
    layer(points).sum().backward()
    return int((layer.grid.table.grad != 0).any(-1).sum())


def floors(layer: nn.Module, points: Tensor) -> tuple[float, float]:
    """Bytes of forward, and of forward and backward (see the method above)."""
    table = layer.grid.table
    places, entries = 4 * points.numel(), 4 * table.shape[2] * touched(layer, points)
    features = 4 * len(points) * table.shape[0] * table.shape[2]
    back = places + features + 4 * table.numel()
    if points.requires_grad:
        back += entries + places
    return places + entries + features, places + entries + features + back


# Tables


def compare_encodings(ways: dict, device: torch.device, repeats: int) -> None:
    size = {3: tasks()[0].deformation, 2: tasks()[0].canonical}
    block = torch.ones(COPIED, device=device)
    target = torch.zeros_like(block)
    for dims in (3, 2):
        points = places_of(dims, device)
        layers = {name: make(dims, size[dims]).to(device) for name, make in ways.items()}
        runs: dict[str, Callable] = {"copy": lambda: target.copy_(block)}
        for name, layer in layers.items():
            runs[f"{name} fwd"] = forward(layer, points)
            runs[f"{name} both"] = both(layer, points)
        taken = race(runs, repeats)
        print(f"\n{f'{dims}D, {len(points):,} points':26} ms: fwd   busy   both   busy  Mpoints/s")
        for name in layers:
            fwd, full = (taken[f"{name} {kind}"] for kind in ("fwd", "both"))
            print(
                f"{name:26} {1e3 * fwd.median:7.1f} {1e3 * fwd.busy:6.1f} {1e3 * full.median:6.1f} "
                f"{1e3 * full.busy:6.1f} {len(points) / full.median / 1e6:10.2f}"
            )
        speed = 2 * 4 * COPIED / taken["copy"].median
        fwd, full = (1e3 * b / speed for b in floors(layers[OURS], points))
        print(f"{f'floor at {speed / 1e9:.1f} GB/s':26} {fwd:7.1f} {'':6} {full:6.1f}")
        compare(taken, "both")


def compare(taken: dict[str, Taken], kind: str) -> float | None:
    """How many times quicker ours is."""
    mine, peer = (taken.get(f"{name} {kind}") for name in (OURS, PEER))
    if peer is None:
        return None
    ratio = peer.median / mine.median
    print(f"ours is {ratio:.1f} x as quick as {PEER}, {peer.busy / mine.busy:.1f} x busy")
    return ratio


def compare_steps(ways: dict, device: torch.device, repeats: int) -> None:
    ratio = None
    for task in tasks():
        runs = {f"{name} step": stepper(task, make, device) for name, make in ways.items()}
        taken = race(runs, repeats)
        pixels_a_step = task.side**2
        print(f"\n{f'Step, {task.name} size':26}  steps/s  Mpixels/s      ms    busy")
        for name in ways:
            t = taken[f"{name} step"]
            print(
                f"{name:26} {1 / t.median:8.2f} {pixels_a_step / t.median / 1e6:10.3f} "
                f"{1e3 * t.median:7.1f} {1e3 * t.busy:7.1f}"
            )
        found = compare(taken, "step")
        ratio = found if task.name == "published" else ratio
    if ratio is not None:
        met = "met" if ratio >= GOAL else "missed"
        print(f"\nGoal: {GOAL:.0f} x the steps at the published size: {met} ({ratio:.1f} x)")


# Whole fits

LONGER = 10
"""Times as long as the default size that the published one trains."""


def trained(settings, frames: Tensor, seconds: float) -> tuple[float, int]:
    """PSNR of the fields to the clip after so many seconds of steps, and how many these were."""
    from turnaround.models import metrics
    from turnaround.models.implicit_fit import ImplicitFit

    probe = ImplicitFit(frames, settings)
    probe.steps(WARM_UP)
    began = time.monotonic()
    probe.steps(PROBE)
    planned = max(1, int(seconds * PROBE / (time.monotonic() - began)))
    fit = ImplicitFit(frames, replace(settings, steps=planned), flow=probe.material.flow)
    began = time.monotonic()
    while fit.done < planned and time.monotonic() - began < seconds:
        fit.steps(1)
    shown = fit.video.render(range(frames.shape[1]), smooth=False)
    return metrics.psnr(shown, frames), fit.done


def compare_fits(seconds: float) -> None:
    from smooth_clips import synthetic
    from turnaround.models.implicit_fit import FAST, PAPER

    frames = synthetic(3, 1, 8, (128, 160)).frames
    print(f"\n{'Whole fits':50} seconds   steps  dB to the clip")
    one_picture = replace(FAST, stride=0)
    for name, settings, known, time_given in (
        ("default size, from noise", FAST, False, seconds),
        ("default size, one canonical picture, from noise", one_picture, False, seconds),
        ("published size, from noise", PAPER, False, LONGER * seconds),
        ("default size, warm start", FAST, True, seconds),
        ("published size, warm start", PAPER, True, LONGER * seconds),
    ):
        psnr, steps = trained(replace(settings, known=known), frames, time_given)
        print(f"{name:50} {time_given:7.1f} {steps:7d} {psnr:15.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the implicit video's fit.")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--fit-seconds", type=float, default=8.0,
                        help="of the default size in whole fits; 0 leaves them out")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="2 rounds")
    chosen = parser.parse_args()
    repeats = 2 if chosen.quick else chosen.repeats
    threads = torch.get_num_threads()
    load_pack()
    torch.set_num_threads(threads)  # the tests keep to two
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(
        f"{machine(device)}, {threads} of {os.cpu_count()} threads, torch {torch.__version__}; "
        f"median of {repeats} rounds"
    )
    ways = contenders(device)
    compare_encodings(ways, device, repeats)
    compare_steps(ways, device, repeats)
    if chosen.fit_seconds:
        compare_fits(chosen.fit_seconds)


if __name__ == "__main__":
    main()
