"""Masks of one performer in all views at once: what one camera misses, the others and the clip know.

Stage: VIEWS of calibrated cameras -> masks. A small net looks at single pictures and loses a leg here
and takes a lamp along there, but rarely the same in every camera. Four sources are weighed against
each other as logarithms of odds (positive = performer):

1. the net, in each view by itself;
2. the other views: every place in space adds up what all cameras say of it; the best place along a
   pixel's ray is what they say of the pixel. Votes are added and not intersected as in a visual
   hull (silhouettes.py), so a camera that misses a leg is outvoted;
3. the colours of performer and room in each view, learnt from the clip itself (mixtures as in GrabCut,
   here histograms), and
4. the room behind: cameras stand still, so a pixel that is surely not the performer at some moment
   tells what it looks like empty; a picture of the empty stage tells all of it.

Two rounds, the second with what the first found in place of the net's answers to the other views;
then neighbouring pixels of like colours settle on one answer (mean field with the bilateral kernel of
Kraehenbuehl and Koltun 2011, restricted to a window as in ConvCRF, Teichmann and Cipolla 2018).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import Rig
from .clip_masks import with_seed
from .filters import read_at
from .human_frames import smooth_over_time, where_people_are
from .human_net import HumanNet, inside_box
from .performer_places import (
    REACH,
    STEADY,
    TURNS,
    Place,
    Space,
    Window,
    boxes_in_view,
    boxes_of,
    find_place,
    net_answer,
    seen_at,
    space_around,
    spread_of,
    upright,
    window_around,
)

OnStep = Callable[[int, int, Tensor | None], None]

SURE = 3.0
"""Log odds that one source may give at most: none decides alone."""
VOTE = 2.0
"""The same of one camera's word about a place in space."""
OTHERS, DOUBT = 1.5, 2.0
"""Weight of the other cameras' mean vote, and what is taken off: the best place along a ray is often
good by chance, and what only two of three others say should not decide."""
CLOSE = 0.1
"""Metres around the performer that the net's close look takes in, before the crop's own margin."""
NOT_AGAINST = -1.0
"""Log odds that the net must give to some place of every part of a mask, with an empty stage."""
EMPTY = 0.15
"""Share (0..1) up to which a pixel surely isn't the performer."""
ROUNDS = 2
"""Of asking the others and the colours in turn."""
BINS = 24
"""Of a colour histogram, along each side."""
SAME = 0.03
"""Standard deviation (0..1) of a pixel that shows the same thing again."""
KNOWN = 0.75
"""Frames' worth of surely empty pixels from which on the room behind a pixel is known."""


def votes_in_space(
    space: Space,
    answers: list[Tensor],  # V of [h, w] log odds within the windows
    windows: list[Window],
    rig: Rig,
) -> tuple[Tensor, Tensor]:  # [V, X, Y, Z] at most VOTE either way, [V, X, Y, Z] who sees it
    """What every camera says of every place: outside of its window no, beyond its picture nothing."""
    points = space.centres().view(-1, 3)
    votes, seen = [], []
    for v, (answer, window) in enumerate(zip(answers, windows, strict=True)):
        pixels, inside = seen_at(points, rig, v)
        local = pixels - pixels.new_tensor([window.left, window.top])
        size = local.new_tensor([window.width, window.height])
        within = (local >= 0).all(1) & (local <= size).all(1)
        value = read_at(answer[None].clamp(-VOTE, VOTE), local)[:, 0]
        value = torch.where(within, value, -VOTE)
        votes.append(torch.where(inside, value, 0.0).view(space.shape))
        seen.append(inside.view(space.shape))
    return torch.stack(votes), torch.stack(seen).float()


def word_of_others(
    space: Space,
    votes: Tensor,  # [V, X, Y, Z]
    seen: Tensor,  # [V, X, Y, Z]
    window: Window,
    rig: Rig,
    v: int,
) -> Tensor:  # [h, w] log odds
    """The best mean vote of the other cameras along the ray of every pixel."""
    # What less than half of all cameras can see has fewer witnesses.
    others = seen.sum(0) - seen[v]
    field = (votes.sum(0) - votes[v]) / others.clamp(min=len(rig) / 2)
    field = torch.where(others > 0, field, -VOTE)
    T, K = rig.T_camera_world[v].to(field), rig.K[v].to(field)
    middle = space.corner + space.edge * space.corner.new_tensor(space.shape) / 2
    far = float((T[:3, :3] @ middle + T[:3, 3])[2].clamp(min=0.1))
    step = max(1, round(space.edge * float(K[0, 0]) / far))  # pixels between rays
    h, w = math.ceil(window.height / step), math.ceil(window.width / step)
    x = window.left + (torch.arange(w, device=field.device) + 0.5) * step
    y = window.top + (torch.arange(h, device=field.device) + 0.5) * step
    pixels = torch.stack([*torch.meshgrid(x, y, indexing="xy"), x.new_ones(h, w)], -1)
    ways = pixels.view(-1, 3) @ (T[:3, :3].mT @ torch.linalg.inv(K)).mT
    eye = rig.centers[v].to(field)
    size = space.edge * space.corner.new_tensor(space.shape)
    ends = torch.stack([space.corner - eye, space.corner + size - eye])[:, None] / ways
    near, end = ends.amin(0).amax(1).clamp(min=1e-2), ends.amax(0).amin(1)
    hit = (near < end).nonzero()[:, 0]
    best = field.new_full((h * w,), -VOTE)
    if len(hit):
        count = math.ceil(
            float((end - near)[hit].amax() * ways[hit].norm(dim=1).amax()) / space.edge
        )
        share = (torch.arange(count, device=field.device) + 0.5) / count
        t = near[hit, None] + (end - near)[hit, None] * share
        points = eye + t[..., None] * ways[hit, None]
        grid = (2 * (points - space.corner) / size - 1).flip(-1)
        values = F.grid_sample(
            field[None, None], grid[None, None], padding_mode="border", align_corners=False
        )[0, 0, 0]
        best[hit] = values.amax(1)
    best = best.view(1, 1, h, w)
    full = F.interpolate(best, scale_factor=step, mode="bilinear", align_corners=False)[0, 0]
    return full[: window.height, : window.width]


# ---------------------------------------------------------------- colours


class _Histogram:
    """How often a colour is, over how often if all were alike."""

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(BINS**3, dtype=torch.float64, device=device)

    def add(self, colours: Tensor, weights: Tensor) -> None:  # [3, h, w], [h, w]
        place = (colours.clamp(0, 1) * (BINS - 1)).round().long()
        index = (place[0] * BINS + place[1]) * BINS + place[2]
        self.counts.index_add_(0, index.flatten(), weights.flatten().double())

    def density(self) -> Tensor:  # [BINS, BINS, BINS]
        counts = self.counts.view(1, 1, BINS, BINS, BINS).float()
        kernel = counts.new_tensor([0.25, 0.5, 0.25])
        for axis in range(3):
            shape, pad = [1] * 5, [0] * 3
            shape[2 + axis], pad[axis] = 3, 1
            counts = F.conv3d(counts, kernel.view(shape), padding=pad)
        return counts[0, 0] / counts.sum().clamp(min=1e-6) * BINS**3


def _look_up(density: Tensor, colours: Tensor) -> Tensor:  # [3, h, w] -> [h, w]
    grid = (2 * colours.clamp(0, 1) - 1).movedim(0, -1).flip(-1)[None, None]
    return F.grid_sample(density[None, None], grid, align_corners=True)[0, 0, 0]


@dataclass(frozen=True)
class Room:
    """What one camera sees without the performer."""

    colours: Tensor
    """[n, 3, h, w]"""
    known: Tensor
    """[n, h, w] 0..1"""


def room_behind(
    pictures: Callable[[int], Tensor],  # frame -> [3, h, w]
    odds: Tensor,  # [F, h, w]
    tick: Callable[[], None],
) -> tuple[Tensor, Tensor]:  # [3, h, w], [h, w] 0..1
    """What each pixel shows while it surely isn't the performer, and whether that is known."""
    total = torch.zeros_like(odds[0])
    mean = total.new_zeros(3, *total.shape)
    for f, frame in enumerate(odds):
        # Masks that end a little early must teach no skin.
        around = F.max_pool2d(frame.sigmoid()[None, None], 7, 1, 3)[0, 0]
        weight = (around < EMPTY).float()
        mean += pictures(f) * weight
        total += weight
        tick()
    return mean / total.clamp(min=1), (total / KNOWN).clamp(max=1)


def colour_evidence(
    pictures: Callable[[int], Tensor],  # frame -> [3, h, w], one view
    odds: Tensor,  # [F, h, w] log odds without colours
    before: Tensor | None = None,  # [F, h, w] log odds of the last round, with colours
    plate: Tensor | None = None,  # [3, h, w] the empty stage
    tick: Callable[[], None] = lambda: None,  # once a frame, three times
) -> Tensor:  # [F, h, w] log odds of the colours alone
    """How much likelier a pixel's colour is on the performer than in the room behind it."""
    ours, elsewhere = _Histogram(odds.device), _Histogram(odds.device)
    for f, frame in enumerate(odds):
        share, picture = frame.sigmoid(), pictures(f)
        ours.add(picture, share * (share > 0.8))
        elsewhere.add(picture, (1 - share) * (share < 0.3))
        tick()
    densities = ours.density(), elsewhere.density()
    rooms = [] if plate is None else [(plate, torch.ones_like(odds[0]))]
    # Before colours had a say, an arm that all missed would teach that it is the room: wait, if the
    # room is known without.
    if before is not None or plate is None:
        rooms.append(room_behind(pictures, odds if before is None else before, tick))
    room = Room(*(torch.stack(part) for part in zip(*rooms, strict=True)))
    found = torch.empty_like(odds)
    for f in range(len(odds)):
        found[f] = _ratio(pictures(f), *densities, room)
        tick()
    return found


def _ratio(picture: Tensor, ours: Tensor, elsewhere: Tensor, room: Room) -> Tensor:  # [h, w]
    apart = (picture - room.colours).square().sum(1)
    # Density of a normal distribution of three colours, over that of all colours alike.
    same = torch.exp(-apart / (2 * SAME**2)) / (SAME * math.sqrt(2 * math.pi)) ** 3
    trust = 0.9 * room.known.amax(0)
    empty = trust * (same * room.known).amax(0) + (1 - trust) * _look_up(elsewhere, picture)
    ratio = (0.9 * _look_up(ours, picture) + 0.1).log() - (empty + 0.05).log()
    smooth = F.avg_pool2d(ratio[None, None], 3, 1, 1, count_include_pad=False)[0, 0]
    return smooth.clamp(-2 * SURE, 2 * SURE)


# ---------------------------------------------------------------- settling

NEAR, APART = 4, 2
"""Neighbours to each side that a pixel hears, and pixels between them."""
ALIKE = 0.06
"""Difference of colours (0..1) up to which neighbours count as one thing."""
UNSETTLED = 5.0
"""Log odds beyond which a pixel hears nobody."""


def settled(
    picture: Tensor,  # [3, h, w]
    odds: Tensor,  # [h, w]
    rounds: int = 5,
    weight: float = 4.0,
) -> Tensor:  # [h, w] log odds
    """Mean field: neighbours of like colours agree."""
    h, w = odds.shape
    y, x = (odds.abs() < UNSETTLED).nonzero().unbind(1)
    if not len(y):
        return odds
    step = torch.arange(-NEAR, NEAR + 1, device=odds.device) * APART
    dy, dx = (d.flatten() for d in torch.meshgrid(step, step, indexing="ij"))
    others = (dy != 0) | (dx != 0)
    dy, dx = dy[others], dx[others]
    at = (y[:, None] + dy).clamp(0, h - 1) * w + (x[:, None] + dx).clamp(0, w - 1)  # [N, K]
    colours = picture.flatten(1)
    own = y * w + x
    apart = sum((c[at] - c[own, None]).square() for c in colours)
    reach = NEAR * APART / 1.5
    kernel = torch.exp(-apart / (2 * ALIKE**2) - (dy**2 + dx**2) / (2 * reach**2))
    kernel /= kernel.sum(1, keepdim=True).clamp(min=1.0)
    start, current = odds.flatten()[own], odds.flatten().clone()
    for _ in range(rounds):
        theirs = (2 * current.sigmoid() - 1)[at]
        current[own] = start + weight * (kernel * theirs).sum(1)
    return current.view(h, w)


# ---------------------------------------------------------------- all of it


@dataclass(frozen=True)
class PerformerMasks:
    """Of V views of F frames."""

    masks: Tensor
    """[V, F, H, W] 0..1."""
    place: Place
    """Where the performer is; frames in which nobody was found have empty masks."""
    agreement: Tensor
    """[V] 0..1: share of each view's mask that fits what the other views say."""


class _Steps:
    """Counts what is done, and tells it."""

    def __init__(self, on_step: OnStep | None, total: int) -> None:
        self.on_step, self.total, self.done = on_step, total, 0

    def __call__(self, preview: Tensor | None = None, count: int = 1) -> None:
        self.done += count
        if self.on_step:
            self.on_step(min(self.done, self.total), self.total, preview)


def performer_masks(
    frames: Tensor,  # [V, F, 3, H, W] 0..1, or bytes
    rig: Rig,
    net: HumanNet | None,
    given: Tensor | None = None,  # [V, F, H, W] 0..1: masks in place of the net's answers
    plates: Tensor | None = None,  # [V, 3, H, W] 0..1: the empty stage
    device: torch.device | None = None,
    on_step: OnStep | None = None,
) -> PerformerMasks | None:  # None = the cameras agree about nobody anywhere
    """Masks of the one performer whom most views agree about."""
    if (net is None) == (given is None):
        raise ValueError("performer_masks takes either a net or masks.")
    V, count = frames.shape[:2]
    device = device or frames.device
    tick = _Steps(on_step, V * count * (5 + 5 * ROUNDS))

    def picture(v: int, f: int) -> Tensor:  # [3, H, W]
        whole = frames[v, f].to(device)
        return whole.float() / 255 if whole.dtype == torch.uint8 else whole.float()

    def shares(f: int) -> list[Tensor]:
        tick(None, V)
        if given is not None:
            return [m.float().cpu() for m in given[:, f]]
        return [where_people_are(net, picture(v, f)[None])[0][0].cpu() for v in range(V)]

    place = find_place(shares, count, rig)
    if place is None:
        return None

    def look(boxes: list[Tensor], windows: list[Window], turns: tuple[float, ...]) -> list[Tensor]:
        answers = []
        for v, window in enumerate(windows):
            odds = []
            for f in range(count):
                if given is not None:
                    share = window.of(given[v, f]).to(device).float()
                    odds.append((2 * share - 1) * VOTE)
                else:
                    whole, box = picture(v, f), boxes[v][f].to(device)
                    odds.append(net_answer(net, whole, box, window, upright(rig, v, box), turns))
                tick(_dimmed(window.of(picture(v, f)), odds[-1]))
            answers.append(torch.stack(odds).clamp(-SURE, SURE))
        return answers

    boxes = [boxes_in_view(place, rig, v, CLOSE) for v in range(V)]
    windows = [window_around(b, rig) for b in boxes]
    first = look(boxes, windows, (0.0,))
    first = _asked_around(first, first, windows, place, rig, tick)
    boxes = [
        boxes_of(odds, window, box, place.known)
        for odds, window, box in zip(first, windows, boxes, strict=True)
    ]
    place = _tightened(place, first, windows, rig, tick)
    windows = [window_around(b, rig) for b in boxes]
    net_odds = look(boxes, windows, TURNS)
    odds, before = net_odds, [None] * V
    for _ in range(ROUNDS):
        fused = _asked_around(net_odds, odds, windows, place, rig, tick)
        odds = []
        for v, window in enumerate(windows):
            plate = None if plates is None else window.of(plates[v]).to(device).float()
            show = lambda f, v=v, window=window: window.of(picture(v, f))  # noqa: E731
            odds.append(fused[v] + colour_evidence(show, fused[v], before[v], plate, tick))
        before = odds
    others = [a - b for a, b in zip(fused, net_odds, strict=True)]
    # Whoever came since the stage was empty stands out as the performer does.
    needed = -SURE if plates is None else NOT_AGAINST
    net_says = [o >= needed for o in net_odds]
    return _drawn(frames, odds, net_says, others, windows, place, rig, picture, tick)


def _dimmed(picture: Tensor, odds: Tensor) -> Tensor:
    return picture * (0.35 + 0.65 * odds.sigmoid())


def _spaces(place: Place, device: torch.device) -> list[Space]:
    return [
        space_around((a - REACH).to(device), (b + REACH).to(device))
        for a, b in zip(place.low, place.high, strict=True)
    ]


def _asked_around(
    net_odds: list[Tensor],  # V of [F, h, w]
    odds: list[Tensor],  # V of [F, h, w] what each view tells the others
    windows: list[Window],
    place: Place,
    rig: Rig,
    tick: _Steps,
) -> list[Tensor]:  # V of [F, h, w]
    """The net's word and that of the other views."""
    fused = [torch.empty_like(o) for o in net_odds]
    for f, space in enumerate(_spaces(place, net_odds[0].device)):
        votes, seen = votes_in_space(space, [o[f] for o in odds], windows, rig)
        for v, window in enumerate(windows):
            others = word_of_others(space, votes, seen, window, rig, v)
            fused[v][f] = net_odds[v][f] + OTHERS * others - DOUBT
            tick()
    return fused


def _tightened(
    place: Place, odds: list[Tensor], windows: list[Window], rig: Rig, tick: _Steps
) -> Place:
    """The place that all views together leave to the performer, limbs and all."""
    low, high = place.low.clone(), place.high.clone()
    for f, space in enumerate(_spaces(place, odds[0].device)):
        votes, seen = votes_in_space(space, [o[f] for o in odds], windows, rig)
        inside = (votes.sum(0) / seen.sum(0).clamp(min=1) > VOTE / 8) & (seen.sum(0) > len(rig) / 2)
        points = space.centres()[inside].cpu()
        if len(points) and place.known[f]:
            low[f], high[f] = spread_of(points)
        tick(None, 0)
    smooth = [smooth_over_time(c, place.known, STEADY) for c in (low, high)]
    return replace(place, low=smooth[0], high=smooth[1])


def _drawn(
    frames: Tensor,
    odds: list[Tensor],
    net_says: list[Tensor],
    others: list[Tensor],
    windows: list[Window],
    place: Place,
    rig: Rig,
    picture: Callable[[int, int], Tensor],
    tick: _Steps,
) -> PerformerMasks:
    """Settled odds as masks; parts are left out that hold no place of which
    the other views are sure and of which the net says enough: bystanders."""
    V, count, _, H, W = frames.shape
    masks = torch.zeros(V, count, H, W)
    fits, area = torch.zeros(V), torch.zeros(V)
    for v, window in enumerate(windows):
        boxes = boxes_in_view(place, rig, v, CLOSE)
        for f in range(count):
            shown = window.of(picture(v, f))
            if place.known[f]:
                final = settled(shown, odds[v][f]).cpu()
                here = window.of(inside_box(boxes[f], W, H))
                word = others[v][f].cpu()
                sure = (final > 0) & (word > 0) & net_says[v][f].cpu() & here
                held = torch.from_numpy(with_seed((final > 0).numpy(), sure.numpy()))
                window.of(masks[v, f]).copy_(_soft_rim(final, held))
                fits[v] += float((held & (word > -DOUBT)).sum())
                area[v] += float(held.sum())
            tick(shown * (0.35 + 0.65 * window.of(masks[v, f]).to(shown)))
    return PerformerMasks(masks, place, fits / area.clamp(min=1))


def _soft_rim(odds: Tensor, held: Tensor) -> Tensor:  # [h, w] 0..1
    """White within and black around; only pixels at the outline are between."""
    mask = held.float()
    grown, shrunk = (F.max_pool2d(m[None, None], 3, 1, 1)[0, 0] for m in (mask, 1 - mask))
    return torch.where((grown > 0) & (shrunk > 0), odds.sigmoid() * grown, mask)
