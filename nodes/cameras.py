"""Rigs: orbits, ComfyUI cameras, files, picking, preview."""

import math
from pathlib import Path

import folder_paths
import numpy as np
import torch
from comfy_api.latest import io, ui

from ..models.body import Body
from ..models.camera_views import SAME_SHAPE
from ..models.cameras import (
    LONE_DISTANCE,
    Rig,
    framing_distance,
    has_plain_lenses,
    load3d_to_opencv,
    merge_rigs,
    opencv_to_load3d,
    orbit_angles,
    orbit_rig,
    recentred,
)
from ..models.cameras_picture import rig_picture
from ..models.points import OrientedPoints
from ..models.rig_files import rig_from_text
from ..models.straighten import straight_views
from ..models.subject_pictures import turntable
from ..models.views import Views, snap_size
from . import run
from .sockets import BODY, CLOUD, RIG, VIEWS

CATEGORY = "Turnaround/3 cameras"
RIG_FILES = (".json", ".toml", ".txt", ".xml")


def size_inputs(width: int, height: int) -> list:
    """The picture size of a rig."""
    return [
        io.Int.Input("width", default=width, min=16, max=2048, step=16,
                     tooltip="Width of every view in pixels (multiples of 16)."),
        io.Int.Input("height", default=height, min=16, max=2048, step=16,
                     tooltip="Height of every view in pixels (multiples of 16)."),
    ]  # fmt: skip


def snapped_size(node, width: int, height: int) -> tuple[int, int]:
    """The nearest size that views can have; a change is said on the node."""
    new = snap_size(width, height)
    if new != (width, height):
        run.say(node, f"{width}x{height} became {new[0]}x{new[1]} (multiples of 16)")
    return new


class OrbitRig(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundOrbitRig",
            display_name="Orbit Rig",
            category=CATEGORY,
            description="Cameras on a ring around the performer. Camera 0 stands where your own "
            "camera stood, unless you turn or lift the ring.",
            inputs=[
                io.Int.Input("views", default=8, min=1, max=64, tooltip="How many cameras."),
                io.Float.Input("start_azimuth", default=0.0, min=-360.0, max=360.0, step=1.0,
                               tooltip="Degrees of the first camera: 0 = where the source camera "
                               "stands, 90 = to its right, 180 = behind the performer."),
                io.Float.Input("span", default=360.0, min=0.0, max=360.0, step=1.0,
                               tooltip="Degrees that the cameras cover; 360 = a closed ring."),
                io.Float.Input("elevation", default=0.0, min=-80.0, max=80.0, step=1.0,
                               tooltip="Degrees above the performer's middle; negative = below."),
                io.Int.Input("layers", default=1, min=1, max=5,
                             tooltip="Rings one above another; the views are shared out."),
                io.Float.Input("layer_step", default=20.0, min=0.0, max=60.0, step=1.0,
                               tooltip="Degrees between the rings."),
                io.Float.Input("fov", default=35.0, min=5.0, max=120.0, step=1.0,
                               tooltip="Vertical field of view in degrees: 35 = ordinary lens, "
                               "60 = wide."),
                io.Float.Input("distance", default=0.0, min=0.0, max=100.0, step=0.05,
                               tooltip="Metres from the performer; 0 = so that the whole performer "
                               "fits, plus 12 percent (needs 'cloud' or 'body'; without, 3.2 m)."),
                *size_inputs(192, 240),
                CLOUD.Input("cloud", optional=True,
                            tooltip="The performer, to frame; from Performer Geometry."),
                BODY.Input("body", optional=True,
                           tooltip="Or a body to frame, from Sample Body or another body node."),
            ],
            outputs=[RIG.Output(display_name="rig", tooltip="The cameras.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, views, start_azimuth, span, elevation, layers, layer_step, fov, distance, width,
        height, cloud: OrientedPoints | None = None, body: Body | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        width, height = snapped_size(cls, width, height)
        fov = math.radians(fov)
        azimuths, elevations = orbit_angles(
            views,
            math.radians(start_azimuth),
            math.radians(span),
            math.radians(elevation),
            layers,
            math.radians(layer_step),
        )
        if distance == 0:
            distance = LONE_DISTANCE
            extents = [shape.extent() for shape in (cloud, body) if shape is not None]
            if extents:
                # One distance for all rings: the ring, and the shape, that need most space decide.
                distance = max(
                    framing_distance(*extent, fov, width, height, ring)
                    for ring in set(elevations.tolist())
                    for extent in extents
                )
        return io.NodeOutput(orbit_rig(azimuths, elevations, distance, fov, width, height))


class TurntableRig(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundTurntableRig",
            display_name="Turntable Rig",
            category=CATEGORY,
            description="Guesses the cameras of a clip in which a subject turns evenly on the spot, or "
            "is walked round evenly: one camera a frame.",
            inputs=[
                io.Image.Input("images", optional=True, tooltip="The clip, one frame a camera."),
                VIEWS.Input("views", optional=True, tooltip="Or the clip as VIEWS of one view."),
                io.Float.Input("turns", default=1.0, min=-20.0, max=20.0, step=0.01,
                               tooltip="Turns from the first to the last frame; 0.5 = half a turn. "
                               "Positive: what faces the camera moves to the left. If what is learned "
                               "is blurred from all sides, try the negative."),
                io.Float.Input("elevation", default=0.0, min=-80.0, max=80.0, step=1.0,
                               tooltip="Degrees of your camera above the subject's middle."),
                io.Float.Input("fov", default=40.0, min=5.0, max=120.0, step=1.0,
                               tooltip="Vertical field of view of your camera in degrees: 35 = "
                               "ordinary lens, 60 = phone held upright."),
            ],
            outputs=[RIG.Output(display_name="rig", tooltip="One camera a frame.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, turns, elevation, fov, images: torch.Tensor | None = None, views: Views | None = None
    ) -> io.NodeOutput:
        if (images is None) == (views is None):
            raise ValueError("Connect either 'images' or 'views': Turntable Rig counts its frames.")
        if turns == 0:
            raise ValueError("'turns' is 0, so nothing turns: 1 is one whole turn in the clip.")
        if views is not None and len(views) > 1:
            raise ValueError(
                f"'views' has {len(views)} views, but a clip of a turning subject is one: connect a "
                "clip, or use Orbit Rig for cameras that stand on a ring."
            )
        count, H, W = (
            images.shape[:3]
            if images is not None
            else (views.frames.shape[1], *views.frames.shape[-2:])
        )
        radians = math.radians(elevation), math.radians(fov)
        return io.NodeOutput(turntable(count, W, H, turns, *radians))


class RigFromCameras(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundRigFromCameras",
            display_name="Rig from 3D Cameras",
            category=CATEGORY,
            description="Makes a rig of ComfyUI's own 3D cameras (one, or a list).",
            is_input_list=True,
            inputs=[
                io.Load3DCamera.Input("cameras", tooltip="Cameras of Load 3D nodes."),
                *size_inputs(192, 240),
            ],
            outputs=[RIG.Output(display_name="rig", tooltip="One camera an item of the list.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, cameras, width, height) -> io.NodeOutput:
        cameras = [c for c in cameras if c]
        if not cameras:
            raise ValueError(
                "'cameras' is empty: move the camera of the 3D viewer once and run it, so that it "
                "has a position."
            )
        size = snapped_size(cls, width[0], height[0])
        return io.NodeOutput(load3d_to_opencv(cameras, *size))


class RigToCameras(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundRigToCameras",
            display_name="Rig to 3D Cameras",
            category=CATEGORY,
            description="Gives the cameras of a rig as a list of ComfyUI's own 3D cameras.",
            inputs=[RIG.Input("rig", tooltip="Any rig.")],
            outputs=[
                io.Load3DCamera.Output(
                    display_name="cameras", is_output_list=True, tooltip="One a view."
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, rig: Rig) -> io.NodeOutput:
        if not has_plain_lenses(rig):
            run.say(
                cls,
                "3D cameras have centred lenses and square pixels: the rig's calibrated lens "
                "centres and pixel shapes were left out",
            )
        return io.NodeOutput(opencv_to_load3d(rig))


def _rig_files() -> list[str]:
    folder = Path(folder_paths.get_input_directory())
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if p.suffix.lower() in RIG_FILES and p.is_file())


def _rig_path(file: str) -> Path:
    """Only files that the list offers are opened; a connected name could point anywhere."""
    if file not in _rig_files():
        raise ValueError(
            f"'file' is '{file}', but ComfyUI's input folder has no camera file of that name: put "
            "it there (.json, .toml, .xml or .txt) and pick it from the list."
        )
    return Path(folder_paths.get_input_directory()) / file


class RigFromFile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundRigFromFile",
            display_name="Rig from File",
            category=CATEGORY,
            description="Reads calibrated cameras from ComfyUI's input folder: nerfstudio / "
            "instant-ngp transforms.json, OpenCV / anipose calibration .toml, cameras.json with "
            "K and extrinsics, or a Qualisys calibration.",
            inputs=[
                io.Combo.Input("file", options=_rig_files(),
                               tooltip="A camera file in ComfyUI's input folder."),
                io.Boolean.Input("recentre", default=True,
                                 tooltip="Move the origin to where the cameras look and turn the "
                                 "first camera to azimuth 0; off keeps the file's world."),
            ],
            outputs=[RIG.Output(display_name="rig", tooltip="The calibrated cameras.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, file: str, recentre: bool) -> io.NodeOutput:
        try:
            text = _rig_path(file).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"{file} is not a text file, so it holds no cameras.") from None
        rig, note = rig_from_text(file, text)
        size = snap_size(rig.width, rig.height)
        if size != (rig.width, rig.height):
            old = f"{rig.width}x{rig.height}"
            snap = f"{old} became {size[0]}x{size[1]} (multiples of 16)"
            note = f"{note}; {snap}" if note else snap
            rig = rig.filled(*size)
        run.say(cls, note)
        return io.NodeOutput(recentred(rig) if recentre else rig)

    # No validate_inputs here: it would switch off ComfyUI's own check that `file` is in the list.

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, recentre: bool = True) -> str:
        # `file` is None while it comes from another node that has not run.
        changed = _rig_path(file).stat().st_mtime_ns if file in _rig_files() else "missing"
        return f"{file} {changed} {recentre}"


def parse_indices(text: str, count: int) -> list[int]:
    """'0, 2, 4-6', '6-4' or '::2' as view numbers, each below `count`."""
    chosen: list[int] = []
    try:
        for part in text.replace(" ", "").split(","):
            if ":" in part:
                bounds = [int(b) if b else None for b in part.split(":")]
                chosen += list(range(count))[slice(*bounds)]
            elif "-" in part[1:]:
                first, last = (int(b) for b in part.split("-"))
                # A range that ends beyond the rig needs no listing to be refused.
                if max(first, last) >= count:
                    chosen.append(max(first, last))
                else:
                    chosen += (
                        range(first, last + 1) if first <= last else range(first, last - 1, -1)
                    )
            elif part:
                chosen.append(int(part))
    except (ValueError, TypeError):  # TypeError: a slice of more than three parts
        raise ValueError(
            f"'{text}' is no list of views: write numbers and ranges such as 0,2,4-6 or ::2."
        ) from None
    bad = [i for i in chosen if not 0 <= i < count]
    if bad or not chosen:
        raise ValueError(
            f"'{text}' names view {bad[0] if bad else '(none)'}, but the rig has views 0 to "
            f"{count - 1}."
        )
    return chosen


class PickViews(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundPickViews",
            display_name="Pick Cameras",
            category=CATEGORY,
            description="Keeps some cameras of a rig, in the order that you write them.",
            inputs=[
                RIG.Input("rig", tooltip="Any rig."),
                io.String.Input("views", default="0,2,4-6",
                                tooltip="Numbers and ranges: 0,2,4-6, or ::2 for every second."),
            ],
            outputs=[RIG.Output(display_name="rig", tooltip="The chosen cameras.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, rig: Rig, views: str) -> io.NodeOutput:
        return io.NodeOutput(rig.select(parse_indices(views, len(rig))))


class MergeRigs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundMergeRigs",
            display_name="Merge Rigs",
            category=CATEGORY,
            description="Puts the cameras of two rigs into one; their picture sizes must agree.",
            inputs=[
                RIG.Input("first", tooltip="Its cameras come first."),
                RIG.Input("second", tooltip="Its cameras follow."),
            ],
            outputs=[RIG.Output(display_name="rig", tooltip="All cameras.")],
        )

    @classmethod
    def execute(cls, first: Rig, second: Rig) -> io.NodeOutput:
        return io.NodeOutput(merge_rigs([first, second]))


class ResizeRig(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundResizeRig",
            display_name="Resize Rig",
            category=CATEGORY,
            description="The same cameras with pictures of another size.",
            inputs=[RIG.Input("rig", tooltip="Any rig."), *size_inputs(256, 320)],
            outputs=[RIG.Output(display_name="rig", tooltip="The resized rig.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, rig: Rig, width: int, height: int) -> io.NodeOutput:
        return io.NodeOutput(rig.resized(*snapped_size(cls, width, height)))


class StraightenViews(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundStraightenViews",
            display_name="Straighten Views",
            category=CATEGORY,
            description="Takes the bending of real lenses out of what calibrated cameras filmed, so "
            "that the pictures fit their rig. The calibration file tells how each lens bends.",
            inputs=[
                VIEWS.Input("views", tooltip="Footage of calibrated cameras, one view a camera."),
                RIG.Input("rig", optional=True, tooltip="The cameras with their lenses, from Rig from "
                          "File, in the order of the views; replaces that of 'views'."),
            ],
            outputs=[
                VIEWS.Output(display_name="views", tooltip="Straight pictures and masks with the rig; "
                             "what was never filmed at the rim repeats what lies beside it, and is "
                             "no performer in the masks."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, views: Views, rig: Rig | None = None) -> io.NodeOutput:
        rig = filmed_by(views, rig)
        if not rig.lenses:
            run.say(cls, "the rig's lenses bend nothing: the views stay as they are")
        bar = run.progress(len(views))
        return io.NodeOutput(straight_views(views, rig, lambda v: bar(v + 1, len(views))))


def filmed_by(views: Views, rig: Rig | None) -> Rig:
    """The rig of the views at their size, checked."""
    rig = rig or views.rig
    if rig is None:
        raise ValueError("'views' have no cameras: connect the 'rig' of Rig from File.")
    if len(rig) != len(views):
        raise ValueError(
            f"'views' has {len(views)} views but 'rig' {len(rig)} cameras: connect one view a camera, "
            "in the order of the file, or take some with Pick Cameras."
        )
    H, W = views.frames.shape[-2:]
    if abs(rig.width * H - rig.height * W) > SAME_SHAPE * rig.width * H:
        raise ValueError(
            f"'views' are {W}x{H}, but 'rig' was calibrated for {rig.width}x{rig.height}: give the "
            "views the shape that the cameras filmed, without cutting anything off."
        )
    return rig.resized(W, H)


class PreviewRig(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundPreviewRig",
            display_name="Preview Rig",
            category=CATEGORY,
            description="Draws the cameras from above and from the side, numbered.",
            inputs=[RIG.Input("rig", tooltip="Any rig.")],
            outputs=[io.Image.Output(display_name="picture", tooltip="The drawing.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, rig: Rig) -> io.NodeOutput:
        image = torch.from_numpy(np.array(rig_picture(rig))).float()[None] / 255
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))


NODES: list[type[io.ComfyNode]] = [
    OrbitRig,
    TurntableRig,
    RigFromCameras,
    RigFromFile,
    RigToCameras,
    PickViews,
    MergeRigs,
    ResizeRig,
    StraightenViews,
    PreviewRig,
]
