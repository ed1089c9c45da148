"""The rows of docs/SUBJECT.md: ways of sampling a subject, in two kinds of surroundings.

To be imported when the pack is inside ComfyUI (in_comfyui.start).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import comfy.sample
import evaluate
import subject_learning
import subject_page
import subject_scores
import subjects
import torch
from safetensors.torch import load_file, save_file
from subject_learning import SIZE, UNSEEN_ROOMS, encoded
from torch import Tensor
from turnaround.models.feature_mesh import middle_view
from turnaround.models.geometry import BACKGROUND
from turnaround.nodes.apply_subject import apply_subject, render_subject
from turnaround.nodes.conditioning import nothing_known, with_pictures
from turnaround.nodes.depth_aware import depth_aware
from turnaround.nodes.run import to_pil
from turnaround.nodes.views import decode_views

STEPS, SEED, DEPTH_DETAIL = 6, 0, 4
OTHER = {"person": "lamp", "truck": "person", "lamp": "truck"}
"""The subject that another's identity is compared with."""
PICTURE = subject_page.PAGE.parent / "pictures" / "subject.jpg"
LARGEST_PICTURE = 300_000
"""Bytes."""
BOX = 12
"""Pixels around the subject's outline that nothing is told of."""


@dataclass(frozen=True)
class Way:
    """A row that is sampled."""

    name: str
    fields: bool | None = True
    """False: words and a LoRA alone; None: no subject at all."""
    share: float = 1.0
    guidance: float = 1.0
    rendering: float = 0.0
    """Share of the steps in which the anchor's view is shown in the others."""
    carry: str = "picture"
    completion: float = 0.0


FIELD = Way(subject_page.FIELD)
ABLATION = (
    Way(subject_page.NONE, fields=None),
    Way(subject_page.WORDS, fields=False),
    FIELD,
    Way("field, image guidance 1.5", guidance=1.5),
    Way(subject_page.RENDERING, rendering=0.7),
    Way(subject_page.COMPLETION, rendering=0.7, completion=0.3),
    Way("field + rendering of the field's features", rendering=0.7, carry="subject"),
)
QUICK = (*ABLATION[:3], ABLATION[5])
SHARES = tuple(replace(FIELD, name=f"in {s:.0%} of the steps", share=s) for s in (0.75, 0.25))


@dataclass(frozen=True)
class Context:
    """One case before the surroundings that the model is told of."""

    known: subject_scores.Known
    conditions: list


def behind(count: int, rooms: bool) -> Tensor:  # [V, 3, H, W]
    return subjects.rooms(count, *SIZE, UNSEEN_ROOMS) if rooms else subjects.plain(count, *SIZE)


def outside_a_box(frames: Tensor, masks: Tensor) -> Tensor:  # [V, 3, H, W], [V, H, W]
    """The surroundings, grey (not known) in a box around the subject."""
    told = frames.clone()
    for v, mask in enumerate(masks > 0):
        rows, columns = (mask.any(axis).nonzero()[:, 0] for axis in (1, 0))
        top, left = (max(0, int(x[0]) - BOX) for x in (rows, columns))
        told[v, :, top : int(rows[-1]) + BOX + 1, left : int(columns[-1]) + BOX + 1] = BACKGROUND
    return told


def context_of(case, poses, vae, rooms: bool) -> Context:
    """What is told of the surroundings stands where Turnaround-Tiny expects seen points."""
    V, (W, H) = len(case.rig), (case.rig.width, case.rig.height)
    seen = case.drawn(case.rig, behind(V, rooms))
    told = nothing_known(vae, 1, W, H).repeat(V, 1, 1, 1, 1)
    if rooms:
        channels = told.shape[1] // 2
        told[:, :channels] = encoded(vae, outside_a_box(seen.frames, seen.masks))
    learned = subject_scores.patches(case.learned.frames, case.learned.masks)
    known = subject_scores.Known(seen, case.rig, poses, learned)
    return Context(known, with_pictures(None, told))


def patched(way: Way, model, given: dict[bool, object], rig, depth: Tensor):
    """MODEL with all of a row's nodes."""
    if way.fields is not None:
        model = apply_subject(model, given[way.fields], rig, way.share, way.guidance)
    if way.rendering or way.completion:
        anchor = middle_view(rig)
        model = depth_aware(
            model, rig, depth[anchor : anchor + 1], anchor, way.carry, way.rendering,
            way.completion, SEED,
        )  # fmt: skip
    return model


def sampled(model, vae, conditions: list, rig) -> Tensor:  # [V, 3, H, W]
    empty = torch.zeros(len(rig), 16, 1, rig.height // 8, rig.width // 8)
    noise = comfy.sample.prepare_noise(empty, SEED)
    latents = comfy.sample.sample(
        model, noise, STEPS, 1.0, "euler", "simple", conditions, conditions, empty, seed=SEED,
        disable_pbar=True,
    )  # fmt: skip
    return decode_views(vae, latents.split(1))[:, 0].float()


@dataclass(frozen=True)
class Found:
    """Of one subject: scores by context and row, and the pictures of the rows."""

    scores: dict[bool, dict[str, subject_scores.Scores]]
    shown: dict[str, Tensor]
    costs: dict[bool, object]
    chance: float
    other: float
    """Identity distance to another subject's pictures."""


def of_subject(name: str, ways: tuple[Way, ...], models, steps: int, folder: Path) -> Found:
    """All rows of one subject, in both kinds of surroundings."""
    model, vae, _ = models
    evaluate.say(name)
    case = subject_learning.case(name, vae)
    poses = subject_scores.poses_of(case.drawn, case.rig)
    given, costs = {}, {}
    for fields in (True, False):
        given[fields], costs[fields] = subject_learning.learned(models, case, steps, fields, folder)
    depth = render_subject(model, given[True], case.rig, DEPTH_DETAIL)[2]
    scores, shown = {}, {}
    for rooms in (False, True):
        context = context_of(case, poses, vae, rooms)
        truth = context.known.seen.frames
        trip = encoded(vae, truth)
        rows = {subject_page.TRIP: decoded(vae, trip), subject_page.TRUTH: truth}
        for way in ways:
            ready = patched(way, model, given, case.rig, depth)
            rows[way.name] = sampled(ready, vae, context.conditions, case.rig)
        scores[rooms] = {
            n: subject_scores.scores(frames, context.known) for n, frames in rows.items()
        }
        for n, found in scores[rooms].items():
            evaluate.say(f"  {n}: " + ", ".join(f"{k} {v:.2f}" for k, v in found.items()))
        shown |= {f"{n}{' in a room' if rooms else ''}": frames for n, frames in rows.items()}
    stranger = subject_learning.case(OTHER[name], vae).learned
    away = subject_scores.identity_distance(
        subject_scores.patches(stranger.frames, stranger.masks),
        subject_scores.patches(case.learned.frames, case.learned.masks),
    )
    return Found(scores, shown, costs, subject_scores.chance(poses, case.rig), away)


def save_found(folder: Path, name: str, found: Found) -> None:
    """For another process."""
    told = {
        "scores": [found.scores[rooms] for rooms in (False, True)],
        "costs": [vars(found.costs[fields]) for fields in (False, True)],
        "chance": found.chance, "other": found.other,
    }  # fmt: skip
    (folder / f"{name}_found.json").write_text(json.dumps(told, default=str))
    save_file({n: t.contiguous() for n, t in found.shown.items()}, folder / f"{name}_found.tensors")


def load_found(folder: Path, name: str) -> Found:
    told = json.loads((folder / f"{name}_found.json").read_text())
    scores = dict(zip((False, True), told["scores"], strict=True))
    costs = {
        fields: subject_learning.Cost(**cost | {"file": Path(cost["file"])})
        for fields, cost in zip((False, True), told["costs"], strict=True)
    }
    shown = load_file(folder / f"{name}_found.tensors")
    return Found(scores, shown, costs, told["chance"], told["other"])


def decoded(vae, latents: Tensor) -> Tensor:  # [V, 3, H, W]
    return decode_views(vae, latents.split(1))[:, 0].float()


SHOWN = (
    subject_page.TRUTH, subject_page.WORDS, subject_page.FIELD, subject_page.COMPLETION,
    f"{subject_page.TRUTH} in a room", f"{subject_page.FIELD} in a room",
)  # fmt: skip
SHOWN_VIEWS = (0, 2, 4)


def sheet(found: dict[str, Found]) -> Tensor:  # [3, rows H, subjects views W]
    """A row for each way, three views of every subject."""
    views = list(SHOWN_VIEWS)
    return torch.cat(
        [
            torch.cat([torch.cat(list(f.shown[n][views]), 2) for f in found.values()], 2)
            for n in SHOWN
        ],
        1,
    )


def save(picture: Tensor) -> None:
    """As good a JPEG as the limit allows."""
    for quality in range(92, 40, -5):
        to_pil(picture.clamp(0, 1)).save(PICTURE, quality=quality)
        if PICTURE.stat().st_size < LARGEST_PICTURE:
            return
