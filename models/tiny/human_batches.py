"""Training pictures of the human net: exact people before any background, spoiled as cameras do.

`HumanBatches` takes people and backgrounds from the pool of `human_pool`, places a person anywhere
at any size, puts others beside, things in front, and blurs, darkens, tints and compresses the
picture. Deterministic by seed; a run is equal to the bit only when the pool was whole before it
began.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..human_net import OUTSIDE
from ..performer_truth import (
    KEYPOINTS,
)
from .human_pool import BACKGROUND_TILE, DEPTH_UNIT, MARGIN, TILE

FLIPPED = tuple(
    KEYPOINTS.index(k[:-1] + {"L": "R", "R": "L"}[k[-1]]) if k[-2:] in (".L", ".R") else i
    for i, k in enumerate(KEYPOINTS)
)
"""Which keypoint is which in a mirror."""

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
