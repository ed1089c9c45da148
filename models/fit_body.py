"""Where a cloud lies on a body, and how the body must stand to be the one that the cloud shows.

Stage: cloud of one picture + one frame of a BODY -> nearest places on the mesh; a similarity (size,
place, turn about the vertical) that brings the body to the cloud. Everything is measured against the
body's own height, so children and giants are alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .body import Body
from .cameras import Rig
from .points import OrientedPoints
from .rasterize_mesh import NEAR, rasterize_mesh

Align = Literal["place and size", "place, size and turn", "place", "off"]
FREE = {"place and size": 4, "place, size and turn": 5, "place": 3, "off": 0}
"""How many of x, y, z, size, turn are looked for."""

FACING = 0.02
"""Share of the height that a difference of normals of length 1 (60 degrees) counts as, so that a
hand does not lie on the hip behind it; opposite sides are twice as far."""
FACING_IN_PICTURE = 0.003
"""The same where the picture says what is hidden: normals that were drawn from depth are coarse."""
SAMPLE_SPACING = 0.02
"""Share of the height between places at which large triangles are looked up."""
CANDIDATES = 12
"""Triangles near a point that are measured exactly."""
POINTS_AT_ONCE = 1 << 16
DEPTH_COUNTS = 0.3
"""How much a way along the line of sight counts beside one across it, looked at through a lens."""
LOOK_HEIGHT = 640
"""Pixels at least, so that the triangles of a usual body are not lost between them."""

FIT_POINTS, FIT_SPOTS = 2000, 4000
"""Of the cloud and of the body, looked at in a search."""
TRIAL_STEPS, FIT_STEPS = 10, 30
"""Of every start, and of the best of them."""
SETTLED = 3e-4
"""Metres, radians: a smaller step ends the search."""
OUTLINE = 0.005
"""Share of the height to which outlines are known."""
LEAST_SPREAD = 0.0001
"""Share of the height to which the best depth is known."""
OUTLIER = 3.0
"""Gaps so many times larger than they should be count half."""
RIM_PIXELS = 2.5
"""Pixels that Performer Geometry may have taken off the edge."""


def body_height(body: Body) -> float:
    """Metres from sole to crown of the upright template."""
    return float(body.rest[:, 1].amax() - body.rest[:, 1].amin())


def triangle_normals(corners: Tensor) -> Tensor:  # [..., 3, 3] -> [..., 3] unit, outwards
    """Faces run against the clock seen from outside; y is down, which turns a cross product round."""
    a, b, c = corners.unbind(-2)
    return F.normalize(torch.linalg.cross(b - a, c - a), dim=-1)


def closest_on_triangles(
    points: Tensor,  # [..., 3]
    corners: Tensor,  # [..., 3, 3]
) -> Tensor:  # [..., 3] barycentric weights
    """The nearest point of each triangle."""
    a, b, c = corners.unbind(-2)
    best, nearest = None, None
    for i, (start, end) in enumerate(((a, b), (b, c), (c, a))):
        edge = end - start
        share = ((points - start) * edge).sum(-1) / edge.square().sum(-1).clamp(min=1e-20)
        share = share.clamp(0, 1)
        weights = torch.stack([1 - share, share, torch.zeros_like(share)], -1).roll(i, -1)
        away = (start + share[..., None] * edge - points).square().sum(-1)
        if best is None:
            best, nearest = weights, away
        else:
            best = torch.where((away < nearest)[..., None], weights, best)
            nearest = torch.minimum(away, nearest)
    ab, ac, ap = b - a, c - a, points - a
    normal = torch.linalg.cross(ab, ac)
    area = normal.square().sum(-1).clamp(min=1e-20)
    v = (torch.linalg.cross(ap, ac) * normal).sum(-1) / area
    w = (torch.linalg.cross(ab, ap) * normal).sum(-1) / area
    inside = torch.stack([1 - v - w, v, w], -1)
    flat = normal.square().sum(-1) < 1e-20
    within = (inside >= 0).all(-1) & ~flat
    return torch.where(within[..., None], inside, best)


@dataclass(frozen=True)
class Places:
    """Places on a mesh."""

    faces: Tensor
    """[N] int64, triangle."""
    weights: Tensor
    """[N, 3] barycentric."""

    def of(self, values: Tensor, faces: Tensor) -> Tensor:  # [V, C...], [M, 3] -> [N, C...]
        """Values of the vertices, at the places."""
        corners = values[faces[self.faces]]  # [N, 3, C...]
        weights = self.weights.view(*self.weights.shape, *[1] * (values.ndim - 1))
        return (corners * weights).sum(1)


class Ground:
    """A mesh at one moment, made ready to be asked for the nearest places.

    With a lens, it is the mesh as that camera's picture shows it: what is hidden does not count, and
    ways along the line of sight count little, as pictures tell them badly.
    """

    def __init__(
        self, vertices: Tensor, faces: Tensor, height: float, lens: Rig | None = None
    ) -> None:
        from scipy.spatial import cKDTree

        self.height, self.lens = height, lens
        self.facing = (FACING if lens is None else FACING_IN_PICTURE) * height
        self.shown = shown_triangles(vertices, faces, lens) if lens else None
        corners = vertices[faces if self.shown is None else faces[self.shown]]  # [M, 3, 3]
        self.normals, self.corners = triangle_normals(corners), self._looked_at(corners)
        places = spread(self.corners, SAMPLE_SPACING * height)
        self.spots = (self.corners[places.faces] * places.weights[..., None]).sum(1)
        self.owners = places.faces
        self.tree = cKDTree(self._facing(self.spots, self.normals[places.faces]))

    def _looked_at(self, points: Tensor) -> Tensor:  # [..., 3]
        """Through the lens: metres across the line of sight, and shortened ones along it."""
        if self.lens is None:
            return points
        T = self.lens.T_camera_world[0].to(points)
        at = points @ T[:3, :3].T + T[:3, 3]
        across = at[..., :2] / at[..., 2:].clamp(min=NEAR) * T[2, 3]
        return torch.cat([across, DEPTH_COUNTS * at[..., 2:]], -1)

    def _facing(self, points: Tensor, normals: Tensor) -> np.ndarray:  # [N, 6]
        both = torch.cat([points, self.facing * normals], 1)
        return both.double().cpu().numpy()

    def near(self, points: Tensor, normals: Tensor) -> Tensor:  # [N] number of the nearest spot
        _, found = self.tree.query(self._facing(points, normals))
        return torch.from_numpy(found).to(points.device)

    def places(
        self,
        points: Tensor,  # [N, 3]
        normals: Tensor,  # [N, 3] unit, outwards
    ) -> tuple[Places, Tensor]:  # and how far away they are [N], metres
        """The nearest places that face about the same way."""
        parts = [
            self._places(self._looked_at(p), n)
            for p, n in zip(
                points.split(POINTS_AT_ONCE), normals.split(POINTS_AT_ONCE), strict=True
            )
        ]
        faces, weights, away = (torch.cat(part) for part in zip(*parts, strict=True))
        return Places(faces if self.shown is None else self.shown[faces], weights), away

    def _places(self, points: Tensor, normals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = min(CANDIDATES, self.tree.n)
        _, found = self.tree.query(self._facing(points, normals), k=count)
        found = torch.from_numpy(found.reshape(len(points), count)).to(points.device)
        faces = self.owners[found]
        corners = self.corners[faces]
        weights = closest_on_triangles(points[:, None], corners)
        away = ((corners * weights[..., None]).sum(2) - points[:, None]).square().sum(-1)
        turned = (self.normals[faces] - normals[:, None]).square().sum(-1)
        best = (away + self.facing**2 * turned).argmin(1, keepdim=True)
        chosen = weights.gather(1, best[..., None].expand(-1, 1, 3))[:, 0]
        return faces.gather(1, best)[:, 0], chosen, away.gather(1, best)[:, 0].sqrt()


def shown_triangles(vertices: Tensor, faces: Tensor, lens: Rig) -> Tensor:  # [M'] numbers
    """Those that a camera sees, and their neighbours."""
    scale = max(1.0, LOOK_HEIGHT / lens.height)
    look = lens.resized(round(lens.width * scale), round(lens.height * scale))
    T, K = (t[0].to(vertices) for t in (look.T_camera_world, look.K))
    drawn = rasterize_mesh(vertices @ T[:3, :3].T + T[:3, 3], faces, K, look.width, look.height)
    seen = torch.zeros(len(vertices), dtype=torch.bool, device=vertices.device)
    seen[faces[drawn.faces[drawn.faces >= 0]]] = True
    shown = seen[faces].any(1).nonzero()[:, 0]
    return shown if len(shown) else torch.arange(len(faces), device=faces.device)


def spread(
    corners: Tensor,  # [M, 3, 3]
    spacing: float,  # metres
) -> Places:
    """The middle of every triangle, and a grid of places on those that are larger than `spacing`."""
    edges = (corners - corners.roll(1, 1)).norm(dim=-1).amax(1)
    cells = (edges / spacing).ceil().clamp(min=1, max=64).long()
    faces, weights = [], []
    for n in cells.unique().tolist():
        of = (cells == n).nonzero()[:, 0]
        i, j = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
        up = (i + j < n).nonzero(as_tuple=True)
        down = (i + j < n - 1).nonzero(as_tuple=True)
        middles = [(i[up] + 1 / 3, j[up] + 1 / 3), (i[down] + 2 / 3, j[down] + 2 / 3)]
        u, v = (torch.cat(part).to(corners) / n for part in zip(*middles, strict=True))
        inside = torch.stack([1 - u - v, u, v], -1)
        faces.append(of.repeat_interleave(len(inside)))
        weights.append(inside.repeat(len(of), 1))
    return Places(torch.cat(faces), torch.cat(weights))


def skin(vertices: Tensor, faces: Tensor) -> Tensor:  # square metres
    """The surface of a mesh."""
    a, b, c = vertices[faces].double().unbind(1)
    return torch.linalg.cross(b - a, c - a).norm(dim=1).sum() / 2


def spread_evenly(corners: Tensor, spots: int) -> Places:  # [M, 3, 3]
    """So many places all over a mesh, the same number on every piece of skin."""
    a, b, c = corners.double().unbind(1)
    ends = torch.linalg.cross(b - a, c - a).norm(dim=1).cumsum(0)
    count = max(1, spots)
    n = torch.arange(count, device=corners.device, dtype=torch.float64)
    faces = torch.searchsorted(ends, (n + 0.5) / count * ends[-1]).clamp(max=len(corners) - 1)
    # Two irrational steps fill the plane evenly (Roberts 2018).
    u, v = (0.5 + n * 0.7548776662466927) % 1, (0.5 + n * 0.5698402909980532) % 1
    u, v = torch.where(u + v > 1, 1 - u, u), torch.where(u + v > 1, 1 - v, v)
    return Places(faces, torch.stack([1 - u - v, u, v], 1).to(corners))


@dataclass(frozen=True)
class Stand:
    """A similarity: world = size * turned about the vertical + place."""

    size: float = 1.0
    turn: float = 0.0
    """Radians about the vertical (y); positive brings what faces the camera (-z) towards -x."""
    place: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def matrix(self, like: Tensor) -> Tensor:  # [3, 3]
        c, s = math.cos(self.turn), math.sin(self.turn)
        return like.new_tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]])

    def moved(self, points: Tensor) -> Tensor:  # [..., 3]
        return self.size * points @ self.matrix(points).T + points.new_tensor(self.place)

    def back(self, points: Tensor) -> Tensor:  # [..., 3]
        return (points - points.new_tensor(self.place)) @ self.matrix(points) / self.size


def stood(body: Body, stand: Stand) -> Body:
    """The body, moved, turned and sized in all its frames."""
    neutral = None if body.neutral is None else stand.moved(body.neutral)
    return replace(
        body, vertices=stand.moved(body.vertices), neutral=neutral, rest=body.rest * stand.size
    )


@dataclass(frozen=True)
class Fit:
    """How the body was made to stand, and how well that fits."""

    body: Body
    stand: Stand
    distance: float
    """Share of the body's height: median from the seen points to the body."""
    overlap: float
    """0..1: what body and points have in common in the picture, of what either has."""


class _Search:
    """Gauss-Newton for a Stand. Three things pull: points to the surface behind them, points outside
    the body's outline to the outline, and body outside the points' outline back to it.

    Each counts by how well it is known: outlines to about a centimetre, the surface as well as it
    turns out to fit. So exact depth decides, and where depth is a guess the picture does.
    """

    def __init__(self, cloud: OrientedPoints, body: Body, frame: int, free: int) -> None:
        from scipy.spatial import cKDTree

        self.free, self.height, self.lens = free, body_height(body), cloud.source
        self.T = self.lens.T_camera_world[0].to(cloud.positions.device).double()
        seen = (cloud.confidences > 0).nonzero()[:, 0]
        self.in_picture = cKDTree(self._pictured(cloud.positions[seen].double()).cpu().numpy())
        self.rim = RIM_PIXELS * 2 * float(cloud.radii[seen].median())
        seen = seen[:: max(1, len(seen) // FIT_POINTS)]
        self.points, self.normals = cloud.positions[seen].double(), cloud.normals[seen].double()
        vertices = body.vertices[frame].double()
        self.ground = Ground(vertices, body.faces, self.height)
        corners = vertices[body.faces]
        spots = spread_evenly(corners, spots=FIT_SPOTS)
        self.spots = (corners[spots.faces] * spots.weights[..., None]).sum(1)
        self.spacing = 0.75 * math.sqrt(float(skin(vertices, body.faces)) / FIT_SPOTS)

    def _pictured(self, points: Tensor) -> Tensor:  # [N, 3] -> [N, 2]
        """Places in the picture, in metres at the distance of the world's origin."""
        at = points @ self.T[:3, :3].T + self.T[:3, 3]
        return at[:, :2] / at[:, 2:].clamp(min=NEAR) * self.T[2, 3]

    def starts(self, sized: bool) -> list[Stand]:
        """As it stands; and box upon box: middles, or tops (a picture may end above the feet)."""
        # The side that the points show: they were seen from where their normals point to.
        towards = F.normalize(self.normals.mean(0), dim=0)
        facing = self.ground.normals[self.ground.owners] @ towards > 0
        shown = self.ground.spots[facing]
        low, high = shown.amin(0), shown.amax(0)
        to_low, to_high = self.points.amin(0), self.points.amax(0)
        tall = float((to_high[1] - to_low[1]) / (high[1] - low[1]).clamp(min=1e-6))

        def upon(size: float, top: bool) -> Stand:
            place = (to_low + to_high) / 2 - size * (low + high) / 2
            if top:
                place[1] = to_low[1] - size * low[1]
            return Stand(size, 0.0, tuple(place.tolist()))

        found = [Stand(), upon(1.0, False), upon(1.0, True)]
        return [*found, upon(tall, False)] if sized else found

    def settled(self, stand: Stand, steps: int) -> Stand:
        """From a start to where nothing pulls any more, or as far as the steps reach."""
        for _ in range(steps if self.free else 0):
            A = 1e-9 * torch.eye(self.free).to(self.points)
            b = A.new_zeros(self.free)
            for gap, moves, known in (self._to_surface(stand), *self._to_outlines(stand)):
                # What lies far off may be another thing: its weight falls.
                weight = 1 / (1 + (gap / (OUTLIER * known)).square()) / (known**2 * len(gap))
                A = A + torch.einsum("n,ni,nj->ij", weight, moves, moves)
                b = b + torch.einsum("n,ni,n->i", weight, moves, gap)
            step = torch.linalg.solve(A, b).tolist() + [0.0, 0.0]
            stand = Stand(
                stand.size * math.exp(step[3] if self.free > 3 else 0.0),
                stand.turn + (step[4] if self.free > 4 else 0.0),
                tuple(p + d for p, d in zip(stand.place, step, strict=False)),
            )
            if max(abs(s) for s in step) < SETTLED:
                break
        return stand

    def _moves(self, moved: Tensor, stand: Stand) -> Tensor:  # [N, 3] -> [N, 3, free]
        """How a place moves with x, y, z, size and turn."""
        arm = moved - moved.new_tensor(stand.place)
        about = torch.stack([arm[:, 2], torch.zeros_like(arm[:, 0]), -arm[:, 0]], 1)
        straight = torch.eye(3).to(arm).expand(len(arm), 3, 3)
        return torch.cat([straight, arm[..., None], about[..., None]], 2)[..., : self.free]

    def _to_surface(self, stand: Stand):
        """Gaps [N] from the nearest places, along their normals; what closes them [N, free]; how
        well they are known."""
        turn = stand.matrix(self.points)
        spot = self.ground.near(stand.back(self.points), self.normals @ turn)
        there = stand.moved(self.ground.spots[spot])
        facing = self.ground.normals[self.ground.owners[spot]] @ turn.T
        gap = (facing * (self.points - there)).sum(1)
        known = max(1.5 * float(gap.abs().median()), LEAST_SPREAD * self.height * stand.size)
        return gap, torch.einsum("nc,nck->nk", facing, self._moves(there, stand)), known

    def _outside(self, stand: Stand):
        """In the picture: the body's spots, which of them each point is nearest to, and which point
        each spot; and by how much one is outside the other."""
        from scipy.spatial import cKDTree

        moved = stand.moved(self.spots)
        body, points = self._pictured(moved), self._pictured(self.points)
        far, near = cKDTree(body.cpu().numpy()).query(points.cpu().numpy())
        back, point = self.in_picture.query(body.cpu().numpy())
        far, near, back, point = (
            torch.from_numpy(t).to(body.device) for t in (far, near, back, point)
        )
        # Where the picture ends, nobody knows about the body.
        K = self.lens.K[0].to(body)
        pixels = body / self.T[2, 3] * K[[0, 1], [0, 1]] + K[:2, 2]
        inside = (
            (pixels >= 0) & (pixels < pixels.new_tensor([self.lens.width, self.lens.height]))
        ).all(1)
        return (
            moved,
            body,
            points,
            near,
            (far - self.spacing * stand.size).clamp(min=0),
            point,
            ((back - self.rim).clamp(min=0) * inside),
        )

    def _to_outlines(self, stand: Stand):
        moved, body, points, near, far, point, back = self._outside(stand)
        known = OUTLINE * self.height * stand.size
        targets = torch.from_numpy(self.in_picture.data).to(body)
        for gap, spot, target in ((far, near, points), (back, slice(None), targets[point])):
            way = F.normalize(target - body[spot], dim=1)
            at = moved[spot] @ self.T[:3, :3].T + self.T[:3, 3]
            z = at[:, 2:].clamp(min=NEAR)
            # The picture's place changes with x / z.
            along = torch.cat([way, -(way * at[:, :2] / z).sum(1, keepdim=True)], 1)
            along = along * self.T[2, 3] / z @ self.T[:3, :3]
            yield gap, torch.einsum("nc,nck->nk", along, self._moves(moved[spot], stand)), known

    def distance(self, stand: Stand) -> float:
        """Median share of the height from the points to the body that stands so."""
        turned = self.normals @ stand.matrix(self.normals)
        _, away = self.ground.places(stand.back(self.points), turned)
        return float(away.median()) / self.height

    def overlap(self, stand: Stand) -> float:
        """Of the picture that body or points cover, the share that both do."""
        *_, far, _, back = self._outside(stand)
        out, bare = float((far > 0).double().mean()), float((back > 0).double().mean())
        return (1 - out) * (1 - bare) / (1 - out * bare)


def fit_body(cloud: OrientedPoints, body: Body, frame: int, align: Align) -> Fit:
    """The body as the cloud has it in one of its frames."""
    if not (cloud.confidences > 0).any():
        raise ValueError(
            "No point of the cloud was seen by a camera, so no body can be brought to it: connect "
            "the cloud of Performer Geometry."
        )
    search = _Search(cloud, body, frame, FREE[align])
    starts = [Stand()] if align == "off" else search.starts(FREE[align] > 3)
    tried = [search.settled(start, TRIAL_STEPS) for start in starts]
    best = min(tried, key=lambda stand: search.distance(stand) + (1 - search.overlap(stand)) / 10)
    best = search.settled(best, FIT_STEPS)
    return Fit(stood(body, best), best, search.distance(best), search.overlap(best))
