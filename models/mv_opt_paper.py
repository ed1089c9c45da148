"""MV-Opt with its published losses as they are: keypoints and pixels, descended block by block.

Stage: VIEWS -> VIEWS, after sampling (MVAnimate, Sec. IV-C). With x(v, t) the picture of view v at
moment t, k(v, t) its P keypoints and 0 the front view, over all moments

    F = 1 L_temp + 0.1 L_mvP + 0.02 L_mvS,
    L_temp = |k(0, t) - k(0, t-1)|²,
    L_mvP = sum over v of (k_y(v, t) - k_y(0, t))²  [ + (k_x(v, t) + k_x(opposite of v, t))² ],
    L_mvS = sum over v of omega(v) |x(v, t) - x(0, t)|².

The paper can be read in three ways about L_mvP: keypoints are as high as in the front view; they
stay from moment to moment in every view, as in L_temp; or they mirror the opposite view's sideways
when the number of views is even. Taken here are the first, and, with an even number, the third
added (in brackets). The opposite view is number v + V/2: views evenly around, in order.

F is smallest when nothing moves and all views are the same picture, and nothing in it keeps a
picture near what it was. Even true pictures are changed, and since pixels are free, keypoints are
moved most cheaply by speckle that misleads the net. It is here to compare with; mv_opt.py has the
sound form.

Units: keypoints in heights of the crop around the performer (the mean over the clip, one length for
all views, or equal heights would not be equal), sideways from the picture's middle; squares are
means over keypoints and over pixels, so that the published factors weigh quantities of one size.

What is sought is the pixels. A block is one picture. Its step goes against the gradient, and is
taken when F falls by c |x' - x|² at least (Theorem IV.3), so F never rises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from .human_net import HumanNet, estimate_keypoints
from .mv_opt_objective import History


class Strengths(NamedTuple):
    """Factors of the three losses, as published."""

    temporal: float = 1.0
    pose: float = 0.1
    surface: float = 0.02


OMEGA = (0.25, 0.25, 0.1)
"""Weights of the front view, the next one, and all others, as published."""
SEEN = 0.3
"""Confidence from which a keypoint counts; below it, DWPose's are not drawn either."""
SUFFICIENT = 1e-3
"""c of the test F(x') <= F(x) - c |x' - x|², squares being means over pixels: half of what the best
step of L_mvS gains at the smallest published weight (0.02 * 0.1), so none of these is refused."""
FIRST_SCALE = 100.0
"""Of a view's first step: 1 / (2 * 0.02 * 0.25), the best for L_mvS alone."""
HALVINGS = 16
"""Of one step; its scale is remembered, so only the first steps of a clip need many."""

PUBLISHED = Strengths()


def published_weights(order: list[int]) -> Tensor:  # [V]
    """Omega of every view, by number."""
    weights = torch.full((len(order),), OMEGA[2])
    for place, view in enumerate(order[:2]):
        weights[view] = OMEGA[place]
    return weights


def keypoint_losses(
    points: Tensor,  # [V, F, P, 2] crop heights, sideways from the picture's middle
    known: Tensor,  # [V, F, P] bool
    front: int,
) -> tuple[Tensor, Tensor]:
    """L_temp and L_mvP of the whole clip."""
    V, _, P, _ = points.shape
    ahead = points[front, 1:] - points[front, :-1]
    both = known[front, 1:] & known[front, :-1]
    temporal = (ahead.square().sum(-1) * both).sum() / P
    above = points[..., 1] - points[front, ..., 1]
    pose = (above.square() * (known & known[front])).sum() / P
    if V % 2 == 0:
        aside = points[..., 0] + points[..., 0].roll(V // 2, 0)
        pose = pose + (aside.square() * (known & known.roll(V // 2, 0))).sum() / P
    return temporal, pose


def mean_square(difference: Tensor) -> float:
    return float(difference.detach().square().mean(dtype=torch.float64))


class Seen(NamedTuple):
    """A picture and its keypoints, with the graph between them."""

    picture: Tensor | None
    """[3, H, W]"""
    points: Tensor | None
    """[P, 2] as in `keypoint_losses`; None = nobody is there."""
    sure: Tensor | None
    """[P] 0..1"""


class Paper:
    """The clip, what is seen in it, and the objective."""

    def __init__(
        self, frames: Tensor, boxes: Tensor, net: HumanNet, order: list[int], weights: Tensor,
        strengths: Strengths,
    ) -> None:  # fmt: skip
        self.frames, self.order, self.front, self.strengths = frames, order, order[0], strengths
        self.weights, self.boxes = weights.double().cpu(), boxes
        sides = boxes[..., 2:] - boxes[..., :2]
        self.someone = boxes.isfinite().all(-1) & (sides >= 1).all(-1)
        self.unit = float(sides[self.someone][:, 1].mean()) if self.someone.any() else 1.0
        held = dict(net.named_parameters()) | dict(net.named_buffers())
        # Clones: what was made in inference mode can't take part in gradients.
        held = {name: t.detach().clone().to(frames.dtype) for name, t in held.items()}
        self.device = next((t.device for t in held.values()), frames.device)
        self.net = lambda pictures: functional_call(net, held, (pictures,))
        self.scale = dict.fromkeys(order, FIRST_SCALE)
        with torch.no_grad():
            self._look_at_all()

    def _look_at_all(self) -> None:
        V, count = self.frames.shape[:2]
        self.apart = torch.zeros(V, count, dtype=torch.float64)
        seen: dict[tuple[int, int], Seen] = {}
        for t in range(count):
            now = self.moment(t)
            for v, one in now.items():
                self.apart[v, t] = mean_square(one.picture - now[self.front].picture)
                if one.points is not None:
                    seen[v, t] = one._replace(picture=None)
        P = next((len(one.points) for one in seen.values()), 1)
        self.points = torch.zeros(V, count, P, 2, dtype=torch.float64)
        self.known = torch.zeros(V, count, P, dtype=torch.bool)
        for block, one in seen.items():
            known = (one.sure >= SEEN) & one.points.isfinite().all(-1)
            self.known[block] = known
            self.points[block] = torch.where(known[:, None], one.points, 0.0)

    def moment(self, t: int) -> dict[int, Seen]:
        """All views of one moment."""
        return {v: self.look(self.frames[v, t].to(self.device), v, t) for v in self.order}

    def look(self, picture: Tensor, v: int, t: int) -> Seen:
        """The keypoints of a picture, with gradients where they are on."""
        picture = picture.detach().requires_grad_()
        if not self.someone[v, t]:
            return Seen(picture, None, None)
        box = self.boxes[v, t][None].to(picture)
        pixels, sure = estimate_keypoints(self.net, picture[None], box)
        middle = pixels.new_tensor([picture.shape[-1] / 2, 0.0])
        points = ((pixels[0] - middle) / self.unit).to("cpu", torch.float64)
        return Seen(picture, points, sure[0].to("cpu"))

    def terms(self, points: Tensor, apart: Tensor) -> dict[str, Tensor]:
        """The three losses of the clip, with their factors."""
        temporal, pose = keypoint_losses(points, self.known, self.front)
        surface = (self.weights[:, None] * apart).sum()
        parts = {"temporal": temporal, "pose": pose, "surface": surface}
        return {name: getattr(self.strengths, name) * loss for name, loss in parts.items()}

    def total(self, points: Tensor, apart: Tensor) -> Tensor:
        return sum(self.terms(points, apart).values())

    def replaced(self, v: int, t: int, points: Tensor | None) -> Tensor:
        """All keypoints, with those of one block anew."""
        table = self.points.clone()
        if points is not None:
            table[v, t] = torch.where(self.known[v, t][:, None], points, 0.0)
        return table

    def distances(self, v: int, t: int, picture: Tensor, now: dict[int, Seen]) -> Tensor:
        """|x(v, t) - x(0, t)|² of all blocks, with one picture anew."""
        apart = self.apart.clone()
        if v != self.front:
            apart[v, t] = mean_square(picture - now[self.front].picture)
            return apart
        for other in now:
            if other != v:
                apart[other, t] = mean_square(now[other].picture - picture)
        return apart

    def slope(self, v: int, t: int, now: dict[int, Seen]) -> Tensor:  # [3, H, W]
        """dF/dx of one block, times the number of pixels: the gradient under mean squares."""
        seen = now[v]
        x = seen.picture.detach()
        if v == self.front:
            pull = sum(float(self.weights[w]) * (x - now[w].picture.detach()) for w in now)
        else:
            pull = float(self.weights[v]) * (x - now[self.front].picture.detach())
        result = 2 * self.strengths.surface * pull
        if seen.points is None:
            return result
        points = seen.points.detach().requires_grad_()
        (wanted,) = torch.autograd.grad(self.total(self.replaced(v, t, points), self.apart), points)
        if not wanted.any():
            return result
        # Kept: where no step is good enough, the same picture is asked again in the next round.
        (pull,) = torch.autograd.grad(seen.points, seen.picture, wanted, retain_graph=True)
        return result + x.numel() * pull

    def descend(self, v: int, t: int, now: dict[int, Seen]) -> float:
        """One step of one block; gives by how much F fell."""
        x, slope = now[v].picture.detach(), self.slope(v, t, now)
        before = float(self.total(self.points, self.apart))
        scale = self.scale[v]
        for _ in range(HALVINGS):
            y = (x - scale * slope).clamp(0, 1)
            moved = mean_square(y - x)
            if not moved:
                return 0.0
            seen = self.look(y, v, t)
            found = None if seen.points is None else seen.points.detach()
            points, apart = self.replaced(v, t, found), self.distances(v, t, y, now)
            fell = before - float(self.total(points, apart))
            if fell > 0 and fell >= SUFFICIENT * moved:
                self.points, self.apart, now[v] = points, apart, seen
                self.scale[v] = 2 * scale
                return fell
            scale /= 2
        self.scale[v] = scale
        return 0.0


@torch.inference_mode(False)
@torch.enable_grad()
def refine_paper(
    frames: Tensor,  # [V, F, 3, H, W] 0..1
    boxes: Tensor,  # [V, F, 4] crops, as `detect_keypoints` gives them; NaN = nobody is there
    net: HumanNet,  # it works where its weights are
    order: list[int],  # numbers of the views, the front view first, then front to back
    weights: Tensor | None = None,  # [V] omega by number; None = as published
    iterations: int = 8,
    on_step: Callable[[int, int], None] | None = None,  # done, total
    strengths: Strengths = PUBLISHED,
) -> tuple[Tensor, History]:
    """The views with F descended: moment after moment; in each, `iterations` rounds over `order`.

    One sweep, as published. Keypoints that are not known at the start don't count at all, so that
    F stays one function. May be called in inference mode."""
    V, count = frames.shape[:2]
    _check(frames, boxes, order, weights)
    omega = published_weights(order) if weights is None else weights
    kind = torch.float64 if frames.dtype == torch.float64 else torch.float32
    result = frames.detach().clone().to(kind).clamp(0, 1)
    paper = Paper(result, boxes.detach().clone(), net, order, omega.detach().clone(), strengths)
    history = History()
    history.start(_numbers(paper))
    for t in range(count):
        now = paper.moment(t)
        for _ in range(iterations):
            for v in order:
                fell = paper.descend(v, t, now)
                # What is left of F is a difference of sums: rounding must not take it below 0.
                history.add((0, t, v), min(fell, history.total[-1]))
                if on_step:
                    on_step(len(history.order), count * iterations * V)
        for v in order:
            result[v, t] = now[v].picture.detach().to(result)
    history.terms.append(_numbers(paper))
    return result, history


def _numbers(paper: Paper) -> dict[str, float]:
    return {name: float(t) for name, t in paper.terms(paper.points, paper.apart).items()}


def _check(frames: Tensor, boxes: Tensor, order: list[int], weights: Tensor | None) -> None:
    V, count = frames.shape[:2]
    if not frames.numel():
        raise ValueError("There are no frames in 'views': give at least one view of one frame.")
    if not frames.isfinite().all():
        raise ValueError(
            "A picture in 'views' holds NaN or infinity: check the node that made it."
        )  # fmt: skip
    if tuple(boxes.shape) != (V, count, 4):
        raise ValueError(
            f"Mode 'paper' needs one crop for each of {V} views of {count} frames, got boxes of "
            f"shape {list(boxes.shape)}: find the keypoints in these very views."
        )
    if sorted(order) != list(range(V)):
        raise ValueError(f"The order must name each of the {V} views once, got {order}.")
    if weights is not None and (
        tuple(weights.shape) != (V,) or not weights.isfinite().all() or weights.min() < 0
    ):
        raise ValueError(
            f"'weights' must be {V} numbers of at least 0, one for each view, got "
            f"{weights.flatten().tolist()[:16]}: make them for these views."
        )
