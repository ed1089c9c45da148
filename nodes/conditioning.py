"""What Turnaround's own models are told of every view: conditions and reference as latents."""

from itertools import chain

import node_helpers
import torch
from comfy_api.latest import io
from torch import Tensor

from ..models.geometry import BACKGROUND
from ..models.views import Views, as_pictures, reference_frames
from . import run
from .check_conditions import check_same_views, check_texts
from .sockets import VIEWS
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
    given = reference.frames.shape[1]
    if 1 < given < wanted:
        raise ValueError(
            f"'reference' has {given} frames but the views {wanted}: connect the video that "
            "Performer Geometry was made from, or a single picture."
        )
    pictures, masks = as_pictures(reference, 0)[:wanted], reference.masks[0, :wanted].float()
    cut_out = reference_frames(pictures, masks, width, height, BACKGROUND)
    return cut_out.expand(wanted, -1, -1, -1)  # a picture stands still


NODES: list[type[io.ComfyNode]] = [MultiViewConditioning]
