"""Sampling: conditions to latents, view sync, and a sampler that shows all views."""

from collections.abc import Callable
from itertools import chain

import comfy.sample
import comfy.samplers
import comfy.utils
import folder_paths
import latent_preview
import node_helpers
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..models.cameras import Rig
from ..models.geometry import BACKGROUND
from ..models.views import (
    Views,
    as_pictures,
    grid_picture,
    label_pictures,
    reference_frames,
    resize_frames,
)
from . import patch, run
from .sockets import RIG, SYNC, VIEWS
from .views import check_rig, encode_views, fit_to_vae, snapped

CATEGORY = "Turnaround/4 sampling"
TEXT_CHANNELS = 4096
MASK_CHANNELS = 4
"""ComfyUI itself adds them for image-to-video checkpoints."""


class LoadViewSync(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundLoadViewSync",
            display_name="Load View Sync",
            category=CATEGORY,
            description="Loads trained view-sync weights from ComfyUI's model_patches folder.",
            inputs=[
                io.Combo.Input(
                    "name",
                    options=folder_paths.get_filename_list("model_patches"),
                    tooltip="A sync file made for the model you use; turnaround_tiny_sync comes "
                    "with the pack.",
                )
            ],
            outputs=[
                SYNC.Output(display_name="sync", tooltip="For View Sync or Multi-View Sampler.")
            ],
        )

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("model_patches", name)
        return io.NodeOutput(patch.load_sync(path))


class ViewSyncNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundViewSync",
            display_name="View Sync",
            category=CATEGORY,
            description="Lets the views of one moment look at each other inside the model, so "
            "that clothes and limbs agree from every side. With sync weights it is what the model "
            "was trained with; without, it works on most Wan models as they are. Use any sampler after "
            "it.",
            inputs=[
                io.Model.Input("model", tooltip="A Wan-type video model."),
                SYNC.Input("sync", optional=True,
                           tooltip="Trained weights; leave free for the training-free form."),
                RIG.Input("rig", optional=True,
                          tooltip="The rig, to check that the latent has as many views."),
                io.Latent.Input("reference", optional=True,
                                tooltip="The performer's own video, from Multi-View Conditioning: "
                                "all views look at it too."),
                io.Float.Input("strength", default=1.0, min=0.0, max=4.0, step=0.05,
                               tooltip="0 = off, 1 = as trained; more pulls the views closer "
                               "together and blurs in the end."),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01,
                               tooltip="Where in the sampling it begins."),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01,
                               tooltip="Where in the sampling it ends."),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model, with its views in touch.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model,
        strength,
        start_percent,
        end_percent,
        sync=None,
        rig: Rig | None = None,
        reference: dict | None = None,
    ) -> io.NodeOutput:
        views = len(rig) if rig is not None else 0
        return io.NodeOutput(
            patch.apply_view_sync(
                model,
                sync,
                views,
                strength,
                start_percent,
                end_percent,
                reference["samples"] if reference is not None else None,
            )
        )


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
        a, b = partial.frames.shape, normals.frames.shape
        if a != b:
            raise ValueError(
                f"'partial' has {a[0]} views x {a[1]} frames of {a[4]}x{a[3]} but 'normals' "
                f"{b[0]} x {b[1]} of {b[4]}x{b[3]}: take both from the same Render Conditions."
            )
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


def check_channels(model: ModelPatcher, positive: list, negative: list, samples: Tensor) -> None:
    """One sentence when model, conditions and latent don't belong together."""
    images = [
        (socket, values["concat_latent_image"])
        for socket, conditions in (("positive", positive), ("negative", negative))
        for _, values in conditions
        if "concat_latent_image" in values
    ]
    channels = patch.input_channels(model)
    if all(socket != "positive" for socket, _ in images) and channels != samples.shape[1]:
        raise ValueError(
            f"The model takes {channels} channels but 'positive' carries no view conditions: "
            "connect Multi-View Conditioning."
        )
    for socket, image in images:
        brought = samples.shape[1] + image.shape[1]
        if channels not in (brought, brought + MASK_CHANNELS):
            raise ValueError(
                f"The model takes {channels} input channels but latent and conditions bring "
                f"{brought}: load a model made for partial colour and normals, such as "
                "turnaround_tiny_dit."
            )
        if len(image) not in (1, len(samples)) or image.shape[2:] != samples.shape[2:]:
            raise ValueError(
                f"The conditions of '{socket}' have shape {list(image.shape)} but the latent "
                f"{list(samples.shape)}: views, frames and size must agree; use the latent of "
                "Multi-View Conditioning."
            )


def latent_previewer(model: ModelPatcher) -> latent_preview.LatentPreviewer | None:
    """ComfyUI's previewer; its quick colour map where previews are off in its settings.

    Seeing all views take shape is what this sampler is for, and the map costs next to nothing.
    """
    latent_format = model.model.latent_format
    previewer = latent_preview.get_previewer(model.load_device, latent_format)
    if previewer is not None or latent_format.latent_rgb_factors is None:
        return previewer
    return latent_preview.Latent2RGBPreviewer(
        latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias
    )


def grid_callback(model: ModelPatcher, steps: int, labels: list[str]) -> Callable[..., None]:
    """A sampler callback that moves the bar and shows every view in a grid."""
    previewer = latent_previewer(model)
    bar = run.progress(steps)

    def callback(step, x0, x, total_steps):
        picture = None
        if previewer is not None:
            middle = x0[:, :, x0.shape[2] // 2].unsqueeze(2)
            tiles = [preview_tile(previewer, view[None]) for view in middle]
            picture = grid_picture(label_pictures(torch.stack(tiles), labels))
        bar(step + 1, total_steps, picture)

    return callback


TILE_HEIGHT = 128


def preview_tile(
    previewer: latent_preview.LatentPreviewer, latent: Tensor
) -> Tensor:  # [3, h, w] 0..1
    """ComfyUI's own latent preview of one view [1, C, 1, h, w], enlarged."""
    image = previewer.decode_latent_to_preview(latent).convert("RGB")
    picture = torch.from_numpy(np.array(image)).float().movedim(-1, 0) / 255
    width = max(1, round(TILE_HEIGHT * picture.shape[2] / picture.shape[1]))
    return resize_frames(picture[None], width, TILE_HEIGHT)[0]


class MultiViewSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundMultiViewSampler",
            display_name="Multi-View Sampler",
            category=CATEGORY,
            description="Samples all views together and shows them in a grid while it runs. The "
            "same as View Sync followed by ComfyUI's KSampler, with checks in plain words.",
            inputs=[
                io.Model.Input("model", tooltip="The video model."),
                io.Conditioning.Input("positive", tooltip="From Multi-View Conditioning."),
                io.Conditioning.Input("negative", tooltip="From Multi-View Conditioning."),
                io.Latent.Input("latent", tooltip="From Multi-View Conditioning: one batch item "
                                "a view."),
                SYNC.Input("sync", optional=True,
                           tooltip="View-sync weights; without them the training-free form is "
                           "used. Unused when the model comes from View Sync."),
                RIG.Input("rig", optional=True, tooltip="Labels the preview; its number of "
                          "cameras is checked."),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True,
                             tooltip="Same seed, same result."),
                io.Int.Input("steps", default=12, min=1, max=200,
                             tooltip="Turnaround-Tiny: 6. Other Wan models: 20 to 50."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=30.0, step=0.1,
                               tooltip="How strongly the text counts; 1 = no negative, half the "
                               "time."),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS,
                               default="euler", tooltip="ComfyUI's samplers."),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS,
                               default="simple", tooltip="ComfyUI's schedulers."),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01,
                               tooltip="Below 1 the latent's content is kept in part."),
                io.Float.Input("sync_strength", default=1.0, min=0.0, max=4.0, step=0.05,
                               tooltip="0 = every view on its own, 1 = as trained. A model "
                               "that comes from View Sync keeps its own setting."),
                io.Latent.Input("reference", optional=True,
                                tooltip="The performer's own video, from Multi-View Conditioning: "
                                "all views look at it too."),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="For Decode Views.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, positive, negative, latent, seed, steps, cfg, sampler_name, scheduler,
        denoise, sync_strength, sync=None, rig: Rig | None = None, reference: dict | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
        check_rig(rig, samples)
        # At cfg 1 ComfyUI leaves the negative out.
        check_channels(model, positive, negative if cfg != 1 else [], samples)
        if patch.has_view_sync(model):
            # Twice would be too much of it.
            run.say(
                cls,
                "the model comes from View Sync, whose settings count" if sync or reference else "",
            )
        elif sync_strength > 0 or reference is not None:
            model = patch.apply_view_sync(
                model,
                sync,
                len(samples),
                sync_strength,
                reference=reference["samples"] if reference is not None else None,
            )
        labels = list(rig.labels) if rig is not None else [str(v) for v in range(len(samples))]
        noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
        result = comfy.sample.sample(
            model, noise, steps, cfg, sampler_name, scheduler, positive, negative, samples,
            denoise=denoise, noise_mask=latent.get("noise_mask"), seed=seed,
            callback=grid_callback(model, steps, labels),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        )  # fmt: skip
        return io.NodeOutput({**latent, "samples": result})


NODES: list[type[io.ComfyNode]] = [
    MultiViewConditioning,
    LoadViewSync,
    ViewSyncNode,
    MultiViewSampler,
]
