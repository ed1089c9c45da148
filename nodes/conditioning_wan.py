"""What stock Wan checkpoints are told of every view: VACE, Fun-Control, image to video."""

from collections.abc import Callable, Iterator

import comfy.clip_vision
import comfy.latent_formats
import node_helpers
import torch
from comfy.sd import VAE
from comfy_api.latest import io
from torch import Tensor

from ..models.stock_conditions import (
    start_clip,
    unknown_frames,
    vace_mask,
    vace_parts,
)
from ..models.views import (
    SIZE_STEP,
    Views,
    as_pictures,
    latent_frames,
    reference_frames,
    resize_frames,
    snap_frames,
    snap_size,
)
from . import run
from .check_conditions import check_same_views, check_texts
from .conditioning import CATEGORY
from .sockets import VIEWS
from .views import encode_views, frames_to_image, snapped

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


NODES: list[type[io.ComfyNode]] = [VaceConditioning, FunControlConditioning, I2VConditioning]
