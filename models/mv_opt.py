"""MV-Opt: views that disagree, flicker and shake are made to agree, without blurring them.

Stage: VIEWS + RIG -> VIEWS, after sampling (MVAnimate, Sec. IV-C). What is compared with what is in
mv_opt_links.py, the objective in mv_opt_objective.py, the descent in mv_opt_steps.py, the losses as
published in mv_opt_paper.py. Here: what is known about the views, and the fields put to use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import Rig
from .filters import gaussian, grown
from .flow import flow_both_ways
from .mv_opt_links import (
    STANDING,
    Link,
    across_views,
    bends,
    casts_of,
    drift_of,
    outline_shifts,
    over_time,
    spread,
)  # fmt: skip
from .mv_opt_objective import (
    Fields,
    History,
    Problem,
    Settings,
    Window,
    moved,
    window_around,
)  # fmt: skip
from .mv_opt_steps import minimise
from .pose import Pose, project
from .relief import mask_from_plain_background, opencv
from .silhouettes import NEEDED, depth_from_silhouettes
from .views import Views, as_pictures, grid_picture

Step = Callable[..., None]
"""Called with done, total and, now and then, a preview [3, h, w]."""

PLAIN = 0.03
"""Mean difference from its middle colour up to which a background is plain."""
FEWEST_KEYPOINTS = 8
"""Sightings over the clip without which a view's keypoints tell nothing."""
USUAL_SHAKE = 1.5
"""Times what the keypoints of the middle view shake by: so far a reader's own error goes, which moves
all keypoints of a picture together."""
SURE = 0.3
"""Confidence from which a keypoint counts."""
FEATHER = 2.0
"""Pixels over which a correction of the performer alone fades."""


@dataclass(frozen=True)
class Refined:
    """What comes out of `refine`."""

    frames: Tensor
    """[V, F, 3, H, W] 0..1."""
    history: History
    notes: tuple[str, ...]
    """What was left out, and why."""


@dataclass(frozen=True)
class Known:
    """The views as the refiner takes them."""

    frames: Tensor
    """[V, F, 3, H, W] 0..1, finite."""
    rig: Rig | None
    depth: Tensor | None
    """[V, F, H, W] metres, 0 = nothing."""
    masks: Tensor
    """[V, F, H, W] bool."""
    notes: tuple[str, ...]


def paper_order(rig: Rig | None, views: int) -> list[int]:
    """The front view first, then front to back, by the angle to the first camera."""
    if rig is None:
        return list(range(views))
    eyes = F.normalize(rig.centers.double(), dim=1)
    return torch.argsort(-(eyes @ eyes[0]), stable=True).tolist()


def refine(
    views: Views,
    depth: Tensor | None,  # [V, F, H, W] metres, 0 = nothing
    pose: Pose | None,
    weights: Tensor | None,  # [V] as View Weights gives them
    settings: Settings,
    on_step: Step | None = None,
) -> Refined:
    """Views whose colours, places and outlines agree better, over time and with each other."""
    total, shown = settings.sweeps * views.frames.shape[1], [-1]

    def at(done: int) -> Step:
        """Before and after the descent: nothing new to show, but the cancel button counts."""
        return (lambda *_: on_step(done, total)) if on_step else lambda *_: None

    tick, finish = at(0), at(total)
    known = _known(views, depth, tick)
    notes = list(known.notes)
    V, count = known.frames.shape[:2]
    inside = known.depth > 0 if known.depth is not None else known.masks
    if not inside.any():
        notes.append("nobody was found in any view, so nothing was refined")
        return Refined(known.frames, History(), tuple(notes))
    window = window_around(inside)
    problem = _problem(known, window, inside, pose, weights, settings, notes, tick)
    order, history = paper_order(known.rig, V), History()

    def step(sweep: int, f: int) -> None:
        if on_step is None:
            return
        done = sweep * count + f
        new = done != shown[0]
        shown[0] = done
        on_step(done, total, _preview(problem, f) if new else None)

    minimise(problem, order, history, step)
    frames = _drawn(known, problem, window, inside, finish)
    finish()
    return Refined(frames, history, tuple(notes))


def _preview(problem: Problem, f: int) -> Tensor:
    V = len(problem.pictures)
    shown = [problem.picture((v, f), problem.fields[v, f]) for v in range(V)]
    return grid_picture(torch.stack(shown)).clamp(0, 1)


# --- what is known --------------------------------------------------------------------------------


def _known(views: Views, depth: Tensor | None, tick: Step) -> Known:
    frames, notes = as_pictures(views), []
    frames, lost = _without_gaps(frames)
    if lost:
        names = ", ".join(f"view {v} frame {f}" for v, f in lost[:6])
        notes.append(f"NaN in {names}: the nearest good frame stands in")
    masks = views.masks > 0.5 if views.masks is not None else None
    rig = views.rig
    if rig is None or len(views) < 2:
        what = "one view" if len(views) < 2 else "no rig"
        notes.append(
            f"{what}: only colours over time are steadied, nothing is compared across views"
        )
        depth = None
    elif depth is None:
        if masks is None and _plain(frames):
            masks = torch.stack([mask_from_plain_background(f) for f in frames]).to(frames) > 0.5
            notes.append("no masks: the performer was found before the plain background")
        if masks is not None and len(views) >= NEEDED:
            depth = depth_from_silhouettes(masks.float(), rig, tick)
            notes.append("no depth: shape from the outlines")
        else:
            notes.append(
                f"no depth, and no masks of {NEEDED} views to guess it from: only colours over time "
                "are steadied"
            )
    if depth is not None:
        depth = torch.where(depth.isfinite() & (depth > 0), depth.float(), 0.0)
    if masks is None:
        masks = (
            depth > 0 if depth is not None else torch.ones_like(frames[:, :, 0], dtype=torch.bool)
        )
    return Known(frames, rig, depth, masks, tuple(notes))


def _without_gaps(frames: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
    """NaN or infinite frames replaced by the view's nearest good one; which they were."""
    good = frames.isfinite().flatten(2).all(2)
    lost = [(int(v), int(f)) for v, f in (~good).nonzero()]
    if not lost:
        return frames, []
    frames = frames.clone()
    for v, f in lost:
        whole = good[v].nonzero()[:, 0]
        if len(whole):
            frames[v, f] = frames[v, whole[(whole - f).abs().argmin()]]
        else:
            frames[v, f] = frames[v, f].nan_to_num(0.5, 1.0, 0.0).clamp(0, 1)
    return frames, lost


def _plain(frames: Tensor) -> bool:
    """Whether the borders of all pictures have one colour each."""
    edge = torch.cat([frames[..., :2, :].flatten(-2), frames[..., :, :2].flatten(-2),
                      frames[..., :, -2:].flatten(-2)], -1)  # fmt: skip
    return float((edge - edge.median(-1, keepdim=True).values).abs().mean((2, 3)).amax()) < PLAIN


def _problem(
    known: Known,
    window: Window,
    inside: Tensor,
    pose: Pose | None,
    weights: Tensor | None,
    settings: Settings,
    notes: list[str],  # added to
    tick: Step,
) -> Problem:
    """What is compared with what, and how much each of it is believed."""
    V, count = known.frames.shape[:2]
    small = torch.stack([_shrunk(window, f) for f in known.frames])
    solid = torch.stack([_nearest(window, m.float()) for m in inside]) > 0.5
    rig = window.rig(known.rig) if known.rig is not None else None
    near = None
    links, curves, flows = [], [], []
    if known.depth is not None:
        near = torch.stack([_nearest(window, d) for d in known.depth])
        links = across_views(near, rig, settings.chunk, tick) if settings.surface else []
        if settings.surface and not links:
            notes.append("no two views see the same surface: nothing is compared across views")
    shaken = _shaken(pose, window, rig, settings, notes)
    drift = _drift(small, solid, shaken, rig, settings, tick)
    if settings.temporal and count > 1:
        cv2 = opencv("'temporal' follows motion, which", "set it to 0, or ")
        for v in range(V):
            tick()
            flows.append(flow_both_ways(small[v], cv2))
            links += over_time(*flows[v], solid[v], v)
        if near is not None:
            curves = bends(flows, solid, near, rig, drift, tick)
    empty = [v for v in range(V) if not inside[v].any()]
    if empty:
        notes.append(f"nobody in views {empty}: they stay as they are")
    trust = torch.ones(V) if weights is None else weights / weights.mean()
    casts = casts_of(small, links)
    texture = _texture_fits(small, links, trust.to(small), casts, settings, tick)
    if not texture and any(not link.over_time for link in links):
        notes.append("moving pictures would hardly make texture fit better: across views, colours "
                     "alone are compared")  # fmt: skip
    return Problem(
        small, links, curves, drift, solid, trust.to(small), casts, settings, texture
    )  # fmt: skip


FITS = 0.27
"""Share of the texture's differences across views that moving pictures must take away: with good
geometry most goes when pictures stand wrongly; where geometry is what errs, moving helps little."""
PROBES = 3
"""Moments at which that is tried."""


def _texture_fits(
    small: Tensor, links: list[Link], trust: Tensor, casts: Tensor, settings: Settings, tick: Step
) -> bool:
    """Whether texture tells where pictures belong, tried on a few moments of the clip."""
    count = small.shape[1]
    chosen = torch.linspace(0, count - 1, min(PROBES, count)).round().long().tolist()
    tried = [k for k in links if not k.over_time and k.here[1] in chosen]
    if not tried:
        return False
    nothing = small.new_zeros(*small.shape[:2], 2)
    solid = small.new_zeros(*small.shape[:2], *small.shape[-2:], dtype=torch.bool)
    alone = replace(settings, temporal=0.0, pose=0.0, iterations=4, sweeps=1)
    probe = Problem(small, tried, [], nothing, solid, trust, casts, alone)
    before = probe.texture()
    minimise(probe, list(range(len(small))), History(), tick)
    return before > 0 and probe.texture() < (1 - FITS) * before


def _drift(
    small: Tensor,
    solid: Tensor,
    shaken: Tensor | None,
    rig: Rig | None,
    settings: Settings,
    tick: Step = lambda: None,
) -> Tensor:
    """[V, F, 2] by how many pixels the whole performer shakes: from its outline against that of the
    geometry where the background is plain, else from keypoints, as far as views differ there."""
    drift = small.new_zeros(*small.shape[:2], 2)
    if not settings.pose or rig is None:
        return drift
    usual = STANDING
    if shaken is not None:
        sizes = shaken.square().sum(2).nanmean(1).sqrt().nan_to_num()
        usual = max(usual, USUAL_SHAKE * float(sizes.median()))
    for v in range(len(small)):
        tick()
        alpha = silhouette(small[v], solid[v])
        if alpha is not None:
            drift[v] = drift_of(outline_shifts(alpha, solid[v].float()))
        elif shaken is not None:
            drift[v] = drift_of(shaken[v], usual)
    return drift


def _shaken(
    pose: Pose | None, window: Window, rig: Rig | None, settings: Settings, notes: list[str]
) -> Tensor | None:  # [V, F, 2] pixels of the window, NaN where not known
    """How far a view's keypoints lie together from the projections of the moving performer, beyond
    what each always does (that is the reader's error); why they are not used is noted."""
    if pose is None or not settings.pose or rig is None:
        return None
    if pose.pixels is None:
        notes.append("'pose' holds no places in the pictures, so its keypoints are not used")
        return None
    sure = pose.sure * pose.found
    known = sure > SURE
    if not known.any():
        notes.append("all keypoints of 'pose' have zero confidence, so they are not used")
        return None
    corner = pose.pixels.new_tensor([window.left, window.top])
    away = (pose.pixels - corner) * window.scale - project(pose.points, rig).to(pose.pixels)
    known &= away.isfinite().all(-1) & (known.sum((1, 2)) >= FEWEST_KEYPOINTS)[:, None, None]
    away = torch.where(known[..., None], away, torch.nan)
    away = torch.where(known[..., None], away - away.nanmedian(1, keepdim=True).values, 0.0)
    weight = torch.where(known, sure, 0.0)[..., None]
    return (away * weight).sum(2) / weight.sum(2)


def silhouette(
    pictures: Tensor, solid: Tensor
) -> Tensor | None:  # [F, 3, h, w], [F, h, w] -> [F, h, w]
    """The performer as far as a plain background tells; None where it is not plain."""
    far = grown(solid.float(), 6) == 0
    found = []
    for picture, away in zip(pictures, far, strict=True):
        outside = picture[:, away]
        if outside.shape[1] < 50:
            return None
        middle = outside.median(1).values
        if float((outside - middle[:, None]).abs().mean(0).quantile(0.8)) > PLAIN:
            return None
        difference = (picture - middle[:, None, None]).square().sum(0)
        found.append(1 - torch.exp(-difference / (2 * 0.05**2)))
    return torch.stack(found)


def _shrunk(window: Window, pictures: Tensor) -> Tensor:  # [F, 3, H, W]
    cut = window.cut(pictures)
    return cut if window.scale == 1 else F.interpolate(cut, window.size, mode="area")


def _nearest(window: Window, maps: Tensor) -> Tensor:  # [F, H, W]
    cut = window.cut(maps)
    if window.scale == 1:
        return cut
    return F.interpolate(cut[:, None], window.size, mode="nearest-exact")[:, 0]


# --- the fields put to use ------------------------------------------------------------------------


def _drawn(known: Known, problem: Problem, window: Window, inside: Tensor, tick: Step) -> Tensor:
    """All pictures with their fields, in full size."""
    result = known.frames.clone()
    everywhere = _colours_everywhere(known, problem, inside)
    for (v, f), fields in problem.fields.items():
        tick()
        if not fields.shift.any() and not fields.colour.any():
            continue
        matte = _matte(inside[v, f])
        result[v, f] = _applied(known.frames[v, f], fields, window, matte, everywhere[v])
    return result


def _matte(inside: Tensor) -> Tensor:  # [H, W] bool -> [H, W] 0..1
    """The performer with its edge, fading outwards."""
    wide = grown(inside[None].float(), MATTE)
    return gaussian(wide, FEATHER)[0]


MATTE = 5
"""Pixels around the performer that are corrected too: what shakes stands beside its geometry."""


def _colours_everywhere(known: Known, problem: Problem, inside: Tensor) -> list[bool]:
    """In which views the background has the performer's cast and flicker too: where the performer's
    correction, put on it, makes it steadier (and, if plain, more like that of the other views)."""
    V, count = known.frames.shape[:2]
    before = known.frames.new_zeros(V, count, 3)
    after = before.clone()
    for (v, f), fields in problem.fields.items():
        outside = grown(inside[v, f][None].float(), 2 * MATTE)[0] == 0
        before[v, f] = known.frames[v, f][:, outside].mean(1) if outside.any() else 0.5
        gain, offset = fields.colour.mean((2, 3)).unbind(1)
        after[v, f] = before[v, f] * (1 + gain) + offset
    usual = before.flatten(0, 1).median(0).values if _plain(known.frames) else None

    def unrest(colours: Tensor) -> Tensor:  # [V, F, 3] -> [V]
        middle = colours.mean(1, keepdim=True) if usual is None else usual
        return (colours - middle).square().sum((1, 2))

    return (unrest(after) <= 1.1 * unrest(before) + 1e-8).tolist()


def _applied(
    picture: Tensor, fields: Fields, window: Window, matte: Tensor, everywhere: bool
) -> Tensor:
    """One picture [3, H, W] with its shift, its detail given back, and its colours."""
    H, W = picture.shape[-2:]
    result = picture.clone()
    size = (window.height, window.width)
    soft = window.cut(matte)
    if fields.shift.any():
        x = window.cut(picture)
        y = moved(x, spread(fields.shift, size) / window.scale * soft)
        window.cut(result).copy_(_sharpened(y, x, soft))
    if fields.colour.any():
        inner = spread(fields.colour.flatten(0, 1), size)
        beside = (window.left, W - window.left - window.width,
                  window.top, H - window.top - window.height)  # fmt: skip
        whole = F.pad(inner[None], beside, mode="replicate")[0]
        gain, offset = whole.unflatten(0, (3, 2)).unbind(1)
        change = gain * result + offset
        result = result + (change if everywhere else change * matte)
    return result.clamp(0, 1)


def _sharpened(y: Tensor, x: Tensor, where: Tensor) -> Tensor:  # [3, h, w] twice, [h, w]
    """y with the gradient energy that x had inside the performer: reading between pixels takes fine
    detail away, by a known kernel, and this gives it back."""

    def slopes(picture: Tensor) -> Tensor:
        down, across = picture.diff(dim=1)[:, :, 1:], picture.diff(dim=2)[:, 1:]
        return torch.stack([down, across]) * where[1:, 1:]

    detail = y - gaussian(y, 0.7)
    of_x, of_y, of_detail = slopes(x), slopes(y), slopes(detail)
    a, b = of_detail.square().sum(), (of_y * of_detail).sum()
    lost = of_x.square().sum() - of_y.square().sum()
    if lost <= 0 or a <= 0:
        return y
    share = (torch.sqrt(b * b + a * lost) - b) / a
    return y + share.clamp(0, MOST_SHARPENED) * detail


MOST_SHARPENED = 1.0
"""A bicubic reading half a pixel away, the worst, wants 0.6 back."""
