"""Implicit video: a clip as canonical pictures and a deformation that says where each pixel reads them.

Stage: fitted to a clip by implicit_fit.py, then rendered at any time and size. DiffPerformer
(Sec. 4.2, Eqs. 3-4) on CoDeF: colour(p, n) = C(D(p, n)), C a 2D and D a 3D hash encoding with an MLP
each, one pair a mask layer. What is not smooth in time is kept apart as explicit numbers a frame:

    frame_n(p) = gain_n(p) · C(D(p + jitter_n(p), n)) + offset_n(p)

Departs from the papers, in all but the `paper` preset: a clip is cut into pieces around key frames,
each with fields of its own, blended in between (one picture cannot hold a dance); and fields begin at
a picture and motions that are known, and learn what is missing.

Frames: places p are shares of the picture's width and height, 0..1, pixel centres at (i + 0.5) / W.
Times are frame numbers, not necessarily whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .flow import flow_picture
from .hash_grid import HashGrid

Tick = Callable[[], None]

MARGIN = 0.3
"""Canonical pictures go beyond the frame by this share of its sides, so that what enters it later has
a place: coordinates are (p + 0.3) / 1.6, as CoDeF's."""
DIVISOR = 5.0
"""CoDeF divides what the deformation's MLP says by this."""
POINTS = 1 << 16
"""Places that are looked up at a time."""


@dataclass(frozen=True)
class FieldSize:
    """A hash grid and the MLP behind it."""

    levels: int
    features: int
    log2_size: int
    base: int
    scale: float
    width: int
    depth: int
    """Hidden layers."""


class Field(nn.Module):
    """Hash features beside the raw coordinates, through an MLP with ReLU."""

    def __init__(
        self, dims: int, outputs: int, size: FieldSize, generator: torch.Generator, silent: bool
    ) -> None:
        super().__init__()
        self.grid = HashGrid(
            dims, size.levels, size.features, size.log2_size, size.base, size.scale, generator
        )
        widths = [dims + size.levels * size.features] + [size.width] * size.depth + [outputs]
        layers: list[nn.Module] = []
        for a, b in zip(widths[:-1], widths[1:], strict=True):
            layers += [_linear(a, b, generator), nn.ReLU()]
        self.mlp = nn.Sequential(*layers[:-1])
        if silent:  # what is known already is the start
            nn.init.zeros_(self.mlp[-1].weight)

    @property
    def speaks(self) -> bool:
        """Whether anything was learned yet, or drawn at random: else looking it up is in vain."""
        return bool(self.mlp[-1].weight.any() or self.mlp[-1].bias.any())

    def forward(
        self,
        points: Tensor,  # [N, dims] 0..1
        share: Tensor | None = None,  # [levels] how much of each level is heard
    ) -> Tensor:  # [N, outputs]
        if not torch.is_grad_enabled() and not self.speaks:
            return points.new_zeros(len(points), self.mlp[-1].out_features)
        features = self.grid(points)
        if share is not None:
            features = features * share.repeat_interleave(self.grid.features)
        return self.mlp(torch.cat([points, features], 1))


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """He's initialisation (2015), drawn from the seed."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    bound = math.sqrt(6 / inputs)
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.zero_()
    return layer


def annealed(levels: int, begun: float) -> Tensor:  # [levels] 0..1
    """How much of each level is heard when `begun` levels have begun to speak: (1 - cos(pi x)) / 2,
    x = begun - level within 0..1 (Nerfies, Park et al. 2021, Eq. 8, as CoDeF anneals)."""
    x = (begun - torch.arange(levels)).clamp(0, 1)
    return (1 - torch.cos(math.pi * x)) / 2


def read(
    pictures: Tensor,  # [C, H, W]
    places: Tensor,  # [N, 2] 0..1 across and down; beyond the border its colour
    mode: str = "bilinear",
) -> Tensor:  # [N, C]
    """A picture at places between its pixels."""
    grid = (2 * places - 1)[None, None]
    return F.grid_sample(pictures[None], grid, mode, "border", align_corners=False)[0, :, 0].T


def places_of(size: tuple[int, int], device=None) -> Tensor:  # [h * w, 2] 0..1
    """Pixel centres of a picture of (width, height), row after row."""
    w, h = size
    x, y = (torch.arange(w, device=device) + 0.5) / w, (torch.arange(h, device=device) + 0.5) / h
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).view(-1, 2)


class Layer(nn.Module):
    """One canonical picture with its deformation: the performer's or the background's, of a piece."""

    def __init__(
        self, canonical: FieldSize, deformation: FieldSize, silent: bool, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.canonical = Field(2, 4, canonical, generator, silent)
        self.deformation = Field(3, 2, deformation, generator, silent)
        self.register_buffer("picture", torch.zeros(4, 1, 1))
        """[4, Hc, Wc] colour and share of the layer that is known beforehand, over (p + 0.3) / 1.6."""
        self.register_buffer("motion", torch.zeros(1, 2, 1, 1))
        """[n, 2, h, w] offsets D(p) - p that are known beforehand, for every frame of the piece."""
        self.register_buffer("margin", torch.full((2,), MARGIN))
        """Shares of the frame by which `picture` goes beyond it."""

    def places(
        self,
        points: Tensor,  # [N, 2]
        time: float,  # frames since the piece begins
        length: int,  # frames of the piece
        share: Tensor | None = None,  # [levels] see `annealed`
    ) -> Tensor:  # [N, 2] in the canonical picture, in shares of the frame
        """D(p, n)."""
        moment = torch.full_like(points[:, :1], time / max(1, length - 1))
        learned = self.deformation(torch.cat([points, moment], 1), share) / DIVISOR
        first = min(int(time), len(self.motion) - 1)
        known = read(self.motion[first], points)
        if (late := time - first) > 0 and first + 1 < len(self.motion):
            known = torch.lerp(known, read(self.motion[first + 1], points), late)
        return points + known + learned

    def colours(self, places: Tensor) -> Tensor:  # [N, 2] -> [N, 4] colour and the layer's share
        """C."""
        known = read(self.picture, (places + self.margin) / (1 + 2 * self.margin), "bicubic")
        return known + self.learned(places)

    def learned(self, places: Tensor) -> Tensor:  # [N, 2] -> [N, 4]
        """What the canonical field adds to the picture."""
        return self.canonical(((places + MARGIN) / (1 + 2 * MARGIN)).clamp(0, 1))

    @torch.no_grad()
    def know(self, picture: Tensor, margin: tuple[float, float]) -> None:  # [4, Hc, Wc]
        """From now on `colours` are these, whatever was learned, until more is learned."""
        self.margin = picture.new_tensor(margin)
        places = places_of((picture.shape[2], picture.shape[1]), picture.device)
        places = places * (1 + 2 * self.margin) - self.margin
        learned = torch.cat([self.learned(some) for some in places.split(POINTS)])
        self.picture = picture - learned.T.view_as(picture)


class Piece(nn.Module):
    """The frames around a key frame, with one layer for each mask (behind to front)."""

    def __init__(self, layers: Sequence[Layer], key: int, reach: tuple[int, int], shot: range):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.key, self.shot = key, shot
        self.start, self.stop = reach
        """First frame and the last, that one included."""

    def __len__(self) -> int:
        return self.stop - self.start + 1

    def places(self, layer: int, points: Tensor, time: float, share: Tensor | None = None):
        """D of one layer at a frame number of the clip."""
        inside = min(max(time, self.start), self.stop) - self.start
        return self.layers[layer].places(points, inside, len(self), share)

    def colours(self, points: Tensor, time: float, share: Tensor | None = None) -> Tensor:
        """[N, 3] all layers over each other."""
        out: Tensor | None = None
        for number, layer in enumerate(self.layers):
            seen = layer.colours(self.places(number, points, time, share))
            alpha = seen[:, 3:].clamp(0, 1)
            out = seen[:, :3] if out is None else torch.lerp(out, seen[:, :3], alpha)
        return out


class ImplicitVideo(nn.Module):
    """A fitted clip of V views and F frames, ready to be rendered at any time and size."""

    def __init__(
        self, pieces: Sequence[Sequence[Piece]], frames: int, size: tuple[int, int], cells: int,
        bends: tuple[int, int], fps: float = 16.0,
    ) -> None:  # fmt: skip
        super().__init__()
        V = len(pieces)
        self.pieces = nn.ModuleList([nn.ModuleList(view) for view in pieces])
        self.count, self.size, self.fps = frames, size, fps
        """Frames, (width, height) and frames a second of the clip."""
        self.gain = nn.Parameter(torch.zeros(V, frames, 3, cells, cells))
        """Logarithms of gain_n, on a coarse grid."""
        self.offset = nn.Parameter(torch.zeros(V, frames, 3, cells, cells))
        self.register_buffer("jitter", torch.zeros(V, frames, 2, *bends))
        """Shares of the picture's sides."""
        self.register_buffer("steady_gain", torch.zeros_like(self.gain.data))
        """What of `gain` is smooth in time, and rendered."""
        self.register_buffer("steady_offset", torch.zeros_like(self.offset.data))
        self.register_buffer("steady_jitter", torch.zeros_like(self.jitter))
        """What of `jitter` is left in smooth pictures."""
        self.register_buffer("detail", None)
        """[V, F, 3, H, W] half: what smooth frames show beyond the fields; None = nothing."""

    def __len__(self) -> int:
        return len(self.pieces)

    @property
    def device(self) -> torch.device:
        return self.gain.device

    def _comfy_cache_tensors(self) -> list[Tensor]:
        return [*self.parameters(), *self.buffers()]

    def get_ram_usage(self) -> int:
        """Bytes held, for ComfyUI's cache accounting."""
        return sum(t.numel() * t.element_size() for t in self._comfy_cache_tensors())

    def pieces_at(self, view: int, time: float) -> list[tuple[Piece, float]]:
        """The pieces that show a time, with weights that sum to 1: the nearest keys of its shot."""
        time = min(max(time, 0.0), self.count - 1.0)
        shot = [p for p in self.pieces[view] if p.shot.start <= time < p.shot.stop]
        before = [p for p in shot if p.key <= time]
        after = [p for p in shot if p.key > time]
        if not before or not after:
            return [((before or after[:1])[-1], 1.0)]
        a, b = before[-1], after[0]
        late = (time - a.key) / (b.key - a.key)
        return [(a, 1.0)] if late == 0 else [(a, 1 - late), (b, late)]

    @torch.no_grad()
    def base(self, view: int, time: float, points: Tensor) -> Tensor:  # [N, 2] -> [N, 3]
        """C(D(p, n)): no jitter, no gains."""
        parts = []
        for some in points.split(POINTS):
            shown = [w * p.colours(some, time) for p, w in self.pieces_at(view, time)]
            parts.append(sum(shown))
        return torch.cat(parts)

    @torch.no_grad()
    def inner_places(self, view: int, time: float, points: Tensor, layer: int = -1) -> Tensor:
        """D(p, n) [N, 2] of the piece nearest to a time, by default of the layer in front."""
        piece = max(self.pieces_at(view, time), key=lambda pair: pair[1])[0]
        number = range(len(piece.layers))[layer]
        return torch.cat([piece.places(number, some, time) for some in points.split(POINTS)])

    def left(self, view: int, time: float, points: Tensor) -> Tensor:  # [N, 2]
        """Where smooth pictures read: `points`, but for the jitter that is left."""
        bend = _between(self.steady_jitter[view], time)
        return points + read(bend, points) if bend.any() else points

    def lit(self, colours: Tensor, view: int, time: float, points: Tensor, smooth: bool) -> Tensor:
        """Colours [N, 3] with the gain and the offset of a time."""
        pair = (self.steady_gain, self.steady_offset) if smooth else (self.gain, self.offset)
        gain, offset = (read_smooth(_between(t[view], time), points) for t in pair)
        return colours * gain.exp() + offset

    @torch.no_grad()
    def render(
        self,
        times: Sequence[float],
        size: tuple[int, int] | None = None,  # (width, height); None = the clip's own
        smooth: bool = True,
        tick: Tick | None = None,
    ) -> Tensor:  # [V, T, 3, h, w] 0..1
        """Pictures of any times and size: the steady ones, or (not smooth) what the clip is taken
        to be, with its jitter and its gains."""
        w, h = size or self.size
        points = places_of((w, h), self.device)
        out = torch.empty(len(self), len(times), 3, h, w)
        for v in range(len(self)):
            for n, time in enumerate(times):
                if tick:
                    tick()
                picture = self._picture(v, float(time), points, smooth)
                out[v, n] = picture.T.reshape(3, h, w).clamp(0, 1).cpu()
        return out

    def _picture(self, v: int, time: float, points: Tensor, smooth: bool) -> Tensor:  # [N, 3]
        if smooth:
            moved = self.left(v, time, points)
        else:
            moved = points + read(_between(self.jitter[v], time), points)
        colours = self.lit(self.base(v, time, moved), v, time, points, smooth)
        if smooth and self.detail is not None:
            colours = colours + self._detail(v, time, points)
        return colours

    def _detail(self, v: int, time: float, points: Tensor) -> Tensor:  # [N, 3]
        """The detail of the frames around a time, carried along the motion."""
        first = min(max(int(time), 0), self.count - 1)
        late = time - first
        around = [(first, 1 - late)]
        if late > 0 and first + 1 < self.count and self._one_shot(v, first):
            around.append((first + 1, late))
        else:
            around = [(first, 1.0)]
        if late == 0:
            return read(self.detail[v, first].float(), points)
        goal = self.inner_places(v, time, points)
        total = 0.0
        for frame, weight in around:
            there = self.locate(v, frame, goal, points)
            total = total + weight * read(self.detail[v, frame].float(), there)
        return total

    def _one_shot(self, v: int, first: int) -> bool:
        return any(first in p.shot and first + 1 in p.shot for p in self.pieces[v])

    def locate(self, v: int, frame: int, goal: Tensor, start: Tensor, rounds: int = 5) -> Tensor:
        """Where [N, 2] a frame shows canonical places `goal`: q with D(q, n) = goal, by iterating
        q + goal - D(q), which contracts while the deformation's slope is below 1."""
        there = start
        for _ in range(rounds):
            there = there + goal - self.inner_places(v, frame, there.clamp(0, 1))
        return there.clamp(0, 1)

    @torch.no_grad()
    def canonical_picture(
        self, view: int = 0, piece: int = 0, size: tuple[int, int] | None = None
    ) -> Tensor:  # [3, h, w] 0..1, with the margin around the frame
        """A canonical picture, all layers over each other."""
        layers = self.pieces[view][piece].layers
        w, h = size or tuple(round(n * (1 + 2 * MARGIN)) for n in self.size)
        margin = layers[0].margin
        places = places_of((w, h), self.device) * (1 + 2 * margin) - margin
        parts = []
        for some in places.split(POINTS):
            out = layers[0].colours(some)[:, :3]
            for layer in layers[1:]:
                seen = layer.colours(some)
                out = torch.lerp(out, seen[:, :3], seen[:, 3:].clamp(0, 1))
            parts.append(out)
        return torch.cat(parts).T.reshape(3, h, w).clamp(0, 1).cpu()

    @torch.no_grad()
    def deformation_picture(self, view: int, times: Sequence[float]) -> Tensor:  # [T, 3, H, W]
        """Where pixels read the canonical picture, as a flow picture (hue = direction)."""
        w, h = self.size
        points = places_of((w, h), self.device)
        pixels = points.new_tensor([w, h])
        offsets = [
            ((self.inner_places(view, t, points) - points) * pixels).T.reshape(2, h, w)
            for t in times
        ]
        return flow_picture(torch.stack(offsets)).cpu()


def read_smooth(grid: Tensor, places: Tensor) -> Tensor:  # [C, rows, columns], [N, 2] -> [N, C]
    """A coarse grid, whose outermost nodes lie on the border, at places; without edges."""
    if grid.shape[-1] == 1:
        return grid[:, 0].T.expand(len(places), -1)
    pair = (2 * places - 1)[None, None]
    return F.grid_sample(grid[None], pair, "bilinear", "border", align_corners=True)[0, :, 0].T


def _between(values: Tensor, time: float) -> Tensor:  # [F, ...] -> [...]
    """Numbers of a time between frames."""
    first = min(max(int(time), 0), len(values) - 1)
    late = time - first
    if late <= 0 or first + 1 >= len(values):
        return values[first]
    return torch.lerp(values[first], values[first + 1], late)
