"""Relative depth brought to a metric one: a scale and a shift a frame, robust, over the whole clip.

Stage: depth -> metres, before the points. MV-Performer aligns per-frame relative depth to a metric
one in closed form, by least squares over the performer. Departures: what lies off counts less
(Huber's weights, by iterated least squares), and the lines of neighbouring frames are held together,
because a scale that trembles makes a performer breathe.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 12
HUBER = 1.345
"""Huber's constant for 95 % efficiency on clean Gaussian errors, in standard deviations."""
FARTHEST = 3.0
"""Standard deviations beyond which a point is left out, in the second half of the rounds."""
MAD_TO_DEVIATION = 1.4826
FEWEST = 8
"""Points in a frame below which its line comes from its neighbours alone."""
NEAREST, FARTHEST_METRES = 0.05, 1000.0


@dataclass(frozen=True)
class Alignment:
    """What brought the clip to metres."""

    metres: Tensor
    """[F, H, W] along the optical axis; 0 = unknown."""
    scale: Tensor
    """[F] metres (or 1/metres, when the values are inverse depth) a unit of the values."""
    shift: Tensor
    """[F] metres or 1/metres."""
    error: Tensor
    """[F] median distance to the target in metres; NaN where a frame has none."""


def align_depth(
    values: Tensor,  # [F, H, W] relative: grows (or falls) with depth, or with 1/depth
    target: Tensor,  # [F, H, W] metres; not finite or <= 0 = unknown, may be sparse
    masks: Tensor,  # [F, H, W] 0..1, the performer
    inverse: bool = False,  # values go with 1/depth (disparity)
    steadiness: float = 0.1,  # 0 = every frame by itself
) -> Alignment:
    """scale * values + shift = target (or 1/target), solved for all frames together.

    `steadiness` weighs, against one frame's points, how far its line may lie from its neighbours',
    measured at the 10th and 90th percentile of the values.
    """
    d = values.double()
    inside = (masks > 0.5) & d.isfinite()
    known = inside & target.isfinite() & (target > 0)
    if known.sum() < FEWEST:
        raise ValueError(
            f"'depth' and 'metric' share {int(known.sum())} points inside the mask: give a metric "
            "depth of the same clip that shows the performer."
        )
    z = torch.where(known, target, 1.0).double()
    wanted = 1 / z if inverse else z
    spots = _percentiles(d[known], (0.1, 0.9))
    d = torch.where(inside, d, 0.0)
    weights, fitted = known.double(), z[known].median().expand_as(z)
    for round_ in range(ROUNDS):
        # An error e of 1/z is one of e z^2 metres; z as fitted, for a wrong target must not weigh.
        unit = fitted.square() if inverse else torch.ones_like(z)
        scale, shift = _solve(d, wanted, weights * unit.square(), known, spots, steadiness)
        away = ((_line(d, scale, shift) - wanted) * unit).abs()
        spread = MAD_TO_DEVIATION * away[known].median()
        weights = known * (HUBER * spread / away.clamp(min=1e-12)).clamp(max=1.0)
        if round_ >= ROUNDS // 2:
            weights = weights * (away <= FARTHEST * spread + 1e-9)
        if inverse:
            fitted = 1 / _line(d, scale, shift).clamp(min=1 / FARTHEST_METRES)
    fitted = _line(d, scale, shift)
    metres = 1 / fitted.clamp(min=1e-6) if inverse else fitted
    metres = torch.where(inside & (fitted > 0), metres.clamp(min=NEAREST), 0.0)
    error = torch.stack([
        (m - t)[k].abs().median() if k.any() else torch.tensor(torch.nan, dtype=m.dtype)
        for m, t, k in zip(metres, z, known, strict=True)
    ])  # fmt: skip
    return Alignment(metres.float(), scale.float(), shift.float(), error.float())


def _line(values: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return scale[:, None, None] * values + shift[:, None, None]


def _percentiles(values: Tensor, shares: tuple[float, ...]) -> Tensor:
    order = values.sort().values  # torch.quantile refuses more than 16 million values
    return order[[int(share * (len(order) - 1)) for share in shares]]


def _solve(
    d: Tensor, wanted: Tensor, weights: Tensor, known: Tensor, spots: Tensor, steadiness: float
) -> tuple[Tensor, Tensor]:
    """[F] scale and [F] shift: one system of 2 F equations, as frames lean on their neighbours."""
    F = len(d)
    w, d, y = (t.flatten(1) for t in (weights, d, wanted))
    moments = [(w * d * d).sum(1), (w * d).sum(1), w.sum(1)]
    right = torch.stack([(w * d * y).sum(1), (w * y).sum(1)], 1)
    enough = known.flatten(1).sum(1) >= FEWEST
    own = torch.stack([*moments[:2], *moments[1:]], 1).view(F, 2, 2) * enough[:, None, None]
    total = moments[2].mean()
    system = torch.zeros(F, 2, F, 2, dtype=d.dtype, device=d.device)
    index = torch.arange(F, device=d.device)
    system[index, :, index] = own
    at = torch.stack([spots, torch.ones_like(spots)], 1)  # a line's values at the spots
    hold = at.T @ at / len(spots) * total
    # Frames without points follow their neighbours even when the others are free.
    share = torch.full((F - 1,), steadiness, dtype=d.dtype, device=d.device)
    share = torch.where(enough[1:] & enough[:-1], share, max(steadiness, 1e-3))
    for f in range(F - 1):
        part = share[f] * hold
        system[f, :, f] += part
        system[f + 1, :, f + 1] += part
        system[f, :, f + 1] -= part
        system[f + 1, :, f] -= part
    flat = system.view(2 * F, 2 * F)
    flat = flat + torch.eye(2 * F, dtype=d.dtype, device=d.device) * 1e-12 * total
    line = torch.linalg.solve(flat, (right * enough[:, None]).flatten()).view(F, 2)
    return line[:, 0], line[:, 1]
