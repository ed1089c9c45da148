"""Views: what every camera of a rig sees over time (data flow: video -> VIEWS -> video)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .cameras import Rig


@dataclass(frozen=True)
class Views:
    """V synchronised videos of F frames, with an optional mask per frame and the cameras.

    Colour frames have 3 channels, 0..1 or as bytes; a one-channel `frames` carries metric depth in
    metres (0 where there is nothing). `as_pictures` gives 0..1 in any case. They lie in ordinary
    memory, beside their cameras, wherever they were made.
    """

    frames: Tensor
    """[V, F, C, H, W], C = 3 (colour: float 0..1, or uint8) or 1 (float, depth in metres)."""
    masks: Tensor | None = None
    """[V, F, H, W] float 0..1 or bool, 1 = performer; None = not known."""
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
        V, count, C, H, W = self.frames.shape
        if self.masks is not None and tuple(self.masks.shape) != (V, count, H, W):
            raise ValueError(
                f"Views have {V} views x {count} frames of {W}x{H}, but the masks have shape "
                f"{list(self.masks.shape)}: give one mask per view and frame, of the same size."
            )
        if C == 1 and not self.frames.is_floating_point():
            raise ValueError("Depth in metres must be float.")
        if self.rig is not None and len(self.rig) != V:
            raise ValueError(f"Views hold {V} views, but the rig has {len(self.rig)} cameras.")
        if self.rig is not None and (self.rig.width, self.rig.height) != (W, H):
            raise ValueError(
                f"Views are {W}x{H}, but the rig's pictures are {self.rig.width}x{self.rig.height}."
            )
        if not self.fps > 0:
            raise ValueError(f"Frames a second must be above 0, got {self.fps}.")
        object.__setattr__(self, "frames", self.frames.cpu())
        if self.masks is not None:
            object.__setattr__(self, "masks", self.masks.cpu())

    def __len__(self) -> int:
        return self.frames.shape[0]

    @cached_property
    def depth_range(self) -> tuple[float, float]:
        """Nearest and farthest of all views, metres; of depth alone."""
        near, far = math.inf, 0.0
        for view in self.frames:  # what is picked out is a copy: gigabytes, of all at once
            known = view[view > 0]
            if len(known):
                near, far = min(near, float(known.amin())), max(far, float(known.amax()))
        return (near, far) if near < math.inf else (0.0, 0.0)

    def _comfy_cache_tensors(self) -> list[Tensor]:
        rig = self.rig._comfy_cache_tensors() if self.rig is not None else []
        return [self.frames, *([self.masks] if self.masks is not None else []), *rig]

    def get_ram_usage(self) -> int:
        """Bytes held, for ComfyUI's cache accounting."""
        return sum(t.numel() * t.element_size() for t in self._comfy_cache_tensors())


LATENT_STRIDE = 4
"""Frames that one latent frame of a Wan VAE holds, after the first."""
SIZE_STEP = 16
"""Picture sizes must be multiples of this: 8 in the VAE, 2 in the transformer's patches."""


def snap_frames(count: int) -> int:
    """The largest 4n + 1 that is at most `count`."""
    return (count - 1) // LATENT_STRIDE * LATENT_STRIDE + 1


def nearest_frames(count: int) -> int:
    """The nearest 4n + 1, which fills latent frames: the first holds one picture, others four."""
    return LATENT_STRIDE * round((count - 1) / LATENT_STRIDE) + 1


def latent_frames(frames: int) -> int:
    """T of a clip of so many frames."""
    return (frames - 1) // LATENT_STRIDE + 1


def snap_size(width: int, height: int) -> tuple[int, int]:
    """The nearest multiples of 16, at least 16."""

    def snap(length: int) -> int:
        return max(SIZE_STEP, round(length / SIZE_STEP) * SIZE_STEP)

    return snap(width), snap(height)


def resize_frames(
    frames: Tensor,  # [F, C, H, W]
    width: int,
    height: int,
) -> Tensor:  # [F, C, height, width]
    """Fill the new size without distortion: scale, then cut the middle."""
    H, W = frames.shape[-2:]
    if (width, height) == (W, H):
        return frames
    scale = max(width / W, height / H)
    size = (max(height, round(H * scale)), max(width, round(W * scale)))
    if scale < 1:
        scaled = F.interpolate(frames, size=size, mode="area")
    else:
        scaled = F.interpolate(frames, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return scaled[..., top : top + height, left : left + width]


REFERENCE_HEIGHT = 0.8
"""Share of a reference picture's height (or width) that the performer fills."""


def reference_frames(
    frames: Tensor,  # [F, 3, H, W] 0..1
    masks: Tensor,  # [F, H, W] 0..1
    width: int,
    height: int,
    background: float,
) -> Tensor:  # [F, 3, height, width]
    """The performer alone on a plain ground, one window for the whole clip, filling most of it."""
    rows, columns = ((masks > 0.5).any(0).any(d).nonzero()[:, 0] for d in (1, 0))
    if not len(rows):
        raise ValueError(
            "The reference shows nobody: its mask is empty; give a clip with a performer in it."
        )
    cut = (frames - background) * masks[:, None]
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    # In pixels of the source: half the window, as high as needed for the taller of both fits.
    half_height = max((bottom - top) / 2, (right - left) / 2 * height / width) / REFERENCE_HEIGHT
    half_width = half_height * width / height
    y = (top + bottom) / 2 + torch.linspace(-1, 1, 2 * height + 1)[1::2] * half_height
    x = (left + right) / 2 + torch.linspace(-1, 1, 2 * width + 1)[1::2] * half_width
    # Area-average first where the window is much larger than the result, else bilinear samples.
    shrink = max(1, int(half_height * 2 / height))
    small = F.avg_pool2d(cut, shrink, ceil_mode=True, count_include_pad=False)
    h, w = (n * shrink for n in small.shape[-2:])
    places = torch.stack(torch.meshgrid(2 * x / w - 1, 2 * y / h - 1, indexing="xy"), -1)
    places = places.to(small).expand(len(frames), -1, -1, -1)
    return F.grid_sample(small, places, align_corners=False) + background


def _label_pixels(text: str, height: int) -> Tensor:  # [h, w] 0..1
    """A short text as pixels, white on black."""
    font = ImageFont.load_default(size=height)
    left, top, right, bottom = font.getbbox(text)
    picture = Image.new("L", (right - left + 4, bottom - top + 4))
    ImageDraw.Draw(picture).text((2 - left, 2 - top), text, fill=255, font=font)
    return torch.from_numpy(np.array(picture)).float() / 255


def label_pictures(
    pictures: Tensor,  # [N, 3, H, W] 0..1
    labels: Sequence[str],
) -> Tensor:
    """Write a label into the upper left corner of every picture."""
    pictures = pictures.clone()
    H, W = pictures.shape[-2:]
    for picture, text in zip(pictures, labels, strict=True):
        ink = _label_pixels(text, max(8, H // 16))[:H, :W]
        corner = picture[:, : ink.shape[0], : ink.shape[1]]
        corner.copy_(corner * 0.35 + 0.65 * ink)
    return pictures


def grid_columns(count: int) -> int:
    """Columns of a grid that is wider than high."""
    return math.ceil(math.sqrt(count * 2)) if count > 3 else count


def grid_picture(
    pictures: Tensor,  # [N, 3, H, W]
) -> Tensor:  # [3, rows H, columns W]; unused places are black
    """Lay pictures out in rows."""
    columns = grid_columns(len(pictures))
    missing = -len(pictures) % columns
    filled = torch.cat([pictures, pictures.new_zeros(missing, *pictures.shape[1:])])
    return rearrange(filled, "(r c) k h w -> k (r h) (c w)", c=columns)


def as_pictures(
    views: Views,
    v: int | slice = slice(None),
    frames: slice = slice(None),
) -> Tensor:  # [V, F, 3, H, W] 0..1
    """Colour as it is; depth as near = bright over the performer's range in all views.

    With a number `v`, that view alone, [F, 3, H, W]: many views as float32 are gigabytes.
    """
    chosen = views.frames[v][..., frames, :, :, :]
    if views.frames.dtype == torch.uint8:
        return chosen.float() / 255
    if views.frames.shape[2] == 3:
        return chosen.float().clamp(0, 1)
    near, far = views.depth_range
    bright = 1 - 0.8 * (chosen.float() - near) / max(far - near, 1e-6)
    return torch.where(chosen > 0, bright, 0.0).expand(*chosen.shape[:-3], 3, -1, -1)


def to_bytes(pictures: Tensor) -> Tensor:
    """0..1 as 0..255; what lies outside is cut off."""
    return (pictures * 255).round().clamp(0, 255).to(torch.uint8)


def view_labels(views: Views) -> tuple[str, ...]:
    """The rig's labels, or numbers."""
    return views.rig.labels if views.rig else tuple(str(v) for v in range(len(views)))


def contact_sheet(
    views: Views,
    moments: int = 5,
) -> Tensor:  # [3, V H, moments W]
    """One row a view, evenly spaced frames from left to right."""
    frames = views.frames.shape[1]
    chosen = torch.linspace(0, frames - 1, min(moments, frames)).round().long()
    pictures = torch.stack([as_pictures(views, v)[chosen] for v in range(len(views))])
    first = label_pictures(pictures[:, 0], view_labels(views))
    pictures = torch.cat([first[:, None], pictures[:, 1:]], dim=1)
    return rearrange(pictures, "v f c h w -> c (v h) (f w)")


GRID_LIMIT = 4096
"""Pixels a side: what browsers and hardware decoders play; H.264 encoders end at 16384."""


def grid_video(views: Views) -> Tensor:  # [F, 3, rows H, columns W], at most GRID_LIMIT a side
    """All views side by side, labelled, over time; many or large views are shrunk to fit."""
    H, W = views.frames.shape[-2:]
    columns = grid_columns(len(views))
    rows = math.ceil(len(views) / columns)
    scale = min(GRID_LIMIT / (columns * W), GRID_LIMIT / (rows * H))
    size = (max(1, int(W * scale)), max(1, int(H * scale))) if scale < 1 else (W, H)
    pictures = torch.stack([resize_frames(as_pictures(views, v), *size) for v in range(len(views))])
    labels = view_labels(views)
    return torch.stack(
        [grid_picture(label_pictures(pictures[:, f], labels)) for f in range(pictures.shape[1])]
    )
