"""The rows of docs/AVATAR.md: ways of distilling an avatar, each learned and compared."""

from __future__ import annotations

import json
import resource
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import avatar_scenes
import torch
from avatar_scenes import GREY, GROUPS, Scene
from safetensors.torch import load_file, save_file
from torch import Tensor
from turnaround.models.avatar import Avatar
from turnaround.models.avatar_pictures import avatar_pictures
from turnaround.models.avatar_training import AvatarTraining
from turnaround.models.body import Body
from turnaround.models.distilling import PRESETS, Distilling
from turnaround.models.metrics import haarpsi, psnr, ssim
from turnaround.models.rasterize_splats import fastest_way


@dataclass(frozen=True)
class Way:
    """A row."""

    name: str
    scene: str = "kira"
    views: int = 8
    body: bool = True
    detail: bool | None = None
    """None: as the preset has it."""
    light: bool = True
    weights: bool = False
    preset: str = "draft"

    @property
    def file(self) -> str:
        return "".join(c if c.isalnum() else "_" for c in self.name)


MAIN = Way("**body, 8 true views**")
WAYS = (
    MAIN,
    Way("another performer", scene="leo"),
    Way("4 true views", views=4),
    Way("true views of 2x2 samples a pixel", scene="coarse"),
    Way("without light", light=False),
    Way("with the detail net", detail=True),
    Way("free, 8 true views", body=False),
    Way("generated views", scene="generated"),
    Way("generated views, weighted", scene="generated", weights=True),
    Way("real man, 3 of 4 cameras", scene="real", body=False),
)
QUICK = (MAIN, WAYS[5])
QUICK_STEPS = 40


class Unlit(AvatarTraining):
    """Without the light that is learned: the ablation's other side."""

    def step_others(self, rate: float, change: Tensor | None) -> None:
        self.light.grad = None
        super().step_others(rate, change)


def training_of(way: Way, scene: Scene, steps: int | None) -> Distilling:
    settings = PRESETS[way.preset]
    if way.detail is not None:
        settings = replace(settings, detail=way.detail)
    settings = replace(settings, steps=steps or settings.steps)
    count = len(scene.frames)
    chosen = list(range(0, count, max(1, count // way.views)))
    views = scene.views(chosen)
    weights = scene.weights[chosen] if way.weights else None
    numba = fastest_way(torch.device("cpu"), torch.float32, settings.steps * settings.most)
    if way.body:
        kind = AvatarTraining if way.light else Unlit
        return kind(views, scene.body, settings, weights, numba)
    from turnaround.models.avatar_free_training import FreeTraining

    return FreeTraining(views, settings, weights, numba)


def looks(avatar: Avatar, scene: Scene) -> tuple[Tensor, Tensor]:
    """Pictures [S, 3, H, W] uint8 of the shots that this avatar can show, and which those are [S].
    Moments between frames are the avatar's own; other motions come from a body."""
    count = scene.frames.shape[1]
    whole = None
    if avatar.on_body:
        whole = avatar.moved(Body(scene.vertices, scene.faces, scene.rest, fps=avatar.fps))
    pictures = torch.zeros_like(scene.truths)
    shown = torch.zeros(len(scene.shots), dtype=torch.bool)
    ground = torch.tensor(GREY)
    for i, (group, camera, moment) in enumerate(scene.shots.tolist()):
        time_, played = float(moment), avatar
        if GROUPS[group] == "between":
            time_ = avatar_scenes.BETWEEN[moment - count]
        elif moment >= count:
            if whole is None:
                continue
            played = whole
        way = fastest_way(torch.device("cpu"), torch.float32, len(avatar.splats) * len(shown))
        shot = avatar_pictures(played, scene.rig, [(camera, time_)], ground, way=way)
        pictures[i], shown[i] = shot.color[0], True
    return pictures, shown


def scores(pictures: Tensor, shown: Tensor, scene: Scene) -> dict[str, dict[str, float]]:
    """Of every group: over the performer's pixels."""
    found = {}
    for g, group in enumerate(GROUPS):
        at = (scene.shots[:, 0] == g) & shown
        if at.any():
            ours, truth = pictures[at].float() / 255, scene.truths[at].float() / 255
            inside = scene.insides[at]
            found[group] = {
                "psnr": psnr(ours, truth, inside), "ssim": ssim(ours, truth, inside),
                "haarpsi": haarpsi(ours, truth, inside),
            }  # fmt: skip
    return found


@dataclass(frozen=True)
class Found:
    """Of one row."""

    scores: dict[str, dict[str, float]]
    steps: int
    gaussians: int
    seconds: float
    busy: float
    """Seconds of one processor."""
    peak: float
    """MiB that the process held at most beyond what it held before learning, looked at every LOOK
    steps."""


LOOK = 20


def resident() -> float:  # MiB
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def of_way(way: Way, scene: Scene, steps: int | None) -> tuple[Found, Tensor]:
    """Learn, draw, compare; and the pictures [S, 3, H, W]."""
    before, clock, busy = resident(), time.monotonic(), time.process_time()
    training = training_of(way, scene, steps)
    peak = resident()
    while training.step < training.settings.steps:
        training.learn()
        if training.step % LOOK == 0:
            peak = max(peak, resident())
    clock, busy = time.monotonic() - clock, time.process_time() - busy
    avatar = training.avatar
    pictures, shown = looks(avatar, scene)
    found = Found(
        scores(pictures, shown, scene),
        training.step,
        len(avatar.splats),
        clock,
        busy,
        peak - before,
    )
    return found, pictures


def save_found(folder: Path, way: Way, found: Found, pictures: Tensor) -> None:
    (folder / f"{way.file}.json").write_text(json.dumps(asdict(found)))
    save_file({"pictures": pictures.contiguous()}, folder / f"{way.file}.tensors")


def load_found(folder: Path, way: Way) -> tuple[Found, Tensor]:
    told = json.loads((folder / f"{way.file}.json").read_text())
    return Found(**told), load_file(folder / f"{way.file}.tensors")["pictures"]
