"""Flow: where every picture point of a clip lies in the next frame, and in the one before.

Stage: VIEWS -> FLOW -> implicit video. Here: the flow itself, OpenCV's DIS (Kroeger et al. 2016) made
deaf to flicker, how sure a flow is, and its picture. A body's flow is in body_flow.py, flow of other
nodes in flow_reading.py.

Frames: pixels of the picture, x right, y down, centres at +0.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .filters import gaussian
from .metrics import sample
from .relief import opencv

Step = Callable[..., None]
"""Called with done, total and, now and then, a preview [3, h, w]."""


@dataclass(frozen=True)
class Flow:
    """The motion of V clips of F frames, between neighbouring frames and both ways."""

    there: Tensor
    """[V, F - 1, 2, H, W] pixels (x, y): a point of frame f lies that far away in frame f + 1."""
    back: Tensor
    """[V, F - 1, 2, H, W] pixels: a point of frame f + 1 lies that far away in frame f."""
    sure_there: Tensor
    """[V, F - 1, H, W] 0..1; 0 = hidden in frame f + 1, or not known."""
    sure_back: Tensor
    """[V, F - 1, H, W] 0..1; 0 = hidden in frame f, or not known."""

    def __post_init__(self) -> None:
        shape = tuple(self.there.shape)
        if len(shape) != 5 or shape[2] != 2 or not self.there.numel():
            raise ValueError(
                "A flow needs steps of shape [views, frames - 1, 2, height, width], got "
                f"{list(shape)}: give at least two frames."
            )
        if tuple(self.back.shape) != shape:
            raise ValueError(
                f"A flow leads both ways: {list(shape)} there, but {list(self.back.shape)} back."
            )
        for part in (self.sure_there, self.sure_back):
            if tuple(part.shape) != (*shape[:2], *shape[3:]):
                raise ValueError(
                    f"A flow of shape {list(shape)} needs confidences of shape "
                    f"{[*shape[:2], *shape[3:]]}, got {list(part.shape)}."
                )
            if not (part.min() >= 0 and part.max() <= 1):  # NaN is not
                raise ValueError("Confidences of a flow lie between 0 and 1.")
        if not (self.there.isfinite().all() and self.back.isfinite().all()):
            raise ValueError("A flow holds NaN or infinity: check the node that made it.")

    def __len__(self) -> int:
        return self.there.shape[0]

    @property
    def frame_count(self) -> int:
        return self.there.shape[1] + 1

    def _comfy_cache_tensors(self) -> list[Tensor]:
        return [self.there, self.back, self.sure_there, self.sure_back]

    def get_ram_usage(self) -> int:
        """Bytes held, for ComfyUI's cache accounting."""
        return sum(t.numel() * t.element_size() for t in self._comfy_cache_tensors())


def beside(flow: Flow, other: Flow) -> Flow:
    """`other` wherever `flow` neither moves nor is sure: a body's flow, and what is around it."""
    if flow.there.shape != other.there.shape:
        raise ValueError(
            f"The flows have shapes {list(flow.there.shape)} and {list(other.there.shape)}: make "
            "both of the same clip."
        )
    parts = []
    for ours, theirs in (("there", "sure_there"), ("back", "sure_back")):
        step, sure = getattr(flow, ours), getattr(flow, theirs)
        known = (sure > 0) | (step != 0).any(2)
        parts.append(torch.where(known[:, :, None], step, getattr(other, ours)))
        parts.append(torch.where(known, sure, getattr(other, theirs)))
    there, sure_there, back, sure_back = parts
    return Flow(there, back, sure_there, sure_back)


# --- reading along a flow -------------------------------------------------------------------------


def pixel_places(pictures: Tensor) -> Tensor:  # [..., H, W] -> [2, H, W]
    """The centre (x, y) of every pixel."""
    H, W = pictures.shape[-2:]
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    return torch.stack([x, y]).to(pictures.device)


def warped(
    pictures: Tensor,  # [N, C, H, W]
    flow: Tensor,  # [N, 2, H, W] pixels
) -> Tensor:  # [N, C, H, W]
    """Every pixel shows what lies where its flow leads; the border is repeated outwards."""
    x, y = (pixel_places(flow) + flow).unbind(1)
    return sample(pictures, x, y)


def inverse(
    flow: Tensor,  # [N, 2, H, W] pixels, from A to B
) -> Tensor:  # [N, 2, H, W] from B to A
    """The flow that leads back: back(q) = -flow(q + back(q)), by repetition (10 rounds halve the gap
    as often where neighbours move less than half a pixel apart; folds and holes stay inexact)."""
    back = -flow
    for _ in range(10):
        back = -warped(flow, back)
    return back


def inside(flow: Tensor) -> Tensor:  # [N, 2, H, W] -> [N, H, W] bool
    """Whether the flow leads to a place in the picture."""
    H, W = flow.shape[-2:]
    x, y = (pixel_places(flow) + flow).unbind(1)
    return (x >= 0) & (x <= W) & (y >= 0) & (y <= H)


# --- how sure -------------------------------------------------------------------------------------

RETURN_SHARE, RETURN = 0.01, 0.5
"""A point is believed to a third (exp(-1)) when what it misses its origin by, there and back, squared,
is this share of the steps' squares plus so many square pixels (the bound of Sundaram, Brox, Keutzer
2010, made soft)."""
CELLS, CELL = 16, 8
"""Cells along the shorter side in which brightness and contrast may change from frame to frame, and
the fewest pixels a side of one."""
CONTRAST = 0.02
"""Contrast (0..1) below which a cell's brightness may change, but not its contrast."""
COLOUR = (0.06, 0.16)
"""Least and greatest colour difference (0..1) at which a point is believed to a third; in between it
is three times the clip's usual one, so that noise in all frames counts against no flow."""


def returned(there: Tensor, back: Tensor) -> Tensor:  # [N, 2, H, W] twice -> [N, H, W] 0..1
    """How well a point comes back to where it began."""
    home = warped(back, there)
    allowed = RETURN + RETURN_SHARE * (there.square().sum(1) + home.square().sum(1))
    return torch.exp(-(there + home).square().sum(1) / allowed) * inside(there)


def _cell_means(values: Tensor, size: tuple[int, int]) -> Tensor:  # [N, C, H, W] -> [N, C, h, w]
    cells = F.adaptive_avg_pool2d(values, size)
    return F.avg_pool2d(cells, 3, 1, 1, count_include_pad=False)


def colour_gap(
    now: Tensor,  # [N, C, H, W] 0..1
    then: Tensor,  # [N, C, H, W] the other frame, warped to this one
    trust: Tensor,  # [N, H, W] 0..1
) -> Tensor:  # [N, H, W] 0..1
    """How far the colours are apart, but for gain and offset of every cell's neighbourhood.

    A regression in cells, as in the guided filter (He, Sun, Tang 2010, eqs. 5-6), weighed by `trust`;
    it smoothly fills the picture, so that it explains flicker but no limb that hides another."""
    H, W = now.shape[-2:]
    cell = max(CELL, min(H, W) / CELLS)
    size = tuple(max(1, round(n / cell)) for n in (H, W))
    trust = trust[:, None] + 1e-3
    weight = trust
    for _ in range(2):  # once more without what is another surface
        gain, offset = (
            F.interpolate(part, (H, W), mode="bilinear", align_corners=False)
            for part in _brightness(now, then, weight, size)
        )
        away = (now - gain * then - offset).square().mean(1, keepdim=True)
        weight = trust / (1 + away / COLOUR[0] ** 2)
    return F.avg_pool2d(away, 3, 1, 1, count_include_pad=False)[:, 0].sqrt()


def _brightness(
    now: Tensor, then: Tensor, weight: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:  # gain, offset [N, C, *size]
    share = _cell_means(weight, size)

    def mean(values: Tensor) -> Tensor:
        return _cell_means(weight * values, size) / share

    a, b = mean(now), mean(then)
    spread = (mean(then * then) - b * b).clamp(min=0)
    together = mean(now * then) - a * b
    gain = ((together + CONTRAST**2) / (spread + CONTRAST**2)).clamp(0.25, 4)
    return gain, a - gain * b


def how_sure(
    pictures: Tensor,  # [F, C, H, W] 0..1, one clip
    there: Tensor,  # [F - 1, 2, H, W]
    back: Tensor,
    tick: Callable[[int], None] | None = None,  # called with every pair's number
) -> tuple[Tensor, Tensor]:  # sure_there, sure_back [F - 1, H, W]
    """Confidence of a flow from its way back and from the colours it joins, whatever flickers."""
    gaps, kept = [], []
    for f in range(len(there)):
        if tick:
            tick(f)
        now, then = pictures[f : f + 2].float().split(1)
        one, other = there[f : f + 1], back[f : f + 1]
        for start, end, step, way in ((now, then, one, other), (then, now, other, one)):
            home = returned(step, way)
            kept.append(home)
            gaps.append(colour_gap(start, warped(end, step), home))
    gap, home = (torch.cat(part).unflatten(0, (-1, 2)) for part in (gaps, kept))
    usual = float(gap.median())
    gap /= min(max(3 * usual, COLOUR[0]), COLOUR[1])
    sure = home * torch.exp(-gap.square())
    return sure[:, 0], sure[:, 1]


# --- OpenCV's flow --------------------------------------------------------------------------------

SOFTNESS = 0.05
"""Share of the picture's shorter side over which brightness and contrast are evened out."""
FLAT = 0.1
"""Contrast (0..1) that is halved by it: noise of flat parts must not become their texture."""
LEVEL = 0.25
"""Contrast that strong texture gets."""
FINE = 1 << 17
"""Pixels of a picture up to which flow is sought at full size; larger ones at half."""


def _bytes(grey: Tensor) -> np.ndarray:  # 0..1
    return (grey * 255).round().clamp(0, 255).byte().cpu().numpy()


def _dis(now: np.ndarray, then: np.ndarray, dis) -> Tensor:  # [h, w] bytes twice -> [2, h, w]
    return torch.from_numpy(dis.calc(now, then, None)).movedim(-1, 0)


def flow_both_ways(pictures: Tensor, cv2) -> tuple[Tensor, Tensor]:
    """OpenCV's DIS flow of one view's pictures [F, 3, h, w], forwards and backwards [F - 1, 2, h, w]."""
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = _bytes(pictures.mean(1))
    pairs = list(zip(grey[:-1], grey[1:], strict=True))
    there = torch.stack([_dis(a, b, dis) for a, b in pairs])
    back = torch.stack([_dis(b, a, dis) for a, b in pairs])
    return there.to(pictures), back.to(pictures)


def evened(pictures: Tensor) -> Tensor:  # [F, 3, h, w] 0..1 -> [F, h, w] around 0.5
    """Grey with the same brightness and contrast everywhere and in all frames."""
    grey = pictures.float().mean(1, keepdim=True)
    sigma = SOFTNESS * min(grey.shape[-2:])
    away = grey - blurred(grey, sigma)
    contrast = blurred(away.square(), sigma).sqrt()
    return (0.5 + LEVEL * away / (contrast + FLAT))[:, 0]


def blurred(pictures: Tensor, sigma: float) -> Tensor:  # [F, 1, h, w]
    """By a Gaussian, wide ones on smaller pictures; the border is repeated outwards."""
    h, w = pictures.shape[-2:]
    shrink = max(1, int(sigma / 4))
    small = F.interpolate(pictures, (-(-h // shrink), -(-w // shrink)), mode="area")
    smooth = gaussian(small[:, 0], sigma / shrink)[:, None]
    return F.interpolate(smooth, (h, w), mode="bilinear", align_corners=False)


# --- what stands still ----------------------------------------------------------------------------

AROUND = 2
"""Frames before and after one whose differences are looked at together."""
REACH = 0.025
"""The same in the picture, as a share of its shorter side."""
DOUBT, NOISE = 0.1, 0.7
"""By how much of what is left along the flow, there and usually, standing still may be worse."""
CUT = 4.0
"""Frames this many times worse linked than usual are not asked: a cut lies between."""


def standing(
    grey: Tensor,  # [F, H, W] evened
    there: Tensor,  # [F - 1, 2, H, W]
    back: Tensor,
    tick: Callable[[int], None] | None = None,
) -> Tensor:  # [F, H, W] bool
    """Where pictures tell of no motion: they differ no more without the flow than along it.

    Over two frames, because flow between neighbours fits their noise, and matched noise makes still
    parts crawl; the flow of two steps was never fitted to the pair that it joins. With noise in all
    frames (what is usually left along the flow) more is taken as still: there is nothing to see."""
    count = len(grey)
    found = torch.zeros_like(grey, dtype=torch.bool)
    if count < 3:
        return found
    reach = min(max(5, round(REACH * min(grey.shape[1:]))), 9)
    starts, stills, alongs = [], [], []
    for f in range(count - 2):
        if tick:
            tick(f)
        for start, end, one, two in (
            (f, f + 2, there[f], there[f + 1]),
            (f + 2, f, back[f + 1], back[f]),
        ):
            way = one[None] + warped(two[None], one[None])
            arrived = warped(grey[end, None, None], way)[0, 0]
            starts.append(start)
            stills.append(_around((grey[start] - grey[end]).square(), reach))
            alongs.append(_around((grey[start] - arrived).square(), reach))
    levels = torch.stack([along.mean() for along in alongs])
    asked = (levels <= CUT * levels.median()).tolist()
    still, along = torch.zeros_like(grey), torch.zeros_like(grey)
    for start, use, a, b in zip(starts, asked, stills, alongs, strict=True):
        if use:
            near = slice(max(0, start - AROUND), start + AROUND + 1)
            still[near] += a
            along[near] += b
    usual = float(along.flatten()[:: max(1, along.numel() >> 20)].median())
    return (along > 0) & (still < (1 + DOUBT) * along + NOISE * usual)


def _around(values: Tensor, reach: int) -> Tensor:  # [H, W]
    """The mean of a square; its sides one after the other, which is quicker."""
    size = 2 * reach + 1
    wide = F.avg_pool2d(values[None, None], (1, size), 1, (0, reach), count_include_pad=False)
    return F.avg_pool2d(wide, (size, 1), 1, (reach, 0), count_include_pad=False)[0, 0]


# --- optical flow ---------------------------------------------------------------------------------

SMALLEST = 16
"""Pixels a side: DIS compares patches of 8."""


def check_clip(frames: int, width: int, height: int) -> None:
    """One sentence for a clip in which nothing can move."""
    if frames < 2:
        raise ValueError("There is one frame, but flow is motion between frames: give two or more.")
    if min(width, height) < SMALLEST:
        raise ValueError(
            f"The frames are {width}x{height}, but flow needs at least {SMALLEST} pixels a side: "
            "enlarge them first."
        )


def optical_flow(
    pictures: Tensor,  # [V, F, 3, H, W] 0..1
    on_step: Step | None = None,
) -> Flow:
    """The motion that the pictures show, whatever exposure, colours and grain do meanwhile.

    Every view on its own. Raises ValueError with one frame, tiny pictures, or without OpenCV."""
    V, count, _, H, W = pictures.shape
    check_clip(count, W, H)
    cv2 = opencv("Optical flow", "take the flow of a body or of other nodes, or ")
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    dis.setFinestScale(0 if H * W <= FINE else 1)
    pairs = count - 1
    total = 3 * V * pairs
    parts = []
    for v in range(V):

        def tick(f: int, stage: int, view: int = v) -> None:
            if on_step:
                on_step((3 * view + stage) * pairs + f, total, pictures[view, f])

        grey, there, back = [evened(pictures[v, :1])], [], []
        for f in range(pairs):
            tick(f, 0)
            grey.append(evened(pictures[v, f + 1 : f + 2]))
            now, then = (_bytes(part[0]) for part in grey[-2:])
            there.append(_dis(now, then, dis))
            tick(f, 0)
            back.append(_dis(then, now, dis))
        there, back = (torch.stack(way).to(pictures.device) for way in (there, back))
        still = standing(torch.cat(grey), there, back, lambda f, t=tick: t(f, 1))
        there = torch.where(still[:-1, None], 0.0, there)
        back = torch.where(still[1:, None], 0.0, back)
        sure = how_sure(pictures[v], there, back, lambda f, t=tick: t(f, 2))
        parts.append((there, back, *sure))
    if on_step:
        on_step(total, total)
    return Flow(*(torch.stack(part) for part in zip(*parts, strict=True)))


# --- its picture ----------------------------------------------------------------------------------


def flow_picture(
    flow: Tensor,  # [N, 2, H, W] pixels
    longest: float | None = None,  # pixels that get full colour; None = the longest of the batch
) -> Tensor:  # [N, 3, H, W] 0..1
    """Hue tells where to (right = red, down = yellow-green, left = cyan, up = violet), saturation how
    far; white = still. The longest leaves out the last percent, which is usually wrong."""
    length = flow.norm(dim=1)
    if longest is None:
        some = length.flatten()[:: max(1, length.numel() >> 20)]
        longest = float(some.kthvalue(max(1, math.ceil(0.99 * len(some)))).values)
    strong = (length / max(longest, 0.5)).clamp(max=1)[:, None]
    turn = torch.atan2(flow[:, 1], flow[:, 0]) / math.tau
    shift = torch.tensor([0.0, 2 / 3, 1 / 3], device=flow.device).view(3, 1, 1)
    # A corner of the hexagon of colours: 1 around its own hue, 0 on the other side.
    corner = (turn[:, None] + shift) % 1
    pure = ((corner * 6 - 3).abs() - 1).clamp(0, 1)
    return 1 - strong * (1 - pure)
