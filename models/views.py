"""Views: what every camera of a rig sees over time (data flow: video -> VIEWS -> video)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cameras import Rig


@dataclass(frozen=True)
class Views:
    """V synchronised videos of F frames, with an optional mask per frame and the cameras.

    Colour frames are 0..1 with 3 channels; a one-channel `frames` carries metric depth in metres
    (0 where there is nothing).
    """

    frames: Tensor
    """[V, F, C, H, W] float, C = 3 (colour 0..1) or 1 (depth in metres)."""
    masks: Tensor | None = None
    """[V, F, H, W] float 0..1, 1 = performer; None = not known."""
    rig: Rig | None = None
    """The V cameras; None = not known."""
    fps: float = 16.0
    """Frames a second."""

    def __post_init__(self) -> None:
        if self.frames.ndim != 5 or self.frames.shape[2] not in (1, 3):
            raise ValueError(
                f"Views need frames of shape [V, F, 1 or 3, H, W], got {list(self.frames.shape)}."
            )
        if min(self.frames.shape) < 1:
            raise ValueError(f"Views are empty: frames have shape {list(self.frames.shape)}.")
        V, F, _, H, W = self.frames.shape
        if self.masks is not None and tuple(self.masks.shape) != (V, F, H, W):
            raise ValueError(
                f"Views have {V} views x {F} frames of {W}x{H}, but the masks have shape "
                f"{list(self.masks.shape)}: give one mask per view and frame, of the same size."
            )
        if self.rig is not None and len(self.rig) != V:
            raise ValueError(f"Views hold {V} views, but the rig has {len(self.rig)} cameras.")
        if self.rig is not None and (self.rig.width, self.rig.height) != (W, H):
            raise ValueError(
                f"Views are {W}x{H}, but the rig's pictures are {self.rig.width}x{self.rig.height}."
            )
        if not self.fps > 0:
            raise ValueError(f"Frames a second must be above 0, got {self.fps}.")

    def __len__(self) -> int:
        return self.frames.shape[0]

    def _comfy_cache_tensors(self) -> list[Tensor]:
        rig = self.rig._comfy_cache_tensors() if self.rig is not None else []
        return [self.frames, *([self.masks] if self.masks is not None else []), *rig]

    def get_ram_usage(self) -> int:
        """Bytes held, for ComfyUI's cache accounting."""
        return sum(t.numel() * t.element_size() for t in self._comfy_cache_tensors())
