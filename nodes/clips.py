"""Clips into the graph: a video, pictures, or the videos of several calibrated cameras -> VIEWS."""

import contextlib
import itertools
from collections.abc import Callable, Iterator

import comfy.model_management as mm
import torch
from comfy_api.latest import InputImpl, io
from einops import rearrange
from torch import Tensor

from ..models.camera_views import (
    as_calibrated,
    read_offsets,
    read_together,
    rig_of_size,
    same_shape,
)
from ..models.cameras import Rig
from ..models.video_file import Footage, NoPictures, Pictures
from ..models.views import Views, grid_picture, resize_frames, snap_frames
from . import run
from .sockets import RIG, VIEWS
from .views import CATEGORY, image_to_frames, snapped


class VideoToViews(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundVideoToViews",
            display_name="Video to Views",
            category=CATEGORY,
            description="Turns your clip (VIDEO, or IMAGE frames) and, if you have one, its mask "
            "into a one-view VIEWS, at a size and length that video models take.",
            inputs=[
                io.Video.Input("video", optional=True, tooltip="Your clip."),
                io.Image.Input("images", optional=True,
                               tooltip="Or the clip as frames; used when no video is connected."),
                io.Mask.Input("mask", optional=True,
                              tooltip="The performer in white, one mask a frame or one for all."),
                io.Int.Input("width", default=0, min=0, max=4096, step=16,
                             tooltip="New width in pixels; 0 keeps the clip's. The picture is "
                             "scaled and its middle cut out, never stretched."),
                io.Int.Input("height", default=0, min=0, max=4096, step=16,
                             tooltip="New height in pixels; 0 keeps the clip's."),
                io.Int.Input("start_frame", default=0, min=0, max=100_000,
                             tooltip="First frame to use."),
                io.Int.Input("max_frames", default=49, min=1, max=1001, step=4,
                             tooltip="How many frames to use at most; fewer need less time."),
                io.Int.Input("every_nth", default=1, min=1, max=16,
                             tooltip="Use every n-th frame: 60 frames a second want 3 or 4."),
                io.Float.Input("fps", default=16.0, min=1.0, max=240.0, step=0.5,
                               tooltip="Frames a second of IMAGE frames; a VIDEO knows its own."),
            ],
            outputs=[
                VIEWS.Output(display_name="views", tooltip="The clip as one view."),
                io.String.Output(display_name="note", tooltip="What was changed to fit."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, width, height, start_frame, max_frames, every_nth, fps,
        video=None, images=None, mask=None,
    ) -> io.NodeOutput:  # fmt: skip
        chosen = slice(start_frame, start_frame + max_frames * every_nth, every_nth)
        if video is not None:
            clip = _footage("video", video)
            pictures, fps = _chosen(clip, chosen, max_frames)
        elif images is not None:
            clip = images
            pictures = image_to_frames(images[chosen])
        else:
            raise ValueError("Connect 'video' or 'images': Video to Views has no clip to work on.")
        if not len(pictures):
            raise ValueError(
                f"start_frame is {start_frame}, but the clip has only {_length(clip)} frames: lower it."
            )
        H, W = pictures.shape[-2:]
        count, width, height, note = snapped(len(pictures), width or W, height or H)
        frames = torch.cat([resize_frames(_unit(p)[None], width, height) for p in pictures[:count]])
        masks = None
        if mask is not None:
            given = _fitting_mask(mask, clip, (W, H))
            given = given[chosen][:count] if len(given) > 1 else given.expand(count, -1, -1)
            masks = resize_frames(given[:, None].float(), width, height)[:, 0].clamp(0, 1)[None]
        note = "; ".join(filter(None, (note, _little_motion(count, fps / every_nth))))
        run.say(cls, note)
        return io.NodeOutput(Views(frames[None], masks, None, fps / every_nth), note)


@contextlib.contextmanager
def _readable(socket: str) -> Iterator[None]:
    """One sentence where no decoder reads a file: the decoder's own words tell a creator only a
    number and a path."""
    import av  # takes long: only where a file is read

    try:
        yield
    # IndexError: ComfyUI's own, where it looks for the first picture.
    except (NoPictures, IndexError):
        raise ValueError(
            f"The file in '{socket}' has no pictures, only sound: load a video."
        ) from None
    except av.FFmpegError:
        raise ValueError(
            f"The file in '{socket}' cannot be read as a video: it may be broken, cut off, or of "
            "another kind. Play it in a video player; where it plays there, export it as mp4 (H.264) "
            "and load that."
        ) from None


def _chosen(
    clip: Footage | Pictures,  # of 'video'
    chosen: slice,
    most: int,
) -> tuple[Tensor, float]:  # [n, 3, H, W] bytes or 0..1
    """Those frames and the frames a second of the whole; a file's others are not kept."""
    with _readable("video"):
        fps, _ = clip.facts()
        if isinstance(clip, Pictures):
            return clip.images[chosen], fps
        bar, pictures = run.progress(most), []
        reader = clip.frames(
            chosen.start, chosen.step, mm.throw_exception_if_processing_interrupted
        )
        for picture in itertools.islice(reader, most):
            pictures.append(picture)
            bar(len(pictures), most)
        if not pictures and not _length(clip):
            raise NoPictures
    return (torch.stack(pictures) if pictures else torch.empty(0, 3, 1, 1)), fps


def _length(clip: Footage | Pictures | Tensor) -> int:
    """Frames of a clip; those of a file are counted, since what it says of itself may be wrong."""
    if isinstance(clip, Footage):
        return sum(1 for _ in clip.frames(0, 1, mm.throw_exception_if_processing_interrupted))
    return len(clip.images if isinstance(clip, Pictures) else clip)


def _unit(picture: Tensor) -> Tensor:
    return picture.float() / 255 if picture.dtype == torch.uint8 else picture.float()


MANY_FRAMES = 24.0
"""A second; video models were trained on fewer, and a short clip of more hardly moves."""


def _little_motion(frames: int, fps: float) -> str:
    """A word where a clip will show less motion than its maker may expect."""
    if frames == 1:
        return "one frame gives a still; for motion give at least 5 frames"
    if fps <= MANY_FRAMES:
        return ""
    return (
        f"{fps:.4g} frames a second are kept, so {frames} frames last {frames / fps:.1f} s: a larger "
        "'every_nth' shows more motion"
    )


def _fitting_mask(mask: Tensor, clip: Footage | Pictures | Tensor, size: tuple[int, int]) -> Tensor:
    """The mask of every frame of the clip, or one for all, [F, H, W]."""
    if mask.ndim == 2:
        mask = mask[None]
    if tuple(mask.shape[2:0:-1]) != size:
        raise ValueError(
            f"The mask is {mask.shape[2]}x{mask.shape[1]} but the clip is {size[0]}x{size[1]}: "
            "make the mask from the same frames."
        )
    if len(mask) > 1 and len(mask) != (total := _length(clip)):
        raise ValueError(
            f"The mask has {len(mask)} frames but the clip has {total}: give one mask a frame, or "
            "a single one for all."
        )
    return mask


class ImagesToViews(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundImagesToViews",
            display_name="Images to Views",
            category=CATEGORY,
            description="Puts an IMAGE batch that holds several views (all frames of the first "
            "view, then all of the second, ...) back into VIEWS.",
            inputs=[
                io.Image.Input("images", tooltip="V x F pictures, view after view."),
                io.Int.Input("views", default=8, min=1, max=64,
                             tooltip="How many views the batch holds; ignored with a rig."),
                io.Float.Input("fps", default=16.0, min=1.0, max=240.0, step=0.5,
                               tooltip="Frames a second."),
                RIG.Input("rig", optional=True, tooltip="The cameras of the views."),
                io.Mask.Input("mask", optional=True, tooltip="V x F masks, in the same order."),
            ],
            outputs=[VIEWS.Output(display_name="views", tooltip="The views.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, images, views, fps, rig=None, mask=None) -> io.NodeOutput:
        V = len(rig) if rig is not None else views
        if len(images) % V:
            raise ValueError(
                f"{len(images)} images can't be shared evenly by {V} views: set 'views' to a "
                "number that divides them, or connect all frames of every view."
            )
        frames = rearrange(image_to_frames(images), "(v f) c h w -> v f c h w", v=V)
        if mask is not None and mask.ndim == 2:
            mask = mask[None]
        if mask is not None and len(mask) != len(images):
            raise ValueError(f"There are {len(images)} images but {len(mask)} masks: give as many.")
        masks = rearrange(mask, "(v f) h w -> v f h w", v=V) if mask is not None else None
        if rig is not None:
            rig = rig.resized(frames.shape[-1], frames.shape[-2])
        return io.NodeOutput(Views(frames, masks, rig, fps))


MAX_CAMERAS = 8
PREVIEW_SIZE = 240
SAME_RATE = 0.01
"""Share by which frame rates may differ: 29.97 and 30 are one, 25 and 24 are not."""


class CamerasToViews(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundCamerasToViews",
            display_name="Cameras to Views",
            category=CATEGORY,
            description="Brings the videos of several calibrated cameras into the graph as VIEWS "
            "with their rig: at one size, beginning at the same moment. Only the frames that are used "
            "are kept in memory.",
            inputs=[
                RIG.Input("rig", tooltip="The calibrated cameras, from Rig from File: its first camera "
                          "filmed 'video_1', its second 'video_2', and so on."),
                *(
                    io.Video.Input(f"video_{k}", optional=True,
                                   tooltip=f"What camera {k} of the rig filmed, from Load Video.")
                    for k in range(1, MAX_CAMERAS + 1)
                ),
                io.Int.Input("longest_side", default=960, min=0, max=4096, step=16,
                             tooltip="Pixels of the longer side of every view; the shape is the rig's. "
                             "0 = the size of the rig itself."),
                io.Int.Input("start_frame", default=0, min=0, max=100_000,
                             tooltip="First frame to use, counted from the first that all cameras "
                             "have."),
                io.Int.Input("max_frames", default=49, min=1, max=1001, step=4,
                             tooltip="How many frames to use at most; fewer need less time."),
                io.Int.Input("every_nth", default=1, min=1, max=16,
                             tooltip="Use every n-th frame: 60 frames a second want 3 or 4."),
                io.String.Input("offsets", default="",
                                tooltip="Where the cameras were not started together: the number of "
                                "the frame in each video that shows the same moment, such as a clap: "
                                "12, 15, 10, 12. Only the differences count. Empty = all start "
                                "together."),
            ],
            outputs=[
                VIEWS.Output(display_name="views", tooltip="One view a camera, with the rig at the "
                             "new size; lenses still bend, Straighten Views comes next."),
                io.String.Output(display_name="note", tooltip="What was read, and what was changed to "
                                 "fit."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, rig: Rig, longest_side, start_frame, max_frames, every_nth, offsets, **videos
    ) -> io.NodeOutput:
        given = _one_a_camera(rig, videos)
        firsts = [start_frame + n for n in read_offsets(offsets, len(given))]
        clips = {socket: _footage(socket, video) for socket, video in given.items()}
        rates, count = {}, max_frames
        for (socket, clip), first in zip(clips.items(), firsts, strict=True):
            with _readable(socket):
                rates[socket], known = clip.facts()
            if known is not None:
                count = min(count, max(1, len(range(first, known, every_nth))))
        fps = _one_rate(rates)
        sized = rig_of_size(rig, longest_side)
        run.check_memory("The pictures", sized, count, 3)
        readers = [
            _pictures(socket, clip, first, every_nth, rig, sized)
            for (socket, clip), first in zip(clips.items(), firsts, strict=True)
        ]
        together = read_together(readers, count, (sized.width, sized.height), _shown(count))
        frames = together.frames
        if not frames.shape[1]:
            socket = list(clips)[together.ended]
            raise ValueError(
                f"'{socket}' ends before its frame {firsts[together.ended]}, where the views would "
                "begin: lower 'start_frame', or correct 'offsets'."
            )
        kept = snap_frames(frames.shape[1])
        note = _what_was_read(frames, kept, max_frames, fps / every_nth)
        run.say(cls, note)
        return io.NodeOutput(Views(frames[:, :kept], None, sized, fps / every_nth), note)


def _one_a_camera(rig: Rig, videos: dict) -> dict:
    """The connected videos by their sockets, one a camera of the rig."""
    sockets = [f"video_{k}" for k in range(1, MAX_CAMERAS + 1)]
    given = {socket: videos[socket] for socket in sockets if videos.get(socket) is not None}
    gap = next((s for s in sockets[: len(given)] if s not in given), None)
    if gap:
        raise ValueError(
            f"'{gap}' is empty, but '{list(given)[-1]}' is connected: connect the videos without a gap, "
            "in the order of the rig's cameras."
        )
    if len(given) != len(rig):
        named = f" ({', '.join(rig.names)})" if rig.names else ""
        raise ValueError(
            f"{len(given)} videos came, but 'rig' has {len(rig)} cameras{named}: connect one video a "
            "camera, in this order, or keep the cameras that you have videos of with Pick Cameras."
        )
    return given


def _footage(socket: str, video) -> Footage | Pictures:
    """What can be read frame by frame of ComfyUI's video, whole or trimmed."""
    if isinstance(video, InputImpl.VideoFromFile):
        # ComfyUI 0.3.75 cannot trim; of newer ones, some do not tell how a video was trimmed.
        if hasattr(video, "get_active_trim_window"):
            with _readable(socket):
                return Footage(video.get_stream_source(), *video.get_active_trim_window())
        if not hasattr(video, "as_trimmed"):
            return Footage(video.get_stream_source())
    with _readable(socket):
        components = video.get_components()
    return Pictures(image_to_frames(components.images), float(components.frame_rate))


def _one_rate(rates: dict[str, float]) -> float:
    """The frames a second of all videos."""
    first, fps = next(iter(rates.items()))
    for socket, rate in rates.items():
        if abs(rate / fps - 1) > SAME_RATE:
            raise ValueError(
                f"'{socket}' has {rate:.4g} frames a second but '{first}' {fps:.4g}, so their frames "
                "are not of the same moments: export all videos at one frame rate."
            )
    return fps


def _pictures(
    socket: str, clip: Footage | Pictures, first: int, step: int, rig: Rig, sized: Rig
) -> Iterator[Tensor]:  # of [3, H, W] bytes
    """The chosen frames of one camera at the new size."""
    stop = mm.throw_exception_if_processing_interrupted
    with _readable(socket):
        for picture in clip.frames(first, step, stop):
            H, W = picture.shape[-2:]
            if not same_shape(W, H, rig):
                raise ValueError(
                    f"'{socket}' is {W}x{H}, but 'rig' was calibrated for {rig.width}x{rig.height}, "
                    "another shape: give the video as it was filmed, nothing cut off or turned, and "
                    "in the order of the rig's cameras."
                )
            yield as_calibrated(picture, rig, sized.width, sized.height)


def _shown(count: int) -> Callable[[int, Tensor], None]:
    """Progress with all cameras' pictures of a moment side by side."""
    bar = run.progress(count)

    def on_moment(done: int, pictures: Tensor) -> None:  # [V, 3, H, W] bytes
        shrink = max(1, max(pictures.shape[-2:]) // PREVIEW_SIZE)
        bar(done, count, grid_picture(pictures[..., ::shrink, ::shrink].float() / 255))

    return on_moment


def _what_was_read(frames: Tensor, kept: int, wanted: int, fps: float) -> str:
    V, count, _, H, W = frames.shape
    note = f"{V} views x {kept} frames of {W}x{H}, {fps:.4g} frames a second"
    if count < wanted:
        note += f"; the shortest video has {count} frames to use"
    if kept != count:
        note += f"; {count} frames became {kept} (video models need 4n+1)"
    return "; ".join(filter(None, (note, _little_motion(kept, fps))))


NODES: list[type[io.ComfyNode]] = [VideoToViews, ImagesToViews, CamerasToViews]
