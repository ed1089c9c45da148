"""Distilling an avatar without a body: Gaussians and control nodes that carry them, from the views.

Stage: VIEWS + RIG -> AVATAR (`distilling`), for clothes, hair and whatever has no mesh. Before the
first step the skin of every frame is carved out of the masks (`avatar_start`) and nodes carry the
skin of one frame to the others, or of several frames that take turns (`avatar_tracking`). Then
Gaussians, nodes and the light are learned together from the pictures; nodes are kept as rigid among
each other as they can (`avatar_free.Ties`) and smooth over time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .avatar import Avatar, NodeMotion
from .avatar_free import Followed, NodeCloud, Nodes, Ties, follow, nearest
from .avatar_growth import GrowingSplats
from .avatar_light import even_light, lit
from .avatar_losses import order_loss
from .avatar_start import Skin, skins, splats_on_skin, thinned
from .avatar_tracking import Tracked, track_in_turns
from .distilling import Distilling, Settings, step_adam
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
MORE = 4.0
"""Clouds that take turns have the square root of their number, at most this, times the Gaussians that
one has: what is shown at a time is less, so a step and a picture take no longer."""
UNIT = 3.0
"""Distances between first Gaussians that a Gaussian may grow to without cost."""


class LearnedCloud:
    """Gaussians that have their turn in some frames, and the nodes that carry them there."""

    growing: GrowingSplats

    def __init__(self, skin: Skin, tracked: Tracked) -> None:
        self.first, self.still = tracked.first, tracked.nodes
        self.ties = Ties(self.still)
        self.parts = [
            (quats.clone().requires_grad_(), goes.clone().requires_grad_())
            for quats, goes in zip(self.still.quats, self.still.goes, strict=True)
        ]
        spacing = float(self.ties.size)
        self.adams = [
            (
                torch.optim.Adam([quats], lr=TURN_RATE, betas=(0.8, 0.98)),
                torch.optim.Adam([goes], lr=PLACE_RATE * spacing, betas=(0.8, 0.98)),
            )
            for quats, goes in self.parts
        ]
        near, _ = nearest(skin.points, skin.points, min(2, len(skin.points)))
        self.unit = UNIT * float(near[:, -1].mean().clamp(min=1e-4))
        self.anchors, self.normals = skin.points.clone(), skin.normals
        self.followed: Followed = follow(skin.points, self.still)

    @property
    def nodes(self) -> Nodes:
        """As they are now, for gradients."""
        quats, goes = zip(*self.parts, strict=True)
        return replace(self.still, quats=torch.stack(quats), goes=torch.stack(goes))

    @property
    def there(self) -> NodeCloud:
        """As it is now, for gradients."""
        return NodeCloud(self.nodes, self.followed, self.normals)

    @property
    def kept(self) -> NodeCloud:
        """As it is now."""
        nodes = self.nodes
        nodes = replace(nodes, quats=nodes.quats.detach(), goes=nodes.goes.detach())
        return NodeCloud(nodes, self.followed, self.normals)

    def disorder(self, frame: int) -> list[Tensor]:  # of its own
        splats, nodes = self.growing.splats, self.nodes
        units = splats.means.new_full((len(splats),), self.unit)
        return [
            order_loss(splats, self.anchors, units),
            RIGID * self.ties.rigidity(nodes, frame),
            SMOOTH * self.ties.jerkiness(nodes, frame),
        ]

    def step_nodes(self, rate: float) -> None:
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


class FreeTraining(Distilling):
    """An avatar on control nodes that is being distilled, step after step: of the cloud whose turn the
    step's frame is."""

    cloud: LearnedCloud

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
        tracked = track_in_turns(found, seen.masks, NODES, _part(on_step, frames, 2 * frames))
        self.share = min(len(tracked) ** 0.5, MORE) / len(tracked)
        self.turns = [i for i, t in enumerate(tracked) for _ in range(t.nodes.frame_count)]
        """[F] whose turn each frame is."""
        self.light = even_light(self.masks.new_zeros(0)).requires_grad_()
        self.light_adam = torch.optim.Adam([self.light], lr=LIGHT_RATE)
        count, self.clouds = max(1, int(self.share * settings.gaussians)), []
        for t in tracked:
            skin = thinned(found[t.frame], count)
            self.cloud = LearnedCloud(skin, t)
            splats = self.painted(splats_on_skin(skin, settings.degree), {t.frame})
            self.cloud.growing = GrowingSplats(splats, self.cloud.unit)
            self.clouds.append(self.cloud)

    @property
    def most(self) -> int:
        return max(1, int(self.share * self.settings.most))

    @property
    def growing(self) -> GrowingSplats:
        return self.cloud.growing

    # ------------------------------------------------------------ a step

    def changed(self, frame: int) -> tuple[Splats, Tensor | None]:
        self.cloud = self.clouds[self.turns[frame]]
        return super().changed(frame)

    def stand(self, splats: Splats, frame: int) -> Splats:
        return lit(*self.cloud.there.at(splats, frame - self.cloud.first), self.light)

    def disorder(self, frame: int, change: Tensor | None) -> list[Tensor]:
        return self.cloud.disorder(frame - self.cloud.first)

    def step_others(self, rate: float, change: Tensor | None) -> None:
        step_adam(self.light_adam, rate * LIGHT_RATE)
        self.cloud.step_nodes(rate)

    def grow(self) -> None:
        for cloud in self.clouds:
            self.cloud = cloud
            super().grow()

    def hang_again(self, parents: Tensor) -> None:
        self.cloud.hang_again(parents)

    # ------------------------------------------------------------ what came of it

    @property
    def avatar(self) -> Avatar:
        parts = [cloud.growing.splats.tensors() for cloud in self.clouds]
        splats = Splats(*(torch.cat(part).detach().clone() for part in zip(*parts, strict=True)))
        clouds = tuple(cloud.kept for cloud in self.clouds)
        return Avatar(splats, NodeMotion(clouds, self.light.detach().clone()), self.views.fps)


def _part(on_step: OnStep | None, done: int, total: int) -> OnStep | None:
    return None if on_step is None else lambda step, _: on_step(done + step, total)
