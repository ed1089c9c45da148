"""Views of one performer, smoothed together: surface that two of them see gets the same colours.

Stage: smoothed views + depth + rig -> the same, agreeing better. Each view's own cast, constant over
the clip, is told from the surface that it shares with others, and taken off this surface; then views
vote for each other at the same moment, as frames do along the motion (implicit_detail.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import Rig
from .filters import gaussian
from .metrics import DEPTH_TOLERANCE, corresponding, sample

FLOOR = 0.1
"""Added to colours before their ratio is taken: black has no colour."""
FEWEST = 60
"""Places that two views must share to be compared."""
MOMENTS = 8
"""Frames at which casts are told."""
SURE = 0.01
"""Factor (less 1) by which geometry and light make views differ anyway."""
PATCH = 5
"""Pixels a side over which views are compared."""
ALIKE = 2.0
"""Times the usual difference of two views beyond which one counts little for the other."""
LEAST = 1e-5
"""Mean squared difference that any two views may have."""
EXPLAINED = 0.25
"""Share of the variance between the views' backgrounds that their casts may leave, to be theirs too."""
BESIDE = 2
"""Pixels beside the surface that still have its cast: its soft edge."""
SAY = 0.5
"""Weight of another view: it is read between its pixels, at places that are not exact."""


def _pairs(V: int) -> Iterator[tuple[int, int]]:
    return ((v, w) for v in range(V) for w in range(V) if v != w)


def _seen(
    frames: Tensor, depth: Tensor, rig: Rig, v: int, w: int, n: int
) -> tuple[Tensor, Tensor]:  # [3, H, W], [H, W] bool
    """What view w shows at the surface points of view v's pixels, and which it sees."""
    x, y, both = corresponding(
        depth[v, n][None], depth[w, n][None], rig.select([v, w]), DEPTH_TOLERANCE
    )
    return sample(frames[w, n][None], x, y)[0], both[0]


def view_casts(
    frames: Tensor,  # [V, F, 3, H, W] 0..1
    depth: Tensor,  # [V, F, H, W] metres, 0 = nothing
    rig: Rig,
    tick,
) -> Tensor:  # [V, 3] logarithms of factors, 0 on average
    """By how much each view is brighter than the others on the surface that they share: least squares
    over the medians of all pairs."""
    V, count = frames.shape[:2]
    rows, goals, weights = [], [], []
    moments = torch.linspace(0, count - 1, min(MOMENTS, count)).round().long().tolist()
    for v, w in _pairs(V):
        for n in moments:
            tick()
            other, both = _seen(frames, depth, rig, v, w, n)
            if int(both.sum()) < FEWEST:
                continue
            ratio = ((frames[v, n] + FLOOR) / (other.clamp(min=0) + FLOOR)).log()[:, both]
            row = frames.new_zeros(V)
            row[v], row[w] = 1, -1
            rows.append(row)
            goals.append(ratio.median(1).values)
            weights.append(float(both.sum()) ** 0.5)
    if not rows:
        return frames.new_zeros(V, 3)
    A, b = torch.stack(rows), torch.stack(goals)
    weight = b.new_tensor(weights)[:, None]
    ridge = 1e-3 * weight.square().sum() * torch.eye(V).to(A)
    found = torch.linalg.solve(A.T @ (weight * A) + ridge / weight.sum(), A.T @ (weight * b))
    found = found - found.mean(0)
    return found * (1 - (SURE / found.abs().clamp(min=1e-6)).square()).clamp(min=0)


def without_casts(
    frames: Tensor,  # [V, F, 3, H, W]
    casts: Tensor,  # [V, 3]
    depth: Tensor,  # [V, F, H, W] metres, 0 = nothing
) -> Tensor:  # [V, F, 3, H, W]
    """Views without their casts: on the surface, and on the rest where that is tinted alike."""
    share = torch.stack([_beside(view > 0) for view in depth])[:, :, None]
    if _tinted_alike(frames, casts, share[:, :, 0] == 0):
        share = torch.ones_like(share)
    return (frames + FLOOR) * (-share * casts[:, None, :, None, None]).exp() - FLOOR


def _tinted_alike(frames: Tensor, casts: Tensor, rest: Tensor) -> bool:  # rest: [V, F, H, W] bool
    """Whether the casts explain how the views differ beside the surface, as before one backdrop.

    Before different scenery nothing tells, and its colours are left as they are."""
    if int(rest.flatten(1).sum(1).min()) < FEWEST:
        return False
    colours = [view.movedim(1, -1)[mask] for view, mask in zip(frames, rest, strict=True)]
    usual = torch.stack([(c.clamp(min=0) + FLOOR).log().median(0).values for c in colours])
    apart, left = (x.var(0).sum() for x in (usual, usual - casts))
    return bool(left < EXPLAINED * apart)


def _beside(known: Tensor) -> Tensor:  # [F, H, W] bool -> [F, H, W] 0..1
    """1 on the surface and just beside it, fading out over some pixels."""
    wide = F.max_pool2d(known.float()[:, None], 2 * BESIDE + 1, 1, BESIDE)[:, 0]
    return gaussian(wide, BESIDE / 2)


def agreed(frames: Tensor, depth: Tensor, rig: Rig, tick) -> Tensor:  # [V, F, 3, H, W]
    """Every view, with what the others show of the same surface where they are alike."""
    usual = _usual(frames, depth, rig, tick)
    out = torch.empty_like(frames)
    for v in range(len(frames)):
        for n in range(frames.shape[1]):
            tick()
            own = frames[v, n]
            total, weight = own.clone(), torch.ones_like(own[0])
            for w in range(len(frames)):
                if w == v:
                    continue
                other, both = _seen(frames, depth, rig, v, w, n)
                away = _patches(own - other, both) / usual
                say = SAY * both * torch.exp(-(away - 1).clamp(min=0) / ALIKE)
                total += say * other
                weight += say
            out[v, n] = total / weight
    return out


def _patches(away: Tensor, both: Tensor) -> Tensor:  # [3, H, W], [H, W] -> [H, W]
    """Mean squares over patches, of the pixels that both see."""
    pair = torch.stack([away.square().mean(0) * both, both.to(away)])
    mean = F.avg_pool2d(pair[None], PATCH, 1, PATCH // 2)[0]
    return mean[0] / mean[1].clamp(min=1e-6)


def _usual(frames: Tensor, depth: Tensor, rig: Rig, tick) -> float:
    """How much two views differ where they are most alike."""
    found = []
    for v, w in _pairs(len(frames)):
        tick()
        other, both = _seen(frames, depth, rig, v, w, frames.shape[1] // 2)
        if both.any():
            found.append(_patches(frames[v, frames.shape[1] // 2] - other, both)[both])
    if not found:
        return LEAST
    flat = torch.cat(found).sort().values
    return max(LEAST, 1.3 * float(flat[len(flat) // 3]))
