"""Distilling an avatar: what is the same whether its Gaussians hang on a body or on control nodes.

Stage: VIEWS + RIG [+ BODY] -> AVATAR, a step at a time, so that whoever drives it shows progress and
can stop at any step. A step draws one picture, poses the Gaussians as they stand in its frame, draws
them over a random ground and compares (CAP4D's recipe; `avatar_losses`). Which picture and ground a
step has follows from the seed and the step's number.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .avatar import Avatar
from .avatar_growth import GrowingSplats, opaque
from .avatar_losses import Cutout, box_around, cut_out, picture_loss
from .rasterize_splats import PIXEL_LOW_PASS, SplatPicture, render
from .splats import C0, Splats
from .views import Views

LAST_RATE = 0.1
"""Share of the learning rates at the end of a cosine."""
GROWS = (0.15, 0.6)
"""Shares of the steps between which Gaussians are split."""
GROWTHS = 5
"""How often."""
LEAST_OPACITY = 0.02
HIDDEN = 0.02
"""Metres that a Gaussian may lie behind what is seen and still take its colour."""


@dataclass(frozen=True)
class Settings:
    """How much is spent."""

    steps: int
    gaussians: int
    """At the start."""
    most: int
    """At the end, that are shown at a time."""
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


def check_views(views: Views, weights: Tensor | None) -> None:
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
    if weights is not None and (len(weights) != len(views) or not (weights >= 0).all()):
        raise ValueError(
            f"'weights' need one number of 0 or more for each of {len(views)} views, got "
            f"{weights.tolist()}."
        )


class Distilling(ABC):
    """An avatar that is being distilled, step after step.

    Who inherits gives `growing` (the Gaussians before any motion) and says how they stand in a frame.
    """

    growing: GrowingSplats

    def __init__(
        self,
        views: Views,
        settings: Settings,
        weights: Tensor | None = None,  # [V] how much each view counts
        way: str | None = None,  # of rasterize_splats.WAYS; None = the quickest
    ) -> None:
        check_views(views, weights)
        self.settings, self.views, self.way = settings, views, way
        self.masks = views.masks.float()
        shown = [
            (v, f, box)
            for v in range(len(views))
            for f in range(views.frames.shape[1])
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
        self.step, self.losses = 0, []

    # ------------------------------------------------------------ what the Gaussians hang on

    @abstractmethod
    def stand(self, splats: Splats, frame: int) -> Splats:
        """The Gaussians in the world as they stand in a frame."""

    def changed(self, frame: int) -> tuple[Splats, Tensor | None]:
        """The Gaussians with what a frame changes on them before they stand in it, and that change."""
        return self.growing.splats, None

    @abstractmethod
    def disorder(self, frame: int, change: Tensor | None) -> list[Tensor]:
        """What is added to the loss so that Gaussians and motion stay in order."""

    @abstractmethod
    def step_others(self, rate: float, change: Tensor | None) -> None:
        """Learn what isn't a Gaussian, with a share of the rates."""

    @abstractmethod
    def hang_again(self, parents: Tensor) -> None:
        """Hang all Gaussians where they are now; each came from one with this old number."""

    @property
    def most(self) -> int:
        """Gaussians that `growing` may become."""
        return self.settings.most

    @property
    @abstractmethod
    def avatar(self) -> Avatar:
        """As it is now."""

    # ------------------------------------------------------------ a step

    def draw(self, step: int) -> tuple[int, int, tuple[int, int, int, int], Tensor]:
        """View, frame, box and ground of a step: every picture once before any comes again."""
        turn, at = divmod(step, len(self.shown))
        order = np.random.default_rng([self.settings.seed % 2**63, 0, turn]).permutation(
            len(self.shown)
        )
        ground = np.random.default_rng([self.settings.seed % 2**63, 1, step]).random(3)
        return *self.shown[order[at]], torch.from_numpy(ground).to(self.masks)

    def truth(self, view: int, frame: int, box: tuple[int, int, int, int]) -> Cutout:
        """What a camera saw of the performer."""
        picture = self.views.frames[view, frame]
        picture = picture.float() / 255 if picture.dtype == torch.uint8 else picture.float()
        return cut_out(picture, self.masks[view, frame], box)

    def learn(self) -> float:
        """One step; gives its loss."""
        view, frame, box, ground = self.draw(self.step)
        truth = self.truth(view, frame, box)
        splats, change = self.changed(frame)
        picture = self.render(self.stand(splats, frame), view, truth, ground)
        loss = self.weights[view] * picture_loss(picture.color, truth.over(ground))
        for cost in self.disorder(frame, change):
            loss = loss + cost
        loss.backward()
        self.growing.watch(picture.shifts.grad, picture.visible)
        rate = self.settings.rate_at(self.step)
        self.growing.step(rate)
        self.step_others(rate, change)
        self.step += 1
        if self.settings.grows_at(self.step):
            self.grow()
        self.losses.append(float(loss.detach()))
        return self.losses[-1]

    def render(
        self,
        world: Splats,
        view: int,
        part: Cutout,
        ground: Tensor | None,  # [3]
    ) -> SplatPicture:
        """Without a ground, with depth."""
        rig, (h, w) = self.views.rig, part.alpha.shape
        K, T = part.camera(rig.K[view]), rig.T_camera_world[view]
        return render(world, K, T, w, h, ground, ground is None, self.way, PIXEL_LOW_PASS)

    def grow(self) -> None:
        """Split what is pulled about most, drop what can't be seen, hang all where they are now."""
        left = sum(self.settings.grows_at(step) for step in range(self.step, self.settings.steps))
        room = -(-(self.most - len(self.growing)) // max(left, 1))
        parents = self.growing.split(self.growing.most_pulled(room))
        kept = opaque(self.growing.splats, LEAST_OPACITY)
        if len(kept):
            self.growing.keep(kept)
            parents = parents[kept]
        self.hang_again(parents)
        self.growing.forget()

    # ------------------------------------------------------------ first colours

    @torch.no_grad()
    def painted(
        self,
        splats: Splats,
        frames: set[int],  # that are looked at
        tick: Callable[[], None] = lambda: None,  # before every picture; may raise to stop
    ) -> Splats:
        """Gaussians in the colours that views show at their means, where nothing hides them."""
        rig, sums = self.views.rig, splats.means.new_zeros(len(splats), 4)
        for view, frame, box in self.shown:
            if frame not in frames:
                continue
            tick()
            truth = self.truth(view, frame, box)
            world = self.stand(splats, frame)
            seen = self.render(world, view, truth, None)
            sums += self.weights[view] * _colors_seen(
                world.means, truth, seen.depth, truth.camera(rig.K[view]), rig.T_camera_world[view]
            )
        known = sums[:, 3:] > 0
        mean = sums[:, :3].sum(0) / sums[:, 3].sum().clamp(min=1e-6)
        colors = torch.where(known, sums[:, :3] / sums[:, 3:].clamp(min=1e-6), mean)
        sh = splats.sh.clone()
        sh[:, 0] = (colors - 0.5) / C0
        return replace(splats, sh=sh)


def step_adam(adam: torch.optim.Adam, rate: float) -> None:
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
    K, T = K.to(places), T.to(places)
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
