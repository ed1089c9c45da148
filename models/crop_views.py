"""Views cut out around the performer, each with a K of its own, so that every pixel is spent on him.

Stage: VIEWS with masks -> VIEWS of one size, in which one window a view holds him in all frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import Rig
from .views import Views, to_bytes, view_labels


def performer_window(
    masks: Tensor,  # [F, H, W] 0..1 or bool
    width: int,
    height: int,
    margin: float,
) -> Tensor | None:  # [4] left, top, right, bottom in pixels; may reach beyond the picture
    """The window of the new shape that holds the masks of all frames, and a share `margin` more; None
    where no mask shows anybody."""
    seen = (masks > 0.5).any(0)
    rows, columns = (seen.any(d).nonzero()[:, 0] for d in (1, 0))
    if not len(rows):
        return None
    top, bottom, left, right = (
        float(v) for v in (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1)
    )
    tall = (1 + margin) * max(bottom - top, (right - left) * height / width)
    middle = torch.tensor([left + right, top + bottom]) / 2
    half = torch.tensor([tall * width / height, tall]) / 2
    return torch.cat([middle - half, middle + half])


def cut_intrinsics(
    K: Tensor,  # [3, 3]
    window: Tensor,  # [4] left, top, right, bottom
    width: int,
    height: int,
) -> Tensor:  # [3, 3]
    """K of a window that was scaled to a new size."""
    K = K.clone()
    K[:2, 2] -= window[:2]
    K[:2] *= (K.new_tensor([width, height]) / (window[2:] - window[:2]))[:, None]
    return K


def cut_pictures(
    pictures: Tensor,  # [F, C, H, W] float
    window: Tensor,  # [4] left, top, right, bottom in pixels
    width: int,
    height: int,
) -> Tensor:  # [F, C, height, width]
    """A window at a new size; beyond the picture it repeats the rim. Where the window is shrunk, every
    pixel is the mean of as many samples as the picture has there."""
    H, W = pictures.shape[-2:]
    left, top, right, bottom = window.tolist()
    finer = max(1, math.ceil((bottom - top) / height - 1e-6))

    def places(start: float, end: float, count: int, whole: int) -> Tensor:
        shares = (torch.arange(count * finer) + 0.5) / (count * finer)
        return (start + (end - start) * shares) / whole * 2 - 1

    x, y = places(left, right, width, W), places(top, bottom, height, H)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None].to(pictures)
    cut = [  # a frame at a time: the samples of many are gigabytes
        F.avg_pool2d(
            F.grid_sample(picture[None], grid, padding_mode="border", align_corners=False), finer
        )
        for picture in pictures
    ]
    return torch.cat(cut)


def _inside(
    window: Tensor, size: tuple[int, int], width: int, height: int
) -> Tensor:  # [h, w] bool
    """Which pixels of the cut lie in the picture."""
    x, y = (
        window[a] + (window[a + 2] - window[a]) * (torch.arange(n) + 0.5) / n
        for a, n in ((0, width), (1, height))
    )
    return ((y >= 0) & (y <= size[1]))[:, None] & (x >= 0) & (x <= size[0])


def cropped_views(
    views: Views,
    rig: Rig | None,  # of the views' size
    width: int,
    height: int,
    margin: float,
    on_view: Callable[[int], None] | None = None,  # number of the view that is done
) -> tuple[Views, Tensor]:  # and the windows [V, 4] in pixels of the given views
    """Every view cut out around the performer; masks end where the picture ended."""
    if views.frames.shape[2] != 3:
        raise ValueError("'views' hold depth, not colours: connect the footage itself.")
    if views.masks is None:
        raise ValueError(
            "'views' have no masks, so there is nothing to cut out around: make them first, with "
            "Performer Masks."
        )
    V, count, _, H, W = views.frames.shape
    windows = []
    for v, label in enumerate(view_labels(views)):
        window = performer_window(views.masks[v], width, height, margin)
        if window is None:
            raise ValueError(
                f"The masks of view {v} ({label}) in 'views' are empty in all frames: there is nobody "
                "to cut out around; leave this view out or correct its masks."
            )
        windows.append(window)
    frames = views.frames.new_empty(V, count, 3, height, width)
    masks = torch.empty(V, count, height, width)
    for v, window in enumerate(windows):
        for f in range(count):
            picture = views.frames[v, f, None]
            if views.frames.dtype == torch.uint8:
                cut = cut_pictures(picture.float() / 255, window, width, height)
                frames[v, f] = to_bytes(cut[0])
            else:
                frames[v, f] = cut_pictures(picture, window, width, height)[0]
        whole = cut_pictures(views.masks[v].float()[:, None], window, width, height)[:, 0]
        masks[v] = whole * _inside(window, (W, H), width, height)
        if on_view:
            on_view(v)
    if rig is not None:
        K = [
            cut_intrinsics(k, window, width, height)
            for k, window in zip(rig.K, windows, strict=True)
        ]
        rig = replace(rig, K=torch.stack(K), width=width, height=height)
    return replace(views, frames=frames, masks=masks, rig=rig), torch.stack(windows)
