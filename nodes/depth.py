"""Depth made better before it becomes points: brought to metres, and refined by normals."""

import math

import comfy.model_management as mm
import torch
from comfy_api.latest import io
from torch import Tensor

from ..models.align_depth import (
    STEADINESS,
    Alignment,
    align_depth,
    body_keypoint_depth,
    cloud_depth,
    pose_distance,
)
from ..models.cameras import intrinsics
from ..models.clean_points import smeared
from ..models.depth import depth_at, grey_depth, near_is_white, without_blanks
from ..models.geometry import encode_normals
from ..models.points import OrientedPoints, normals_from_depth, unproject_depth
from ..models.refine_depth import (
    decode_normals,
    likelier_axes,
    refine_depth,
    smoothed_normals,
    unit_normals,
)
from ..models.views import Views, label_pictures
from . import run
from .geometry import CATEGORY, depth_of, fit_mask, fit_pictures
from .sockets import CLOUD, VIEWS
from .views import frames_to_image, image_to_frames

RUNS_WITH = {"find out": None, "depth": False, "inverse depth": True}
AXES = {
    "red right, green up": (1.0, 1.0),
    "red right, green down": (1.0, -1.0),
    "red left, green up": (-1.0, 1.0),
    "red left, green down": (-1.0, -1.0),
}
POSES = [io.Custom("POSE_KEYPOINT"), io.Custom("MHR_POSE_DATA")]
WORKING_BYTES = 3 << 30
"""Of GPU memory that the solver asks for at most."""


class AlignDepth(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundAlignDepth",
            display_name="Align Depth",
            category=CATEGORY,
            description="Brings the fine but relative depth of any depth node to metres: one scale "
            "and one shift a frame, found over the whole clip, so that the performer does not "
            "breathe. What is aligned with may be coarse or sparse: a metric depth, points, or "
            "keypoints.",
            inputs=[
                io.Image.Input("depth", tooltip="Grey depth pictures of any depth node, one a frame; "
                               "near may be white or black, stretched by clip or by frame."),
                VIEWS.Input("metric", optional=True, tooltip="Metric depth of the clip, coarse or "
                            "with holes: from Human Geometry, or any depth in metres. Comes before "
                            "'cloud' and 'pose'."),
                CLOUD.Input("cloud", optional=True, tooltip="Or points of the same clip, as they lie "
                            "before the camera that saw them. Comes before 'pose'."),
                io.MultiType.Input("pose", types=POSES, optional=True, tooltip="Or keypoints: SAM "
                                   "3D Body's (their depth is used), or flat ones (OpenPose): the "
                                   "performer's height then gives the distance, and the thickness "
                                   "is a guess."),
                io.Mask.Input("mask", optional=True, tooltip="The performer in white; replaces the "
                              "mask of 'metric'."),
                io.Combo.Input("runs_with", options=list(RUNS_WITH),
                               tooltip="What the pictures' brightness follows: depth, or 1 / depth "
                               "(Depth Anything, MiDaS). 'find out' takes what fits better. Which "
                               "end is near is found out in any case."),
                io.Float.Input("steadiness", default=STEADINESS, min=0.0, max=100.0, step=0.1,
                               tooltip="How much neighbouring frames hold together: 0 = every frame "
                               "by itself, 1 = steady, 10 = nearly one scale for the whole clip."),
                io.Float.Input("fov", default=40.0, min=5.0, max=120.0, step=1.0,
                               tooltip="Vertical field of view of your camera in degrees; only for "
                               "'pose'."),
                io.Float.Input("performer_height", default=1.7, min=0.3, max=3.0, step=0.05,
                               tooltip="Metres; only for flat keypoints in 'pose'."),
            ],
            outputs=[
                VIEWS.Output(display_name="depth_views", tooltip="Depth in metres, for "
                             "'depth_views' of Refine Depth or Performer Geometry."),
                io.Image.Output(display_name="preview", tooltip="What was aligned with, the depth "
                                "pictures, and the result in metres; near is white."),
                io.String.Output(display_name="note", tooltip="What the pictures follow, and how "
                                 "well it fits."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, depth, metric: Views | None = None, runs_with="find out", steadiness=STEADINESS, fov=40.0,
        performer_height=1.7, cloud: OrientedPoints | None = None, pose=None, mask=None,
    ) -> io.NodeOutput:  # fmt: skip
        notes: list[str] = []
        values = grey_depth(depth, "depth").cpu()
        kinds = [RUNS_WITH[runs_with]] if RUNS_WITH[runs_with] is not None else [False, True]
        if metric is not None:
            with_what, rig, fps = "metric", metric.rig, metric.fps
            values, target = _same_size(values, depth_of(metric, "metric"), notes)
            known = metric.masks[0].float() if metric.masks is not None else None
        elif cloud is not None:
            with_what, rig, fps, known = "cloud", cloud.source, cloud.fps, None
            values = _counted(values, cloud.frame_count, "cloud", notes)
            target = cloud_depth(cloud, values.shape[2], values.shape[1])
        elif pose is not None:
            with_what, rig, fps, known = "pose", None, 16.0, None
            values = _counted(values, len(_frames_of(pose)), "pose", notes)
            target = None
        else:
            raise ValueError(
                "Connect 'metric', 'cloud' or 'pose': relative depth alone does not know how far "
                "away the performer is. Performer Geometry's 'depth' guesses it from the height."
            )
        masks = _masks(mask, known, values, notes)
        values = without_blanks(values, masks)
        guessed = target is None and not isinstance(pose, dict)
        if target is None:
            target, kinds = _pose_target(pose, values, masks, fov, performer_height, kinds)
        bar = run.progress(len(kinds))
        found = []
        for done, kind in enumerate(kinds):
            found.append(align_depth(values, target, masks, kind, steadiness))
            bar(done + 1, len(kinds))
        best = min(range(len(found)), key=lambda i: found[i].misfit)
        result = found[best]
        notes.insert(0, _describe(result, kinds[best], with_what, guessed))
        note = run.say(cls, "; ".join(notes))
        known = (masks > 0.5) & target.isfinite() & (target > 0)
        tiles = {
            with_what: near_is_white(target, known),
            "depth": _stretched(values),
            "result": near_is_white(result.metres, result.metres > 0),
        }
        rig = rig.resized(values.shape[2], values.shape[1]) if rig is not None else None
        out = Views(result.metres[None, :, None], masks[None], rig, fps)
        return io.NodeOutput(out, _side_by_side({k: _grey(t) for k, t in tiles.items()}), note)


class RefineDepth(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundRefineDepth",
            display_name="Refine Depth",
            category=CATEGORY,
            description="Lets normals decide the small shapes and depth the large ones: noise, steps "
            "and floating bits go, holes are filled. Normals come from any normal-map node; without "
            "them the depth's own are smoothed.",
            inputs=[
                VIEWS.Input("depth_views", tooltip="Depth in metres, one view."),
                io.Image.Input("normals", optional=True, tooltip="Normal maps of the same frames in "
                               "the camera's own axes. Maps in world axes don't work: their colours "
                               "stay when the camera turns."),
                io.Mask.Input("mask", optional=True, tooltip="The performer in white; replaces the "
                              "mask of the depth."),
                io.Combo.Input("axes", options=list(AXES), tooltip="What the normal map's colours "
                               "mean: red = facing right or left, green = facing up or down, blue = "
                               "towards the camera. The note says when another choice fits better."),
                io.Float.Input("reach", default=12.0, min=1.0, max=200.0, step=1.0,
                               tooltip="Pixels: shapes smaller than this follow the normals, larger "
                               "ones the depth."),
                io.Float.Input("fov", default=40.0, min=5.0, max=120.0, step=1.0,
                               tooltip="Vertical field of view of your camera in degrees; unused "
                               "when the depth knows its camera."),
                io.Boolean.Input("clean_edges", default=True, tooltip="Takes away what depth nodes "
                                 "smear between two surfaces, and fills it from both sides."),
            ],
            outputs=[
                VIEWS.Output(display_name="depth_views", tooltip="The refined depth in metres."),
                io.Image.Output(display_name="preview", tooltip="Surface normals of the depth "
                                "before, the normals that led, and the surface after."),
                io.String.Output(display_name="note", tooltip="How much it moved, and what looks "
                                 "wrong."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, depth_views: Views, axes, reach, fov, clean_edges=True, normals=None, mask=None
    ) -> io.NodeOutput:
        notes: list[str] = []
        depth = depth_of(depth_views, "depth_views")
        H, W = depth.shape[-2:]
        rig = depth_views.rig
        known = depth_views.masks[0].float() if depth_views.masks is not None else None
        masks = _masks(mask, known, depth, notes)
        if not ((masks > 0.5) & depth.isfinite() & (depth > 0)).any():
            raise ValueError(
                "'depth_views' has no usable depth inside the mask in any frame: check that the "
                "mask shows the performer in white and that the depth is not all zero."
            )
        device = run.drawing_device(WORKING_BYTES)
        K = (rig.K[0] if rig is not None else intrinsics(math.radians(fov), W, H)).to(device)
        depth, masks = depth.to(device), masks.to(device)
        before = _surface(depth, masks, K)
        trusted = torch.where(smeared(depth, masks, K), 0.0, depth) if clean_edges else depth
        if normals is None:
            notes.append("there were no normals: the depth's own are smoothed")
            given = smoothed_normals(trusted, masks, K, reach)
        else:
            pictures = fit_pictures(
                "normals", image_to_frames(normals).float(), tuple(depth.shape), notes, "the depth"
            ).to(device)
            given = decode_normals(pictures, *AXES[axes])
            notes += _doubts(given, before, masks, axes)
        refined = refine_depth(trusted, given, masks, K, reach, run.progress(len(depth)))
        both = (refined > 0) & (depth > 0) & depth.isfinite() & (masks > 0.5)
        moved = (refined - depth).abs()[both]
        if len(moved):
            notes.insert(0, f"the depth moved by {100 * float(moved.median()):.1f} cm (median)")
        note = run.say(cls, "; ".join(notes))
        after = _surface(refined, masks, K)
        leading = unit_normals(given) * (masks > 0.5)[:, None]
        tiles = {"before": before, "normals": leading, "after": after}
        back = mm.intermediate_device()
        shown = _side_by_side({name: _colours(n).cpu() for name, n in tiles.items()})
        out = Views(refined[None, :, None].to(back), masks[None].to(back), rig, depth_views.fps)
        return io.NodeOutput(out, shown, note)


def _same_size(values: Tensor, target: Tensor, notes: list[str]) -> tuple[Tensor, Tensor]:
    """Both at the finer one's size: the pictures are there for their detail."""
    if values[0].numel() > target[0].numel():
        size = (len(target), *values.shape[1:])
        values = _counted(values, len(target), "metric", notes)
        return values, fit_pictures("metric", target, size, [], "'depth'", depth=True)
    size = tuple(target.shape)
    return fit_pictures("depth", values, size, notes, "'metric'", depth=True), target


def _counted(values: Tensor, count: int, clip: str, notes: list[str]) -> Tensor:
    size = (count, *values.shape[1:])
    return fit_pictures("depth", values, size, notes, f"'{clip}'", depth=True)


def _masks(mask, known: Tensor | None, values: Tensor, notes: list[str]) -> Tensor:  # [F, H, W]
    size = tuple(values.shape)
    if mask is not None:
        return fit_mask(mask, size, notes, "the depth")
    if known is not None:
        return fit_mask(known, size, [], "the depth")
    return values.isfinite().float()


def _frames_of(pose) -> list:
    frames = pose.get("frames") if isinstance(pose, dict) else pose
    if not isinstance(frames, list) or not frames:
        raise ValueError(
            "'pose' holds no frames: connect the keypoints of an OpenPose, DWPose, Human Geometry "
            "or SAM 3D Body node."
        )
    return frames


def _pose_target(
    pose, values: Tensor, masks: Tensor, fov: float, height: float, kinds: list[bool]
) -> tuple[Tensor, list[bool]]:  # fmt: skip
    """Metres to align with, and what the values may follow."""
    F, H, W = values.shape
    focal = float(intrinsics(math.radians(fov), W, H)[1, 1])
    if isinstance(pose, dict):
        return body_keypoint_depth(pose, F, W, H, focal), kinds
    if not (masks < 0.5).any():
        raise ValueError(
            "Flat keypoints tell the distance of the performer alone: connect 'mask' too, the "
            "performer in white."
        )
    distance = pose_distance(pose, F, H, focal, height)
    return depth_at(values, masks, distance, height), [False]


def _doubts(given: Tensor, surface: Tensor, masks: Tensor, axes: str) -> list[str]:
    """What looks wrong with a normal map, held against the depth's own normals."""
    right, up, away = likelier_axes(given, surface, masks > 0.5)
    if away:
        return ["most normals face away from the camera: this may be no normal map, or one in "
                "world axes, which does not work"]  # fmt: skip
    chosen = AXES[axes]
    better = next(n for n, a in AXES.items() if a == (chosen[0] * right, chosen[1] * up))
    return [f"'{better}' would agree better with the depth"] if better != axes else []


def _describe(found: Alignment, inverse: bool, with_what: str, guessed: bool) -> str:
    if guessed:
        middle = float(found.metres[found.metres > 0].median())
        return (
            f"flat keypoints put the performer {middle:.1f} m away; how thick the performer is, is a "
            "guess"
        )
    kind = "1 / depth" if inverse else "depth"
    near = "white" if (found.scale.median() > 0) == inverse else "black"
    return (
        f"the pictures follow {kind}, near is {near}; median distance to '{with_what}' "
        f"{100 * float(found.error.nanmedian()):.1f} cm"
    )


def _stretched(values: Tensor) -> Tensor:  # [F, H, W] 0..1
    known = values.isfinite()
    low, high = values[known].min(), values[known].max()
    return torch.where(known, (values - low) / (high - low).clamp(min=1e-6), 0.0)


def _grey(pictures: Tensor) -> Tensor:
    return pictures[:, None].expand(-1, 3, -1, -1)


def _side_by_side(tiles: dict[str, Tensor]) -> Tensor:
    """IMAGE of labelled pictures [F, 3, H, W] next to each other."""
    labelled = [label_pictures(t, [name] * len(t)) for name, t in tiles.items()]
    return frames_to_image(torch.cat(labelled, 3))


def _surface(depth: Tensor, masks: Tensor, K: Tensor) -> Tensor:  # [F, 3, H, W]
    known = depth.isfinite() & (depth > 0) & (masks > 0.5)
    points = unproject_depth(torch.where(known, depth, 0.0), K)
    return normals_from_depth(points, known, float(K[0, 0]))


def _colours(normals: Tensor) -> Tensor:  # [F, 3, H, W]
    return encode_normals(normals.movedim(1, -1)).movedim(-1, 1)


NODES: list[type[io.ComfyNode]] = [AlignDepth, RefineDepth]
