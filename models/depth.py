"""Depth pictures of any convention to metres, with plain-word checks.

Stage: depth -> metres, before the points. A relative depth knows neither scale nor distance, so it
is placed by the performer's height and given a plausible thickness; that is a guess and is said.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .relief import inflate, person_scale

DepthConvention = Literal["metres", "near is white", "near is black", "inverse (1/metres)"]
CONVENTIONS: tuple[DepthConvention, ...] = (
    "near is white", "near is black", "metres", "inverse (1/metres)",
)  # fmt: skip
THICKNESS = 0.3
"""How deep a standing performer reaches, arms included, as a share of the height."""
WRONG_SCALE = 4.0
"""A metric depth this many times off the distance that the performer's height asks for is none."""


def _robust_unit(values: Tensor, inside: Tensor) -> Tensor:
    """Values scaled so that the 2nd and 98th percentile inside the mask are 0 and 1."""
    chosen = values[inside & values.isfinite()]
    if not len(chosen):
        raise ValueError(
            "'depth' has no finite value inside the mask: check that depth and mask belong to the "
            "same clip."
        )
    order = chosen.sort().values
    low, high = order[int(0.02 * (len(order) - 1))], order[int(0.98 * (len(order) - 1))]
    return ((values - low) / (high - low).clamp(min=1e-6)).clamp(-0.2, 1.2)


def depth_to_metres(
    depth: Tensor,  # [F, H, W] as it came
    masks: Tensor,  # [F, H, W] 0..1
    convention: DepthConvention,
    focal: float,  # pixels
    person_height: float,  # metres
) -> tuple[Tensor, str]:  # [F, H, W] metres, and a note
    """Metres along the optical axis; unusable values stay not finite or become 0."""
    inside = masks > 0.5
    expected = focal * person_scale(masks, person_height)
    if convention in ("near is white", "near is black"):
        unit = _robust_unit(depth, inside)
        away = 1 - unit if convention == "near is white" else unit
        metres = expected + (away - 0.5) * THICKNESS * person_height
        note = "depth is relative: its scale is a guess from the performer's height"
    else:
        metres = 1 / depth.clamp(min=1e-6) if convention != "metres" else depth
        note = ""
        good = inside & metres.isfinite() & (depth > 0)
        if good.any():
            middle = float(metres[good].median())
            if not expected / WRONG_SCALE < middle < expected * WRONG_SCALE:
                raise ValueError(
                    f"'depth' read as {convention} puts the performer {middle:.2f} m away, but a "
                    f"{person_height:.2f} m performer of this size in the picture stands about "
                    f"{expected:.1f} m away: choose another depth convention, or correct the field "
                    "of view."
                )
    if _inside_out(metres, masks):
        note += "; " if note else ""
        note += (
            "the depth looks inside out (the body's middle is farther away than its outline): if "
            "the result looks hollow, choose the opposite depth convention"
        )
    return metres, note


def _inside_out(metres: Tensor, masks: Tensor) -> bool:
    """Whether depth grows towards the middle of the silhouette, as it never does on a body."""
    good = (masks > 0.5) & metres.isfinite()
    if good.sum() < 50:
        return False
    pair = torch.stack([inflate(masks)[good], metres[good]])
    return bool(torch.corrcoef(pair)[0, 1] > 0.4)
