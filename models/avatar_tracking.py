"""Where the parts of a performer without a mesh go from frame to frame: a first guess from outlines.

Stage: the skins of all frames (`avatar_start`) -> control nodes that carry one frame's skin to all
others (`avatar_free`). From the chosen frame outwards, each frame begins where its neighbour ended,
and goes on as fast; then every place of the one skin looks for the place of the other that is near,
faces the same way and has the same colour, both ways, while the nodes stay as rigid among each other
as they can (non-rigid ICP; Li, Sumner and Pauly 2008, with Sumner's graph). Fitting to the pictures
goes on from there: their gradients reach only a few pixels far, and a quick limb moves much farther.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .avatar_free import Followed, Nodes, Ties, carried, follow, nearest, nodes_at_rest
from .avatar_start import Skin, thinned
from .quats import blended, multiplied, turned, unit

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


@dataclass(frozen=True)
class Tracked:
    """Where one frame's skin goes."""

    nodes: Nodes
    """Over F frames."""
    apart: Tensor
    """[F] how far the carried skin and the frame's own are from each other in place, normal and
    colour, the mean of both ways in the units of `_features`; 0 in frames without a skin. Where
    tracking was right within a few centimetres it was 0.3 to 0.52, where it had lost the performer
    0.57 to 1.1 (a walk at 16, 8 and 5 frames a second, a spinning dance at 8)."""


def track(
    skins: list[Skin | None],
    frame: int,  # whose skin is carried
    nodes: int,
    on_step: OnStep | None = None,  # counts frames
) -> Tracked:
    """The nodes over all frames, canonical in this one. Frames without a skin lie between their
    neighbours, or hold the last."""
    own = skins[frame]
    assert own is not None
    still = nodes_at_rest(own.points, nodes, len(skins))
    own = thinned(own, POINTS)
    held = follow(own.points, still)
    ties, height = Ties(still), float(own.points[:, 1].amax() - own.points[:, 1].amin())
    quats, goes = list(still.quats), list(still.goes)
    apart, done = own.points.new_zeros(len(skins)), 1
    for way in (1, -1):
        ends = range(frame + way, len(skins) if way > 0 else -1, way)
        for f in ends:
            first = _as_fast(quats, goes, f - way, f - 2 * way, abs(f - frame) > 1)
            skin = skins[f]
            if skin is None:
                quats[f], goes[f] = first
            else:
                quats[f], goes[f], apart[f] = _fitted(
                    first, still, held, ties, own, thinned(skin, POINTS), height
                )
            done += 1
            if on_step:
                on_step(done, len(skins))
    found = replace(still, quats=torch.stack(quats), goes=torch.stack(goes))
    known = [f for f, skin in enumerate(skins) if skin is not None]
    return Tracked(_bridged(found, known), apart)


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
    quats: list[Tensor], goes: list[Tensor], before: int, earlier: int, known: bool
) -> tuple[Tensor, Tensor]:
    """Where nodes are after another step like the last."""
    if not known:
        return quats[before].clone(), goes[before].clone()
    back = quats[earlier] * quats[earlier].new_tensor([1, -1, -1, -1])
    turn = multiplied(unit(quats[before]), unit(back))
    return multiplied(turn, unit(quats[before])), 2 * goes[before] - goes[earlier]


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
    ways = nearest(mine, told, 1)[0].mean(), nearest(told, mine, 1)[0].mean()
    return quats, goes, sum(ways) / 2


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
