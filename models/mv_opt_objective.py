"""MV-Opt: views that disagree, flicker and shake are made to agree, without blurring them.

Stage: VIEWS + RIG -> VIEWS, after sampling (MVAnimate, Sec. IV-C: L = L_temp + L_mvP + L_mvS,
minimised block by block; Theorem IV.3: with sufficient decrease of every block the objective never
rises). The published losses are smallest when nothing moves and all views are equal; they are in
mv_opt_paper.py. Here is their sound form. A block is one view at one moment; its picture is

    y(p) = (1 + gain(p)) x(p + shift(p)) + offset(p),

x the picture that came in, and gain, offset, shift smooth fields given on coarse grids: colours
change at low frequency only and texture is moved, never mixed, so nothing blurs. The objective:

    surface    colours (averaged over cells) and texture of co-visible surface agree across views,
    temporal   colours (averaged over cells) stay along the flow; nothing speeds up in one view alone,
    pose       the whole performer stands where the moving geometry, or its keypoints, have it,
    fidelity   fields are small and smooth: each of these is a variance below.

Blocks are taken in the paper's order: moment after moment; in each, `iterations` rounds over the
views, front view first, then front to back. A round makes one damped Gauss-Newton step on colours
and one on shifts, halved until the objective falls by enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import Rig
from .filters import gaussian, read_at
from .mv_opt_links import CELL, STEADY_CELL, Basis, Bend, Link, basis, spread

TALLEST = 256
"""Pixels: larger windows are shrunk while fields are sought; fields are smooth, and applied in full."""
MARGIN = 8
"""Pixels around the performer that belong to the window."""
COLOUR_GRID, SHIFT_CELL = 40, 12
"""Pixels between the nodes of gain and offset, and of the shift."""
GAIN, OFFSET, SHIFT = 0.12, 0.012, 2.0
"""Standard deviations of what is corrected: factor, addend (colours 0..1), pixels."""
GAIN_STEP, OFFSET_STEP, SHIFT_STEP = 0.01, 0.002, 0.5
"""The same of the difference between neighbouring nodes."""
SURFACE_COLOUR, STEADY_COLOUR = 0.02, 0.01
"""Standard deviations of a cell's colour between views (light, mesh) and between frames."""
SURFACE_TEXTURE, INDEPENDENT = 0.05, 1 / 16
"""Of a pixel's grey between views; share of places that count as independent of their neighbours."""
BEND, BENDS_INDEPENDENT = 0.7, 1 / 4
"""Of an acceleration (pixels a frame²) that no other view has, from flow; share of them that count."""
OUTLINE = 0.3
"""Pixels by which an outline errs about where the performer stands."""
LEAST_CAST = 0.002
"""Standard deviation of the factors of a view whose colours seem right."""
SHIFT_ANCHOR = 0.05
"""Pixels of a node's mean shift over the clip: what is always so is the geometry's error."""
ANCHORS = (0.005, 0.0025)
"""Standard deviations of the front view's mean gain and offset over the clip: its colours are the
clip's."""
TAILS = 2.0
"""Differences beyond so many standard deviations count linearly: surface that moved, or is another."""
Block = tuple[int, int]
"""View and frame."""


@dataclass(frozen=True)
class Settings:
    """How views are refined."""

    temporal: float = 1.0
    """Strength of each term; 0 = off."""
    pose: float = 1.0
    surface: float = 1.0
    fidelity: float = 1.0
    iterations: int = 8
    """Rounds over the views at one moment, as published."""
    sweeps: int = 2
    """Passes over all moments at most; it stops early when a pass gains less than `enough`."""
    enough: float = 0.01
    chunk: int = 16
    """Frames whose correspondences are sought at a time: bounds memory, changes nothing."""


@dataclass
class History:
    """How the objective fell."""

    total: list[float] = field(default_factory=list)
    """F at the start and after every block."""
    order: list[tuple[int, int, int]] = field(default_factory=list)
    """Sweep, frame and view of every block."""
    terms: list[dict[str, float]] = field(default_factory=list)
    """Every term at the start and after every sweep."""

    def start(self, terms: dict[str, float]) -> None:
        self.terms.append(terms)
        self.total.append(sum(terms.values()))

    def add(self, block: tuple[int, int, int], fell: float) -> None:
        self.order.append(block)
        self.total.append(self.total[-1] - fell)


# --- the part of the pictures that is worked on ---------------------------------------------------


@dataclass(frozen=True)
class Window:
    """A box around the performer, the same in all views, and its size while fields are sought."""

    left: int
    top: int
    width: int
    height: int
    scale: float
    """Working pixels a pixel, at most 1."""

    @property
    def size(self) -> tuple[int, int]:
        """Working height and width."""
        return max(8, round(self.height * self.scale)), max(8, round(self.width * self.scale))

    def cut(self, pictures: Tensor) -> Tensor:  # [..., H, W] -> [..., height, width]
        rows = slice(self.top, self.top + self.height)
        return pictures[..., rows, self.left : self.left + self.width]

    def rig(self, rig: Rig) -> Rig:
        """The cameras of the working pictures."""
        h, w = self.size
        K = rig.K.clone()
        K[:, 0, 2] -= self.left
        K[:, 1, 2] -= self.top
        K[:, 0] *= w / self.width
        K[:, 1] *= h / self.height
        return Rig(K, rig.T_camera_world, w, h)


def window_around(inside: Tensor) -> Window:  # [V, F, H, W] bool
    """The performer of all views and frames, with a margin."""
    H, W = inside.shape[-2:]
    spots = inside.flatten(0, 1).any(0)
    rows, columns = (spots.any(d).nonzero()[:, 0] for d in (1, 0))
    top, left = max(0, int(rows[0]) - MARGIN), max(0, int(columns[0]) - MARGIN)
    height = min(H, int(rows[-1]) + 1 + MARGIN) - top
    width = min(W, int(columns[-1]) + 1 + MARGIN) - left
    return Window(left, top, width, height, min(1.0, TALLEST / height))


def huber(x: Tensor) -> tuple[Tensor, Tensor]:
    """A square that goes on as a line (pseudo-Huber): its value, and the weight of least squares."""
    root = torch.sqrt(1 + (x / TAILS).square())
    return 2 * TAILS**2 * (root - 1), 1 / root


def moved(picture: Tensor, shift: Tensor) -> Tensor:  # [3, h, w], [2, h, w] pixels
    """x(p + shift(p)), bicubic: the sharpest that this is worth."""
    h, w = picture.shape[-2:]
    y = (torch.arange(h, device=picture.device) + 0.5)[:, None] + shift[1]
    x = (torch.arange(w, device=picture.device) + 0.5) + shift[0]
    grid = torch.stack([2 * x / w - 1, 2 * y / h - 1], -1)[None]
    return F.grid_sample(
        picture[None], grid, mode="bicubic", padding_mode="border", align_corners=False
    )[0]


# --- one block ------------------------------------------------------------------------------------

TEXTURE_SIGMAS = (0.7, 2.0)
"""Pixels of blur before texture is compared: the finer is exact, the coarser reaches farther."""


@dataclass
class Fields:
    """What is sought for one view at one moment."""

    colour: Tensor
    """[3, 2, rows, columns] gain and offset of every channel."""
    shift: Tensor
    """[2, rows, columns] pixels, x and y."""


@dataclass(frozen=True)
class Looks:
    """Where a block is compared with others: all its links in one list."""

    links: tuple[tuple[int, int], ...]
    """Number of the link, and 0 where the block is `here`, 1 where it is `there`."""
    places: Tensor
    """[N, 2]"""
    colour_basis: Tensor
    """[N, colour nodes]"""
    shift_basis: Basis
    cells: Tensor
    """[N] cell of a place, numbered over all links."""
    counts: Tensor
    """[C]"""
    cell_weight: Tensor
    """[C] 1 / variance of its mean colour's difference."""
    place_weight: Tensor
    """[N] 1 / variance of its texture's difference; 0 for links over time."""

    def means(self, values: Tensor) -> Tensor:  # [N, K] -> [C, K]
        sums = values.new_zeros(len(self.counts), values.shape[1])
        return sums.index_add_(0, self.cells, values) / self.counts[:, None]


def _look(
    sides: list[tuple[int, int]],
    links: list[Link],
    size: tuple[int, int],
    settings: Settings,
    texture: bool,
) -> Looks:
    places, cells, counts, cell_weight, place_weight = [], [], [], [], []
    first = 0
    for number, side in sides:
        link = links[number]
        places.append(link.places_there if side else link.places_here)
        cells.append(link.cells + first)
        first += len(link.counts)
        counts.append(link.counts)
        full = link.counts * (link.share / (STEADY_CELL if link.over_time else CELL) ** 2)
        if link.over_time:
            cell_weight.append(full * (settings.temporal / STEADY_COLOUR**2))
            place_weight.append(torch.zeros_like(places[-1][:, 0]))
        else:
            cell_weight.append(full * (settings.surface / SURFACE_COLOUR**2))
            weight = texture * settings.surface * link.share * INDEPENDENT / SURFACE_TEXTURE**2
            place_weight.append(torch.full_like(places[-1][:, 0], weight))
    joined = torch.cat(places)
    colour_grid = grid_of(size, COLOUR_GRID)
    return Looks(
        tuple(sides), joined, basis(joined, size, colour_grid).dense(colour_grid[0] * colour_grid[1]),
        basis(joined, size, grid_of(size, SHIFT_CELL)), torch.cat(cells), torch.cat(counts),
        torch.cat(cell_weight), torch.cat(place_weight),
    )  # fmt: skip


def grid_of(size: tuple[int, int], cell: int) -> tuple[int, int]:
    """Nodes of a grid over a window, rows and columns."""
    return tuple(max(2, round(n / cell) + 1) for n in size)


def roughness(rows: int, columns: int, device) -> Tensor:
    """[n, n] L with x' L x = the sum of squared differences between neighbouring nodes."""
    number = torch.arange(rows * columns, device=device).view(rows, columns)
    pairs = torch.cat(
        [torch.stack([a.flatten(), b.flatten()], 1)
         for a, b in ((number[:, 1:], number[:, :-1]), (number[1:], number[:-1]))]
    )  # fmt: skip
    D = torch.zeros(len(pairs), rows * columns, device=device)
    row = torch.arange(len(pairs), device=device)
    D[row, pairs[:, 0]], D[row, pairs[:, 1]] = 1, -1
    return D.T @ D


class Problem:
    """All blocks, what they are compared with, and the objective."""

    def __init__(
        self,
        pictures: Tensor,  # [V, F, 3, h, w] of the window
        links: list[Link],
        curves: list[Bend],
        drift: Tensor,  # [V, F, 2] pixels: how far the whole performer has to be moved
        solid: Tensor,  # [V, F, h, w] bool: where the performer is
        trust: Tensor,  # [V] mean 1: how much each view keeps to what it was
        casts: Tensor,  # [V] standard deviation of the factors by which its colours are off
        settings: Settings,
        texture: bool = True,  # whether texture is compared across views, or colours alone
    ) -> None:
        self.pictures, self.links, self.settings = pictures, links, settings
        self.trust, self.casts = trust, (casts / GAIN).clamp(min=LEAST_CAST / GAIN)
        self.size = tuple(pictures.shape[-2:])
        self.colour_grid, self.shift_grid = (
            grid_of(self.size, c) for c in (COLOUR_GRID, SHIFT_CELL)
        )
        device = pictures.device
        self.colour_rough = roughness(*self.colour_grid, device)
        self.shift_rough = roughness(*self.shift_grid, device)
        V, count = pictures.shape[:2]
        sides: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for number, link in enumerate(links):
            sides.setdefault(link.here, []).append((number, 0))
            sides.setdefault(link.there, []).append((number, 1))
        self.looks = {b: _look(s, links, self.size, settings, texture) for b, s in sides.items()}
        self.fields = {
            (v, f): Fields(
                pictures.new_zeros(3, 2, *self.colour_grid), pictures.new_zeros(2, *self.shift_grid)
            )
            for v in range(V)
            for f in range(count)
        }
        self.texture_counts = texture and settings.surface > 0
        self.drift = drift
        every = torch.zeros_like(solid[0, 0])
        every[2::4, 2::4] = True
        self.body = {}
        for v in range(V):
            for f in range(count):
                rows, columns = (solid[v, f] & every).nonzero().unbind(1)
                if len(rows) and drift[v].any():
                    places = torch.stack([columns, rows], -1) + 0.5
                    reads = basis(places, self.size, self.shift_grid)
                    self.body[v, f] = reads.mean(self.shift_grid[0] * self.shift_grid[1])
        self.values: dict[tuple[int, int], Tensor] = {}
        for b in self.looks:
            self.keep(b, self.read(b, self.shown(b, self.fields[b])))
        self.curves = {(c.view, c.frame): c for c in curves}
        self.curve_bases = {
            key: [basis(p, self.size, self.shift_grid) for p in c.places]
            for key, c in self.curves.items()
        }

    # what a block shows

    def picture(self, block: Block, fields: Fields) -> Tensor:  # [3, h, w]
        x = self.pictures[block]
        if fields.shift.any():
            x = moved(x, spread(fields.shift, self.size))
        if fields.colour.any():
            gain, offset = (
                spread(fields.colour.flatten(0, 1), self.size).unflatten(0, (3, 2)).unbind(1)
            )
            x = (1 + gain) * x + offset
        return x

    def shown(self, block: Block, fields: Fields) -> Tensor:  # [3 + 2, h, w], or [3, h, w]
        """The block's picture and, where texture counts, its blurred greys."""
        y = self.picture(block, fields)
        if not self.texture_counts:
            return y
        grey = y.mean(0, keepdim=True)
        return torch.cat([y, *(gaussian(grey, s) for s in TEXTURE_SIGMAS)])

    def read(self, block: Block, shown: Tensor) -> Tensor:  # [N, 3 + 2], or [N, 3]
        """What is compared at the block's places."""
        return read_at(shown, self.looks[block].places)

    def kept(self, block: Block) -> Tensor:
        """What `read` gave when the block changed last."""
        return torch.cat([self.values[side] for side in self.looks[block].links])

    def keep(self, block: Block, values: Tensor) -> None:
        """What others are compared with from now on."""
        looks = self.looks[block]
        sizes = [len(self.links[number].places_here) for number, _ in looks.links]
        for side, part in zip(looks.links, values.split(sizes), strict=True):
            self.values[side] = part

    def others(self, block: Block) -> Tensor:  # [N, 5]
        return torch.cat(
            [self.values[number, 1 - side] for number, side in self.looks[block].links]
        )

    # the objective

    def compared(self, block: Block, away: Tensor) -> tuple[Tensor, Tensor]:
        """What one block's differences [N, 5] cost: colours of every cell [C], texture [N]."""
        looks = self.looks[block]
        mean = looks.means(away)
        colour = huber(mean[:, :3] * looks.cell_weight[:, None].sqrt())[0]
        texture = (away[:, 3:] - mean[looks.cells, 3:]) * looks.place_weight[:, None].sqrt()
        return colour.sum(1), huber(texture)[0].sum(1)

    def curved(self, block: Block, shift: Tensor) -> Tensor:
        """The accelerations in which the block takes part."""
        total = shift.new_zeros(())
        for _, left, _, _ in self.curvature(block, shift):
            weight = self.settings.temporal * BENDS_INDEPENDENT
            total = total + weight * huber(left / BEND)[0].sum()
        return total

    def bend_left(self, key: Block, block: Block, shift: Tensor) -> Tensor:  # [M, 2]
        """What is left of the excess around `key` when one block has this shift."""
        left = self.curves[key].excess
        for place, factor in ((0, -1.0), (1, 2.0), (2, -1.0)):
            who = (key[0], key[1] - 1 + place)
            d = shift if who == block else self.fields[who].shift
            left = left + factor * self.curve_bases[key][place].read(d)
        return left

    def curvature(self, block: Block, shift: Tensor) -> Iterator[tuple]:
        """(key, [M, 2] what is left of the excess, factor of the block's shift, its basis)."""
        v, f = block
        for role, factor in ((2, -1.0), (1, 2.0), (0, -1.0)):  # after, now, before
            key = (v, f + 1 - role)
            if key not in self.curves:
                continue
            yield key, self.bend_left(key, block, shift), factor, self.curve_bases[key][role]

    def stands(self, block: Block, shift: Tensor) -> Tensor:  # [2] pixels
        """How far the whole performer is from where it should stand."""
        return shift.flatten(1) @ self.body[block] - self.drift[block]

    def moves(self, block: Block) -> bool:
        """Whether anything but texture says where the block belongs."""
        v, f = block
        near = any((v, f + step) in self.curves for step in (-1, 0, 1))
        return near or block in self.body

    def posed(self, block: Block, shift: Tensor) -> Tensor:
        """The performer stands where the driving motion has it."""
        if block not in self.body:
            return shift.new_zeros(())
        return self.settings.pose * huber(self.stands(block, shift) / OUTLINE)[0].sum()

    def small(self, block: Block, fields: Fields) -> Tensor:
        """Fidelity."""
        trust = self.trust[block[0]] * self.settings.fidelity
        n = fields.colour[0, 0].numel()
        gain, offset = fields.colour.flatten(2).unbind(1)
        total = fields.colour.new_zeros(())
        for part, whole, step in ((gain, GAIN, GAIN_STEP), (offset, OFFSET, OFFSET_STEP)):
            total = total + trust * part.square().sum() / (n * whole**2)
            total = total + torch.einsum("cn,nm,cm->", part, self.colour_rough, part) / step**2
        total = total / self.casts[block[0]].square()
        shift = fields.shift.flatten(1)
        total = total + trust * shift.square().sum() / (shift.shape[1] * SHIFT**2)
        return total + torch.einsum("cn,nm,cm->", shift, self.shift_rough, shift) / SHIFT_STEP**2

    def colour_sum(self) -> Tensor:
        """The front view's colour fields, added up over the clip."""
        return sum(self.fields[0, f].colour for f in range(self.pictures.shape[1]))

    def anchored(self, block: Block, fields: Fields) -> Tensor:
        """The front view's colours stay, on average over the clip."""
        if block[0] != 0:
            return fields.colour.new_zeros(())
        mean = (
            self.colour_sum() - self.fields[block].colour + fields.colour
        ) / self.pictures.shape[1]
        size = mean.square().sum((0, 2, 3)) / mean[0, 0].numel()
        return (size / size.new_tensor(ANCHORS).square()).sum()

    def shift_sum(self, v: int) -> Tensor:
        """One view's shifts, added up over the clip."""
        return sum(self.fields[v, f].shift for f in range(self.pictures.shape[1]))

    def centred(self, block: Block, shift: Tensor) -> Tensor:
        """Shifts are 0 on average over the clip."""
        mean = self.shift_sum(block[0]) - self.fields[block].shift + shift
        mean = mean / self.pictures.shape[1]
        return mean.square().sum() / (mean[0].numel() * SHIFT_ANCHOR**2)

    def local(
        self, block: Block, fields: Fields, values: Tensor | None, others: Tensor | None
    ) -> Tensor:
        """All of the objective that depends on one block."""
        total = self.small(block, fields) + self.curved(block, fields.shift)
        total = total + self.posed(block, fields.shift)
        total = total + self.anchored(block, fields) + self.centred(block, fields.shift)
        if values is not None:
            colour, texture = self.compared(block, values - others)
            total = total + colour.sum() + texture.sum()
        return total

    def texture(self) -> float:
        """The part of the surface term that is texture."""
        sums = 0.0
        for block in self.looks:
            away = self.kept(block) - self.others(block)
            sums += 0.5 * float(self.compared(block, away)[1].sum())
        return sums

    def total(self) -> dict[str, float]:
        """The whole objective by terms, every link and acceleration counted once."""
        settings = self.settings
        sums = {"surface": 0.0, "temporal": 0.0, "pose": 0.0, "fidelity": 0.0}
        for block, looks in self.looks.items():
            away = self.kept(block) - self.others(block)
            colour, texture = self.compared(block, away)
            sums["surface"] += 0.5 * float(texture.sum())
            first = 0
            for number, _ in looks.links:
                link = self.links[number]
                part = 0.5 * float(colour[first : first + len(link.counts)].sum())
                sums["temporal" if link.over_time else "surface"] += part
                first += len(link.counts)
        for v, f in self.curves:
            left = self.bend_left((v, f), (v, f), self.fields[v, f].shift)
            weight = settings.temporal * BENDS_INDEPENDENT
            sums["temporal"] += weight * float(huber(left / BEND)[0].sum())
        for block, fields in self.fields.items():
            sums["fidelity"] += float(self.small(block, fields))
            sums["pose"] += float(self.posed(block, fields.shift))
        sums["fidelity"] += float(self.anchored((0, 0), self.fields[0, 0]))
        for v in range(len(self.pictures)):
            sums["fidelity"] += float(self.centred((v, 0), self.fields[v, 0].shift))
        return sums
