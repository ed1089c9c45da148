"""Triangulate Pose: a performer's keypoints in space, from all views."""

import math

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from PIL import ImageDraw
from torch import Tensor

from ..models.cameras import Rig
from ..models.human_frames import OPENPOSE18
from ..models.human_net import CROP
from ..models.performer_truth import KEYPOINTS
from ..models.pose import (
    BONES,
    CHUNK,
    MHR_POINTS,
    Pose,
    Triangulated,
    detect_keypoints,
    openpose_keypoints,
    project,
    sam3d_keypoints,
    triangulated_pose,
)
from ..models.views import (
    Views,
    as_pictures,
    grid_columns,
    grid_picture,
    label_pictures,
    resize_frames,
)
from . import run
from .background import CATEGORY
from .depth import POSES
from .human import BYTES_A_CROP_PIXEL, HUMAN, pixels_of
from .sockets import POSE, RIG, VIEWS
from .views import frames_to_image

SHOWN_FROM = 0.1
"""What is less sure is not drawn."""
MOMENTS, TILE, SIDE = 16, 320, 1280
"""Pictures that the preview holds at most, how high a view is drawn in it if all views fit, and how
long its sides are at most."""
SEEN, AGREED, APART = (255, 140, 0), (0, 220, 255), (255, 255, 255)
"""Colours of the skeleton as seen, as reprojected, and of what lies between."""


class TriangulatePose(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundTriangulatePose",
            display_name="Triangulate Pose",
            category=CATEGORY,
            description="Finds the performer's keypoints in space from all views together: where the "
            "views agree, smoothed over time without lagging behind fast moves. What one view sees "
            "wrongly is outvoted.",
            inputs=[
                VIEWS.Input("views", tooltip="The coloured views, two or more."),
                HUMAN.Input("human_net", optional=True, tooltip="From Load Human Net: finds the "
                            "keypoints in every view. Unused when 'pose' is connected."),
                io.MultiType.Input("pose", types=POSES, optional=True, tooltip="Or keypoints of "
                                   "another node (OpenPose, DWPose, SAM 3D Body) for all frames of "
                                   "view 0, then all of view 1, and so on, as Views to Images gives "
                                   "the pictures."),
                RIG.Input("rig", optional=True,
                          tooltip="The cameras, when the views don't know theirs."),
            ],
            outputs=[
                POSE.Output(display_name="pose", tooltip="Keypoints in space and in every view; for "
                            "MV-Opt Refine."),
                io.Image.Output(display_name="picture", tooltip="All views: orange is what each view "
                                "shows on its own, blue what all agree on, white the way between; "
                                f"up to {MOMENTS} moments of the clip."),
                io.String.Output(display_name="note", tooltip="How many keypoints were found, how "
                                 "well the views agree, and which views were left out."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        views: Views,
        human_net: ModelPatcher | None = None,
        pose=None,
        rig: Rig | None = None,
    ) -> io.NodeOutput:
        rig = _cameras(views, rig)
        if pose is not None:
            pixels, sure, names = _given(pose, views)
        elif human_net is not None:
            mm.load_models_gpu(
                [human_net], memory_required=BYTES_A_CROP_PIXEL * CROP[0] * CROP[1] * CHUNK
            )
            bar = run.progress(3 * views.frames.shape[0] * views.frames.shape[1])
            detected = detect_keypoints(human_net.model, views, human_net.load_device, bar)
            pixels, sure, names = detected.pixels, detected.sure, KEYPOINTS
        else:
            raise ValueError(
                "Nothing tells where the performer's keypoints are: connect 'human_net' (Load Human "
                "Net), or the 'pose' of an OpenPose, DWPose or SAM 3D Body node."
            )
        if not (sure > 0).any():
            raise ValueError(
                "No view shows a performer: no keypoint has a confidence above 0. Check the views, "
                "or the node that 'pose' comes from."
            )
        found, raw = triangulated_pose(pixels, sure, rig, names)
        note = run.say(cls, describe(found, raw, rig.labels))
        return io.NodeOutput(found, frames_to_image(agreement_pictures(views, found, rig)), note)


def _cameras(views: Views, rig: Rig | None) -> Rig:
    """The rig of the views, or one sentence."""
    H, W = views.frames.shape[-2:]
    rig = rig or views.rig
    if views.frames.shape[2] != 3:
        raise ValueError("'views' carries depth, not colour: connect the coloured views.")
    if len(views) < 2:
        raise ValueError(
            "'views' holds one view, but places in space need at least two cameras that see the "
            "performer from different sides."
        )
    if rig is None:
        raise ValueError(
            "The views don't know their cameras: connect 'rig', the one they were made with."
        )
    if len(rig) != len(views):
        raise ValueError(
            f"'rig' has {len(rig)} cameras but 'views' {len(views)} views: connect the rig that the "
            "views were made with."
        )
    if (rig.width, rig.height) != (W, H):
        raise ValueError(
            f"'rig' makes pictures of {rig.width}x{rig.height} but 'views' are {W}x{H}: put Resize "
            "Rig between."
        )
    return rig


def _given(pose, views: Views) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Another node's keypoints of every view: pixels, how sure, names."""
    V, F, _, H, W = views.frames.shape
    frames = pose.get("frames") if isinstance(pose, dict) else pose
    if not isinstance(frames, list) or len(frames) != V * F:
        count = len(frames) if isinstance(frames, list) else 0
        raise ValueError(
            f"'pose' holds {count} frames, but {V} views x {F} frames need {V * F}: make it from the "
            "pictures of Views to Images, all frames of view 0 first, then those of view 1."
        )
    if not all(isinstance(frame, list if isinstance(pose, dict) else dict) for frame in frames):
        raise ValueError(
            "'pose' is neither OpenPose's JSON nor SAM 3D Body's pose data: connect POSE_KEYPOINT or "
            "MHR_POSE_DATA."
        )
    if isinstance(pose, dict):
        return *sam3d_keypoints(pose, V, W, H), tuple(MHR_POINTS)
    return *openpose_keypoints(frames, V, W, H), OPENPOSE18


def describe(pose: Pose, raw: Triangulated, labels: tuple[str, ...]) -> str:
    """What was found, how well views agree, who was left out."""
    found, error = pose.found > 0, raw.error[(pose.sure > 0) & (pose.found > 0)]
    notes = [
        f"{float(found.float().mean()):.0%} of {len(pose.names)} keypoints x {len(pose.points)} "
        f"frames found{'' if found.all() else ', the rest filled in'}; the views agree to "
        f"{float(error.median()):.1f} pixels"
    ]
    never = [name for name, ever in zip(pose.names, found.any(0).tolist(), strict=True) if not ever]
    if never:
        notes.append(f"in no frame: {', '.join(never)}")
    empty = ~(pose.sure > 0).flatten(1).any(1)
    out = [label for label, none in zip(labels, empty.tolist(), strict=True) if none]
    if out:
        notes.append(f"nobody was seen in {', '.join(out)}: left out")
    return "; ".join(notes)


def agreement_pictures(views: Views, pose: Pose, rig: Rig) -> Tensor:  # [N, 3, rows h, columns w]
    """The views side by side: each one's own skeleton, the one that all agree on, and the way
    between."""
    V, F, _, H, W = views.frames.shape
    columns = grid_columns(V)
    scale = min(TILE / H, SIDE / (columns * W), SIDE / (math.ceil(V / columns) * H))
    size = (max(1, int(W * scale + 1e-6)), max(1, int(H * scale + 1e-6)))
    stretch = pose.points.new_tensor([size[0] / W, size[1] / H])
    seen = (pose.pixels * stretch).tolist()
    agreed = (project(pose.points, rig).nan_to_num(0, 0, 0) * stretch).clamp(-1e4, 1e4).tolist()
    sure = (pose.sure >= SHOWN_FROM).tolist()
    bones = [
        (pose.names.index(a), pose.names.index(b))
        for a, b in BONES
        if a in pose.names and b in pose.names
    ]
    grids = []
    for f in torch.linspace(0, F - 1, min(MOMENTS, F)).round().long().tolist():
        tiles = []
        for v in range(V):
            frame = as_pictures(Views(views.frames[v : v + 1, f : f + 1]), 0).cpu().nan_to_num(0.5)
            image = run.to_pil(0.6 * resize_frames(frame, *size)[0])
            pen = ImageDraw.Draw(image)
            _draw(pen, seen[v][f], sure[v][f], bones, SEEN)
            _draw(pen, agreed[v][f], (pose.found[f] > 0).tolist(), bones, AGREED)
            for a, b, known in zip(seen[v][f], agreed[v][f], sure[v][f], strict=True):
                if known:
                    pen.line([*a, *b], fill=APART)
            tiles.append(pixels_of(image))
        grids.append(grid_picture(label_pictures(torch.stack(tiles), rig.labels)))
    return torch.stack(grids)


def _draw(pen: ImageDraw.ImageDraw, points: list, known: list[bool], bones: list, colour) -> None:
    """Bones between known points."""
    for a, b in bones:
        if known[a] and known[b]:
            pen.line([*points[a], *points[b]], fill=colour, width=2)


NODES: list[type[io.ComfyNode]] = [TriangulatePose]
