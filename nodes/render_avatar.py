"""Avatars as pictures: views from any cameras at any times, and turntable videos."""

import math
from fractions import Fraction

import comfy.model_management as mm
import torch
from comfy_api.latest import InputImpl, Types, io
from torch import Tensor

from ..models.avatar import Avatar
from ..models.avatar_pictures import (
    AvatarPictures,
    Shot,
    avatar_pictures,
    framing,
    played_times,
    turning_times,
)
from ..models.cameras import MAX_VIEWS, Rig
from ..models.views import Views, resize_frames
from . import run
from .cameras import size_inputs
from .distill_avatar import CATEGORY
from .sockets import AVATAR, RIG, VIEWS
from .views import frames_to_image, image_to_frames

GROUNDS = {
    "grey": (0.5, 0.5, 0.5), "black": (0, 0, 0), "white": (1, 1, 1), "green": (0, 0.69, 0.25),
}  # fmt: skip
RING, RING_FOV, RING_SIZE = 8, 35.0, (384, 512)
"""Cameras, where no rig is connected."""
BYTES, VIDEO_BYTES = 14, 32
"""A pixel: of views six for pictures, four for depth, four for masks; of videos also what encoders copy."""
WORKING_BYTES = 1 << 30
"""Of GPU memory that drawing asks for."""
ROUND, BACK, FROZEN = "plays on and on", "there and back", "frozen"


def ground_inputs() -> list:
    return [
        io.Combo.Input("background", options=list(GROUNDS), tooltip="Behind the performer. The mask "
                       "tells it apart in any case."),
        io.Image.Input("background_picture", optional=True, tooltip="Behind the performer instead of a "
                       "plain color; scaled to fill the picture."),
    ]  # fmt: skip


def ground_of(background: str, picture: Tensor | None, width: int, height: int) -> Tensor:
    """[3] or [3, H, W] 0..1."""
    if picture is None:
        return torch.tensor(GROUNDS[background], dtype=torch.float32)
    return resize_frames(image_to_frames(picture[:1]).float(), width, height)[0].clamp(0, 1)


def drawn(
    avatar: Avatar, rig: Rig, shots: list[Shot], ground: Tensor, geometry: bool, bar: run.Progress
) -> AvatarPictures:
    """Drawn where ComfyUI computes."""
    device = run.drawing_device(WORKING_BYTES)
    with torch.inference_mode(False), torch.no_grad():
        return avatar_pictures(avatar, rig, shots, ground, geometry, device, bar)


# --- views ----------------------------------------------------------------------------------------


class RenderAvatar(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundRenderAvatar",
            display_name="Render Avatar",
            category=CATEGORY,
            description="Shows an avatar from every camera of a rig: colors with masks, depth and "
            "normals, of all its motion, a part of it or one moment, at any speed.",
            inputs=[
                AVATAR.Input("avatar", tooltip="From Distill Avatar, Animate Avatar or Load Avatar."),
                RIG.Input("rig", optional=True, tooltip="The cameras to look from. Without any, eight "
                          "on a ring around it."),
                io.Float.Input("first_frame", default=0.0, min=0.0, max=100_000.0, step=0.25,
                               tooltip="Where in the motion it begins, in frames of the avatar; may lie "
                               "between two."),
                io.Float.Input("last_frame", default=-1.0, min=-1.0, max=100_000.0, step=0.25,
                               tooltip="Where it ends; -1 = at the end. The same as first_frame: one "
                               "moment."),
                io.Float.Input("speed", default=1.0, min=0.01, max=16.0, step=0.05,
                               tooltip="1 = as it was, 0.25 = slow motion with four times the frames."),
                io.Float.Input("fps", default=0.0, min=0.0, max=240.0, step=0.5,
                               tooltip="Frames a second of the result; 0 = the avatar's own. Frames "
                               "between are computed, not mixed."),
                *ground_inputs(),
            ],
            outputs=[
                VIEWS.Output(display_name="colors", tooltip="With the performer's outline as mask."),
                VIEWS.Output(display_name="depth", tooltip="Metres along the optical axis, 0 where "
                             "nothing is."),
                VIEWS.Output(display_name="normals", tooltip="Red = right, green = up, blue = towards "
                             "the camera; grey where nothing is."),
                io.String.Output(display_name="note", tooltip="What was drawn."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, avatar: Avatar, first_frame, last_frame, speed, fps, background, rig: Rig | None = None,
        background_picture=None,
    ) -> io.NodeOutput:  # fmt: skip
        fps = fps or avatar.fps
        times = times_of(avatar, first_frame, last_frame, speed * avatar.fps / fps)
        rig = rig if rig is not None else ring_around(avatar)
        run.check_memory("Pictures", rig, len(times), BYTES)
        ground = ground_of(background, background_picture, rig.width, rig.height)
        # A time's Gaussians are posed once for all cameras.
        shots = [(v, time) for time in times for v in range(len(rig))]
        seen = drawn(avatar, rig, shots, ground, True, run.progress(len(shots)))
        colors, masks, depth, normals = (by_view(t, len(rig)) for t in vars(seen).values())
        solid = masks >= 0.5
        note = run.say(cls, _seen_note(rig, times, fps, masks))
        return io.NodeOutput(
            Views(colors, masks, rig, fps), Views(depth[:, :, None], solid, rig, fps),
            Views(normals, solid, rig, fps), note,
        )  # fmt: skip


def times_of(avatar: Avatar, first: float, last: float, step: float) -> list[float]:
    """The moments that are shown, in frames of the avatar."""
    last = avatar.frame_count - 1 if last == -1 else last
    check_frame(avatar, "first_frame", first)
    check_frame(avatar, "last_frame", last)
    if last < first:
        raise ValueError(
            f"'last_frame' is {last:g} and lies before 'first_frame', {first:g}: raise it, or use -1 "
            "for the end."
        )
    return played_times(first, last, step)


def check_frame(avatar: Avatar, name: str, value: float) -> None:
    """A widget's frame, of the avatar's motion or one sentence."""
    if not 0 <= value <= avatar.frame_count - 1:
        raise ValueError(
            f"'{name}' is {value:g}, but the avatar's motion has the frames 0 to "
            f"{avatar.frame_count - 1}: choose one of them, or a time between two."
        )


def ring_around(avatar: Avatar) -> Rig:
    azimuths = torch.arange(RING) * (2 * math.pi / RING)
    return framing(avatar).orbit(azimuths, 0.0, math.radians(RING_FOV), *RING_SIZE)


def by_view(values: Tensor, views: int) -> Tensor:
    """[F V, ...] -> [V, F, ...]."""
    return values.unflatten(0, (-1, views)).transpose(0, 1)


def _seen_note(rig: Rig, times: list[float], fps: float, masks: Tensor) -> str:
    blind = masks.flatten(1).amax(1).lt(0.5).nonzero()[:, 0].tolist()
    moments = f"{len(times)} frames" if len(times) > 1 else f"frame {times[0]:g}"
    note = f"{moments} from {len(rig)} cameras, {fps:g} frames a second"
    if blind:
        named = ", ".join(rig.labels[v] for v in blind[:8])
        note += f"; cameras {named} see nothing of the avatar"
    return note


# --- turntable ------------------------------------------------------------------------------------


class AvatarTurntable(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundAvatarTurntable",
            display_name="Avatar Turntable",
            category=CATEGORY,
            description="A video in which the camera goes round an avatar while it moves, in slow "
            "motion or frozen in one moment.",
            inputs=[
                AVATAR.Input("avatar", tooltip="From Distill Avatar, Animate Avatar or Load Avatar."),
                io.Float.Input("seconds", default=4.0, min=0.1, max=120.0, step=0.1,
                               tooltip="Length of the video."),
                io.Float.Input("turns", default=1.0, min=-20.0, max=20.0, step=0.05,
                               tooltip="How often the camera goes round: 1 = once, so that the video can "
                               "be looped; negative = the other way; 0 = it stands still."),
                io.Combo.Input("motion", options=[ROUND, BACK, FROZEN], tooltip="plays on and on: from "
                               "the start again at the end. there and back: forwards, then backwards, "
                               "without a jump. frozen: one moment."),
                io.Float.Input("first_frame", default=0.0, min=0.0, max=100_000.0, step=0.25,
                               tooltip="The moment that is frozen, or with which the motion begins; in "
                               "frames of the avatar."),
                io.Float.Input("speed", default=1.0, min=0.01, max=16.0, step=0.05,
                               tooltip="Of the motion: 1 = as it was, 0.25 = slow motion."),
                io.Float.Input("fps", default=24.0, min=1.0, max=120.0, step=1.0,
                               tooltip="Frames a second of the video."),
                io.Float.Input("start_azimuth", default=0.0, min=-360.0, max=360.0, step=1.0,
                               tooltip="Degrees of the first picture: 0 = from where the source camera "
                               "stands, 180 = from behind."),
                io.Float.Input("elevation", default=5.0, min=-80.0, max=80.0, step=1.0,
                               tooltip="Degrees of the camera above the avatar's middle."),
                io.Float.Input("fov", default=35.0, min=5.0, max=120.0, step=1.0,
                               tooltip="Vertical field of view in degrees: 35 = ordinary lens, 60 = "
                               "wide."),
                io.Float.Input("distance", default=0.0, min=0.0, max=100.0, step=0.05,
                               tooltip="Metres from its middle; 0 = so that all of its motion is in the "
                               "picture."),
                *size_inputs(384, 512),
                *ground_inputs(),
            ],
            outputs=[
                io.Video.Output(display_name="video", tooltip="For Save Video."),
                io.Image.Output(display_name="images", tooltip="The same as single pictures."),
                io.Mask.Output(display_name="masks", tooltip="The performer's outline in every "
                               "picture."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, avatar: Avatar, seconds, turns, motion, first_frame, speed, fps, start_azimuth, elevation,
        fov, distance, width, height, background, background_picture=None,
    ) -> io.NodeOutput:  # fmt: skip
        count = max(1, round(seconds * fps))
        check_frame(avatar, "first_frame", first_frame)
        _check_video_memory(count, width, height)
        if motion == FROZEN:
            times = [first_frame] * count
        else:
            times = turning_times(
                avatar.frame_count, count, speed * avatar.fps / fps, motion == BACK, first_frame
            )
        azimuths = math.radians(start_azimuth) + torch.arange(count) * (2 * math.pi * turns / count)
        around, bar = framing(avatar), run.progress(count)
        ground = ground_of(background, background_picture, width, height)
        colors, masks = [], []
        # A rig holds so many cameras.
        for start in range(0, count, MAX_VIEWS):
            part = azimuths[start : start + MAX_VIEWS]
            rig = around.orbit(
                part, math.radians(elevation), math.radians(fov), width, height, distance
            )
            shots = list(enumerate(times[start : start + MAX_VIEWS]))
            seen = drawn(avatar, rig, shots, ground, False, _counted(bar, start, count))
            colors.append(seen.color)
            masks.append(seen.alpha)
        images = frames_to_image(torch.cat(colors).float() / 255)
        rate = Fraction(fps).limit_denominator(1001)
        video = InputImpl.VideoFromComponents(Types.VideoComponents(images=images, frame_rate=rate))
        return io.NodeOutput(video, images, torch.cat(masks))


def _counted(bar: run.Progress, before: int, total: int) -> run.Progress:
    return lambda done, _, preview=None: bar(before + done, total, preview)


def _check_video_memory(count: int, width: int, height: int) -> None:
    need = count * width * height * VIDEO_BYTES
    total = mm.get_total_memory(torch.device("cpu"))
    if need > total:
        raise ValueError(
            f"{count} pictures of {width}x{height} need {need / 1e9:.0f} GB, but this computer has "
            f"{total / 1e9:.0f} GB: lower 'seconds', 'fps' or the size."
        )


NODES: list[type[io.ComfyNode]] = [RenderAvatar, AvatarTurntable]
