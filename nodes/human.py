"""The human net as nodes: mask, metric depth, normals and keypoints of a performer."""

import math

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from PIL import Image, ImageDraw
from torch import Tensor

from ..models.cameras import intrinsics
from ..models.geometry import encode_normals
from ..models.human_frames import (
    CHOICES,
    OPENPOSE_BONES,
    Humans,
    Looking,
    estimate_humans,
    openpose_json,
    to_openpose,
)
from ..models.human_net import CROP, HumanNet, human_layout
from ..models.views import Views, as_pictures
from . import run
from .sockets import VIEWS
from .views import frames_to_image, image_to_frames

CATEGORY = "Turnaround/2 geometry"
FOLDER = "turnaround_human"
HUMAN = io.Custom("TURNAROUND_HUMAN")  # ModelPatcher of a models.human_net.HumanNet
POSE = io.Custom("POSE_KEYPOINT")  # what controlnet-aux's nodes give and take
NONE_FOUND = "(no human net found)"
MISSING = (
    "There is no human net: put turnaround_tiny_human.safetensors (or one of your own) into "
    "ComfyUI/models/turnaround_human and press R on the page."
)
BYTES_A_CROP_PIXEL = 1500
"""Of working memory, measured on a batch of crops: about 45 MB a frame."""
SURE = 0.3
"""Keypoints less sure than this are neither drawn nor given on."""


def human_nets() -> list[str]:
    """Files of the creator's folder and the embedded one."""
    if FOLDER not in folder_paths.folder_names_and_paths:
        return []
    return [n for n in folder_paths.get_filename_list(FOLDER) if n.endswith(".safetensors")]


def load_human(path: str) -> ModelPatcher:
    """A human net as a model that ComfyUI loads and offloads."""
    weights = comfy.utils.load_torch_file(path, safe_load=True)
    widths, keypoints = human_layout(weights)
    offload, dtype = mm.unet_offload_device(), comfy.utils.weight_dtype(weights)
    net = HumanNet(widths, keypoints, offload, dtype, comfy.ops.manual_cast)
    net.load_state_dict(weights)
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return patcher(net.eval(), load_device=mm.get_torch_device(), offload_device=offload)


class LoadHumanNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundLoadHumanNet",
            display_name="Load Human Net",
            category=CATEGORY,
            description="Loads a human net from ComfyUI/models/turnaround_human; "
            "turnaround_tiny_human comes with the pack.",
            inputs=[
                io.Combo.Input("name", options=human_nets() or [NONE_FOUND],
                               tooltip="The net's file; turnaround_tiny_human is the embedded one."),
            ],
            outputs=[HUMAN.Output(display_name="human_net", tooltip="For Human Geometry.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        if name not in human_nets():
            raise ValueError(MISSING)
        return io.NodeOutput(load_human(folder_paths.get_full_path_or_raise(FOLDER, name)))


class HumanGeometry(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundHumanGeometry",
            display_name="Human Geometry",
            category=CATEGORY,
            description="Finds the performer in every frame and tells mask, depth in metres, "
            "normals and keypoints, from pictures alone. Small and quick; connect other mask, depth "
            "or pose nodes to Performer Geometry where you need finer ones.",
            inputs=[
                HUMAN.Input("human_net", tooltip="From Load Human Net."),
                VIEWS.Input("video", optional=True, tooltip="The clip, one view (Video to Views)."),
                io.Image.Input("images", optional=True,
                               tooltip="Or the clip as frames; used when no video is connected."),
                io.Combo.Input("person", options=list(CHOICES),
                               tooltip="Whom to take when several people are in the picture. The "
                               "same person is followed through the clip."),
                io.Int.Input("number", default=0, min=0, max=31,
                             tooltip="Which person from the left, from 0; only for 'from the left'."),
                io.Combo.Input("frames", options=["one clip", "unrelated pictures"],
                               tooltip="A clip is steadied over time; unrelated pictures are "
                               "looked at one by one."),
                io.Float.Input("fov", default=40.0, min=5.0, max=120.0, step=1.0,
                               tooltip="Vertical field of view of your camera in degrees: it sets "
                               "the distance. Unused when the clip knows its camera."),
                io.Float.Input("performer_height", default=0.0, min=0.0, max=3.0, step=0.05,
                               tooltip="Metres; 0 lets the net judge, which is right to about a "
                               "tenth for grown-ups."),
                io.Combo.Input("nobody", options=["stop", "empty mask"],
                               tooltip="What to do when no frame shows a person."),
                io.Boolean.Input("follow_colors", default=True,
                                 tooltip="Corrects the mask by the colours of the clip (GrabCut): "
                                 "what is surely the performer tells how the rest looks. Off shows "
                                 "the net's own answer."),
            ],
            outputs=[
                io.Mask.Output(display_name="mask", tooltip="The performer in white."),
                io.Image.Output(display_name="depth", tooltip="Depth pictures: near is white, "
                                "background black."),
                VIEWS.Output(display_name="depth_views", tooltip="Depth in metres, for the "
                             "'depth_views' of Performer Geometry."),
                io.Image.Output(display_name="normals", tooltip="Normal pictures: red = right, "
                                "green = up, blue = towards the camera."),
                POSE.Output(display_name="pose", tooltip="Keypoints as OpenPose's JSON, as "
                            "controlnet-aux's nodes take them."),
                io.Image.Output(display_name="preview", tooltip="The frames with skeleton and the "
                                "background dimmed."),
                io.String.Output(display_name="note", tooltip="Who was chosen, what was not found."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, human_net: ModelPatcher, person, number, frames, fov, performer_height, nobody,
        follow_colors=True, video: Views | None = None, images=None,
    ) -> io.NodeOutput:  # fmt: skip
        pictures, K, rig, fps = _clip(video, images, fov)
        looking = Looking(
            choice=person,
            index=number,
            height=performer_height,
            steadiness=Looking.steadiness if frames == "one clip" else 0.0,
            refine=follow_colors,
        )
        memory = BYTES_A_CROP_PIXEL * CROP[0] * CROP[1] * looking.chunk
        mm.load_models_gpu([human_net], memory_required=memory)
        humans = estimate_humans(
            human_net.model,
            pictures,
            float(K[1, 1]),
            looking,
            (float(K[0, 2]), float(K[1, 2])),
            human_net.load_device,
            run.progress(len(pictures)),  # estimate_humans says how many steps there are
        )
        if not humans.present.any() and nobody == "stop":
            raise ValueError(
                f"No person was found in the {len(pictures)} frames of the clip: use one that shows "
                "a person whole and not too small, or set 'nobody' to 'empty mask' to go on without."
            )
        notes = [humans.note] if humans.note else []
        if humans.present.any():
            middle = float(humans.depth[humans.depth > 0].median())
            source = "given" if performer_height else "guessed"
            notes.append(
                f"the performer stands about {middle:.1f} m away ({source} height "
                f"{humans.height:.2f} m, field of view {_degrees(K, pictures):.0f}°)"
            )
        if frames == "one clip" and len(pictures) == 1:
            notes.append("one frame makes a turnaround that stands still: give more for motion")
        note = run.say(cls, "; ".join(notes))
        H, W = pictures.shape[-2:]
        depth = Views(humans.depth[None, :, None], humans.masks[None], rig, fps)
        return io.NodeOutput(
            humans.masks,
            frames_to_image(near_is_white(humans)[:, None].expand(-1, 3, -1, -1)),
            depth,
            frames_to_image(normal_pictures(humans)),
            openpose_json(humans, W, H, SURE),
            frames_to_image(overlay(pictures, humans)),
            note,
        )


def _clip(video: Views | None, images, fov: float):
    """Frames [F, 3, H, W], camera matrix, rig (or None), frames a second."""
    if video is not None:
        if len(video) != 1:
            raise ValueError(
                f"'video' has {len(video)} views; Human Geometry works from one camera: pick one "
                "view first."
            )
        if video.frames.shape[2] != 3:
            raise ValueError("'video' carries depth, not colour: connect the clip itself.")
        pictures, rig, fps = as_pictures(video, 0), video.rig, video.fps
    elif images is not None:
        pictures, rig, fps = image_to_frames(images).float(), None, 16.0
    else:
        raise ValueError("Connect 'video' or 'images': Human Geometry has no clip to look at.")
    H, W = pictures.shape[-2:]
    K = rig.K[0] if rig is not None else intrinsics(math.radians(fov), W, H)
    return pictures.clamp(0, 1), K, rig, fps


def _degrees(K: Tensor, pictures: Tensor) -> float:
    return math.degrees(2 * math.atan(pictures.shape[-2] / 2 / float(K[1, 1])))


def near_is_white(humans: Humans) -> Tensor:  # [F, H, W] 0..1
    """Depth of the whole clip from white (near) to dark grey (far); the background is black."""
    inside = humans.depth > 0
    if not inside.any():
        return humans.depth
    near, far = humans.depth[inside].min(), humans.depth[inside].max()
    white = 1 - 0.8 * (humans.depth - near) / (far - near).clamp(min=1e-3)
    return torch.where(inside, white, 0.0)


def normal_pictures(humans: Humans) -> Tensor:  # [F, 3, H, W]
    """Normals as colours; grey where nobody is."""
    inside = (humans.depth > 0)[:, None]
    return torch.where(inside, encode_normals(humans.normals.movedim(1, -1)).movedim(-1, 1), 0.5)


def overlay(pictures: Tensor, humans: Humans) -> Tensor:  # [F, 3, H, W]
    """Frames with the background dimmed and the skeleton drawn."""
    points, sure = to_openpose(humans.keypoints, humans.confidence)
    dimmed = pictures.cpu() * (0.35 + 0.65 * humans.masks[:, None])
    width = max(1, round(min(pictures.shape[-2:]) / 120))
    drawn = []
    for picture, xy, c in zip(dimmed, points.tolist(), sure.tolist(), strict=True):
        image = run.to_pil(picture)
        draw_bones(image, xy, [sure >= SURE for sure in c], width)
        drawn.append(pixels_of(image))
    return torch.stack(drawn)


def draw_bones(
    image: Image.Image, points: list[list[float]], found: list[bool], width: int
) -> None:
    """Lines between OpenPose's points where both ends were found."""
    pen = ImageDraw.Draw(image)
    for n, (a, b) in enumerate(OPENPOSE_BONES):
        if found[a] and found[b]:
            ends = [*points[a][:2], *points[b][:2]]
            pen.line(ends, fill=_hue(n / len(OPENPOSE_BONES)), width=width)


def _hue(share: float) -> tuple[int, int, int]:
    """The rainbow that pose pictures use."""
    phases = (math.cos(2 * math.pi * (share - shift)) for shift in (0, 1 / 3, 2 / 3))
    return tuple(round(255 * min(1.0, max(0.0, 0.5 + p))) for p in phases)


def pixels_of(image: Image.Image) -> Tensor:  # [3, H, W] 0..1
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).movedim(-1, 0).float() / 255


NODES: list[type[io.ComfyNode]] = [LoadHumanNet, HumanGeometry]
