"""View sync inside UNet video models (SVD, SV3D), whose batch is the frames of all views.

As in `patch.py` nothing of the host is replaced for good: two wrappers, and attention patches that
are put in at every run of the UNet behind those of other packs, whichever was applied first.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from comfy.ldm.modules import attention as host
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..models.view_sync import Layout, across_views, aligned

KEY = "turnaround_view_sync"
"""Of the wrappers, here and in `patch.py`, which asks by it whether a model has view sync."""
VIEWS = "turnaround_views"
"""Under it conditionings and latents say how many views their frames are of."""


def is_unet_video(model: ModelPatcher) -> bool:
    """Whether this is a UNet with temporal attention, such as SVD."""
    unet = model.get_model_object("diffusion_model")
    return isinstance(unet, UNetModel) and bool(_spatial_blocks(unet))


def _spatial_blocks(unet: UNetModel) -> list[tuple[str, int, int]]:
    """ComfyUI's names of all spatial transformer blocks; each has a temporal one of its name."""
    parts = {
        "input": unet.input_blocks,
        "middle": [unet.middle_block],
        "output": unet.output_blocks,
    }
    return [
        (part, number, index)
        for part, blocks in parts.items()
        for number, layers in enumerate(blocks)
        for layer in layers or ()  # a UNet may have no middle
        if isinstance(layer, host.SpatialVideoTransformer)
        for index in range(len(layer.transformer_blocks))
    ]


def _host_attention(q: Tensor, k: Tensor, v: Tensor, extra: dict) -> Tensor:
    """The attention that ComfyUI would have run here, overrides of other packs included."""
    return host.optimized_attention(
        q, k, v, extra["n_heads"],
        attn_precision=extra["attn_precision"], transformer_options=extra,
    )  # fmt: skip


class SyncedAttention:
    """The self-attentions of one transformer block during one run of the UNet."""

    def __init__(
        self,
        previous: Callable[..., Tensor] | None,  # another pack's patch of the same attention
        items: int,  # n V
        layout: Layout,  # its grid's sizes are of the tokens at hand, see `_at`
        strength: float,
    ) -> None:
        self.previous, self.items = previous, items
        self.layout, self.strength = layout, strength
        self.spatial = True

    def __call__(
        self,
        q: Tensor,  # [n V T, h w, C], then [n V h w, T, C]
        k: Tensor,
        v: Tensor,
        extra: dict,
    ) -> Tensor:
        own = (self.previous or _host_attention)(q, k, v, extra)
        # The two attentions of a block share its name: the spatial one is first, then the temporal.
        spatial, self.spatial = self.spatial, not self.spatial
        if not spatial:
            return own
        if q.shape[:2] != k.shape[:2]:
            raise ValueError(
                f"A patch on this model changes the tokens of its attention ({q.shape[1]} look at "
                f"{k.shape[1]}), so views can't be synchronised in it: remove the other node, "
                "such as Token Merging."
            )

        def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
            return _host_attention(q, k, v, extra)

        layout = _at(self.layout, len(q) // self.items, q.shape[1])
        tokens = (t.reshape(self.items, -1, t.shape[-1]) for t in (q, k, v))
        across = across_views(attention, *tokens, extra["n_heads"], layout)
        return aligned(own, across.reshape(own.shape), self.strength)


def _at(layout: Layout, frames: int, tokens: int) -> Layout:
    """The layout at one resolution of the UNet; patches that attend in tiles bring more 'frames'."""
    return replace(layout, grid=(frames, tokens, 1))


class FramesOfViews:
    """Before every run of the UNet: which frames belong together, and whether sync is on."""

    def __init__(
        self,
        views: int,  # 0 = as the conditioning says
        mode: str,
        strength: float,
        sigma_start: float,
        sigma_end: float,
        weights: Tensor | None,  # [V]
    ) -> None:
        self.views, self.mode, self.strength, self.weights = views, mode, strength, weights
        self.sigma_start, self.sigma_end = sigma_start, sigma_end

    def __call__(
        self, executor, x, timesteps=None, context=None, y=None, control=None,
        transformer_options=None, **kwargs,
    ):  # fmt: skip
        options = dict(transformer_options or {})
        chunks = len(options.get("cond_or_uncond", [0]))
        tile = options.get("turnaround_tile")
        views = len(tile["views"]) if tile else self.views or options.get(VIEWS, 0)
        # ComfyUI takes the whole batch for one video.
        kwargs["num_video_frames"] = frames_of_view(len(x) // chunks, views)
        sigma = float(options["sigmas"][0]) if "sigmas" in options else self.sigma_start
        if self.strength > 0 and views > 1 and self.sigma_end <= sigma <= self.sigma_start:
            weights = self.weights
            if weights is not None:
                weights = weights[tile["views"] if tile else slice(None)].to(x.device)
            layout = Layout(views, (1, 1, 1), self.mode, weights)
            options["patches_replace"] = self._synced(executor.class_obj, options, chunks, layout)
        return executor(x, timesteps, context, y, control, options, **kwargs)

    def _synced(self, unet: UNetModel, options: dict, chunks: int, layout: Layout) -> dict:
        """All replaced attentions: those of other packs, and around them every spatial block's."""
        replaced = options.get("patches_replace", {})
        others = replaced.get("attn1", {})
        ours = {
            block: SyncedAttention(
                others.get(block, others.get(block[:2])),
                chunks * layout.views,
                layout,
                self.strength,
            )
            for block in _spatial_blocks(unet)
        }
        return {**replaced, "attn1": {**others, **ours}}


def frames_of_view(batch: int, views: int) -> int:
    """T of a batch of V T frames, or a sentence."""
    if views < 1:
        raise ValueError(
            f"The latent holds {batch} frames, but nothing says of how many views: connect the rig "
            "to View Sync, or use Multi-View SVD Conditioning."
        )
    if batch % views:
        raise ValueError(
            f"The latent holds {batch} frames, which {views} views can't share evenly: use the "
            "latent of Multi-View SVD Conditioning, made with the same rig."
        )
    return batch // views


class StepOfViews:
    """Around every step: the conditioning's count of views, and guidance for each view alone."""

    def __init__(self, views: int) -> None:  # 0 = as the conditioning says
        self.views = views

    def __call__(self, executor, x, timestep, model_options=None, seed=None):
        views = self._count(executor.class_obj.conds)
        model_options = dict(model_options or {})
        if views:
            to = model_options.get("transformer_options", {})
            model_options["transformer_options"] = {**to, VIEWS: views}
            guidance = model_options.get("sampler_cfg_function")
            if guidance is not None:
                model_options["sampler_cfg_function"] = one_view_at_a_time(guidance, views)
        return executor(x, timestep, model_options, seed)

    def _count(self, conditions: dict[str, list[dict]]) -> int:
        told = {c[VIEWS] for group in conditions.values() for c in group or () if VIEWS in c}
        views = self.views or max(told, default=0)
        for other in told - {views}:
            raise ValueError(
                f"View Sync is set for {views} views, but the conditioning was made for {other}: "
                "use the same rig for both."
            )
        return views


def one_view_at_a_time(guidance: Callable[[dict], Tensor], views: int) -> Callable[[dict], Tensor]:
    """Guidance that ramps over the frames (Video Linear CFG) restarts at every view."""

    def guided(args: dict) -> Tensor:
        batch = len(args["input"])
        frames = frames_of_view(batch, views)

        def of_view(value, first: int):
            if isinstance(value, Tensor) and value.ndim and len(value) == batch:
                return value[first : first + frames]
            return value

        parts = ({key: of_view(value, first) for key, value in args.items()}
                 for first in range(0, batch, frames))  # fmt: skip
        return torch.cat([guidance(part) for part in parts])

    return guided


def apply(
    model: ModelPatcher,
    views: int = 0,  # 0 = as the weights or the conditioning say
    mode: str = "frame",
    strength: float = 1.0,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    weights: Tensor | None = None,  # [V], of mode "weighted"
) -> ModelPatcher:
    """A clone of MODEL that knows the views apart and lets their spatial attention reach across."""
    views = views or (len(weights) if weights is not None else 0)
    if views:
        Layout(views, (1, 1, 1), mode, weights)  # says now what it would say in the first step
    earlier = model.get_wrappers(WrappersMP.DIFFUSION_MODEL, KEY)
    for other in earlier:
        if views and other.views not in (0, views):
            raise ValueError(
                f"This model was set for {other.views} views by another View Sync, and this one "
                f"has {views}: use the same rig for both."
            )
    sampling = model.get_model_object("model_sampling")
    start, end = (float(sampling.percent_to_sigma(p)) for p in (start_percent, end_percent))
    patched = model.clone()
    wrapper = FramesOfViews(views, mode, strength, start, end, weights)
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, wrapper)
    # Once: a second one would divide the frames of a view again.
    patched.remove_wrappers_with_key(WrappersMP.PREDICT_NOISE, KEY)
    count = max([views, *(other.views for other in earlier)])
    patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, StepOfViews(count))
    return patched
