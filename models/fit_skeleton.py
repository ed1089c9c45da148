"""Bones for a body of any mesh (stage: upright template -> skeleton).

The mean performer, whose bones are known, is brought to the template: sized and placed, its joints
turned, its build mixed from the pack's performers and its bones made longer, shorter, thinner or
thicker, until skin lies on skin; then every vertex
takes the weights of the nearest place of that skin that faces the same way, and the joints are where
the performer's have come to. Gradient descent over the surfaces' nearest places in both directions
(iterated closest points; Pinocchio and its like fit a skeleton, SMPL-like models a template).

Frame: world of the pack (x right, y down, z forward, metres); a template that faces elsewhere than -z
is recognised and turned back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .body import Body
from .fit_body import Ground, Places, spread_evenly, triangle_normals
from .performer import JOINTS, PARENTS, load_performers, vertex_normals
from .quats import rotvecs_to_quats
from .skeleton import Skeleton, built_like, performer_skeleton, recognised, settled
from .splats import rotation_matrices

SPOTS, TRIAL_SPOTS = 3000, 600
"""On either skin, looked at in a fit, and to find out where to begin."""
STEPS, TRIAL_STEPS = 160, 30
RATE = 0.03
FACING = 0.03
"""Metres that normals which differ by 60 degrees count as, for a body of the usual height."""
ALONG, FAR = 0.2, 0.15
"""How much a way along the skin counts beside one across it; metres at which a spot counts half."""
ARMS = (-0.6, 0.0, 0.7)
"""Radians by which arms begin raised, against the performers' A-pose: hanging, A, T."""
FACES = (0.0, 0.5, 1.0, 1.5)
"""Parts of pi by which the template may be turned about the vertical."""
STIFF = {"turns": 3e-4, "sizes": 3e-3, "builds": 1e-5}
"""Square metres that a turn of one radian, a bone longer by e, or the whole difference of a performer
from their mean counts as."""
MISFIT = 0.04
"""Share of the height: a fifth of the skin farther apart than that, and the template is no upright
person. Dressed people come to 0.01, poses far from standing to 0.08."""


@dataclass
class _Params:
    """What is looked for; all zero = the mean performer itself."""

    turns: Tensor
    """[17, 3] radians about the performer's axes at rest."""
    sizes: Tensor
    """[17] logarithm of how much longer and thicker what belongs to a joint is."""
    builds: Tensor
    """[12] shares of the pack's performers, by which the build differs from their mean."""
    place: Tensor
    """[3] metres, and below: the logarithm of the whole's size."""
    size: Tensor

    def all(self) -> list[Tensor]:
        return [self.turns, self.sizes, self.builds, self.place, self.size]


class _Performer:
    """The mean performer's skin at some spots, and bones."""

    def __init__(self, spots: int) -> None:
        self.skeleton, faces = performer_skeleton(), load_performers().faces
        rest = self.skeleton.rest
        self.places = spread_evenly(rest[faces], spots)
        corners, weights = faces[self.places.faces], self.places.weights
        self.spots = (rest[corners] * weights[..., None]).sum(1)
        self.normals = triangle_normals(rest[faces])[self.places.faces]
        self.weights = (self.skeleton.weights[corners] * weights[..., None]).sum(1)
        tensors = load_performers().tensors
        self.rests = tensors["rest_vertices"].float() - rest
        self.builds = (self.rests[:, corners] * weights[..., None]).sum(2)
        self.frames = tensors["rest_joints"] - self.skeleton.joints

    def joints(self, params: _Params) -> Tensor:  # [17, 3] at rest
        return self.skeleton.joints + torch.einsum("b,bjc->jc", params.builds, self.frames)

    def skin(self, params: _Params) -> Tensor:  # [N, 3] all of it
        rest = self.skeleton.rest + torch.einsum("b,bnc->nc", params.builds, self.rests)
        return self.posed(params, rest, self.skeleton.weights)

    def seen(self, params: _Params) -> Tensor:  # [n, 3] the spots
        spots = self.spots + torch.einsum("b,bnc->nc", params.builds, self.builds)
        return self.posed(params, spots, self.weights)

    def bones(self, params: _Params) -> tuple[Tensor, Tensor, Tensor]:
        """Turns [17, 3, 3], sizes [17], and places of the joints [17, 3]."""
        own = rotation_matrices(rotvecs_to_quats(params.turns))
        longer = (params.size + params.sizes).exp()
        joints = self.joints(params)
        turns, places = [own[0]], [joints[0] * params.size.exp() + params.place]
        for j, parent in enumerate(PARENTS[1:], 1):
            turns.append(turns[parent] @ own[j])
            bone = longer[parent] * (joints[j] - joints[parent])
            places.append(places[parent] + turns[parent] @ bone)
        return torch.stack(turns), longer, torch.stack(places)

    def posed(self, params: _Params, points: Tensor, weights: Tensor) -> Tensor:  # [n, 3], [n, 17]
        turns, longer, places = self.bones(params)
        matrices = longer[:, None, None] * turns
        offsets = places - (matrices @ self.joints(params)[..., None])[..., 0]
        blended = (weights @ matrices.flatten(1)).view(-1, 3, 3)
        return (blended @ points[..., None])[..., 0] + weights @ offsets

    def turned(self, params: _Params) -> Tensor:  # [n, 3] the spots' normals
        turns, _, _ = self.bones(params)
        return ((self.weights @ turns.flatten(1)).view(-1, 3, 3) @ self.normals[..., None])[..., 0]


class _Goal:
    """The template's skin at some spots, as tall as the mean performer and facing -z."""

    def __init__(self, points: Tensor, faces: Tensor, spots: int) -> None:
        from scipy.spatial import cKDTree

        corners = points[faces]
        places = spread_evenly(corners, spots)
        self.spots = (corners[places.faces] * places.weights[..., None]).sum(1)
        self.normals = triangle_normals(corners)[places.faces]
        self.tree = cKDTree(_six(self.spots, self.normals))

    def gap(self, spots: Tensor, normals: Tensor) -> Tensor:
        """Mean square between the skins, each seen from the other; far ones count less."""
        from scipy.spatial import cKDTree

        six = _six(spots.detach(), normals)
        there = torch.from_numpy(self.tree.query(six)[1])
        back = torch.from_numpy(cKDTree(six).query(self.tree.data)[1])
        ways = [spots - self.spots[there], spots[back] - self.spots]
        # Across the skin all of a way counts, along it little: spots are not the same spots.
        total = 0
        for way, normal in zip(ways, (self.normals[there], self.normals), strict=True):
            square = (way * normal).sum(1).square() + ALONG * way.square().sum(1)
            total = total + (square / (1 + square / FAR**2)).mean()
        return total


def _six(points: Tensor, normals: Tensor) -> np.ndarray:
    return torch.cat([points, FACING * normals], 1).numpy()


def _start(arms: float) -> _Params:
    """Arms raised by so many radians sideways."""
    turns = torch.zeros(17, 3)
    turns[JOINTS.index("shoulder.L"), 2] = -arms
    turns[JOINTS.index("shoulder.R"), 2] = arms
    return _Params(turns, torch.zeros(17), torch.zeros(12), torch.zeros(3), torch.zeros(()))


def _descended(
    performer: _Performer, goal: _Goal, start: _Params, steps: int, on_step: Callable[[], None]
) -> tuple[_Params, float]:
    """Adam, the rate falling to nothing; and the gap in the end."""
    params = _Params(*(value.clone().requires_grad_() for value in start.all()))
    adam = torch.optim.Adam(params.all(), lr=RATE)
    gap = math.inf
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
        spots = performer.seen(params)
        with torch.no_grad():
            normals = performer.turned(params)
        loss = goal.gap(spots, normals)
        gap = float(loss.detach())
        held = {
            "turns": params.turns - start.turns, "sizes": params.sizes, "builds": params.builds,
        }  # fmt: skip
        loss = loss + sum(STIFF[name] * values.square().sum() for name, values in held.items())
        adam.zero_grad()
        loss.backward()
        adam.step()
        on_step()
    return _Params(*(value.detach() for value in params.all())), gap


@torch.inference_mode(False)
@torch.enable_grad()
def fit_skeleton(
    rest: Tensor,  # [N, 3]
    faces: Tensor,  # [M, 3]
    on_step: Callable[[], None] = lambda: None,
) -> Skeleton:
    """ValueError where the template is no upright person."""
    rest, faces = rest.detach().clone().cpu(), faces.clone().cpu()
    mean = performer_skeleton()
    scale = _height(mean.rest) / _height(rest)
    middle, wanted = _middle(rest), _middle(mean.rest)
    performer, goals = _Performer(TRIAL_SPOTS), {}
    tried = []
    for part in FACES:
        turn = _about_up(part * math.pi)
        points = scale * (rest - middle) @ turn.T + wanted
        goals[part] = points
        goal = _Goal(points, faces, TRIAL_SPOTS)
        for arms in ARMS:
            params, gap = _descended(performer, goal, _start(arms), TRIAL_STEPS, on_step)
            tried.append((gap, part, params))
    _, part, params = min(tried, key=lambda one: one[0])
    points, turn = goals[part], _about_up(part * math.pi)
    performer = _Performer(SPOTS)
    params, _ = _descended(performer, _Goal(points, faces, SPOTS), params, STEPS, on_step)
    skin = performer.skin(params)
    weights, off = _taken(skin, points, faces)
    if off > MISFIT * _height(mean.rest):
        raise ValueError(
            f"The body's template lies {100 * off / _height(mean.rest):.0f} % of its height from that "
            "of any upright person, so no bones can be found in it: let frame 0 of its source (or its "
            "template) be a person who stands, with arms off the body."
        )
    _, _, joints = performer.bones(params)
    return Skeleton(rest, ((joints - wanted) @ turn) / scale + middle, weights, turn)


def _taken(skin: Tensor, points: Tensor, faces: Tensor) -> tuple[Tensor, float]:
    """Weights [N, 17] of the nearest skin, and how far four fifths of them are from it, at most."""
    bank_faces, mean = load_performers().faces, performer_skeleton()
    ground = Ground(skin, bank_faces, _height(skin))
    places, away = ground.places(points, vertex_normals(points[None], faces)[0])
    weights = Places(places.faces, places.weights).of(mean.weights, bank_faces)
    return weights / weights.sum(1, keepdim=True), float(away.quantile(0.8))


def _height(points: Tensor) -> float:
    tall = float(points[:, 1].amax() - points[:, 1].amin())
    if not tall > 0:
        raise ValueError("The body's template has no height: check the mesh and its axes.")
    return tall


def _middle(points: Tensor) -> Tensor:  # [3]
    return (points.amin(0) + points.amax(0)) / 2


def _about_up(angle: float) -> Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]])


TOTAL_STEPS = len(FACES) * len(ARMS) * TRIAL_STEPS + STEPS
"""How often `on_step` is called."""


def own_skeleton(body: Body, on_step: Callable[[], None] = lambda: None) -> Skeleton:
    """The bones of a body in its own build: known for the pack's performers, looked for in others."""
    known = recognised(body)
    if known is not None:
        return known
    return settled(body, fit_skeleton(built_like(body), body.faces, on_step))
