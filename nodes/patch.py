"""The only file that reaches into a MODEL: view sync through block patches and a wrapper.

Nothing of the host is replaced: block patches chain with those already there, the attention
override calls the one before it, and all per-run state rides in `transformer_options`.
"""

import copy
import math

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..models.view_sync import ViewSync, extended_attention, reference_context, sync_layout

KEY = "turnaround_view_sync"
REFERENCE = "turnaround_reference"


def load_sync(path: str) -> ModelPatcher:
    """Sync weights as a model that ComfyUI loads and offloads with the main one."""
    weights = comfy.utils.load_torch_file(path, safe_load=True)
    dim, blocks, references = sync_layout(weights)
    offload, dtype = mm.unet_offload_device(), comfy.utils.weight_dtype(weights)
    sync = ViewSync(dim, blocks, references, offload, dtype, comfy.ops.manual_cast)
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
            "Turnaround-Tiny or a Wan 2.1 / 2.2 checkpoint with Load Diffusion Model."
        )
    return blocks


class SyncedBlock:
    """Replaces one DiT block by: whatever was there, then view sync as `key` has it at this run."""

    def __init__(self, index: int, previous, sync, key: str) -> None:
        self.index, self.previous, self.sync, self.key = index, previous, sync, key

    def __call__(self, args: dict, extra: dict) -> dict:
        if "transformer_options" not in args:
            raise ValueError(
                "This kind of Wan model (sound to video) doesn't tell its blocks how the batch "
                "divides into views: use View Sync with another Wan checkpoint."
            )
        inner = self.previous or (lambda a, e: e["original_block"](a))
        state = args["transformer_options"].get(self.key)
        if state is None:
            return inner(args, extra)
        if self.sync is None:
            return inner(args, {**extra, "original_block": _marked(extra["original_block"], state)})
        args = self._with_reference(args, state)
        out = inner(args, extra)
        if state["strength"] == 0:  # a reference alone
            return out
        layer = self.sync.model.blocks[str(self.index)]
        x = out["img"]
        synced = layer(x, args["vec"], args["pe"], _items(state, x), _grid(state, x.shape[1]))
        # At strength 1 the layer's own result, so that it is what training saw.
        out["img"] = synced if state["strength"] == 1 else x.lerp(synced, state["strength"])
        return out

    def _with_reference(self, args: dict, state: dict) -> dict:
        """The block's arguments, the reference's tokens behind the text where they were trained."""
        norms = self.sync.model.references
        if not state["refers"] or str(self.index) not in norms:
            return args
        norm = norms[str(self.index)]
        context = reference_context(args["txt"], args["img"], norm, _items(state, args["img"]))
        return {**args, "txt": context}

    def __deepcopy__(self, memo: dict) -> "SyncedBlock":
        # ComfyUI deep-copies patches whenever a model is cloned; the weights must stay shared.
        return SyncedBlock(self.index, copy.deepcopy(self.previous, memo), self.sync, self.key)

    def to(self, device_or_dtype) -> "SyncedBlock":
        if not hasattr(self.previous, "to"):
            return self
        return SyncedBlock(self.index, self.previous.to(device_or_dtype), self.sync, self.key)

    def models(self) -> list:
        before = self.previous.models() if hasattr(self.previous, "models") else []
        return [*before, *([self.sync] if self.sync is not None else [])]


def _marked(original_block, state: dict):
    """The block, with a mark on its first attention call, which is its self-attention."""

    def block(args: dict) -> dict:
        state["self_attention_is_next"] = True
        out = original_block(args)
        state["self_attention_is_next"] = False
        return out

    return block


def _items(state: dict, tokens: Tensor) -> int:
    """Views in one chunk, a reference counted: seen here, since any wrapper may add one."""
    return len(tokens) // state["chunks"]


def _grid(state: dict, tokens: int) -> tuple[int, int, int]:
    grid = state["grid"]
    if math.prod(grid) != tokens:
        raise ValueError(
            f"The model works on {tokens} tokens a view where the latent has {math.prod(grid)} "
            "(it adds reference tokens of its own): view sync can't be used with this checkpoint."
        )
    return grid


def _attention_override(state: dict, previous):
    """The training-free form: extends the self-attention of every marked block."""

    def override(func, q, k, v, heads, **kwargs):
        def attention(q, k, v, heads):
            if previous is not None:
                return previous(func, q, k, v, heads, **kwargs)
            return func(q, k, v, heads, **kwargs)

        if not state["self_attention_is_next"]:
            return attention(q, k, v, heads)
        state["self_attention_is_next"] = False
        grid = _grid(state, q.shape[1])
        return extended_attention(
            attention, q, k, v, heads, _items(state, q), grid, state["strength"]
        )

    return override


def _split(batch: int, chunks: int, expected: int, guests: int) -> int:
    """Views in a batch of `chunks` conditionings, each with so many guests beside the views."""
    views, rest = divmod(batch, chunks)
    views -= guests
    if rest or (expected and views != expected):
        raise ValueError(
            f"View Sync was set for {expected or 'several'} views, but the latent brings "
            f"{batch / chunks - guests:g}: use the same rig for View Sync and for the conditions."
        )
    return views


def _with_first(value, batch: int, views: int):
    """What has a row for every view of the batch gets one more in front of every chunk."""
    if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != batch:
        return value
    chunks = value.unflatten(0, (-1, views))
    return torch.cat([chunks[:, :1], chunks], 1).flatten(0, 1)


def add_reference(
    x: Tensor,  # [n V, C, T, h, w] noisy latents and conditions
    reference: Tensor,  # [1, 16, T, h, w] clean
    views: int,
) -> Tensor:  # [n (1 + V), C, T, h, w]
    """The reference in front of every chunk: clean, known in full, nothing else known of it."""
    if reference.shape[2:] != x.shape[2:]:
        raise ValueError(
            f"The reference has {reference.shape[2]} latent frames of {reference.shape[4]}x"
            f"{reference.shape[3]} but the views {x.shape[2]} of {x.shape[4]}x{x.shape[3]}: take "
            "it from the Multi-View Conditioning that made the latent."
        )
    item, depth = torch.zeros_like(x[:1]), reference.shape[1]
    item[:, :depth] = reference.to(item)
    if x.shape[1] >= 2 * depth:
        item[:, depth : 2 * depth] = reference.to(item)
    x = _with_first(x, len(x), views)
    x[:: views + 1] = item
    return x


class ViewSyncWrapper:
    """Before every run of the DiT: how the batch divides into views, and whether sync is on."""

    def __init__(
        self,
        key: str,
        views: int,
        strength: float,
        sigma_start: float,
        sigma_end: float,
        free: bool,
        reference: Tensor | None = None,  # [1, 16, T, h, w] as the DiT sees latents
    ) -> None:
        self.key, self.views, self.strength, self.free = key, views, strength, free
        self.sigma_start, self.sigma_end, self.reference = sigma_start, sigma_end, reference

    def __call__(
        self, executor, x, timestep, context, clip_fea=None, time_dim_concat=None,
        transformer_options=None, **kwargs,
    ):  # fmt: skip
        options = dict(transformer_options or {})
        sigma = float(options["sigmas"][0]) if "sigmas" in options else self.sigma_start
        chunks = len(options.get("cond_or_uncond", [0]))
        # A wrapper around this one may have put a reference in front of every chunk.
        guests = int(REFERENCE in options)
        views = _split(len(x), chunks, self.views, guests)
        on = self.sigma_end <= sigma <= self.sigma_start
        refers = on and self.reference is not None
        if refers or (on and self.strength > 0 and views + guests > 1):
            added = time_dim_concat.shape[2] if time_dim_concat is not None else 0
            T, h, w = x.shape[2:]
            grid = (T + added, math.ceil(h / 2), math.ceil(w / 2))
            state = {
                "chunks": chunks,
                "grid": grid,
                "strength": self.strength,
                "refers": refers,
                "self_attention_is_next": False,
            }
            options[self.key] = state
            if self.free:
                options["optimized_attention_override"] = _attention_override(
                    state, options.get("optimized_attention_override")
                )
        if not refers:
            return executor(x, timestep, context, clip_fea, time_dim_concat, options, **kwargs)
        options[REFERENCE] = True
        batch = len(x)
        x = add_reference(x, self.reference, views)
        timestep, context, clip_fea, time_dim_concat = (
            _with_first(t, batch, views) for t in (timestep, context, clip_fea, time_dim_concat)
        )
        timestep = timestep.clone()
        timestep[:: views + 1] = 0  # clean
        kwargs = {key: _with_first(value, batch, views) for key, value in kwargs.items()}
        out = executor(x, timestep, context, clip_fea, time_dim_concat, options, **kwargs)
        return out.unflatten(0, (chunks, views + 1))[:, 1:].flatten(0, 1)


def apply_view_sync(
    model: ModelPatcher,
    sync: ModelPatcher | None = None,  # of a ViewSync; None = training-free
    views: int = 0,  # 0 = as many as the latent brings
    strength: float = 1.0,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    reference: Tensor | None = None,  # [1, 16, T, h, w] raw latents of the performer's own video
) -> ModelPatcher:
    """A clone of MODEL whose views of one moment attend to each other, and to a reference."""
    blocks = dit_blocks(model)
    if reference is not None:
        _check_reference(model, reference)
        reference = model.model.process_latent_in(reference)
    if start_percent > end_percent:
        raise ValueError(
            f"start_percent is {start_percent:g} but end_percent {end_percent:g}, so view sync "
            "would never be on: make start_percent the smaller one."
        )
    patched = model.clone()
    sampling = model.get_model_object("model_sampling")
    indices = range(len(blocks))
    # Applied several times, each keeps its own weights, strength and range.
    key = f"{KEY}_{len(patched.get_wrappers(WrappersMP.DIFFUSION_MODEL, KEY))}"
    if sync is not None:
        dim = model.get_model_object("diffusion_model").dim
        trained = [int(i) for i in sync.model.blocks]
        if sync.model.dim != dim or max(trained) >= len(blocks):
            raise ValueError(
                f"The sync weights are for a model of width {sync.model.dim} with at least "
                f"{max(trained) + 1} blocks, but this model has width {dim} and {len(blocks)} "
                "blocks: choose the sync file that belongs to the model."
            )
        indices = trained
    existing = (
        patched.model_options["transformer_options"].get("patches_replace", {}).get("dit", {})
    )
    for index in indices:
        previous = existing.get(("double_block", index))
        block = SyncedBlock(index, previous, sync, key)
        patched.set_model_patch_replace(block, "dit", "double_block", index)
    wrapper = ViewSyncWrapper(
        key,
        views,
        strength,
        float(sampling.percent_to_sigma(start_percent)),
        float(sampling.percent_to_sigma(end_percent)),
        free=sync is None,
        reference=reference,
    )
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, wrapper)
    return patched


def _check_reference(model: ModelPatcher, reference: Tensor) -> None:
    if len(reference) != 1:
        raise ValueError(
            f"'reference' holds {len(reference)} views, but it is the performer's one own video: "
            "take it from Multi-View Conditioning."
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
