"""Oriented points: what one camera saw of the performer, as coloured 3D points with normals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cameras import Rig


@dataclass(frozen=True)
class OrientedPoints:
    """The points of F frames, one frame after another (ragged: `frame_offsets`)."""

    positions: Tensor
    """[N, 3] float32, world, metres."""
    normals: Tensor
    """[N, 3] float32, world, unit length, turned towards the source camera."""
    colors: Tensor
    """[N, 3] float32, 0..1."""
    radii: Tensor
    """[N] float32, metres: half the footprint of the source pixel at that depth."""
    confidences: Tensor
    """[N] float32, 0..1."""
    frame_offsets: Tensor
    """[F + 1] int64: points of frame f are [frame_offsets[f], frame_offsets[f + 1])."""
    source: Rig
    """The camera that saw them (one view)."""
    fps: float = 16.0
    """Frames a second."""
