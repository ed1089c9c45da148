"""Finished views fed back into sampling (MVP4D's clean references): more views, or a longer clip.

What is finished comes as latents and is marked in the noise mask: 0 = known and kept, 1 = to be made.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .cameras import Rig
from .views import Views, as_pictures, nearest_frames, snap_frames

SAME_PLACE, SAME_TURN = 0.02, 0.02
"""Two cameras are the same within this share of the distance to the performer, and radians."""

SETTLED = 0.05
"""Of the latents' spread: less is rounding (half precision, tiles)."""


def same_cameras(
    known: Rig,
    wanted: Rig,
) -> list[int | None]:  # [V known] places in `wanted`; None = not among them
    """Where the cameras of one rig stand in another."""
    places = []
    for center, R in zip(known.centers, known.T_camera_world[:, :3, :3], strict=True):
        away = (wanted.centers - center).norm(dim=1) / center.norm().clamp(min=1e-6)
        # The angle of a small rotation, from its matrix: |R - R'| = 2 sqrt(2) sin(angle / 2).
        turn = (wanted.T_camera_world[:, :3, :3] - R).flatten(1).norm(dim=1) / 2**0.5
        fits = (away < SAME_PLACE) & (turn < SAME_TURN)
        best = int(torch.where(fits, away, torch.inf).argmin())
        places.append(best if fits[best] else None)
    return places


def with_known_views(
    empty: Tensor,  # [V, C, T, h, w]
    finished: Tensor,  # [N, C, T, h, w]
    places: list[int],  # [N] in 0..V-1
) -> tuple[Tensor, Tensor]:  # samples, mask [V, 1, T, h, w]
    """Latents in which some views are known as a whole."""
    samples, mask = empty.clone(), torch.ones_like(empty[:, :1])
    samples[places], mask[places] = finished.to(empty), 0
    return samples, mask


def with_known_start(
    empty: Tensor,  # [V, C, T, h, w]
    start: Tensor,  # [V, C, t, h, w], t < T
) -> tuple[Tensor, Tensor]:  # samples, mask [V, 1, T, h, w]
    """Latents whose first frames are known in every view."""
    samples, mask = empty.clone(), torch.ones_like(empty[:, :1])
    known = start.shape[2]
    samples[:, :, :known], mask[:, :, :known] = start.to(empty), 0
    return samples, mask


def settled_frames(
    alone: Tensor,  # [..., t, h, w] of some pictures
    followed: Tensor,  # [..., t + n, h, w] of the same pictures with others behind them
) -> int:
    """How many leading latent frames no later picture can change: only those are known.

    All of them with a causal VAE, such as Wan's own. A small one that packs each picture with the
    ones after it leaves the last latent frame open: kept, it would hold the clip still there.
    """
    t = alone.shape[-3]
    change = (followed[..., :t, :, :] - alone).abs().movedim(-3, 0).flatten(1).amax(1)
    changed = (change > SETTLED * alone.std()).nonzero()[:, 0]
    return int(changed[0]) if len(changed) else t


def overlap_pictures(
    wanted: int,
    available: int,
) -> int:
    """The nearest 4n + 1 that there are, so that whole latent frames are known."""
    return min(nearest_frames(wanted), snap_frames(available))


def joined_in_time(first: Views, second: Views, overlap: int) -> Views:
    """One clip; over the overlap, the end of one fades into the beginning of the other."""
    a, b = first.frames.shape, second.frames.shape
    if (a[0], *a[2:]) != (b[0], *b[2:]):
        raise ValueError(
            f"'first' has {a[0]} views of {a[4]}x{a[3]} but 'second' {b[0]} of {b[4]}x{b[3]}: join "
            "clips of the same rig and size."
        )
    if overlap >= min(a[1], b[1]):
        raise ValueError(
            f"The clips have {a[1]} and {b[1]} frames, so they can't overlap by {overlap}: make "
            "'overlap' smaller."
        )
    share = torch.arange(1, overlap + 1) / (overlap + 1)
    frames = []
    for v in range(a[0]):
        before, after = as_pictures(first, v), as_pictures(second, v)
        mixed = before[a[1] - overlap :].lerp(after[:overlap], share[:, None, None, None])
        frames.append(torch.cat([before[: a[1] - overlap], mixed, after[overlap:]]))
    masks = None
    if first.masks is not None and second.masks is not None:
        masks = torch.cat([first.masks, second.masks[:, overlap:].to(first.masks)], dim=1)
    return replace(first, frames=torch.stack(frames), masks=masks)
