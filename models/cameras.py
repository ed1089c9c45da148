"""Cameras: the rig (a set of cameras), orbits, projection.

Frame: OpenCV. x right, y down, z forward; world up is -y. Metres, radians, pixels.
The source camera of a clip sits at azimuth 0 and looks along +z at the world's origin, which is
the performer's centre.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rig:
    """V cameras that make pictures of one size."""

    K: Tensor
    """[V, 3, 3] float32, pixels; pixel centres at +0.5 (the image spans 0..width)."""
    T_camera_world: Tensor
    """[V, 4, 4] float32, world points to camera points (OpenCV axes), metres."""
    width: int
    height: int
    names: tuple[str, ...] = ()
    """One label per view; () = numbered."""

    def __len__(self) -> int:
        return self.K.shape[0]

    def _comfy_cache_tensors(self) -> list[Tensor]:
        return [self.K, self.T_camera_world]

    def get_ram_usage(self) -> int:
        """Bytes held, for ComfyUI's cache accounting."""
        return sum(t.numel() * t.element_size() for t in self._comfy_cache_tensors())
