"""Distill Avatar: a 4D performer of Gaussians, learned from synchronised views."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import comfy.model_management as mm
import torch
from comfy_api.latest import io
from torch import Tensor

from ..models.avatar import Avatar, save_avatar
from ..models.avatar_checks import (
    disagreeing_note,
    empty_note,
    few_views_note,
    misfit_note,
    turns_note,
)
from ..models.avatar_free_training import FreeTraining
from ..models.avatar_memory import LEAST, most_that_fit
from ..models.avatar_pictures import Swing, avatar_pictures, framing
from ..models.avatar_training import AvatarTraining, check_body
from ..models.body import Body
from ..models.cameras import Rig
from ..models.distilling import PRESETS, Distilling, Settings, check_views
from ..models.rasterize_splats import COMPILING, fastest_way
from ..models.subject_pictures import between
from ..models.view_weights import ViewWeights
from ..models.views import Views, as_pictures, label_pictures, view_labels
from . import run
from .avatar_inputs import own_body, ready_views, values_of
from .refine import LOSS
from .sockets import AVATAR, BODY, RIG, VIEWS, WEIGHTS
from .train_subject import Sometimes, checkpoint_file
from .views import frames_to_image

CATEGORY = "Turnaround/8 avatar"
STOP, GO_ON = "stop, keep a file", "go on with it"
GREY = torch.full((3,), 0.5)
LOOK_AFTER, LOOK_SHARE = 1.5, 0.1
"""Seconds between two previews at least, and the share of the time that they may take."""
KEEP_AFTER = 60.0
"""Seconds of learning that are worth a file on the way."""
LOOKS_A_TURN = 48
"""Previews in which their camera goes once round."""
SHOWN = 4
"""Cameras between those of the views that are looked at in the end."""
LEARNS_ON = torch.device("cpu")
"""Distilling has not been tried on accelerators yet."""
LESS = "lower 'resolution', or use fewer frames or views"
GETS_READY = "getting ready; the first time parts are compiled for some ten seconds"


class DistillAvatar(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundDistillAvatar",
            display_name="Distill Avatar",
            category=CATEGORY,
            description="Learns a performer as a cloud of Gaussians in motion from synchronised views, "
            "to be looked at from anywhere in real time and saved for other programs. With a body it "
            "can also take new motions and shapes.",
            inputs=[
                VIEWS.Input("views", tooltip="Finished views of one performer from all sides, or footage "
                            "of several cameras; with masks and rig."),
                RIG.Input("rig", optional=True, tooltip="The cameras of the views, in their order; "
                          "replaces that of 'views'."),
                io.MultiType.Input("mask", types=[io.Mask, VIEWS], optional=True,
                                   tooltip="The performer in white, V x F masks; replaces those of "
                                   "'views'. Without any, a plain background is recognised."),
                BODY.Input("body", optional=True, tooltip="The performer's body in the motion of the "
                           "views. With it the avatar can take other motions (Animate Avatar); without, "
                           "it plays the motion of the views and may wear anything."),
                WEIGHTS.Input("weights", optional=True, tooltip="From View Weights: how much every view "
                              "counts, since generated views disagree."),
                io.Combo.Input("preset", options=list(PRESETS), tooltip="draft: a minute or two for 8 "
                               "views x 13 frames of 256x256, for a look. standard: sharper, with what "
                               "changes with the pose; about ten times as long. full: as published, "
                               "hours."),
                io.Int.Input("steps", default=0, min=0, max=1_000_000, tooltip="0 = the preset's: "
                             + ", ".join(f"{s.steps} ({n})" for n, s in PRESETS.items()) + "."),
                io.Int.Input("gaussians", default=0, min=0, max=1_000_000, tooltip="At most, in the "
                             "end, that are shown at a time; more show finer detail and need more time "
                             "and memory. 0 = the preset's: "
                             + ", ".join(f"{s.most} ({n})" for n, s in PRESETS.items()) + "."),
                io.Int.Input("resolution", default=512, min=64, max=4096, step=16,
                             tooltip="Longest side in pixels while learning; larger views are made "
                             "smaller."),
                io.Int.Input("training_seed", default=0, min=0, max=2**53,
                             tooltip="The same seed learns the same avatar on the same device."),
                io.Combo.Input("when_cancelled", options=[STOP, GO_ON], tooltip="stop: the graph ends, "
                               "and the avatar so far lies in a file that Load Avatar lists. go on: the "
                               "avatar so far is the result, and the nodes after it run."),
                io.String.Input("filename_prefix", default="avatars/avatar",
                                tooltip="Folder and name below ComfyUI's output folder where it is kept "
                                "while it learns."),
            ],
            outputs=[
                AVATAR.Output(display_name="avatar", tooltip="For Render Avatar, Preview Avatar, Animate "
                              "Avatar and Save Avatar."),
                LOSS.Output(display_name="loss", tooltip="Of every step, for Plot Loss Graph."),
                io.Image.Output(display_name="pictures", tooltip="From cameras between those of the "
                                "views: left the given picture beside it, right the avatar."),
                io.String.Output(display_name="note", tooltip="What was used and left out, and how far "
                                 "it came."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, views: Views, preset, steps, gaussians, resolution, training_seed, when_cancelled,
        filename_prefix, rig=None, mask=None, body: Body | None = None,
        weights: ViewWeights | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        file, notes = checkpoint_file(filename_prefix), []
        settings = settings_of(preset, steps, gaussians, training_seed)
        with torch.inference_mode(False), torch.enable_grad():
            ready = ready_views(views, mask, rig, resolution, notes)
            unseen = cameras_between(ready.rig)
            body, counts = own_body(body), values_of(weights, ready)
            check_views(ready, counts)
            if body is not None:
                check_body(ready, body)
                notes.append(misfit_note(ready, body))
            notes += [few_views_note(ready), empty_note(ready.masks, view_labels(ready))]
            settings = within_memory(settings, ready, body, notes)
            run.say(cls, GETS_READY)
            work = settings.gaussians * settings.steps
            way = fastest_way(LEARNS_ON, torch.float32, work)
            notes.append(run.say(cls, slow_note(way, work)))

            def begin(settings: Settings) -> Distilling:
                # Getting ready takes a while: it hears the cancel button, and the longer one has the bar.
                if body is None:
                    return FreeTraining(ready, settings, counts, way, run.progress(1))
                stop = mm.throw_exception_if_processing_interrupted
                return AvatarTraining(ready, body, settings, counts, way, stop)

            started = time.monotonic()
            watched = distilled(cls, begin, settings, file, when_cancelled == GO_ON, notes)
            avatar = watched.training.avatar
            try:
                pictures = beside_given(avatar, ready, *unseen)
            except BaseException:
                watched.keep()
                raise
            file.unlink(missing_ok=True)
        notes.insert(0, disagreeing_note(watched.training))
        if isinstance(watched.training, FreeTraining):
            notes.insert(0, turns_note(watched.training.turns))
        notes.insert(0, summary(watched.training, time.monotonic() - started))
        note = run.say(cls, "; ".join(n for n in notes if n))
        losses = {"loss": list(watched.training.losses)}
        return io.NodeOutput(avatar, losses, frames_to_image(pictures), note)


def settings_of(preset: str, steps: int, gaussians: int, seed: int) -> Settings:
    """A preset with what the creator chose."""
    chosen = PRESETS[preset]
    most = gaussians or chosen.most
    return replace(
        chosen,
        steps=steps or chosen.steps,
        most=most,
        gaussians=min(chosen.gaussians, most),
        seed=seed,
    )


def slow_note(way: str, work: int) -> str:
    """Where much is to be drawn without the compiler."""
    if way != "torch" or work < COMPILING:
        return ""
    return (
        "the package numba is missing or does not work here, so learning takes some ten times as "
        "long: run 'pip install numba' with ComfyUI's Python"
    )


def within_memory(
    settings: Settings, views: Views, body: Body | None, notes: list[str]
) -> Settings:
    """As many Gaussians as fit, said when they are fewer; the views themselves are there already."""
    # Of all memory, not what is free now: the same graph must give the same avatar every time.
    room = mm.get_total_memory(LEARNS_ON) - views.get_ram_usage()
    most = most_that_fit(room, settings, views, body)
    if most < settings.most:
        notes.append(f"memory is short, so there are {most} Gaussians at most")
    return replace(settings, most=most, gaussians=min(settings.gaussians, most))


# --- learning -------------------------------------------------------------------------------------


class Watched:
    """An avatar that learns, is shown from a camera that goes round, and is kept on the disk."""

    def __init__(self, training: Distilling, file: Path) -> None:
        self.training, self.file = training, file
        self.bar = run.progress(training.settings.steps)
        self.looking = Sometimes(LOOK_SHARE, at_least=LOOK_AFTER)
        self.saving = Sometimes(LOOK_SHARE, at_least=KEEP_AFTER)
        self.looks, self.swing = 0, Swing(training.views.rig, framing(training.avatar).centre)

    def learn(self) -> None:
        """All steps, or until the cancel button raises."""
        steps = self.training.settings.steps
        self.bar(0, steps, self.look())
        while self.training.step < steps:
            self.training.learn()
            preview = None
            if self.looking.due():
                with self.looking.taken():
                    preview = self.look()
            self.bar(self.training.step, steps, preview)
            if self.saving.due():
                with self.saving.taken():
                    self.keep()

    def look(self) -> Tensor:  # [3, H, W]
        """From where no camera stands, the next frame every time."""
        avatar = self.training.avatar
        shot = (0, float(self.looks % avatar.frame_count))
        rig = self.swing.at(self.looks / LOOKS_A_TURN)
        self.looks += 1
        seen = avatar_pictures(avatar, rig, [shot], GREY, way=self.training.way)
        return seen.color[0].float() / 255

    def keep(self) -> None:
        """On the disk, if anything was learned."""
        if self.training.step:
            save_avatar(self.file, self.training.avatar)


def distilled(
    node: type, begin: Callable[[Settings], Distilling], settings: Settings, file: Path,
    goes_on: bool, notes: list[str],
) -> Watched:  # fmt: skip
    """Learned to the end; with fewer Gaussians where memory runs out; or as far as it came before the
    cancel button, which else leaves it in `file`."""
    while True:
        watched = None
        try:
            watched = Watched(begin(settings), file)
            run.say(node, f"{settings.steps} steps, at most {settings.most} Gaussians")
            watched.learn()
            return watched
        except mm.InterruptProcessingException:
            if watched is None or not watched.training.step:
                raise
            if not goes_on:
                watched.keep()
                raise
            notes.append("cancelled on the way: this is the avatar so far")
            return watched
        except BaseException as error:
            if not is_out_of_memory(error):
                if watched is not None:
                    watched.keep()
                raise
        # Out of the except: nothing holds its memory any more.
        settings = fewer(settings, notes)
        del watched
        mm.soft_empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(
        error, (torch.cuda.OutOfMemoryError, MemoryError)
    ) or "DefaultCPUAllocator" in str(error)


def fewer(settings: Settings, notes: list[str]) -> Settings:
    """Half the Gaussians, said."""
    most = settings.most // 2
    if most < LEAST:
        raise ValueError(
            f"Distilling runs out of memory even with {settings.most} Gaussians: {LESS}."
        )
    notes.append(f"memory ran out with {settings.most} Gaussians, so there are {most} at most")
    return replace(settings, most=most, gaussians=min(settings.gaussians // 2, most))


# --- what is shown and said -----------------------------------------------------------------------


def cameras_between(rig: Rig) -> tuple[Rig, list[int]]:
    """Where no camera stands, and the number of one beside each."""
    try:
        return between(rig, SHOWN)
    except ValueError:
        raise ValueError(
            "The cameras of 'views' look away from each other or stand in one place, so they show no "
            "common performer: connect the rig that belongs to the views, in their order."
        ) from None


def beside_given(
    avatar: Avatar,
    views: Views,
    rig: Rig,  # of n cameras
    near: list[int],  # n views
) -> Tensor:  # [n, 3, H, 2 W] 0..1
    """The avatar from other cameras, a given picture beside it, half way through the motion."""
    frame = avatar.frame_count // 2
    shots = [(v, float(frame)) for v in range(len(rig))]
    seen = avatar_pictures(avatar, rig, shots, GREY).color.float() / 255
    given = torch.stack([as_pictures(views, v)[frame] for v in near])
    columns = {"given, next to it": given, "avatar": seen}
    return torch.cat([label_pictures(p, [n] * len(p)) for n, p in columns.items()], 3)


def summary(training: Distilling, seconds: float) -> str:
    losses, views = training.losses, training.views
    part = max(1, len(losses) // 10)
    first, last = (sum(x) / part for x in (losses[:part], losses[-part:]))
    took = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
    kind = "on the body" if training.avatar.on_body else "without a body"
    V, count = views.frames.shape[:2]
    return (
        f"{len(training.avatar.splats)} Gaussians {kind} from {V} views x {count} frames of "
        f"{views.rig.width}x{views.rig.height}, {training.step} steps in {took}: loss {first:.3f} -> "
        f"{last:.3f}"
    )


NODES: list[type[io.ComfyNode]] = [DistillAvatar]
