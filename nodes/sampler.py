"""Sampling: conditions to latents, view sync, and a sampler that shows all views."""

import comfy.sample
import comfy.samplers
import comfy.utils
import folder_paths
import latent_preview
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..models.cameras import Rig
from ..models.sync_layouts import OtherSync
from ..models.view_sync import MODES
from ..models.views import Views, grid_picture, label_pictures, resize_frames
from . import patch, run, windows
from .check_conditions import check_conditions
from .conditioning import CATEGORY
from .sockets import RIG, SYNC, VIEWS, WEIGHTS
from .weights import unseen_only

REFERENCE_USES = ("views and text", "views", "text")
REFERENCE_ALONE = (
    "without sync weights a reference does more harm than good in the models tried: leave "
    "'reference' free, or connect 'sync'"
)


class LoadViewSync(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundLoadViewSync",
            display_name="Load View Sync",
            category=CATEGORY,
            description="Loads trained view-sync weights from ComfyUI's model_patches folder. "
            "SynCamMaster's and 4DAnyone's are recognised too.",
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
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("model_patches", name)
        sync = patch.load_sync(path)
        layers = sync.model
        if isinstance(layers, OtherSync):
            run.say(
                cls,
                f"{layers.name} sync weights for {len(layers.blocks)} blocks of width {layers.dim}; "
                f"{layers.ignored} other weights of the file are not used here",
            )
        return io.NodeOutput(sync)


class ViewSyncNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundViewSync",
            display_name="View Sync",
            category=CATEGORY,
            description="Lets the views of one moment look at each other inside the model, so "
            "that clothes and limbs agree from every side. With sync weights it is what the model "
            "was trained with; without, it works on Wan and Stable Video Diffusion models as they "
            "are. Use any sampler after it.",
            inputs=[
                io.Model.Input("model", tooltip="A Wan-type video model, or Stable Video Diffusion."),
                SYNC.Input("sync", optional=True,
                           tooltip="Trained weights; leave free for the training-free form."),
                RIG.Input("rig", optional=True,
                          tooltip="The rig, to check that the latent has as many views; needed by "
                          "sync weights that know cameras and by Stable Video Diffusion."),
                io.Latent.Input("reference", optional=True,
                                tooltip="The performer's own video, from Multi-View Conditioning: "
                                "all views look at it too. Or several clean clips in one batch."),
                io.Float.Input("strength", default=1.0, min=0.0, max=4.0, step=0.05,
                               tooltip="0 = off, 1 = as trained; more pulls the views closer "
                               "together and blurs in the end."),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01,
                               tooltip="Where in the sampling it begins."),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01,
                               tooltip="Where in the sampling it ends."),
                io.Combo.Input("mode", options=list(MODES), default="frame", optional=True,
                               tooltip="frame: a view looks at all views of the same moment. dense: "
                               "at all views of all moments; slow and hungry. weighted: as frame, "
                               "but views count as View Weights says."),
                WEIGHTS.Input("weights", optional=True,
                              tooltip="For mode 'weighted', from View Weights."),
                io.Combo.Input("reference_use", options=list(REFERENCE_USES), optional=True,
                               default="views and text",
                               tooltip="views: the reference takes part as one more view. text: its "
                               "tokens follow the prompt, which needs sync weights trained for it."),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model, with its views in touch.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, strength, start_percent, end_percent, sync=None, rig: Rig | None = None,
        reference: dict | None = None, mode="frame", weights=None, reference_use="views and text",
    ) -> io.NodeOutput:  # fmt: skip
        run.say(cls, REFERENCE_ALONE if reference is not None and sync is None else "")
        return io.NodeOutput(
            patch.apply_view_sync(
                model,
                sync,
                views=len(rig) if rig is not None else 0,
                strength=strength,
                start_percent=start_percent,
                end_percent=end_percent,
                mode=mode,
                weights=weights.values if weights is not None else None,
                cameras=rig.T_camera_world if rig is not None else None,
                reference=reference["samples"] if reference is not None else None,
                reference_is_seen="views" in reference_use,
                reference_is_text="text" in reference_use,
            )
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


PARTS = 100
"""Of a step, where groups and windows (View Windows) are counted too."""


class GridProgress:
    """Moves the bar, after every step and every group of views, and shows all views in a grid."""

    def __init__(self, model: ModelPatcher, steps: int, labels: list[str]) -> None:
        self.previewer, self.labels = latent_previewer(model), labels
        self.parts = PARTS if windows.has_windows(model) else 1
        self.step, self.steps, self.part = 0, steps, 0
        self.bar = run.progress(self.parts * steps)

    def after_step(self, step: int, x0: Tensor, _x: Tensor, total_steps: int) -> None:
        picture = None
        if self.previewer is not None:
            middle = x0[:, :, x0.shape[2] // 2].unsqueeze(2)
            tiles = [preview_tile(self.previewer, view[None]) for view in middle]
            picture = grid_picture(label_pictures(torch.stack(tiles), self.labels))
        self.step, self.steps = step + 1, total_steps
        self.bar(self.parts * self.step, self.parts * total_steps, picture)

    def after_tile(self, done: int, total: int) -> None:
        # Some samplers ask the model more than once a step: the bar waits, short of the next one.
        part = min(self.parts * done // total, self.parts - 1)
        self.part = max(self.part, self.parts * self.step + part)
        self.bar(self.part, self.parts * self.steps)


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
                VIEWS.Input("visibility", optional=True,
                            tooltip="From Render Conditions: what your camera saw is kept as the "
                            "latent has it, and only the rest is made. The latent then comes from "
                            "Encode Views (the partial colours, or finished views)."),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="For Decode Views.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, positive, negative, latent, seed, steps, cfg, sampler_name, scheduler,
        denoise, sync_strength, sync=None, rig: Rig | None = None, reference: dict | None = None,
        visibility: Views | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        patch.dit_blocks(model)  # or a sentence
        samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
        if samples.ndim != 5:
            raise ValueError(
                f"'latent' holds pictures (shape {list(samples.shape)}), not one video a view: use "
                "the latent of Multi-View Conditioning or Encode Views."
            )
        # At cfg 1 ComfyUI leaves the negative out.
        check_conditions(model, positive, negative if cfg != 1 else [], samples, rig)
        if visibility is not None:
            latent = unseen_only(latent, visibility)
        if patch.has_view_sync(model):
            # Twice would be too much of it.
            run.say(
                cls,
                "the model comes from View Sync, whose settings count" if sync or reference else "",
            )
        elif sync_strength > 0 or reference is not None:
            run.say(cls, REFERENCE_ALONE if reference is not None and sync is None else "")
            model = patch.apply_view_sync(
                model,
                sync,
                views=len(samples),
                strength=sync_strength,
                reference=reference["samples"] if reference is not None else None,
            )
        labels = list(rig.labels) if rig is not None else [str(v) for v in range(len(samples))]
        noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
        progress = GridProgress(model, steps, labels)
        model = windows.reporting(model, progress.after_tile)
        result = comfy.sample.sample(
            model, noise, steps, cfg, sampler_name, scheduler, positive, negative, samples,
            denoise=denoise, noise_mask=latent.get("noise_mask"), seed=seed,
            callback=progress.after_step,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        )  # fmt: skip
        return io.NodeOutput({**latent, "samples": result})


NODES: list[type[io.ComfyNode]] = [
    LoadViewSync,
    ViewSyncNode,
    MultiViewSampler,
]
