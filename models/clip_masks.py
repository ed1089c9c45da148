"""Masks that follow the colours of a clip: what a net is sure of teaches what the rest looks like.

Stage: inside the human net's work, between its answer on crops and the frame's mask. A small net
knows roughly where a body is, but in a room that it has never seen it loses a chest or takes a table
leg along. Within one clip, though, skin and clothes keep their colours, and so does the room.
GrabCut (Rother, Kolmogorov, Blake 2004) learns both as Gaussian mixtures from all frames together
and cuts where the picture has edges; what the net is sure of stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .relief import grab_cut, opencv

SURE, LIKELY, NEVER = 0.8, 0.4, 0.03
"""The net's share above which a pixel is the performer, is probably, and below which it is not."""
THIN = 5
"""Pixels: what is sure but thinner than this (lines on a floor) is not believed."""
ROUNDS = 4
"""Of mixtures and cut in turn."""
WINDOW = 16
"""Frames that share their colours; more would make the performer wait for the cancel button."""
LEAST, MOST = 0.5, 2.5
"""Times the net's area: a frame whose mask would become smaller or larger keeps the net's answer."""


Step = Callable[..., None]
"""(frames done since the last call, preview [3, H, W] or nothing)"""


def refine_masks(
    pictures: Tensor,  # [F, 3, H, W] 0..1, crops around the performer
    share: Tensor,  # [F, H, W] 0..1, how sure the net is
    together: bool = True,  # whether the frames are one clip
    on_step: Step | None = None,
) -> Tensor:  # [F, H, W] 0 or 1; frames without a sure pixel as they came
    """The performer by colour and edges, from the net's answer on."""
    refined = share.clone()
    step = on_step or (lambda done, preview=None: None)
    for some in torch.arange(len(share)).split(WINDOW if together else 1):
        frames = (pictures[some].clamp(0, 1) * 255).byte().movedim(1, -1).cpu().numpy()
        masks = _cut(frames, share[some].cpu().numpy(), step)
        for f, mask in zip(some.tolist(), masks, strict=True):
            area, new = int((share[f] > 0.5).sum()), int(mask.sum())
            if area and LEAST * area <= new <= MOST * area:
                refined[f] = torch.from_numpy(mask).to(share)
        last = int(some[-1])
        step(len(some), pictures[last] * (0.35 + 0.65 * refined[last]))
    return refined


def _cut(
    frames: np.ndarray,  # [F, H, W, 3] uint8
    share: np.ndarray,  # [F, H, W]
    step: Step,
) -> np.ndarray:  # [F, H, W] bool
    """The frames, one below the other, are one picture to GrabCut: so they share the mixtures."""
    cv2 = opencv()
    count, height, width = share.shape
    kernel = np.ones((THIN, THIN), np.uint8)
    sure = np.stack(
        [cv2.morphologyEx((s > SURE).astype(np.uint8), cv2.MORPH_OPEN, kernel) for s in share]
    )
    label = np.where(share > LIKELY, cv2.GC_PR_FGD, cv2.GC_PR_BGD)
    label[share < NEVER] = cv2.GC_BGD
    label[sure > 0] = cv2.GC_FGD
    label = label.astype(np.uint8).reshape(count * height, width)
    tall = frames.reshape(count * height, width, 3)
    inside = np.isin(label, (cv2.GC_FGD, cv2.GC_PR_FGD))
    if not sure.any() or inside.all():
        return share > 0.5
    inside = grab_cut(tall, label, ROUNDS, lambda: step(0)).reshape(share.shape)
    return np.stack([with_seed(i, s) for i, s in zip(inside, sure, strict=True)])


def with_seed(
    inside: np.ndarray,  # [H, W] bool
    sure: np.ndarray,  # [H, W]
) -> np.ndarray:  # [H, W] bool
    """The connected parts that hold something sure."""
    cv2 = opencv()
    _, number = cv2.connectedComponents(inside.astype(np.uint8))
    held = np.unique(number[(sure > 0) & inside])
    return np.isin(number, held[held > 0])
