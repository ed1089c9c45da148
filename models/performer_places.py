"""Where the performer is: one place in space that the cameras agree about, and a close look at it.

Stage: before Performer Masks weighs its evidence. The net's first look tells in each view where people
are. What all cameras say is added up in space; the place that most of them agree about is followed
through the clip. Bystanders are seen by some cameras, and by each in another place. Then the net looks
closely, at crops around that place, turned upright: it was trained on cameras that stand straight, and
loses half of a performer whom a camera shows leaning by twenty degrees.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import Rig, meeting_point
from .filters import read_at
from .human_frames import smooth_over_time
from .human_net import CROP, OUTSIDE, HumanNet, box_to_crop

SEARCH = 0.65
"""Of the median camera's distance: how far around the cameras' common middle is searched."""
CELLS = 48
"""Along each side of the searched cube."""
LEAST, PART = 0.4, 0.6
"""Of all cameras that must agree about a place; of the place that most agree about."""
STRIDE_TIME = 0.6
"""Metres between two frames beyond which somebody else is the likelier one."""
VOXELS = 72
"""Along the longest side of the performer's box."""
REACH = 0.5
"""Metres around what was found that are searched for limbs."""
TURNS = (-0.25, 0.0, 0.25)
"""Radians by which crops are turned from upright; the answers' mean is steadier than any."""
ROOM = 0.2
"""Of a box's longer side, worked on around it."""
CHANCE = 0.004
"""Share of places at each end that are no limb."""
BEYOND = -1.5
"""Log odds where the net did not look: probably nobody, but limbs leave boxes."""
STEADY = 1.5
"""Frames over which boxes are averaged."""


@dataclass(frozen=True)
class Window:
    """The part of one camera's pictures that is worked on."""

    left: int
    top: int
    width: int
    height: int

    def of(self, pictures: Tensor) -> Tensor:  # [..., H, W] -> [..., h, w]
        return pictures[..., self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True)
class Space:
    """Voxels around the performer at one moment."""

    corner: Tensor
    """[3] world."""
    shape: tuple[int, int, int]
    edge: float
    """Metres."""

    def centres(self) -> Tensor:  # [X, Y, Z, 3]
        axes = [torch.arange(n, device=self.corner.device) + 0.5 for n in self.shape]
        return self.corner + self.edge * torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def space_around(low: Tensor, high: Tensor, voxels: int = VOXELS) -> Space:
    """A box of cubes; the longest side has so many."""
    edge = float((high - low).amax()) / voxels
    shape = tuple(max(2, math.ceil(s / edge)) for s in (high - low).tolist())
    return Space(low, shape, edge)


def seen_at(points: Tensor, rig: Rig, v: int) -> tuple[Tensor, Tensor]:  # [N, 2], [N] bool
    """Pixels at which a camera sees points, and whether it sees them."""
    T, K = rig.T_camera_world[v].to(points), rig.K[v].to(points)
    ahead = points @ T[:3, :3].mT + T[:3, 3]
    pixels = (ahead @ K.mT)[:, :2] / ahead[:, 2:].clamp(min=1e-6)
    inside = (ahead[:, 2] > 1e-3) & (pixels >= 0).all(1)
    return pixels, inside & (pixels[:, 0] <= rig.width) & (pixels[:, 1] <= rig.height)


@dataclass(frozen=True)
class Place:
    """Where the performer is, frame by frame."""

    low: Tensor
    """[F, 3] world: least corner of what the cameras agree about."""
    high: Tensor
    """[F, 3]"""
    known: Tensor
    """[F] bool; the other frames have the nearest known one's place."""
    shown: Tensor
    """[V] 0..1: how much each view's own answer shows the performer there."""


def find_place(
    shares: Callable[[int], list[Tensor]],  # frame -> V of [h, w] 0..1, where people are
    count: int,
    rig: Rig,
) -> Place | None:
    """The place that most cameras agree about, followed from its best frame; None = nowhere do two."""
    centers, axes = rig.centers.double().cpu(), rig.T_camera_world[:, 2, :3].double().cpu()
    middle = meeting_point(centers, axes)
    reach = SEARCH * float((centers - middle).norm(dim=1).median())
    space = space_around((middle - reach).float(), (middle + reach).float(), CELLS)
    points = space.centres()
    found: list[list[tuple[float, Tensor]]] = []
    for f in range(count):
        votes = _shares_in_space(points.view(-1, 3), shares(f), rig)
        found.append(_blobs(votes.view(len(rig), *space.shape)))
    scores = [max((b[0] for b in blobs), default=0.0) for blobs in found]
    best = max(range(count), key=scores.__getitem__)
    if scores[best] <= 0:
        return None
    chosen: dict[int, Tensor] = {best: max(found[best], key=lambda b: b[0])[1]}
    for way in (1, -1):
        last, skipped = points[chosen[best]].mean(0), 1
        f = best + way
        while 0 <= f < count:
            near = [
                (score * math.exp(-float((points[m].mean(0) - last).norm()) / STRIDE_TIME), m)
                for score, m in found[f]
                if float((points[m].mean(0) - last).norm()) < STRIDE_TIME * skipped
            ]
            if near:
                chosen[f] = max(near, key=lambda b: b[0])[1]
                last, skipped = points[chosen[f]].mean(0), 1
            else:
                skipped += 1
            f += way
    half = space.edge / 2
    low, high, known = torch.zeros(count, 3), torch.zeros(count, 3), torch.zeros(count).bool()
    for f, mask in chosen.items():
        low[f], high[f] = points[mask].amin(0) - half, points[mask].amax(0) + half
        known[f] = True
    shown = _shares_in_space(points[chosen[best]], shares(best), rig).mean(1)
    return Place(
        smooth_over_time(low, known, STEADY), smooth_over_time(high, known, STEADY), known, shown
    )


def _shares_in_space(points: Tensor, shares: list[Tensor], rig: Rig) -> Tensor:  # [V, N]
    votes = []
    for v, share in enumerate(shares):
        pixels, inside = seen_at(points, rig, v)
        h, w = share.shape
        scale = pixels.new_tensor([w / rig.width, h / rig.height])
        votes.append(read_at(share[None].to(points), pixels * scale)[:, 0] * inside)
    return torch.stack(votes)


def _blobs(votes: Tensor) -> list[tuple[float, Tensor]]:  # [V, X, Y, Z] -> score, [X, Y, Z] bool
    """Connected places that enough cameras agree about."""
    agreed = votes.mean(0)
    needed = max(LEAST, PART * float(agreed.amax()))
    inside = (agreed > needed) & ((votes > 0.3).sum(0) >= 2)
    number = torch.arange(1, inside.numel() + 1, dtype=torch.float32).view(inside.shape)
    label = number * inside
    for _ in range(sum(inside.shape)):
        spread = F.max_pool3d(label[None, None], 3, 1, 1)[0, 0] * inside
        if torch.equal(spread, label):
            break
        label = spread
    blobs = []
    for name in label[inside].unique():
        mask = label == name
        blobs.append((float(agreed[mask].sum()), mask))
    return blobs


# ---------------------------------------------------------------- windows and crops


def window_around(
    boxes: Tensor,  # [F, 4] pixels
    rig: Rig,
) -> Window:
    """The part of a view that holds all boxes and some room around each."""
    room = ROOM * (boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True)
    left, top = (boxes[:, :2] - room).amin(0).tolist()
    right, bottom = (boxes[:, 2:] + room).amax(0).tolist()
    x0, x1 = (int(min(max(n, 0), rig.width)) for n in (left, right))
    y0, y1 = (int(min(max(n, 0), rig.height)) for n in (top, bottom))
    x0, y0 = min(x0, rig.width - 2), min(y0, rig.height - 2)
    return Window(x0, y0, max(x1 - x0, 2), max(y1 - y0, 2))


def spread_of(points: Tensor) -> tuple[Tensor, Tensor]:  # [N, D] -> [D], [D]
    """From where to where points lie, but for a few far out, which are chance."""
    ordered = points.sort(0).values
    few = int(CHANCE * len(points))
    return ordered[few], ordered[-1 - few]


def boxes_of(
    odds: Tensor,  # [F, h, w] within the window
    window: Window,
    before: Tensor,  # [F, 4] where nothing is found
    known: Tensor,  # [F] bool
) -> Tensor:  # [F, 4] pixels of the frame
    """Boxes around what is likely the performer, steady over time."""
    boxes = before.clone()
    corner = torch.tensor([window.left, window.top])
    for f, frame in enumerate(odds):
        places = (frame > 0).nonzero().cpu().flip(1)
        if len(places) > 1 / CHANCE and known[f]:
            low, high = spread_of(places)
            boxes[f] = torch.cat([low + corner, high + corner + 1]).to(boxes)
    smooth = smooth_over_time(boxes, known, STEADY)
    # A hand that is thrown out within a frame must not be cut off.
    low, high = torch.minimum(smooth, boxes), torch.maximum(smooth, boxes)
    return torch.cat([low[:, :2], high[:, 2:]], 1)


def boxes_in_view(place: Place, rig: Rig, v: int, reach: float) -> Tensor:  # [F, 4] pixels
    """What a view shows of the place's box and so many metres around."""
    ends = torch.stack([place.low - reach, place.high + reach], 1)  # [F, 2, 3]
    pick = torch.cartesian_prod(*[torch.arange(2)] * 3)
    corners = ends[:, pick, torch.arange(3)]  # [F, 8, 3]
    T, K = rig.T_camera_world[v].cpu(), rig.K[v].cpu()
    ahead = corners @ T[:3, :3].mT + T[:3, 3]
    pixels = (ahead @ K.mT)[..., :2] / ahead[..., 2:].clamp(min=0.05)
    return torch.cat([pixels.amin(1), pixels.amax(1)], 1)


def upright(rig: Rig, v: int, box: Tensor) -> float:
    """Radians by which the world's down leans to the left in the picture, at a box's middle."""
    T, K = rig.T_camera_world[v].double().cpu(), rig.K[v].double().cpu()
    middle = torch.cat([(box[:2] + box[2:]).double().cpu() / 2, torch.ones(1).double()])
    there = torch.linalg.solve(K, middle)
    below = K @ (there + 0.05 * T[:3, 1])
    way = below[:2] / below[2].clamp(min=1e-3) - middle[:2]
    # Seen from straight above or below there is no upright.
    return math.atan2(-float(way[0]), float(way[1])) if float(T[:3, 1][:2].norm()) > 0.3 else 0.0


def _turned(crop: Tensor, turn: float, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Where the crop's own places (-1..1) lie in the frame, pixels."""
    middle, half = (crop[:2] + crop[2:]) / 2, (crop[2:] - crop[:2]) / 2
    x, y = x * half[0], y * half[1]
    c, s = math.cos(turn), math.sin(turn)
    return middle[0] + c * x - s * y, middle[1] + s * x + c * y


def net_answer(
    net: HumanNet,
    picture: Tensor,  # [3, H, W] 0..1
    box: Tensor,  # [4] around the performer
    window: Window,
    lean: float,  # of `upright`
    turns: tuple[float, ...] = TURNS,
) -> Tensor:  # [h, w] log odds within the window; BEYOND outside of the crops
    """The net on upright crops, each also mirrored, put back into the picture."""
    H, W = picture.shape[-2:]
    crop = box_to_crop(box)
    width, height = CROP
    x = (torch.arange(width, device=picture.device) + 0.5) / width * 2 - 1
    y = (torch.arange(height, device=picture.device) + 0.5) / height * 2 - 1
    x, y = torch.meshgrid(x, y, indexing="xy")
    shrink = max(1, round(float(crop[2] - crop[0]) / width - 0.1))
    source = F.avg_pool2d(picture[None], shrink, ceil_mode=True) if shrink > 1 else picture[None]
    size = picture.new_tensor([source.shape[-1] * shrink, source.shape[-2] * shrink])
    pictures = []
    for turn in turns:
        grid = 2 * torch.stack(_turned(crop, lean + turn, x, y), -1)[None] / size - 1
        cut = F.grid_sample(source - OUTSIDE, grid, align_corners=False) + OUTSIDE
        pictures += [cut, cut.flip(-1)]
    answers = net(torch.cat(pictures)).mask.float()
    answers = (answers[::2] + answers[1::2].flip(-1)) / 2
    x = window.left + torch.arange(window.width, device=picture.device) + 0.5
    y = window.top + torch.arange(window.height, device=picture.device) + 0.5
    x, y = torch.meshgrid(x, y, indexing="xy")
    middle, half = (crop[:2] + crop[2:]) / 2, (crop[2:] - crop[:2]) / 2
    x, y = x - middle[0], y - middle[1]
    total = []
    for turn, answer in zip(turns, answers, strict=True):
        c, s = math.cos(lean + turn), math.sin(lean + turn)
        grid = torch.stack([(c * x + s * y) / half[0], (c * y - s * x) / half[1]], -1)
        value = F.grid_sample(answer[None, None], grid[None], align_corners=False)[0, 0]
        total.append(torch.where((grid.abs() < 1).all(-1), value, BEYOND))
    return torch.stack(total).mean(0)
