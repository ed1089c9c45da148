"""What the model is told of every view: conditions, references and texts, and whether they fit."""

import math
from collections.abc import Callable, Iterator
from itertools import chain
from typing import get_args

import comfy.clip_vision
import comfy.latent_formats
import node_helpers
import torch
from comfy import model_base
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy_api.latest import io
from torch import Tensor

from ..models.cameras import Rig
from ..models.geometry import BACKGROUND
from ..models.stock_conditions import (
    latent_frames,
    start_clip,
    unknown_frames,
    vace_mask,
    vace_parts,
)
from ..models.view_prompts import Wording, stack_texts, view_prompts
from ..models.views import (
    SIZE_STEP,
    Views,
    as_pictures,
    reference_frames,
    resize_frames,
    snap_frames,
    snap_size,
)
from . import patch, run
from .sockets import RIG, VIEWS
from .views import check_rig, encode_views, fit_to_vae, frames_to_image, snapped

CATEGORY = "Turnaround/4 sampling"
TEXT_CHANNELS = 4096
MASK_CHANNELS = 4
"""ComfyUI itself adds them for image-to-video checkpoints."""


class MultiViewConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundConditioning",
            display_name="Multi-View Conditioning",
            category=CATEGORY,
            description="Encodes partial colour and normal maps of every view and attaches them "
            "to the conditioning, with an empty latent of one batch item a view. For models with "
            "48 input channels, such as Turnaround-Tiny. Text is optional.",
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE of the model."),
                VIEWS.Input("partial", tooltip="Partial colour, from Render Conditions."),
                VIEWS.Input("normals", tooltip="Normal maps, from Render Conditions."),
                io.Conditioning.Input("positive", optional=True,
                                      tooltip="Text; Turnaround-Tiny needs none."),
                io.Conditioning.Input("negative", optional=True,
                                      tooltip="What to avoid; used when cfg is not 1."),
                VIEWS.Input("reference", optional=True,
                            tooltip="The performer's own video with its mask, for the "
                            "'reference' output: what the creator filmed, seen by all views."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="For the sampler."),
                io.Conditioning.Output(display_name="negative", tooltip="For the sampler."),
                io.Latent.Output(display_name="latent", tooltip="Empty, one batch item a view."),
                io.String.Output(display_name="note", tooltip="What was changed to fit."),
                io.Latent.Output(display_name="reference", tooltip="The performer alone, cut out; "
                                 "for View Sync or Multi-View Sampler."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        vae,
        partial: Views,
        normals: Views,
        positive=None,
        negative=None,
        reference: Views | None = None,
    ) -> io.NodeOutput:
        check_same_views(partial=partial, normals=normals)
        if normals.frames.shape[2] != 3:
            raise ValueError(
                "'normals' holds depth in metres: connect the normals of Render Conditions."
            )
        check_texts(len(partial), positive=positive or [], negative=negative or [])
        (colors, note), (maps, _) = fit_to_vae(partial), fit_to_vae(normals)
        run.say(cls, note)
        cut = [] if reference is None else [_reference_clip(reference, partial)]
        V = len(partial)
        count = 2 * V + len(cut)
        latents = encode_views(vae, chain(colors, maps, cut), count, run.progress(count))
        extra = {"concat_latent_image": torch.cat([latents[:V], latents[V : 2 * V]], dim=1)}
        no_text = [[torch.zeros(1, 1, TEXT_CHANNELS), {}]]
        positive, negative = (
            node_helpers.conditioning_set_values(c if c is not None else no_text, extra)
            for c in (positive, negative)
        )
        # None, so that a graph that asks for what it did not give hears of it.
        cut_out = {"samples": latents[2 * V :]} if reference is not None else None
        empty = torch.zeros_like(latents[:V])
        return io.NodeOutput(positive, negative, {"samples": empty}, note, cut_out)


def _reference_clip(reference: Views, views: Views) -> Tensor:  # [F, 3, H, W]
    """The performer's own video, cut out and sized as the views that the VAE will take."""
    frames, _, H, W = views.frames.shape[1:]
    wanted, width, height, _ = snapped(frames, W, H)
    if len(reference) != 1 or reference.masks is None:
        raise ValueError(
            f"'reference' needs one video with a mask, got {len(reference)} view(s) "
            f"{'without a mask' if reference.masks is None else 'with masks'}: connect the video "
            "that Performer Geometry was made from."
        )
    if reference.frames.shape[1] < wanted:
        raise ValueError(
            f"'reference' has {reference.frames.shape[1]} frames but the views {wanted}: connect the "
            "video that Performer Geometry was made from."
        )
    pictures = as_pictures(reference, 0)[:wanted]
    return reference_frames(
        pictures, reference.masks[0, :wanted].float(), width, height, BACKGROUND
    )


WHITE = 1.0
"""Behind a cut-out reference: how VACE was trained to be shown what a person looks like."""
VIDEO_CHANNELS, LARGE_CHANNELS = 16, 48
"""Latent channels: of the Wan 2.1 VAE, which nearly all Wan models use, and of Wan 2.2 5B's own."""


def _conditioning_inputs() -> list:
    return [
        io.Conditioning.Input("positive", tooltip="Text: one for all views, or one a view from View "
                              "Prompts."),
        io.Conditioning.Input("negative", tooltip="What to avoid; used when cfg is not 1."),
        io.Vae.Input("vae", tooltip="The VAE of the model."),
    ]  # fmt: skip


def _conditioning_outputs() -> list:
    return [
        io.Conditioning.Output(display_name="positive", tooltip="For the sampler."),
        io.Conditioning.Output(display_name="negative", tooltip="For the sampler."),
    ]


NOTE_OUTPUT = io.String.Output(display_name="note", tooltip="What was changed to fit.")
CONTROL_TOOLTIP = (
    "How to make what was not seen: depth or normal maps from Render Conditions, or maps of a body "
    "from Render Body Maps."
)


def check_same_views(**given: Views | None) -> None:
    """One sentence when VIEWS that belong together differ in views, frames or size."""
    shapes = {name: views.frames.shape for name, views in given.items() if views is not None}
    (first, a), *others = shapes.items()
    for name, b in others:
        if (*a[:2], *a[3:]) != (*b[:2], *b[3:]):
            raise ValueError(
                f"'{first}' has {a[0]} views x {a[1]} frames of {a[4]}x{a[3]} but '{name}' "
                f"{b[0]} x {b[1]} of {b[4]}x{b[3]}: draw both for the same rig and clip."
            )


def check_texts(views: int, **conditions: list) -> None:
    """One sentence when there are texts for another number of views."""
    for socket, given in conditions.items():
        for text, _ in given:
            if len(text) not in (1, views):
                raise ValueError(
                    f"'{socket}' brings {len(text)} texts but there are {views} views: give one "
                    "text for all, or connect the same rig to View Prompts."
                )


def _check_vae(vae: VAE, channels: tuple[int, ...], models: str, files: str) -> None:
    if vae.latent_channels not in channels:
        raise ValueError(
            f"'vae' makes latents of {vae.latent_channels} channels, but {models} work on "
            f"{' or '.join(map(str, channels))}: load {files}."
        )


def _fitted(vae: VAE, frames: int, width: int, height: int) -> tuple[int, int, int, str]:
    """Frames and size that the model takes; Wan 2.2 5B packs twice as many pixels a side."""
    coarse = 2 * vae.spacial_compression_encode() // SIZE_STEP
    if coarse == 1:
        return snapped(frames, width, height)
    new_width, new_height = (coarse * n for n in snap_size(width / coarse, height / coarse))
    count, *_, note = snapped(frames, new_width, new_height)
    if (new_width, new_height) == (width, height):
        return count, width, height, note
    resized = (
        f"{width}x{height} became {new_width}x{new_height} (sizes must be multiples of "
        f"{coarse * SIZE_STEP})"
    )
    return count, new_width, new_height, "; ".join(n for n in (note, resized) if n)


def _clip(name: str, views: Views, v: int, size: tuple[int, int, int]) -> Tensor:
    """View v, [F, 3, H, W], cut to `size`: frames, width, height."""
    frames, width, height = size
    clip = resize_frames(as_pictures(views, v)[:frames].float(), width, height)
    if not clip.isfinite().all():
        raise ValueError(
            f"'{name}' has pixels that are no numbers in view {v}: check the node before."
        )
    return clip


def _reference_pictures(reference: Views | None, views: int, width: int, height: int) -> list:
    """First frames [1, 3, H, W] of the one reference or of one a view, cut out where masked."""
    if reference is None:
        return []
    if len(reference) not in (1, views):
        raise ValueError(
            f"'reference' has {len(reference)} views but there are {views}: give one picture for "
            "all views, or one for each."
        )
    pictures = []
    for v in range(len(reference)):
        H, W = reference.frames.shape[-2:]
        picture = _clip("reference", reference, v, (1, W, H))
        if reference.masks is None:
            pictures.append(resize_frames(picture, width, height))
        else:
            mask = reference.masks[v, :1].float()
            pictures.append(reference_frames(picture, mask, width, height, WHITE))
    return pictures


def _with(conditions: list, values: dict, lists: dict) -> list:
    """Conditions with more values; those of `lists` go behind what another node put there."""
    return node_helpers.conditioning_set_values(
        node_helpers.conditioning_set_values(conditions, values), lists, append=True
    )


def _after(bar: run.Progress, done: int) -> Callable[..., None]:
    """The same progress bar for a second loop, after so many steps of the first."""
    return lambda more, total, preview=None: bar(done + more, total, preview)


class VaceConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundVaceConditioning",
            display_name="Multi-View VACE Conditioning",
            category=CATEGORY,
            description="Tells a Wan VACE model, for every view, to keep the colours that your "
            "camera saw and to make the rest as the control says, with an empty latent of one "
            "batch item a view.",
            inputs=[
                *_conditioning_inputs(),
                VIEWS.Input("control", tooltip=CONTROL_TOOLTIP),
                VIEWS.Input("partial", optional=True,
                            tooltip="Partial colour, from Render Conditions: kept where it was "
                            "seen. Without it everything is made."),
                VIEWS.Input("visibility", optional=True,
                            tooltip="What was seen, from Render Conditions; without it, the mask "
                            "of 'partial'."),
                VIEWS.Input("reference", optional=True,
                            tooltip="How the performer looks: the first frame counts, cut out when "
                            "it has a mask. One for all views, or one a view."),
                io.Float.Input("strength", default=1.0, min=0.0, max=10.0, step=0.01,
                               tooltip="How closely to follow; 0 = not at all."),
            ],
            outputs=[
                *_conditioning_outputs(),
                io.Latent.Output(display_name="latent", tooltip="Empty, one batch item a view."),
                io.Int.Output(display_name="trim_latent",
                              tooltip="Frames that the reference takes in front of the latent, for "
                              "ComfyUI's TrimVideoLatent behind the sampler."),
                NOTE_OUTPUT,
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, positive, negative, vae, control: Views, strength, partial: Views | None = None,
        visibility: Views | None = None, reference: Views | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        _check_vae(vae, (VIDEO_CHANNELS,), "VACE models", "wan_2.1_vae")
        check_same_views(control=control, partial=partial, visibility=visibility)
        V, (F, _, H, W) = len(control), control.frames.shape[1:]
        check_texts(V, positive=positive, negative=negative)
        seen = _seen(partial, visibility)
        *size, note = snapped(F, W, H)
        run.say(cls, note)
        pictures = _reference_pictures(reference, V, *size[1:])
        count = len(pictures) + 2 * V
        bar, masks = run.progress(count), []
        front = _vace_references(encode_views(vae, pictures, count, bar)) if pictures else None
        clips = _vace_clips(control, partial, seen, tuple(size), masks)
        parts = encode_views(vae, clips, count, _after(bar, len(pictures)))
        frames, mask = torch.cat([parts[::2], parts[1::2]], dim=1), torch.stack(masks)
        trim = 0
        if front is not None:
            frames = torch.cat([front.expand(V, -1, -1, -1, -1), frames], dim=2)
            mask = torch.cat([torch.zeros_like(mask[:, :, :1]), mask], dim=2)
            trim = 1
        told = {"vace_frames": [frames], "vace_mask": [mask], "vace_strength": [strength]}
        positive, negative = _with(positive, {}, told), _with(negative, {}, told)
        latent = {"samples": torch.zeros_like(frames[:, :VIDEO_CHANNELS])}
        return io.NodeOutput(positive, negative, latent, trim, note)


def _seen(partial: Views | None, visibility: Views | None) -> Tensor | None:  # [V, F, H, W]
    """Where colours are to be kept."""
    if partial is None:
        if visibility is not None:
            raise ValueError(
                "'visibility' says which colours to keep but 'partial', which has them, is free: "
                "connect it too, or leave both free."
            )
        return None
    masks = visibility.masks if visibility is not None else partial.masks
    if masks is None:
        name = "partial" if visibility is None else "visibility"
        raise ValueError(
            f"'{name}' has no mask of what was seen: connect partial and visibility of the same "
            "Render Conditions."
        )
    return masks


def _vace_clips(
    control: Views,
    partial: Views | None,
    seen: Tensor | None,  # [V, F, H, W]
    size: tuple[int, int, int],  # frames, width, height
    masks: list[Tensor],  # takes [64, T, h, w] of every view
) -> Iterator[Tensor]:  # [F, 3, H, W]
    """What is kept, then what is made, of every view."""
    for v in range(len(control)):
        known = where = None
        if partial is not None:
            known = _clip("partial", partial, v, size)
            where = resize_frames(seen[v, : size[0], None].float(), *size[1:])[:, 0] > 0.5
        inactive, reactive, make = vace_parts(_clip("control", control, v, size), known, where)
        masks.append(vace_mask(make))
        yield inactive
        yield reactive


def _vace_references(latents: Tensor) -> Tensor:  # [R, 16, 1, h, w] -> [R, 32, 1, h, w]
    """Reference pictures are kept whole, so their reactive half is what the model sees as zeros."""
    nothing = comfy.latent_formats.Wan21().process_out(torch.zeros_like(latents))
    return torch.cat([latents, nothing], dim=1)


class FunControlConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundFunControlConditioning",
            display_name="Multi-View Fun-Control Conditioning",
            category=CATEGORY,
            description="Tells a Wan Fun-Control model (2.1 or 2.2) how every view moves, by a "
            "control such as depth, and, if you have it, how every view begins.",
            inputs=[
                *_conditioning_inputs(),
                VIEWS.Input("control", tooltip=CONTROL_TOOLTIP),
                VIEWS.Input("start", optional=True,
                            tooltip="How every view begins: its first frame counts."),
                VIEWS.Input("reference", optional=True,
                            tooltip="How the performer looks, for models from Fun-Control 1.1 on: the "
                            "first frame counts, cut out when it has a mask. One for all views, or "
                            "one a view."),
                io.ClipVisionOutput.Input("clip_vision_output", optional=True,
                                          tooltip="The reference or start picture through CLIP "
                                          "Vision Encode: one for all views, or a batch of one a "
                                          "view. For Wan 2.1."),
            ],
            outputs=[
                *_conditioning_outputs(),
                io.Latent.Output(display_name="latent", tooltip="Empty, one batch item a view."),
                NOTE_OUTPUT,
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, positive, negative, vae, control: Views, start: Views | None = None,
        reference: Views | None = None, clip_vision_output=None,
    ) -> io.NodeOutput:  # fmt: skip
        _check_vae(vae, (VIDEO_CHANNELS, LARGE_CHANNELS), "Fun-Control models", "the model's VAE")
        V, (F, _, H, W) = len(control), control.frames.shape[1:]
        if start is not None and len(start) != V:
            raise ValueError(
                f"'start' has {len(start)} views but 'control' {V}: give the first frame of every "
                "view, or leave 'start' free."
            )
        check_texts(V, positive=positive, negative=negative)
        *size, note = _fitted(vae, F, W, H)
        run.say(cls, note)
        pictures = _reference_pictures(reference, V, *size[1:])
        firsts = [] if start is None else range(len(start))
        firsts = [_clip("start", start, v, (1, *size[1:])) for v in firsts]
        count = V + len(firsts) + len(pictures)
        bar = run.progress(count)
        clips = (_clip("control", control, v, tuple(size)) for v in range(V))
        controls = encode_views(vae, clips, count, bar)
        unknown = _latent_format(vae).process_out(torch.zeros_like(controls))
        if firsts:
            unknown[:, :, :1] = encode_views(vae, firsts, count, _after(bar, V))
        mask = unknown_frames(1 if firsts else 0, controls.shape[2:]).repeat(1, 4, 1, 1, 1)
        told = {
            "concat_latent_image": torch.cat([controls, unknown], dim=1),
            "concat_mask": mask,
            "concat_mask_index": vae.latent_channels,
        }
        lists = {}
        if clip_vision_output is not None:
            told["clip_vision_output"] = clip_vision_output
        if pictures:
            after = _after(bar, V + len(firsts))
            lists["reference_latents"] = [encode_views(vae, pictures, count, after)]
        positive, negative = _with(positive, told, lists), _with(negative, told, lists)
        return io.NodeOutput(positive, negative, {"samples": torch.zeros_like(controls)}, note)


def _latent_format(vae: VAE) -> comfy.latent_formats.LatentFormat:
    large = vae.latent_channels == LARGE_CHANNELS
    return comfy.latent_formats.Wan22() if large else comfy.latent_formats.Wan21()


class I2VConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundI2VConditioning",
            display_name="Multi-View I2V Conditioning",
            category=CATEGORY,
            description="Goes on from the first frame of every view with a Wan image-to-video "
            "model: 2.1, the pairs of 2.2 14B, or 2.2 5B (known by its VAE).",
            inputs=[
                *_conditioning_inputs(),
                VIEWS.Input("start", tooltip="How every view begins."),
                io.Int.Input("frames", default=49, min=1, max=1001, step=4,
                             tooltip="Frames of every view; 4n+1 fits video models."),
                io.Int.Input("start_frames", default=1, min=1, max=1001, step=4,
                             tooltip="How many first frames of 'start' are kept: 1 for models that "
                             "begin with a picture; more to go on with a clip."),
                io.ClipVision.Input("clip_vision", optional=True,
                                    tooltip="clip_vision_h, for Wan 2.1: the first frame of every "
                                    "view is shown to it."),
            ],
            outputs=[
                *_conditioning_outputs(),
                io.Latent.Output(display_name="latent", tooltip="One batch item a view: empty, or, "
                                 "for Wan 2.2 5B, begun with the first frames."),
                NOTE_OUTPUT,
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, positive, negative, vae, start: Views, frames, start_frames, clip_vision=None
    ) -> io.NodeOutput:
        _check_vae(vae, (VIDEO_CHANNELS, LARGE_CHANNELS), "Wan models", "the model's VAE")
        V, (F, _, H, W) = len(start), start.frames.shape[1:]
        check_texts(V, positive=positive, negative=negative)
        count, width, height, note = _fitted(vae, frames, W, H)
        known = snap_frames(min(start_frames, F, count))
        if known < start_frames:
            taken = f"{known} of {start_frames} start frames were taken"
            note = "; ".join(n for n in (note, taken) if n)
        run.say(cls, note)
        clips = (_clip("start", start, v, (known, width, height)) for v in range(V))
        steps = V * (2 if clip_vision is not None else 1)
        bar, told = run.progress(steps), {}
        if vae.latent_channels == LARGE_CHANNELS:
            latent = _begun_latent(encode_views(vae, clips, steps, bar), latent_frames(count))
        else:
            begun = (start_clip(clip, count) for clip in clips)
            images = encode_views(vae, begun, steps, bar)
            mask = unknown_frames(latent_frames(known), images.shape[2:])
            told = {"concat_latent_image": images, "concat_mask": mask}
            latent = {"samples": torch.zeros_like(images)}
        if clip_vision is not None:
            told["clip_vision_output"] = _shown(clip_vision, start, _after(bar, V), steps)
        positive, negative = _with(positive, told, {}), _with(negative, told, {})
        return io.NodeOutput(positive, negative, latent, note)


def _begun_latent(start: Tensor, frames: int) -> dict:  # [V, 48, t, h, w] -> T = frames
    """A latent that keeps its first frames: how Wan 2.2 5B is given pictures."""
    V, C, known, h, w = start.shape
    mask = unknown_frames(known, (frames, h, w)).to(start)
    samples = comfy.latent_formats.Wan22().process_out(start.new_zeros(V, C, frames, h, w))
    samples[:, :, :known] = start
    return {"samples": samples, "noise_mask": mask.repeat(V, 1, 1, 1, 1)}


def _shown(
    clip_vision: comfy.clip_vision.ClipVisionModel, start: Views, on_step: run.Progress, steps: int
) -> comfy.clip_vision.Output:
    """The first frame of every view as CLIP sees it, uncut: a performer's head and feet count."""
    states = []
    for v in range(len(start)):
        picture = frames_to_image(as_pictures(start, v)[:1].float())
        seen = clip_vision.encode_image(picture, crop=False)
        states.append(seen.penultimate_hidden_states)
        on_step(v + 1, steps)
    output = comfy.clip_vision.Output()
    output.penultimate_hidden_states = torch.cat(states)
    return output


class ViewPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundViewPrompts",
            display_name="View Prompts",
            category=CATEGORY,
            description="Encodes your text once a view and says in each where its camera stands: "
            "front view, side view facing left, back view, from above ...",
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the model, such as umt5_xxl."),
                RIG.Input("rig", tooltip="The cameras of the views."),
                io.String.Input("text", multiline=True, default="",
                                tooltip="Your text, the same for all views. The camera's words come "
                                "behind it, or where you write {view}."),
                io.Combo.Input("wording", options=list(get_args(Wording)),
                               tooltip="How sides are told: where the performer looks in the "
                               "picture, which side of the body is seen, or not at all."),
                io.Float.Input("front_azimuth", default=0.0, min=-360.0, max=360.0, step=1.0,
                               optional=True,
                               tooltip="Azimuth in degrees from which the performer is seen from "
                               "the front: 0 when your camera filmed the front, 180 the back."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="conditioning", tooltip="One text a view, for "
                                       "'positive' of the conditioning nodes."),
                io.String.Output(display_name="prompts", tooltip="The text of every view, one a "
                                 "line."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, clip, rig: Rig, text: str, wording: Wording, front_azimuth=0.0
    ) -> io.NodeOutput:
        if clip is None:
            raise ValueError(
                "'clip' is empty, because the loaded checkpoint has no text encoder: connect the "
                "CLIP of a Load CLIP node."
            )
        prompts = view_prompts(rig, text, wording, math.radians(front_azimuth))
        listed = "\n".join(f"{label}: {p}" for label, p in zip(rig.labels, prompts, strict=True))
        return io.NodeOutput(_encoded(clip, prompts), listed)


def _encoded(clip: CLIP, prompts: list[str]) -> list:
    """All prompts as one CONDITIONING, each different one encoded by itself."""
    bar, encoded = run.progress(len(prompts)), {}
    for v, prompt in enumerate(prompts):
        if prompt not in encoded:
            # One entry, or, where another node schedules the text encoder, one for each part.
            encoded[prompt] = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        bar(v + 1, len(prompts))
    return [_one_batch(entries) for entries in zip(*(encoded[p] for p in prompts), strict=True)]


def _one_batch(entries: tuple[list, ...]) -> list:
    """The same entry of every view's CONDITIONING as one of V rows."""
    values = dict(entries[0][1])
    if values.get("pooled_output") is not None:
        values["pooled_output"] = torch.cat([more["pooled_output"] for _, more in entries])
    return [stack_texts([text for text, _ in entries]), values]


# --- does it all fit? -----------------------------------------------------------------------------

PLAIN_MODELS = (
    model_base.WAN21, model_base.WAN21_Vace, model_base.WAN21_Camera, model_base.WAN22,
)  # fmt: skip
"""Read the conditions below and no others; speech and character models have more of their own."""


def check_conditions(
    model: ModelPatcher,
    positive: list,
    negative: list,  # empty where it is not used
    samples: Tensor,  # [V, C, T, h, w]
    rig: Rig | None = None,
) -> None:
    """One sentence when model, conditions, latent and rig don't belong together.

    ComfyUI itself repeats, cuts off and leaves out without a word what has another number of views
    or what the model can't take.
    """
    channels = patch.input_channels(model)
    check_rig(rig, samples)
    wanted = model.model.latent_format.latent_channels
    if samples.shape[1] != wanted:
        raise ValueError(
            f"The latent has {samples.shape[1]} channels but the model works on {wanted}: make it "
            "with the VAE that belongs to the model."
        )
    check_texts(len(samples), positive=positive, negative=negative)
    if channels != wanted and type(model.model) in PLAIN_MODELS:
        _check_told_of_views(positive, channels)
    for socket, conditions in (("positive", positive), ("negative", negative)):
        for _, values in conditions:
            _check_model_takes(model, socket, values)
            _check_channels(values, channels, wanted)
            for name, told, size in _told(values):
                _check_size(name, socket, (len(told), *size), samples)


def _told(values: dict) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
    """Everything that has a row a view: its name, itself, and what of T, h, w it must share."""
    if (image := values.get("concat_latent_image")) is not None:
        yield "view conditions", image, tuple(image.shape[2:])
    if (mask := values.get("concat_mask")) is not None:
        yield "masks of the view conditions", mask, ()
    for frames, mask in zip(
        *(values.get(k, ()) for k in ("vace_frames", "vace_mask")), strict=True
    ):
        yield "VACE conditions", frames, tuple(frames.shape[2:])
        yield "VACE masks", mask, tuple(mask.shape[2:])
    if (seen := values.get("clip_vision_output")) is not None:
        yield "CLIP Vision pictures", seen.penultimate_hidden_states, ()
    for reference in values.get("reference_latents", ())[-1:]:  # the model reads the last alone
        yield "reference pictures", reference, tuple(reference.shape[-2:])
    if (cameras := values.get("camera_conditions")) is not None:
        *_, T, H, W = cameras.shape
        yield "camera conditions", cameras, (T, H // 8, W // 8)


def _measured(views: int, *size: int) -> str:
    """Views and, if they are known, latent frames and size, in words."""
    words = f"{views} views" if views != 1 else "1 view"
    if len(size) == 3:
        words += f" x {size[0]} latent frames"
    return words + (f" of {size[-1]}x{size[-2]}" if size else "")


def _check_size(name: str, socket: str, brought: tuple[int, ...], samples: Tensor) -> None:
    """`brought`: views, then none, h w, or T h w."""
    views, *size = brought
    shared = samples.shape[samples.ndim - len(size) :]
    if views not in (1, len(samples)) or tuple(size) != tuple(shared):
        raise ValueError(
            f"The {name} of '{socket}' are for {_measured(views, *size)} but the latent has "
            f"{_measured(len(samples), *shared)}: use the latent and the conditions of one "
            "conditioning node."
        )


def _check_model_takes(model: ModelPatcher, socket: str, values: dict) -> None:
    """What this kind of model would leave out without a word."""
    dit = model.get_model_object("diffusion_model")
    if "vace_frames" in values and not hasattr(dit, "vace_patch_embedding"):
        raise ValueError(
            f"'{socket}' brings VACE conditions but the model is no VACE model: load one such as "
            "wan2.1_vace_1.3B."
        )
    if type(model.model) not in PLAIN_MODELS:
        return
    if "reference_latents" in values and getattr(dit, "ref_conv", None) is None:
        raise ValueError(
            f"'{socket}' brings a reference picture but the model has no place for one: load "
            "Fun-Control 1.1 or later, or leave 'reference' free."
        )
    if "camera_conditions" in values and not hasattr(dit, "control_adapter"):
        raise ValueError(
            f"'{socket}' brings camera conditions but the model is no Fun-Camera model: load one "
            "such as wan2.1_fun_camera_v1.1_1.3B."
        )


CONDITIONS_FOR = {
    36: "connect Multi-View I2V Conditioning",
    48: "connect Multi-View Conditioning, or Multi-View Fun-Control Conditioning for a Fun-Control "
    "model",
    52: "connect Multi-View Fun-Control Conditioning",
}
"""Input channels of a model -> what it is to be told of the views."""


def _check_told_of_views(positive: list, channels: int) -> None:
    if all("concat_latent_image" not in values for _, values in positive):
        fix = CONDITIONS_FOR.get(channels, "connect the conditioning node made for it")
        raise ValueError(
            f"The model takes {channels} channels but 'positive' carries no view conditions: {fix}."
        )


def _check_channels(values: dict, channels: int, own: int) -> None:
    """`channels` that the model takes, `own` of the latent among them."""
    if "concat_latent_image" not in values:
        return
    brought = own + values["concat_latent_image"].shape[1]
    if channels not in (brought, brought + MASK_CHANNELS):
        raise ValueError(
            f"The model takes {channels} input channels but latent and conditions bring {brought}: "
            "load the kind of model that the conditioning node is for."
        )


check_channels = check_conditions


NODES: list[type[io.ComfyNode]] = [
    MultiViewConditioning,
    VaceConditioning,
    FunControlConditioning,
    I2VConditioning,
    ViewPrompts,
]
