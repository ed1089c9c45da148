"""Distilling an avatar on a body: Gaussians on its skin, fitted to what all cameras saw.

Stage: VIEWS + RIG + BODY -> AVATAR (`distilling`). The Gaussians go where the skin goes
(`avatar_mesh`), stand in a light that is learned with them (`avatar_light`), and a net tells what
changes with the pose (`avatar_uv`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from .avatar import Avatar, Detail, SkinMotion
from .avatar_growth import GrowingSplats
from .avatar_light import even_light, lit
from .avatar_losses import order_loss
from .avatar_mesh import (
    Skin,
    SkinSpots,
    SpotPose,
    bound_again,
    pose_spots,
    posed,
    splats_on_body,
    spots_of,
)
from .avatar_uv import Atlas, DetailNet, calm_loss, detailed, moved_maps, shown_by
from .body import Body
from .distilling import Distilling, Settings, step_adam
from .fit_body import Places, skin
from .splats import Splats
from .views import Views

LEAST_UNIT = 0.005
"""Share of the height: the skin's triangles count as this large at least, so that fine meshes leave
room for clothes and hair."""
DETAIL_STARTS = 0.2
"""Share of the steps before the net that tells pose-dependent detail begins to learn."""
DETAIL_RATE, LIGHT_RATE = 5e-4, 0.01
CALM = 0.05
"""What wild offsets cost."""
PAINTED = 4
"""Frames from which Gaussians take their first colours."""


def check_body(views: Views, body: Body) -> None:
    """One sentence about a body that can't be the one in the views."""
    if views.frames.shape[1] != body.frame_count:
        raise ValueError(
            f"'views' have {views.frames.shape[1]} frames, 'body' has {body.frame_count}: both must "
            "show the same moments, so cut or resample one of them."
        )


class AvatarTraining(Distilling):
    """An avatar on a body that is being distilled, step after step."""

    def __init__(
        self,
        views: Views,
        body: Body,
        settings: Settings,
        weights: Tensor | None = None,  # [V] how much each view counts
        way: str | None = None,  # of rasterize_splats.WAYS; None = the quickest
        tick: Callable[[], None] = lambda: None,  # often while it gets ready; may raise to stop
    ) -> None:
        super().__init__(views, settings, weights, way)
        check_body(views, body)
        self.body = replace(body, neutral=None, fps=views.fps)
        self.height = float(body.rest[:, 1].amax() - body.rest[:, 1].amin())
        skin_of = Skin(body.rest, body.faces)
        self.poses = []
        for vertices in body.vertices:
            tick()
            self.poses.append(skin_of.pose(vertices))
        splats, places = splats_on_body(body, settings.gaussians, settings.degree)
        area = float(skin(body.rest, body.faces))
        # A triangle's side, were all alike.
        self.unit = max(math.sqrt(2 * area / len(body.faces)), LEAST_UNIT * self.height)
        self._hang(places)
        self.light = even_light(body.rest).requires_grad_()
        self.light_adam = torch.optim.Adam([self.light], lr=LIGHT_RATE)
        frames = np.linspace(0, body.frame_count - 1, PAINTED).round().astype(int)
        self.growing = GrowingSplats(self.painted(splats, set(frames.tolist()), tick), self.unit)
        self.detail = None
        if settings.detail:
            self._prepare_detail(tick)

    # ------------------------------------------------------------ where Gaussians hang

    def _hang(self, places: Places) -> None:
        self.places = places
        self.spots: SkinSpots = spots_of(places, self.body.rest, self.body.faces)
        self._stands: dict[int, SpotPose] = {}
        self.on_atlas = None

    def _stand(self, frame: int) -> SpotPose:
        """Of the spots in a frame; kept until Gaussians hang elsewhere."""
        if frame not in self._stands:
            self._stands[frame] = pose_spots(self.spots, self.poses[frame])
        return self._stands[frame]

    def _prepare_detail(self, tick: Callable[[], None]) -> None:
        self.atlas = Atlas(self.body.rest, self.body.faces)
        self.maps = []
        for pose in self.poses:
            tick()
            self.maps.append(moved_maps(self.atlas, self.body.rest, pose))
        net = DetailNet(self.settings.seed).to(self.body.rest.device)
        self.detail = Detail(net, shown_by(self.maps))
        self.detail_adam = torch.optim.Adam(
            self.detail.net.parameters(), lr=DETAIL_RATE, weight_decay=1e-4
        )

    def hang_again(self, parents: Tensor) -> None:
        old = Places(self.places.faces[parents], self.places.weights[parents])
        self._hang(bound_again(self.growing.splats, old, self.body.rest, self.body.faces))

    # ------------------------------------------------------------ a step

    def changed(self, frame: int) -> tuple[Splats, Tensor | None]:
        """The Gaussians on the template with what the frame's pose changes, and the offsets' maps."""
        splats = self.growing.splats
        if self.detail is None or self.step < DETAIL_STARTS * self.settings.steps:
            return splats, None
        if self.on_atlas is None:
            self.on_atlas = self.atlas.places(self.spots)
        offsets = self.detail.net(self.maps[frame])
        return detailed(splats, self.on_atlas.read(offsets), self.height), offsets

    def stand(self, splats: Splats, frame: int) -> Splats:
        stand = self._stand(frame)
        return lit(posed(splats, self.spots, stand), stand.normals, self.light)

    def disorder(self, frame: int, change: Tensor | None) -> list[Tensor]:
        splats = self.growing.splats
        units = splats.means.new_full((len(splats),), self.unit)
        costs = [order_loss(splats, self.spots.anchors, units)]
        return costs if change is None else [*costs, CALM * calm_loss(change, self.atlas)]

    def step_others(self, rate: float, change: Tensor | None) -> None:
        step_adam(self.light_adam, rate * LIGHT_RATE)
        if change is not None:
            step_adam(self.detail_adam, rate * DETAIL_RATE)

    # ------------------------------------------------------------ what came of it

    @property
    def avatar(self) -> Avatar:
        splats = Splats(*(t.detach().clone() for t in self.growing.splats.tensors()))
        detail = self.detail
        if detail is not None:
            net = DetailNet().to(self.body.rest.device)
            net.load_state_dict(detail.net.state_dict())
            detail = Detail(net, detail.shown)
        motion = SkinMotion(self.body, self.places, self.light.detach().clone(), detail)
        return Avatar(splats, motion, self.body.fps)
