"""Annotators as nodes: depth, normals and pose by controlnet-aux's nets, from files of one's own."""

from pathlib import Path, PurePath

import comfy.model_management as mm
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ..models.annotators import (
    ANNOTATORS,
    REPOSITORY,
    ZOE,
    Annotator,
    Task,
    as_weights,
    build_net,
    check_frames,
    estimate_depth,
    estimate_normals,
    estimate_poses,
    near_is_white,
    poses_json,
    recognise,
    working_memory,
)
from ..models.geometry import encode_normals
from ..models.views import Views, as_pictures
from . import run
from .human import CATEGORY, POSE, draw_bones, pixels_of
from .sockets import VIEWS
from .views import frames_to_image, image_to_frames

FOLDER = "controlnet_aux"
KINDS = (".pt", ".pth", ".safetensors")
NO_METRES = (
    f"MiDaS tells no metres, so 'depth_views' is empty: choose {ZOE.file}, or bring the pictures of "
    "'depth' to metres with Align Depth."
)


def register() -> None:
    """Make ComfyUI/models/controlnet_aux a folder of models like any other."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def files() -> list[str]:
    """What lies in the folder and below."""
    if FOLDER not in folder_paths.folder_names_and_paths:
        return []
    return [name for name in folder_paths.get_filename_list(FOLDER) if name.endswith(KINDS)]


def choices(task: Task) -> list[str]:
    """The files of the public repository, there or not, then files with names of their own.

    A workflow that names a missing file must come as far as the sentence that says where it is.
    """
    known = {a.file for a in ANNOTATORS}
    own = [name for name in files() if PurePath(name).name not in known]
    return [a.file for a in ANNOTATORS if a.task == task] + own


def load_annotator(name: str, task: Task) -> tuple[Annotator, ModelPatcher]:
    """A net as a model that ComfyUI loads and offloads; no file may carry more than weights."""
    found = [f for f in files() if name in (f, PurePath(f).name)]
    if not found:
        raise ValueError(
            f"'{name}' is not in ComfyUI/models/{FOLDER}: put it there (the public repository "
            f"{REPOSITORY} has it) and press R on the page."
        )
    path = folder_paths.get_full_path_or_raise(FOLDER, found[0])
    try:
        weights = as_weights(comfy.utils.load_torch_file(path, safe_load=True))
    except Exception:
        # torch, zip and safetensors each have errors of their own for a file that is not theirs.
        raise ValueError(
            f"'{name}' can't be read: it is damaged, not fully downloaded, or holds more than "
            f"weights, which is never run; get it from {REPOSITORY} again."
        ) from None
    annotator = recognise(weights, task, name)
    net = build_net(annotator, weights, name)
    # The library's layers know nothing of ComfyUI's casting, so this is the plain patcher.
    return annotator, ModelPatcher(
        net, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device()
    )


def _start(name: str, task: Task, pictures: Tensor, resolution: int = 0):
    """The annotator and its net on ComfyUI's device; the clip is looked at first."""
    height, width = check_frames(pictures)
    annotator, patcher = load_annotator(name, task)
    memory = working_memory(annotator, width, height, resolution)
    # Half a net on the device would fail: its layers don't fetch their weights by themselves.
    mm.load_models_gpu([patcher], memory_required=memory, force_full_load=True)
    return annotator, patcher.model


def _clip(video: Views | None, images) -> Tensor:  # [F, 3, H, W]
    if video is None and images is None:
        raise ValueError("Connect 'video' or 'images': there is no clip to look at.")
    if video is None:
        return image_to_frames(images).float()
    if len(video) != 1:
        raise ValueError(f"'video' has {len(video)} views: pick one view first.")
    if video.frames.shape[2] != 3:
        raise ValueError("'video' carries depth, not colour: connect the clip itself.")
    return as_pictures(video, 0)


def _inputs(task: Task, hint: str) -> list:
    return [
        VIEWS.Input("video", optional=True, tooltip="The clip, one view (Video to Views)."),
        io.Image.Input("images", optional=True,
                       tooltip="Or the clip as frames; used when no video is connected."),
        io.Combo.Input("net", options=choices(task), tooltip=hint),
    ]  # fmt: skip


RESOLUTION = io.Int.Input(
    "resolution", default=512, min=64, max=2048, step=32,
    tooltip="Pixels of the shorter side that the net looks at. More shows finer things and takes "
    "more time and memory; far from 512 the nets get unsure.",
)  # fmt: skip


class AnnotateDepth(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundAnnotateDepth",
            display_name="Annotate Depth",
            category=CATEGORY,
            description="Depth of every frame by MiDaS or Zoe, from a file in "
            "ComfyUI/models/controlnet_aux (needs the package controlnet-aux).",
            inputs=[
                *_inputs("depth", "dpt_hybrid = MiDaS: quick, pictures only. ZoeD = Zoe: slow, and "
                         "tells metres."),
                RESOLUTION,
            ],
            outputs=[
                io.Image.Output(display_name="depth", tooltip="Depth pictures: the nearest point of "
                                "the clip is white, the farthest black."),
                VIEWS.Output(display_name="depth_views", tooltip="Depth in metres, from Zoe alone: "
                             "for 'metric' of Align Depth."),
                io.String.Output(display_name="note", tooltip="What the brightness follows."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, net, resolution, video: Views | None = None, images=None) -> io.NodeOutput:
        pictures = _clip(video, images)
        annotator, model = _start(net, "depth", pictures, resolution)
        bar = run.progress(len(pictures))
        depth = estimate_depth(model, annotator, pictures, resolution, bar)
        grey = near_is_white(depth, annotator)[:, None].expand(-1, 3, -1, -1)
        if annotator is ZOE:
            about = f"depth, {float(depth.min()):.1f} to {float(depth.max()):.1f} m"
            given = (video.masks, video.rig, video.fps) if video is not None else ()
            metres = Views(depth[None, :, None], *given)
        else:
            about, metres = "1 / depth", ExecutionBlocker(NO_METRES)
        note = run.say(cls, f"{annotator.label}: near is white, brightness follows {about}")
        return io.NodeOutput(frames_to_image(grey), metres, note)


class AnnotateNormals(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundAnnotateNormals",
            display_name="Annotate Normals",
            category=CATEGORY,
            description="Surface normals of every frame by NormalBae, from a file in "
            "ComfyUI/models/controlnet_aux (needs the package controlnet-aux).",
            inputs=[*_inputs("normals", "scannet.pt is NormalBae."), RESOLUTION],
            outputs=[
                io.Image.Output(display_name="normals", tooltip="Normal pictures: red = right, "
                                "green = up, blue = towards the camera, as Refine Depth takes them "
                                "without a change."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, net, resolution, video: Views | None = None, images=None) -> io.NodeOutput:
        pictures = _clip(video, images)
        _, model = _start(net, "normals", pictures, resolution)
        normals = estimate_normals(model, pictures, resolution, run.progress(len(pictures)))
        return io.NodeOutput(encode_normals(normals.movedim(1, -1)))


class AnnotatePose(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundAnnotatePose",
            display_name="Annotate Pose",
            category=CATEGORY,
            description="Keypoints of everybody in every frame by OpenPose, from a file in "
            "ComfyUI/models/controlnet_aux (needs the package controlnet-aux).",
            inputs=_inputs("pose", "body_pose_model.pth is OpenPose's body."),
            outputs=[
                POSE.Output(display_name="pose", tooltip="18 body points a person as OpenPose's "
                            "JSON, in pixels; the largest person comes first."),
                io.Image.Output(display_name="preview", tooltip="The dimmed frames with everybody's "
                                "skeleton."),
                io.String.Output(display_name="note", tooltip="How many people, and where nobody was "
                                 "found."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, net, video: Views | None = None, images=None) -> io.NodeOutput:
        pictures = _clip(video, images)
        _, model = _start(net, "pose", pictures)
        poses = estimate_poses(model, pictures, run.progress(len(pictures)))
        H, W = pictures.shape[-2:]
        note = run.say(cls, describe([len(people) for people in poses]))
        return io.NodeOutput(
            poses_json(poses, W, H), frames_to_image(skeletons(pictures, poses)), note
        )


def describe(people: list[int]) -> str:
    """One plain sentence on how many people each frame has."""
    without = people.count(0)
    if without == len(people):
        return "nobody was found in any frame: the people may be tiny, dark, or cut off"
    note = f"up to {max(people)} people in a frame"
    return note + (f"; nobody was found in {without} of {len(people)} frames" if without else "")


def skeletons(pictures: Tensor, poses: list[Tensor]) -> Tensor:  # [F, 3, H, W]
    """Frames dimmed, with the bones between points that were found."""
    width = max(1, round(min(pictures.shape[-2:]) / 120))
    drawn = []
    for picture, people in zip(pictures.cpu(), poses, strict=True):
        image = run.to_pil(0.5 * picture)
        for person in people.tolist():
            draw_bones(image, person, [point[2] > 0 for point in person], width)
        drawn.append(pixels_of(image))
    return torch.stack(drawn)


NODES: list[type[io.ComfyNode]] = [AnnotateDepth, AnnotateNormals, AnnotatePose]
