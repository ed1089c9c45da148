"""Distilling an avatar without a body: Gaussians and control nodes that carry them, from the views.

Stage: VIEWS + RIG -> AVATAR (`distilling`), for clothes, hair and whatever has no mesh. Before the
first step the skin of every frame is carved out of the masks (`avatar_start`) and nodes carry the
skin of one frame to the others (`avatar_tracking`). Then Gaussians, nodes and the light are learned
together from the pictures; nodes are kept as rigid among each other as they can (`avatar_free.Ties`)
and smooth over time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .avatar import Avatar, NodeMotion
from .avatar_free import Followed, Nodes, Ties, follow, moved, nearest
from .avatar_growth import GrowingSplats
from .avatar_light import even_light, lit
from .avatar_losses import order_loss
from .avatar_start import Skin, most_seen, skins, splats_on_skin, thinned
from .avatar_tracking import track
from .distilling import Distilling, Settings, step_adam
from .quats import turned
from .splats import Splats
from .views import Views

OnStep = Callable[[int, int], None]

NODES = 200
"""Control nodes on a performer."""
LIGHT_RATE = 0.01
PLACE_RATE, TURN_RATE = 0.02, 4e-3
"""Of Adam for nodes: spacings between them, and quaternions' parts."""
RIGID, SMOOTH = 0.1, 0.01
"""What bending and jerks cost."""
UNIT = 3.0
"""Distances between first Gaussians that a Gaussian may grow to without cost."""


class FreeTraining(Distilling):
    """An avatar on control nodes that is being distilled, step after step."""

    def __init__(
        self,
        views: Views,
        settings: Settings,
        weights: Tensor | None = None,  # [V] how much each view counts
        way: str | None = None,  # of rasterize_splats.WAYS; None = the quickest
        on_step: OnStep | None = None,  # counts the frames that are got ready, twice each
    ) -> None:
        super().__init__(views, settings, weights, way)
        frames = self.masks.shape[1]
        counts = (self.weights > 0).to(self.masks)
        seen = replace(views, masks=self.masks * counts[:, None, None, None])
        found = skins(seen, _part(on_step, 0, 2 * frames))
        if not any(found):
            raise ValueError(
                "The masks of 'views' meet nowhere in space, so nothing can be distilled without a "
                "body: check that 'rig' has the cameras of the views in the same order, and that each "
                "mask shows the same performer."
            )
        self.frame = most_seen(seen.masks, [skin is not None for skin in found])
        skin = thinned(found[self.frame], settings.gaussians)
        tracked = track(found, self.frame, NODES, _part(on_step, frames, 2 * frames))
        self.apart = tracked.apart
        """[F] how badly each frame's skin was followed, see `avatar_tracking.Tracked`."""
        self._take(skin, tracked.nodes)

    def _take(self, skin: Skin, nodes: Nodes) -> None:
        """Begin with Gaussians on this skin, and with these nodes."""
        self.still, self.ties = nodes, Ties(nodes)
        self.parts = [
            (quats.clone().requires_grad_(), goes.clone().requires_grad_())
            for quats, goes in zip(nodes.quats, nodes.goes, strict=True)
        ]
        spacing = float(self.ties.size)
        self.adams = [
            (
                torch.optim.Adam([quats], lr=TURN_RATE, betas=(0.8, 0.98)),
                torch.optim.Adam([goes], lr=PLACE_RATE * spacing, betas=(0.8, 0.98)),
            )
            for quats, goes in self.parts
        ]
        splats = splats_on_skin(skin, self.settings.degree)
        near, _ = nearest(splats.means, splats.means, min(2, len(splats)))
        self.unit = UNIT * float(near[:, -1].mean().clamp(min=1e-4))
        self.anchors, self.normals = splats.means.clone(), skin.normals
        self.followed: Followed = follow(splats.means, nodes)
        self.light = even_light(splats.means).requires_grad_()
        self.light_adam = torch.optim.Adam([self.light], lr=LIGHT_RATE)
        self.growing = GrowingSplats(self.painted(splats, {self.frame}), self.unit)

    @property
    def nodes(self) -> Nodes:
        """As they are now, for gradients."""
        quats, goes = zip(*self.parts, strict=True)
        return replace(self.still, quats=torch.stack(quats), goes=torch.stack(goes))

    # ------------------------------------------------------------ a step

    def stand(self, splats: Splats, frame: int) -> Splats:
        world, turns = moved(splats, self.followed, self.nodes, frame)
        return lit(world, turned(turns, self.normals), self.light)

    def disorder(self, frame: int, change: Tensor | None) -> list[Tensor]:
        splats, nodes = self.growing.splats, self.nodes
        units = splats.means.new_full((len(splats),), self.unit)
        return [
            order_loss(splats, self.anchors, units),
            RIGID * self.ties.rigidity(nodes, frame),
            SMOOTH * self.ties.jerkiness(nodes, frame),
        ]

    def step_others(self, rate: float, change: Tensor | None) -> None:
        step_adam(self.light_adam, rate * LIGHT_RATE)
        for (quats, _), (turning, going) in zip(self.parts, self.adams, strict=True):
            # Only nodes of the frame and of those beside it were looked at.
            if quats.grad is not None and quats.grad.any():
                step_adam(turning, rate * TURN_RATE)
                step_adam(going, rate * PLACE_RATE * float(self.ties.size))
            else:
                turning.zero_grad(set_to_none=True)
                going.zero_grad(set_to_none=True)

    def hang_again(self, parents: Tensor) -> None:
        means = self.growing.splats.means.detach()
        self.anchors, self.normals = self.anchors[parents], self.normals[parents]
        self.followed = follow(means, self.still)

    # ------------------------------------------------------------ what came of it

    @property
    def avatar(self) -> Avatar:
        splats = Splats(*(t.detach().clone() for t in self.growing.splats.tensors()))
        nodes = self.nodes
        nodes = replace(nodes, quats=nodes.quats.detach(), goes=nodes.goes.detach())
        motion = NodeMotion(nodes, self.followed, self.normals, self.light.detach().clone())
        return Avatar(splats, motion, self.views.fps)


def _part(on_step: OnStep | None, done: int, total: int) -> OnStep | None:
    return None if on_step is None else lambda step, _: on_step(done + step, total)
