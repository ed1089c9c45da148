"""What tests/evaluate_subject.py learns: three subjects before rooms that change from picture to picture,
with fields and, to compare, with words and a LoRA alone; kept in a folder so that scores can be made anew."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import bench_geometry
import comfy.samplers
import subject_scores
import subjects
import torch
from evaluate import ROOT, say
from torch import Tensor
from turnaround.models.cameras import Rig
from turnaround.models.subject import Pictures, Subject, load_subject, pictures_of, save_subject
from turnaround.models.subject_training import Settings, SubjectTraining
from turnaround.nodes import subject_inputs, train_subject
from turnaround.nodes.patch_subject import KEY, SubjectWrapper, with_subject
from turnaround.nodes.subject_training import Learning

SIZE = (192, 240)
"""Width and height: those that Turnaround-Tiny was made for."""
LEARNED, UNSEEN = 30, 8
"""Pictures, as many as are published for a subject; cameras between them."""
LEARNED_ROOMS, UNSEEN_ROOMS = 11, 12
"""Seeds: no surroundings are met again."""
RANK, LORA_RATE = 16, 0.03
"""The LoRA's, at which it alone learns best; its share of the rate is a fifth."""
EVERY = 2
"""Which blocks: the node's default."""


@dataclass(frozen=True)
class Case:
    """A subject: what is learned, and what it is compared with."""

    name: str
    drawn: subject_scores.Drawn
    learned: subjects.Seen
    pictures: Pictures
    rig: Rig
    """The unseen cameras."""


@dataclass(frozen=True)
class Cost:
    """Of a training."""

    steps: int
    seconds: float
    busy: float
    """Seconds of processor time, all threads together: other work on the machine delays the clock,
    hardly this."""
    peak: float
    """MiB beside what was resident before it; NaN where this system can't tell."""
    file: Path
    """Where it is kept."""


def drawing(name: str) -> subject_scores.Drawn:
    if name == "person":
        return subjects.person
    mesh = getattr(subjects, name)()
    return lambda rig, behind: subjects.thing(mesh, rig, behind)


def encoded(vae, frames: Tensor) -> Tensor:  # [V, 3, H, W] -> [V, c, 1, h, w]
    return torch.cat([vae.encode(f[None].movedim(1, -1)) for f in frames])


def case(name: str, vae) -> Case:
    W, H = SIZE
    drawn, rig = drawing(name), subjects.spiral_rig(LEARNED, W, H)
    learned = drawn(rig, subjects.rooms(LEARNED, W, H, LEARNED_ROOMS))
    latents = encoded(vae, learned.frames)
    with torch.inference_mode(False):
        pictures = pictures_of(learned.frames, learned.masks, latents.clone().float(), rig)
    unseen = subjects.spiral_rig(UNSEEN, W, H, first=0.7, lowest=0.0, highest=0.4)
    return Case(name, drawn, learned, pictures, unseen)


@functools.cache
def code() -> str:
    """Of all that determines what is learned: what was kept of other code is not used."""
    parts = (p for name in ("subject*", "feature_*") for p in (ROOT / "models").glob(f"{name}.py"))
    files = [*sorted(parts), ROOT / "tests" / "subjects.py"]
    settings = SIZE, LEARNED, LEARNED_ROOMS, RANK, LORA_RATE, EVERY
    texts = [f.read_bytes() for f in files]
    return hashlib.sha256(b"".join([*texts, repr(settings).encode()])).hexdigest()[:10]


def learned(models, given: Case, steps: int, fields: bool, folder: Path) -> tuple[Subject, Cost]:
    """From the folder if it was learned before."""
    kind = "field" if fields else "words"
    path = folder / f"{given.name}_{kind}_{steps}_{code()}.safetensors"
    if path.exists():
        figures = json.loads(path.with_suffix(".json").read_text())
        return load_subject(path), Cost(**figures, file=path)
    model, vae, _ = models
    shape = train_subject.wanted_shape(model, EVERY, 4, 0 if fields else RANK)
    shape = shape if fields else replace(shape, blocks=())
    settings = Settings(steps) if fields else Settings(steps, LORA_RATE)
    conditions, _ = subject_inputs.told(model, vae, None, given.pictures)
    begun = train_subject.begin(shape, given.pictures, 0)
    before = bench_geometry.start_counting(torch.device("cpu"))
    clock, busy = time.monotonic(), time.process_time()
    subject = _learn(model, begun, settings, conditions)
    seconds, busy = time.monotonic() - clock, time.process_time() - busy
    peak = (bench_geometry.resident("VmHWM") - before) / 2**20 if before else float("nan")
    figures = {"steps": steps, "seconds": seconds, "busy": busy, "peak": peak}
    say(f"  {given.name}, {kind}: {steps} steps in {seconds:.0f} s, {peak:.0f} MiB")
    subject = replace(subject, training={})
    folder.mkdir(parents=True, exist_ok=True)
    save_subject(path, subject)
    path.with_suffix(".json").write_text(json.dumps(figures))
    return subject, Cost(**figures, file=path)


def _learn(model, begun: Subject, settings: Settings, conditions: list) -> Subject:
    """Train Subject without its pictures on the way."""
    with torch.inference_mode(False), torch.enable_grad():
        training = SubjectTraining(begun, settings)
        clean = begun.pictures.latents
        wrapper = SubjectWrapper(KEY, training.net, model.model.process_latent_in(clean), None)
        learning = Learning(training, wrapper, _told_now_and_then(training))
        guider = comfy.samplers.CFGGuider(with_subject(model, wrapper, None))
        guider.set_conds(conditions, [])
        guider.set_cfg(1.0)
        steps = torch.tensor([1.0, 0.0])
        guider.sample(torch.zeros_like(clean), clean, learning, steps, seed=0, disable_pbar=True)
        training.net.requires_grad_(False)
        return training.subject


def _told_now_and_then(training: SubjectTraining) -> Callable[[], None]:
    def after() -> None:
        if training.step % 100 == 0:
            say(f"    step {training.step}: loss {sum(training.losses[-50:]) / 50:.3f}")

    return after
