"""What the depth shows and nobody wears: floaters found on the pixel grid; what stands still, kept
over time; and how all of it is seen.

Stage: metres -> metres, before the points. At an outline every depth network draws a ramp from the
performer to what is behind; its pixels float between the two in space. A surface goes on from one
pixel to the next: a pixel is in the company of a neighbour when it lies where that neighbour and the
one beyond it would have it. A ramp's pixel has company along the outline, and none across it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .depth import near_is_white
from .geometry import encode_normals
from .points import (
    ERODED,
    FLOATING,
    GRAZING,
    KEPT,
    ONE_SURFACE,
    STEEPEST,
    OrientedPoints,
    Surface,
    erode,
)
from .relief import box
from .views import label_pictures

AROUND = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))
BEND = 0.6
"""Share of the slope by which a surface may leave its own straight continuation in one pixel; at the
rim of a ball the last step is 1.45 of the one before."""
FIRM = 5
"""Of its 8 neighbours, with which a pixel stands firm: at a straight edge it has 5, on a line of
floaters along an edge 2, on a diagonal one 4. Others stay when they join a firm one (corners, tips)."""
BASELINE = 2
"""Pixels to each side over which steepness is measured."""
CHUNK_PIXELS = 1 << 22
"""Pixels worked on at once: about 0.2 GB."""


def floaters(
    depth: Tensor,  # [F, H, W] metres; not finite or <= 0 = unknown
    masks: Tensor,  # [F, H, W] 0..1; outside is nothing
    K: Tensor,  # [3, 3] pixels
) -> Tensor:  # [F, H, W] bool, among the known pixels
    """Pixels that belong to no surface."""
    step = max(1, CHUNK_PIXELS // depth[0].numel())
    return torch.cat([
        _lonely(z, m > 0.5, float(K[0, 0]))
        for z, m in zip(depth.split(step), masks.split(step), strict=True)
    ])  # fmt: skip


def _lonely(depth: Tensor, inside: Tensor, focal: float) -> Tensor:
    known = inside & depth.isfinite() & (depth > 0)
    z = F.pad(torch.where(known, depth, 0.0), (2, 2, 2, 2))
    # A surface steeper than this is dropped as grazing, so it speaks for nobody.
    steepest = depth * STEEPEST / focal
    company = torch.zeros_like(depth, dtype=torch.uint8)  # one bit a direction
    count = torch.zeros_like(company)
    for bit, (dy, dx) in enumerate(AROUND):
        near, far = (_moved(z, n * dy, n * dx) for n in (1, 2))
        slope = near - far
        away = (depth - near).abs()
        straight = (away < ONE_SURFACE * depth) & (away < 2 * steepest * math.hypot(dy, dx))
        goes_on = (depth - near - slope).abs() < ONE_SURFACE * depth + BEND * slope.abs()
        goes_on &= (far > 0) & (slope.abs() < steepest * math.hypot(dy, dx))
        joined = (near > 0) & (straight | goes_on)
        company |= joined.byte() << bit
        count += joined
    firm = known & (count >= FIRM)
    beside = F.pad(firm, (2, 2, 2, 2))
    held = torch.zeros_like(firm)
    for bit, (dy, dx) in enumerate(AROUND):
        held |= (company >> bit & 1).bool() & _moved(beside, dy, dx)
    return known & ~firm & ~held


def smeared(
    depth: Tensor,  # [F, H, W] metres; not finite or <= 0 = unknown
    masks: Tensor,  # [F, H, W] 0..1
    K: Tensor,  # [3, 3] pixels
) -> Tensor:  # [F, H, W] bool, among the known pixels
    """Floaters, and what is too steep over five pixels to be believed: ramps from one surface to
    another, and the last pixels before an edge. For stages that can fill what is taken away; noise
    is not steep over five pixels."""
    known = (masks > 0.5) & depth.isfinite() & (depth > 0)
    z = torch.where(known, depth, 0.0)
    steep = torch.zeros_like(z)
    for dy, dx in ((0, BASELINE), (BASELINE, 0)):
        wide = F.pad(z, (BASELINE,) * 4)
        ends = []
        for sign in (1, -1):
            top, left = BASELINE + sign * dy, BASELINE + sign * dx
            end = wide[:, top : top + z.shape[1], left : left + z.shape[2]]
            ends.append(torch.where(end > 0, end, z))  # one-sided where the other end is unknown
        steps = sum(e != z for e in ends) * BASELINE
        steep += ((ends[0] - ends[1]) / steps.clamp(min=1)).square()
    limit = z * STEEPEST / K[0, 0]
    return known & ((steep > limit.square()) | floaters(depth, masks, K))


def _moved(padded: Tensor, dy: int, dx: int) -> Tensor:
    """The neighbour (dy, dx) of every pixel; `padded` by two pixels."""
    H, W = padded.shape[-2] - 4, padded.shape[-1] - 4
    return padded[:, 2 + dy : 2 + dy + H, 2 + dx : 2 + dx + W]


# ---------------------------------------------------------------- what stands still

STILL = 0.01
"""Share of the depth within which a surface stands still."""
SAME_COLOR = 0.15
"""Largest difference of a channel from the usual colour, for it to be the same thing."""
SEEN_SHARE = 0.3
"""Of the frames, in which a still surface must have been seen."""
PASSED = 0.05
"""Share of the frames that may see past it: more, and it was not there the whole time."""


def accumulate_static(
    cloud: OrientedPoints,
    masks: Tensor,  # [F, H, W] 0..1, of the clip: where it is black, the background is seen
) -> OrientedPoints:
    """What stands still over the clip is filled in where something passes before it.

    For every pixel of the source camera the farthest surface counts, where it keeps depth and colour
    in all frames that show it and hardly a frame sees past it. So a limb that rests and then moves
    leaves no ghost: past it one sees the body or the background. Only a frame in which something
    nearer hides the place, or depth is missing, gets the points of the nearest frame that saw it.
    Needs a camera that stands still.
    """
    count, H, W = masks.shape
    pixel, frame, depth = _source_pixels(cloud, H, W)
    place = frame * H * W + pixel
    seen = cloud.confidences > 0
    z = masks.new_zeros(count * H * W).index_put_((place[seen],), depth[seen])
    colors = masks.new_zeros(count * H * W, 3).index_put_((place[seen],), cloud.colors[seen])
    giver = _givers(z.view(count, -1), colors.view(count, -1, 3), (masks <= 0.5).flatten(1))
    # The points of a pixel, guessed ones behind it too, together.
    order = place.argsort(stable=True)
    held = torch.bincount(place, minlength=count * H * W)
    first = held.cumsum(0) - held
    to_frame, to_pixel = (giver >= 0).nonzero().unbind(1)
    source = giver[to_frame, to_pixel] * H * W + to_pixel
    many = held[source]
    step = torch.arange(int(many.sum()), device=many.device)
    step = step - (many.cumsum(0) - many).repeat_interleave(many)
    added = order[first[source].repeat_interleave(many) + step]
    chosen = torch.cat([torch.arange(len(frame), device=frame.device), added])
    frame = torch.cat([frame, to_frame.repeat_interleave(many)])
    offsets = F.pad(torch.bincount(frame, minlength=count).cumsum(0), (1, 0))
    return cloud.select(chosen[frame.argsort(stable=True)], offsets)


def _source_pixels(cloud: OrientedPoints, H: int, W: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixel number, frame and depth of every point in the camera that saw it."""
    at = cloud.in_source(W, H)
    x, y = ((at[:, i] / at[:, 2]).floor().long() for i in (0, 1))
    return y.clamp(0, H - 1) * W + x.clamp(0, W - 1), cloud.frame_numbers(), at[:, 2]


def _givers(
    z: Tensor,  # [F, P] metres; 0 = no point
    colors: Tensor,  # [F, P, 3]
    past: Tensor,  # [F, P] bool: the background is seen
) -> Tensor:  # [F, P] int64: frame to take the points from; -1 = none needed or none fit
    count = len(z)
    far = z.amax(0)
    near_far = (z > far * (1 - STILL)) & (z > 0)
    shows = near_far.sum(0)
    usual = (colors * near_far[..., None]).sum(0) / shows.clamp(min=1)[:, None]
    same = near_far & ((colors - usual).abs().amax(-1) < SAME_COLOR)
    # A share of the frames that show it looks otherwise: the surface moves along its own plane.
    still = (same.sum(0) >= max(2, SEEN_SHARE * count)) & (same.sum(0) >= (1 - PASSED) * shows)
    still &= past.sum(0) <= PASSED * count
    hidden = ~near_far & ~past & still
    frames = torch.arange(count, device=z.device)[:, None]
    before = torch.where(same, frames, -1).cummax(0).values
    after = torch.where(same, frames, 2 * count).flip(0).cummin(0).values.flip(0)
    nearest = torch.where((before >= 0) & (frames - before <= after - frames), before, after)
    return torch.where(hidden & (nearest >= 0) & (nearest < count), nearest, -1)


# ---------------------------------------------------------------- how it is seen

TILE = 288
"""Pixels: the height at which stages are shown."""
MARGIN = 0.08
"""Of the performer's height, left around the performer."""
FATES = {
    KEPT: ("kept", (0.2, 0.75, 0.3)),
    ERODED: ("mask edge", (0.35, 0.55, 1.0)),
    GRAZING: ("seen too flat", (1.0, 0.8, 0.1)),
    FLOATING: ("floater", (1.0, 0.2, 0.25)),
}


def stage_pictures(
    frames: Tensor,  # [F, 3, H, W] 0..1
    masks: Tensor,  # [F, H, W] 0..1
    surface: Surface,
) -> Tensor:  # [F, 3, TILE, 5 w]
    """Every frame from left to right, cut out around the performer: the clip with the mask's
    outline, depth (near is white), its normals, the normals that are kept, and the fate of every
    pixel."""
    white = near_is_white(surface.points[:, 2], surface.known)
    window = _window(masks > 0.5)
    rows = []
    for f in range(len(frames)):
        part = (slice(f, f + 1), ..., *window)
        known, kept = surface.known[part][:, None], (surface.fate[part] == KEPT)[:, None]
        normals = encode_normals(surface.normals[part].movedim(1, -1)).movedim(-1, 1)
        tiles = {
            "mask": _outlined(frames[part], masks[part] > 0.5),
            "depth": white[part][:, None].expand(-1, 3, -1, -1),
            "normals": torch.where(known, normals, 0.5),
            "normals kept": torch.where(kept, normals, 0.5),
        }
        shown = [label_pictures(_tile(t).cpu(), [name]) for name, t in tiles.items()]
        rows.append(torch.cat([*shown, _fate_picture(surface.fate[part])], 3))
    return torch.cat(rows)


def _window(inside: Tensor) -> tuple[slice, slice]:  # rows, columns
    """Where the performer is in any frame, with a margin."""
    rows, columns = box(inside)
    margin = max(2, round(MARGIN * (rows.stop - rows.start)))
    return tuple(slice(max(0, s.start - margin), s.stop + margin) for s in (rows, columns))


def _tile(pictures: Tensor) -> Tensor:
    h, w = pictures.shape[-2:]
    size = (TILE, max(TILE // 3, round(TILE * w / h)))
    return F.interpolate(pictures, size=size, mode="area" if h > TILE else "nearest-exact")


def _fate_picture(fate: Tensor) -> Tensor:  # [1, h, w] -> [1, 3, TILE, w]
    """What became of every pixel, and what the colours mean."""
    palette = torch.zeros(max(FATES) + 1, 3)
    for number, (_, color) in FATES.items():
        palette[number] = palette.new_tensor(color)
    picture = _tile(palette[fate.long().cpu()].movedim(-1, 1))
    for line, (name, color) in enumerate(FATES.values()):
        below = picture[..., line * TILE // 14 :, :]
        words = label_pictures(torch.zeros_like(below), [name]) / 0.65
        below.copy_(torch.maximum(below, words * below.new_tensor(color)[:, None, None]))
    return picture


def _outlined(frames: Tensor, inside: Tensor) -> Tensor:
    """A line along the mask's edge, thick enough to be seen when shrunk."""
    line = inside & ~erode(inside, max(1, round(frames.shape[-2] / TILE)))
    return torch.where(line[:, None], frames.new_tensor([1.0, 0.1, 0.9])[:, None, None], frames)
