"""The only file that reaches into a MODEL: view sync through block patches and a wrapper.

Nothing of the host is replaced: block patches chain with those already there, the attention
override calls the one before it, and all per-run state rides in `transformer_options`.
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ..models import sync_layouts
from ..models.view_sync import (
    Layout,
    ViewSync,
    by_moments,
    extended_attention,
    reference_context,
    sync_layout,
)
from . import patch_unet

KEY = patch_unet.KEY
REFERENCE = "turnaround_reference"
"""In `transformer_options`: {"count", "is_seen"} of the references in front of every chunk."""
TILE = "turnaround_tile"
"""In `transformer_options`: which views and frames of the whole this run holds (View Windows)."""
VIEWS_AT_ONCE = "turnaround_views_at_once"
"""In `transformer_options`: views that a block works on at a time."""


def load_sync(path: str) -> ModelPatcher:
    """Sync weights as a model that ComfyUI loads and offloads with the main one."""
    sync_layouts.check_name(path)
    weights = comfy.utils.load_torch_file(path, safe_load=True)
    offload, dtype = mm.unet_offload_device(), comfy.utils.weight_dtype(weights)
    where = (offload, dtype, comfy.ops.manual_cast)
    if sync_layouts.of_others(weights):
        sync = sync_layouts.build(weights, *where)
    else:
        sync = ViewSync(*sync_layout(weights), *where)
        sync.load_state_dict(weights)
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return patcher(sync, load_device=mm.get_torch_device(), offload_device=offload)


def dit_blocks(model: ModelPatcher) -> list:
    """The transformer blocks of a Wan-like model, or a sentence."""
    dit = model.get_model_object("diffusion_model")
    blocks = getattr(dit, "blocks", None)
    if blocks is None or not hasattr(dit, "patch_embedding"):
        raise ValueError(
            "'model' is not a Wan-type video model, so views can't be synchronised in it: load "
            "Turnaround-Tiny or a Wan 2.1 / 2.2 checkpoint with Load Diffusion Model (View Sync "
            "also takes Stable Video Diffusion)."
        )
    return blocks


@dataclass
class Run:
    """View sync during one call of the DiT."""

    chunks: int
    views: int
    """Of one chunk; guests, which are counted at the tokens, come on top."""
    grid: tuple[int, int, int]
    strength: float
    mode: str
    weights: Tensor | None
    cameras: Tensor | None
    refers: bool
    """Text is followed by the reference's tokens."""
    blocks: nn.ModuleList
    guests_are_seen: bool = True
    """References take part in sync attention."""
    self_attention_is_next: bool = False

    def guests(self, tokens: Tensor) -> int:
        """References in front of every chunk: counted here, since any wrapper may add some."""
        return len(tokens) // self.chunks - self.views

    def layout(self, tokens: Tensor) -> Layout:  # [n items, L, C], guests counted
        """Of the items that take part."""
        guests = self.guests(tokens) if self.guests_are_seen else 0
        weights = self.weights
        if weights is not None:
            # A reference is what was filmed: it counts as much as the best view.
            weights = torch.cat([weights.max().expand(guests), weights]).to(tokens.device)
        grid = self._grid(tokens.shape[1])
        views = self.views + guests
        # Layers that count views count them within the group, references behind the views.
        numbers = torch.cat([self.views + torch.arange(guests), torch.arange(self.views)])
        return Layout(views, grid, self.mode, weights, self.cameras, numbers)

    def _grid(self, tokens: int) -> tuple[int, int, int]:
        T, h, w = self.grid
        ahead, rest = divmod(tokens - T * h * w, h * w)
        if rest or ahead < 0:
            raise ValueError(
                f"The model works on {tokens} tokens a view where the latent has {T * h * w} (it "
                "adds tokens of its own that are no pictures): view sync can't be used with this "
                "checkpoint."
            )
        # A reference picture of the model's own stands before the clip as one more frame.
        return T + ahead, h, w

    def apart(self, tokens: Tensor) -> int:
        """Items in front of every chunk that take no part."""
        return 0 if self.guests_are_seen else self.guests(tokens)

    def divide(self, *tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """[n V, ...] each as the items that are apart, and the others."""
        apart = self.apart(tensors[0])
        chunked = [t.unflatten(0, (self.chunks, -1)) for t in tensors]
        return tuple(
            [t[:, part].flatten(0, 1) for t in chunked]
            for part in (slice(0, apart), slice(apart, None))
        )

    def join(self, apart: Tensor, others: Tensor) -> Tensor:
        """The inverse of `divide`."""
        parts = [t.unflatten(0, (self.chunks, -1)) for t in (apart, others)]
        return torch.cat(parts, 1).flatten(0, 1)


class ReplacedBlock:
    """What stands in the place of one DiT block, around whatever was there: another pack's patch, or the
    block. `weights` are loaded and offloaded with the model."""

    def __init__(self, index: int, previous, weights: ModelPatcher | None, key: str) -> None:
        self.index, self.previous, self.weights, self.key = index, previous, weights, key

    def _inner(self, args: dict, extra: dict) -> dict:
        """Whatever was there."""
        if self.previous is not None:
            return self.previous(args, extra)
        return extra["original_block"](args)

    def __deepcopy__(self, memo: dict) -> "ReplacedBlock":
        # ComfyUI deep-copies patches whenever a model is cloned; the weights must stay shared.
        previous = copy.deepcopy(self.previous, memo)
        return type(self)(self.index, previous, self.weights, self.key)

    def to(self, device_or_dtype) -> "ReplacedBlock":
        if not hasattr(self.previous, "to"):
            return self
        previous = self.previous.to(device_or_dtype)
        return type(self)(self.index, previous, self.weights, self.key)

    def models(self) -> list:
        before = self.previous.models() if hasattr(self.previous, "models") else []
        return [*before, *([self.weights] if self.weights is not None else [])]


def replace_blocks(
    patched: ModelPatcher,  # a clone already
    kind: type[ReplacedBlock],
    indices: Iterable[int],
    weights: ModelPatcher | None,
    key: str,
) -> None:
    """Put a block of a kind around each of these, and around what stands there."""
    options = patched.model_options["transformer_options"]
    existing = options.get("patches_replace", {}).get("dit", {})
    for index in indices:
        block = kind(index, existing.get(("double_block", index)), weights, key)
        patched.set_model_patch_replace(block, "dit", "double_block", index)


class SyncedBlock(ReplacedBlock):
    """Whatever was there, then view sync as `key` has it at this run."""

    def __call__(self, args: dict, extra: dict) -> dict:
        if "transformer_options" not in args:
            raise ValueError(
                "This kind of Wan model (sound to video) doesn't tell its blocks how the batch "
                "divides into views: use View Sync with another Wan checkpoint."
            )
        mm.throw_exception_if_processing_interrupted()
        options = args["transformer_options"]
        run = options.get(self.key)
        if run is None:  # off at this step
            return self._in_parts(args, extra)
        run.guests_are_seen = options.get(REFERENCE, {}).get("is_seen", True)
        alone = run.views + run.guests(args["img"]) - run.apart(args["img"]) == 1
        off = run.strength == 0 or alone
        if self.weights is None:
            if off:
                return self._inner(args, extra)
            marked = {**extra, "original_block": _marked(extra["original_block"], run)}
            return self._inner(args, marked)
        args = self._with_reference(args, run)
        if off:  # it reads the reference, no more
            return self._in_parts(args, extra)
        layer = self.weights.model.blocks[str(self.index)]
        if layer.place == "before_text":
            return self._before_text(layer, args, extra, run)
        out = self._in_parts(args, extra)
        return {**out, "img": self._synced(layer, out["img"], args, run)}

    def _in_parts(self, args: dict, extra: dict) -> dict:
        """The block on some views of every chunk at a time: it treats views one by one, so this
        changes nothing but the memory."""
        options = args["transformer_options"]
        batch, chunks = len(args["img"]), len(options.get("cond_or_uncond", [0]))
        items, at_once = batch // chunks, options.get(VIEWS_AT_ONCE, 0)
        # A patch of another pack expects all of them.
        if not at_once or at_once >= items or self.previous is not None:
            return self._inner(args, extra)

        def some(value, views: slice):
            if not isinstance(value, Tensor) or len(value) != batch:
                return value
            return value.unflatten(0, (chunks, items))[:, views].flatten(0, 1)

        parts = []
        for start in range(0, items, at_once):
            views = slice(start, start + at_once)
            chosen = {k: some(args[k], views) for k in ("img", "txt", "vec")}
            out = self._inner({**args, **chosen}, extra)
            parts.append(out["img"].unflatten(0, (chunks, -1)))
        return {**out, "img": torch.cat(parts, 1).flatten(0, 1)}

    def _synced(self, layer: nn.Module, x: Tensor, args: dict, run: Run) -> Tensor:
        """Tokens with the layer's change added, at this run's strength."""
        (guests, _), (views, vec) = run.divide(x, args["vec"])
        layout = run.layout(x)
        if args["transformer_options"].get(VIEWS_AT_ONCE):
            synced = by_moments(layer, views, vec, args["pe"], layout)
        else:
            synced = layer(views, vec, args["pe"], layout)
        # At strength 1 the layer's own result, so that it is what training saw.
        synced = synced if run.strength == 1 else views.lerp(synced, run.strength)
        return run.join(guests, synced)

    def _before_text(self, layer: nn.Module, args: dict, extra: dict, run: Run) -> dict:
        """Sync between the block's self-attention and its text attention.

        The text attention reads x through norm3 and is added to x: so norm3 is handed the
        synchronised x, and the change is added to what the text attention gives.
        """
        block, change = run.blocks[self.index], []

        def before(_module, inputs):
            x = inputs[0]
            synced = self._synced(layer, x, args, run)
            change.append(synced - x)
            return (synced, *inputs[1:])

        def after(_module, _inputs, output):
            return output + change.pop()

        hooks = [
            block.norm3.register_forward_pre_hook(before),
            block.cross_attn.register_forward_hook(after),
        ]
        try:
            return self._inner(args, extra)
        finally:
            for hook in hooks:
                hook.remove()

    def _with_reference(self, args: dict, run: Run) -> dict:
        """The block's arguments, the reference's tokens behind the text where they were trained."""
        norms = self.weights.model.references
        if not run.refers or str(self.index) not in norms:
            return args
        norm, items = norms[str(self.index)], len(args["img"]) // run.chunks
        return {**args, "txt": reference_context(args["txt"], args["img"], norm, items)}


def _marked(original_block, run: Run):
    """The block, with a mark on its first attention call, which is its self-attention."""

    def block(args: dict) -> dict:
        run.self_attention_is_next = True
        out = original_block(args)
        run.self_attention_is_next = False
        return out

    return block


def _attention_override(run: Run, previous):
    """The training-free form: extends the self-attention of every marked block."""

    def override(func, q, k, v, heads, **kwargs):
        def attention(q, k, v, heads):
            if previous is not None:
                return previous(func, q, k, v, heads, **kwargs)
            return func(q, k, v, heads, **kwargs)

        if not run.self_attention_is_next:
            return attention(q, k, v, heads)
        run.self_attention_is_next = False
        guests, views = run.divide(q, k, v)
        out = extended_attention(attention, *views, heads, run.layout(q), run.strength)
        return out if not run.apart(q) else run.join(attention(*guests, heads), out)

    return override


def _split(batch: int, chunks: int, expected: int, guests: int, tile: dict | None) -> int:
    """Views in a batch of `chunks` conditionings, each with so many guests beside the views."""
    views, rest = divmod(batch, chunks)
    views -= guests
    brought = views if tile is None else tile["of_views"]
    if rest or (expected and brought != expected):
        raise ValueError(
            f"View Sync was set for {expected or 'several'} views, but the latent brings "
            f"{brought}: use the same rig for View Sync and for the conditions."
        )
    return views


def _with_first(value, batch: int, views: int, count: int):
    """What has a row for every view of the batch gets `count` more in front of every chunk."""
    if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != batch:
        return value
    chunks = value.unflatten(0, (-1, views))
    return torch.cat([*(count * [chunks[:, :1]]), chunks], 1).flatten(0, 1)


MASK_CHANNELS = 4
"""What image-to-video checkpoints have between noise and picture: 1 where it is known. ComfyUI itself
adds them to what conditions bring."""


def add_reference(
    x: Tensor,  # [n V, C, T, h, w] noisy latents and conditions
    reference: Tensor,  # [R, c, T or 1, h, w] clean
    views: int,
) -> Tensor:  # [n (R + V), C, T, h, w]
    """The references in front of every chunk: clean, known in full, nothing else known of them."""
    if reference.shape[2] == 1:  # a picture
        reference = reference.expand(-1, -1, x.shape[2], -1, -1)
    if reference.shape[2:] != x.shape[2:]:
        raise ValueError(
            f"The reference has {reference.shape[2]} latent frames of {reference.shape[4]}x"
            f"{reference.shape[3]} but the views {x.shape[2]} of {x.shape[4]}x{x.shape[3]}: take "
            "it from the Multi-View Conditioning that made the latent."
        )
    items = known_items(reference.to(x), x.shape[1])
    chunks = x.unflatten(0, (-1, views))
    return torch.cat([items.expand(len(chunks), *items.shape), chunks], 1).flatten(0, 1)


def known_items(clean: Tensor, channels: int) -> Tensor:  # [R, c, T, h, w] -> [R, channels, ...]
    """Clean latents as what a model of so many input channels is told: known in full, no more."""
    depth = clean.shape[1]
    items = clean.new_zeros(len(clean), channels, *clean.shape[2:])
    items[:, :depth] = clean
    if channels == 2 * depth + MASK_CHANNELS:
        items[:, depth:] = torch.cat([torch.ones_like(clean[:, :MASK_CHANNELS]), clean], 1)
    elif channels >= 2 * depth:
        items[:, depth : 2 * depth] = clean
    return items


@dataclass(frozen=True)
class Settings:
    """What a creator sets on View Sync."""

    views: int = 0
    """0 = as many as the latent brings."""
    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    mode: str = "frame"
    weights: Tensor | None = None
    """[V] > 0; of mode "weighted"."""
    cameras: Tensor | None = None
    """[V, 4, 4] T_camera_world, for sync weights that were trained with cameras."""
    reference: Tensor | None = None
    """[R, c, T or 1, h, w] latents of clean clips: the performer's own video, or finished views."""
    reference_is_seen: bool = True
    """References take part in sync attention."""
    reference_is_text: bool = True
    """The first reference's tokens follow the text."""


class ViewSyncWrapper:
    """Before every run of the DiT: how the batch divides into views, and whether sync is on."""

    def __init__(self, key: str, settings: Settings, sigmas: tuple[float, float], free: bool):
        self.key, self.settings, self.free = key, settings, free
        self.sigma_start, self.sigma_end = sigmas

    @property
    def reference(self) -> Tensor | None:
        return self.settings.reference

    def __call__(
        self, executor, x, timestep, context, clip_fea=None, time_dim_concat=None,
        transformer_options=None, **kwargs,
    ):  # fmt: skip
        options = dict(transformer_options or {})
        sigma = float(options["sigmas"][0]) if "sigmas" in options else self.sigma_start
        on = self.sigma_end <= sigma <= self.sigma_start
        chunks = len(options.get("cond_or_uncond", [0]))
        # A wrapper around this one may have put references in front of every chunk.
        guests = options.get(REFERENCE, {}).get("count", 0)
        tile = options.get(TILE)
        views = _split(len(x), chunks, self.settings.views, guests, tile)
        refers = on and self.reference is not None
        if refers or (on and self.settings.strength > 0):
            run = self._run(executor.class_obj, x, time_dim_concat, chunks, views, tile, refers)
            options[self.key] = run
            if self.free and self.settings.strength > 0:
                options["optimized_attention_override"] = _attention_override(
                    run, options.get("optimized_attention_override")
                )
        if not refers:
            return executor(x, timestep, context, clip_fea, time_dim_concat, options, **kwargs)
        batch, items, count = len(x), views + guests, len(self.reference)
        options[REFERENCE] = {"count": count, "is_seen": self.settings.reference_is_seen}
        reference = self.reference
        if tile is not None and reference.shape[2] > 1:
            reference = reference[:, :, tile["frames"]]
        x = add_reference(x, reference, items)
        timestep, context, clip_fea, time_dim_concat = (
            _with_first(t, batch, items, count)
            for t in (timestep, context, clip_fea, time_dim_concat)
        )
        timestep = timestep.unflatten(0, (chunks, -1)).clone()
        timestep[:, :count] = 0  # clean
        timestep = timestep.flatten(0, 1)
        kwargs = {key: _with_first(value, batch, items, count) for key, value in kwargs.items()}
        out = executor(x, timestep, context, clip_fea, time_dim_concat, options, **kwargs)
        return out.unflatten(0, (chunks, -1))[:, count:].flatten(0, 1)

    def _run(
        self, dit: nn.Module, x: Tensor, time_dim_concat: Tensor | None, chunks: int, views: int,
        tile: dict | None, refers: bool,
    ) -> Run:  # fmt: skip
        settings = self.settings
        added = time_dim_concat.shape[2] if time_dim_concat is not None else 0
        T, h, w = x.shape[2:]

        def of_tile(values: Tensor | None) -> Tensor | None:
            return values if values is None or tile is None else values[tile["views"]]

        return Run(
            chunks,
            views,
            (T + added, math.ceil(h / 2), math.ceil(w / 2)),
            settings.strength,
            settings.mode,
            of_tile(settings.weights),
            of_tile(settings.cameras),
            refers and settings.reference_is_text,
            dit.blocks,
        )


def apply_view_sync(
    model: ModelPatcher,
    sync: ModelPatcher | None = None,  # of a ViewSync; None = training-free
    **settings,  # of Settings
) -> ModelPatcher:
    """A clone of MODEL whose views attend to each other, and to references."""
    settings = Settings(**settings)
    _check_settings(settings)
    if patch_unet.is_unet_video(model):
        return _on_unet(model, sync, settings)
    blocks = dit_blocks(model)
    if settings.reference is not None:
        _check_reference(model, settings)
        settings = replace(settings, reference=model.model.process_latent_in(settings.reference))
    patched = model.clone()
    indices = range(len(blocks)) if sync is None else _trained_blocks(model, sync, settings)
    # Applied several times, each keeps its own weights, strength and range.
    key = f"{KEY}_{len(patched.get_wrappers(WrappersMP.DIFFUSION_MODEL, KEY))}"
    replace_blocks(patched, SyncedBlock, indices, sync, key)
    sampling = model.get_model_object("model_sampling")
    sigmas = tuple(
        float(sampling.percent_to_sigma(p)) for p in (settings.start_percent, settings.end_percent)
    )
    wrapper = ViewSyncWrapper(key, settings, sigmas, free=sync is None)
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, wrapper)
    return patched


def _on_unet(model: ModelPatcher, sync: ModelPatcher | None, settings: Settings) -> ModelPatcher:
    if sync is not None or settings.reference is not None:
        raise ValueError(
            "'model' is a UNet (Stable Video Diffusion), which takes neither 'sync' nor 'reference': "
            "leave both free."
        )
    return patch_unet.apply(
        model, settings.views, settings.mode, settings.strength, settings.start_percent,
        settings.end_percent, settings.weights,
    )  # fmt: skip


def _trained_blocks(model: ModelPatcher, sync: ModelPatcher, settings: Settings) -> list[int]:
    """The blocks that the weights are for, once it is clear that they are for this model."""
    count = len(dit_blocks(model))
    dim = model.get_model_object("diffusion_model").dim
    trained = [int(i) for i in sync.model.blocks]
    if sync.model.dim != dim or max(trained) >= count:
        raise ValueError(
            f"The sync weights are for a model of width {sync.model.dim} with at least "
            f"{max(trained) + 1} blocks, but this model has width {dim} and {count} "
            "blocks: choose the sync file that belongs to the model."
        )
    if getattr(sync.model, "needs_cameras", False):
        if settings.cameras is None:
            raise ValueError(
                "These sync weights were trained with cameras, but 'rig' is not connected: connect "
                "the rig whose views are sampled."
            )
        if settings.reference is not None and settings.reference_is_seen:
            raise ValueError(
                "These sync weights know only views with a camera, so 'reference' can't take part: "
                "leave it free."
            )
    return trained


def _check_settings(settings: Settings) -> None:
    start, end = settings.start_percent, settings.end_percent
    if start > end:
        raise ValueError(
            f"start_percent is {start:g} but end_percent {end:g}, so view sync "
            "would never be on: make start_percent the smaller one."
        )
    if settings.mode == "weighted" and settings.weights is None:
        raise ValueError(
            "Mode 'weighted' needs 'weights', but nothing is connected: connect View Weights."
        )
    count = settings.views or (len(settings.cameras) if settings.cameras is not None else 0)
    if settings.weights is not None and count and len(settings.weights) != count:
        raise ValueError(
            f"'weights' are for {len(settings.weights)} views but the rig has {count} cameras: make "
            "them with the same rig."
        )


def _check_reference(model: ModelPatcher, settings: Settings) -> None:
    if not (settings.reference_is_seen or settings.reference_is_text):
        raise ValueError("The reference is neither seen nor read: leave 'reference' free.")
    channels = model.model.latent_format.latent_channels
    if settings.reference.ndim != 5 or settings.reference.shape[1] != channels:
        raise ValueError(
            f"'reference' has shape {list(settings.reference.shape)}, but the model's latents have "
            f"{channels} channels of video: encode it with the VAE of the model."
        )
    if any(w.reference is not None for w in model.get_wrappers(WrappersMP.DIFFUSION_MODEL, KEY)):
        raise ValueError(
            "This model has a reference already: leave 'reference' free on all View Sync nodes "
            "but one."
        )


def has_view_sync(model: ModelPatcher) -> bool:
    """Whether View Sync was applied to this model already."""
    return bool(model.get_wrappers(WrappersMP.DIFFUSION_MODEL, KEY))


def input_channels(model: ModelPatcher) -> int:
    """How many channels the model's patch embedding takes."""
    dit_blocks(model)
    return model.get_model_object("diffusion_model").patch_embedding.weight.shape[1]
