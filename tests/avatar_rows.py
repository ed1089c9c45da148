"""The rows of docs/AVATAR.md: ways of distilling an avatar, each learned and compared."""

from __future__ import annotations

import json
import resource
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import avatar_scenes
import torch
from avatar_scenes import GREY, GROUPS, Scene
from safetensors.torch import load_file, save_file
from torch import Tensor
from turnaround.models.avatar import Avatar, load_avatar, save_avatar
from turnaround.models.avatar_pictures import avatar_pictures
from turnaround.models.avatar_training import AvatarTraining
from turnaround.models.body import Body
from turnaround.models.distilling import PRESETS, Distilling
from turnaround.models.metrics import haarpsi, psnr, ssim
from turnaround.models.rasterize_splats import fastest_way
from turnaround.models.splat_clips import read_clip_ply, write_clip_ply
from turnaround.models.splat_files import read_ply, read_splat, write_ply, write_splat
from turnaround.models.splat_gltf import write_gltf


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
    together: bool = True
    """Frames learned as one avatar in motion; or each as a cloud of its own, the steps shared out."""

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
    Way("clothes that bulge", scene="bulging"),
    Way("clothes that bulge, with the detail net", scene="bulging", detail=True),
    Way("walk, body", scene="walk"),
    Way("walk, free", scene="walk", body=False),
    Way("walk, every frame a cloud of its own", scene="walk", body=False, together=False),
    Way("quick dance, free", body=False),
    Way("quick dance, every frame a cloud of its own", body=False, together=False),
    Way("generated views", scene="generated"),
    Way("generated views, weighted", scene="generated", weights=True),
    Way("real man, 3 of 4 cameras", scene="real", body=False),
    Way("preset standard", preset="standard"),
    Way("preset standard without the detail net", preset="standard", detail=False),
    Way("preset standard, clothes that bulge", scene="bulging", preset="standard"),
    Way(
        "preset standard, clothes that bulge, without the detail net",
        scene="bulging",
        preset="standard",
        detail=False,
    ),
)
BY_NAME = {way.name: way for way in WAYS}
QUICK = (MAIN, BY_NAME["with the detail net"])
QUICK_STEPS = 40


class Unlit(AvatarTraining):
    """Without the light that is learned: the ablation's other side."""

    def step_others(self, rate: float, change: Tensor | None) -> None:
        self.light.grad = None
        super().step_others(rate, change)


def trainings_of(way: Way, scene: Scene, steps: int | None) -> list[Distilling]:
    """One, or one a frame."""
    settings = PRESETS[way.preset]
    if way.detail is not None:
        settings = replace(settings, detail=way.detail)
    settings = replace(settings, steps=steps or settings.steps)
    views_in_all, frames = scene.frames.shape[:2]
    chosen = list(range(0, views_in_all, max(1, views_in_all // way.views)))
    views = scene.views(chosen)
    weights = scene.weights[chosen] if way.weights else None
    numba = fastest_way(torch.device("cpu"), torch.float32, settings.steps * settings.most)
    if way.body:
        kind = AvatarTraining if way.light else Unlit
        return [kind(views, scene.body, settings, weights, numba)]
    from turnaround.models.avatar_free_training import FreeTraining

    parts = [list(range(frames))]
    if not way.together:
        parts = [[f] for f in range(frames)]
        settings = replace(settings, steps=settings.steps // frames)
    return [
        FreeTraining(
            replace(views, frames=views.frames[:, part], masks=views.masks[:, part]),
            settings, weights, numba,
        )
        for part in parts
    ]  # fmt: skip


def looks(avatars: list[Avatar], scene: Scene) -> tuple[Tensor, Tensor]:
    """Pictures [S, 3, H, W] uint8 of the shots that these avatars can show, one of all frames or one
    a frame, and which those are [S]. Moments between frames are the avatar's own; other motions come
    from a body."""
    count, avatar = scene.frames.shape[1], avatars[0]
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
        if len(avatars) > 1:
            played, time_ = avatars[min(round(time_), count - 1)], 0.0
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
    files: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Of the main row: bytes and seconds to read, of every kind of file."""


LOOK = 20


def resident() -> float:  # MiB
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def of_way(way: Way, scene: Scene, steps: int | None) -> tuple[Found, Tensor]:
    """Learn, draw, compare; and the pictures [S, 3, H, W]."""
    before, clock, busy = resident(), time.monotonic(), time.process_time()
    trainings, peak = trainings_of(way, scene, steps), resident()
    for training in trainings:
        while training.step < training.settings.steps:
            training.learn()
            if training.step % LOOK == 0:
                peak = max(peak, resident())
    clock, busy = time.monotonic() - clock, time.process_time() - busy
    avatars = [training.avatar for training in trainings]
    pictures, shown = looks(avatars, scene)
    found = Found(
        scores(pictures, shown, scene),
        sum(training.step for training in trainings),
        sum(len(avatar.splats) for avatar in avatars),
        clock,
        busy,
        peak - before,
        files(avatars[0]) if way == MAIN else {},
    )
    return found, pictures


def files(avatar: Avatar) -> dict[str, tuple[float, float]]:
    """Bytes of a file of every kind, and seconds to read it."""
    world, name = avatar.at(0.0), "avatar"
    clip = [avatar.at(float(f)) for f in range(avatar.frame_count)]
    kinds = {
        "avatar, whole (.safetensors)": (lambda p: save_avatar(p, avatar), load_avatar),
        "one frame (.ply)": (lambda p: write_ply(p, world), read_ply),
        "all frames in one (.ply)": (
            lambda p: write_clip_ply(p, world, clip, avatar.fps),
            read_clip_ply,
        ),
        "one frame (.splat)": (lambda p: write_splat(p, world), read_splat),
        "one frame (.glb)": (lambda p: write_gltf(p, world), Path.read_bytes),
    }
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, (write, read) in kinds.items():
            path = Path(folder) / name
            write(path)
            began = time.perf_counter()
            read(path)
            found[kind] = (path.stat().st_size, time.perf_counter() - began)
    return found


def save_found(folder: Path, way: Way, found: Found, pictures: Tensor) -> None:
    (folder / f"{way.file}.json").write_text(json.dumps(asdict(found)))
    save_file({"pictures": pictures.contiguous()}, folder / f"{way.file}.tensors")


def load_found(folder: Path, way: Way) -> tuple[Found, Tensor]:
    told = json.loads((folder / f"{way.file}.json").read_text())
    return Found(**told), load_file(folder / f"{way.file}.tensors")["pictures"]
