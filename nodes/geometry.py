"""Geometry: the performer as points."""

import math

import torch
from comfy_api.latest import io
from torch import Tensor

from ..models.cameras import intrinsics
from ..models.depth import CONVENTIONS, depth_to_metres
from ..models.points import points_from_depth
from ..models.relief import check_performer, mask_from_plain_background, relief_depth
from ..models.views import Views
from . import run
from .sockets import CLOUD, VIEWS

CATEGORY = "Turnaround/2 geometry"


class PerformerGeometry(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundPerformerGeometry",
            display_name="Performer Geometry",
            category=CATEGORY,
            description="Turns the clip, its mask and its depth into coloured points with normals "
            "around the performer. Depth may come from any depth node. Without depth, the mask is "
            "inflated to a relief; without a mask, a plain background is taken away: both are "
            "guesses, and the note says so.",
            inputs=[
                VIEWS.Input("video", tooltip="The clip, one view (Video to Views)."),
                VIEWS.Input("depth_views", optional=True,
                            tooltip="Exact depth in metres, from Sample Performer."),
                io.Image.Input("depth", optional=True,
                               tooltip="Depth pictures of any depth node, one a frame."),
                io.Mask.Input("mask", optional=True,
                              tooltip="The performer in white, one a frame; replaces the mask of "
                              "the video."),
                io.Combo.Input("depth_convention", options=list(CONVENTIONS),
                               tooltip="What the numbers of 'depth' mean. Most depth nodes: near "
                               "is white."),
                io.Float.Input("fov", default=40.0, min=5.0, max=120.0, step=1.0,
                               tooltip="Vertical field of view of your camera in degrees; unused "
                               "when the clip knows its camera."),
                io.Float.Input("performer_height", default=1.7, min=0.3, max=3.0, step=0.05,
                               tooltip="Metres; sets the distance where the depth doesn't."),
                io.Int.Input("erosion", default=1, min=0, max=16,
                             tooltip="Pixels taken off the mask's edge, where colours and depth "
                             "mix with the background."),
                io.Combo.Input("far_side", options=["guessed", "open"], optional=True,
                               tooltip="What your camera did not see: guessed = the body is closed, "
                               "as thick as its outline suggests, with the colours of its front "
                               "(Turnaround-Tiny was trained so); open = seen points only, thin "
                               "from the side."),
            ],
            outputs=[
                CLOUD.Output(display_name="cloud", tooltip="The performer as points."),
                VIEWS.Output(display_name="depth", tooltip="The depth that was used, in metres."),
                io.String.Output(display_name="note", tooltip="What was guessed or changed."),
                VIEWS.Output(display_name="performer", tooltip="The clip with the mask that was "
                             "used, for 'reference' of Multi-View Conditioning."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, video: Views, depth_convention, fov, performer_height, erosion, far_side="guessed",
        depth_views: Views | None = None, depth=None, mask=None,
    ) -> io.NodeOutput:  # fmt: skip
        if len(video) != 1:
            raise ValueError(
                f"'video' has {len(video)} views; Performer Geometry works from one camera: "
                "connect the source clip."
            )
        frames = video.frames[0].float()
        F, _, H, W = frames.shape
        notes = []
        K = video.rig.K[0] if video.rig is not None else intrinsics(math.radians(fov), W, H)
        masks = _masks(video, mask, notes)
        metres = _metres(
            depth_views, depth, depth_convention, masks, float(K[1, 1]), performer_height, notes
        )
        empty = (masks < 0.5).all(-1).all(-1).nonzero()[:, 0].tolist()
        if empty and len(empty) < F:
            notes.append(f"no performer in the mask of frames {empty}: they stay empty")
        cloud = points_from_depth(
            frames, metres, masks, K, erosion, video.fps, far_side == "guessed"
        )
        note = run.say(cls, "; ".join(notes))
        used = torch.where(masks > 0.5, metres, 0.0).nan_to_num(0, 0, 0)[None, :, None]
        depth_used = Views(used, masks[None], None, video.fps)
        performer = Views(frames[None], masks[None], video.rig, video.fps)
        return io.NodeOutput(cloud, depth_used, note, performer)


def _fit(name: str, pictures: Tensor, frames: Tensor, notes: list[str]) -> Tensor:
    """Depth or masks [F, h, w] at the frames' count and size."""
    F, _, H, W = frames.shape
    if len(pictures) < F:
        raise ValueError(
            f"'{name}' has {len(pictures)} frames but the video has {F}: make it from the same "
            "frames (Video to Views may have cut the clip to 4n+1 frames)."
        )
    h, w = pictures.shape[1:]
    if abs(h / w - H / W) > 0.02 * H / W:
        raise ValueError(
            f"'{name}' is {w}x{h} but the video is {W}x{H}, another shape: make it from the same "
            "frames, with the same crop."
        )
    if len(pictures) > F:
        notes.append(f"'{name}' had {len(pictures)} frames, the first {F} are used")
        pictures = pictures[:F]
    if (h, w) != (H, W):
        notes.append(f"'{name}' was scaled from {w}x{h} to {W}x{H}")
        pictures = torch.nn.functional.interpolate(
            pictures[:, None].float(), size=(H, W), mode="nearest-exact"
        )[:, 0]
    return pictures.float()


def _masks(video: Views, mask, notes: list[str]) -> Tensor:
    """The performer [F, H, W], from the socket, the clip, or a plain background."""
    frames = video.frames[0].float()
    if mask is not None:
        mask = mask[None] if mask.ndim == 2 else mask
        masks = _fit("mask", mask, frames, notes)
    elif video.masks is not None:
        masks = video.masks[0].float()
    else:
        masks = mask_from_plain_background(frames)
        share = float(masks.mean())
        if not 0.005 < share < 0.7:
            raise ValueError(
                "There is no mask, and the background is not plain enough to guess one: connect a "
                "'mask' that shows the performer in white."
            )
        notes.append("there was no mask: it is guessed from the plain background")
    check_performer(masks)
    return masks


def _metres(depth_views, depth, convention, masks, focal, person_height, notes) -> Tensor:
    """Depth in metres [F, H, W], from one of the sockets or a relief."""
    frames = masks[:, None]
    if depth_views is not None:
        if depth_views.frames.shape[2] != 1:
            raise ValueError(
                "'depth_views' carries colour, not depth: connect a depth output, or use the "
                "'depth' socket for depth pictures."
            )
        if len(depth_views) != 1:
            raise ValueError(
                f"'depth_views' has {len(depth_views)} views; Performer Geometry needs the depth "
                "of the source camera alone: pick that view first."
            )
        return _fit("depth_views", depth_views.frames[0, :, 0], frames, notes)
    if depth is not None:
        pictures = _fit("depth", depth[..., :3].float().mean(-1), frames, notes)
        metres, note = depth_to_metres(pictures, masks, convention, focal, person_height)
        if note:
            notes.append(note)
        return metres
    notes.append("there was no depth: the mask is inflated to a relief, which is a guess")
    return relief_depth(masks, focal, person_height)


NODES: list[type[io.ComfyNode]] = [PerformerGeometry]
