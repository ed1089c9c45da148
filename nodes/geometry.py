"""Geometry: the performer as points."""

import math

import torch
from comfy_api.latest import io
from torch import Tensor

from ..models.cameras import intrinsics
from ..models.clean_points import accumulate_static, floaters, stage_pictures
from ..models.depth import CONVENTIONS, depth_to_metres, grey_depth, resize_depth, without_blanks
from ..models.points import points_from_surface, surface_from_depth
from ..models.relief import check_performer, mask_from_plain_background, relief_depth
from ..models.views import Views, as_pictures
from . import run
from .sockets import CLOUD, VIEWS
from .views import frames_to_image

CATEGORY = "Turnaround/2 geometry"
MUCH_BARE = 0.05
"""Share of the mask without depth that is worth a word."""


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
                            tooltip="Depth in metres, from Align Depth, Refine Depth, Human "
                            "Geometry or Sample Performer; wins over 'depth'."),
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
                io.Boolean.Input("clean_edges", default=True, optional=True,
                                 tooltip="Drops floaters: pixels that depth nodes draw between the "
                                 "performer and what is behind, or between an arm and the body, "
                                 "and that lie on neither."),
                io.Boolean.Input("accumulate", default=False, optional=True,
                                 tooltip="What stands still all through the clip (a chair, a foot) "
                                 "is kept where the performer passes before it. Only for a camera "
                                 "that stands still."),
            ],
            outputs=[
                CLOUD.Output(display_name="cloud", tooltip="The performer as points."),
                VIEWS.Output(display_name="depth", tooltip="The depth that was used, in metres."),
                io.String.Output(display_name="note", tooltip="What was guessed or changed."),
                VIEWS.Output(display_name="performer", tooltip="The clip with the mask that was "
                             "used, for 'reference' of Multi-View Conditioning."),
                io.Image.Output(display_name="stages", tooltip="Every frame before and after "
                                "cleaning: mask, depth, normals, normals that are kept, and the "
                                "fate of every pixel: green = kept, blue = mask edge (erosion), "
                                "yellow = seen too flat, red = floater."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, video: Views, depth_convention, fov, performer_height, erosion, far_side="guessed",
        depth_views: Views | None = None, depth=None, mask=None, clean_edges=True,
        accumulate=False,
    ) -> io.NodeOutput:  # fmt: skip
        check_source("video", video, "Performer Geometry works")
        frames = as_pictures(video, 0)
        F, _, H, W = frames.shape
        notes = []
        K = video.rig.K[0] if video.rig is not None else intrinsics(math.radians(fov), W, H)
        masks = _masks(video, frames, mask, notes)
        bar = run.progress(5)
        bar(1, 5)
        metres = _metres(
            depth_views, depth, depth_convention, masks, float(K[1, 1]), performer_height, notes
        )
        empty = (masks < 0.5).all(-1).all(-1).nonzero()[:, 0].tolist()
        if empty and len(empty) < F:
            notes.append(f"no performer in the mask of frames {empty}: they stay empty")
        outliers = floaters(metres, masks, K) if clean_edges else None
        bar(2, 5)
        surface = surface_from_depth(metres, masks, K, erosion, outliers)
        bare = 1 - float(surface.known.sum() / (masks > 0.5).sum())
        if bare > MUCH_BARE:
            notes.append(f"{100 * bare:.0f} % of the mask has no depth and stays empty")
        stages = stage_pictures(frames, masks, surface)
        bar(3, 5)
        cloud = points_from_surface(frames, surface, K, video.fps, far_side == "guessed")
        bar(4, 5)
        if accumulate:
            before = len(cloud.positions)
            cloud = accumulate_static(cloud, masks)
            notes.append(f"{len(cloud.positions) - before} points stand still and were kept")
        bar(5, 5)
        note = run.say(cls, "; ".join(notes))
        used = torch.where(masks > 0.5, metres, 0.0).nan_to_num(0, 0, 0)[None, :, None]
        depth_used = Views(used, masks[None], None, video.fps)
        performer = Views(frames[None], masks[None], video.rig, video.fps)
        return io.NodeOutput(cloud, depth_used, note, performer, frames_to_image(stages))


def check_source(name: str, views: Views, works: str) -> None:
    """One sentence where one camera's colour is needed and something else came."""
    if len(views) != 1:
        raise ValueError(
            f"'{name}' has {len(views)} views; {works} from one camera: connect the source clip."
        )
    if views.frames.shape[2] != 3:
        raise ValueError(f"'{name}' carries depth, not colour: connect the clip itself.")


def depth_of(views: Views, name: str) -> Tensor:  # [F, H, W]
    """Metres of one camera, or a sentence."""
    if views.frames.shape[2] != 1:
        raise ValueError(
            f"'{name}' carries colour, not depth: connect a depth output in metres, or use the "
            "'depth' socket for depth pictures."
        )
    if len(views) != 1:
        raise ValueError(
            f"'{name}' has {len(views)} views, but the depth of the source camera alone is needed: "
            "pick that view first."
        )
    return views.frames[0, :, 0].float()


def fit_pictures(
    name: str,
    pictures: Tensor,  # [F, h, w] or [F, C, h, w]
    size: tuple[int, int, int],  # frames, height, width
    notes: list[str],
    clip: str = "the video",
    depth: bool = False,
) -> Tensor:
    """The same pictures at the clip's count and size, in ordinary memory: depth keeps its edges, all
    else is smooth."""
    pictures, (F, H, W) = pictures.cpu(), size
    if len(pictures) < F:
        raise ValueError(
            f"'{name}' has {len(pictures)} frames but {clip} has {F}: make it from the same "
            "frames (Video to Views may have cut the clip to 4n+1 frames)."
        )
    h, w = pictures.shape[-2:]
    if abs(h / w - H / W) > 0.02 * H / W:
        raise ValueError(
            f"'{name}' is {w}x{h} but {clip} is {W}x{H}, another shape: make it from the same "
            "frames, with the same crop."
        )
    if len(pictures) > F:
        notes.append(f"'{name}' had {len(pictures)} frames, the first {F} are used")
        pictures = pictures[:F]
    if (h, w) == (H, W):
        return pictures.float()
    notes.append(f"'{name}' was scaled from {w}x{h} to {W}x{H}")
    if depth:
        return resize_depth(pictures, H, W)
    channels = pictures.view(F, -1, h, w).float()
    scaled = torch.nn.functional.interpolate(channels, size=(H, W), mode="bilinear", antialias=True)
    return scaled.view(*pictures.shape[:-2], H, W)


def fit_mask(mask: Tensor, size: tuple[int, int, int], notes: list[str], clip: str) -> Tensor:
    """The mask socket, [F, H, W]; a single mask is one frame."""
    return fit_pictures("mask", mask[None] if mask.ndim == 2 else mask, size, notes, clip)


def _masks(video: Views, frames: Tensor, mask, notes: list[str]) -> Tensor:
    """The performer [F, H, W], from the socket, the clip, or a plain background."""
    if mask is not None:
        F, _, H, W = frames.shape
        masks = fit_mask(mask, (F, H, W), notes, "the video")
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
    size = tuple(masks.shape)
    if depth_views is not None:
        return fit_pictures(
            "depth_views", depth_of(depth_views, "depth_views"), size, notes, depth=True
        )
    if depth is not None:
        pictures = fit_pictures("depth", grey_depth(depth, "depth"), size, notes, depth=True)
        pictures = without_blanks(pictures, masks)
        metres, note = depth_to_metres(pictures, masks, convention, focal, person_height)
        if note:
            notes.append(note)
        return metres
    notes.append("there was no depth: the mask is inflated to a relief, which is a guess")
    return relief_depth(masks, focal, person_height)


NODES: list[type[io.ComfyNode]] = [PerformerGeometry]
