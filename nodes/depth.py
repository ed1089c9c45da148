"""Depth made better before it becomes points: brought to metres, and refined by normals."""

import math

import torch
from comfy_api.latest import io
from torch import Tensor

from ..models.align_depth import Alignment, align_depth
from ..models.cameras import intrinsics
from ..models.geometry import encode_normals
from ..models.points import normals_from_depth, unproject_depth
from ..models.refine_depth import refine_depth
from ..models.views import Views
from . import run
from .geometry import CATEGORY, _fit
from .sockets import VIEWS
from .views import frames_to_image

RUNS_WITH = {"find out": None, "depth": False, "inverse depth": True}
AXES = {
    "red right, green up": (1.0, 1.0),
    "red right, green down": (1.0, -1.0),
    "red left, green up": (-1.0, 1.0),
    "red left, green down": (-1.0, -1.0),
}


class AlignDepth(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundAlignDepth",
            display_name="Align Depth",
            category=CATEGORY,
            description="Brings the fine but relative depth of any depth node to metres, by a coarse "
            "metric depth of the same clip: one scale and one shift a frame, found over the whole "
            "clip, so that the performer does not breathe.",
            inputs=[
                io.Image.Input("depth", tooltip="Depth pictures of any depth node, one a frame."),
                VIEWS.Input("metric", tooltip="Metric depth of the clip, coarse or with holes: from "
                            "Human Geometry, or any depth in metres."),
                io.Mask.Input("mask", optional=True, tooltip="The performer in white; replaces the "
                              "mask of 'metric'."),
                io.Combo.Input("runs_with", options=list(RUNS_WITH),
                               tooltip="What the pictures' brightness follows: depth, or 1 / depth "
                               "(Depth Anything, MiDaS). 'find out' takes what fits better. Which "
                               "end is near is found out in any case."),
                io.Float.Input("steadiness", default=0.1, min=0.0, max=100.0, step=0.05,
                               tooltip="How much neighbouring frames hold together: 0 = every frame "
                               "by itself, 1 = very steady."),
            ],
            outputs=[
                VIEWS.Output(display_name="depth_views", tooltip="Depth in metres, for "
                             "'depth_views' of Performer Geometry."),
                io.Image.Output(display_name="preview", tooltip="Metric depth before, depth "
                                "pictures, result; near is white."),
                io.String.Output(display_name="note", tooltip="Scale, shift, and how well it fits."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, depth, metric: Views, runs_with, steadiness, mask=None) -> io.NodeOutput:
        notes: list[str] = []
        target = _depth_of(metric, "metric")
        values = _fit("depth", depth[..., :3].float().mean(-1), target[:, None], notes)
        masks = _masks_of(metric, target, mask, notes)
        tried = [RUNS_WITH[runs_with]] if RUNS_WITH[runs_with] is not None else [False, True]
        found = [align_depth(values, target, masks, kind, steadiness) for kind in tried]
        best = min(range(len(found)), key=lambda i: float(found[i].error.nanmedian()))
        result, inverse = found[best], tried[best]
        notes.append(_describe(result, inverse))
        note = run.say(cls, "; ".join(notes))
        shown = torch.cat([_near_white(target * (masks > 0.5)), values.clamp(0, 1),
                           _near_white(result.metres)], 2)  # fmt: skip
        out = Views(result.metres[None, :, None], masks[None], metric.rig, metric.fps)
        return io.NodeOutput(out, frames_to_image(_grey(shown)), note)


class RefineDepth(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundRefineDepth",
            display_name="Refine Depth",
            category=CATEGORY,
            description="Lets normals decide the small shapes and depth the large ones: noise, steps "
            "and floating bits go, holes are filled. Normals come from any normal-map node; without "
            "them the depth is only smoothed.",
            inputs=[
                VIEWS.Input("depth_views", tooltip="Depth in metres, one view."),
                io.Image.Input("normals", optional=True, tooltip="Normal maps of the same frames, "
                               "in the camera's own axes."),
                io.Mask.Input("mask", optional=True, tooltip="The performer in white; replaces the "
                              "mask of the depth."),
                io.Combo.Input("axes", options=list(AXES), tooltip="What the normal map's colours "
                               "mean. Most nodes: red right, green up."),
                io.Float.Input("reach", default=12.0, min=1.0, max=200.0, step=1.0,
                               tooltip="Pixels: shapes smaller than this follow the normals, larger "
                               "ones the depth."),
                io.Float.Input("fov", default=40.0, min=5.0, max=120.0, step=1.0,
                               tooltip="Vertical field of view of your camera in degrees; unused "
                               "when the depth knows its camera."),
            ],
            outputs=[
                VIEWS.Output(display_name="depth_views", tooltip="The refined depth in metres."),
                io.Image.Output(display_name="preview", tooltip="Surface normals of the depth, "
                                "before and after."),
                io.String.Output(display_name="note", tooltip="How much it moved."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, depth_views: Views, axes, reach, fov, normals=None, mask=None
    ) -> io.NodeOutput:
        notes: list[str] = []
        depth = _depth_of(depth_views, "depth_views")
        H, W = depth.shape[-2:]
        rig = depth_views.rig
        K = rig.K[0] if rig is not None else intrinsics(math.radians(fov), W, H)
        masks = _masks_of(depth_views, depth, mask, notes)
        before = _surface(depth, masks, K)
        if normals is None:
            notes.append("there were no normals: the depth is smoothed")
            given = before
        else:
            pictures = normals[..., :3].float().movedim(-1, 1)
            parts = [_fit("normals", c, depth[:, None], []) for c in pictures.unbind(1)]
            given = decode_normals(torch.stack(parts, 1), *AXES[axes])
        bar = run.progress(len(depth))
        refined = refine_depth(depth, given, masks, K, reach, bar)
        both = (refined > 0) & (depth > 0) & (masks > 0.5)
        moved = (refined - depth).abs()[both]
        if len(moved):
            notes.append(f"moved by {100 * float(moved.median()):.1f} cm (median)")
        note = run.say(cls, "; ".join(notes))
        shown = torch.cat([_colours(before), _colours(_surface(refined, masks, K))], 3)
        out = Views(refined[None, :, None], masks[None], rig, depth_views.fps)
        return io.NodeOutput(out, frames_to_image(shown), note)


def decode_normals(
    pictures: Tensor,  # [F, 3, H, W] 0..1
    right: float,  # 1 = red grows to the right, -1 = to the left
    up: float,  # 1 = green grows upwards, -1 = downwards
) -> Tensor:  # [F, 3, H, W] camera axes: x right, y down, z away
    """Normal colours to vectors; mid grey (no normal) becomes a short one."""
    n = 2 * pictures - 1
    return n * n.new_tensor([right, -up, -1.0])[:, None, None]


def _depth_of(views: Views, name: str) -> Tensor:  # [F, H, W]
    if views.frames.shape[2] != 1:
        raise ValueError(f"'{name}' carries colour, not depth: connect a depth output in metres.")
    if len(views) != 1:
        raise ValueError(
            f"'{name}' has {len(views)} views, but depth is worked on for one camera: pick one view."
        )
    return views.frames[0, :, 0].float()


def _masks_of(views: Views, depth: Tensor, mask, notes: list[str]) -> Tensor:  # [F, H, W]
    if mask is not None:
        return _fit("mask", mask[None] if mask.ndim == 2 else mask, depth[:, None], notes)
    if views.masks is not None:
        return views.masks[0].float()
    return (depth.isfinite() & (depth > 0)).float()


def _describe(found: Alignment, inverse: bool) -> str:
    kind = "1 / depth" if inverse else "depth"
    near = "white" if (found.scale.median() > 0) == inverse else "black"
    return (
        f"the pictures follow {kind}, near is {near}; median distance to 'metric' "
        f"{100 * float(found.error.nanmedian()):.1f} cm"
    )


def _near_white(metres: Tensor) -> Tensor:  # [F, H, W] 0..1
    known = metres.isfinite() & (metres > 0)
    if not known.any():
        return torch.zeros_like(metres)
    order = metres[known].sort().values
    near, far = order[int(0.01 * (len(order) - 1))], order[int(0.99 * (len(order) - 1))]
    white = 1 - 0.8 * ((metres - near) / (far - near).clamp(min=1e-3)).clamp(0, 1)
    return torch.where(known, white, 0.0)


def _grey(pictures: Tensor) -> Tensor:
    return pictures[:, None].expand(-1, 3, -1, -1)


def _surface(depth: Tensor, masks: Tensor, K: Tensor) -> Tensor:  # [F, 3, H, W]
    known = depth.isfinite() & (depth > 0) & (masks > 0.5)
    return normals_from_depth(unproject_depth(torch.where(known, depth, 0.0), K), known)


def _colours(normals: Tensor) -> Tensor:  # [F, 3, H, W]
    return encode_normals(normals.movedim(1, -1)).movedim(-1, 1)


NODES: list[type[io.ComfyNode]] = [AlignDepth, RefineDepth]
