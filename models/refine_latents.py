"""MV-Opt in latent space: views made to agree while they are sampled, and finished pictures brought
back into latents.

Stage: inside the sampler, on the predicted clean latents (`agreed`), and between refiner and decoder
(`brought_back`). MVAnimate, Sec. IV-C, refines finished frames and does not say in which space; this
is its multi-view term L_mvS on the latents of co-visible surface, found through depth and cameras.

Departure from the paper: only the slow part of a correction (the mean of 3 x 3 latent pixels) is
applied. The mean of views that are warped at an eighth of the resolution is a blur; its slow part
is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import Rig, project
from .points import ONE_SURFACE, unproject_depth
from .views import LATENT_STRIDE, snap_frames, snap_size

OnStep = Callable[[int, int], None]

# --- which latent pixels show the same surface ----------------------------------------------------

COVERED = 0.25
"""Share of a latent pixel's square that the performer must fill for it to have a depth."""
TOLERANCE = 0.6
"""By how much two cameras' depths of one place may differ: share of what a latent pixel covers
there, for the surface rises within it; and never less than ONE_SURFACE, which is noise."""
STRIDE = 8
"""Pixels along a latent pixel, where nothing says more."""
CHUNK_PIXELS = 1 << 23
"""Depth pixels of all views that are looked at together: about 0.3 GB."""


@dataclass(frozen=True)
class Pair:
    """The latent pixels of one view whose surface another view shows as well."""

    at: Tensor
    """[n] int32: place in the view's own T h w, rising; every place at most once."""
    corner: Tensor
    """[n] int32: place in the other view's T h w, the upper left of the four that are read."""
    within: Tensor
    """[n, 2] float32, x and y, 0..1: where between the four."""
    share: Tensor
    """[n] float32, 0..1: how much of both latent pixels is surface."""

    def to(self, device: torch.device) -> Pair:
        return Pair(*(t.to(device) for t in (self.at, self.corner, self.within, self.share)))


@dataclass(frozen=True)
class Correspondences:
    """Where the surface behind every latent pixel is seen by other views, at the same moment."""

    pairs: dict[tuple[int, int], Pair]
    """By view and other view; only pairs that share anything."""
    cover: Tensor
    """[V, T, h, w] float32, 0..1: how much of every latent pixel is surface."""
    order: tuple[int, ...]
    """The views from front to back."""

    @property
    def shared(self) -> float:
        """Share of the performer's latent pixels that another view sees, too."""
        twice = torch.zeros(self.cover.shape, dtype=torch.bool)
        for (view, _), pair in self.pairs.items():
            twice[view].view(-1)[pair.at.cpu().long()] = True
        surface = self.cover.cpu() >= COVERED
        return float((twice & surface).sum()) / max(1, int(surface.sum()))

    def to(self, device: torch.device) -> Correspondences:
        pairs = {key: pair.to(device) for key, pair in self.pairs.items()}
        return replace(self, pairs=pairs, cover=self.cover.to(device))


@dataclass(frozen=True)
class LatentGrid:
    """How the latents of one view lie in its pictures."""

    frames: int
    """Latent frames."""
    height: int
    width: int
    stride: int
    """Pixels along a latent pixel."""
    per_frame: int = LATENT_STRIDE
    """Pictures that a latent frame after the first holds; 1 = frame by frame."""

    @property
    def pictures(self) -> int:
        return self.per_frame * (self.frames - 1) + 1

    def picture_of(self, frame: int) -> int:
        """The picture in the middle of what a latent frame holds."""
        return 0 if frame == 0 else self.per_frame * frame - self.per_frame // 2


def front_to_back(rig: Rig) -> tuple[int, ...]:
    """Views by their angle to the source camera; of two at one angle, the one at negative azimuth.

    Rounded to a tenth of a degree, so that neither rounding nor the order of the batch decides.
    """
    centers = F.normalize(rig.centers.double().cpu(), dim=1)
    angles = torch.rad2deg(torch.arccos((-centers[:, 2]).clamp(-1, 1)))
    sides = zip(angles.tolist(), rig.azimuths.tolist(), rig.elevations.tolist(), strict=True)
    keys = [
        (round(a, 1), round(math.degrees(z), 1), round(math.degrees(e), 1)) for a, z, e in sides
    ]
    return tuple(sorted(range(len(rig)), key=lambda v: keys[v]))


def _at_size(depth: Tensor, width: int, height: int) -> Tensor:  # [N, H, W] -> [N, height, width]
    """Depth as `views.resize_frames` treats pictures, but by the nearest pixel: depth must not be
    mixed with what lies behind."""
    H, W = depth.shape[-2:]
    if (width, height) == (W, H):
        return depth
    scale = max(width / W, height / H)
    size = (max(height, round(H * scale)), max(width, round(W * scale)))
    scaled = F.interpolate(depth[:, None], size=size, mode="nearest-exact")[:, 0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return scaled[..., top : top + height, left : left + width]


@dataclass(frozen=True)
class _Surface:
    """What the latent pixels of all views show, during some latent frames."""

    depth: Tensor
    """[V, t, H, W] metres, of one picture a latent frame; 0 = nothing."""
    cover: Tensor
    """[V, t, h, w] 0..1."""
    points: Tensor
    """[V, t, h, w, 3] world: the middle of the surface within; of pixels that are covered enough."""


def _surface(
    depth: Tensor,  # [V, t, H, W] metres
    rig: Rig,  # of these pictures
    stride: int,
) -> _Surface:
    V, t, H, W = depth.shape
    points = torch.stack([unproject_depth(d, K) for d, K in zip(depth, rig.K, strict=True)])
    known = (depth > 0)[:, :, None].to(depth)
    squares = F.avg_pool2d((points * known).flatten(0, 1), stride).unflatten(0, (V, t))
    cover = F.avg_pool2d(known.flatten(0, 1), stride).unflatten(0, (V, t))
    middle = (squares / cover.clamp(min=1e-6)).movedim(2, -1)
    R, offset = rig.T_camera_world[:, :3, :3], rig.T_camera_world[:, :3, 3]
    world = torch.einsum("vthwc,vcd->vthwd", middle - offset[:, None, None, None], R)
    return _Surface(depth, cover[:, :, 0], world)


def _pair(
    surface: _Surface,
    rig: Rig,
    pair: tuple[int, int],
    first: int,  # latent frame of the clip that the surface begins with
    stride: int,
) -> Pair:
    """What one view shows and another one sees as well: move, project, compare with its depth."""
    view, other = pair
    cover, there = surface.cover[view], surface.cover[other]
    t, h, w = cover.shape
    at = (cover.reshape(-1) >= COVERED).nonzero()[:, 0]
    pixels, far = (
        x[0] for x in project(surface.points[view].reshape(-1, 3)[at], rig.select([other]))
    )
    H, W = surface.depth.shape[-2:]
    x, y = pixels.unbind(-1)
    frame = at // (h * w)
    seen = (far > 0) & (x >= 0) & (y >= 0) & (x < W) & (y < H)
    column, row = (p.nan_to_num().clamp(0, n - 1).long() for p, n in ((x, W), (y, H)))
    depth = surface.depth[other][frame, row, column]
    tolerance = max(ONE_SURFACE, TOLERANCE * stride / float(rig.K[other, 1, 1]))
    seen &= (depth > 0) & ((depth - far).abs() < tolerance * far)
    at, frame, x, y = (values[seen] for values in (at, frame, x, y))
    # Latent pixels have their centres at + 0.5, too.
    corner, within = _between(x / stride - 0.5, y / stride - 0.5, w, h)
    found = Pair(at.int(), (frame * h * w + corner).int(), within, torch.ones_like(x))
    share = cover.reshape(-1)[at] * _read(there[None], found)[0]
    moved = first * h * w
    return replace(found, at=found.at + moved, corner=found.corner + moved, share=share)


def _between(
    x: Tensor,  # [n], 0 = centre of the first column
    y: Tensor,
    w: int,
    h: int,
) -> tuple[Tensor, Tensor]:  # [n] place of the upper left in h w, [n, 2] 0..1
    """Between which four a place lies; the border is repeated outwards."""
    x, y = x.clamp(0, w - 1), y.clamp(0, h - 1)
    column, row = x.long().clamp(max=max(0, w - 2)), y.long().clamp(max=max(0, h - 2))
    return row * w + column, torch.stack([x - column, y - row], dim=-1)


def _read(
    values: Tensor,  # [C, T, h, w] of the other view
    pair: Pair,
) -> Tensor:  # [C, n]
    """Bilinear, where the surface is."""
    h, w = values.shape[-2:]
    flat, corner = values.flatten(1), pair.corner.long()
    right, down = (1 if w > 1 else 0), (w if h > 1 else 0)
    x, y = pair.within.to(values).unbind(-1)
    upper = torch.lerp(flat[:, corner], flat[:, corner + right], x)
    lower = torch.lerp(flat[:, corner + down], flat[:, corner + down + right], x)
    return torch.lerp(upper, lower, y)


def correspond(
    depth: Tensor,  # [V, F, H, W] metres along the optical axis; 0 = nothing
    rig: Rig,
    grid: LatentGrid,
    on_step: OnStep | None = None,
) -> Correspondences:
    """Which latent pixels of all views show the same surface, from the depth of one picture each."""
    V, (width, height) = len(rig), (grid.width * grid.stride, grid.height * grid.stride)
    rig = _on(rig.filled(width, height), depth.device)
    frames = [grid.picture_of(t) for t in range(grid.frames)]
    chunk = max(1, CHUNK_PIXELS // (V * width * height))
    parts: dict[tuple[int, int], list[Pair]] = {}
    covers = []
    for first in range(0, grid.frames, chunk):
        chosen = depth[:, frames[first : first + chunk]].float()
        chosen = torch.where(chosen.isfinite() & (chosen > 0), chosen, 0.0)
        chosen = torch.stack([_at_size(view, width, height) for view in chosen])
        surface = _surface(chosen, rig, grid.stride)
        covers.append(surface.cover)
        for pair in ((a, b) for a in range(V) for b in range(V) if a != b):
            found = _pair(surface, rig, pair, first, grid.stride)
            if len(found.at):
                parts.setdefault(pair, []).append(found)
        if on_step:
            on_step(min(first + chunk, grid.frames), grid.frames)
    pairs = {
        key: Pair(*(torch.cat([getattr(p, n) for p in found]) for n in Pair.__annotations__))
        for key, found in parts.items()
    }
    return Correspondences(pairs, torch.cat(covers, 1), front_to_back(rig))


def _on(rig: Rig, device: torch.device) -> Rig:
    return replace(rig, K=rig.K.to(device), T_camera_world=rig.T_camera_world.to(device))


def grid_of(
    latent: tuple[int, int, int],  # T, h, w
    depth: Tensor,  # [V, F, 1, H, W]
    per_frame: int = LATENT_STRIDE,  # pictures a latent frame
) -> LatentGrid:
    """How latents lie in the pictures that the depth is of; one sentence where they don't."""
    T, h, w = latent
    count, _, H, W = depth.shape[1:]
    width, height = snap_size(W, H)
    if width * h == height * w and width % w == 0:
        stride = width // w
    elif W * h == H * w:  # pictures of another size, but of the same shape
        stride = STRIDE
    else:
        raise ValueError(
            f"The latent is {w}x{h} latent pixels (of 8 or 16 pixels each), but 'depth' is {W}x{H}: "
            "connect 'rig' and 'depth' of the Render Conditions that the latent was made from."
        )
    grid = LatentGrid(T, h, w, stride, per_frame)
    if count < T if per_frame == 1 else snap_frames(count) != grid.pictures:
        raise ValueError(
            f"The latent has {T} latent frames, that is {grid.pictures} pictures, but 'depth' "
            f"{count}: connect 'rig' and 'depth' of the Render Conditions that the latent was made "
            "from."
        )
    return grid


# --- agreement of the views -----------------------------------------------------------------------


def _slow(change: Tensor, where: Tensor) -> Tensor:  # [C, T, h, w], [T, h, w]
    """The mean of the change over 3 x 3 latent pixels, as far as they have one.

    It leaves every view its own finest pattern and a little more, which makes up for what the mean
    of views takes: kernels that only smooth made pictures agree more and lose a tenth of their detail.
    """

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, 3, stride=1, padding=1)

    return mean(change * where) / mean(where[None]).clamp(min=1e-3)


def _step(
    latents: Tensor,  # [V, C, T, h, w] as they are now
    view: int,
    found: Correspondences,
    strength: float,
    weights: Tensor,  # [V]
) -> Tensor:  # [C, T, h, w]: the view's change
    """One block of the descent: sum_b w_b s_ab (x_b warped to a - x_a) / (w_a c_a / strength +
    sum_b w_b s_ab), slow part. That is the minimum over x_a of sum_b w_b s_ab |x_b - x_a|² +
    w_a c_a / strength |x_a - what it was|², s the surface that both show and c the own one."""
    own = latents[view]
    cover = found.cover[view].to(own)
    pull, total = own.new_zeros(own.shape), own.new_zeros(cover.shape)
    for other in range(len(latents)):
        pair = found.pairs.get((view, other))
        if pair is None:
            continue
        at, share = pair.at.long(), pair.share.to(own) * weights[other]
        away = _read(latents[other], pair) - own.flatten(1)[:, at]
        # Every place occurs once, so this is no sum whose order a GPU could change.
        pull.view(len(own), -1)[:, at] += away * share
        total.view(-1)[at] += share
    change = pull / (total + weights[view] / strength * cover).clamp(min=1e-6)
    return _slow(change, (total > 0) * cover) * (cover > 0)


def agreed(
    latents: Tensor,  # [V, C, T, h, w]
    found: Correspondences,
    strength: float,  # 0 = off; 1 = a view counts for itself as much as any other
    weights: Tensor | None = None,  # [V] above 0: how much every view counts
) -> Tensor:
    """One sweep: the views, front to back, each pulled towards what the others show of its surface.

    Views that came before are seen as they are by now. A second sweep gains nothing where the next
    sampling step sweeps again.
    """
    # A view that has become no number would take the others with it.
    if strength == 0 or not found.pairs or not latents.isfinite().all():
        return latents
    weights = latents.new_ones(len(latents)) if weights is None else weights.to(latents)
    result = latents.clone()
    for view in found.order:
        result[view] += _step(result, view, found, strength, weights)
    return result


# --- pictures back into latents -------------------------------------------------------------------

HALVINGS = 5
"""Of a step that would raise the loss, before the search ends."""
ENOUGH = 1e-4
"""Share of what the gradient promises by which the loss must fall (Armijo)."""


@dataclass(frozen=True)
class BroughtBack:
    """Latents that decode to given pictures."""

    latents: Tensor
    history: tuple[float, ...]
    """The loss: of the latents as they came, of the start, after every step; it never rises."""


def brought_back(
    latents: Tensor,  # of one view, z0
    pictures: Tensor,  # [F, 3, H, W] 0..1, y
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],  # with gradients, where steps are taken
    steps: int,
    fidelity: float,
    on_step: Callable[[int], None] | None = None,
) -> BroughtBack:
    """Latents z with a small |D(z) - y|² + fidelity |z - z0|², means over all numbers.

    The start is z0 + E(y) - E(D(z0)): what encoding and decoding lose on both is taken out, so that
    pictures that nobody changed come back as the very same latents. Then gradient descent, halving
    every step until the loss falls.
    """

    def loss(z: Tensor) -> Tensor:
        return (decode(z) - pictures).square().mean() + fidelity * (z - latents).square().mean()

    with torch.no_grad():
        shown = decode(latents)
        _check_same(pictures, shown)
        value = float((shown - pictures).square().mean())
        history = [value]
        z, value = _lowered(loss, latents, encode(pictures) - encode(shown), value, 0.0)
    history.append(value)
    size = None
    for done in range(steps):
        if on_step:
            on_step(1 + done)
        gradient = _gradient(loss, z)
        steepness = float(gradient.square().sum())
        if steepness == 0:
            break
        # As if the loss could become 0; later, twice what last time was right.
        size = value / steepness if size is None else 2 * size
        with torch.no_grad():
            new, lower = _lowered(loss, z, -size * gradient, value, ENOUGH * size * steepness)
        if lower == value:
            break
        size *= float((new - z).norm()) / (size * steepness**0.5)
        z, value = new, lower
        history.append(value)
    return BroughtBack(z, tuple(history))


def _check_same(pictures: Tensor, shown: Tensor) -> None:  # [F, 3, H, W]
    def words(frames: Tensor) -> str:
        return f"{len(frames)} frames of {frames.shape[-1]}x{frames.shape[-2]}"

    if pictures.shape != shown.shape:
        raise ValueError(
            f"'views' have {words(pictures)}, but 'latent' decodes to {words(shown)}: connect the "
            "views that were decoded from this latent and refined, at their own size."
        )


def _gradient(loss: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    # Nodes run in inference mode, where nothing has a gradient.
    with torch.inference_mode(False), torch.enable_grad():
        variable = z.detach().clone().requires_grad_()
        return torch.autograd.grad(loss(variable), variable)[0]


def _lowered(
    loss: Callable[[Tensor], Tensor],
    z: Tensor,
    change: Tensor,
    value: float,  # the loss at z
    enough: float,  # by which the whole change must lower it
) -> tuple[Tensor, float]:
    """z with as much of the change as lowers the loss, and the loss there; z itself if nothing does."""
    for halving in range(HALVINGS if change.any() else 0):
        part = 0.5**halving
        new = z + part * change
        lower = float(loss(new))
        if lower < value - part * enough:
            return new, lower
    return z, value
