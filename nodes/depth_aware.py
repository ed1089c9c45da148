"""Depth-aware rendering while sampling: one view's surface shown in the others, and what is new there
completed."""

import math
from collections.abc import Sequence

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from einops import rearrange
from torch import Tensor

from ..models.cameras import MAX_VIEWS, Rig
from ..models.feature_mesh import Carried, carried, middle_view
from ..models.feature_mesh_picture import carried_pictures
from ..models.latent_completion import Completion
from ..models.refine_latents import LatentGrid
from ..models.subject import TOKEN
from ..models.views import LATENT_STRIDE, Views, latent_frames, snap_frames
from . import patch_unet, run
from .patch_subject import CARRIED, end_of_share
from .sockets import RIG, VIEWS
from .train_subject import CATEGORY
from .views import frames_to_image

KEY = "turnaround_depth_aware"
TOKEN_CELLS = 2
"""Latent cells along a token of a Wan model."""
CARRY = {"picture": (False, True), "subject": (True, False), "both": (True, True)}
"""Of the node's choices: whether features of the subject and predicted clean latents are carried."""


class DepthAware:
    """Around every call of the model: what the anchor sees is shown in the other views.

    `depth`: [F, H, W] the anchor's. `carry_end`, `completion_end`: noise levels below which it is
    off; inf = never on."""

    def __init__(
        self, depth: Tensor, rig: Rig, anchor: int, what: tuple[bool, bool], carry_end: float,
        completion_end: float, seed: int, frames_are_batch: bool,
    ) -> None:  # fmt: skip
        self.depth, self.rig, self.anchor = depth, rig, anchor
        self.features, self.latents = what
        self.carry_end, self.completion_end, self.seed = carry_end, completion_end, seed
        self.frames_are_batch = frames_are_batch
        self.found: dict[tuple[int, int, int], Carried] = {}
        self.completion: Completion | None = None

    def sampling(self, executor, *args, **kwargs):
        """Around every sampling: no prediction of an earlier one is left."""
        self.completion = None
        try:
            return executor(*args, **kwargs)
        finally:
            self.completion = None

    def __call__(self, executor, x, timestep, model_options=None, seed=None):
        mm.throw_exception_if_processing_interrupted()
        options, level = model_options or {}, float(timestep.flatten()[0])
        views = self.as_views(x)
        T, h, w = views.shape[2:]
        carries = level > self.carry_end
        if carries and self.features:
            options = self._told(options, (T, *(math.ceil(n / TOKEN_CELLS) for n in (h, w))))
        completes = level > self.completion_end
        if completes:
            completion = self._completion(executor.class_obj.inner_model.model_sampling, (T, h, w))
            x = self.like(completion.shown(views, timestep), x)
        x0 = executor(x, timestep, options, seed)
        if carries and self.latents:
            x0 = self.like(self._carried(self.as_views(x0)), x)
        if completes:
            completion.predicted(self.as_views(x0))
        return x0

    def _told(self, options: dict, grid: tuple[int, int, int]) -> dict:
        """With what Apply Subject is to carry."""
        told = options.get("transformer_options", {})
        here = (*told.get(CARRIED, ()), self.carried(grid))
        return {**options, "transformer_options": {**told, CARRIED: here}}

    def _carried(self, x0: Tensor) -> Tensor:  # [V, c, T, h, w]
        T, h, w = x0.shape[2:]
        here = self.carried((T, h, w)).to(x0.device)
        columns = here.replaced(rearrange(x0, "v c t h w -> 1 v (t h w) c"))
        return rearrange(columns, "1 v (t h w) c -> v c t h w", t=T, h=h)

    def _completion(self, sampling, grid: tuple[int, int, int]) -> Completion:
        if self.completion is None:
            unseen = self.carried(grid).newly_visible()[:, None]
            self.completion = Completion(
                unseen, sampling.noise_scaling, self.completion_end, self.seed
            )
        return self.completion

    def carried(self, grid: tuple[int, int, int]) -> Carried:  # T, rows, columns
        """Rendered once; kept for the next sampling."""
        if grid not in self.found:
            T, h, w = grid
            depth = self.depth[of_latent_frames(len(self.depth), T, self.frames_are_batch)]
            self.found[grid] = carried(depth, self.rig, self.anchor, (h, w))
        return self.found[grid]

    def as_views(self, x: Tensor) -> Tensor:  # -> [V, c, T, h, w]
        """Views are batch items, or the latent frames of one item, or (Stable Video Diffusion) batch
        items of which each is a frame of a view."""
        V = len(self.rig)
        if x.ndim == 4 and self.frames_are_batch and len(x) % V == 0:
            views = rearrange(x, "(v t) c h w -> v c t h w", v=V)
        elif x.ndim == 5 and len(x) == V:
            views = x
        elif x.ndim == 5 and len(x) == 1 and x.shape[2] == V:
            views = rearrange(x, "1 c v h w -> v c 1 h w")
        else:
            raise ValueError(
                f"'rig' of Depth-Aware Rendering has {V} cameras, but the latent brings shape "
                f"{list(x.shape)}: sample one batch item or one latent frame a camera."
            )
        _check_shape(self.rig, *views.shape[3:])
        return views

    def like(self, views: Tensor, x: Tensor) -> Tensor:
        """The inverse."""
        if x.ndim == 4:
            return rearrange(views, "v c t h w -> (v t) c h w")
        return views if len(x) == len(views) else rearrange(views, "v c 1 h w -> 1 c v h w")


def _check_shape(rig: Rig, h: int, w: int) -> None:
    # A side of whole tokens may be nearly one too long.
    if abs(w / h / (rig.width / rig.height) - 1) >= TOKEN_CELLS / min(h, w):
        raise ValueError(
            f"The latent is {w}x{h} cells, but the pictures of Depth-Aware Rendering's 'rig' are "
            f"{rig.width}x{rig.height}, another shape: use the rig of the views that are sampled."
        )


def of_latent_frames(count: int, frames: int, one_each: bool) -> list[int]:
    """Which of `count` depth frames belongs to each of `frames` latent frames; one sentence when they
    are of another length. One depth frame is for all."""
    if count == 1:
        return [0] * frames
    expected = count if one_each else latent_frames(snap_frames(count))
    if frames != expected:
        raise ValueError(
            f"The latent has {frames} latent frames, but 'depth' of Depth-Aware Rendering has {count} "
            f"frames, which are {expected}: give depth of as many frames as are sampled, or of one."
        )
    grid = LatentGrid(frames, 1, 1, 1, 1 if one_each else LATENT_STRIDE)
    return [grid.picture_of(t) for t in range(frames)]


def depth_aware(
    model: ModelPatcher, rig: Rig, depth: Tensor, anchor: int, carry: str, share: float,
    completion: float, seed: int,
) -> ModelPatcher:  # depth: [F, H, W]  # fmt: skip
    """A clone of MODEL; the model itself where nothing would be done."""
    if (share == 0 and completion == 0) or len(rig) == 1:
        return model
    ends = (end_of_share(model, s) if s > 0 else math.inf for s in (share, completion))
    wrapper = DepthAware(
        depth, rig, anchor, CARRY[carry], *ends, seed,
        patch_unet.is_unet_video(model),
    )  # fmt: skip
    patched = model.clone()
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, wrapper.sampling)
    patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, wrapper)
    return patched


class DepthAwareRendering(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundDepthAwareRendering",
            display_name="Depth-Aware Rendering",
            category=CATEGORY,
            description="While sampling, lays what one view shows on its depth and shows it in the "
            "other views, so that one surface looks the same everywhere; what that view does not "
            "see is completed. With a subject or without, for any sampler.",
            inputs=[
                io.Model.Input("model", tooltip="The video model, with Apply Subject and View Sync or "
                               "without; order does not matter."),
                RIG.Input("rig", tooltip="The cameras of the views that are sampled."),
                VIEWS.Input("depth", tooltip="In metres, of the same rig or of the anchor alone: from "
                            "Render Subject, Render Conditions or a depth node."),
                io.Int.Input("anchor", default=-1, min=-1, max=MAX_VIEWS - 1,
                             tooltip="The view that is shown in the others, from 0; -1 = the middle "
                             "one."),
                io.Combo.Input("carry", options=list(CARRY), default="picture",
                               tooltip="What is shown in the other views: the picture that is being "
                               "made, what the subject's fields see (needs Apply Subject), or both."),
                io.Float.Input("share", default=1.0, min=0.0, max=1.0, step=0.01,
                               tooltip="Of the steps, from the first, in which it is shown. 0.7 is "
                               "published; 0 = off."),
                io.Float.Input("completion", default=0.3, min=0.0, max=1.0, step=0.01,
                               tooltip="Of the steps, from the first, in which parts that the anchor "
                               "does not see go on from what was predicted for them; 0 = off."),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1,
                             control_after_generate=True,
                             tooltip="Of the noise of the completion."),
                VIEWS.Input("colors", optional=True, tooltip="For the picture alone: what the anchor "
                            "shows, from Render Subject or any views of the rig."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For any sampler."),
                io.Image.Output(display_name="picture", tooltip="Every view as the anchor tells it; "
                                "what is newly visible in orange."),
                io.String.Output(display_name="note", tooltip="How much of each view the anchor "
                                 "tells."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, rig: Rig, depth: Views, anchor, carry, share, completion, seed,
        colors: Views | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        anchor = anchor_of(rig, anchor)
        metres = of_anchor("depth", depth, rig, anchor, 1)[:, 0]
        middle = _shown_moment(metres)
        shown = None
        if colors is not None:
            frames = of_anchor("colors", colors, rig, anchor, 3)
            frames = frames.float() / 255 if frames.dtype == torch.uint8 else frames
            shown = frames[[middle if len(frames) == len(metres) else len(frames) // 2]]
        size = max(1, round(rig.height / TOKEN)), max(1, round(rig.width / TOKEN))
        pictures = carried_pictures(metres[[middle]], rig, anchor, size, shown)[:, 0]
        told = carried(metres[[middle]], rig, anchor, size).seen.flatten(1).float().mean(1)
        patched = depth_aware(model, rig, metres, anchor, carry, share, completion, seed)
        if patched is model:
            why = "one view has no other" if len(rig) == 1 else "share and completion are 0"
            note = f"the model is unchanged: {why}"
        else:
            note = _note(rig, anchor, told.tolist())
        return io.NodeOutput(patched, frames_to_image(pictures), run.say(cls, note))


def _shown_moment(metres: Tensor) -> int:  # [F, H, W]
    """The middle one of those that show something."""
    there = (metres > 0).flatten(1).any(1).nonzero()[:, 0].tolist()
    return there[len(there) // 2] if there else 0


def _note(rig: Rig, anchor: int, told: Sequence[float]) -> str:
    others = [f"{rig.labels[v]} {x:.0%}" for v, x in enumerate(told) if v != anchor]
    more = f" and {len(others) - 8} more" if len(others) > 8 else ""
    return f"anchor {rig.labels[anchor]}; of the other views it tells {', '.join(others[:8])}{more}"


def anchor_of(rig: Rig, anchor: int) -> int:
    """-1 is the middle one; one sentence when there is no such view."""
    if anchor >= len(rig):
        raise ValueError(
            f"'anchor' is view {anchor}, but the rig has {len(rig)} views: give 0 to {len(rig) - 1}, "
            "or -1 for the middle one."
        )
    return middle_view(rig) if anchor < 0 else anchor


def of_anchor(
    name: str, views: Views, rig: Rig, anchor: int, channels: int
) -> Tensor:  # [F, channels, H, W]
    """The anchor's own; one sentence when they are not views of the rig, or of another kind."""
    count, found = len(views), views.frames.shape[2]
    if found != channels:
        wanted = (
            "depth in metres, as Render Subject" if channels == 1 else "colors, as Render Subject"
        )
        raise ValueError(
            f"'{name}' holds {'colors' if found == 3 else 'depth'}, but {wanted} gives, is needed: "
            "connect that output."
        )
    if count not in (1, len(rig)):
        raise ValueError(
            f"'{name}' has {count} views, but 'rig' {len(rig)} cameras: give one view a camera, or the "
            "anchor's alone."
        )
    return views.frames[anchor if count > 1 else 0]


NODES: list[type[io.ComfyNode]] = [DepthAwareRendering]
