"""Avatars to look at: the 4D view in the page, and the camera that a creator finds in it."""

import zlib
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io

from ..models.avatar import Avatar
from ..models.avatar_pictures import avatar_pictures, framing
from ..models.cameras import Rig
from ..models.looks import Look, looks_of, read_look
from ..models.splat_stream import SplatStream, stream_key, write_splat_stream
from . import run
from .cameras import size_inputs, snapped_size
from .distill_avatar import CATEGORY
from .render_avatar import WORKING_BYTES
from .sockets import AVATAR, RIG

FOV, SIZE = 35.0, (512, 640)
STILL_GROUND = torch.full((3,), 0.1)


class PreviewAvatar(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundPreviewAvatar",
            display_name="Preview Avatar",
            category=CATEGORY,
            description="Plays an avatar in 4D inside the node: turn it, move, zoom, scrub, slow down, "
            "save pictures; and give the camera that you find back to the graph.",
            inputs=[
                AVATAR.Input("avatar", tooltip="From Distill Avatar, Animate Avatar or Load Avatar."),
                io.String.Input("camera", default="",
                                tooltip="The camera that goes out. 'Use camera' in the view fills it in; "
                                "or write, for example, azimuth 30, elevation 10, distance 3, fov 35, at 0 "
                                "0 0 (degrees, metres). Empty, or what you leave out: from the front, all "
                                "of the avatar in the picture."),
                *size_inputs(*SIZE),
                RIG.Input("rig", optional=True, tooltip="Cameras to go to in the view, from a list."),
            ],
            outputs=[
                RIG.Output(display_name="camera", tooltip="The camera, as a rig of one: for Render Avatar, "
                           "Avatar Turntable, Merge Rigs and others."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(
        cls, avatar: Avatar, camera: str, width: int, height: int, rig: Rig | None = None
    ) -> io.NodeOutput:
        width, height = snapped_size(cls, width, height)
        whole = framing(avatar)
        front = whole.orbit(torch.zeros(1), 0.0, FOV * torch.pi / 180, width, height)
        (first,) = looks_of(front, whole.centre)
        look = read_look(camera, first)
        name, stream = _stored(avatar)
        if stream is not None:
            run.say(cls, stream.note)
        chosen = look.rig(width, height)
        shown = {
            **_temp(name), "checksum": name, "camera": camera, "look": look.numbers(),
            "first": first.numbers(), "picture": [width, height], "cameras": _named(rig, whole.centre),
            "still": _still(avatar, chosen, name, look),
        }  # fmt: skip
        return io.NodeOutput(chosen, ui={"turnaround_avatar": [shown]})


def _temp(name: str) -> dict[str, str]:
    return {"filename": name, "subfolder": "", "type": "temp"}


def _folder() -> Path:
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _stored(avatar: Avatar) -> tuple[str, SplatStream | None]:
    """The file's name. Another camera needs no other file, so it is written once: None = was there."""
    name = f"turnaround_avatar_{stream_key(avatar)}.turnsplat"
    path = _folder() / name
    if path.exists():
        return name, None
    bar = run.progress(avatar.frame_count)
    return name, write_splat_stream(path, avatar, bar)


def _named(rig: Rig | None, middle: torch.Tensor) -> list[dict]:
    if rig is None:
        return []
    looks = zip(rig.labels, looks_of(rig, middle), strict=True)
    return [{"name": label, "look": look.numbers()} for label, look in looks]


def _still(avatar: Avatar, rig: Rig, stream: str, look: Look) -> dict[str, str]:
    """What a page without WebGL2 shows: the middle of the motion from the chosen camera."""
    camera = zlib.crc32(repr((look.numbers(), rig.width, rig.height)).encode())
    name = f"{Path(stream).stem}_{camera:08x}.png"
    path = _folder() / name
    if not path.exists():
        middle = (avatar.frame_count - 1) // 2
        device = run.drawing_device(WORKING_BYTES)
        seen = avatar_pictures(avatar, rig, [(0, float(middle))], STILL_GROUND, device=device)
        run.to_pil(seen.color[0].float() / 255).save(path)
    return {**_temp(name), "checksum": name}


NODES: list[type[io.ComfyNode]] = [PreviewAvatar]
