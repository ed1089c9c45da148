"""Training pictures of the human net: exact people before any background, spoiled as cameras do.

`python -m turnaround.models.tiny.human_batches FOLDER --count 4000` renders a pool of people of one
split (tightly framed, before black, with depth, camera-space normals and keypoints) and a pool of
backgrounds. `HumanBatches` then places a person anywhere at any size, puts others beside, things in
front, and blurs, darkens, tints and compresses the picture. Deterministic by seed; a run is equal
to the bit only when the pool was whole before it began.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..cameras import Rig, orbit_rig
from ..human_net import OUTSIDE
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
    KEYPOINTS,
    keypoint_visibility,
    keypoints_3d,
    project_keypoints,
    surface_truth,
)
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
FLIPPED = tuple(
    KEYPOINTS.index(k[:-1] + {"L": "R", "R": "L"}[k[-1]]) if k[-2:] in (".L", ".R") else i
    for i, k in enumerate(KEYPOINTS)
)
"""Which keypoint is which in a mirror."""
UPPER = ("spine", "chest", "neck", "head", "shoulder", "elbow", "wrist")


# --- the pool -------------------------------------------------------------------------------------


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
    partial = path.with_suffix(".part")
    with partial.open("wb") as file:
        save(file)
    partial.rename(path)


# --- batches --------------------------------------------------------------------------------------


HARD = 0.25
"""Share of difficult pictures: footage is mostly better than the worst that a net must bear."""


@dataclass(frozen=True)
class HumanBatch:
    """Pictures as a camera gives them, and the truth; [B, ...]."""

    pictures: Tensor
    """[B, 3, H, W] 0..1."""
    masks: Tensor
    """[B, H, W] 0..1, the performer."""
    anyone: Tensor
    """[B, H, W] 0..1, the performer and everybody else."""
    relief: Tensor
    """[B, H, W] metres behind the median of the performer's visible depth; 0 outside `surface`."""
    surface: Tensor
    """[B, H, W] bool, where relief and normals are known."""
    normals: Tensor
    """[B, 3, H, W] unit, in the frame of a camera aimed at the performer; 0 outside."""
    keypoints: Tensor
    """[B, P, 2] pixels; pixel centres at +0.5."""
    confidence: Tensor
    """[B, P] 1 = seen, 0.5 = in the picture but covered, 0 = outside or nobody there."""
    scale: Tensor
    """[B, 2] natural logarithm of pixels a metre at the median depth, and of the height in metres."""
    present: Tensor
    """[B] bool: there is a performer."""

    def to(self, device: torch.device | str) -> HumanBatch:
        return HumanBatch(**{k: v.to(device, non_blocking=True) for k, v in vars(self).items()})


@dataclass
class _Layer:
    """One person warped into the picture; numpy [H, W, ...]."""

    color: np.ndarray
    alpha: np.ndarray
    depth: np.ndarray
    normals: np.ndarray
    keypoints: np.ndarray
    """[P, 3] pixels and whether seen."""
    focal: float
    height: float


class HumanBatches:
    """Endless batches from a pool; `steps` of the caller's rng decide everything."""

    def __init__(self, folder: Path, split: str, size: tuple[int, int]) -> None:
        self.folder, self.split, (self.width, self.height) = folder, split, size
        self.backgrounds = np.load(folder / f"{split}_backgrounds.npy", mmap_mode="r")
        self.shards: list[dict[str, np.ndarray]] = []
        self.known: set[Path] = set()
        self.refresh()
        if not self.shards:
            raise ValueError(f"There are no people of split {split} in the pool: render it first.")

    def of_size(self, size: tuple[int, int]) -> HumanBatches:
        """The same people in pictures of another size."""
        other = copy.copy(self)
        other.width, other.height = size
        return other

    def refresh(self) -> None:
        """Notice people rendered meanwhile."""
        for path in sorted(self.folder.glob(f"{self.split}_[0-9]*.npz")):
            if path not in self.known:
                with np.load(path, allow_pickle=False) as file:
                    self.shards.append(dict(file))
                self.known.add(path)

    def __len__(self) -> int:
        return sum(len(s["mask"]) for s in self.shards)

    def batch(self, rng: np.random.Generator, count: int, hard: float = HARD) -> HumanBatch:
        return collate([self.sample(rng, hard) for _ in range(count)])

    def _person(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        shard = self.shards[rng.integers(len(self.shards))]
        index = rng.integers(len(shard["mask"]))
        return {k: v[index] for k, v in shard.items()}

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        tile = self.backgrounds[rng.integers(len(self.backgrounds))]
        side = rng.uniform(0.4, 1) * BACKGROUND_TILE
        h, w = int(side), int(side * self.width / self.height)
        y, x = rng.integers(BACKGROUND_TILE - h + 1), rng.integers(BACKGROUND_TILE - w + 1)
        piece = cv2.resize(tile[y : y + h, x : x + w], (self.width, self.height))
        piece = piece[:, ::-1] if rng.random() < 0.5 else piece
        return piece.astype(np.float32) / 255

    def _place(
        self, rng: np.random.Generator, person: dict[str, np.ndarray], size: float,
        centre: tuple[float, float],
    ) -> _Layer:  # fmt: skip
        """Warp a person so that the box's longer side is `size` pixels, at `centre`."""
        zoom = size / (TILE - 2 * MARGIN)
        angle = rng.normal(0, 0.16)
        mirror = -1.0 if rng.random() < 0.5 else 1.0
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        turn = turn @ np.diag([mirror, 1.0])
        A = zoom * turn
        shift = np.array(centre) - A @ np.full(2, TILE / 2)
        # OpenCV puts pixel centres at whole numbers, everything else here at +0.5.
        M = np.column_stack([A, A @ np.full(2, 0.5) + shift - 0.5])
        color, alpha = (person[k].astype(np.float32) / 255 for k in ("color", "mask"))
        if zoom < 0.7:
            color, alpha = (cv2.GaussianBlur(t, (0, 0), 0.4 / zoom) for t in (color, alpha))

        def warp(t: np.ndarray, way: int) -> np.ndarray:
            return cv2.warpAffine(t, M, (self.width, self.height), flags=way)

        normals = warp(person["normals"].astype(np.float32), cv2.INTER_LINEAR)
        normals[..., :2] = normals[..., :2] @ turn.T
        points = person["keypoints"].copy()
        points[:, :2] = points[:, :2] @ A.T + shift
        if mirror < 0:
            points = points[list(FLIPPED)]
        color = warp(color, cv2.INTER_LINEAR) * _skin_deep(rng, self.height, self.width)
        depth = warp(person["depth"], cv2.INTER_NEAREST).astype(np.float32) * DEPTH_UNIT
        alpha = warp(alpha, cv2.INTER_LINEAR)
        focal, height = person["camera"].tolist()
        return _Layer(color, alpha, depth, normals, points, focal * zoom, height)

    def _main_place(self, rng: np.random.Generator) -> tuple[float, tuple[float, float]]:
        """Size and centre of the performer: mostly a crop around, sometimes far or cut off."""
        kind = rng.random()
        if kind < 0.62:
            size = self.height * rng.uniform(0.6, 0.98)
            spread = 0.06
        elif kind < 0.82:
            size = self.height * rng.uniform(0.22, 0.6)
            spread = 0.25
        else:
            size = self.height * rng.uniform(0.98, 2.2)
            spread = 0.3
        y = self.height * (0.5 + np.clip(rng.normal(0, spread), -0.45, 0.45))
        x = self.width * (0.5 + np.clip(rng.normal(0, spread), -0.45, 0.45))
        return size, (x, y)

    def sample(self, rng: np.random.Generator, hard: float = HARD) -> dict[str, np.ndarray]:
        """One picture and its truth; with chance `hard` a difficult one."""
        return self._hard(rng) if rng.random() < hard else self._easy(rng)

    def _easy(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One person alone, whole and near the middle, well lit, as most clips show a performer."""
        picture = self._background(rng)
        H, W = picture.shape[:2]
        if rng.random() < 0.5:  # out of focus
            picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(1, 8))
        size = self.height * rng.uniform(0.6, 0.92)
        spot = np.array([W, H]) * (0.5 + np.clip(rng.normal(0, 0.03, 2), -0.08, 0.08))
        layer = self._place(rng, self._person(rng), size, tuple(spot))
        alpha = layer.alpha
        picture = picture * (1 - alpha[..., None]) + layer.color * rng.uniform(0.85, 1.2)
        picture = np.clip(picture, 0, 1) ** math.exp(rng.normal(0, 0.15))
        if rng.random() < 0.5:
            picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.2, 0.8))
        picture = np.clip(picture + 0.01 * rng.standard_normal(picture.shape), 0, 1)
        return self._truth(layer, alpha, alpha.copy(), picture.astype(np.float32), (0, 0, W, H))

    def _hard(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Anybody anywhere at any size, beside others, behind things, in bad pictures."""
        picture = self._background(rng)
        H, W = picture.shape[:2]
        anyone = np.zeros((H, W), np.float32)
        present = rng.random() > 0.05
        size, centre = self._main_place(rng)
        for _ in range(rng.choice(3, p=[0.72, 0.2, 0.08]) if present else 0):  # others, behind
            away = rng.choice([-1, 1]) * size * rng.uniform(0.35, 0.9)
            other = self._place(rng, self._person(rng), size * rng.uniform(0.35, 0.95),
                                (centre[0] + away, centre[1] + rng.normal(0, 0.1) * size))  # fmt: skip
            tint = rng.uniform(0.6, 1.3)
            picture = picture * (1 - other.alpha[..., None]) + tint * other.color
            anyone = np.maximum(anyone, other.alpha)
        layer = self._place(rng, self._person(rng), size, centre)
        if not present:
            layer.alpha[:] = layer.color[:] = 0
        picture = picture * (1 - layer.alpha[..., None]) + layer.color * rng.uniform(0.75, 1.25)
        alpha = layer.alpha
        if rng.random() < 0.5:  # a darker rim on the floor and wall around: contact shadow
            ring = cv2.GaussianBlur(alpha, (0, 0), rng.uniform(2, 9)) * (1 - alpha)
            picture = picture * (1 - rng.uniform(0, 0.6) * ring[..., None])
        if rng.random() < 0.15:
            front = self._thing_in_front(rng, centre, size)
            fill = self._background(rng)
            picture = picture * (1 - front[..., None]) + fill * front[..., None]
            alpha, anyone = alpha * (1 - front), anyone * (1 - front)
        anyone = np.maximum(anyone, alpha)
        picture = as_filmed(picture, rng)
        frame = self._frame(rng) if rng.random() < 0.3 else (0, 0, W, H)
        left, top, right, bottom = frame
        beyond = np.ones((H, W), bool)
        beyond[top:bottom, left:right] = False
        picture[beyond] = OUTSIDE
        alpha, anyone = np.where(beyond, 0, alpha), np.where(beyond, 0, anyone)
        return self._truth(layer, alpha, anyone, picture, frame)

    def _frame(self, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """The crop reaches beyond the camera's frame on one or two sides."""
        edges = [0, 0, self.width, self.height]
        for side in rng.choice(4, rng.integers(1, 3), replace=False):
            length = (self.width, self.height)[side % 2]
            cut = int(rng.uniform(0.02, 0.35) * length)
            edges[side] = cut if side < 2 else length - cut
        return tuple(edges)

    def _thing_in_front(self, rng: np.random.Generator, centre, size: float) -> np.ndarray:
        front = np.zeros((self.height, self.width), np.float32)
        at = np.array(centre) + rng.normal(0, 0.35, 2) * size
        corners = at + rng.normal(0, 0.15 * size, (4, 2))
        cv2.fillPoly(front, [cv2.convexHull(corners.astype(np.float32)).astype(int)], 1.0,
                     cv2.LINE_AA)  # fmt: skip
        return front

    def _truth(
        self, layer: _Layer, alpha: np.ndarray, anyone: np.ndarray, picture: np.ndarray,
        frame: tuple[int, int, int, int],
    ) -> dict[str, np.ndarray]:  # fmt: skip
        surface = (alpha > 0.6) & (layer.depth > 0)
        present = bool(surface.sum() >= 30)
        middle = float(np.median(layer.depth[surface])) if present else 1.0
        length = np.linalg.norm(layer.normals, axis=-1, keepdims=True)
        surface &= length[..., 0] > 20  # of 127: mixed beyond use at the edges of limbs
        points = layer.keypoints
        x, y = points[:, 0], points[:, 1]
        left, top, right, bottom = frame
        inside = (x >= left) & (x < right) & (y >= top) & (y < bottom) & present
        column, row = (
            np.clip(t, 0, n - 1).astype(int) for t, n in ((x, self.width), (y, self.height))
        )
        # A joint that something covers: its spot is no longer the performer's.
        covered = (layer.alpha[row, column] > 0.5) & (alpha[row, column] < 0.5)
        seen = inside & (points[:, 2] > 0.5) & ~covered
        return {
            "pictures": picture,
            "masks": alpha if present else np.zeros_like(alpha),
            "anyone": anyone,
            "relief": np.where(surface, layer.depth - middle, 0).astype(np.float32),
            "surface": surface & present,
            "normals": np.where(surface[..., None], layer.normals / np.maximum(length, 1e-3), 0),
            "keypoints": points[:, :2].astype(np.float32),
            "confidence": (0.5 * inside + 0.5 * seen).astype(np.float32),
            "scale": np.log([layer.focal / middle, layer.height]).astype(np.float32),
            "present": np.array(present),
        }


def _skin_deep(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """[H, W, 1 or 3] folds, muscles, shadows and stains as a factor on a person's colours."""
    factor = np.ones((height, width, 1), np.float32)
    for cells, strength in ((4, 0.3), (12, 0.25), (32, 0.2)):
        bumps = rng.standard_normal((cells, cells)).astype(np.float32)
        field = cv2.resize(bumps, (width, height), interpolation=cv2.INTER_CUBIC)
        factor *= np.exp(rng.uniform(0, strength) * field)[..., None]
    return factor


def as_filmed(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[H, W, 3] 0..1 as a camera gives it: light, colour, blur, noise, compression."""
    H, W = picture.shape[:2]
    picture = np.clip(picture, 0, 1)
    if rng.random() < 0.8:
        picture = picture ** math.exp(rng.normal(0, 0.3)) * math.exp(rng.normal(0, 0.2))
    if rng.random() < 0.12:  # night
        picture = picture * rng.uniform(0.12, 0.5)
    if rng.random() < 0.6:
        picture = picture * np.exp(rng.normal(0, 0.12, 3))
    if rng.random() < 0.3:
        grey = picture.mean(-1, keepdims=True)
        picture = grey + (picture - grey) * rng.uniform(0, 1.5)
    if rng.random() < 0.4:
        picture = 0.5 + (picture - 0.5) * rng.uniform(0.5, 1.4)
    picture = np.clip(picture, 0, 1).astype(np.float32)
    kind = rng.random()
    if kind < 0.3:
        picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.3, 1.8))
    elif kind < 0.45:  # filmed smaller
        zoom = rng.uniform(0.3, 0.8)
        small = cv2.resize(picture, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_AREA)
        picture = cv2.resize(small, (W, H), interpolation=cv2.INTER_LINEAR)
    elif kind < 0.55:  # moved
        length = int(rng.integers(3, 8))
        kernel = np.zeros((length, length), np.float32)
        angle = rng.uniform(0, math.pi)
        reach = (length - 1) / 2 * np.array([math.cos(angle), math.sin(angle)])
        middle = (length - 1) / 2
        cv2.line(kernel, np.round(middle - reach).astype(int).tolist(),
                 np.round(middle + reach).astype(int).tolist(), 1.0, 1)  # fmt: skip
        picture = cv2.filter2D(picture, -1, kernel / kernel.sum())
    elif kind < 0.7:  # sharpened in the camera
        blurred = cv2.GaussianBlur(picture, (0, 0), 1.2)
        picture = picture + rng.uniform(0.3, 1.2) * (picture - blurred)
    if rng.random() < 0.5:
        noise = rng.standard_normal(picture.shape, dtype=np.float32)
        picture = picture + rng.uniform(0, 0.07) * noise
    picture = (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)
    if rng.random() < 0.4:
        code = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(15, 95))])
        picture = cv2.imdecode(code[1], cv2.IMREAD_COLOR)
    return picture.astype(np.float32) / 255


def collate(samples: list[dict[str, np.ndarray]]) -> HumanBatch:
    """Samples to tensors, channels first."""
    joined = {k: torch.from_numpy(np.stack([s[k] for s in samples])) for k in samples[0]}
    for key in ("pictures", "normals"):
        joined[key] = joined[key].permute(0, 3, 1, 2).float()
    return HumanBatch(**joined)


def halve(batch: HumanBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Relief [B, h, w], surface [B, h, w] and normals [B, 3, h, w] at half the size."""
    weight = batch.surface.float()[:, None]
    share = F.avg_pool2d(weight, 2)
    relief = F.avg_pool2d(batch.relief[:, None] * weight, 2) / share.clamp(min=0.25)
    normals = F.normalize(F.avg_pool2d(batch.normals * weight, 2), dim=1)
    surface = share[:, 0] > 0.7
    return relief[:, 0] * surface, surface, normals * surface[:, None]


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
