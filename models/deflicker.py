"""Deflicker: takes flicker out of any clip, without diffusion and without fitting a network.

Stage: any clip -> the same clip, steady. Every frame is taken as
    frame(p) = gain · true(p + bend) + offset + noise,
where gain and offset (deflicker_colour.py) and bend (deflicker_places.py) are smooth over the
picture, and all four are new in every frame. What is smooth in time is the clip's own and stays.
Everything is measured on small pictures, shot by shot, and applied at full size frame by frame, so
memory grows with the clip only by its small pictures. Where no other frame confirms what one shows,
the frame stays as it is, but for its colours.

Frames: pixels of the working pictures, x right, y down, centres at +0.5; colours 0..1 as displayed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import deflicker_places as places
from .deflicker_colour import Pair, Tints, grid_of, readable, tints
from .deflicker_texture import (
    averaged,
    crisp,
    enlarged,
    misplaced,
    noise_of,
    read,
    read_sharply,
    smoothed,
)
from .filters import gaussian, grown, read_at
from .flow import SMALLEST, evened
from .implicit_still import find_still
from .relief import opencv
from .shots import shots

Step = Callable[..., None]
WORK = 1 << 17
"""Pixels of the pictures on which everything is measured."""
FIRST = 2
"""Frames to either side that are averaged before the flow that texture follows: noise misleads it."""
QUIET, LOUD = 0.01, 0.02
"""Noise (of 1) below which flow is not misled; and at which half of the wobble that it tells of what
moves, beside what stands still, may be its own error."""
DISTANCES = (1, 2, 4)
"""Frames from one to the other of a pair whose colours are compared."""
LEAST = 0.05
"""Pixels: wobble is never taken for less, so that shares of it stay finite."""
ROUNDS = 2
"""Times that places are measured where nothing stands still: flow evens out a part of what it
measures."""
BENT = 0.8
"""Share of what stands still that is bent less than is asked for: others are in plain sight."""
SOME = 1 << 20
"""Places that are enough to tell a quantile."""
BLUR = 0.25
"""Share of the Laplacian, for a square pixel of what may be left, that makes up for averaging it: half
of its variance (Taylor), which is half of the most that is allowed for."""
LEFT = 0.6
"""Share of the wobble that what stands still may be left with when it has been straightened: frames
that differ by no more are averaged."""
PLATE = 1 << 15
"""Pixels of the pictures on which is told what stands still."""
MISLED = 8.0
"""Pixels by which a noise of 1 makes flow seem to wobble."""
STANDS = 0.2
"""Share of the picture that must stand still to tell how far it wobbles."""
SEAM, FADE = 1, 2.0
"""Pixels of those by which what stands still is widened, and (sigma) over which its bend then ends at
what moves."""
ENOUGH = 1400
"""Points of a frame that are compared in colour."""


@dataclass(frozen=True)
class DeflickerSettings:
    """How much of each kind of flicker is taken out, 0..1, and how far frames look around."""

    colour: float = 1.0
    places: float = 1.0
    texture: float = 1.0
    reach: int = 6
    """Frames to either side whose texture is averaged."""


@dataclass(frozen=True)
class Deflickered:
    """A steady clip and what was wrong with it."""

    frames: Tensor
    """[F, 3, H, W] 0..1"""
    gains: Tensor
    """[F, 3] what every frame's colours were multiplied with, on average over the picture."""
    colour: float
    """Root mean square by which colours were off, of 1; of the worst shot, as the two below."""
    wobble: float
    """The same for places, pixels of the given frames; 0 where flow could not tell."""
    noise: float
    """The same for texture, of 1; what remains of it after smoothing by a pixel or two."""
    shots: list[range]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Remedy:
    """What was found out about a shot of n frames."""

    tints: Tints
    shifts: Tensor | None
    """[n, 2, h, w] working pixels: where to read; None = nothing is bent."""
    looks: Tensor
    """[n, 3, h, w] smoothed working pictures, all corrected."""
    flows: tuple[Tensor, Tensor]
    """Of the corrected pictures, there and back [n - 1, 2, h, w]."""
    noise: float
    wobble: float
    stands: Tensor
    """[n, h, w] 0..1, what stood still and was straightened."""


@dataclass(frozen=True)
class _Straight:
    """How the places of a shot were put right."""

    shifts: Tensor | None
    """[n, 2, h, w] working pixels: where to read; None = nothing is bent."""
    wobble: float
    flows: tuple[Tensor, Tensor]
    """Of the straight pictures; none where they stand."""
    stands: Tensor
    """[n, h, w] 0..1; 0 everywhere if it was not straightened."""


def deflicker(
    frames: Tensor,  # [F, 3, H, W] 0..1
    settings: DeflickerSettings | None = None,
    on_step: Step | None = None,  # (done, total, preview), preview: before | after
    device: torch.device | None = None,  # where to work; None = where the frames are
) -> Deflickered:
    """The clip without flicker, every shot by itself; a single frame stays as it is.

    Raises ValueError for tiny pictures, or without OpenCV. NaN counts as grey."""
    settings = settings or DeflickerSettings()
    _check(frames)
    step = on_step or (lambda *_: None)
    small = _working(frames).to(device or frames.device)
    parts = shots(small, lambda: step(0, 1))
    total = sum(_work_of(len(part)) for part in parts)
    result = torch.empty(frames.shape, dtype=torch.float32, device=frames.device)
    gains = torch.ones(len(frames), 3, device=frames.device)
    done, found, alone = 0, [], 0
    for part in parts:
        chosen = slice(part.start, part.stop)
        if len(part) < 2:
            result[chosen] = frames[chosen].nan_to_num(0.5).clamp(0, 1)
            alone += 1
            continue
        tick = _Ticker(step, done, total)
        remedy = _remedy(small[chosen], settings, tick)
        gains[chosen] = remedy.tints.mean_gain().to(gains)
        for f, frame in enumerate(_steady(frames[chosen], remedy, settings, tick)):
            result[part.start + f] = frame
        found.append(remedy)
        done += _work_of(len(part))
    step(total, total)
    worst = {
        "colour": max((r.tints.size for r in found), default=0.0),
        "wobble": max((r.wobble for r in found), default=0.0) * frames.shape[-1] / small.shape[-1],
        "noise": max((r.noise for r in found), default=0.0) ** 0.5,
    }
    return Deflickered(result, gains, **worst, shots=parts, notes=_notes(parts, alone))


def _check(frames: Tensor) -> None:
    H, W = frames.shape[-2:]
    if min(H, W) < SMALLEST:
        raise ValueError(
            f"The frames are {W}x{H}, but motion is followed in pictures of at least {SMALLEST} "
            "pixels a side: enlarge them first."
        )


def _working(frames: Tensor) -> Tensor:
    """Small pictures, a few at a time, since clips may be huge."""
    H, W = frames.shape[-2:]
    scale = min(1.0, (WORK / (H * W)) ** 0.5)
    size = tuple(max(SMALLEST, round(n * scale)) for n in (H, W))
    parts = (p.float().nan_to_num(0.5).clamp(0, 1) for p in frames.split(8))
    return torch.cat([F.interpolate(p, size=size, mode="area") for p in parts])


MEASURES, AVERAGES = 7, 6
"""How long a frame's measuring and its averaging take, in the same unit."""


def _work_of(count: int) -> int:
    return count * (MEASURES + AVERAGES) if count > 1 else 0


class _Ticker:
    """Tells how far a shot is; may raise, to stop."""

    def __init__(self, step: Step, done: int, total: int):
        self.step, self.done, self.total = step, done, total

    def __call__(self, units: int = 1, preview: Tensor | None = None) -> None:
        self.done += units
        self.step(min(self.done, self.total), self.total, preview)


def _flows(small: Tensor, tick: _Ticker) -> tuple[Tensor, Tensor]:
    """There and back [n - 1, 2, h, w], as OpenCV's DIS finds them: what is sure of a flow is found
    elsewhere here, and nothing may be held still that is meant to be measured."""
    cv2 = opencv("Deflickering", "")
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    dis.setFinestScale(0)
    grey = [
        (evened(small[f : f + 1])[0] * 255).round().clamp(0, 255).byte().cpu().numpy()
        for f in range(len(small))
    ]
    there, back = [], []
    for f in range(1, len(grey)):
        there.append(torch.from_numpy(dis.calc(grey[f - 1], grey[f], None)))
        tick(0)
        back.append(torch.from_numpy(dis.calc(grey[f], grey[f - 1], None)))
        tick(1)
    return tuple(torch.stack(way).movedim(-1, 1).to(small) for way in (there, back))


def _remedy(small: Tensor, settings: DeflickerSettings, tick: _Ticker) -> _Remedy:
    """All that is to be done to the frames of one shot [n, 3, h, w]."""
    flows = _flows(small, tick)
    tint = tints(list(_pairs(small, flows, tick)), len(small), grid_of(small), settings.colour)
    small = tint.apply(small, slice(None))
    calm, flows, noise = _calmed(small, flows, tick)
    straight = _Straight(None, 0.0, flows, torch.zeros_like(small[:, 0]))
    if settings.places > 0:
        straight = _straightened(calm, flows, noise, settings.places, tick)
    if straight.shifts is not None:
        small = _read_all(small, straight.shifts)
    looks, flows = smoothed(small), straight.flows
    noise = noise_of(looks, flows[0])
    return _Remedy(tint, straight.shifts, looks, flows, noise, straight.wobble, straight.stands)


def _read_all(pictures: Tensor, shifts: Tensor) -> Tensor:
    return torch.stack([read_sharply(p, s) for p, s in zip(pictures, shifts, strict=True)])


def _calmed(
    small: Tensor, flows: tuple[Tensor, Tensor], tick: _Ticker
) -> tuple[Tensor, tuple[Tensor, Tensor], float]:
    """The pictures with less noise, which misleads flow, their flow, and how much noise there was."""
    looks = smoothed(small)
    noise = noise_of(looks, flows[0])
    if noise < QUIET**2:
        return small, flows, noise
    calm = [averaged(f, lambda g: small[g], looks, flows, noise, FIRST) for f in _told(small, tick)]
    return torch.stack(calm), _flows(torch.stack(calm), tick), noise


def _told(small: Tensor, tick: _Ticker) -> Iterator[int]:
    for f in range(len(small)):
        yield f
        tick()


def _pairs(small: Tensor, flows: tuple[Tensor, Tensor], tick: _Ticker) -> Iterator[Pair]:
    """Places of every frame, and their colours some frames later."""
    size = small.new_tensor([small.shape[-1], small.shape[-2]])
    soft = gaussian(small.flatten(0, 1), 2.0).view_as(small)
    for f in _told(small, tick):
        tracks = places.follow(*flows, f, max(DISTANCES))
        order = tracks.offsets.tolist()
        start = tracks.places[order.index(0)]
        sparse = max(1, len(start) // ENOUGH)
        some = (torch.arange(len(start), device=start.device) + f) % sparse == 0
        here = read_at(soft[f], start)
        for k in DISTANCES:
            if k not in order:
                continue
            end = tracks.places[order.index(k)]
            there = read_at(soft[f + k], end)
            kept = some & (tracks.seen[order.index(k)] > 0) & readable(here) & readable(there)
            if int(kept.sum()) >= places.FEWEST:
                yield Pair(
                    f, f + k, start[kept] / size, end[kept] / size, here[kept], there[kept]
                )  # fmt: skip


def _straightened(
    calm: Tensor, flows: tuple[Tensor, Tensor], noise: float, strength: float, tick: _Ticker
) -> _Straight:
    """Where to read every frame so that it is straight; nowhere else where neither what stands still
    nor flow can tell wobble from its own error.

    What stands still is told against the mean of all frames, the rest against its own motion. Where
    the one wobbles, so does the other."""
    field, stands = _beside_plate(calm, tick)
    wobble = _wobble_of(field, stands, places.contrast_of(calm))
    if (share := strength * _worth(wobble, places.USUAL)) > 0:
        sure = strength / (1 + (noise / LOUD**2) ** 2)
        shifts = share * places.undone(field)
        return _beside_what_stands(calm, shifts, stands[:, 0], wobble, sure, tick)
    stands = torch.zeros_like(calm[:, 0])
    wobble, least = places.wobble_of(flows, places.contrast_of(calm))
    if (share := strength * _worth(wobble, least + MISLED * noise**0.5)) == 0:
        return _Straight(None, 0.0, flows, stands)
    now, shifts = calm, torch.zeros_like(calm[:, :2])
    for n in range(ROUNDS):
        left = places.wobble_of(flows, places.contrast_of(now))[0] if n else wobble
        shifts = _along_motion(now, shifts, flows, stands, share, max(left, LEAST), tick)
        now = _read_all(calm, shifts)
        flows = _flows(now, tick)
    return _Straight(shifts, wobble, flows, stands)


def _wobble_of(
    field: Tensor,  # [n, 2, h, w] pixels
    stands: Tensor,  # [n, 1, h, w]
    contrast: Tensor,  # [n, h, w]
) -> float:
    """Standard deviation along an axis of how far what stands still is bent: of clear places, where it
    is told, and from a quantile, since a few places are far off."""
    told = (stands[:, 0] > 0.5) & (contrast > places.CONTRAST)
    found = (field / stands.clamp(min=0.5)).square().sum(1)[told]
    if float(stands.mean()) < STANDS or len(found) < places.FEWEST:
        return 0.0
    found = found[:: 1 + len(found) // SOME]
    return math.sqrt(float(found.quantile(BENT)) / (-2 * math.log(1 - BENT)))


def _worth(size: float, usual: float) -> float:
    """0..1. Steeper than James and Stein's shrinkage: a picture bent by an error is worse than
    wobble."""
    return max(0.0, 1 - (usual / max(size, 1e-6)) ** 4)


def _beside_what_stands(
    calm: Tensor, shifts: Tensor, stands: Tensor, wobble: float, sure: float, tick: _Ticker
) -> _Straight:
    """What stands is straight already; what moves is looked at once, since a second look would take
    fast motion for wobble that is left."""
    now = _read_all(calm, shifts)
    rest = _along_motion(
        now, torch.zeros_like(shifts), _flows(now, tick), stands, sure, wobble, tick
    )
    shifts = torch.stack([r + read(s, r) for s, r in zip(shifts, rest, strict=True)])
    there, back = _flows(_read_all(calm, shifts), tick)
    # Flow would follow what is left of the wobble; where nothing moves, none is followed.
    flows = there * (1 - stands[:-1, None]), back * (1 - stands[1:, None])
    return _Straight(shifts, wobble, flows, stands)


def _along_motion(
    pictures: Tensor,
    shifts: Tensor,  # [n, 2, h, w] so far
    flows: tuple[Tensor, Tensor],
    stands: Tensor,  # [n, h, w]
    share: float,
    wobble: float,
    tick: _Ticker,
) -> Tensor:  # [n, 2, h, w]
    """The shifts, and what the pictures, read there, still lie beside their motion."""
    more = []
    for f in _told(pictures, tick):
        field = places.beside(flows, f, pictures[f], 1 - stands[f], wobble)
        new = share * places.undone(field[None])[0]
        more.append(new + read(shifts[f], new))
    return torch.stack(more)


def _beside_plate(calm: Tensor, tick: _Ticker) -> tuple[Tensor, Tensor]:
    """How far what stands still lies beside the mean of all frames [n, 2, h, w] pixels, and how surely
    it stands [n, 1, h, w] 0..1."""
    h, w = calm.shape[-2:]
    scale = min(1.0, (PLATE / (h * w)) ** 0.5)
    size = tuple(max(SMALLEST, round(s * scale)) for s in (h, w))
    still = find_still(F.interpolate(calm, size, mode="area"), 1, lambda: tick(0))
    # The seam that was left out around what moves is straightened like what it borders on.
    stands = gaussian(grown(still.share, SEAM), FADE)[:, None]
    both = F.interpolate(torch.cat([-still.jitter * stands, stands], 1), (h, w), mode="bilinear")
    grow = both.new_tensor([w / size[1], h / size[0]])[:, None, None]
    return both[:, :2] * grow, both[:, 2:].clamp(0, 1)


def _steady(
    frames: Tensor, remedy: _Remedy, settings: DeflickerSettings, tick: _Ticker
) -> Iterator[Tensor]:
    """The frames of one shot, one after the other, at full size."""
    ready: dict[int, Tensor] = {}

    def straight(f: int) -> Tensor:
        if f not in ready:
            frame = frames[f : f + 1].to(remedy.looks).nan_to_num(0.5).clamp(0, 1)
            ready[f] = remedy.tints.apply(frame, slice(f, f + 1))[0]
            if remedy.shifts is not None:
                shift = enlarged(remedy.shifts[f], *frame.shape[-2:])
                ready[f] = crisp(read_sharply(ready[f], shift))
        return ready[f]

    for f in range(len(frames)):
        frame = straight(f)
        if settings.texture > 0:
            left = LEFT * remedy.wobble * remedy.stands[f]
            noise = remedy.noise + misplaced(remedy.looks[f], left)
            calm = averaged(f, straight, remedy.looks, remedy.flows, noise, settings.reach)
            calm = crisp(calm, BLUR * left.square())
            frame = frame.lerp(calm, settings.texture)
        ready.pop(f - settings.reach, None)
        frame = frame.clamp(0, 1)
        tick(AVERAGES, torch.cat([frames[f].to(frame).nan_to_num(0.5), frame], -1))
        yield frame


def _notes(parts: list[range], alone: int) -> tuple[str, ...]:
    notes = []
    if len(parts) > 1:
        starts = ", ".join(str(part.start) for part in parts[1:])
        notes.append(f"{len(parts)} shots (cuts at frame {starts}), each by itself")
    if alone:
        notes.append(f"{alone} shot(s) of a single frame left as they are")
    return tuple(notes)
