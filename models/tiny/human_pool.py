"""People and backgrounds to make the human net's training pictures of: `python models/tiny people`.

A pool of people of one split (tightly framed, before black, with depth, camera-space normals and
keypoints) and a pool of backgrounds, rendered once; `human_batches` puts them together. Each file
depends on its number alone, so several processes can render different ones.
"""

from __future__ import annotations

import argparse
import logging
import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from ..cameras import Rig, orbit_rig
from ..performer import (
    JOINTS,
    PARENTS,
    SPLITS,
    Appearance,
    PerformerBank,
    PosedPerformer,
    clothes_seed,
    draw_appearance,
    load_performers,
    motion_seconds,
    pose_performer,
    render_color,
)
from ..performer_light import draw_background, draw_lighting
from ..performer_truth import (
    keypoint_visibility,
    keypoints_3d,
    project_keypoints,
    surface_truth,
)
from ..whole_file import whole_file
from .pictures import procedural_picture

log = logging.getLogger(__name__)

TILE = 192
"""Pixels of a pooled picture's side; the person's box fills all but `MARGIN` of it."""
MARGIN = 6
BACKGROUND_TILE = 256
SHARD = 100
"""People in one file of the pool."""
DEPTH_UNIT = 2e-4  # metres; 16 bits reach 13 m
VIEWS_OF_A_POSE = 2
NEW_POSE_SHARE = 0.7
"""Share of people whose limbs are taken from two motions and bent at random."""
UPPER = ("spine", "chest", "neck", "head", "shoulder", "elbow", "wrist")


def _turn(rng: np.random.Generator, spread: float) -> np.ndarray:
    """A rotation about a random axis by an angle of this standard deviation (radians)."""
    return cv2.Rodrigues(rng.normal(0, spread / math.sqrt(3), 3))[0]


def mix_motion(
    bank: PerformerBank,
    rng: np.random.Generator,
    lower: str,
    upper: str,
    spread: float = 0.3,
) -> np.ndarray:  # [J, 3, 3] rotations in the world
    """A pose with the legs of one motion, the trunk and arms of another, every joint bent a bit.

    The few motions at hand would else be all the poses that the net ever sees.
    """
    legs, arms = (
        bank.tensors[f"motion.{m}.rotations"].float().numpy()[
            rng.integers(len(bank.tensors[f"motion.{m}.rotations"]))
        ]
        for m in (lower, upper)
    )  # fmt: skip
    turns = legs.astype(np.float64)
    for j, name in enumerate(JOINTS):
        if name.split(".")[0] in UPPER:
            turns[j] = legs[0] @ arms[0].T @ arms[j]
    children = {
        name: [k for k in JOINTS if _is_below(k, name)] for name in JOINTS if name != "pelvis"
    }
    for name, below in children.items():
        bend = _turn(rng, 0.5 * spread if name in ("spine", "chest", "neck", "head") else spread)
        for k in below:
            turns[JOINTS.index(k)] = bend @ turns[JOINTS.index(k)]
    lean = _turn(rng, spread)
    return lean @ turns


def _is_below(joint: str, other: str) -> bool:
    j = JOINTS.index(joint)
    while j >= 0:
        if JOINTS[j] == other:
            return True
        j = PARENTS[j]
    return False


def _less_dressed(rng: np.random.Generator, look: Appearance) -> Appearance:
    """Some with bare chest, bare feet, a cap: sport and dance, which the seeds never draw."""
    skin = np.array(look.skin)
    if rng.random() < 0.15:
        shirt = np.stack([skin] * 3)
        look = replace(look, shirt=shirt, shirt_pattern=0, emblem=False, looseness=0.004)
    if rng.random() < 0.25:
        look = replace(look, shoes=look.skin)
    if rng.random() < 0.15:
        look = replace(look, hair=tuple(rng.uniform(0, 1, 3)))
    return look


def draw_pose(rng: np.random.Generator, split: str, new_pose: bool) -> tuple:
    """(posed performer, look, height in metres) of a split's own."""
    bank = load_performers()
    characters, motions = SPLITS[split]
    character, motion = (
        characters[rng.integers(len(characters))],
        motions[rng.integers(len(motions))],
    )
    look = draw_appearance(clothes_seed(split, int(rng.integers(1 << 30))))
    if split == "train":
        look = _less_dressed(rng, look)
    time = rng.uniform(0, motion_seconds(bank, motion))
    if new_pose:
        other = motions[rng.integers(len(motions))]
        turns = torch.from_numpy(mix_motion(bank, rng, motion, other)).float()
        # A motion of two equal frames under a name of its own, which the next pose overwrites.
        motion, time = "mixed", 0.0
        bank.tensors["motion.mixed.rotations"] = turns.expand(2, -1, -1, -1)
        bank.tensors["motion.mixed.positions"] = torch.zeros(2, 3)
        bank.tensors["motion.mixed.seconds"] = torch.ones(1)
    posed = pose_performer(character, motion, torch.tensor([time]), look)
    rest = bank.tensors["rest_vertices"][bank.characters.index(character)].float()
    return posed, look, float(rest[:, 1].max() - rest[:, 1].min())


def close_camera(
    posed: PosedPerformer, azimuth: float, elevation: float, distance: float, size: int = TILE
) -> Rig:
    """A camera that looks at the body's middle, with the body's box filling the picture."""
    rig = orbit_rig(
        torch.tensor([azimuth]), torch.tensor([elevation]), distance, math.radians(40), size, size
    )
    T = rig.T_camera_world[0]
    camera = posed.vertices[0] @ T[:3, :3].T + T[:3, 3]
    flat = camera[:, :2] / camera[:, 2:].clamp(min=0.1)
    low, high = flat.amin(0), flat.amax(0)
    focal = (size - 2 * MARGIN) / float((high - low).max())
    centre = size / 2 - focal * (low + high) / 2
    K = torch.tensor([[focal, 0, centre[0]], [0, focal, centre[1]], [0, 0, 1.0]])
    return Rig(K[None], rig.T_camera_world, size, size)


def render_shard(seed: int, split: str, count: int) -> dict[str, np.ndarray]:
    """`count` people; uint8 pictures (colour times coverage), depth in steps of `DEPTH_UNIT`."""
    rng = np.random.default_rng((seed, tuple(SPLITS).index(split)))
    people: list[dict[str, np.ndarray]] = []
    while len(people) < count:
        new_pose = split == "train" and rng.random() < NEW_POSE_SHARE
        posed, look, height = draw_pose(rng, split, new_pose)
        for _ in range(min(VIEWS_OF_A_POSE, count - len(people))):
            elevation = float(np.clip(rng.normal(0.08, 0.22), -0.4, 0.9))
            # Near cameras bend proportions; most clips are filmed from a few metres.
            distance = math.exp(rng.uniform(math.log(1.9), math.log(7)))
            rig = close_camera(posed, rng.uniform(-math.pi, math.pi), elevation, distance)
            light = draw_lighting(int(rng.integers(1 << 30)))
            camera = (rig.K[0], rig.T_camera_world[0], TILE, TILE)
            color, mask = render_color(posed, 0, look, *camera, (0.0, 0.0, 0.0), light)
            truth = surface_truth(posed, rig)
            pixels, depth = project_keypoints(keypoints_3d(posed), rig)
            seen = keypoint_visibility(pixels, depth, truth.depth)
            people.append(
                {
                    "color": _bytes(color.permute(1, 2, 0)),
                    "mask": _bytes(mask),
                    "depth": (truth.depth[0, 0] / DEPTH_UNIT).round().numpy().astype(np.uint16),
                    "normals": (truth.normals_camera[0, 0].permute(1, 2, 0) * 127)
                    .round().numpy().astype(np.int8),
                    "keypoints": torch.cat([pixels[0, 0], seen[0, 0, :, None]], -1).numpy(),
                    "camera": np.array([rig.K[0, 0, 0], height], np.float32),
                }
            )  # fmt: skip
    return {key: np.stack([p[key] for p in people]) for key in people[0]}


def _bytes(values: Tensor) -> np.ndarray:
    return (values * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def load_photos(folder: Path | None) -> list[np.ndarray]:
    """Photographs without people, as [H, W, 3] uint8; a folder of the trainer's own, if any."""
    paths = sorted(folder.glob("*")) if folder else []
    read = (cv2.imread(str(p), cv2.IMREAD_COLOR) for p in paths)
    return [p[..., ::-1] for p in read if p is not None and min(p.shape[:2]) >= 64]


def _photo_crop(rng: np.random.Generator, photo: np.ndarray, size: int) -> np.ndarray:
    h, w = photo.shape[:2]
    side = int(rng.uniform(0.25, 1) * min(h, w))
    y, x = rng.integers(h - side + 1), rng.integers(w - side + 1)
    piece = photo[y : y + side, x : x + side]
    way = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
    piece = cv2.resize(piece, (size, size), interpolation=way)
    return piece[:, ::-1] if rng.random() < 0.5 else piece


def _cloud_noise(rng: np.random.Generator, size: int, channels: int = 3) -> np.ndarray:
    """Smooth noise with structure at every scale, about unit spread."""
    total = np.zeros((size, size, channels), np.float32)
    roughness = rng.uniform(0.4, 0.9)
    for octave in range(1, 7):
        coarse = rng.standard_normal((2**octave + 1, 2**octave + 1, channels)).astype(np.float32)
        total += roughness**octave * cv2.resize(
            coarse, (size, size), interpolation=cv2.INTER_CUBIC
        ).reshape(size, size, channels)
    return total / (total.std() + 1e-6)


def _scene(rng: np.random.Generator, size: int, photos: list[np.ndarray]) -> np.ndarray:
    """Walls, floor and many things, some of them as thin and as skin-coloured as limbs are."""
    picture = draw_background(rng, size, size, "indoor").permute(1, 2, 0).numpy().copy()
    for _ in range(rng.integers(3, 25)):
        if rng.random() < 0.35:  # skin- and wood-coloured
            tone = rng.uniform(0.25, 1)
            color = tone * np.array([1, rng.uniform(0.6, 0.85), rng.uniform(0.4, 0.75)])
        else:
            color = rng.uniform(0, 1, 3) if rng.random() < 0.4 else np.full(3, rng.random())
        start = rng.integers(0, size, 2)
        kind = rng.random()
        layer = np.zeros((size, size), np.float32)
        if kind < 0.35:  # poles, pipes, limbs of furniture
            angle = rng.choice([0, math.pi / 2, rng.uniform(0, math.pi)])
            end = start + rng.uniform(10, size) * np.array([math.cos(angle), math.sin(angle)])
            cv2.line(layer, start.tolist(), end.astype(int).tolist(), 1.0,
                     int(rng.integers(1, 14)), cv2.LINE_AA)  # fmt: skip
        elif kind < 0.6:
            axes = rng.integers(2, size // 5, 2).tolist()
            cv2.ellipse(layer, start.tolist(), axes, rng.uniform(0, 180), 0, 360, 1.0, -1,
                        cv2.LINE_AA)  # fmt: skip
        else:
            corners = start + rng.normal(0, size * rng.uniform(0.03, 0.2), (rng.integers(3, 6), 2))
            cv2.fillPoly(layer, [corners.astype(int)], 1.0, cv2.LINE_AA)
        fill = np.broadcast_to(color, picture.shape)
        if photos and rng.random() < 0.3:
            fill = _photo_crop(rng, photos[rng.integers(len(photos))], size) / 255
        shade = 1 + rng.uniform(0, 0.4) * np.linspace(-1, 1, size)[:, None, None]
        picture += layer[..., None] * (fill * shade - picture)
    return picture * (1 + rng.uniform(0, 0.25) * _cloud_noise(rng, size, 1))


def make_background(
    rng: np.random.Generator, photos: list[np.ndarray], size: int = BACKGROUND_TILE
) -> np.ndarray:  # [size, size, 3] uint8
    """What stands behind: photographs where there are any, scenes, noise, patterns, plain."""
    kinds = ["photo", "scene", "noise", "pattern", "simple"]
    share = np.array([0.3 if photos else 0.0, 0.35, 0.12, 0.11, 0.12])
    kind = rng.choice(kinds, p=share / share.sum())
    if kind == "photo":
        picture = _photo_crop(rng, photos[rng.integers(len(photos))], size) / 255
    elif kind == "scene":
        picture = _scene(rng, size, photos)
    elif kind == "noise":
        picture = rng.uniform(0.1, 0.9, 3) + rng.uniform(0.03, 0.25) * _cloud_noise(rng, size)
    elif kind == "pattern":
        picture = procedural_picture(rng, size)
    else:
        picture = draw_background(rng, size, size).permute(1, 2, 0).numpy()
    return (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)


def write_pool(
    folder: Path, split: str, people: int, backgrounds: int, first: int, photos: Path | None
) -> None:
    """Write what of the pool is not there yet; a file appears only when it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}_backgrounds.npy"
    if not path.exists() and first == 0:
        rng = np.random.default_rng((99, tuple(SPLITS).index(split)))
        pictures = load_photos(photos)
        _write(path, lambda f: np.save(
            f, np.stack([make_background(rng, pictures) for _ in range(backgrounds)])
        ))  # fmt: skip
        log.info("%s", path.name)
    for index in range(first, first + math.ceil(people / SHARD)):
        path = folder / f"{split}_{index:05d}.npz"
        if not path.exists():
            shard = render_shard(index, split, SHARD)
            _write(path, lambda f, shard=shard: np.savez(f, **shard))
            log.info("%s", path.name)


def _write(path: Path, save) -> None:
    with whole_file(path) as partial, partial.open("wb") as file:
        save(file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", default="train", choices=SPLITS)
    parser.add_argument("--count", type=int, default=4000, help="people")
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument("--backgrounds", type=int, default=1500)
    parser.add_argument("--photos", type=Path, help="folder of photographs without people")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    write_pool(args.folder, args.split, args.count, args.backgrounds, args.first, args.photos)


if __name__ == "__main__":
    main()
