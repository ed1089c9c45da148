"""Depth pictures of any convention to metres, with plain-word checks.

Stage: depth -> metres, before the points. A relative depth knows neither scale nor distance, so it
is placed by the performer's height and given a plausible thickness; that is a guess and is said.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
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

RING = 12
"""Pixels around the mask that count as the performer's background."""
BEHIND = 0.02
"""Background and performer within this share of the distance tell nothing."""
HOLLOW = 0.2
"""Local correlation of depth with the inflated mask: -0.25 to -0.71 on 24 bodies, mirrored when
near and far are swapped."""


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
    if not high - low > 1e-6:
        raise ValueError(
            f"'depth' is {float(low):.3g} all over the performer, so it has no shape: check that the "
            "depth node ran on these frames, or disconnect 'depth' to have a relief guessed."
        )
    unit = ((values - low) / (high - low)).clamp(-0.2, 1.2)
    return torch.where(values.isfinite(), unit, torch.nan)


def _relief(unit: Tensor, near_is_white: bool, person_height: float) -> Tensor:
    """Metres behind the performer's middle, as thick as performers are."""
    return ((1 - unit if near_is_white else unit) - 0.5) * THICKNESS * person_height


def near_is_white(
    metres: Tensor,  # [F, H, W]
    known: Tensor,  # [F, H, W] bool
) -> Tensor:  # [F, H, W] 0..1
    """Depth of the whole clip from white (near) to dark grey (far); unknown is black."""
    if not known.any():
        return torch.zeros_like(metres)
    order = metres[known].sort().values
    near, far = order[int(0.01 * (len(order) - 1))], order[int(0.99 * (len(order) - 1))]
    white = 1 - 0.8 * ((metres - near) / (far - near).clamp(min=1e-3)).clamp(0, 1)
    return torch.where(known, white, 0.0)


def depth_at(
    depth: Tensor,  # [F, H, W] relative
    masks: Tensor,  # [F, H, W] 0..1
    distance: Tensor,  # [F] metres
    person_height: float,  # metres
) -> Tensor:  # [F, H, W] metres
    """Relative depth at a known distance: its thickness is a guess, near and far as the background
    or the roundness of limbs tell."""
    unit = _robust_unit(depth, masks > 0.5)
    metres = distance[:, None, None] + _relief(unit, True, person_height)
    if _inside_out(metres, masks):
        metres = distance[:, None, None] + _relief(unit, False, person_height)
    return metres


COLOURFUL = 0.1
"""Difference between channels that no grey picture has, after JPEG neither."""
COLOURFUL_SHARE = 0.02


def grey_depth(
    pictures: Tensor,  # [F, H, W, C] as a depth node gives them
    name: str,  # of the socket
) -> Tensor:  # [F, H, W]
    """The one number a pixel that a depth picture carries."""
    channels = pictures[..., :3].float()
    spread = channels.amax(-1) - channels.amin(-1)
    if float((spread > COLOURFUL).float().mean()) > COLOURFUL_SHARE:
        raise ValueError(
            f"'{name}' is coloured, but depth must be grey: turn the colour map (turbo, inferno, "
            "spectral ...) off in the depth node, and see that no normal map or clip is connected."
        )
    return channels.mean(-1)


GAP = 0.05
"""Share of the range between black and the darkest other value, from which on black is nothing."""


def without_blanks(
    values: Tensor,  # [F, H, W] grey
    masks: Tensor,  # [F, H, W] 0..1
) -> Tensor:
    """NaN where a picture is black inside the mask although nothing else is nearly as dark: depth
    nodes with masks of their own leave the rest black."""
    black = (values == 0) & (masks > 0.5)
    others = values[(values != 0) & (masks > 0.5) & values.isfinite()]
    if not black.any() or not len(others) or float(others.min()) < GAP * float(others.max()):
        return values
    return torch.where(black, torch.nan, values)


JUMP = 0.05
"""Share of the clip's range of depth between neighbours that is an edge, not a slope."""


def resize_depth(
    depth: Tensor,  # [F, h, w], any convention
    height: int,
    width: int,
) -> Tensor:  # [F, height, width]
    """Smooth on surfaces, nearest at their edges: nothing is drawn between two surfaces."""
    if depth.shape[-2:] == (height, width):
        return depth
    size, values = (height, width), depth[:, None].float()
    nearest = F.interpolate(values, size=size, mode="nearest-exact")[:, 0]
    known = values.isfinite()
    if not known.any():
        return nearest
    order = values[known].sort().values
    room = JUMP * (order[int(0.98 * (len(order) - 1))] - order[int(0.02 * (len(order) - 1))])
    filled = torch.where(known, values, order[0] - 10 * room - 1)
    around = F.max_pool2d(filled, 3, 1, 1) + F.max_pool2d(-filled, 3, 1, 1)
    edge = F.interpolate((around > room).float(), size=size, mode="nearest-exact")[:, 0] > 0
    smooth = F.interpolate(filled, size=size, mode="bilinear")[:, 0]
    return torch.where(edge | ~nearest.isfinite(), nearest, smooth)


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
        metres = expected + _relief(unit, convention == "near is white", person_height)
        note = "depth is relative: its scale is a guess from the performer's height"
    else:
        metres = depth
        if convention != "metres":
            # Nothing, or infinitely far: not a point a million metres away.
            metres = torch.where(depth > 0, 1 / depth.clamp(min=1e-6), 0.0)
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
            "the depth looks inside out (the performer's middle is farther away than the outline or "
            "than the background): if the result looks hollow, choose the opposite depth convention"
        )
    return metres, note


def _local(values: Tensor, inside: Tensor) -> Tensor:
    """Values minus their mean over the neighbourhood inside the mask: what is relief, not pose."""
    size = 2 * max(2, min(inside.shape[-2:]) // 40) + 1

    def blur(t: Tensor) -> Tensor:
        return F.avg_pool2d(t[:, None], size, stride=1, padding=size // 2)[:, 0]

    weight = inside.float()
    values = torch.where(inside, values, 0.0)
    return values - blur(values) / blur(weight).clamp(min=1e-6)


def _inside_out(metres: Tensor, masks: Tensor) -> bool:
    """Whether limbs are hollow (their middle farther than their outline) or the performer stands
    behind what surrounds him: both mean that near and far are swapped."""
    known = metres.isfinite() & (metres > 0)
    inside = (masks > 0.5) & known
    if inside.sum() < 50:
        return False
    around = F.max_pool2d((masks > 0.5).float()[:, None], 2 * RING + 1, 1, RING)[:, 0] > 0
    near = F.max_pool2d((masks > 0.5).float()[:, None], 5, 1, 2)[:, 0] > 0
    ring = around & ~near & known
    middle = metres[inside].median()
    if ring.sum() > 50:
        # The background decides where there is one: no pose turns it round.
        gap = float(metres[ring].median() - middle)
        if abs(gap) > BEHIND * float(middle):
            return gap < 0
    height, depth = (_local(t, inside)[inside] for t in (inflate(masks), metres))
    return bool(torch.corrcoef(torch.stack([height, depth]))[0, 1] > HOLLOW)
