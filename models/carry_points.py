"""Points that a body carries along: what one picture shows, over all frames of a motion (MVP4D's
animatable route: one reference picture + a body that moves).

Stage: cloud of one picture + BODY that stands as the cloud does in one of its frames (`fit_body`)
-> cloud of every frame. Each point is bound to the nearest place of the mesh that faces the same way;
its offset from there turns with the surface around that place (the best rotation of the triangles
around a vertex), so rigid motion is exact and a fold does not shear what lies over it. A point that
stands off the mesh (clothes, hair, errors of the depth) also listens to its neighbours, the more the
farther off it is, so that cloth does not tear where the nearest limb changes.

Departure from the paper, which feeds body maps to its model: the picture's own colours are carried,
so that any model for partial colour and normals can be used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .body import Body, performer_centre, place_template, vertex_areas
from .cameras import Rig
from .fit_body import (
    FACING,
    Ground,
    Places,
    Stand,
    body_height,
    skin,
    spread_evenly,
    stood,
    triangle_normals,
)
from .points import OrientedPoints

FarSide = Literal["of the body", "of the cloud"]
Depth = Literal["near the body", "as it is"]
OnStep = Callable[[int, int], None]

ON_THE_SKIN, OFF_IT = 0.003, 0.025
"""Shares of the height: nearer than the first a point follows its own place alone, farther than the
second its neighbours."""
POST_SPACING = 0.012
"""Share of the height between the points that neighbours listen to."""
POSTS = 8
"""How many of them."""
LISTENING = 0.008
"""Share of the height at which a neighbour counts 0.6; half the way to the mesh comes on top."""
TEARS = 0.03
"""Share of the height: neighbours that take a point this far from its own place count 0.6. Cloth
stretches that much; beyond, two limbs part and nothing should hang between them."""
STANDS_OFF = 0.02
"""Share of the height that clothes and hair stand off the body along the line of sight, where the
body is trusted more than the picture's depth."""
GUESSED_RADIUS = 0.75
"""Of a guessed point, in pixels of the picture: enough to leave no holes."""
SEEN_DEPTH = 0.3
"""How much a way along the line of sight counts when the nearest seen colour is looked for on the
template: the back gets the colours of the front, as Performer Geometry guesses them; and on the
template no arm lies before the hip whose colour is asked for."""
STEADYING = 1e-3
"""Share of the whole body's turn in that of a place: decides where a sliver has no turn of its own."""


def outward_normals(cloud: OrientedPoints) -> Tensor:  # [N, 3]
    """The side that a point lies on. A guessed one carries the normal of the seen point in front of
    it: turned over along the line of sight, it faces about where the far side does."""
    rays = F.normalize(cloud.positions - cloud.source.centers[0].to(cloud.positions), dim=1)
    along = (cloud.normals * rays).sum(1, keepdim=True)
    guessed = (cloud.confidences == 0)[:, None]
    return torch.where(guessed & (along < 0), cloud.normals - 2 * along * rays, cloud.normals)


# ---------------------------------------------------------------- how a surface turns


class Turning:
    """How a mesh turns around each of its vertices, against one moment."""

    def __init__(self, start: Tensor, faces: Tensor) -> None:  # [N, 3], [M, 3]
        self.faces, self.count = faces, len(start)
        self.start = self._frames(start)
        self.around = torch.bincount(faces.flatten(), minlength=self.count).clamp(min=1)

    def _frames(self, vertices: Tensor) -> Tensor:  # [M, 3, 3], columns: two edges and the normal
        corners = vertices[self.faces]
        a, b, c = corners.unbind(1)
        normal = torch.linalg.cross(b - a, c - a)
        size = normal.norm(dim=1, keepdim=True).sqrt()
        return torch.stack([b - a, c - a, F.normalize(normal, dim=1) * size], 2)

    def __call__(self, vertices: Tensor) -> Tensor:  # [N, 3] -> [N, 3, 3]
        """Rotations from the first moment to this one, smooth over the surface."""
        matched = self._frames(vertices) @ self.start.mT
        around = self._gathered(matched)
        # Once more over the triangles, so that small ones don't jitter.
        around = self._gathered(around[self.faces].mean(1))
        size = around.diagonal(dim1=1, dim2=2).sum(1).abs()[:, None, None]
        return _rotation(around + STEADYING * size * _rotation(matched.sum(0)))

    def _gathered(self, values: Tensor) -> Tensor:  # [M, 3, 3] -> [N, 3, 3]
        sums = values.new_zeros(self.count, 3, 3)
        for i in range(3):
            sums.index_add_(0, self.faces[:, i], values)
        return sums / self.around[:, None, None]


def _rotation(matrices: Tensor) -> Tensor:  # [..., 3, 3]
    """The nearest rotation."""
    u, _, vh = torch.linalg.svd(matrices)
    signs = torch.ones_like(matrices[..., 0])
    signs[..., 2] = torch.linalg.det(u @ vh).sign()
    return (u * signs[..., None, :]) @ vh


def _nearly_rotation(matrices: Tensor) -> Tensor:  # [..., 3, 3]
    """A mean of rotations that differ little, made one again (a Newton-Schulz step)."""
    return 1.5 * matrices - 0.5 * matrices @ (matrices.mT @ matrices)


# ---------------------------------------------------------------- what hangs where


@dataclass(frozen=True)
class Binding:
    """Where every point hangs: at its own place, and with its neighbours at theirs."""

    own: Places
    """[N] places of the points."""
    posts: Places
    """[P] places of the points that others listen to."""
    heard: Tensor
    """[N, POSTS] int64, the posts that a point listens to."""
    weights: Tensor
    """[N, 1 + POSTS], sum 1: the own place, then the posts."""


def nearest_places(
    cloud: OrientedPoints, outward: Tensor, vertices: Tensor, faces: Tensor, height: float
) -> tuple[Places, Tensor]:  # and how far away [N], metres
    """Seen points lie on what the picture shows of the mesh, guessed ones anywhere."""
    N = len(outward)
    chosen, corners, away = faces.new_zeros(N), outward.new_zeros(N, 3), outward.new_zeros(N)
    for which, lens in ((cloud.confidences > 0, cloud.source), (cloud.confidences == 0, None)):
        if which.any():
            ground = Ground(vertices, faces, height, lens)
            places, away[which] = ground.places(cloud.positions[which], outward[which])
            chosen[which], corners[which] = places.faces, places.weights
    return Places(chosen, corners), away


def near_body(
    cloud: OrientedPoints, own: Places, vertices: Tensor, faces: Tensor, height: float
) -> OrientedPoints:
    """Seen points moved along their lines of sight to where the body has its skin, or clothes."""
    rays = F.normalize(cloud.positions - cloud.source.centers[0].to(cloud.positions), dim=1)
    behind = ((cloud.positions - own.of(vertices, faces)) * rays).sum(1)
    limit = STANDS_OFF * height
    excess = torch.where(cloud.confidences > 0, behind - behind.clamp(-limit, limit), 0.0)
    return replace(cloud, positions=cloud.positions - excess[:, None] * rays)


def bind(
    positions: Tensor,  # [N, 3]
    outward: Tensor,  # [N, 3]
    own: Places,  # the nearest place of each
    away: Tensor,  # [N] metres to it
    height: float,  # metres, the body's
) -> Binding:
    """Every point at its own place, and at its neighbours'."""
    from scipy.spatial import cKDTree

    posts = _thinned(positions, away, POST_SPACING * height)
    facing = torch.cat([positions, FACING * height * outward], 1).cpu().numpy()
    tree = cKDTree(facing[posts.cpu().numpy()])
    count = min(POSTS, len(posts))
    near, heard = (torch.from_numpy(t).view(-1, count) for t in tree.query(facing, k=count))
    near, heard = near.to(positions), heard.to(positions.device)
    off = ((away / height - ON_THE_SKIN) / (OFF_IT - ON_THE_SKIN)).clamp(0, 1)
    listens = off * off * (3 - 2 * off)
    reach = (LISTENING * height + 0.5 * away)[:, None]
    shares = torch.softmax(-0.5 * (near / reach).square(), 1) * listens[:, None]
    weights = torch.cat([1 - listens[:, None], shares], 1)
    return Binding(own, Places(own.faces[posts], own.weights[posts]), heard, weights)


def _thinned(positions: Tensor, away: Tensor, spacing: float) -> Tensor:  # [P] numbers of points
    """One point a cell of space, the one nearest to the mesh: it hangs best."""
    cells = ((positions - positions.amin(0)) / spacing).long()
    size = cells.amax(0) + 1
    number = (cells[:, 0] * size[1] + cells[:, 1]) * size[2] + cells[:, 2]
    order = away.argsort(stable=True)
    order = order[number[order].argsort(stable=True)]
    first = number[order].diff(prepend=number.new_full((1,), -1)) != 0
    return order[first]


class Carrier:
    """Points on a mesh, wherever the mesh goes."""

    def __init__(
        self, cloud: OrientedPoints, binding: Binding, start: Tensor, faces: Tensor, height: float
    ) -> None:
        self.binding, self.faces, self.tears = binding, faces, TEARS * height
        self.positions, self.normals = cloud.positions, cloud.normals
        self.turning = Turning(start, faces)
        self.own_start = binding.own.of(start, faces)
        self.posts_start = binding.posts.of(start, faces)

    def __call__(self, vertices: Tensor) -> tuple[Tensor, Tensor]:  # [V, 3] -> [N, 3], [N, 3]
        """Positions and normals when the mesh is so."""
        turns = self.turning(vertices)
        weights, heard = self.binding.weights, self.binding.heard
        turn, offset = self._moves(self.binding.own, self.own_start, vertices, turns)
        # Points near the skin, most of them, hear nobody.
        hears = (weights[:, 0] < 1).nonzero()[:, 0]
        turns, offsets = self._moves(self.binding.posts, self.posts_start, vertices, turns)
        points, own_turn, own_offset = self.positions[hears], turn[hears], offset[hears]
        goes = _applied(own_turn, points) + own_offset
        for i in range(heard.shape[1]):
            post = heard[hears, i]
            apart = (_applied(turns[post], points) + offsets[post] - goes).norm(dim=1)
            share = weights[hears, i + 1] * torch.exp(-0.5 * (apart / self.tears).square())
            turn.index_add_(0, hears, share[:, None, None] * (turns[post] - own_turn))
            offset.index_add_(0, hears, share[:, None] * (offsets[post] - own_offset))
        normals = F.normalize(_applied(turn, self.normals), dim=1)
        return _applied(turn, self.positions) + offset, normals

    def _moves(self, places: Places, start: Tensor, vertices: Tensor, turns: Tensor):
        """The rigid motion of every place: [P, 3, 3] and [P, 3]."""
        turn = _nearly_rotation(places.of(turns, self.faces))
        return turn, places.of(vertices, self.faces) - _applied(turn, start)


def _applied(turns: Tensor, vectors: Tensor) -> Tensor:  # [N, 3, 3], [N, 3] -> [N, 3]
    return (turns @ vectors[..., None])[..., 0]


# ---------------------------------------------------------------- the far side


@dataclass(frozen=True)
class Behind:
    """The body's surface that the picture does not show, as guessed points."""

    places: Places
    """[N] on the mesh."""
    positions: Tensor
    """[N, 3]"""
    normals: Tensor
    """[N, 3]"""
    colors: Tensor
    """[N, 3]"""
    radius: float
    """Metres."""


def body_behind(
    cloud: OrientedPoints,  # seen points
    seen: Places,  # where they hang
    body: Body,
    frame: int,
) -> Behind:
    """The body's own surface wherever no seen point hangs, in the colours of the seen side."""
    from scipy.spatial import cKDTree

    vertices, height = body.vertices[frame], body_height(body)
    corners = vertices[body.faces]
    spacing = 2 * float(cloud.radii.median())
    places = spread_evenly(corners, int(skin(vertices, body.faces) / spacing**2))
    flat = triangle_normals(corners)
    view = _view_on_template(cloud.source, body, frame)

    # By where the points hang, not where they are: clothes must not stand before a second skin.
    def facing(places: Places):
        spots = places.of(vertices, body.faces)
        return torch.cat([spots, FACING * height * flat[places.faces]], 1).cpu().numpy()

    def on_template(places: Places):
        spots = places.of(body.rest, body.faces)
        return (spots - (1 - SEEN_DEPTH) * (spots @ view)[:, None] * view).cpu().numpy()

    away, near = (torch.from_numpy(t) for t in cKDTree(facing(seen)).query(facing(places)))
    # Two discs that touch: nearer, a guess would cover what was seen, farther, there were a crack.
    radius = GUESSED_RADIUS * spacing
    bare = (away > cloud.radii.cpu()[near] + radius).to(vertices.device)
    places = Places(places.faces[bare], places.weights[bare])
    _, giver = cKDTree(on_template(seen)).query(on_template(places))
    colors = cloud.colors[torch.from_numpy(giver).to(vertices.device)]
    spots = places.of(vertices, body.faces)
    return Behind(places, spots, flat[places.faces], colors, radius)


def _view_on_template(source: Rig, body: Body, frame: int) -> Tensor:  # [3] unit
    """Along which axis of the template the camera looks at the body."""
    vertices = body.vertices[frame : frame + 1]
    placed = place_template(body.rest, vertices, vertex_areas(body.rest, body.faces))
    middle = vertices[0].mean(0)
    ray = F.normalize(middle - source.centers[0].to(middle), dim=0)
    return placed.rotations[0].T @ ray


def _with_behind(cloud: OrientedPoints, binding: Binding, behind: Behind):
    """Points and bindings of both; those behind hang at their own places alone."""
    N = len(behind.positions)
    none = binding.weights.new_zeros(N, binding.weights.shape[1])
    none[:, 0] = 1
    whole = replace(
        cloud,
        positions=torch.cat([cloud.positions, behind.positions]),
        normals=torch.cat([cloud.normals, behind.normals]),
        colors=torch.cat([cloud.colors, behind.colors]),
        radii=torch.cat([cloud.radii, cloud.radii.new_full((N,), behind.radius)]),
        confidences=torch.cat([cloud.confidences, cloud.confidences.new_zeros(N)]),
        frame_offsets=cloud.frame_offsets.new_tensor([0, len(cloud.positions) + N]),
    )
    own = Places(
        torch.cat([binding.own.faces, behind.places.faces]),
        torch.cat([binding.own.weights, behind.places.weights]),
    )
    heard = torch.cat([binding.heard, binding.heard.new_zeros(N, binding.heard.shape[1])])
    return whole, replace(binding, own=own, heard=heard, weights=torch.cat([binding.weights, none]))


# ---------------------------------------------------------------- all frames


def same_size(
    motion: Body,
    held: Body,
    frame: int,
) -> Body:
    """The motion of a body as large as the other one is, judged by their skin: poses don't count."""

    size = skin(held.vertices[frame], held.faces) / skin(motion.vertices[0], motion.faces)
    return stood(motion, Stand(math.sqrt(float(size))))


def carry_points(
    cloud: OrientedPoints,  # of one frame
    held: Body,  # stands as the cloud does in `frame`
    frame: int,
    motion: Body,  # where the same mesh goes
    far_side: FarSide = "of the body",
    depth: Depth = "near the body",
    on_step: OnStep | None = None,
) -> OrientedPoints:
    """The cloud in every frame of the motion. Radii and confidences stay those of the picture: what
    it did not show is a guess in every frame."""
    start, faces, count = held.vertices[frame], held.faces, motion.frame_count
    if far_side == "of the body":
        seen = (cloud.confidences > 0).nonzero()[:, 0]
        cloud = cloud.select(seen, cloud.frame_offsets.new_tensor([0, len(seen)]))
    outward, height = outward_normals(cloud), body_height(held)
    own, away = nearest_places(cloud, outward, start, faces, height)
    if depth == "near the body":
        cloud = near_body(cloud, own, start, faces, height)
    binding = bind(cloud.positions, outward, own, away, height)
    if far_side == "of the body":
        behind = body_behind(cloud, binding.own, held, frame)
        cloud, binding = _with_behind(cloud, binding, behind)
    carrier = Carrier(cloud, binding, start, faces, height)
    N = len(cloud.positions)
    positions = cloud.positions.new_empty(count, N, 3)
    normals = torch.empty_like(positions)
    for f in range(count):
        positions[f], normals[f] = carrier(motion.vertices[f])
        if on_step:
            on_step(f + 1, count)
    return replace(
        cloud,
        positions=positions.flatten(0, 1),
        normals=normals.flatten(0, 1),
        colors=cloud.colors.repeat(count, 1),
        radii=cloud.radii.repeat(count),
        confidences=cloud.confidences.repeat(count),
        frame_offsets=torch.arange(count + 1, device=positions.device) * N,
        fps=motion.fps,
    )


def centred(
    cloud: OrientedPoints,
    motion: Body,
    held: Body,
) -> tuple[OrientedPoints, Body]:
    """The same with the world's origin at the performer's centre over the motion. The camera of the
    picture stands to the motion as it stood to the body that the picture showed."""
    source = cloud.source
    pose, middle = source.T_camera_world.clone(), performer_centre(held.vertices)
    pose[0, :3, 3] += pose[0, :3, :3] @ middle.to(pose)
    positions = cloud.positions - performer_centre(motion.vertices)
    source = replace(source, T_camera_world=pose)
    return replace(cloud, positions=positions, source=source), motion.centred()
