"""An avatar of the real man before four calibrated cameras (tests/real_clip.py), one of them held out.

No body is known of him, so he is distilled free. Three cameras stand about 90 degrees apart from each
other; the fourth sees what they saw only at a slant. Masks are estimates, and the comparison is made
within them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import real_clip
import torch
from torch import Tensor
from turnaround.models.avatar_free_training import FreeTraining
from turnaround.models.cameras import Rig
from turnaround.models.distilling import Settings
from turnaround.models.metrics import psnr, ssim
from turnaround.models.rasterize_splats import render
from turnaround.models.rig_files import rig_from_text
from turnaround.models.views import Views

FRAMES, WIDTH, HEIGHT = 13, 192, 256
GREY = torch.full((3,), 0.5)


@dataclass(frozen=True)
class Score:
    """How one camera is met by an avatar."""

    camera: int
    learned_from: tuple[int, ...]
    psnr: float
    """dB over the man, both before grey."""
    ssim: float
    pictures: Tensor
    """[F, 3, H, 2 W] the avatar, and beside it what the camera saw."""


def real_views(folder: Path, frames: int = FRAMES) -> Views:
    """Four cameras in a world around the man, as the pack has it."""
    clip = real_clip.load(folder, rig_from_text, frames, WIDTH, HEIGHT)
    to_first = torch.eye(4)
    to_first[:3, 3] = clip.centre
    rig = Rig(clip.K, clip.T_camera_first @ to_first, WIDTH, HEIGHT)
    return Views(clip.frames, clip.masks, rig, clip.fps)


def learned(
    views: Views,
    cameras: tuple[int, ...],
    settings: Settings,
    way: str | None = None,
    on_step: Callable[[FreeTraining], None] | None = None,
) -> FreeTraining:
    """An avatar from some of the cameras."""
    chosen = list(cameras)
    some = Views(views.frames[chosen], views.masks[chosen], views.rig.select(chosen), views.fps)
    training = FreeTraining(some, settings, None, way)
    while training.step < settings.steps:
        training.learn()
        if on_step:
            on_step(training)
    return training


def score(
    training: FreeTraining,
    views: Views,
    camera: int,
    learned_from: tuple[int, ...],
) -> Score:
    """The avatar in a camera's pictures."""
    avatar, rig = training.avatar, views.rig
    shown = [
        render(avatar.at(f), rig.K[camera], rig.T_camera_world[camera], WIDTH, HEIGHT, GREY,
               way=training.way).color.clamp(0, 1)
        for f in range(avatar.frame_count)
    ]  # fmt: skip
    masks = views.masks[camera]
    alone = views.frames[camera] * masks[:, None] + 0.5 * (1 - masks[:, None])
    shown = torch.stack(shown)
    return Score(
        camera,
        learned_from,
        psnr(shown, alone, masks),
        ssim(shown, alone, masks),
        torch.cat([shown, alone], 3),
    )


def real_scores(
    folder: Path,  # of the clip, dev.ensure_real_clip()
    settings: Settings,
    held_out: int = 3,
    way: str | None = None,
    on_step: Callable[[FreeTraining], None] | None = None,
) -> list[Score]:
    """The held-out camera of an avatar from the other three, and every camera of one from all four."""
    views = real_views(folder)
    others = tuple(v for v in range(len(views)) if v != held_out)
    settings = replace(settings, detail=False)
    three = learned(views, others, settings, way, on_step)
    scores = [score(three, views, held_out, others), score(three, views, others[0], others)]
    every = tuple(range(len(views)))
    four = learned(views, every, settings, way, on_step)
    return scores + [score(four, views, v, every) for v in every]
