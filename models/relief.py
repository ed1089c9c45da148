"""Stand-ins for what a graph does not bring: a guessed depth and a guessed mask.

The relief inflates a mask like a balloon: h solves the Poisson equation -laplace(h) = 2 inside the
mask with h = 0 on its border, and sqrt(h) is the height over the silhouette plane; a long limb
becomes a half cylinder, a disc a dome of 0.71 of its radius. It is a guess, plausible for a limb
or a torso, and every caller says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

HALF_THICKNESS = 0.06
"""Half a body's front-to-back thickness as a share of the performer's height."""
SWEEPS = 40
"""Relaxation sweeps on each level of the pyramid: below one percent error on a disc of 100 px."""


COARSEST = 16
"""Cells of the shorter side at the pyramid's top: there the sweeps reach across."""


def _relax(height: Tensor, mask: Tensor, source: float) -> Tensor:
    """Jacobi sweeps of -laplace(h) = source with h = 0 outside the mask."""
    for _ in range(SWEEPS):
        near = F.pad(height, (1, 1, 1, 1))
        total = (
            near[..., 1:-1, :-2] + near[..., 1:-1, 2:] + near[..., :-2, 1:-1] + near[..., 2:, 1:-1]
        )
        height = (total + source) / 4 * mask
    return height


def inflate(
    masks: Tensor,  # [F, H, W] 0..1
) -> Tensor:  # [F, H, W] height over the silhouette plane, pixels
    """Balloon height of every mask, coarse to fine so that wide shapes converge too."""
    height = torch.zeros_like(masks, dtype=torch.float32)
    solid = masks > 0.5
    if solid.any():
        halvings = max(0, math.ceil(math.log2(min(masks.shape[-2:]) / COARSEST)))
        # Nothing happens outside of the performer's box, which is a third of most pictures.
        part = (slice(None), *(_cells(s, 2**halvings) for s in box(solid)))
        height[part] = _inflate(solid[part], halvings)
    return height


def box(
    inside: Tensor,  # [F, H, W] bool, not empty
) -> tuple[slice, slice]:  # rows, columns
    """The smallest that holds the performer in all frames."""
    used = (inside.any(0).any(d).nonzero()[:, 0] for d in (1, 0))
    rows, columns = (slice(int(places[0]), int(places[-1]) + 1) for places in used)
    return rows, columns


def _cells(span: slice, cell: int) -> slice:
    """By whole cells of the pyramid's top, and one more on each side."""
    return slice(max(0, (span.start // cell - 1) * cell), (-(-span.stop // cell) + 1) * cell)


def _inflate(solid: Tensor, halvings: int) -> Tensor:  # [F, h, w] bool -> pixels
    levels = [solid.float()[:, None]]
    for _ in range(halvings):
        levels.append(F.avg_pool2d(levels[-1], 2, ceil_mode=True))
    height = torch.zeros_like(levels[-1])
    for level, mask in reversed(list(enumerate(levels))):
        solid = (mask > 0.5).float()
        if height.shape != mask.shape:
            height = F.interpolate(height, size=mask.shape[-2:], mode="bilinear")
        height = _relax(height, solid, 2.0 * 4**level)
    return height[:, 0].clamp(min=0).sqrt()


def check_performer(
    masks: Tensor,  # [F, H, W] 0..1
) -> None:
    """One sentence when no frame shows anybody."""
    if not (masks > 0.5).any():
        raise ValueError(
            "The mask is black in every frame, so there is no performer to work on: connect a "
            "mask that shows the performer in white."
        )


def person_scale(
    masks: Tensor,  # [F, H, W] 0..1
    person_height: float,  # metres
) -> float:  # metres a pixel
    """How large a pixel is at the performer, from the tallest tenth of the frames."""
    check_performer(masks)
    rows = (masks > 0.5).any(-1)
    tall = rows.sum(-1).float()
    return person_height / float(torch.quantile(tall[tall > 0], 0.9))


def relief_depth(
    masks: Tensor,  # [F, H, W] 0..1
    focal: float,  # pixels
    person_height: float,  # metres
) -> Tensor:  # [F, H, W] metres; 0 outside the mask
    """A guessed depth: the inflated mask, at the distance where the performer has its height."""
    scale = person_scale(masks, person_height)
    distance = focal * scale
    height = inflate(masks) * scale
    # A balloon as deep as a broad coat is wide would be too thick for a body.
    limit = 2 * HALF_THICKNESS * person_height
    height = limit * torch.tanh(height / limit)
    smooth = F.avg_pool1d(F.pad(height.flatten(1).T[None], (1, 1), mode="replicate"), 3, stride=1)[
        0
    ].T.reshape(height.shape)
    return torch.where(masks > 0.5, distance - smooth, 0.0)


def opencv(
    what: str = "There is no mask, and guessing one", instead: str = "connect a 'mask', or "
):
    """OpenCV, or a sentence: what needs it, and what could be done instead."""
    try:
        import cv2
    except ImportError:
        raise ValueError(
            f"{what} needs the package opencv-python, which is not installed: {instead}install "
            "opencv-python and restart ComfyUI."
        ) from None
    return cv2


def grab_cut(
    picture: np.ndarray,  # [H, W, 3] uint8
    labels: np.ndarray,  # [H, W] uint8, OpenCV's GC_ kinds; written into
    rounds: int,  # of colour mixtures and cut in turn
    on_round: Callable[[], None] = lambda: None,
) -> np.ndarray:  # [H, W] bool
    """The same foreground every time, by colour and edges (Rother, Kolmogorov, Blake 2004)."""
    cv2 = opencv()
    cv2.setRNGSeed(0)  # the mixtures start from k-means
    room, body = np.zeros((1, 65)), np.zeros((1, 65))
    for turn in range(rounds):
        how = cv2.GC_EVAL if turn else cv2.GC_INIT_WITH_MASK
        cv2.grabCut(np.ascontiguousarray(picture), labels, None, room, body, 1, how)
        on_round()
    return (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)


BAND = 3
"""Pixels on each side of a guessed outline that GrabCut may change."""


def _refine(frame: np.ndarray, found: np.ndarray) -> np.ndarray:
    """GrabCut in a narrow band along the outline; the first guess where it fails."""
    cv2 = opencv()
    kernel = np.ones((2 * BAND + 1, 2 * BAND + 1), np.uint8)
    inner = cv2.erode(found.astype(np.uint8), kernel)
    outer = cv2.dilate(found.astype(np.uint8), kernel)
    if not inner.any() or outer.all():
        return found
    labels = np.where(found, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    labels[inner > 0], labels[outer == 0] = cv2.GC_FGD, cv2.GC_BGD
    refined = grab_cut(frame, labels, rounds=2)
    both = (refined & found).sum() / max(1, (refined | found).sum())
    return refined if both > 0.7 else found


def mask_from_plain_background(
    frames: Tensor,  # [F, 3, H, W] 0..1
) -> Tensor:  # [F, H, W] 0 or 1
    """The largest thing that differs from the picture's border; for plain backgrounds only.

    GrabCut then decides the outline, where colours mix.
    """
    cv2 = opencv()
    masks = []
    for frame in (frames.movedim(1, -1) * 255).round().byte().cpu().numpy():
        border = np.concatenate([frame[:2].reshape(-1, 3), frame[:, :2].reshape(-1, 3),
                                 frame[:, -2:].reshape(-1, 3)])  # fmt: skip
        middle = np.median(border, axis=0)
        spread = np.abs(border - middle).max(1)
        away = np.abs(frame.astype(np.float32) - middle).max(-1)
        different = (away > max(18.0, 2.5 * np.percentile(spread, 90))).astype(np.uint8)
        different = cv2.morphologyEx(different, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
        different = cv2.morphologyEx(different, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))
        count, labels, stats, _ = cv2.connectedComponentsWithStats(different)
        largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax()) if count > 1 else 0
        found = (labels == largest) if largest else np.zeros_like(different, dtype=bool)
        masks.append(_refine(frame, found))
    return torch.from_numpy(np.stack(masks)).float()
