"""Training scenes: one performer, one motion, V views; from a folder of files, or rendered live."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..whole_file import whole_file


@dataclass(frozen=True, eq=False)
class Scene:
    """One performer, one motion, V views of F frames; uint8 pictures on any device."""

    frames: Tensor
    """[V, F, H, W, 3] the true views."""
    partial: Tensor
    """[V, F, H, W, 3] partial colour, seen from view 0 only."""
    normals: Tensor
    """[V, F, H, W, 3] camera-dependent normals."""
    masks: Tensor
    """[V, F, H, W] 0 to 255, the performer."""


KINDS = ("frames", "partial", "normals")


def save_scene(path: Path, scene: Scene) -> None:
    """Write one scene; the file appears only when it is whole."""
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **{k: v.cpu().numpy() for k, v in vars(scene).items()})


def load_scene(path: Path) -> Scene:
    """Read one scene."""
    with np.load(path, allow_pickle=False) as archive:
        return Scene(**{f.name: torch.from_numpy(archive[f.name]) for f in fields(Scene)})


class Scenes(Protocol):
    """Where a trainer gets scenes; the same for the same generator and step."""

    def choose(self, rng: np.random.Generator, step: int) -> Scene: ...


class SceneFolder:
    """The scenes of a folder, as they were at the start; the last used ones stay in memory."""

    def __init__(self, folder: Path, in_memory: int = 1000) -> None:
        self.paths = sorted(folder.glob("*.npz"))
        if not self.paths:
            raise ValueError(f"There are no scenes in {folder}: run render_scenes.py first.")
        self._load = lru_cache(maxsize=in_memory)(load_scene)

    def choose(self, rng: np.random.Generator, step: int) -> Scene:
        return self._load(self.paths[rng.integers(len(self.paths))])


class LiveScenes:
    """Scenes rendered on the training device when they are first asked for.

    A window of seeds slides on with the steps: `fresh` new scenes a step, each in use for a while,
    so that rendering is a small and constant part of the work. No state but the step, so a resumed
    run sees the same scenes.
    """

    def __init__(
        self,
        render: Callable[[int], Scene],  # by seed
        fresh: float = 0.25,
        window: int = 256,
    ) -> None:
        self.fresh, self.window = fresh, window
        self._render = lru_cache(maxsize=window)(render)

    def choose(self, rng: np.random.Generator, step: int) -> Scene:
        newest = int(step * self.fresh) + 8  # a few at once, for the first step too
        return self._render(int(rng.integers(max(0, newest - self.window), newest)))


def crop(
    scene: Scene,
    rng: np.random.Generator,
    frames: int,
    size: int,
) -> Tensor:  # [3, frames, size, size] 0..1
    """A window around the performer from a random view."""
    clip = getattr(scene, KINDS[rng.choice(3, p=[0.6, 0.2, 0.2])])
    V, F, H, W, _ = clip.shape
    v, f = rng.integers(V), rng.integers(F - frames + 1)
    places = scene.masks[v, f].nonzero()
    y, x = places[rng.integers(len(places))].tolist() if len(places) else (H // 2, W // 2)
    y = int(np.clip(y - size // 2, 0, H - size))
    x = int(np.clip(x - size // 2, 0, W - size))
    window = clip[v, f : f + frames, y : y + size, x : x + size]
    return window.permute(3, 0, 1, 2).float() / 255
