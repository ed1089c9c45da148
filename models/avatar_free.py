"""Gaussians that follow a few hundred control nodes: what has no mesh (clothes, hair, anything).

Stage: canonical Gaussians + nodes -> Gaussians in the world at any time (embedded deformation, Sumner,
Schmid and Pauly 2007; nodes under Gaussians as in SC-GS). A node has a place in canonical space, and
at every frame a turn and a place to be. A Gaussian goes with its nearest nodes by weights that fall
smoothly with distance; times between two frames lie between their turns and places.

Canonical space is the world at one frame of the clip. Where a motion is too quick for one cloud of
Gaussians, several take turns (`avatar_tracking`), each with nodes and a canonical space of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .quats import blended, multiplied, turned, unit
from .splats import Splats

FOLLOWED = 4
"""Nodes that a Gaussian follows, as published."""
TIED = 6
"""Nodes that a node is kept rigid with."""


def moment(
    time: float,  # frames
    frames: int,
) -> tuple[int, float]:
    """The frame before a time and the share of the way to the next; held before the first and after
    the last."""
    last = frames - 1
    time = min(max(float(time), 0.0), float(last))
    low = min(int(time), max(last - 1, 0))
    return low, time - low


def between(
    frames: Tensor,  # [F, ...]
    time: float,  # frames
) -> Tensor:  # [...]
    """Values at a time, on a curve through the frames (Catmull and Rom 1974): what swings round a
    joint goes on an arc, which straight ways between frames would cut."""
    low, share = moment(time, len(frames))
    if share == 0:
        return frames[low]
    last = len(frames) - 1
    b, c = frames[low], frames[low + 1]
    # Beyond the ends it goes on as fast.
    a = frames[low - 1] if low > 0 else 2 * b - c
    d = frames[low + 2] if low + 2 <= last else 2 * c - b
    s, ss, sss = share, share**2, share**3
    weights = (-s + 2 * ss - sss, 2 - 5 * ss + 3 * sss, s + 4 * ss - 3 * sss, sss - ss)
    return sum(w / 2 * value for w, value in zip(weights, (a, b, c, d), strict=True))


@dataclass(frozen=True)
class Nodes:
    """P control nodes over F frames."""

    places: Tensor
    """[P, 3] metres, canonical."""
    reach: Tensor
    """[P] metres at which a node's influence has fallen to exp(-1/2)."""
    quats: Tensor
    """[F, P, 4] turns from canonical space, of any length above 0."""
    goes: Tensor
    """[F, P, 3] metres from its canonical place to where it is."""

    def __post_init__(self) -> None:
        P, frames = len(self.places), len(self.quats)
        shapes = {"places": (P, 3), "reach": (P,), "quats": (frames, P, 4), "goes": (frames, P, 3)}
        for name, shape in shapes.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(
                    f"{P} control nodes over {frames} frames need {name} of shape {list(shape)}, "
                    f"got {list(getattr(self, name).shape)}."
                )

    @property
    def frame_count(self) -> int:
        return len(self.quats)

    def at(self, time: float) -> tuple[Tensor, Tensor]:
        """Turns [P, 4] of length 1 and shifts [P, 3] at a time in frames; held before the first and
        after the last."""
        low, share = moment(time, self.frame_count)
        high = min(low + 1, self.frame_count - 1)
        pair = unit(torch.stack([self.quats[low], self.quats[high]], 1))
        weights = pair.new_tensor([1 - share, share]).expand(len(pair), 2)
        return blended(pair, weights), between(self.goes, time)


@dataclass(frozen=True)
class Followed:
    """Which nodes n Gaussians follow."""

    nodes: Tensor
    """[n, k] int64."""
    weights: Tensor
    """[n, k], sum 1."""

    def __len__(self) -> int:
        return len(self.nodes)

    def select(self, chosen: Tensor) -> Followed:
        """Those of some Gaussians: by number or by mask."""
        return Followed(self.nodes[chosen], self.weights[chosen])


def spread_nodes(
    points: Tensor,  # [n, 3] metres
    count: int,
) -> Tensor:  # [P] numbers of points, P <= count
    """Farthest points first: each lies as far as possible from those before it."""
    if not len(points):
        raise ValueError("Control nodes need points to stand on, and there are none.")
    chosen = [int((points - points.mean(0)).square().sum(1).argmax())]
    away = (points - points[chosen[0]]).square().sum(1)
    while len(chosen) < count and away.max() > 0:
        chosen.append(int(away.argmax()))
        away = torch.minimum(away, (points - points[chosen[-1]]).square().sum(1))
    return torch.tensor(chosen, device=points.device)


def nodes_at_rest(
    points: Tensor,  # [n, 3] metres, canonical
    count: int,
    frames: int,
) -> Nodes:
    """Nodes among the points that don't move yet. Each reaches as far as its neighbours are."""
    places = points[spread_nodes(points.detach(), count)].detach()
    P = len(places)
    away, _ = nearest(places, places, min(P, 4))
    reach = away[:, 1:].mean(1) if P > 1 else away.new_ones(1)
    still = places.new_tensor([1.0, 0, 0, 0]).expand(frames, P, 4)
    return Nodes(places, reach.clamp(min=1e-6), still.clone(), places.new_zeros(frames, P, 3))


def nearest(points: Tensor, others: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Distances [n, count] and numbers of the nearest others, a few points at a time."""
    near = [torch.cdist(part, others).topk(count, largest=False) for part in points.split(1 << 14)]
    away, found = (torch.cat(part) for part in zip(*near, strict=True))
    return away, found


def follow(
    means: Tensor,  # [n, 3] canonical
    nodes: Nodes,
) -> Followed:
    """The nearest nodes. The farthest of them counts nothing, so that changing it can't be seen."""
    means, P = means.detach(), len(nodes.places)
    count = min(P, FOLLOWED + 1)
    away, found = nearest(means, nodes.places, count)
    # In reaches beyond the nearest's, which leaves weights to Gaussians far from all nodes.
    square = (away / nodes.reach[found]).square()
    weights = torch.exp(-0.5 * (square - square.amin(1, keepdim=True)))
    if count > FOLLOWED:
        weights = weights * (1 - away / away[:, -1:].clamp(min=1e-12))[:, :count]
        found, weights = found[:, :FOLLOWED], weights[:, :FOLLOWED]
    total = weights.sum(1, keepdim=True)
    # All equally far: no one is nearer than the one that counts nothing.
    even = torch.full_like(weights, 1 / weights.shape[1])
    return Followed(found, torch.where(total > 1e-12, weights / total.clamp(min=1e-12), even))


def carried(
    points: Tensor,  # [n, 3] canonical
    followed: Followed,  # [n]
    nodes: Nodes,
    time: float,  # frames
) -> Tensor:  # [n, 3] world
    """mu' = sum w (R (mu - p) + p + t)."""
    return _carried(points, followed, nodes.places, *nodes.at(time))


def _carried(
    points: Tensor, followed: Followed, places: Tensor, quats: Tensor, goes: Tensor
) -> Tensor:  # [n, 3]
    near = places[followed.nodes]  # [n, k, 3]
    ends = turned(quats[followed.nodes], points[:, None] - near) + near + goes[followed.nodes]
    return (ends * followed.weights[..., None]).sum(1)


def moved(
    splats: Splats,  # [n] canonical
    followed: Followed,  # [n]
    nodes: Nodes,
    time: float,  # frames
) -> tuple[Splats, Tensor]:  # [n] in the world, and their turns [n, 4]
    """Gaussians where the nodes carry them; each turns by the blended turn. Colours stay those of the
    world's directions."""
    quats, goes = nodes.at(time)
    turns = blended(quats[followed.nodes], followed.weights)
    means = _carried(splats.means, followed, nodes.places, quats, goes)
    rotations = multiplied(turns, unit(splats.rotations))
    return Splats(means, rotations, *splats.tensors()[2:]), turns


HIDDEN = -20.0
"""Logit of the opacity of Gaussians whose turn it isn't: 2e-9."""


@dataclass(frozen=True)
class NodeCloud:
    """n Gaussians that show a performer through some frames of a clip."""

    nodes: Nodes
    """Over these frames."""
    followed: Followed
    """[n]"""
    normals: Tensor
    """[n, 3] canonical, outwards, of length 1."""

    def __post_init__(self) -> None:
        if self.normals.shape != (len(self.followed), 3):
            raise ValueError(
                f"{len(self.followed)} Gaussians have normals of shape {list(self.normals.shape)}."
            )

    def __len__(self) -> int:
        return len(self.followed)

    def at(
        self,
        splats: Splats,  # [n] canonical
        time: float,  # of its own frames
    ) -> tuple[Splats, Tensor]:  # [n] in the world, and their normals [n, 3]
        """Where they are; held before its first frame and after its last."""
        world, turns = moved(splats, self.followed, self.nodes, time)
        return world, turned(turns, self.normals)


class Ties:
    """Which nodes are kept rigid with which, and how far a deformation is from that."""

    def __init__(self, nodes: Nodes) -> None:
        count = min(len(nodes.places), TIED + 1)
        away, found = nearest(nodes.places, nodes.places, count)
        self.near = found[:, 1:]
        self.edges = nodes.places[self.near] - nodes.places[:, None]  # [P, k, 3]
        weights = torch.exp(-0.5 * (away[:, 1:] / nodes.reach[:, None]).square())
        self.weights = weights / weights.sum().clamp(min=1e-12)
        self.size = nodes.reach.mean()

    def rigidity(self, nodes: Nodes, frame: int) -> Tensor:
        """As rigid as possible (Sorkine and Alexa 2007, Eq. 1): how far neighbours are from where a
        node's turn takes them, squared, in mean reaches."""
        quats = unit(nodes.quats[frame])
        at = nodes.places + nodes.goes[frame]
        apart = at[self.near] - at[:, None] - turned(quats[:, None], self.edges)
        return (apart.square().sum(-1) * self.weights).sum() / self.size**2

    def jerkiness(self, nodes: Nodes, frame: int) -> Tensor:
        """How far a frame is from half way between its neighbours: places, squared, in mean reaches,
        and turns; 0 at both ends."""
        if not 0 < frame < nodes.frame_count - 1:
            return nodes.goes.new_zeros(())
        before, at, after = nodes.goes[frame - 1 : frame + 2]
        places = (at - (before + after) / 2).square().sum(-1).mean() / self.size**2
        quats = unit(nodes.quats[frame - 1 : frame + 2]).movedim(0, 1)
        middle = blended(quats[:, [0, 2]], quats.new_tensor([0.5, 0.5]).expand(len(quats), 2))
        # 1 - cos of half the angle, the same for q and -q.
        turns = (1 - (middle * quats[:, 1]).sum(-1).abs()).mean()
        return places + 8 * turns
