"""Where the parts of a performer without a mesh go from frame to frame: a first guess from outlines.

Stage: the skins of all frames (`avatar_start`) -> control nodes that carry one frame's skin to the
others (`avatar_free`). From the chosen frame outwards, each frame begins where its neighbour ended,
and goes on as fast; then every place of the one skin looks for the place of the other that is near,
faces the same way and has the same colour, both ways, while the nodes stay as rigid among each other
as they can (non-rigid ICP; Li, Sumner and Pauly 2008, with Sumner's graph). Fitting to the pictures
goes on from there: their gradients reach only a few pixels far, and a quick limb moves much farther.

Where a skin is lost, another frame's takes its turn (key frames, as Collet et al. 2015 track meshes
of free-viewpoint video in pieces).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .avatar_free import Followed, Nodes, Ties, carried, follow, nearest, nodes_at_rest
from .avatar_start import Skin, most_seen, thinned
from .quats import blended, multiplied, rotvecs_to_quats, turned, unit

OnStep = Callable[[int, int], None]

POINTS = 2000
"""Of a skin that are looked at."""
TURNS, AGAIN = 60, 3
"""Steps a frame, and after how many of them partners are looked for again."""
NEAR = 0.05
"""Share of the performer's height that counts as much as a normal that turned by 60 degrees, or as
another colour."""
COLOR = 2.0
"""What a colour's difference counts."""
RATE = 0.2
"""Of Adam: nodes' spacings a step."""
STIFF = (10.0, 3.0)
"""What bending costs at first and at last."""
ROBUST = (5.0, 1.0)
"""In nodes' spacings, at first and at last: partners farther than that pull no more strongly."""

LOST, COARSE = 0.55, 0.15
"""Distance of a carried skin from the frame's own beyond which the performer was lost: between what
was measured for both (`Tracked`). Where a skin is too coarse for that, that of two halves of its
points from each other, and so much."""
SURE = 4
"""Cameras from which on outlines tell this. Of three, what they enclose beside the performer changes
from frame to frame: a man who moved slowly came out 0.55 to 0.96 apart without being lost."""
WORST = 0.4
"""Times the 95th percentile of distances, which tells of a lost arm where the mean doesn't: up to 1.3
on the walk, 1.4 to 5 where the dance had lost limbs."""
ROUND, LOOKS, TRIED = 16, 1000, 2
"""Where a skin is lost: ways to turn the performer round before trying again, points that these are
compared by, and how many of them are tried."""


@dataclass(frozen=True)
class Tracked:
    """Where one frame's skin goes, as far as it could be followed."""

    frame: int
    """Of the clip, whose skin is carried."""
    first: int
    """Frame of the clip that the nodes begin with."""
    nodes: Nodes
    """Over its F frames, canonical in `frame`."""
    apart: Tensor
    """[F] how far the carried skin and the frame's own are from each other in place, normal and
    colour (`_between`), in the units of `_features`; 0 in frames without a skin. Where
    tracking was right within a few centimetres it was 0.3 to 0.52, where it had lost the performer
    0.57 to 1.1 (a walk at 16, 8 and 5 frames a second, a spinning dance at 8)."""

    @property
    def end(self) -> int:
        """The frame of the clip after its last."""
        return self.first + self.nodes.frame_count


def track_in_turns(
    skins: list[Skin | None],  # of all frames, one at least not None
    masks: Tensor,  # [V, F, H, W] 0..1
    nodes: int,
    on_step: OnStep | None = None,  # counts frames
) -> list[Tracked]:
    """One skin for all frames; or, where it is lost, another's from there on. In the order of time;
    every frame belongs to one."""
    waiting, found = [(0, len(skins))], []
    cameras = int((masks > 0.5).flatten(1).any(1).sum())
    while waiting:
        first, end = waiting.pop()
        known = [skin is not None for skin in skins[first:end]]
        frame = first + most_seen(masks[:, first:end], known)
        done = sum(t.nodes.frame_count for t in found)
        tracked = track(skins, frame, nodes, cameras, first, end, on_step and _later(on_step, done))
        found.append(tracked)
        if first < tracked.first:
            waiting.append((first, tracked.first))
        if tracked.end < end:
            waiting.append((tracked.end, end))
    return sorted(found, key=lambda tracked: tracked.first)


def _later(on_step: OnStep, done: int) -> OnStep:
    return lambda step, total: on_step(done + step, total)


def track(
    skins: list[Skin | None],
    frame: int,  # whose skin is carried
    nodes: int,
    cameras: int,
    first: int = 0,  # frames to follow it through
    end: int | None = None,
    on_step: OnStep | None = None,  # counts frames
) -> Tracked:
    """The nodes over the frames around this one, until the skin is lost. Frames without a skin lie
    between their neighbours, or hold the last."""
    own, end = skins[frame], len(skins) if end is None else end
    assert own is not None
    still = nodes_at_rest(own.points, nodes, 1)
    own = thinned(own, POINTS)
    held = follow(own.points, still)
    ties, height = Ties(still), float(own.points[:, 1].amax() - own.points[:, 1].amin())
    limit = _limit(skins[frame], height, cameras)
    quats, goes = {frame: still.quats[0]}, {frame: still.goes[0]}
    apart = {frame: own.points.new_zeros(())}
    for way in (1, -1):
        for f in range(frame + way, end if way > 0 else first - 1, way):
            begun = _as_fast(quats, goes, f - way, f - 2 * way, abs(f - frame) > 1)
            skin, away = skins[f], own.points.new_zeros(())
            if skin is not None:
                other = thinned(skin, POINTS)
                *begun, away = _found(begun, still, held, ties, own, other, height, limit)
                if away > limit:
                    break
            quats[f], goes[f], apart[f] = *begun, away
            if on_step:
                on_step(len(quats), len(skins))
    there = sorted(quats)
    turns, ways, aways = (torch.stack([d[f] for f in there]) for d in (quats, goes, apart))
    known = [i for i, f in enumerate(there) if skins[f] is not None]
    followed = replace(still, quats=turns, goes=ways)
    return Tracked(frame, there[0], _bridged(followed, known), aways)


def _bridged(
    nodes: Nodes,
    known: list[int],  # frames, rising
) -> Nodes:
    """With the frames that are not known between those that are."""
    quats, goes = list(nodes.quats), list(nodes.goes)
    for f in set(range(nodes.frame_count)) - set(known):
        before = max((k for k in known if k < f), default=known[0])
        after = min((k for k in known if k > f), default=known[-1])
        pair = replace(nodes, quats=nodes.quats[[before, after]], goes=nodes.goes[[before, after]])
        quats[f], goes[f] = pair.at((f - before) / (after - before) if before < f < after else 0)
    return replace(nodes, quats=torch.stack(quats), goes=torch.stack(goes))


def _as_fast(
    quats: dict[int, Tensor], goes: dict[int, Tensor], before: int, earlier: int, known: bool
) -> tuple[Tensor, Tensor]:
    """Where nodes are after another step like the last."""
    if not known:
        return quats[before].clone(), goes[before].clone()
    back = quats[earlier] * quats[earlier].new_tensor([1, -1, -1, -1])
    turn = multiplied(unit(quats[before]), unit(back))
    return multiplied(turn, unit(quats[before])), 2 * goes[before] - goes[earlier]


def _found(
    first: tuple[Tensor, Tensor],  # [P, 4], [P, 3]
    still: Nodes,
    held: Followed,  # [n]
    ties: Ties,
    own: Skin,  # [n] canonical
    other: Skin,  # [m] of the frame
    height: float,  # metres
    limit: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`_fitted`; where that loses the performer, also begun with all nodes turned round together."""
    best = _fitted(first, still, held, ties, own, other, height)
    if best[2] <= limit:
        return best
    few = thinned(other, LOOKS)
    told = _features(few.points, few.normals, few.colors, height)
    some = torch.linspace(0, len(own.points) - 1, min(LOOKS, len(own.points))).round().long()
    some = some.to(own.points.device)
    skin = Skin(own.points[some], own.normals[some], own.colors[some])
    starts = []
    for i in range(1, ROUND):
        quats, goes = _round(first, still, other.points.mean(0), 2 * math.pi * i / ROUND)
        nodes = replace(still, quats=quats[None], goes=goes[None])
        points = carried(skin.points, held.select(some), nodes, 0)
        mine = _carried_features(points, quats, held.select(some), skin, height)
        starts.append((_between(mine, told), i, quats, goes))
    starts.sort(key=lambda start: (float(start[0]), start[1]))
    for _, _, quats, goes in starts[:TRIED]:
        again = _fitted((quats, goes), still, held, ties, own, other, height)
        best = min(best, again, key=lambda found: float(found[2]))
    return best


def _round(
    first: tuple[Tensor, Tensor],  # [P, 4], [P, 3]
    still: Nodes,
    centre: Tensor,  # [3] where to
    angle: float,  # radians about the vertical
) -> tuple[Tensor, Tensor]:
    """All nodes turned together about their middle, which is brought to a place."""
    quats, goes = first
    turn = rotvecs_to_quats(centre.new_tensor([0, angle, 0])).expand_as(quats)
    at = still.places + goes
    return multiplied(turn, unit(quats)), turned(turn, at - at.mean(0)) + centre - still.places


def _fitted(
    first: tuple[Tensor, Tensor],  # [P, 4], [P, 3]
    still: Nodes,
    held: Followed,  # [n]
    ties: Ties,
    own: Skin,  # [n] canonical
    other: Skin,  # [m] of the frame
    height: float,  # metres
) -> tuple[Tensor, Tensor, Tensor]:
    """Turns and places of the nodes in one frame, and how far the skins stay apart (`Tracked`)."""
    quats, goes = (t.clone().requires_grad_() for t in first)
    adam = torch.optim.Adam([{"params": [goes]}, {"params": [quats]}], betas=(0.8, 0.98))
    told = _features(other.points, other.normals, other.colors, height)
    for turn in range(TURNS):
        share = turn / (TURNS - 1)
        nodes = replace(still, quats=quats[None], goes=goes[None])
        points = carried(own.points, held, nodes, 0)
        if turn % AGAIN == 0:
            with torch.no_grad():
                mine = _carried_features(points, quats, held, own, height)
                there, here = nearest(mine, told, 1)[1][:, 0], nearest(told, mine, 1)[1][:, 0]
        apart = torch.cat([points - other.points[there], points[here] - other.points]) / ties.size
        square = apart.square().sum(1)
        # Geman and McClure's: far partners are most likely wrong ones.
        cost = (square / (1 + square / _falling(ROBUST, share) ** 2)).mean()
        stiff = _falling(STIFF, share)
        (cost + stiff * ties.rigidity(nodes, 0)).backward()
        rate = RATE * (1 - 0.9 * share)
        adam.param_groups[0]["lr"], adam.param_groups[1]["lr"] = rate * float(ties.size), rate / 4
        adam.step()
        adam.zero_grad(set_to_none=True)
    quats, goes = unit(quats.detach()), goes.detach()
    points = carried(own.points, held, replace(still, quats=quats[None], goes=goes[None]), 0)
    mine = _carried_features(points, quats, held, own, height)
    return quats, goes, _between(mine, told)


def _limit(skin: Skin, height: float, cameras: int) -> float:
    """Beyond which a carried skin was lost."""
    if cameras < SURE:
        return math.inf
    few = thinned(skin, 2 * POINTS)
    told = _features(few.points, few.normals, few.colors, height)
    return max(LOST, COARSE + float(_between(told[::2], told[1::2])))


def _between(mine: Tensor, told: Tensor) -> Tensor:  # [n, 9], [m, 9] -> []
    """Distance to the nearest, both ways: of all places, or of the worst, see `WORST`."""
    ways = [nearest(mine, told, 1)[0], nearest(told, mine, 1)[0]]
    mean, *worst = sum(way.mean() for way in ways) / 2, *(way.quantile(0.95) for way in ways)
    return torch.stack([mean, *(WORST * far for far in worst)]).amax()


def _falling(ends: tuple[float, float], share: float) -> float:
    return ends[0] * (ends[1] / ends[0]) ** share


def _carried_features(
    points: Tensor,  # [n, 3] where the nodes carry the one skin
    quats: Tensor,  # [P, 4]
    held: Followed,
    own: Skin,
    height: float,
) -> Tensor:  # [n, 9]
    normals = turned(blended(unit(quats)[held.nodes], held.weights), own.normals)
    return _features(points, normals, own.colors, height)


def _features(points: Tensor, normals: Tensor, colors: Tensor, height: float) -> Tensor:  # [n, 9]
    return torch.cat([points / (NEAR * height), normals, COLOR * colors], 1)
