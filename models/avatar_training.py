"""Distilling an avatar: Gaussians on a body, fitted to what all cameras saw at all moments.

Stage: VIEWS + RIG + BODY -> AVATAR, a step at a time, so that whoever drives it shows progress and
can stop at any step. A step draws one picture, poses the Gaussians as the body stands there, draws
them over a random ground and compares (CAP4D's recipe; `avatar_losses`). Which picture and ground a
step has follows from the seed and the step's number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .avatar import Avatar, Detail, SkinMotion
from .avatar_growth import GrowingSplats, opaque
from .avatar_light import even_light, lit
from .avatar_losses import Cutout, box_around, cut_out, order_loss, picture_loss
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
from .fit_body import Places, skin
from .rasterize_splats import SplatPicture, render
from .splats import C0, Splats
from .views import Views

LAST_RATE = 0.1
"""Share of the learning rates at the end of a cosine."""
GROWS = (0.15, 0.6)
"""Shares of the steps between which Gaussians are split."""
GROWTHS = 5
"""How often."""
LEAST_OPACITY = 0.02
LEAST_UNIT = 0.005
"""Share of the height: the skin's triangles count as this large at least, so that fine meshes leave
room for clothes and hair."""
DETAIL_STARTS = 0.2
"""Share of the steps before the net that tells pose-dependent detail begins to learn."""
DETAIL_RATE, LIGHT_RATE = 1e-3, 0.01
CALM = 0.05
"""What wild offsets cost."""
PAINTED = 4
"""Frames from which Gaussians take their first colours."""
HIDDEN = 0.02
"""Metres that a Gaussian may lie behind what is seen and still take its colour."""


@dataclass(frozen=True)
class Settings:
    """How much is spent."""

    steps: int
    gaussians: int
    """At the start."""
    most: int
    """At the end."""
    degree: int = 0
    """Of the harmonics."""
    detail: bool = True
    """Whether a net learns what changes with the pose."""
    seed: int = 0

    def rate_at(self, step: int) -> float:
        done = min(1.0, step / max(1, self.steps))
        return LAST_RATE + (1 - LAST_RATE) * (0.5 + 0.5 * math.cos(math.pi * done))

    def grows_at(self, step: int) -> bool:
        """Whether Gaussians are split after this many steps."""
        ends = np.linspace(*GROWS, GROWTHS) * self.steps
        return step > 0 and step in {int(end) for end in ends}


PRESETS = {
    "draft": Settings(900, 12_000, 20_000, detail=False),
    "standard": Settings(4000, 20_000, 50_000, degree=1),
    "full": Settings(20_000, 30_000, 100_000, degree=2),
}


def check_views(views: Views, body: Body, weights: Tensor | None) -> None:
    """One sentence about what is missing."""
    if views.rig is None or views.masks is None:
        missing = "cameras" if views.rig is None else "masks"
        raise ValueError(
            f"'views' have no {missing}: connect a rig and masks of the performer, as Performer "
            "Conditions and the segmentation nodes give them."
        )
    if views.frames.shape[2] != 3:
        raise ValueError("'views' hold depth, not colours: connect the performer's pictures.")
    if len(views) < 2:
        raise ValueError("'views' hold 1 camera: an avatar needs 2 or more, from different sides.")
    if views.frames.shape[1] != body.frame_count:
        raise ValueError(
            f"'views' have {views.frames.shape[1]} frames, 'body' has {body.frame_count}: both must "
            "show the same moments, so cut or resample one of them."
        )
    if weights is not None and (len(weights) != len(views) or not (weights >= 0).all()):
        raise ValueError(
            f"'weights' need one number of 0 or more for each of {len(views)} views, got "
            f"{weights.tolist()}."
        )


class AvatarTraining:
    """An avatar on a body that is being distilled, step after step."""

    def __init__(
        self,
        views: Views,
        body: Body,
        settings: Settings,
        weights: Tensor | None = None,  # [V] how much each view counts
        way: str | None = None,  # of rasterize_splats.WAYS; None = the quickest
    ) -> None:
        check_views(views, body, weights)
        self.settings, self.views, self.way = settings, views, way
        self.body = replace(body, neutral=None, fps=views.fps)
        self.masks = views.masks.float()
        shown = [
            (v, f, box)
            for v in range(len(views))
            for f in range(body.frame_count)
            if (weights is None or weights[v] > 0)
            and (box := box_around(self.masks[v, f])) is not None
        ]
        if not shown:
            raise ValueError(
                "The masks of 'views' are empty in every frame, so nobody is to be seen: check them "
                "with a preview."
            )
        self.shown = shown
        self.weights = torch.ones(len(views)) if weights is None else weights / weights.amax()
        self.height = float(body.rest[:, 1].amax() - body.rest[:, 1].amin())
        skin_of = Skin(body.rest, body.faces)
        self.poses = [skin_of.pose(vertices) for vertices in body.vertices]
        splats, places = splats_on_body(body, settings.gaussians, settings.degree)
        area = float(skin(body.rest, body.faces))
        # A triangle's side, were all alike.
        self.unit = max(math.sqrt(2 * area / len(body.faces)), LEAST_UNIT * self.height)
        self._hang(places)
        self.light = even_light(body.rest).requires_grad_()
        self.light_adam = torch.optim.Adam([self.light], lr=LIGHT_RATE)
        self.growing = GrowingSplats(self._painted(splats), self.unit)
        self.detail, self.step, self.losses = None, 0, []
        if settings.detail:
            self._prepare_detail()

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

    def _prepare_detail(self) -> None:
        self.atlas = Atlas(self.body.rest, self.body.faces)
        self.maps = [moved_maps(self.atlas, self.body.rest, pose) for pose in self.poses]
        self.detail = Detail(DetailNet(self.settings.seed), shown_by(self.maps))
        self.detail_adam = torch.optim.Adam(
            self.detail.net.parameters(), lr=DETAIL_RATE, weight_decay=1e-4
        )

    # ------------------------------------------------------------ a step

    def draw(self, step: int) -> tuple[int, int, tuple[int, int, int, int], Tensor]:
        """View, frame, box and ground of a step: every picture once before any comes again."""
        turn, at = divmod(step, len(self.shown))
        order = np.random.default_rng([self.settings.seed % 2**63, 0, turn]).permutation(
            len(self.shown)
        )
        ground = np.random.default_rng([self.settings.seed % 2**63, 1, step]).random(3)
        return *self.shown[order[at]], torch.from_numpy(ground).float()

    def truth(self, view: int, frame: int, box: tuple[int, int, int, int]) -> Cutout:
        """What a camera saw of the performer."""
        picture = self.views.frames[view, frame]
        picture = picture.float() / 255 if picture.dtype == torch.uint8 else picture.float()
        return cut_out(picture, self.masks[view, frame], box)

    def canonical(self, frame: int) -> tuple[Splats, Tensor | None]:
        """The Gaussians on the template with what the frame's pose changes, and the offsets' maps."""
        splats = self.growing.splats
        if self.detail is None or self.step < DETAIL_STARTS * self.settings.steps:
            return splats, None
        if self.on_atlas is None:
            self.on_atlas = self.atlas.places(self.spots)
        offsets = self.detail.net(self.maps[frame])
        return detailed(splats, self.on_atlas.read(offsets), self.height), offsets

    def learn(self) -> float:
        """One step; gives its loss."""
        view, frame, box, ground = self.draw(self.step)
        truth = self.truth(view, frame, box)
        splats, offsets = self.canonical(frame)
        picture = self._render(splats, view, frame, truth, ground)
        loss = self.weights[view] * picture_loss(picture.color, truth.over(ground))
        units = splats.means.new_full((len(splats),), self.unit)
        loss = loss + order_loss(self.growing.splats, self.spots.anchors, units)
        if offsets is not None:
            loss = loss + CALM * calm_loss(offsets, self.atlas)
        loss.backward()
        self.growing.watch(picture.shifts.grad, picture.visible)
        rate = self.settings.rate_at(self.step)
        self.growing.step(rate)
        _step(self.light_adam, rate * LIGHT_RATE)
        if offsets is not None:
            _step(self.detail_adam, rate * DETAIL_RATE)
        self.step += 1
        if self.settings.grows_at(self.step):
            self.grow()
        self.losses.append(float(loss.detach()))
        return self.losses[-1]

    def _render(
        self, splats: Splats, view: int, frame: int, part: Cutout, ground: Tensor | None
    ) -> SplatPicture:
        """Without a ground, with depth."""
        rig, (h, w) = self.views.rig, part.alpha.shape
        stand = self._stand(frame)
        world = lit(posed(splats, self.spots, stand), stand.normals, self.light)
        K, T = part.camera(rig.K[view]), rig.T_camera_world[view]
        return render(world, K, T, w, h, ground, geometry=ground is None, way=self.way)

    # ------------------------------------------------------------ growing

    def grow(self) -> None:
        """Split what is pulled about most, drop what can't be seen, hang all where they are now."""
        left = sum(self.settings.grows_at(step) for step in range(self.step, self.settings.steps))
        room = -(-(self.settings.most - len(self.growing)) // max(left, 1))
        parents = self.growing.split(self.growing.most_pulled(room))
        kept = opaque(self.growing.splats, LEAST_OPACITY)
        self.growing.keep(kept)
        parents = parents[kept]
        old = Places(self.places.faces[parents], self.places.weights[parents])
        self._hang(bound_again(self.growing.splats, old, self.body.rest, self.body.faces))
        self.growing.forget()

    # ------------------------------------------------------------ first colours

    @torch.no_grad()
    def _painted(self, splats: Splats) -> Splats:
        """Gaussians in the colours that views show at their places, where nothing hides them."""
        rig, sums = self.views.rig, splats.means.new_zeros(len(splats), 4)
        chosen = np.linspace(0, self.body.frame_count - 1, PAINTED).round().astype(int)
        frames = set(chosen.tolist())
        for view, frame, box in self.shown:
            if frame not in frames:
                continue
            truth = self.truth(view, frame, box)
            seen = self._render(splats, view, frame, truth, None)
            sums += self.weights[view] * _colors_seen(
                self._stand(frame).places, truth, seen.depth, truth.camera(rig.K[view]),
                rig.T_camera_world[view],
            )  # fmt: skip
        known = sums[:, 3:] > 0
        mean = sums[:, :3].sum(0) / sums[:, 3].sum().clamp(min=1e-6)
        colors = torch.where(known, sums[:, :3] / sums[:, 3:].clamp(min=1e-6), mean)
        sh = splats.sh.clone()
        sh[:, 0] = (colors - 0.5) / C0
        return replace(splats, sh=sh)

    # ------------------------------------------------------------ what came of it

    @property
    def avatar(self) -> Avatar:
        """As it is now."""
        splats = Splats(*(t.detach().clone() for t in self.growing.splats.tensors()))
        detail = self.detail
        if detail is not None:
            net = DetailNet()
            net.load_state_dict(detail.net.state_dict())
            detail = Detail(net, detail.shown)
        motion = SkinMotion(self.body, self.places, self.light.detach().clone(), detail)
        return Avatar(splats, motion, self.body.fps)


def _step(adam: torch.optim.Adam, rate: float) -> None:
    adam.param_groups[0]["lr"] = rate
    adam.step()
    adam.zero_grad(set_to_none=True)


def _colors_seen(
    places: Tensor,  # [n, 3] world
    truth: Cutout,
    depth: Tensor,  # [h, w] metres
    K: Tensor,  # [3, 3] of the part
    T: Tensor,  # [4, 4]
) -> Tensor:  # [n, 4] colour times weight, weight
    """What a picture shows at places that nothing hides."""
    at = places @ T[:3, :3].T + T[:3, 3]
    pixels = (at @ K.T)[:, :2] / at[:, 2:].clamp(min=1e-6)
    h, w = depth.shape
    x, y = pixels.long().clamp(min=0).unbind(1)
    inside = (x < w) & (y < h) & (pixels >= 0).all(1)
    x, y = x.clamp(max=w - 1), y.clamp(max=h - 1)
    alpha = truth.alpha[y, x]
    seen = inside & (alpha > 0.9) & (at[:, 2] < depth[y, x] + HIDDEN)
    color = truth.color[:, y, x].T / alpha.clamp(min=0.5)[:, None]
    return torch.cat([color, torch.ones_like(color[:, :1])], 1) * seen[:, None]
