"""View Windows: groups of views and windows of frames around every call of the model."""

import math
from collections.abc import Callable
from functools import partial

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from torch import Tensor

from ..models.cameras import MAX_VIEWS, Rig
from ..models.view_windows import (
    Memory,
    Plan,
    Tile,
    add,
    around,
    pieces,
    step_of,
    take,
)
from ..models.views import LATENT_STRIDE, latent_frames, nearest_frames
from . import patch, run
from .conditioning import CATEGORY
from .sockets import RIG

KEY = "turnaround_view_windows"
PROGRESS = "turnaround_progress"
"""In `transformer_options`: called with (done, total) after every tile."""

TIME_AXIS = {
    "x": 2,
    "c_concat": 2,
    "camera_conditions": 2,
    "denoise_mask": 2,
    "vace_context": 3,
}
"""What follows the clip in time, by ComfyUI's names."""
TIMELESS = ("reference_latent", "time_dim_concat")
"""Pictures that go with the clip as a whole."""


class Windows:
    """The two wrappers: what is reckoned before the sampling, and what the model is then asked."""

    def __init__(
        self,
        plan: Plan,
        cameras: int,  # 0 = as many as the latent brings
        views_at_once: int,  # 0 = what fits
        tell: Callable[[str], object],
    ) -> None:
        self.plan, self.cameras, self.views_at_once, self.tell = plan, cameras, views_at_once, tell

    def prepare(self, executor, model: ModelPatcher, noise_shape, conds, *args, **kwargs):
        """Says what will be needed, and asks ComfyUI for that instead of for the whole latent."""
        if len(noise_shape) != 5:
            raise ValueError(
                f"The latent has {len(noise_shape)} dimensions but a video's has 5: use the latent "
                "of Multi-View Conditioning or Encode Views."
            )
        V, channels, T, h, w = noise_shape
        self._check_views(V)
        views, frames = self.plan.largest(V, T)
        memory, room = tile_memory(model, [views, channels, frames, h, w]), free_room(model)
        at_once = self.views_at_once or memory.fitting(room)
        if memory.together and not works_in_parts(model):
            at_once = memory.items
        if at_once < memory.items:
            options = kwargs["model_options"].setdefault("transformer_options", {})
            options[patch.VIEWS_AT_ONCE] = at_once
        parts = f" in parts of {views} x {frames}" if (views, frames) != (V, T) else ""
        clip = f"{V} views x {T} latent frames of {w}x{h}{parts}"
        self.tell(f"{clip}: {_estimate(memory, room, at_once)}")
        # ComfyUI reckons by the batch alone.
        count = min(memory.items, math.ceil(memory.needed(at_once) / memory.item))
        return executor(model, [count, channels, frames, h, w], conds, *args, **kwargs)

    def apply(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None,
        transformer_options=None, **kwargs,
    ):  # fmt: skip
        """The model on one tile after another, the results joined."""
        options = transformer_options or {}
        chunks = len(options.get("cond_or_uncond", [0]))
        views = len(x) // chunks
        self._check_views(views)
        tiles = self._tiles(views, x.shape[2], float(t.flatten()[0]), options)
        on_tile = options.get(PROGRESS, lambda done, total: None)
        total = torch.zeros_like(x) if len(tiles) > 1 else None
        for done, tile in enumerate(tiles, 1):
            mm.throw_exception_if_processing_interrupted()
            if total is None:
                out = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
            else:
                cut = partial(_part, tile=tile, whole=x, chunks=chunks)
                own = _options(options, tile, x, chunks)
                out = executor(
                    cut(x, "x"), cut(t, "t"), cut(c_concat, "c_concat"),
                    cut(c_crossattn, "c_crossattn"), cut(control, "control"), own,
                    **{name: cut(value, name) for name, value in kwargs.items()},
                )  # fmt: skip
                add(total, out, tile, chunks)
            on_tile(done, len(tiles))
        return out if total is None else total

    def _tiles(self, views: int, frames: int, sigma: float, options: dict) -> list[Tile]:
        windows = self.plan.windows(frames)
        if patch.KEY in options.get("wrappers", {}).get(WrappersMP.DIFFUSION_MODEL, {}):
            step, steps = step_of(sigma, _sigmas(options))
            groups = self.plan.groups(views, step, steps)
        else:
            # Views that don't look at each other are done in turn.
            most = self.plan.largest(views, frames)[0]
            groups = pieces(views, min(most, options.get(patch.VIEWS_AT_ONCE, most)))
        return [Tile(group, window) for group in groups for window in windows]

    def _check_views(self, views: int) -> None:
        if self.cameras and views != self.cameras:
            raise ValueError(
                f"The rig of View Windows has {self.cameras} cameras, but the latent brings {views} "
                "views: use the same rig for View Windows and for the conditions."
            )


def _sigmas(options: dict) -> list[float]:
    """The noise levels of the whole run."""
    sigmas = options.get("sample_sigmas")
    return sigmas.tolist() if sigmas is not None else []


def _options(options: dict, tile: Tile, x: Tensor, chunks: int) -> dict:
    """`transformer_options` of a tile's call."""
    own = dict(options)
    views = len(x) // chunks
    own[patch.TILE] = {
        "views": tile.views.items, "frames": tile.frames.items,
        "of_views": views, "of_frames": x.shape[2],
    }  # fmt: skip
    sigmas = own.get("sigmas")
    if sigmas is not None and len(sigmas) == views:
        own["sigmas"] = sigmas[tile.views.items]
    return own


def _part(value, name: str, tile: Tile, whole: Tensor, chunks: int):
    """A tile's part of something the model is given: by view, and by latent frame if it has them."""
    again = partial(_part, tile=tile, whole=whole, chunks=chunks)
    if isinstance(value, list):
        return [again(v, name) for v in value]
    if isinstance(value, dict):
        return {key: again(v, key) for key, v in value.items()}
    if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != len(whole):
        return value
    T = whole.shape[2]
    # Texts and the features of pictures have three dimensions.
    if len(tile.frames.items) == T or value.ndim < 4 or name in TIMELESS:
        return take(value, tile, chunks)
    axis = TIME_AXIS.get(name)
    if axis is None or value.shape[axis] != T:
        raise ValueError(
            f"The model is also guided by '{name}', which View Windows can't divide in time: set "
            "frames_per_window to 0."
        )
    return take(value, tile, chunks, axis)


# --- memory ---------------------------------------------------------------------------------------


def works_in_parts(model: ModelPatcher) -> bool:
    """Whether view sync has every block of the model work on some views at a time."""
    dit = model.get_model_object("diffusion_model")
    # VACE's own blocks take all views.
    if hasattr(dit, "vace_blocks"):
        return False
    patches = model.model_options["transformer_options"].get("patches_replace", {}).get("dit", {})
    for index in range(len(dit.blocks)):
        block = patches.get(("double_block", index))
        if not isinstance(block, patch.SyncedBlock) or block.previous is not None:
            return False
        if block.weights is None or block.weights.model.blocks[str(index)].place != "after":
            return False
    return True


def tile_memory(
    model: ModelPatcher,
    shape: list[int],  # of the largest tile: views, channels, T, h, w
) -> Memory:
    """What ComfyUI asks for the tile, and the size of the tokens that all views keep."""
    views, channels, T, h, w = shape
    base = model.model
    dit = model.get_model_object("diffusion_model")
    t, p, q = dit.patch_size
    tokens = math.ceil(T / t) * math.ceil(h / p) * math.ceil(w / q)
    number = mm.dtype_size(base.manual_cast_dtype or base.get_dtype())
    item = base.memory_required([1, channels, T, h, w])
    sync = model.get_wrappers(WrappersMP.DIFFUSION_MODEL, patch.KEY)
    references = sum(len(w.reference) for w in sync if w.reference is not None)
    # In parts, sync layers work on one latent frame at a time, unless all frames see each other.
    moments = 1 if any(w.settings.mode == "dense" for w in sync) else T
    return Memory(item, tokens * dit.dim * number, views + references, bool(sync), moments)


def free_room(model: ModelPatcher) -> float:
    """Bytes on the model's device beside its weights, everything else being moved out."""
    device = model.load_device
    free = mm.get_free_memory(device)
    if mm.is_device_cpu(device):  # where the weights are already
        return free
    held = sum(
        m.model_loaded_memory()
        for m in mm.current_loaded_models
        if m.device == device and m.model is not None
    )
    weights = sum(m.model_size() for m in (model, *model.model_patches_models()))
    return max(0, free + held - weights - mm.extra_reserved_memory())


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"


def _estimate(memory: Memory, room: float, at_once: int) -> str:
    """What is needed, what is free, what was chosen."""
    needed, whole = memory.needed(at_once), memory.needed(memory.items)
    text = f"about {_bytes(whole)} at once, {_bytes(room)} free"
    if at_once < memory.items:
        text += f"; the model works on {at_once} at a time, which takes {_bytes(needed)}"
    if needed > room:
        text += "; that is too much for speed or at all: lower views_per_group or frames_per_window"
    return text


# --- the node -------------------------------------------------------------------------------------


class ViewWindows(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundViewWindows",
            display_name="View Windows",
            category=CATEGORY,
            description="Many views and long clips with little memory: the model works on groups of "
            "neighbouring views and on stretches of the clip, one after another, and the results "
            "are blended where they overlap. Behind or before View Sync, with any sampler.",
            inputs=[
                io.Model.Input("model", tooltip="A Wan-type video model, with View Sync or "
                               "without."),
                RIG.Input("rig", optional=True,
                          tooltip="Tells which views are neighbours. Without it the views are "
                          "taken as a ring in the order of the batch."),
                io.Int.Input("views_per_group", default=0, min=0, max=MAX_VIEWS,
                             tooltip="Views that see each other at a time; 0 = all. 4 is what "
                             "models trained for groups know. Less memory, looser agreement."),
                io.Int.Input("view_overlap", default=1, min=0, max=MAX_VIEWS - 1,
                             tooltip="Views that neighbouring groups share, at least. More holds "
                             "groups together better and takes longer."),
                io.Int.Input("frames_per_window", default=0, min=0, max=8193,
                             tooltip="Pictures of a clip that are made together; 0 = all. Becomes "
                             "4n+1. Wan knows 81; Turnaround-Tiny 13."),
                io.Int.Input("frame_overlap", default=8, min=0, max=8192,
                             tooltip="Pictures that neighbouring windows share, at least; in steps "
                             "of 4."),
                io.Int.Input("views_at_once", default=0, min=0, max=MAX_VIEWS,
                             tooltip="Views that a layer of the model works on at a time; 0 = as "
                             "many as fit. Changes memory, not the result."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For any sampler."),
                io.String.Output(display_name="note", tooltip="How views and frames will be "
                                 "divided. The memory is shown on the node when sampling "
                                 "starts."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, views_per_group, view_overlap, frames_per_window, frame_overlap,
        views_at_once, rig: Rig | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        _check_model(model)
        pictures = nearest_frames(frames_per_window) if frames_per_window else 0
        if views_per_group and view_overlap >= views_per_group:
            raise ValueError(
                f"Groups of {views_per_group} views can't share {view_overlap}: set view_overlap "
                f"below {views_per_group}."
            )
        if pictures and frame_overlap >= pictures:
            raise ValueError(
                f"Windows of {pictures} pictures can't share {frame_overlap}: set frame_overlap "
                f"below {pictures}."
            )
        order, closed = around(rig.azimuths, rig.elevations) if rig is not None else ((), True)
        plan = Plan(
            views_per_group,
            view_overlap,
            latent_frames(pictures),
            math.ceil(frame_overlap / LATENT_STRIDE),
            order,
            closed,
        )
        note = run.say(cls, _describe(plan, len(order), frames_per_window, pictures))
        windows = Windows(plan, len(order), views_at_once, lambda text: run.say(cls, text))
        patched = model.clone()
        patched.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, windows.prepare)
        patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, windows.apply)
        return io.NodeOutput(patched, note)


def has_windows(model: ModelPatcher) -> bool:
    """Whether View Windows was applied to this model."""
    return bool(model.get_wrappers(WrappersMP.APPLY_MODEL, KEY))


def reporting(model: ModelPatcher, on_tile: Callable[[int, int], None]) -> ModelPatcher:
    """A clone that calls `on_tile` (done, total) after every tile; without View Windows, itself."""
    if not has_windows(model):
        return model
    model = model.clone()
    model.model_options["transformer_options"][PROGRESS] = on_tile
    return model


def _check_model(model: ModelPatcher) -> None:
    dit = model.get_model_object("diffusion_model")
    if not (hasattr(dit, "blocks") and hasattr(dit, "patch_embedding")):
        raise ValueError(
            "'model' is not a Wan-type video model, and others don't keep views and frames apart as "
            "View Windows needs: leave View Windows out and sample fewer views or frames at a time."
        )
    if has_windows(model):
        raise ValueError(
            "This model comes from View Windows already: use one View Windows, with the groups and "
            "the windows in it."
        )


def _describe(plan: Plan, views: int, asked: int, pictures: int) -> str:
    """How views and frames will be divided."""
    notes = []
    if asked != pictures:
        notes.append(f"windows of {asked} pictures became {pictures} (Wan models need 4n+1)")
    if plan.views_per_group:
        count = len(plan.groups(views, 0, 1)) if views else 0
        groups = f"{count} groups" if count else "groups"
        row = " around a ring" if plan.closed else " along an arc"
        notes.append(f"{groups} of up to {plan.views_per_group} views{row}")
    if plan.frames_per_window:
        notes.append(f"windows of {plan.frames_per_window} latent frames ({pictures} pictures)")
    return "; ".join(notes)


NODES: list[type[io.ComfyNode]] = [ViewWindows]
