"""What Turnaround's own models are told of every view: conditions and reference as latents."""

from itertools import chain

import node_helpers
import torch
from comfy_api.latest import io
from torch import Tensor

from ..models.cameras import Rig
from ..models.geometry import BACKGROUND
from ..models.views import Views, as_pictures, reference_frames
from . import run
from .check_conditions import check_same_views, check_texts
from .sockets import RIG, VIEWS
from .views import encode_views, fit_to_vae, snapped

CATEGORY = "Turnaround/4 sampling"
TEXT_CHANNELS = 4096


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
                VIEWS.Input("normals", optional=True,
                            tooltip="Normal maps, from Render Conditions; without, shapes are "
                            "not known."),
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
        normals: Views | None = None,
        positive=None,
        negative=None,
        reference: Views | None = None,
    ) -> io.NodeOutput:
        check_same_views(partial=partial, normals=normals)
        if normals is not None and normals.frames.shape[2] != 3:
            raise ValueError(
                "'normals' holds depth in metres: connect the normals of Render Conditions."
            )
        check_texts(len(partial), positive=positive or [], negative=negative or [])
        colors, note = fit_to_vae(partial)
        run.say(cls, note)
        maps = () if normals is None else fit_to_vae(normals)[0]
        cut = () if reference is None else (_reference_clip(reference, partial),)
        V = len(partial)
        count = V * (1 if normals is None else 2) + len(cut)
        latents = encode_views(vae, chain(colors, maps, cut), count, run.progress(count))
        known, normal_maps = latents[:V], latents[V : 2 * V]
        if normals is None:
            normal_maps = grey(vae, *snapped(*_size(partial))[:3]).expand(V, -1, -1, -1, -1)
        told = torch.cat([known, normal_maps], dim=1)
        # None, so that a graph that asks for what it did not give hears of it.
        cut_out = None if reference is None else {"samples": latents[count - 1 :]}
        positive, negative = (with_pictures(c, told) for c in (positive, negative))
        return io.NodeOutput(
            positive, negative, {"samples": torch.zeros_like(known)}, note, cut_out
        )


def _size(views: Views) -> tuple[int, int, int]:
    """Frames, width and height."""
    frames, _, H, W = views.frames.shape[1:]
    return frames, W, H


def with_pictures(conditioning: list | None, told: Tensor) -> list:
    """A text, or none, with latents [V, c, T, h, w] of what is known of every view."""
    no_text = [[torch.zeros(1, 1, TEXT_CHANNELS), {}]]
    return node_helpers.conditioning_set_values(
        conditioning if conditioning is not None else no_text, {"concat_latent_image": told}
    )


def grey(vae, frames: int, width: int, height: int) -> Tensor:  # [1, c, T, h, w]
    """The latent of a clip of which nothing is known."""
    clip = torch.full((frames, 3, height, width), BACKGROUND)
    return encode_views(vae, [clip], 1, run.progress(1))


def nothing_known(vae, frames: int, width: int, height: int) -> Tensor:  # [1, 2 c, T, h, w]
    """What Turnaround's models were told in training of a view of which they knew neither colours nor
    normals: both grey."""
    return grey(vae, frames, width, height).repeat(1, 2, 1, 1, 1)


class EmptyViewConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundEmptyViewConditioning",
            display_name="Empty View Conditioning",
            category=CATEGORY,
            description="Tells a model with 48 input channels, such as Turnaround-Tiny, that "
            "nothing is known of any view, with an empty latent of one batch item a camera: for a "
            "model that knows by itself what to show, as one with a subject does.",
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE of the model."),
                RIG.Input("rig", tooltip="The cameras; their pictures' size is that of the views."),
                io.Int.Input("frames", default=1, min=1, max=1025, step=4,
                             tooltip="Of every view: 1 for pictures, 4n+1 for clips."),
                io.Conditioning.Input("positive", optional=True,
                                      tooltip="Text; Turnaround-Tiny needs none."),
                io.Conditioning.Input("negative", optional=True,
                                      tooltip="What to avoid; used when cfg is not 1."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="For the sampler."),
                io.Conditioning.Output(display_name="negative", tooltip="For the sampler."),
                io.Latent.Output(display_name="latent", tooltip="Empty, one batch item a view."),
                io.String.Output(display_name="note", tooltip="What was changed to fit."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, vae, rig: Rig, frames: int, positive=None, negative=None) -> io.NodeOutput:
        check_texts(len(rig), positive=positive or [], negative=negative or [])
        *size, note = snapped(frames, rig.width, rig.height)
        told = nothing_known(vae, *size).expand(len(rig), -1, -1, -1, -1)
        positive, negative = (with_pictures(c, told) for c in (positive, negative))
        empty = torch.zeros_like(told[:, : told.shape[1] // 2])
        return io.NodeOutput(positive, negative, {"samples": empty}, run.say(cls, note))


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
    given = reference.frames.shape[1]
    if 1 < given < wanted:
        raise ValueError(
            f"'reference' has {given} frames but the views {wanted}: connect the video that "
            "Performer Geometry was made from, or a single picture."
        )
    pictures, masks = as_pictures(reference, 0)[:wanted], reference.masks[0, :wanted].float()
    cut_out = reference_frames(pictures, masks, width, height, BACKGROUND)
    return cut_out.expand(wanted, -1, -1, -1)  # a picture stands still


NODES: list[type[io.ComfyNode]] = [MultiViewConditioning, EmptyViewConditioning]
