"""Footage of real lenses, straightened to what a rig's K describes.

Stage: footage as it was filmed + rig with lenses -> VIEWS that fit their rig. A straight picture asks
where each of its places lies on the bent one (`lenses.Lens.bent`), so nothing has to be inverted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import Rig
from .lenses import Lens
from .views import Views, to_bytes


def straightened(
    frames: Tensor,  # [F, C, H, W] as filmed
    K: Tensor,  # [3, 3] pixels of this size, middle of the first pixel at 0.5
    lens: Lens,
) -> tuple[Tensor, Tensor]:  # [F, C, H, W], [H, W] 0 or 1
    """Pictures without the lens's bending, K unchanged, and where they show something. What was not
    filmed repeats the nearest that was."""
    H, W = frames.shape[-2:]
    if lens.straight:
        return frames, frames.new_ones(H, W)
    K = K.to(frames)
    x, y = (torch.arange(n).to(frames) + 0.5 for n in (W, H))
    x, y = (x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1]
    focal, size = torch.stack([K[0, 0], K[1, 1]]), frames.new_tensor([W, H])
    directions = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    at = lens.bent(directions) * focal + K[:2, 2]
    filmed = (((at >= 0) & (at <= size)).all(-1) & lens.reaches(directions)).to(frames)
    grid = (2 * at / size - 1).expand(len(frames), -1, -1, -1)
    return F.grid_sample(frames, grid, padding_mode="border", align_corners=False), filmed


def straight_views(
    views: Views,
    rig: Rig,  # of the views' size
    on_view: Callable[[int], None] | None = None,  # number of the view that is done
) -> Views:
    """Views with this rig, its lenses straightened; masks end where nothing was filmed."""
    if views.frames.shape[2] != 3:
        raise ValueError("'views' hold depth, not colours: connect the footage itself.")
    frames, masks = views.frames, views.masks
    if rig.lenses:
        frames = torch.empty_like(frames)
        masks = None if masks is None else masks.float().clone()
        for v, lens in enumerate(rig.lenses):
            if views.frames.dtype == torch.uint8:
                straight, filmed = straightened(views.frames[v].float() / 255, rig.K[v], lens)
                frames[v] = to_bytes(straight)
            else:
                frames[v], filmed = straightened(views.frames[v], rig.K[v], lens)
            if masks is not None:
                masks[v] = straightened(masks[v][:, None], rig.K[v], lens)[0][:, 0] * filmed
            if on_view:
                on_view(v)
    return replace(views, frames=frames, masks=masks, rig=replace(rig, lenses=()))
