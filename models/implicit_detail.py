"""The detail layer: what the canonical pictures do not hold, as far as it lasts along the motion.

Stage: after fitting, before rendering. Each frame without its cast and jitter votes for the frames
around it, at the places that the deformation says show the same. What most agree about is texture and
stays; what one frame has alone is flicker and goes; where frames do not agree at all (an occlusion, a
new surface) the frame itself decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import Rig
from .filters import gaussian, local_fit
from .implicit_pieces import Material, offsets, steady_frames
from .implicit_start import located, pixel_centres
from .implicit_video import ImplicitVideo, Piece
from .implicit_views import agreed, view_casts, without_casts

VOTERS = 3
"""Frames before and after that are asked."""
PATCH = 7
"""Pixels a side over which frames are compared."""
SOFT = (0.0, 1.0)
"""Pixels of blur before frames are compared. Sharp frames tell what is fine where noise is coarse,
softened ones a fast arm that the grain of single pixels hides: whichever differs more counts."""
ALIKE = 1.0
"""Times the clip's usual difference of two frames beyond which a voter counts little."""
QUIET, QUIET_FACTOR = 5, 1.3
"""The fifth of the patches that differ least tells flicker (others differ by motion that is not quite
found), and by how much more the mean patch flickers."""
LEAST = 1e-5
"""Mean squared difference (of colours) that any two frames may have: the step of 8 bits."""
WINDOW = 4.0
"""Frames over which slow changes of light are kept, as the width of a bell."""


def low_passed(values: Tensor, shots: list[range]) -> Tensor:  # [F, ...] -> [F, ...]
    """Slow changes over time."""
    out = values.clone()
    for shot in shots:
        part = values[shot.start : shot.stop]
        weights = local_fit(len(shot), WINDOW, min(1, len(shot) - 1), values)
        out[shot.start : shot.stop] = torch.einsum("ts,s...->t...", weights, part)
    return out


@torch.no_grad()
def add_detail(
    video: ImplicitVideo,
    material: Material,
    strength: float,
    tick,
    surface: tuple[Tensor, Rig] | None = None,  # depth [V, F, H, W] and cameras of the views
) -> Tensor:  # [V, F, 3, H, W] 0..1
    """The smoothed frames; the video keeps what they show beyond its fields, for other times."""
    V, count = material.frames.shape[:2]
    W, H = video.size
    points = material.points.view(-1, 2)
    out, bases = torch.empty_like(material.frames), torch.empty_like(material.frames)
    video.steady_jitter.copy_((1 - strength) * video.jitter)
    for v in range(V):
        shots = list({p.shot.start: p.shot for p in video.pieces[v]}.values())
        for full, steady in ((video.gain, video.steady_gain), (video.offset, video.steady_offset)):
            steady[v] = torch.lerp(full[v], low_passed(full[v], shots), strength)
        clip = _Clip(video, v, *steady_frames(video, material, v, strength, tick))
        usual = _usual(clip, tick)
        for n in range(count):
            tick()
            bases[v, n] = video.base(v, n, video.left(v, n, points)).T.view(3, H, W)
            plain = _decided(clip, n, bases[v, n], usual, strength)
            out[v, n] = video.lit(plain.flatten(1).T, v, n, points, True).T.view(3, H, W)
    if surface is not None:
        alike = without_casts(out, view_casts(out, *surface, tick), surface[0])
        out = torch.lerp(out, agreed(alike, *surface, tick), strength)
    video.detail = torch.empty_like(out, dtype=torch.float16)
    for v in range(V):
        for n in range(count):
            base = bases[v, n].flatten(1).T
            shown = video.lit(base, v, n, points, True).T.view(3, H, W)
            video.detail[v, n] = out[v, n] - shown
    return out.clamp(0, 1).cpu()


@dataclass(frozen=True)
class _Clip:
    """One view without casts and jitter."""

    video: ImplicitVideo
    view: int
    frames: Tensor
    """[F, 3, H, W]"""
    layers: Tensor
    """[L, F, H, W]"""
    known: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    """Deformations that were looked up, by key, layer and frame."""

    def neighbour(self, n: int, m: int) -> tuple[Tensor, Tensor] | None:
        """What frame m shows at the points of frame n [3, H, W], and how surely [H, W]."""
        both = [
            p for p in self.video.pieces[self.view]
            if p.start <= min(n, m) and max(n, m) <= p.stop
        ]  # fmt: skip
        if not both:
            return None
        piece = min(both, key=lambda p: abs(p.key - n))
        place = self._places(piece, n, m, len(piece.layers) - 1)
        for layer in range(len(piece.layers) - 1):
            mine = self.layers[layer, n] > 0.5
            place = torch.where(mine, self._places(piece, n, m, layer), place)
        W, H = self.video.size
        x, y = place
        grid = torch.stack([2 * x / W - 1, 2 * y / H - 1], -1)[None]
        seen = F.grid_sample(
            torch.cat([self.frames[m], self.layers[:, m]])[None], grid, "bicubic", "border",
            align_corners=False,
        )[0]  # fmt: skip
        inside = (x > 0) & (x < W) & (y > 0) & (y < H)
        same = 1 - (seen[3:] - self.layers[:, n]).abs().amax(0)
        return seen[:3], (inside * same).clamp(0, 1)

    def _places(self, piece: Piece, n: int, m: int, layer: int) -> Tensor:  # [2, H, W] pixels
        here, there = (self._offsets(piece, layer, t) for t in (n, m))
        own = pixel_centres(self.frames[n])
        away = F.interpolate(here[None], own.shape[-2:], mode="bilinear")[0]
        return located(own + away, there, self.video.size, own)

    def _offsets(self, piece: Piece, layer: int, frame: int) -> Tensor:
        name = (piece.key, layer, frame)
        if name not in self.known:
            self.known[name] = offsets(self.video, self.view, piece, layer, frame)
        return self.known[name]


def _usual(clip: _Clip, tick) -> Tensor:  # [len(SOFT)]
    """How much two neighbouring frames usually differ: twice the flicker's variance."""
    count = len(clip.frames)
    found = []
    for n in torch.linspace(0, count - 2, min(8, count - 1)).round().long().tolist():
        tick()
        pair = clip.neighbour(n, n + 1) if n >= 0 else None
        if pair is not None:
            found.append(_apart(clip.frames[n], pair[0])[:, pair[1] > 0.9])
    flat = torch.cat(found, 1) if found else clip.frames.new_zeros(len(SOFT), 0)
    if not flat.shape[1]:
        return clip.frames.new_full((len(SOFT),), LEAST)
    quiet = flat.sort(1).values[:, flat.shape[1] // QUIET]
    return (QUIET_FACTOR * quiet).clamp(min=LEAST)


def _apart(a: Tensor, b: Tensor) -> Tensor:  # [3, H, W] twice -> [len(SOFT), H, W]
    """Mean squared differences of patches, softened first: grain shrinks, what lies elsewhere stays."""
    away = a - b
    squares = [(gaussian(away, s) if s else away).square().mean(0) for s in SOFT]
    return _patches(torch.stack(squares))


def _patches(values: Tensor) -> Tensor:  # [C, H, W]
    """Means over patches."""
    return F.avg_pool2d(values[None], PATCH, 1, PATCH // 2, count_include_pad=False)[0]


def _decided(clip: _Clip, n: int, base: Tensor, usual: Tensor, strength: float) -> Tensor:
    """One frame as it and its neighbours agree [3, H, W]."""
    usual = usual[:, None, None]
    own = clip.frames[n]
    total, weight, squares = own.clone(), torch.ones_like(own[0]), torch.ones_like(own[0])
    for m in range(max(0, n - VOTERS), min(len(clip.frames), n + VOTERS + 1)):
        pair = clip.neighbour(n, m) if m != n else None
        if pair is None:
            continue
        away = (_apart(own, pair[0]) / usual).amax(0)
        w = strength * pair[1] * torch.exp(-(away - 1).clamp(min=0) / ALIKE)
        total += w * pair[0]
        weight += w
        squares += w.square()
    mean = total / weight
    # What is left of the flicker's variance in the mean: where the fields differ no more, they are it.
    noise = usual / 2 * squares / weight.square()
    alike = (noise / _apart(mean, base).maximum(noise)).amin(0)
    return torch.lerp(mean, base, strength * alike)
