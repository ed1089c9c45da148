"""Bodies in, and the maps that the animatable route draws from them."""

from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io

from ..models import body_sources, performer
from ..models.body import Body
from ..models.body_maps import BodyMaps, MapSettings, render_body_maps
from ..models.cameras import Rig
from ..models.geometry import SEEN
from ..models.views import Views, snap_frames, snap_size
from . import run
from .geometry import CATEGORY
from .sockets import BODY, RIG, VIEWS
from .views import SAMPLE_FPS, unseen_first

POSES = io.Custom("MHR_POSE_DATA")
MAP_BYTES = 22
"""Bytes a pixel of all maps together, with a fifth to spare."""
WORKING_BYTES = 3 << 30
"""Of GPU memory that drawing asks for."""


def _time_inputs() -> list:
    return [
        io.Int.Input("frames", default=13, min=1, max=241, step=4,
                     tooltip="Length of the clip; 4n+1 fits video models."),
        io.Float.Input("start", default=0.2, min=0.0, max=10.0, step=0.1,
                       tooltip="Where in the motion the clip begins, in seconds."),
    ]  # fmt: skip


def _moments(node: type, frames: int, start: float) -> torch.Tensor:
    count = snap_frames(frames)
    if count != frames:
        run.say(node, f"{frames} frames became {count} (video models need 4n+1)")
    return start + torch.arange(count) / SAMPLE_FPS


def _length_input() -> io.Int.Input:
    return io.Int.Input("frames", default=0, min=0, max=1001,
                        tooltip="Frames of the result, spread over the same time; 0 = as many as "
                        "come in. Video models want 4n+1.")  # fmt: skip


def _height_input() -> io.Float.Input:
    return io.Float.Input("performer_height", default=0.0, min=0.0, max=3.0, step=0.05,
                          tooltip="Metres that the upright template is scaled to; 0 = it is in "
                          "metres already.")  # fmt: skip


def _fps_input(tooltip: str) -> io.Float.Input:
    return io.Float.Input("fps", default=SAMPLE_FPS, min=1.0, max=240.0, step=0.5, tooltip=tooltip)


BODY_OUTPUT = BODY.Output(display_name="body", tooltip="For Render Body Maps.")
NOTE_OUTPUT = io.String.Output(display_name="note", tooltip="What was guessed or changed.")


class SampleBody(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        bank = performer.load_performers()
        return io.Schema(
            node_id="TurnaroundSampleBody",
            display_name="Sample Body",
            category=CATEGORY,
            description="The body of a synthetic performer that comes with the pack, in motion. "
            "With the same settings it is the very body that Sample Performer shows.",
            inputs=[
                io.Combo.Input("performer", options=unseen_first(bank.characters, 0),
                               tooltip="Whose body. 'unseen' ones are new to the embedded models."),
                io.Combo.Input("motion", options=unseen_first(bank.motions, 1),
                               tooltip="What the performer does (motion capture)."),
                *_time_inputs(),
                io.Int.Input("clothes_seed", default=1_000_003, min=0, max=2**31 - 1,
                             tooltip="Which clothes and hair; they stand a little off the body."),
            ],
            outputs=[BODY_OUTPUT],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, performer: str, motion: str, frames, start, clothes_seed) -> io.NodeOutput:
        times = _moments(cls, frames, start)
        names = performer.split()[0], motion.split()[0]
        return io.NodeOutput(body_sources.sample_body(*names, times, clothes_seed, SAMPLE_FPS))


class BodyFromMesh(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundBodyFromMesh",
            display_name="Body from Mesh",
            category=CATEGORY,
            description="Takes a MESH batch of ComfyUI as a body in motion: every item of the "
            "batch is a frame, all of the same topology.",
            inputs=[
                io.Mesh.Input("mesh", tooltip="The body, one item a frame; y up, as ComfyUI has it."),
                _height_input(),
                _length_input(),
                _fps_input("Frames a second of the mesh batch."),
                io.Mesh.Input("template", optional=True,
                              tooltip="The same mesh upright and at rest; without, frame 0."),
                io.Mesh.Input("neutral", optional=True,
                              tooltip="The same motion without the deformation (expression, "
                              "bulges), one item a frame; the deformation map is then the "
                              "difference."),
            ],
            outputs=[BODY_OUTPUT, NOTE_OUTPUT],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, mesh, performer_height, frames, fps, template=None, neutral=None
    ) -> io.NodeOutput:
        made = body_sources.body_from_mesh(mesh, performer_height, fps, template, neutral)
        return _with_length(cls, made, frames)


def _with_length(node: type, made: body_sources.Sourced, frames: int) -> io.NodeOutput:
    """The body at the wanted number of frames, 0 = as it is."""
    body, notes = made.body, [made.note] if made.note else []
    if frames and frames != body.frame_count:
        notes.append(f"{body.frame_count} frames became {frames}")
        body = body.resampled(frames)
    return io.NodeOutput(body, run.say(node, "; ".join(notes)))


class BodyFromSAM3D(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundBodyFromSAM3D",
            display_name="Body from SAM 3D Body",
            category=CATEGORY,
            description="Takes one person of ComfyUI's SAM 3D Body result as a body in motion, "
            "and the camera that saw them.",
            inputs=[
                POSES.Input("pose_data", tooltip="From ComfyUI's SAM 3D Body nodes; smooth it "
                            "there first if it trembles."),
                io.Int.Input("person", default=0, min=0, max=63,
                             tooltip="Which of the people found, counted from 0."),
                _fps_input("Frames a second of the clip."),
            ],
            outputs=[
                BODY_OUTPUT,
                RIG.Output(display_name="camera", tooltip="The camera of the clip, one view: maps "
                           "drawn for it lie on the clip's frames."),
                NOTE_OUTPUT,
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, pose_data, person, fps) -> io.NodeOutput:
        made = body_sources.body_from_sam3d(pose_data, person, fps)
        camera = made.camera.filled(*snap_size(made.camera.width, made.camera.height))
        return io.NodeOutput(made.body, camera, run.say(cls, made.note))


def _sequences() -> dict[str, list[str]]:
    """Mesh files in ComfyUI's input folder and in the folders right inside it."""
    root = Path(folder_paths.get_input_directory())
    if not root.is_dir():
        return {}
    folders = [root, *sorted(p for p in root.iterdir() if p.is_dir())]
    files = [p.relative_to(root).as_posix() for d in folders for p in d.iterdir() if p.is_file()]
    return body_sources.mesh_sequences(files)


class LoadBody(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundLoadBody",
            display_name="Load Body",
            category=CATEGORY,
            description="Reads a body in motion from ComfyUI's input folder: a numbered sequence "
            "of OBJ, GLB or PLY files, one a frame, or a single file.",
            inputs=[
                io.Combo.Input("first_file", options=list(_sequences()),
                               tooltip="The first file of a numbered sequence (name_0001.obj, "
                               "name_0002.obj ...) in ComfyUI's input folder, or a single file."),
                io.Combo.Input("axes", options=list(body_sources.AXES),
                               tooltip="The file's axes: y up (glTF, most OBJ), z up (Blender, "
                               "CAD), or y down (camera space)."),
                _height_input(),
                _length_input(),
                _fps_input("Frames a second of the sequence."),
            ],
            outputs=[BODY_OUTPUT, NOTE_OUTPUT],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, first_file: str, axes, performer_height, frames, fps) -> io.NodeOutput:
        files = _sequences().get(first_file)
        if files is None:  # a connected name could point anywhere
            raise ValueError(
                f"'first_file' is '{first_file}', but ComfyUI's input folder has no mesh sequence "
                "that starts with it: put the files there (.obj, .glb or .ply) and pick the first."
            )
        root = Path(folder_paths.get_input_directory())
        bar = run.progress(len(files))
        paths = [root / name for name in files]
        made = body_sources.read_body(paths, axes, performer_height, fps, bar)
        return _with_length(cls, made, frames)

    # No validate_inputs here: it would switch off ComfyUI's own check that the file is in the list.

    @classmethod
    def fingerprint_inputs(cls, first_file: str | None = None, **settings) -> str:
        # `first_file` is None while it comes from another node that has not run.
        root = Path(folder_paths.get_input_directory())
        times = [(root / name).stat().st_mtime_ns for name in _sequences().get(first_file, [])]
        return f"{first_file} {times} {sorted(settings.items())}"


class AnnyBody(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        bank = performer.load_performers()

        def slider(name: str, default: float, tooltip: str) -> io.Float.Input:
            return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01,
                                  display_mode=io.NumberDisplay.slider, tooltip=tooltip)  # fmt: skip

        return io.Schema(
            node_id="TurnaroundAnnyBody",
            display_name="Anny Body",
            category=CATEGORY,
            description="A body of any build from Anny, a parametric body model (package 'anny', "
            "to be installed), moved by a motion that comes with the pack. Its first use takes "
            "some minutes.",
            inputs=[
                slider("gender", 0.5, "0 = male, 1 = female."),
                slider("age", 0.65, "0 = newborn, 0.33 = child, 0.67 = young adult, 1 = old."),
                slider("muscle", 0.5, "0 = none to be seen, 1 = athlete."),
                slider("weight", 0.5, "0 = thin, 1 = heavy."),
                slider("height", 0.5, "0 = small, 1 = tall, for the age."),
                slider("proportions", 0.5, "0 = uncommon, 1 = as fashion draws people."),
                io.Combo.Input("motion", options=unseen_first(bank.motions, 1),
                               tooltip="What the body does (motion capture)."),
                *_time_inputs(),
            ],
            outputs=[BODY_OUTPUT],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, gender, age, muscle, weight, height, proportions, motion: str, frames, start
    ) -> io.NodeOutput:
        times = _moments(cls, frames, start)
        phenotype = (gender, age, muscle, weight, height, proportions)
        run.say(cls, "building Anny's body: minutes at its first use, seconds later")
        motion = motion.split()[0]
        return io.NodeOutput(body_sources.anny_body(phenotype, motion, times, SAMPLE_FPS))


def _margin(side: str) -> io.Int.Input:
    return io.Int.Input(f"crop_{side}", default=0, min=0, max=4096,
                        tooltip=f"Pixels at the {side} of the reference pictures that are padding: "
                        "the original did not reach there. Marked in 'crop_mask'.")  # fmt: skip


class RenderBodyMaps(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundRenderBodyMaps",
            display_name="Render Body Maps",
            category=CATEGORY,
            description="Draws a body in motion into every camera of the rig, as the maps that "
            "animatable multi-view models are told: pose, deformation, motion, rays, normals, "
            "what is seen, depth, and which pictures are given.",
            inputs=[
                BODY.Input("body", tooltip="From Sample Body, Load Body, Body from Mesh, Body from "
                           "SAM 3D Body or Anny Body."),
                RIG.Input("rig", tooltip="The cameras to draw for; their size is the maps' size."),
                io.Int.Input("reference_view", default=0, min=-1, max=255,
                             tooltip="The view whose pictures you have. Its camera decides what "
                             "counts as seen. -1 = all views (to extend a clip); camera 0 decides."),
                io.Int.Input("reference_frames", default=1, min=0, max=1001,
                             tooltip="How many of its frames you have, from the first: 1 = one "
                             "picture, 1001 = the whole clip, 0 = none."),
                io.Combo.Input("unseen_normals", options=["kept", "black"],
                               tooltip="Normals of the side that faces away from the reference "
                               "camera: drawn like the rest, or black as in Render Conditions."),
                io.Float.Input("deformation_scale", default=0.0, min=0.0, max=10.0, step=0.01,
                               tooltip="Metres of deformation at the end of the colour range; 0 = "
                               "the largest of this clip. Fix it where clips must compare."),
                io.Float.Input("motion_scale", default=0.0, min=0.0, max=10.0, step=0.01,
                               tooltip="Metres of motion at the end of the colour range; 0 = the "
                               "largest of this clip."),
                *(_margin(side) for side in ("left", "top", "right", "bottom")),
            ],
            outputs=[
                VIEWS.Output(display_name="pose", tooltip="Which spot of the template is seen: its "
                             "place as a colour; black = nothing."),
                VIEWS.Output(display_name="deformation", tooltip="How the body differs from the "
                             "rigidly placed template; grey = not at all."),
                VIEWS.Output(display_name="motion", tooltip="How the surface moved since its latent "
                             "frame (4 frames) began, seen from each camera; grey = not at all."),
                VIEWS.Output(display_name="rays", tooltip="The direction of every pixel's ray in the "
                             "world; the same in all frames."),
                VIEWS.Output(display_name="normals", tooltip="Normal maps: red = right, green = up, "
                             "blue = towards the camera; grey = nothing."),
                VIEWS.Output(display_name="visibility", tooltip="White = seen by the reference "
                             "camera, grey = the body's unseen rest, black = nothing."),
                VIEWS.Output(display_name="depth", tooltip="Metres from each camera."),
                VIEWS.Output(display_name="reference_mask", tooltip="White = this picture is given."),
                VIEWS.Output(display_name="crop_mask", tooltip="White = padding of a given picture."),
                io.Float.Output(display_name="deformation_scale",
                                tooltip="Metres that colour 0 or 1 of 'deformation' stands for."),
                io.Float.Output(display_name="motion_scale",
                                tooltip="Metres that colour 0 or 1 of 'motion' stands for."),
                NOTE_OUTPUT,
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, body: Body, rig: Rig, reference_view, reference_frames, unseen_normals,
        deformation_scale, motion_scale, crop_left, crop_top, crop_right, crop_bottom,
    ) -> io.NodeOutput:  # fmt: skip
        run.check_memory("The maps", rig, body.frame_count, MAP_BYTES)
        margins = (crop_left, crop_top, crop_right, crop_bottom)
        settings = MapSettings(
            reference_view, reference_frames, deformation_scale, motion_scale, unseen_normals,
            margins,
        )  # fmt: skip
        device = run.drawing_device(WORKING_BYTES)
        maps = render_body_maps(body, rig, settings, device, run.progress(1))
        note = run.say(cls, _map_note(body, maps))
        drawn = maps.visibility > 0

        def views(frames: torch.Tensor, masks: torch.Tensor = drawn) -> Views:
            return Views(frames, masks, rig, body.fps)

        def grey(pictures: torch.Tensor) -> torch.Tensor:
            white = pictures.byte() * 255 if pictures.dtype == torch.bool else pictures
            return white[:, :, None].expand(-1, -1, 3, -1, -1)

        return io.NodeOutput(
            views(maps.pose), views(maps.deformation), views(maps.motion), views(maps.rays),
            views(maps.normals), views(grey(maps.visibility), maps.visibility == SEEN),
            views(maps.depth[:, :, None]),
            views(grey(maps.reference_mask), maps.reference_mask),
            views(grey(maps.crop_mask), maps.crop_mask),
            maps.deformation_scale, maps.motion_scale, note,
        )  # fmt: skip


def _map_note(body: Body, maps: BodyMaps) -> str:
    """What a creator should know of these maps."""
    seen = (maps.visibility > 0).flatten(1).any(1)
    if not seen.any():
        raise ValueError(
            "No camera of the rig sees the body: the cameras look elsewhere or stand inside it; use "
            "an Orbit Rig some metres away."
        )
    notes = [
        f"full colour of 'deformation' is {maps.deformation_scale:.3g} m, of 'motion' "
        f"{maps.motion_scale:.3g} m"
    ]
    for name, most in zip(("deformation", "motion"), maps.longest, strict=True):
        if most > 1:
            notes.append(f"'{name}' goes up to {most:.1f} times that and may be cut off")
    if not seen.all():
        notes.append(f"views {seen.logical_not().nonzero()[:, 0].tolist()} see nothing of the body")
    if snap_frames(body.frame_count) != body.frame_count:
        notes.append(
            f"{body.frame_count} frames: video models take 4n+1, such as "
            f"{snap_frames(body.frame_count)}"
        )
    return "; ".join(notes)


NODES: list[type[io.ComfyNode]] = [
    SampleBody,
    LoadBody,
    BodyFromMesh,
    BodyFromSAM3D,
    AnnyBody,
    RenderBodyMaps,
]
