"""Rendered training scenes on disk: one compressed file per scene, read back as crops or clips."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

KINDS = ("frames", "partial", "normals")


@dataclass(frozen=True)
class Scene:
    """One performer, one motion, V views; uint8 pictures."""

    frames: np.ndarray
    """[V, F, H, W, 3] the true views."""
    partial: np.ndarray
    """[V, F, H, W, 3] partial colour, seen from view 0 only."""
    normals: np.ndarray
    """[V, F, H, W, 3] camera-dependent normals."""
    masks: np.ndarray
    """[V, F, H, W] 0 or 255, the performer."""


def save_scene(path: Path, scene: Scene) -> None:
    """Write one scene; the file appears only when it is whole."""
    temporary = path.with_suffix(".part")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **vars(scene))
    temporary.rename(path)


def load_scene(path: Path) -> Scene:
    """Read one scene."""
    with np.load(path, allow_pickle=False) as archive:
        return Scene(**{name: archive[name] for name in Scene.__dataclass_fields__})


class SceneFolder:
    """The scenes of a folder, as they were at the start; the last used ones stay in memory."""

    def __init__(self, folder: Path, in_memory: int = 64) -> None:
        self.paths = sorted(folder.glob("*.npz"))
        if not self.paths:
            raise ValueError(f"There are no scenes in {folder}: run render_scenes.py first.")
        self.load = lru_cache(maxsize=in_memory)(load_scene)

    def crop(
        self,
        rng: np.random.Generator,
        frames: int,
        size: int,
    ) -> np.ndarray:  # [frames, size, size, 3] float32, 0..1
        """A crop around the performer from a random view of a random scene."""
        scene = self.load(self.paths[rng.integers(len(self.paths))])
        clip = getattr(scene, KINDS[rng.choice(3, p=[0.6, 0.2, 0.2])])
        V, F, H, W, _ = clip.shape
        v, f = rng.integers(V), rng.integers(F - frames + 1)
        rows, columns = np.nonzero(scene.masks[v, f])
        if len(rows):
            pick = rng.integers(len(rows))
            y, x = rows[pick], columns[pick]
        else:
            y, x = H // 2, W // 2
        y = int(np.clip(y - size // 2, 0, H - size))
        x = int(np.clip(x - size // 2, 0, W - size))
        return clip[v, f : f + frames, y : y + size, x : x + size].astype(np.float32) / 255
