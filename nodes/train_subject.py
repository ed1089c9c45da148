"""Train Subject: fields, words and a LoRA learned from pictures of a subject."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import comfy.model_management as mm
import comfy.samplers
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.sd import VAE
from comfy_api.latest import io
from torch import Tensor

from ..models.cameras import Rig
from ..models.feature_rays import subject_space, visible_reach
from ..models.subject import TOKENS, Pictures, Shape, Subject, SubjectNet, save_subject
from ..models.subject_memory import Backbone, step_bytes
from ..models.subject_pictures import between
from ..models.subject_training import Settings, SubjectTraining
from ..models.views import Views, label_pictures, resize_frames
from . import run
from .patch import dit_blocks, replace_blocks
from .patch_subject import KEY, SubjectWrapper, with_subject
from .refine_latents import LOSS
from .sampler import latent_previewer, preview_tile
from .sockets import RIG, SUBJECT, VIEWS
from .subject_inputs import check_same_pictures, encoded, given_pictures, ready_pictures, told
from .subject_training import Learning, LearningBlock, RecomputedBlock, Unseen
from .views import check_prefix, decode_views, frames_to_image

CATEGORY = "Turnaround/7 subject"
SUFFIX = ".safetensors"
HIDDEN = 64
"""Inside the fields: twice as many gain 0.8 dB and take twice as long."""
EVERY = {"every second": 2, "every third": 3, "all": 1}
"""Which of a model's blocks a subject goes into. Published: twelve, every second one."""
ITEMS, FRAMES = "items", "latent frames"
SHOWN = 4
"""Cameras between the pictures that are looked at."""
DETAIL, DETAIL_AT_END = 2, 4
"""Rays along a token in what is shown of the fields."""
SHARE = 0.1
"""Of the time that looking, sampling and saving may each take."""
PLENTY = 0.6
"""Of the memory: a step that needs more computes its blocks anew on the way back."""
LESS = "lower 'targets' or 'resolution', or let the subject into fewer 'blocks'"
"""What a creator can do about it."""
KEEP_AFTER = 60.0
"""Seconds of learning that are worth a file on the way."""


class Sometimes:
    """Something that is done now and then, with at most a share of the time."""

    def __init__(self, share: float, at_least: float = 0.0) -> None:
        self.share, self.at_least = share, at_least
        self.cost, self.last = 0.0, time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self.last >= max(self.at_least, self.cost / self.share)

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.last = time.monotonic()
        self.cost = self.last - start


class Watched(Learning):
    """Learning that shows what it has come to, and keeps it on the disk."""

    last_sampled: Tensor
    """Latents of the unseen cameras, when all is learned."""
    shown: Tensor
    """[n, 3, H, W] beside each other: a given picture, fields, sampled."""

    def __init__(
        self, training: SubjectTraining, wrapper: SubjectWrapper, as_frames: bool,
        pictures: "Pictured", file: Path,
    ) -> None:  # fmt: skip
        super().__init__(training, wrapper, self.after, as_frames)
        self.pictures, self.file = pictures, file
        self.bar = run.progress(training.settings.steps)
        self.looking, self.sampling = (Sometimes(SHARE, at_least=s) for s in (3.0, 10.0))
        self.saving = Sometimes(SHARE, at_least=KEEP_AFTER)
        self.begun_at = training.step

    def after(self) -> None:
        step, steps = self.training.step, self.training.settings.steps
        self.bar(step, steps)
        if self.sampling.due() and step < steps:
            with self.sampling.taken():
                self.pictures.take_sampled(self.sampled(self.pictures.unseen))
        if self.looking.due():
            with self.looking.taken():
                self.pictures.take_seen(self.seen(self.pictures.unseen.rig, DETAIL))
                self.bar(step, steps, self.pictures.preview())
        if self.saving.due() and step < steps:
            with self.saving.taken():
                self.keep()

    def keep(self) -> None:
        """On the disk, if anything was learned."""
        if self.training.step > self.begun_at:
            save_subject(self.file, self.training.subject)

    def at_end(self) -> None:
        self.last_sampled = self.sampled(self.pictures.unseen)
        self.pictures.take_seen(self.seen(self.pictures.unseen.rig, DETAIL_AT_END))


class Pictured:
    """Pictures from cameras between those that are learned from: what fields see, what is sampled."""

    def __init__(self, model: ModelPatcher, vae: VAE, pictures: Pictures) -> None:
        self.vae, self.size = vae, (pictures.rig.width, pictures.rig.height)
        self.unseen = Unseen(*between(pictures.rig, SHOWN))
        self.previewer = latent_previewer(model)
        shape = tuple(pictures.latents[:1].shape)
        need = vae.memory_used_decode(shape, vae.vae_dtype)
        need += mm.module_size(vae.first_stage_model)
        # Loading a large VAE could push out the model that is learning.
        self.decodes = 2 * need < mm.get_free_memory(vae.device)
        self.seen: Tensor | None = None
        self.made: Tensor | None = None

    def take_seen(self, seen: Tensor | None) -> None:
        if seen is not None:
            self.seen = resize_frames(seen.cpu(), *self.size).clamp(0, 1)

    def take_sampled(self, latents: Tensor) -> None:
        if self.decodes:
            self.made = self.decoded(latents)
        elif self.previewer is not None:
            tiles = torch.stack([preview_tile(self.previewer, z[None]) for z in latents])
            self.made = resize_frames(tiles, *self.size)

    def decoded(self, latents: Tensor) -> Tensor:  # [n, c, 1, h, w] -> [n, 3, H, W]
        with torch.inference_mode():
            pictures = decode_views(self.vae, latents.split(1))[:, 0]
        return pictures.cpu().float()

    def preview(self) -> Tensor | None:
        rows = [r for r in (self.seen, self.made) if r is not None]
        return torch.cat([torch.cat(list(r), 2) for r in rows], 1) if rows else None

    def columns(self, given: Tensor, sampled: Tensor) -> Tensor:  # latents -> [n, 3, H, k W]
        """A given picture beside it, what the fields see, what is sampled."""
        columns = {"given, next to it": self.decoded(given), "fields": self.seen,
                   "sampled": self.decoded(sampled)}  # fmt: skip
        labelled = [
            label_pictures(pictures, [name] * len(pictures))
            for name, pictures in columns.items()
            if pictures is not None
        ]
        return torch.cat(labelled, 3)


class TrainSubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundTrainSubject",
            display_name="Train Subject",
            category=CATEGORY,
            description="Learns a person or thing from pictures taken round it, so that Apply Subject "
            "can show it from any side in what a model samples. The model that you connect is not "
            "changed.",
            inputs=[
                io.Model.Input("model", tooltip="Turnaround-Tiny or a Wan model; the subject can be "
                               "used with this model and its fine-tunes."),
                io.Vae.Input("vae", tooltip="The VAE of the model."),
                VIEWS.Input("views", optional=True,
                            tooltip="Pictures from several cameras, with masks and rig; or one clip "
                            "in which the subject turns."),
                io.Image.Input("images", optional=True,
                               tooltip="Or a clip in which the subject turns, or photos from all "
                               "sides with their 'rig'."),
                io.Mask.Input("masks", optional=True,
                              tooltip="The subject in white, one mask a picture; replaces those of "
                              "'views'. Without any, a plain background is recognised."),
                RIG.Input("rig", optional=True,
                          tooltip="The cameras of the pictures, in their order; replaces that of "
                          "'views'. Without any, one even turn is assumed: Turntable Rig has more."),
                io.Conditioning.Input("positive", optional=True,
                                      tooltip="A text that says what the pictures show, such as 'a "
                                      "toy truck'. Turnaround-Tiny needs none."),
                SUBJECT.Input("subject", optional=True,
                              tooltip="To go on with one from Load Subject: it needs no pictures, "
                              "and 'steps' counts from its beginning."),
                io.Int.Input("steps", default=500, min=1, max=100_000,
                             tooltip="300 for a first look, 1000 and more for details. With the same "
                             "seed, training that is stopped and goes on ends in the same subject."),
                io.Float.Input("learning_rate", default=6e-3, min=1e-5, max=0.1, step=1e-4,
                               round=1e-6, tooltip="Of the fields; words and LoRA get a part of it. "
                               "Lower it if the loss jumps up."),
                io.Combo.Input("blocks", options=list(EVERY), default="every second",
                               tooltip="Of the model that see the subject. More take longer and hold "
                               "more detail."),
                io.Int.Input("resolution", default=240, min=64, max=2048, step=16,
                             tooltip="Longest side in pixels while learning: 240 for Turnaround-Tiny, "
                             "480 to 832 for Wan. Use the same for sampling."),
                io.Int.Input("words", default=TOKENS, min=0, max=16,
                             tooltip="Learned words that follow every text; 0 = none."),
                io.Int.Input("lora_rank", default=0, min=0, max=128,
                             tooltip="Also learns a LoRA of this rank on the model's attention, kept "
                             "with the subject. Slower; 0 = none."),
                io.Int.Input("targets", default=2, min=1, max=16,
                             tooltip="Pictures compared in a step. More need more memory and time and "
                             "learn more evenly."),
                io.Combo.Input("views_as", options=[ITEMS, FRAMES], default=ITEMS,
                               tooltip="How you will sample the views: items = one batch item a view "
                               "(Turnaround-Tiny, View Sync); latent frames = all in one item "
                               "(Views as Latent Frames), so that a Wan's own attention joins them."),
                io.Int.Input("frame", default=0, min=0, max=100_000,
                             tooltip="Which moment of 'views' with several frames a camera."),
                # Not "seed": the page would draw another one for every run, and train anew.
                io.Int.Input("training_seed", default=0, min=0, max=2**63 - 1,
                             tooltip="Same seed, same subject."),
                io.String.Input("filename_prefix", default="subjects/subject",
                                tooltip="Below ComfyUI's output folder: where it is kept every minute "
                                "and when you stop it, for Load Subject. Removed when all went well: "
                                "then use Save Subject."),
            ],
            outputs=[
                SUBJECT.Output(display_name="subject", tooltip="For Apply Subject and Save Subject."),
                LOSS.Output(display_name="loss", tooltip="Of every step, for Plot Loss Graph."),
                io.Image.Output(display_name="pictures", tooltip="From cameras between those of the "
                                "pictures: a given one beside it, what the fields see, and a "
                                "sampled one."),
                io.String.Output(display_name="note", tooltip="What was used and left out, and how "
                                 "far it came."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, vae, steps, learning_rate, blocks, resolution, words, lora_rank, targets,
        views_as, frame, training_seed, filename_prefix,
        views: Views | None = None, images: Tensor | None = None, masks: Tensor | None = None,
        rig: Rig | None = None, positive=None, subject: Subject | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        file, notes = checkpoint_file(filename_prefix), []
        shape = wanted_shape(model, EVERY[blocks], words, lora_rank)
        given = None
        if subject is None or views is not None or images is not None:
            given, note = ready_pictures(
                given_pictures(views, images, masks, rig, frame), resolution
            )
            notes.append(note)
        begun = begin(shape, encoded(given, vae), training_seed) if subject is None else None
        if subject is not None:
            begun = continued(subject, shape)
            if given is not None:
                check_same_pictures(subject, given)
        conditions, note = told(model, vae, positive, begun.pictures)
        notes.append(note)
        settings = Settings(steps, learning_rate, targets, seed=training_seed)
        started = time.monotonic()
        learning = learn(model, vae, begun, settings, conditions, views_as == FRAMES, file)
        notes.insert(0, summary(learning, time.monotonic() - started))
        learned = learning.training.subject
        note = run.say(cls, "; ".join(n for n in notes if n))
        return io.NodeOutput(
            learned, {"loss": list(learned.losses)}, frames_to_image(learning.shown), note
        )


# --- where it begins ------------------------------------------------------------------------------


def checkpoint_file(prefix: str) -> Path:
    """A new file of its own for every run."""
    check_prefix(prefix)
    folder, name, counter, _, _ = folder_paths.get_save_image_path(
        prefix, folder_paths.get_output_directory()
    )
    return Path(folder) / f"{name}_{counter:05}_checkpoint{SUFFIX}"


def wanted_shape(model: ModelPatcher, every: int, words: int, rank: int) -> Shape:
    """But for the reach, which depends on the pictures."""
    depth, dit = len(dit_blocks(model)), model.get_model_object("diffusion_model")
    chosen = tuple(range(min(every, depth) - 1, depth, every))
    return Shape(
        dit.dim, chosen, min(HIDDEN, dit.dim), 0.0, dit.text_dim, words,
        rank, depth if rank else 0,
    )  # fmt: skip


def begin(shape: Shape, pictures: Pictures, seed: int) -> Subject:
    """Nothing learned yet."""
    rig = pictures.rig
    T = subject_space(rig.T_camera_world).normalised(rig.T_camera_world)
    reach = visible_reach(rig.K, T, (rig.height, rig.width))
    with torch.inference_mode(False):
        return Subject(SubjectNet(replace(shape, reach=reach), seed), pictures, ())


def continued(subject: Subject, wanted: Shape) -> Subject:
    """A copy to go on with, since the one on the socket stays as it is."""
    shape = subject.net.shape
    if shape.width != wanted.width or shape.text_width != wanted.text_width:
        raise ValueError(
            f"'subject' was learned with a model of width {shape.width}, but 'model' has width "
            f"{wanted.width}: load the model that it was learned with, or leave 'subject' free."
        )
    if replace(wanted, reach=shape.reach) != shape:
        raise ValueError(
            f"'subject' was learned with {_described(shape)}, but the settings ask for "
            f"{_described(wanted)}: set 'blocks', 'words' and 'lora_rank' as they were, or leave "
            "'subject' free."
        )
    seen = subject.pictures
    with torch.inference_mode(False):
        net = SubjectNet(shape)
        net.load_state_dict({k: v.clone() for k, v in subject.net.state_dict().items()})
        rig = replace(
            seen.rig, K=seen.rig.K.clone(), T_camera_world=seen.rig.T_camera_world.clone()
        )
        pictures = Pictures(seen.latents.clone(), seen.colors.clone(), seen.masks.clone(), rig)
        state = {k: v.clone() for k, v in subject.training.items()}
        return Subject(net, pictures, subject.losses, state)


def _described(shape: Shape) -> str:
    blocks = ", ".join(str(i) for i in shape.blocks)
    return f"blocks {blocks}, {shape.tokens} words and a LoRA of rank {shape.rank}"


# --- learning -------------------------------------------------------------------------------------


def learn(
    model: ModelPatcher, vae: VAE, begun: Subject, settings: Settings, conditions: list,
    as_frames: bool, file: Path,
) -> Watched:  # fmt: skip
    """All steps; what was learned is in `file` when it is stopped, and nowhere but in the result when
    it ends."""
    device, pictures = model.load_device, Pictured(model, vae, begun.pictures)
    with torch.inference_mode(False), torch.enable_grad():
        training = SubjectTraining(_on(begun, device), settings)
        clean = begun.pictures.latents
        references = model.model.process_latent_in(clean)
        wrapper = SubjectWrapper(KEY, training.net, references, None)
        patched = with_room(with_subject(model, wrapper, None), begun, settings)
        learning = Watched(training, wrapper, as_frames, pictures, file)
        guider = comfy.samplers.CFGGuider(patched)
        guider.set_conds(conditions, [])
        guider.set_cfg(1.0)
        try:
            guider.sample(
                torch.zeros_like(clean), clean, learning, torch.tensor([1.0, 0.0]), seed=0,
                disable_pbar=True,
            )  # fmt: skip
            learning.shown = pictures.columns(clean[pictures.unseen.near], learning.last_sampled)
        except BaseException as error:
            learning.keep()
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise ValueError(f"Learning ran out of memory: {LESS}.") from error
            raise
        finally:
            training.net.to("cpu").requires_grad_(False)
    file.unlink(missing_ok=True)
    return learning


class Room:
    """Has ComfyUI load the model so that a step has room beside it; one sentence when there is none."""

    def __init__(self, need: int) -> None:
        self.need = need

    def __call__(self, executor, model: ModelPatcher, noise_shape, *args, **kwargs):
        one = model.model.memory_required([1, *noise_shape[1:]])
        items = max(1, math.ceil(self.need / one))
        found = executor(model, [items, *noise_shape[1:]], *args, **kwargs)
        free = mm.get_free_memory(model.load_device)
        if self.need > free:
            raise ValueError(
                f"A step of learning needs about {self.need / 1e9:.1f} GB beside the model, but "
                f"{free / 1e9:.1f} GB are free: {LESS}."
            )
        return found


def with_room(model: ModelPatcher, begun: Subject, settings: Settings) -> ModelPatcher:
    """A clone whose blocks can be stopped, and computed anew where memory is short."""
    device, plain, anew = model.load_device, *(needed(model, begun, settings, a) for a in (0, 1))
    # All of it, used or not: what is chosen must not change from one run to the next.
    room = mm.get_total_memory(device) - model.model_size()
    short = plain > PLENTY * room
    patched, depth = model.clone(), len(dit_blocks(model))
    block = RecomputedBlock if short else LearningBlock
    replace_blocks(patched, block, range(depth), None, KEY)
    room_for = Room(anew if short else plain)
    patched.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, f"{KEY}_room", room_for)
    return patched


def needed(model: ModelPatcher, begun: Subject, settings: Settings, anew: bool) -> int:
    """Bytes of a step, beside the model."""
    dit, count = model.get_model_object("diffusion_model"), len(begun.pictures)
    item = (model.model.manual_cast_dtype or model.model.get_dtype()).itemsize
    h, w = begun.pictures.size
    learned = sum(p.numel() for p in begun.net.parameters())
    backbone = Backbone(dit.dim, dit.ffn_dim, len(dit_blocks(model)), item)
    references = min(settings.references, count)
    targets = min(settings.targets, max(1, count - 1))
    return step_bytes(backbone, begun.net.shape, learned, count, targets, references, h * w, anew)


def _on(subject: Subject, device: torch.device) -> Subject:
    return replace(subject, net=subject.net.to(device))


def summary(learning: Watched, seconds: float) -> str:
    training = learning.training
    done, count = training.step - learning.begun_at, len(training.pictures)
    rig, losses = training.pictures.rig, training.losses
    pictures = f"{count} pictures of {rig.width}x{rig.height}"
    if not done:
        return (
            f"{pictures}; nothing was learned, since the subject has {training.step} steps already: "
            "raise 'steps' to go on"
        )
    part = max(1, len(losses) // 10)
    first, last = (sum(x) / part for x in (losses[:part], losses[-part:]))
    took = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
    return (
        f"{pictures}, {done} steps in {took}: loss {first:.2f} -> {last:.2f}. Keep it with Save "
        "Subject, use it with Apply Subject; if 'pictures' lack detail, go on with more steps"
    )


NODES: list[type[io.ComfyNode]] = [TrainSubject]
