"""Views of one performer that are fitted together: where two of them show the same surface.

Stage: depth + rig -> pairs of places that must have the same canonical colour.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .cameras import Rig
from .mv_opt_links import across_views


@dataclass(frozen=True)
class Shared:
    """N places of one view and the same surface in another, at one moment."""

    here: tuple[int, int]
    """View and frame."""
    there: tuple[int, int]
    places_here: Tensor
    """[N, 2] shares of the picture."""
    places_there: Tensor


def shared_places(depth: Tensor, rig: Rig, tick) -> list[Shared]:  # [V, F, H, W] metres
    """Co-visible surface of every two views at every moment."""
    size = depth.new_tensor([rig.width, rig.height])
    return [
        Shared(k.here, k.there, k.places_here / size, k.places_there / size)
        for k in across_views(depth, rig, tick=tick)
    ]
