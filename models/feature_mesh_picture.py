"""What depth-aware rendering carries to every view, and what is newly visible, as pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .cameras import Rig
from .depth import near_is_white
from .feature_mesh import carried
from .unseen import STRENGTH, TINT

FINER = 4
"""Along a token: places at which the anchor's picture is shown in the other views."""
EMPTY = 0.5
"""Grey where the anchor tells nothing."""


def carried_pictures(
    depth: Tensor,  # [T, H, W] the anchor's, as for `carried`
    rig: Rig,
    anchor: int,
    grid: tuple[int, int],  # h, w: tokens of a view
    pictures: Tensor
    | None = None,  # [T, 3, H, W] 0..1 the anchor's; None = its depth, near is white
) -> Tensor:  # [V, T, 3, height, width] of the rig, 0..1
    """Every view as the anchor's picture on its depth, with what is newly visible in orange.

    Orange is the complement of M, token by token. The anchor's own view is its picture.
    """
    made = carried(depth, rig, anchor, grid)
    if pictures is None:
        pictures = near_is_white(depth, depth > 0)[:, None].expand(-1, 3, -1, -1)
    h, w = (FINER * cells for cells in grid)
    small = F.interpolate(pictures.float(), (h, w), mode="area")
    fine = carried(depth, rig, anchor, (h, w))
    columns = rearrange(small, "t c h w -> 1 (t h w) c")
    shown = torch.where(fine.seen.flatten(1)[..., None], fine.rendered(columns)[0], EMPTY)
    shown = rearrange(shown, "v (t h w) c -> v t c h w", h=h, w=w)
    shown[anchor] = small
    size, moments = (rig.height, rig.width), shown.shape[:2]
    shown = F.interpolate(shown.flatten(0, 1), size, mode="bilinear").unflatten(0, moments)
    orange = F.interpolate(made.newly_visible().float(), size)[:, :, None]
    tint = shown.new_tensor(TINT)[:, None, None] / 255
    return shown + STRENGTH * orange * (tint - shown)
