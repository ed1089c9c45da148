"""Clips for tests/evaluate_smooth.py: clean ones whose motion is known, and how far a result is off.

Shapes are those of Views, [V, F, 3, H, W] in 0..1, a plain clip being one view. The cameras stand
still and something stands behind the performer, as in most clips: a person that no training saw
before a drawn room (motion exact), or the real man of tests/real_clip.py in his hall.
"""

import math
from dataclasses import dataclass

import clip_faults
import evaluate
import evaluate_sync
import numpy as np
import torch
from torch import Tensor

SEED = 11
CLEAN, TOGETHER = "clean", "together"
LARGER = 2
"""Pictures are made this much larger first."""
FPS = 24.0
ROOM = 12
"""Seed of the rooms."""
FOV = 40.0
"""Degrees, vertical."""
AROUND = 75.0
"""Degrees between the first view and the last one: neighbours see much of the same surface."""
NO_PERSON = 1e-3
"""Share of the performer below which a pixel is background."""
REAL_CAMERA = 0


@dataclass(frozen=True)
class Clip:
    """A clean clip, and what is known of it."""

    name: str
    frames: Tensor
    """[V, F, 3, H, W]"""
    masks: Tensor
    """[V, F, H, W] 0..1, the performer's share."""
    flow: Tensor
    """[V, F - 1, 2, H, W] pixels that what a pixel shows moves until the next frame; true for
    synthetic clips, followed in the clean pictures for the real one."""
    seen: Tensor
    """[V, F - 1, H, W] bool: the flow is known, and the next frame shows it too."""
    rig: object | None = None
    depth: Tensor | None = None
    """[V, F, H, W] true metres of surface that is not seen at a grazing angle, 0 = nothing."""
    large: Tensor | None = None
    """[V, F, 3, s H, s W] the pictures that `frames` were reduced from. What wobbles is bent in
    these: bent at its own size it would be blurred too, which wobbling models are not."""

    def flickering(self, fault: str) -> Tensor:  # [V, F, 3, H, W]
        """The clip with one of clip_faults.FAULTS, or as it is."""
        if fault == CLEAN:
            return self.frames
        generator = torch.Generator().manual_seed(SEED)
        kinds = clip_faults.FAULTS
        parts = clip_faults.ORDER if fault == TOGETHER else (kinds[fault],)
        flat = self.frames.flatten(0, 1)
        for part in parts:
            if part is clip_faults.wobble and self.large is not None:  # the first of all
                flat = reduced(part(self.large.flatten(0, 1), generator))
            else:
                flat = part(flat, generator)
        return flat.view_as(self.frames)


def reduced(pictures: Tensor) -> Tensor:  # [N, C, s H, s W] -> [N, C, H, W]
    return torch.nn.functional.avg_pool2d(pictures, LARGER)


@torch.no_grad()
def synthetic(n: int, views: int, count: int, size: tuple[int, int]) -> Clip:
    """One of evaluate.CLIPS before a drawn room, `count` frames of size (width, height)."""
    from turnaround.models import performer, performer_truth
    from turnaround.models.cameras import framing_distance, orbit_rig
    from turnaround.models.performer_light import draw_background
    from turnaround.models.points import unproject_depth

    width, height = size
    name, motion = evaluate.CLIPS[n]
    look = performer.draw_appearance(evaluate.FIRST_CLOTHES + n)
    times = evaluate.START + torch.arange(count) / FPS
    posed = performer.pose_performer(name, motion, times, look)
    low, high = posed.vertices.amin((0, 1)), posed.vertices.amax((0, 1))
    half, fov = (high - low) / 2, math.radians(FOV)
    distance = framing_distance(float(half[[0, 2]].amax()), float(half[1]), fov, width, height)
    azimuths = torch.linspace(0, math.radians(AROUND), views)
    rig = orbit_rig(azimuths, torch.zeros(views), distance, fov, width, height, (low + high) / 2)
    drawn = np.random.default_rng(ROOM + n)
    large = rig.resized(LARGER * width, LARGER * height)
    rooms = [draw_background(drawn, large.height, large.width, "indoor") for _ in range(views)]
    shown = performer.render_performer(posed, look, large, rooms)
    masks = reduced(shown.masks)
    surface = performer_truth.surface_truth(posed, rig)
    v, f = torch.arange(views).repeat_interleave(count - 1), torch.arange(count - 1).repeat(views)
    flow, visible = performer_truth.surface_flow(surface, posed, rig, (v, f), (v, f + 1))
    flow, visible = (x.unflatten(0, (views, count - 1)) for x in (flow, visible))
    performer_seen = visible & evaluate.moved_masks(masks, flow)
    empty = masks < NO_PERSON
    rays = unproject_depth(torch.ones(1, height, width), rig.K[0])[0]
    cosine = -(surface.normals_camera * torch.nn.functional.normalize(rays, dim=0)).sum(2)
    return Clip(
        f"{name} {motion}", reduced(shown.frames.flatten(0, 1)).unflatten(0, (views, count)), masks,
        flow, performer_seen | (empty[:, :-1] & empty[:, 1:]), rig,
        torch.where(cosine > evaluate.GRAZING, surface.depth, 0.0), shown.frames,
    )  # fmt: skip


@torch.no_grad()
def real(count: int, size: tuple[int, int]) -> Clip:
    """One camera of the real man, with the hall behind him."""
    import real_clip
    from turnaround.models.rig_files import rig_from_text
    from turnaround_dev import ensure_real_clip

    large = [LARGER * edge for edge in size]
    found = real_clip.load(ensure_real_clip(), rig_from_text, count, *large)
    frames, masks = found.frames[REAL_CAMERA], found.masks[REAL_CAMERA]
    flow, seen = evaluate.optical_flow(frames[None], torch.ones_like(masks)[None])
    return Clip(
        "real man", reduced(frames)[None], reduced(masks)[None], flow, seen, large=frames[None]
    )


Scores = dict[str, float]


def scores(result: Tensor, clip: Clip) -> Scores:
    """How far a result [V, F, 3, H, W] is from the clean clip.

    whole, person: PSNR, dB. warping: 100 x warping error along the clip's own motion, of the pictures
    as they are; added: of their differences from the clean ones, so that a clip that is right, or
    wrong in the same way in all frames, has 0. off: percent of the performer that is another colour
    than it should be, over places of some pixels: limbs that are gone, ghosts. detail, detail_whole: gradient energy, percent of the
    clean clip's, inside the performer and everywhere.
    """
    from turnaround.models import metrics

    clean = clip.frames
    everywhere = torch.ones_like(clip.masks)
    return {
        "whole": metrics.psnr(result, clean),
        "person": metrics.psnr(result, clean, clip.masks > 0.5),
        "warping": 100 * metrics.flicker(result, clip.flow, clip.seen),
        "added": 100 * metrics.flicker(result - clean, clip.flow, clip.seen),
        "off": 100 * off(result - clean, clip.masks),
        "detail": evaluate_sync.detail(result, clean, clip.masks),
        "detail_whole": evaluate_sync.detail(result, clean, everywhere),
    }


PLACE, FAR = 5, 0.1
"""Pixels a side of a place, and the difference of its mean colour that is seen at once."""


def off(away: Tensor, masks: Tensor) -> float:  # [V, F, 3, H, W], [V, F, H, W]
    """Share of the performer's pixels around which the mean of some channel is far off."""
    flat = away.flatten(0, 1)
    mean = torch.nn.functional.avg_pool2d(flat, PLACE, 1, PLACE // 2, count_include_pad=False)
    wrong = mean.abs().amax(1) > FAR
    return float(wrong[masks.flatten(0, 1) > 0.5].float().mean())


def cross_view(result: Tensor, clip: Clip) -> float:
    """100 x RMS difference between the colours that two views give to the same surface point."""
    from turnaround.models import metrics

    return 100 * metrics.cross_view_consistency(result, clip.depth, clip.rig).rmse
