"""What the source camera did not see, as a mask on latents: only that is left to a sampler.

Stage: visibility of Render Conditions -> inpainting mask of the multi-view sampler. A latent pixel
stands for a square of pixels in one picture (the first) or in four, and is kept only where
practically all of them may be kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from . import filters
from .geometry import EMPTY, SEEN, UNSEEN_SIDE
from .views import (
    LATENT_STRIDE,
    Views,
    as_pictures,
    resize_frames,
    snap_frames,
    snap_size,
    to_bytes,
)

Background = Literal["keep", "make"]

KEPT_SHARE = 0.9
"""Of a latent pixel's square that may be kept in every one of its pictures for it to be kept:
single unseen pixels, the gaps between splats, do not open it; a border through it does."""
COLOURED = 24
"""Of 255: channels of a visibility picture differ by less, even after a video codec."""


def states(visibility: Views, v: int) -> tuple[Tensor, Tensor]:  # seen, body: [F, H, W] bool
    """Where one view shows the seen side, and where it shows the performer at all."""
    frames = visibility.frames[v]
    bytes_ = frames if frames.dtype == torch.uint8 else to_bytes(frames)
    grey = bytes_[:, 0]
    return grey > (SEEN + UNSEEN_SIDE) // 2, grey > (UNSEEN_SIDE + EMPTY) // 2


def check_visibility(visibility: Views) -> None:
    """One sentence when these views are no visibility."""
    frames = visibility.frames
    if frames.is_floating_point() and not frames.isfinite().all():
        raise ValueError(
            "'visibility' holds NaN or infinity: connect 'visibility' of Render Conditions."
        )
    kind = "depth" if frames.shape[2] == 1 else "colours" if _is_coloured(frames) else None
    if kind:
        raise ValueError(
            f"'visibility' holds {kind}, not the three states seen, unseen and empty: connect "
            "'visibility' of Render Conditions."
        )


def _is_coloured(frames: Tensor) -> bool:  # [V, F, 3, H, W]
    """Whether more than a thousandth of a view's pixels is anything but grey."""
    for view in frames:
        bytes_ = (view if view.dtype == torch.uint8 else to_bytes(view)).short()
        if ((bytes_.amax(1) - bytes_.amin(1)) > COLOURED).float().mean() > 1e-3:
            return True
    return False


def check_grid(visibility: Views, grid: tuple[int, ...]) -> int:  # grid: V, T, h, w of the latent
    """Pixels along a latent pixel; one sentence when latent and visibility do not fit."""
    V, T, h, w = grid
    count, _, H, W = visibility.frames.shape[1:]
    if len(visibility) != V:
        raise ValueError(
            f"'latent' has {V} views but 'visibility' {len(visibility)}: take both from the same "
            "Render Conditions."
        )
    pictures = LATENT_STRIDE * (T - 1) + 1
    if snap_frames(count) != pictures:
        raise ValueError(
            f"'latent' has {T} latent frames, that is {pictures} pictures, but 'visibility' {count}: "
            "encode views of the same Render Conditions."
        )
    width, height = snap_size(W, H)
    stride = width // w
    if (w * stride, h * stride) != (width, height):
        raise ValueError(
            f"'latent' is {w}x{h} latent pixels (of 8 or 16 pixels each) but 'visibility' is "
            f"{W}x{H}: encode views of the same size as the visibility."
        )
    return stride


def kept_latents(
    kept: Tensor,  # [F, H, W] bool: pixels that may stay
    stride: int,  # pixels along a latent pixel
) -> Tensor:  # [T, h, w] bool
    """Latent pixels whose pixels may stay in all pictures that they hold."""
    kept = kept[: snap_frames(len(kept)), None].float()
    kept = resize_frames(kept, *snap_size(kept.shape[-1], kept.shape[-2]))
    squares = F.avg_pool2d(kept, stride)[:, 0] >= KEPT_SHARE
    later = rearrange(squares[1:], "(t p) h w -> t p h w", p=LATENT_STRIDE)
    return torch.cat([squares[:1], later.all(1)])


def grown(
    mask: Tensor,  # [T, h, w] bool
    margin: int,  # latent pixels
) -> Tensor:
    """The mask and all within `margin` of it, also across corners."""
    return filters.grown(mask.float(), margin) > 0


def unseen_mask(
    visibility: Views,
    grid: tuple[int, ...],  # V, T, h, w of the latent
    margin: int,  # latent pixels
    background: Background,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:  # [V, 1, T, h, w] float, 1 = to be made
    """The noise mask that leaves alone what the source camera saw, and the background if wished."""
    check_visibility(visibility)
    stride = check_grid(visibility, grid)
    masks = []
    for v in range(len(visibility)):
        seen, body = states(visibility, v)
        made = grown(~kept_latents(seen | ~body, stride), margin)
        if background == "make":
            # Without the margin, which would eat the performer from all sides: along the rim there
            # is nothing unknown that could have leaked into what is kept.
            made |= ~kept_latents(seen, stride)
        masks.append(made)
        if on_step:
            on_step(v + 1, len(visibility))
    return torch.stack(masks)[:, None].float()


TINT, STRENGTH = (255.0, 120.0, 0.0), 0.6
"""Orange over what is to be made, and how far it covers the picture."""


def mask_pictures(
    visibility: Views,
    mask: Tensor,  # [V, 1, T, h, w], 1 = to be made
) -> Views:
    """The visibility with what is to be made in orange; one picture a latent frame, its last."""
    last = slice(0, LATENT_STRIDE * mask.shape[2], LATENT_STRIDE)
    chosen = replace(visibility, frames=visibility.frames[:, last], masks=None)
    width, height = snap_size(*reversed(visibility.frames.shape[-2:]))
    tint = torch.tensor(TINT)[:, None, None] / 255
    views = []
    for v in range(len(chosen)):
        shown = resize_frames(as_pictures(chosen, v), width, height)
        cover = STRENGTH * F.interpolate(mask[v, 0][:, None], (height, width))
        views.append(to_bytes(shown + cover * (tint.to(shown) - shown)))
    rig = visibility.rig.filled(width, height) if visibility.rig is not None else None
    return Views(torch.stack(views), None, rig, visibility.fps)
