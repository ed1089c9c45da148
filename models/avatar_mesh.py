"""Gaussians on a body's skin: they go where the mesh goes, in any motion and any shape of it.

Stage: BODY -> Gaussians spread on its template; Gaussians on the template + the skin of one moment ->
Gaussians in the world (MVP4D's avatar; CAP4D and GaussianAvatars bind a Gaussian to a triangle's own
frame).

Departure: not the frame of one triangle, which turns by a jump from one triangle to the next and
tears what stands off the skin, but the turn and the stretch of the skin *around* each vertex, blended
at the Gaussian's place. They lead from the template to the moment, so Gaussians stay in the
template's axes and metres: an avatar's canonical Gaussians are the person as the template stands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .body import Body
from .fit_body import Ground, Places, skin, spread_evenly, triangle_normals
from .performer import vertex_normals
from .quats import blended, matrices_to_quats, multiplied, turned, unit
from .splats import C0, Splats, rotation_matrices

STEADYING = 1e-3
"""Share of the whole body's stretch in that around a vertex: decides where slivers say nothing."""
WIDTH, THICKNESS = 0.6, 0.15
"""Standard deviations of a new Gaussian along and across the skin, in distances to its neighbours."""
FIRST_OPACITY = 0.9


@dataclass(frozen=True)
class SkinPose:
    """How the skin stands at one moment, against the template."""

    vertices: Tensor
    """[N, 3] world, metres."""
    quats: Tensor
    """[N, 4] turns from the template's axes to the world's, smooth over the skin."""
    stretches: Tensor
    """[N, 3, 3] symmetric, template axes: by how much the skin is longer, before it turns."""
    normals: Tensor
    """[N, 3] world, outwards."""


def _edges(vertices: Tensor, faces: Tensor) -> Tensor:  # [M, 3, 3] columns: two edges, the normal
    a, b, c = vertices[faces].unbind(1)
    normal = torch.linalg.cross(b - a, c - a)
    size = normal.norm(dim=1, keepdim=True).sqrt()
    return torch.stack([b - a, c - a, F.normalize(normal, dim=1) * size], 2)


class Skin:
    """A template's triangles, ready to be compared with other moments."""

    def __init__(self, rest: Tensor, faces: Tensor) -> None:  # [N, 3], [M, 3]
        self.rest, self.faces = rest, faces
        self._start = _edges(rest.double(), faces)
        self._around = torch.bincount(faces.flatten(), minlength=len(rest)).clamp(min=1)
        whole = self._start @ self._start.mT
        self._whole = whole.sum(0)
        self._spread = self._smooth(whole)

    def pose(self, vertices: Tensor) -> SkinPose:  # [N, 3] world
        """Least squares over the triangles around each vertex: the matrix that turns and stretches
        the template's edges and normals into the moment's, J = (sum p rᵀ) (sum r rᵀ)⁻¹, taken apart
        into a rotation and a symmetric stretch."""
        matched = _edges(vertices.double(), self.faces) @ self._start.mT
        overall = torch.linalg.solve(self._whole, matched.sum(0), left=False)
        size = STEADYING * self._spread.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        eye = torch.eye(3).to(self._spread)
        matrices = torch.linalg.solve(
            self._spread + size * eye, self._smooth(matched) + size * overall, left=False
        )
        u, s, vh = torch.linalg.svd(matrices)
        # Where the skin is folded inside out, the least axis is turned back: no mirror images.
        signs = torch.ones_like(s)
        signs[:, 2] = torch.linalg.det(u @ vh).sign()
        quats = matrices_to_quats((u * signs[:, None]) @ vh)
        stretches = vh.mT @ (s[..., None] * vh)
        normals = vertex_normals(vertices[None], self.faces)[0]
        return SkinPose(vertices, quats.to(vertices), stretches.to(vertices), normals)

    def _smooth(self, values: Tensor) -> Tensor:  # [M, 3, 3] -> [N, 3, 3]
        """Means around the vertices; once more over the triangles, so that small ones don't jitter."""
        return self._gathered(self._gathered(values)[self.faces].mean(1))

    def _gathered(self, values: Tensor) -> Tensor:  # [M, 3, 3] -> [N, 3, 3]
        sums = values.new_zeros(len(self.rest), 3, 3)
        for i in range(3):
            sums.index_add_(0, self.faces[:, i], values)
        return sums / self._around[:, None, None]


@dataclass(frozen=True)
class SkinSpots:
    """Where n Gaussians hang on the template."""

    corners: Tensor
    """[n, 3] int64, vertices of their triangles."""
    weights: Tensor
    """[n, 3] barycentric, sum 1."""
    anchors: Tensor
    """[n, 3] metres, those places of the template."""

    def __len__(self) -> int:
        return len(self.corners)

    def of(self, values: Tensor) -> Tensor:  # [N, C...] -> [n, C...]
        """Values of the vertices, at the places."""
        weights = self.weights.view(*self.weights.shape, *[1] * (values.ndim - 1))
        return (values[self.corners] * weights).sum(1)

    def select(self, chosen: Tensor) -> SkinSpots:
        """Some of them: by number or by mask."""
        return SkinSpots(*(t[chosen] for t in vars(self).values()))


def spots_of(places: Places, rest: Tensor, faces: Tensor) -> SkinSpots:
    corners, weights = faces[places.faces], places.weights.to(rest)
    return SkinSpots(corners, weights, (rest[corners] * weights[..., None]).sum(1))


@dataclass(frozen=True)
class SpotPose:
    """How the skin stands at n spots at one moment."""

    places: Tensor
    """[n, 3] world, metres."""
    quats: Tensor
    """[n, 4] turns from the template's axes to the world's."""
    stretches: Tensor
    """[n, 3, 3] symmetric, template axes."""
    normals: Tensor
    """[n, 3] world, outwards."""


def pose_spots(spots: SkinSpots, pose: SkinPose) -> SpotPose:
    quats = blended(pose.quats[spots.corners], spots.weights)
    normals = F.normalize(spots.of(pose.normals), dim=1)
    return SpotPose(spots.of(pose.vertices), quats, spots.of(pose.stretches), normals)


def posed(
    splats: Splats,  # [n] on the template
    spots: SkinSpots,  # [n]
    stand: SpotPose,  # [n] of those spots
) -> Splats:  # [n] in the world
    """The Gaussians at a moment. Their colours stay those of the world's directions: light does not
    turn with a person.

    What stands off the skin is moved by the turn there and the mean stretch; each axis of a Gaussian
    becomes as much longer as the skin in its direction.
    """
    size = stand.stretches.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    longer = (stand.stretches @ rotation_matrices(splats.rotations)).square().sum(1)
    return Splats(
        stand.places + turned(stand.quats, size * (splats.means - spots.anchors)),
        multiplied(stand.quats, unit(splats.rotations)),
        splats.log_scales + longer.log() / 2,
        splats.opacities,
        splats.sh,
    )


def bound_again(
    splats: Splats,  # [n] on the template
    places: Places,  # where they were bound, or their parents
    rest: Tensor,  # [N, 3]
    faces: Tensor,  # [M, 3]
) -> Places:
    """The places that are nearest now, on the same side of the body as before."""
    height = float(rest[:, 1].amax() - rest[:, 1].amin())
    outward = triangle_normals(rest[faces[places.faces]])
    return Ground(rest, faces, height).places(splats.means.detach(), outward)[0]


def splats_on_body(
    body: Body,
    count: int,
    degree: int = 0,
) -> tuple[Splats, Places]:
    """Flat Gaussians all over the template, evenly, and where they hang; in the body's colours where
    it has some."""
    if count < 1:
        raise ValueError(f"An avatar needs at least 1 Gaussian, {count} were asked for.")
    rest, faces = body.rest, body.faces
    corners = rest[faces]
    places = spread_evenly(corners, count)
    spots = spots_of(places, rest, faces)
    spacing = math.sqrt(float(skin(rest, faces)) / count)
    edge = F.normalize(corners[:, 1] - corners[:, 0], dim=1)
    normal = triangle_normals(corners)
    axes = torch.stack([edge, torch.linalg.cross(normal, edge), normal], 2)[places.faces]
    scales = rest.new_tensor([WIDTH, WIDTH, THICKNESS]) * spacing
    colors = torch.full_like(spots.anchors, 0.5) if body.colors is None else spots.of(body.colors)
    sh = rest.new_zeros(count, (degree + 1) ** 2, 3)
    sh[:, 0] = (colors - 0.5) / C0
    opacity = math.log(FIRST_OPACITY / (1 - FIRST_OPACITY))
    return Splats(
        spots.anchors.clone(),
        matrices_to_quats(axes),
        scales.log().expand(count, 3).clone(),
        rest.new_full((count,), opacity),
        sh,
    ), places
