"""Render training scenes: `python models/tiny scenes FOLDER --count 100`.

Each scene is one synthetic performer in one motion: the source camera at azimuth 0, other cameras
around, true pictures and the conditions that the source camera's depth gives. Deterministic by
seed; people, motions and clothes of one split only.
"""

from __future__ import annotations

import argparse
import logging
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..cameras import Rig, orbit_rig
from ..geometry import BACKGROUND, render_conditions
from ..performer import (
    SPLITS,
    Appearance,
    PosedPerformer,
    clothes_seed,
    draw_appearance,
    load_performers,
    motion_seconds,
    pose_performer,
    render_colors,
    render_geometries,
)
from ..performer_light import DEFAULT_LIGHTING, Lighting, draw_lighting
from ..points import OrientedPoints, points_from_depth
from ..views import to_bytes
from .scenes import LiveScenes, Scene, SceneFolder, Scenes, save_scene

log = logging.getLogger(__name__)

FPS = 16.0
DEFAULTS = {"views": 6, "frames": 9, "width": 192, "height": 240}
SOURCE_SCALE = 2
"""The source video is larger than the views, as a creator's own would be."""


def _draw_rig(rng: np.random.Generator, views: int, width: int, height: int) -> Rig:
    """View 0 at azimuth 0; the others one to a sector, so that all sides are seen."""
    sectors = (np.arange(views - 1) + rng.random(views - 1)) / (views - 1)
    azimuths = np.concatenate([[0.0], 2 * math.pi * sectors])
    elevation = rng.uniform(-0.1, 0.25) if rng.random() < 0.5 else 0.0
    fov = math.radians(rng.uniform(28, 45))
    distance = rng.uniform(1.02, 1.25) / math.tan(fov / 2) + 0.25
    elevations = torch.full((views,), elevation)
    elevations[0] = 0.0
    return orbit_rig(torch.from_numpy(azimuths).float(), elevations, distance, fov, width, height)


def source_points(
    posed: PosedPerformer,
    look: Appearance,
    rig: Rig,
    background: tuple[float, float, float],
    lighting: Lighting = DEFAULT_LIGHTING,
) -> OrientedPoints:
    """The cloud that view 0 of the rig sees, rendered larger."""
    source = rig.select([0]).resized(SOURCE_SCALE * rig.width, SOURCE_SCALE * rig.height)
    F = len(posed.vertices)
    camera = source.K.expand(F, -1, -1), source.T_camera_world.expand(F, -1, -1)
    size = source.width, source.height
    frames, masks = render_colors(
        posed.vertices, posed.normals, [look] * F, *camera, *size, [background] * F, [lighting] * F
    )
    depth = render_geometries(posed.vertices, posed.normals, *camera, *size)[0]
    return _at_true_place(points_from_depth(frames, depth, masks, source.K[0], fps=FPS), source)


def _at_true_place(cloud: OrientedPoints, source: Rig) -> OrientedPoints:
    """Undo the guess of the performer's centre: the rig here is that of the true world."""
    offset = source.centers[0] - cloud.source.centers[0]
    return replace(cloud, positions=cloud.positions + offset, source=source)


def _channels_last(pictures: Tensor) -> Tensor:  # [V, F, C, H, W] -> [V, F, H, W, C]
    return pictures.movedim(2, -1).contiguous()


def render_scene(
    seed: int,
    split: str,
    views: int,
    frames: int,
    width: int,
    height: int,
    lights: bool = False,
    device: torch.device | str = "cpu",
) -> Scene:
    """One scene of a split, on a device; `lights` draws them from the seed as well."""
    rng = np.random.default_rng(seed)
    characters, motions = SPLITS[split]
    look = draw_appearance(clothes_seed(split, int(rng.integers(1 << 30))))
    motion = motions[rng.integers(len(motions))]
    length = motion_seconds(load_performers(), motion)
    start = rng.uniform(0, max(0.0, length - (frames - 1) / FPS))
    posed = pose_performer(
        characters[rng.integers(len(characters))],
        motion,
        start + torch.arange(frames) / FPS,
        look,
        yaw=rng.normal(0, 0.35),
        device=device,
    )
    rig = _draw_rig(rng, views, width, height)
    rig = replace(rig, K=rig.K.to(device), T_camera_world=rig.T_camera_world.to(device))
    background = (BACKGROUND,) * 3
    lighting = draw_lighting(seed) if lights else DEFAULT_LIGHTING
    points = source_points(posed, look, rig, background, lighting)
    conditions = render_conditions(points, rig)
    # One view at a time: all its frames in one pass.
    truth, masks = zip(
        *(
            render_colors(
                posed.vertices, posed.normals, [look] * frames, rig.K[v].expand(frames, -1, -1),
                rig.T_camera_world[v].expand(frames, -1, -1), width, height,
                [background] * frames, [lighting] * frames,
            )
            for v in range(views)
        ),
        strict=True,
    )  # fmt: skip
    return Scene(
        frames=_channels_last(to_bytes(torch.stack(truth))),
        partial=_channels_last(conditions.partial),
        normals=_channels_last(conditions.normals),
        masks=to_bytes(torch.stack(masks)),
    )


def live_scenes(split: str, device: torch.device | str, seed: int) -> LiveScenes:
    """Scenes of the default size, without end; a training seed of its own gives other scenes."""
    first = seed * 1_000_000

    def render(number: int) -> Scene:
        return render_scene(first + number, split, *DEFAULTS.values(), device=device)

    return LiveScenes(render)


def add_scene_options(parser: argparse.ArgumentParser) -> None:
    """What a trainer asks about its scenes."""
    parser.add_argument("--data", type=Path, help="folder of render_scenes.py; without: live")


def scenes_of(args: argparse.Namespace) -> Scenes:
    """The scenes that a trainer's options ask for: files, or rendered on its device."""
    if args.data:
        return SceneFolder(args.data)
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    return live_scenes("train", automatic if args.device == "auto" else args.device, args.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--split", default="train", choices=SPLITS)
    for name, value in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lights", action="store_true", help="draw the lights by seed as well")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)
    for seed in range(args.first_seed, args.first_seed + args.count):
        path = args.folder / f"{args.split}_{seed:06d}.npz"
        if not path.exists():
            save_scene(
                path,
                render_scene(
                    seed, args.split, args.views, args.frames, args.width, args.height, args.lights
                ),
            )
            log.info("%s", path.name)


if __name__ == "__main__":
    main()
