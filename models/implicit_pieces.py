"""A clip cut into the pieces of an implicit video, and what these know before (and between) training.

Stage: frames + flow + masks -> Material -> pieces for implicit_fit.py. The finding itself is in
implicit_start.py; here it is done view by view, shot by shot, key by key.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .filters import gaussian
from .flow import Flow, optical_flow
from .implicit_start import (
    SMALL,
    canonical_average,
    cast_between,
    correct,
    fill,
    find_casts,
    find_jitter,
    hats,
    inverse,
    motions_to,
    scaled_flow,
    unjittered,
    warped_sharp,
)  # fmt: skip
from .implicit_still import find_still
from .implicit_video import MARGIN, ImplicitVideo, Layer, Piece, places_of, read

CELLS = 5
"""Nodes of a cast's grid along each axis: one picture may be tinted differently at its sides."""
BENDS = 40
"""Cells of the jitter across the longer side."""
HALF = 2
"""Pixels between the known motions of neighbouring places."""
PLAIN_CAST = 0.004
"""Mean change of colours below which flow need not be found again in corrected pictures."""


@dataclass(frozen=True)
class Material:
    """A clip as it is fitted."""

    frames: Tensor
    """[V, F, 3, H, W]"""
    layers: Tensor
    """[L, V, F, H, W] share of each layer, behind to front; they sum to 1."""
    flow: Flow
    gain: Tensor
    """[V, F, 3, cells, cells]"""
    offset: Tensor
    jitter: Tensor
    """[V, F, 2, rows, columns] shares of the picture."""
    still: Tensor
    """[V, F, H, W] how surely a pixel shows what stands still."""

    @cached_property
    def points(self) -> Tensor:  # [H, W, 2] shares
        H, W = self.frames.shape[-2:]
        return places_of((W, H), self.frames.device).view(H, W, 2)


def prepare(
    frames: Tensor, flow: Flow | None, masks: Tensor | None, shots: list[range], settings, tick
) -> Material:
    """What is known about a clip before it is fitted."""
    V, count, _, H, W = frames.shape
    _check(frames, flow, masks)
    front = frames.new_ones(V, count, H, W) if masks is None else masks.to(frames)
    layers = front[None] if masks is None else torch.stack([1 - front, front])
    bends = tuple(max(2, round(BENDS * n / max(H, W))) for n in (H, W))
    gain = frames.new_ones(V, count, 3, CELLS, CELLS)
    material = Material(
        frames,
        layers,
        flow,
        gain,
        torch.zeros_like(gain),
        frames.new_zeros(V, count, 2, *bends),
        frames.new_zeros(V, count, H, W),
    )
    if not settings.known:
        needed = settings.flow > 0 and count > 1 and flow is None
        return replace(material, flow=_followed(frames, tick)) if needed else material
    given = flow is not None
    material = replace(material, flow=flow if given else _followed(frames, tick))
    if count < 2:
        return material
    _learn(material, shots, tick)
    if not given and float((_plain(material) - frames).abs().mean()) > PLAIN_CAST:
        material = replace(material, flow=_followed(_plain(material), tick))
    return material


KNOWN_AROUND = 1.0
"""Pixels of the small pictures over which jitter fades beside what stands still."""


def renewed(material: Material, frames: Tensor, shots: list[range], tick) -> Material:
    """The material with other frames of the same clip, whose jitter and casts are their own."""
    names = ("gain", "offset", "jitter", "still")
    fresh = {name: torch.zeros_like(getattr(material, name)) for name in names}
    fresh["gain"] += 1
    material = replace(material, frames=frames.to(material.frames), **fresh)
    if frames.shape[1] > 1:
        _learn(material, shots, tick)
    return material


def _learn(material: Material, shots: list[range], tick) -> None:
    for v in range(len(material.frames)):
        for shot in shots:
            if len(shot) > 1:
                _learn_shot(material, v, shot, tick)


STANDS = 0.3
"""Share of a picture that must stand still to tell casts and jitter."""


def _learn_shot(material: Material, v: int, shot: range, tick) -> None:
    """Casts, jitter and what stands still of one shot, written into the material."""
    part, steps = slice(shot.start, shot.stop), slice(shot.start, shot.stop - 1)
    H, W = material.frames.shape[-2:]
    scale = min(1.0, SMALL / max(H, W))
    size = (max(8, round(H * scale)), max(8, round(W * scale)))
    small = F.interpolate(material.frames[v, part], size, mode="area")
    found = find_still(small, CELLS, tick)
    # Of what moves, jitter is not told by what stands still around it.
    bend = found.jitter * gaussian(found.share, KNOWN_AROUND)[:, None]
    if float(found.share.mean()) >= STANDS:
        material.gain[v, part], material.offset[v, part] = found.gain, found.offset
        share = F.interpolate(found.share[None], (H, W), mode="bilinear")[0]
        material.still[v, part] = share
    else:
        flow = material.flow
        there, back = (scaled_flow(f[v, steps], size) for f in (flow.there, flow.back))
        casts = find_casts(small, there, back, CELLS, tick)
        material.gain[v, part], material.offset[v, part] = casts
        weights = hats(size, CELLS, small)
        plain = [
            correct(p, g.flatten(1), o.flatten(1), weights)
            for p, g, o in zip(small, *casts, strict=True)
        ]
        sure = small.new_ones(len(small), *size)
        forth, fro = (
            F.interpolate(s[None, v, steps], size, mode="area")[0].clamp(min=0.02)
            for s in (flow.sure_there, flow.sure_back)
        )
        sure[:-1] *= forth
        sure[1:] *= fro
        bend = find_jitter(torch.stack(plain), there, back, sure, tick)
    shares = F.interpolate(bend, material.jitter.shape[-2:], mode="area")
    material.jitter[v, part] = shares / shares.new_tensor([size[1], size[0]])[:, None, None]


def _check(frames: Tensor, flow: Flow | None, masks: Tensor | None) -> None:
    V, count, _, H, W = frames.shape
    if masks is not None and masks.shape != (V, count, H, W):
        raise ValueError(
            f"The masks are {list(masks.shape)}, but the frames {V} views x {count} frames of "
            f"{W}x{H}: give one mask a frame, of the same size."
        )
    if flow is not None and flow.there.shape != (V, count - 1, 2, H, W):
        raise ValueError(
            f"The flow is {list(flow.there.shape)}, but the frames {V} views x {count} frames of "
            f"{W}x{H}: connect the flow of the same clip."
        )


def _followed(frames: Tensor, tick) -> Flow | None:
    if frames.shape[1] < 2:
        return None
    return optical_flow(frames, lambda *_: tick())


def _small(material: Material) -> tuple[Tensor, tuple[int, int]]:
    H, W = material.frames.shape[-2:]
    scale = min(1.0, SMALL / max(H, W))
    size = (max(8, round(H * scale)), max(8, round(W * scale)))
    flat = F.interpolate(material.frames.flatten(0, 1), size, mode="area")
    return flat.unflatten(0, material.frames.shape[:2]), size


def _plain(material: Material) -> Tensor:
    """The frames without their casts."""
    H, W = material.frames.shape[-2:]
    weights = hats((H, W), CELLS, material.frames)
    out = torch.empty_like(material.frames)
    for v, view in enumerate(material.frames):
        for n, frame in enumerate(view):
            pair = (material.gain[v, n].flatten(1), material.offset[v, n].flatten(1))
            out[v, n] = correct(frame, *pair, weights)
    return out


# --- pieces ---------------------------------------------------------------------------------------


def keys_of(shot: range, stride: int) -> list[tuple[int, int, int]]:
    """(key, first, last frame) of every piece of a shot; a piece reaches to its neighbours' keys."""
    last = shot.stop - 1
    if not stride or len(shot) <= stride + 1:
        return [((shot.start + last) // 2, shot.start, last)]
    count = max(2, -(-(len(shot) - 1) // stride) + 1)
    keys = [shot.start + round(k * (len(shot) - 1) / (count - 1)) for k in range(count)]
    ends = [shot.start, *keys, last]
    return [(k, ends[n], ends[n + 2]) for n, k in enumerate(keys)]


def build_pieces(
    material: Material, shots: list[range], settings, generator: torch.Generator
) -> list[list[Piece]]:
    """The pieces of every view; their layers know the motion, but no picture yet."""
    views = []
    for v in range(len(material.frames)):
        pieces = []
        for shot in shots:
            motions = _flows(material, v, shot) if settings.known and len(shot) > 1 else None
            for key, start, stop in keys_of(shot, settings.stride):
                layers = [
                    Layer(settings.canonical, settings.deformation, settings.known, generator)
                    for _ in material.layers
                ]
                if motions is not None:
                    inside = (key - shot.start, start - shot.start, stop - shot.start)
                    for layer, pair in zip(layers, motions, strict=True):
                        h, w = pair[0].shape[-2:]
                        share = pair[0].new_tensor([w, h])[:, None, None]
                        layer.motion = motions_to(*inside, *pair) / share
                pieces.append(Piece(layers, key, (start, stop), shot))
        views.append(pieces)
    return views


def _flows(material: Material, v: int, shot: range) -> list[tuple[Tensor, Tensor]]:
    """Flow there and back of a shot without its jitter, by layer, in pixels of the half size."""
    H, W = material.frames.shape[-2:]
    size = (max(2, H // HALF), max(2, W // HALF))
    steps = slice(shot.start, shot.stop - 1)
    jitter = F.interpolate(material.jitter[v, shot.start : shot.stop], size, mode="bilinear")
    jitter = jitter * jitter.new_tensor([size[1], size[0]])[:, None, None]
    there, back = (
        scaled_flow(f[v, steps], size) for f in (material.flow.there, material.flow.back)
    )
    found = []
    for layer in material.layers:
        pair = (there, back)
        if len(material.layers) > 1:  # each layer's motion goes on beyond its outline
            inside = F.interpolate(layer[v, shot.start : shot.stop][None], size, mode="area")[0]
            inside = (inside > 0.9).to(there)
            pair = (
                torch.stack([fill(f, m) for f, m in zip(there, inside[:-1], strict=True)]),
                torch.stack([fill(f, m) for f, m in zip(back, inside[1:], strict=True)]),
            )
        pair = unjittered(*pair, jitter)
        stands = F.interpolate(material.still[v, shot.start : shot.stop][None], size, mode="area")[
            0
        ]
        moves = 1 - stands[:, None]
        found.append((pair[0] * moves[:-1], pair[1] * moves[1:]))
    return found


# --- canonical pictures -----------------------------------------------------------------------------


@torch.no_grad()
def steady_frames(
    video: ImplicitVideo, material: Material, v: int, share: float, tick
) -> tuple[Tensor, Tensor]:  # [F, 3, H, W], [L, F, H, W]
    """Frames and layers of a view without casts, and without `share` of the jitter."""
    H, W = material.frames.shape[-2:]
    weights = hats((H, W), video.gain.shape[-1], material.frames)
    frames = torch.empty_like(material.frames[v])
    layers = torch.empty_like(material.layers[:, v])
    size = frames.new_tensor([W, H])[:, None, None]
    for n in range(len(frames)):
        tick()
        gain, offset = video.gain[v, n].exp().flatten(1), video.offset[v, n].flatten(1)
        frame = correct(material.frames[v, n], gain, offset, weights)
        bend = share * read(video.jitter[v, n], material.points.view(-1, 2)).T.view(2, H, W) * size
        if float(bend.detach().abs().amax()) < UNMOVED:
            frames[n], layers[:, n] = frame, material.layers[:, v, n]
            continue
        away = inverse(bend)
        frames[n] = warped_sharp(frame, away)
        layers[:, n] = warped_sharp(material.layers[:, v, n], away).clamp(0, 1)
    return frames, layers


UNMOVED = 0.05
"""Pixels that are not worth reading a picture between its pixels, which softens it."""


@torch.no_grad()
def renew_pictures(
    video: ImplicitVideo, material: Material, reference: Tensor | None, tick
) -> None:
    """Canonical pictures become what the frames show at their places, less what is learned."""
    W, H = video.size
    margin = (round(MARGIN * W), round(MARGIN * H))
    for v, pieces in enumerate(video.pieces):
        frames, layers = steady_frames(video, material, v, 1.0, tick)
        for piece in pieces:
            part = slice(piece.start, piece.stop + 1)
            times = torch.arange(piece.start, piece.stop + 1, device=frames.device)
            near = 1 / (1 + (times - piece.key).abs() / max(1, len(piece) // 2))
            extra = None
            if reference is not None and (v, piece.start) == (0, 0):
                extra = _fitted_reference(frames[piece.key], reference)
            for number, layer in enumerate(piece.layers):
                inside = layers[number, part]
                pictures = torch.cat([frames[part], inside[:, None]], 1)
                motions = torch.stack(
                    [offsets(video, v, piece, number, int(t), False) for t in times]
                )
                given = (pictures, motions, inside, near)
                if extra is not None:
                    given = _one_more(given, piece.key - piece.start, *extra)
                layer.know(canonical_average(*given, margin, tick), (margin[0] / W, margin[1] / H))


REFERENCE = 3.0
"""Frames that a reference picture counts for, where it shows the same."""


def _fitted_reference(frame: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """The reference as it lies over a frame [3, H, W], and how surely [H, W]."""
    there = F.interpolate(reference[None], frame.shape[-2:], mode="area")[0].to(frame)
    flow = optical_flow(torch.stack([frame, there])[None])
    return warped_sharp(there, flow.there[0, 0]), flow.sure_there[0, 0]


def _one_more(given: tuple[Tensor, ...], key: int, picture: Tensor, sure: Tensor):
    """Material of a canonical picture, with a picture that lies where the key frame does."""
    pictures, motions, inside, near = given
    more = torch.cat([picture, pictures[key, 3:]])
    return (
        torch.cat([pictures, more[None]]),
        torch.cat([motions, motions[key : key + 1]]),
        torch.cat([inside, (sure * inside[key])[None]]),
        torch.cat([near, near.new_tensor([REFERENCE])]),
    )


@torch.no_grad()
def begin_with(video: ImplicitVideo, reference: Tensor) -> None:  # [3, h, w]
    """Where nothing else is known, the first view's first canonical picture is the reference."""
    W, H = video.size
    margin = (round(MARGIN * W), round(MARGIN * H))
    small = F.interpolate(reference[None], (H, W), mode="area").to(video.device)
    wide = F.pad(small, (margin[0], margin[0], margin[1], margin[1]), mode="replicate")[0]
    for layer in video.pieces[0][0].layers:
        layer.know(torch.cat([wide, torch.ones_like(wide[:1])]), (margin[0] / W, margin[1] / H))


def offsets(
    video: ImplicitVideo, v: int, piece: Piece, layer: int, frame: int, left: bool = True
) -> Tensor:  # [2, h, w] on a picture of half the size
    """D(p) - p in pixels, from the smooth frame's places or (not left) from those without jitter."""
    w, h = (max(2, n // HALF) for n in video.size)
    points = places_of((w, h), video.device)
    begin = video.left(v, frame, points) if left else points
    away = piece.places(layer, begin, float(frame)) - points
    return (away * away.new_tensor(video.size)).T.reshape(2, h, w)


@torch.no_grad()
def steadied(video: ImplicitVideo, material: Material, tick) -> None:
    """Casts of new frames, against what the fields show."""
    small, (h, w) = _small(material)
    weights = hats((h, w), video.gain.shape[-1], small)
    points = places_of((w, h), video.device)
    sure = small.new_ones(h * w)
    shape = video.gain.shape[-2:]
    for v, view in enumerate(small):
        for n, picture in enumerate(view):
            tick()
            shown = video.base(v, n, points + read(video.jitter[v, n], points)).T
            gain, offset = cast_between(picture.flatten(1), shown, sure, weights)
            video.gain[v, n] = gain.log().view(3, *shape)
            video.offset[v, n] = offset.view(3, *shape)
