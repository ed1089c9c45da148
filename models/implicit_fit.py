"""Fitting an implicit video to a clip (DiffPerformer Sec. 4.2-4.3, Eqs. 3-8; CoDeF for the sizes).

Stage: frames [+ flow, masks, reference, depth and rig] -> ImplicitVideo and smoothed frames. One step
explains pixels of one frame: L1, Sobel slopes, Eq. 7 (a pixel and the one that flow leads to in the
next frame read the same canonical place), and what masks and cameras know.

Preset `PAPER` starts from noise, takes whole frames and the published schedule, and shows what the
fields say. The default starts at what flow tells (implicit_start.py), takes patches, tells jitter and
casts of single frames apart from what is smooth, and adds the detail that lasts (implicit_detail.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import Rig
from .flow import Flow
from .implicit_detail import add_detail
from .implicit_pieces import (
    Material,
    begin_with,
    build_pieces,
    prepare,
    renew_pictures,
    renewed,
    steadied,
)
from .implicit_video import FieldSize, ImplicitVideo, Piece, annealed, read, read_smooth
from .shots import shots

Step = Callable[..., None]
"""Called with done, total and, now and then, a preview [3, h, w]."""


@dataclass(frozen=True)
class Settings:
    """How a clip is fitted. The defaults are the fast preset."""

    canonical: FieldSize = FieldSize(8, 2, 15, 8, 1.6, 32, 1)
    deformation: FieldSize = FieldSize(5, 2, 14, 4, 1.6, 32, 2)
    steps: int = 0
    """0 = A_FRAME for every frame of every view."""
    patch: int = 64
    """Pixels a side of the patches a step takes; 0 = whole frames."""
    rate: float = 2e-3
    """Adam's learning rate of the MLPs; halved after each quarter of the steps."""
    table_rate: float = 1e-2
    """Of the hash tables."""
    squared: bool = False
    """Mean square instead of mean absolute error."""
    sobel: float = 0.1
    flow: float = 1.0
    background: float = 0.003
    anneal: tuple[float, float] | None = None
    """Shares of the steps at which the first level of the deformation's encoding begins to speak, and
    at which all do."""
    known: bool = True
    """Begin at what flow tells, and tell jitter and casts apart."""
    stride: int = 4
    """Frames from key to key; 0 = one canonical picture a shot."""
    strength: float = 1.0
    """0 = the clip as it is .. 1 = as smooth as it gets."""


A_FRAME = 12
"""Steps for every frame of every view, by default."""

FAST = Settings()
PAPER = Settings(
    canonical=FieldSize(16, 2, 19, 16, 1.44, 64, 2),
    deformation=FieldSize(16, 2, 19, 16, 1.38, 64, 8),
    steps=10_000,
    patch=0,
    rate=1e-3,
    table_rate=1e-3,
    squared=True,
    anneal=(0.4, 0.8),
    known=False,
    stride=0,
)
"""CoDeF's published sizes and schedule."""

CAST_RATE = 1e-3
"""Adam's learning rate of the casts. Jitter is not trained: it would explain what the fields don't know
of the performer, and bend a clean clip's performer by a tenth of a pixel (31 dB instead of 50)."""
PART, PART_ELSEWHERE = 1 << 14, 1 << 18
"""Pixels of a step between two looks at the cancel button, on a CPU and elsewhere: less than a second,
of the published size too. Their gradients add up to the step's."""
HELD = 0.1
"""How much casts are held to where they began, by their squares."""


STRIDE, FLOOR = 8, 0.3
"""Pixels from patch to patch, and how often one that nothing moves in is taken, of the mean."""


@dataclass
class History:
    """The loss and its terms after every step."""

    total: list[float] = field(default_factory=list)
    terms: list[dict[str, float]] = field(default_factory=list)


def slopes(pictures: Tensor) -> Tensor:  # [C, h, w] -> [2, C, h - 2, w - 2]
    """Sobel's slopes across and down, 1 = from black to white in a pixel."""
    kernel = pictures.new_tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]]) / 8
    pair = torch.stack([kernel, kernel.T])[:, None]
    return F.conv2d(pictures[:, None], pair).movedim(1, 0)


def flow_loss(
    here: Tensor,  # [N, 2] D(p, n), shares of the picture
    there: Tensor,  # [N, 2] D(p + flow, n + 1)
    sure: Tensor,  # [N] 0..1
    total: Tensor,  # sum of `sure` over all pixels of the step, of which these may be a part
) -> Tensor:
    """DiffPerformer Eq. 7 by its meaning: canon(p, n) = canon(p + F, n + 1), where flow is believed."""
    return ((here - there).abs().sum(1) * sure).sum() / total.clamp(min=1.0)


@dataclass(frozen=True)
class Patch:
    """Rows and columns of a frame that a step explains, or a part of its rows."""

    view: int
    frame: int
    rows: slice
    columns: slice
    whole: slice
    """Rows of the step."""

    @property
    def around(self) -> slice:
        """The rows, with those beside them that Sobel's slopes need."""
        return slice(max(self.rows.start - 1, self.whole.start),
                     min(self.rows.stop + 1, self.whole.stop))  # fmt: skip

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of the step."""
        return _long(self.whole), _long(self.columns)

    def parts(self, pixels: int) -> list[Patch]:
        """Cut into so many pixels at most, but a row at least."""
        step = max(1, pixels // _long(self.columns))
        return [
            replace(self, rows=slice(top, min(top + step, self.whole.stop)))
            for top in range(self.whole.start, self.whole.stop, step)
        ]


def _long(part: slice) -> int:
    return part.stop - part.start


class ImplicitFit:
    """A clip being fitted: `steps` trains, `retarget` gives it other frames, `render` shows it.

    Raises ValueError where frames, masks, flow or reference don't belong together.
    """

    def __init__(
        self,
        frames: Tensor,  # [V, F, 3, H, W] 0..1
        settings: Settings = FAST,
        flow: Flow | None = None,
        masks: Tensor | None = None,  # [V, F, H, W] 0..1, the performer
        depth: Tensor | None = None,  # [V, F, H, W] metres
        rig: Rig | None = None,
        reference: Tensor | None = None,  # [3, H, W] the look of the first canonical picture
        seed: int = 0,
        tick: Callable[[], None] = lambda: None,  # called now and then; may raise to stop
    ) -> None:
        self.settings, self.tick = settings, tick
        V, count, _, H, W = frames.shape
        self.size = (W, H)
        self.generator = torch.Generator().manual_seed(seed)
        self.history = History()
        self.done = 0
        self.planned = settings.steps or A_FRAME * V * count
        self.shots = _common_shots(frames, tick)
        self.material = prepare(frames, flow, masks, self.shots, settings, tick)
        self.video = self._video(frames, reference)
        self.pieces = [(v, p) for v, view in enumerate(self.video.pieces) for p in view]
        self.began = [t.detach().clone() for t in self._casts()]
        self.notes = _notes(self.shots, self.material, settings)
        self.surface = (depth, rig) if depth is not None and rig is not None and V > 1 else None
        self.busy: dict[int, Tensor] = {}
        self.optimiser = self._optimiser()

    def _video(self, frames: Tensor, reference: Tensor | None) -> ImplicitVideo:
        pieces = build_pieces(self.material, self.shots, self.settings, self.generator)
        cells, bends = self.material.gain.shape[-1], self.material.jitter.shape[-2:]
        video = ImplicitVideo(pieces, frames.shape[1], self.size, cells, bends).to(frames.device)
        with torch.no_grad():
            video.gain.copy_(self.material.gain.log())
            video.offset.copy_(self.material.offset)
            video.jitter.copy_(self.material.jitter)
            if self.settings.known:
                renew_pictures(video, self.material, reference, self.tick)
            elif reference is not None:
                begin_with(video, reference)
        return video

    def _casts(self) -> list[Tensor]:
        return [self.video.gain, self.video.offset]

    def _optimiser(self) -> torch.optim.Adam:
        s = self.settings
        named = dict(self.video.named_parameters())
        tables = [p for n, p in named.items() if n.endswith("grid.table")]
        layers = [p for n, p in named.items() if ".mlp." in n]
        groups = [{"params": tables, "lr": s.table_rate}, {"params": layers, "lr": s.rate}]
        if s.known:
            groups += [{"params": self._casts(), "lr": CAST_RATE}]
        for group in groups:
            group["first"] = group["lr"]
        return torch.optim.Adam(groups, eps=1e-8, fused=True)

    # --- steps ------------------------------------------------------------------------------------

    def steps(self, count: int, on_step: Step | None = None) -> None:
        """Train for so many steps; `on_step` sees the frame that is being explained now and then."""
        with torch.inference_mode(False), torch.enable_grad():
            for n in range(count):
                self.tick()
                shown = self._step()
                if on_step:
                    on_step(n + 1, count, self._preview(*shown) if n % 50 == 0 else None)

    def _step(self) -> tuple[int, int]:
        v, piece = self.pieces[self._draw(len(self.pieces))]
        frame = piece.start + self._draw(len(piece))
        for group in self.optimiser.param_groups:
            group["lr"] = group["first"] * 0.5 ** min(3, 4 * self.done // self.planned)
        self.optimiser.zero_grad(set_to_none=True)
        terms = self._descend(piece, self._patch(v, frame))
        self.optimiser.step()
        self.done += 1
        self.history.total.append(sum(terms.values()))
        self.history.terms.append(terms)
        return v, frame

    def _descend(self, piece: Piece, patch: Patch) -> dict[str, float]:
        """The losses of a step, whose gradients are added up part by part."""
        found: dict[str, Tensor] = {}
        limit = PART if self.video.device.type == "cpu" else PART_ELSEWHERE
        followed = self.settings.flow > 0 and patch.frame < piece.stop
        believed = self._believed(patch)[1].sum(1) if followed else None
        for part in patch.parts(limit):
            self.tick()
            terms = self._losses(piece, part, believed)
            if self.settings.known and part.rows.start == patch.whole.start:
                terms["held"] = self._held(patch.view, patch.frame)
            sum(terms.values()).backward()
            for name, term in terms.items():
                found[name] = found.get(name, 0.0) + term.detach()
        return {name: float(term) for name, term in found.items()}

    def _draw(self, count: int) -> int:
        return int(torch.randint(count, (1,), generator=self.generator))

    def _patch(self, v: int, frame: int) -> Patch:
        """What a step looks at: more often where frames differ."""
        W, H = self.size
        side = self.settings.patch
        if not side:
            return Patch(v, frame, slice(0, H), slice(0, W), slice(0, H))
        h, w = min(side, H), min(side, W)
        if v not in self.busy:
            self.busy[v] = _busy(self.material.frames[v], (h, w))
        map_ = self.busy[v][frame]
        place = int(torch.multinomial(map_.flatten(), 1, generator=self.generator))
        top, left = (STRIDE * n for n in divmod(place, map_.shape[1]))
        top, left = min(top, H - h), min(left, W - w)
        rows = slice(top, top + h)
        return Patch(v, frame, rows, slice(left, left + w), rows)

    def _share(self) -> Tensor | None:
        """How much of each level of the deformation's encoding is heard by now."""
        if self.settings.anneal is None:
            return None
        begin, end = (self.planned * s for s in self.settings.anneal)
        levels = self.settings.deformation.levels
        share = annealed(levels, levels * (self.done - begin) / max(1.0, end - begin))
        return share.to(self.video.device)

    def _losses(self, piece: Piece, part: Patch, believed: Tensor | None) -> dict[str, Tensor]:
        """What a part of a step adds to each term; `believed` [L] is how much flow of the whole step
        is believed."""
        s, m, video = self.settings, self.material, self.video
        v, frame, rows = part.view, part.frame, part.around
        points = m.points[rows, part.columns].reshape(-1, 2)
        goal = m.frames[v, frame, :, rows, part.columns]
        layers = m.layers[:, v, frame, rows, part.columns].flatten(1)  # [L, N]
        share = self._share()
        moved = points
        if s.known:
            moved = points + read(video.jitter[v, frame], points)
        places = [piece.places(n, moved, frame, share) for n in range(len(piece.layers))]
        seen = [layer.colours(u) for layer, u in zip(piece.layers, places, strict=True)]
        colours = sum(mask[:, None] * c[:, :3] for mask, c in zip(layers, seen, strict=True))
        if s.known:
            gain = read_smooth(video.gain[v, frame], points).exp()
            colours = colours * gain + read_smooth(video.offset[v, frame], points)
        error = colours.T.reshape(goal.shape) - goal
        h, w = part.sides
        first = part.rows.start - rows.start
        inner = slice(first * w, (first + _long(part.rows)) * w)
        own = error.flatten(1)[:, inner]
        terms = {"colour": (own.square() if s.squared else own.abs()).sum() / (3 * h * w)}
        if s.sobel and min(h, w) > 2 and error.shape[1] > 2:
            terms["slopes"] = s.sobel * slopes(error).abs().sum() / (6 * (h - 2) * (w - 2))
        if believed is not None:
            here = [u[inner] for u in places]
            terms["flow"] = s.flow * self._flow_loss(piece, part, here, believed, share)
        if len(layers) > 1:
            terms["layers"] = self._layer_loss([c[inner] for c in seen], layers[:, inner]) / (h * w)
        return terms

    def _believed(self, part: Patch) -> tuple[Tensor, Tensor]:  # [N, 2], [L, N]
        """Where flow leads from the pixels of a part, and how surely each layer goes with it."""
        W, H = self.size
        m, v, frame = self.material, part.view, part.frame
        points = m.points[part.rows, part.columns].reshape(-1, 2)
        step = read(m.flow.there[v, frame], points)
        # Pixels across are shares of the width, pixels down of the height.
        after = points + step / step.new_tensor([W, H])
        inside = ((after > 0) & (after < 1)).all(1)
        sure = read(m.flow.sure_there[v, frame][None], points)[:, 0] * inside
        masks = m.layers[:, v, frame, part.rows, part.columns].flatten(1)
        return after, sure * masks * read(m.layers[:, v, frame + 1], after).T

    def _flow_loss(
        self, piece: Piece, part: Patch, here: list[Tensor], believed: Tensor, share: Tensor | None
    ) -> Tensor:
        """Eq. 7 of all layers; `here` is D(p, n) of the part's rows."""
        after, sure = self._believed(part)
        moved = after
        if self.settings.known:
            moved = after + read(self.video.jitter[part.view, part.frame + 1], after)
        total = 0.0
        for n, places in enumerate(here):
            there = piece.places(n, moved, part.frame + 1, share)
            total = total + flow_loss(places, there, sure[n], believed[n])
        return total

    def _layer_loss(self, seen: list[Tensor], layers: Tensor) -> Tensor:
        """Layers in front know their own outline, and are black where they are not. A sum."""
        total = 0.0
        for colours, mask in zip(seen[1:], layers[1:], strict=True):
            outline = (colours[:, 3] - mask).abs().sum()
            beyond = (colours[:, :3].square().mean(1) * (1 - mask)).sum()
            total = total + 0.1 * outline + self.settings.background * beyond
        return total

    def _held(self, v: int, frame: int) -> Tensor:
        """Casts stay near where they began."""
        pairs = zip(self._casts(), self.began, strict=True)
        return HELD * sum((now[v, frame] - then[v, frame]).square().mean() for now, then in pairs)

    def _preview(self, v: int, frame: int) -> Tensor:
        w, h = self.size
        small = (max(8, w * 256 // max(w, h)), max(8, h * 256 // max(w, h)))
        size = min(self.size, small)
        return self.video.render([frame], size, smooth=False)[v, 0]

    # --- other frames, and what comes out -----------------------------------------------------------

    @torch.no_grad()
    def retarget(self, frames: Tensor) -> None:  # [V, F, 3, H, W]
        """Go on with other frames of the same clip; fields and the optimiser's state stay."""
        if frames.shape != self.material.frames.shape:
            raise ValueError(
                f"The new frames are {list(frames.shape)}, but the fit began with "
                f"{list(self.material.frames.shape)}: give frames of the same clip."
            )
        self.busy.clear()
        if not self.settings.known:
            self.material = replace(self.material, frames=frames.to(self.material.frames))
        else:
            self.material = renewed(self.material, frames, self.shots, self.tick)
            self.video.jitter.copy_(self.material.jitter)
            steadied(self.video, self.material, self.tick)
            renew_pictures(self.video, self.material, None, self.tick)
            self.began = [t.detach().clone() for t in self._casts()]

    @torch.no_grad()
    def render(self, tick: Callable[[], None] | None = None) -> Tensor:  # [V, F, 3, H, W]
        """The smoothed frames. Without `known` they are what the fields say, as published."""
        tick = tick or self.tick
        video = self.video
        if not self.settings.known:
            return video.render(range(video.count), tick=tick)
        return add_detail(video, self.material, self.settings.strength, tick, self.surface)

    @torch.no_grad()
    def residual(self, frames: Tensor) -> Tensor:  # [V, F, 3, H, W]
        """What was taken out: the clip minus `frames`, around middle grey."""
        return (0.5 + self.material.frames.cpu() - frames).clamp(0, 1)


def _busy(frames: Tensor, size: tuple[int, int]) -> Tensor:  # [F, 3, H, W] -> [F, rows, columns]
    """How much the patches of every frame differ from the frame before, and the frame after."""
    if len(frames) < 2:
        change = torch.ones_like(frames[:, :1])
    else:
        steps = (frames[1:] - frames[:-1]).abs().mean(1, keepdim=True)
        change = torch.cat([steps[:1], steps]) + torch.cat([steps, steps[-1:]])
    means = F.avg_pool2d(change, size, STRIDE)[:, 0].square().cpu()
    return means + FLOOR * means.mean((1, 2), keepdim=True) + 1e-8


def _notes(shots: list[range], material: Material, settings: Settings) -> list[str]:
    """What a creator should know about the clip."""
    notes = []
    if len(shots) > 1:
        starts = ", ".join(str(s.start) for s in shots[1:])
        notes.append(f"{len(shots)} shots, cut at frame {starts}: each is fitted by itself")
    if not settings.known or material.frames.shape[1] < 2:
        return notes
    stands = material.still.mean((1, 2, 3)).tolist()
    moving = [v for v, share in enumerate(stands) if share == 0]
    if moving:
        which = "" if len(stands) == 1 else f" in views {moving}"
        notes.append(
            f"little stands still{which} (a moving camera?): flow alone tells casts and shaking, "
            "which is less exact"
        )
    return notes


def _common_shots(frames: Tensor, tick) -> list[range]:
    """Shots that all views share: a cut in one is a cut in all, as they are synchronised."""
    starts = sorted({s.start for view in frames for s in shots(view, tick)})
    ends = [*starts[1:], frames.shape[1]]
    return [range(a, b) for a, b in zip(starts, ends, strict=True)]
