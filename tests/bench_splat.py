"""What pictures of Gaussian splats cost: `.venv/bin/python tests/bench_splat.py [--quick]`.

The peer litesplat needs `pip install litesplat`; without it, it is left out with a line. gsplat, gswarp
and splax draw on graphics cards only. gsplat's reference in torch is no peer on a CPU either: it
composites with compiled functions of its own and of nerfacc, which need such a card. Its projection
runs without, and tests/models/test_rasterize_splats.py compares with it.

Method
- Scene: a figure of six ellipsoids, a person's size, its surface covered with flat Gaussians of
  about the spacing's size, some opaque, some not, colours of degree 0; one camera before it. The
  figure covers a fifth of the picture.
- "forward" draws without autograd; "both" draws, takes the mean square of the colours and goes
  backward to all that a Gaussian has. "with maps" also composites depth and normals.
- Contenders: ours as the pack chooses (numba on a CPU where it is installed), ours in plain torch, and
  the naive reference in torch: the same projection, then a loop over tiles of 16 pixels that
  composites all Gaussians whose boxes touch the tile, by autograd; where rounding moves an alpha over
  1/255, pictures differ by up to that. On CUDA ours is gsplat where it is installed. litesplat
  has no tiles: every pixel meets every Gaussian, by autograd; it draws one of its own batches of
  1,024 pixels, and its time is multiplied to a whole picture.
- All run in turn in one process on as many threads as torch has (OMP_NUM_THREADS); after a warm-up,
  in which numba compiles, the median of the rounds counts. "busy" is processor time of all threads
  together: other work on the machine delays the clock, hardly this (of an accelerator it says
  nothing). A contender that has used up its seconds sits out the remaining rounds.
"""

import argparse
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from bench_geometry import load_pack, machine, race
from torch import Tensor
from torch.nn import functional as F

CASES = ((20_000, 256), (20_000, 512), (100_000, 256), (100_000, 512))
"""Gaussians, and pixels along the picture's sides."""
GOAL = 10.0
"""Pictures in the time of one by the naive reference, on a CPU."""
FIT_SECONDS = 0.1
"""At most, for one picture of the first case there and back: what a draft of an avatar allows."""
TILE = 16
LITESPLAT_PIXELS = 1024
PARTS = (
    (0.0, -0.65, 0.0, 0.12, 0.15, 0.13),
    (0.0, -0.2, 0.0, 0.22, 0.33, 0.14),
    (-0.3, -0.2, 0.0, 0.07, 0.33, 0.07),
    (0.3, -0.2, 0.0, 0.07, 0.33, 0.07),
    (-0.11, 0.45, 0.0, 0.1, 0.45, 0.1),
    (0.11, 0.45, 0.0, 0.1, 0.45, 0.1),
)
"""Centres and half axes of the ellipsoids, metres."""


class Scene:
    def __init__(self, N: int, size: int, device: torch.device) -> None:
        from turnaround.models.cameras import orbit_rig
        from turnaround.models.rasterize_splats import fastest_way
        from turnaround.models.splats import Splats

        generator = torch.Generator().manual_seed(0)
        parts = torch.tensor(PARTS)
        a, b, c = parts[:, 3:].T
        areas = a * b + a * c + b * c  # nearly in proportion
        part = parts[torch.multinomial(areas, N, True, generator=generator)]
        around = F.normalize(torch.randn(N, 3, generator=generator), dim=1)
        normals = F.normalize(around / part[:, 3:], dim=1)
        spacing = (4 * math.pi / 3 * areas.sum() / N).sqrt()
        sizes = (spacing * torch.tensor([0.7, 0.7, 0.1])).log()
        quats = torch.cat([1 + normals[:, 2:], -normals[:, 1:2], normals[:, :1]], 1)
        given = (
            part[:, :3] + around * part[:, 3:],
            torch.cat([quats, torch.zeros(N, 1)], 1),
            sizes + 0.3 * torch.randn(N, 3, generator=generator),
            torch.randn(N, generator=generator) + 1.5,
            0.5 * torch.randn(N, 1, 3, generator=generator),
        )
        self.splats = Splats(*(t.to(device).requires_grad_() for t in given))
        angles = torch.tensor([0.4]), torch.tensor([0.1])
        rig = orbit_rig(*angles, 3.2, math.radians(35), size, size)
        # As for a fit or a film: a single picture would not be worth numba's compiling.
        self.way = fastest_way(device, torch.float32, 10**9)
        self.camera = rig.K[0], rig.T_camera_world[0].to(device)
        self.size = size

    def ways(self) -> dict[str, Callable[[], Tensor]]:
        return {
            "Turnaround": lambda: self.ours(self.way, False),
            "Turnaround, with maps": lambda: self.ours(self.way, True),
            "Turnaround, plain torch": lambda: self.ours("torch", False),
            "naive torch": lambda: self.ours("naive", False),
        }

    def ours(self, way: str, geometry: bool) -> Tensor:
        from turnaround.models.rasterize_splats import render

        size = self.size
        seen = render(self.splats, *self.camera, size, size, geometry=geometry, way=way)
        if not geometry:
            return seen.color
        return torch.cat([seen.color, seen.depth[None], seen.normals])


def naively(placed, frame) -> tuple[Tensor, Tensor]:
    """A way of compositing as the papers have it, written down for autograd."""
    order = frame.depths.argsort(stable=True)
    centers, conics, opacities, features = (t[order] for t in placed)
    reach = frame.reach[order]
    low, high = (centers - reach).detach(), (centers + reach).detach()
    alive, rows = (reach > 0).all(1), []
    for top in range(0, frame.height, TILE):
        row = []
        bottom = min(top + TILE, frame.height)
        level = alive & (high[:, 1] > top) & (low[:, 1] < bottom)
        for left in range(0, frame.width, TILE):
            right = min(left + TILE, frame.width)
            near = (level & (high[:, 0] > left) & (low[:, 0] < right)).nonzero()[:, 0]
            y, x = torch.meshgrid(
                torch.arange(top, bottom, device=near.device) + 0.5,
                torch.arange(left, right, device=near.device) + 0.5,
                indexing="ij",
            )
            dx = x.reshape(-1, 1) - centers[near, 0]
            dy = y.reshape(-1, 1) - centers[near, 1]
            a, b, c = conics[near].unbind(1)
            sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
            alpha = (opacities[near] * (-sigma).exp()).clamp(max=0.99)
            alpha = torch.where(alpha >= 1 / 255, alpha, 0.0)
            kept = torch.cat([dx.new_ones(len(dx), 1), 1 - alpha], 1).cumprod(1)
            open_ = kept > 1e-4
            sums = (alpha * kept[:, :-1] * open_[:, 1:]) @ features[near]
            rest = torch.where(open_, kept, 1.0).amin(1, keepdim=True)
            row.append(torch.cat([sums, rest], 1).view(bottom - top, right - left, -1))
        rows.append(torch.cat(row, 1))
    picture = torch.cat(rows).permute(2, 0, 1)
    return picture[:-1], picture[-1]


def litesplat_batch(scene: Scene) -> Callable[[], Tensor]:
    """Draws a batch of pixels of the scene in the middle of the picture."""
    os.environ["KERAS_BACKEND"] = "torch"
    from litesplat.core.camera_model import CameraLayer
    from litesplat.core.gaussian_model import GaussianParameterLayer

    K, T = scene.camera
    parts = [t.detach() for t in scene.splats.tensors()]
    colors = (0.5 + 0.28209479 * parts[4][:, 0]).clamp(min=0)
    columns = {
        "position": parts[0], "rotation": parts[1], "scale": parts[2].exp(),
        "opacity": parts[3].sigmoid(), "color": colors, "translation": parts[0],
    }  # fmt: skip
    lists = {name: column.tolist() for name, column in columns.items()}
    camera = {
        "camera_id": 0, "model": "PINHOLE", "image_name": "", "width": scene.size,
        "height": scene.size, "fx": K[0, 0].item(), "fy": K[1, 1].item(), "cx": K[0, 2].item(),
        "cy": K[1, 2].item(), "rotation": T[:3, :3].tolist(), "translation": T[:3, 3].tolist(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        rows = [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
        (Path(folder) / "gaussians.json").write_text(json.dumps(rows))
        (Path(folder) / "camera.json").write_text(json.dumps([camera]))
        gaussians = GaussianParameterLayer(folder)
        layer = CameraLayer(folder, gaussians)
    middle = torch.arange(LITESPLAT_PIXELS) + scene.size * (scene.size // 2)
    pixels = torch.stack([middle % scene.size, middle // scene.size], 1).float()
    return lambda: layer.render_pixel_color(pixels)


def compare(N: int, size: int, device: torch.device, repeats: int) -> None:
    from turnaround.models.rasterize_splats import WAYS

    WAYS["naive"] = WAYS["torch"]._replace(draw=naively)
    scene = Scene(N, size, device)
    ways = scene.ways()
    with torch.no_grad():
        away = (ways["Turnaround"]() - ways["naive torch"]()).abs().max()
    print(f"{N:,} Gaussians at {size}²: ours and the naive reference differ by {away:.1e} at most")
    if device.type == "cpu" and (N, size) == CASES[0]:
        try:
            ways["litesplat"] = litesplat_batch(scene)
        except ImportError as missing:
            print(f"  litesplat: left out, {missing.name} is not installed")
    for name, run in (("forward", without_grad), ("both", there_and_back)):
        show(name, N, size, race({key: run(way, scene) for key, way in ways.items()}, repeats))


def without_grad(way: Callable[[], Tensor], scene: Scene) -> Callable[[], None]:
    return torch.no_grad()(way)


def there_and_back(way: Callable[[], Tensor], scene: Scene) -> Callable[[], None]:
    def run() -> None:
        for t in scene.splats.tensors():
            t.grad = None
        way().square().mean().backward()

    return run


def show(name: str, N: int, size: int, taken: dict) -> None:
    whole = {key: size * size / LITESPLAT_PIXELS if key == "litesplat" else 1.0 for key in taken}
    naive = taken["naive torch"]
    for key, seconds in taken.items():
        busy = seconds.busy * whole[key]
        print(
            f"  {name:8} {key:26} {1 / (seconds.median * whole[key]):8.3g} pictures/s "
            f"{1e3 * busy:10.1f} ms busy   {naive.busy / busy:8.3g} x naive"
        )
    ours = taken["Turnaround"]
    reached = naive.busy / ours.busy
    print(f"  {name:8} goal {GOAL:.0f} x naive: {reached:.1f} x", end="")
    if name == "both" and (N, size) == CASES[0]:
        print(f"; goal {1e3 * FIT_SECONDS:.0f} ms a picture: {1e3 * ours.busy:.1f} ms", end="")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the Gaussian rasteriser.")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="the first case only, 3 rounds")
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device")
    threads = torch.get_num_threads()
    load_pack()
    torch.set_num_threads(threads)  # the tests keep to two
    device = torch.device(chosen.device)
    repeats = 3 if chosen.quick else chosen.repeats
    print(
        f"{machine(device)}, {threads} of {os.cpu_count()} threads, torch {torch.__version__}; "
        f"median of {repeats} rounds"
    )
    for N, size in CASES[:1] if chosen.quick else CASES:
        compare(N, size, device, repeats)


if __name__ == "__main__":
    main()
