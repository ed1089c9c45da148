"""Motion files: a body that does what a BVH file says."""

from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io

from ..models import performer as performers
from ..models.body import MAX_VERTEX_MOMENTS, Body
from ..models.bvh import Bvh, read_bvh
from ..models.bvh_motion import motion_of_bvh
from ..models.fit_skeleton import TOTAL_STEPS
from ..models.repose import performer_body, with_motion
from ..models.views import snap_frames
from . import run
from .body import BODY_OUTPUT
from .geometry import CATEGORY
from .sockets import BODY
from .views import SAMPLE_FPS, unseen_first

NONE_FOUND = "(no .bvh file in the input folder)"
TO_CAMERA, AS_FILED = "the camera at first", "as in the file"
MOST_FRAMES = 1001


def bvh_files() -> list[str]:
    """Motion files in ComfyUI's input folder and in the folders right inside it."""
    root = Path(folder_paths.get_input_directory())
    if not root.is_dir():
        return []
    folders = [root, *sorted(p for p in root.iterdir() if p.is_dir())]
    files = [p for d in folders for p in sorted(d.iterdir()) if p.suffix.lower() == ".bvh"]
    return [p.relative_to(root).as_posix() for p in files if p.is_file()]


class BodyFromBVH(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        bank = performers.load_performers()
        return io.Schema(
            node_id="TurnaroundBodyFromBVH",
            display_name="Body from BVH",
            category=CATEGORY,
            description="Lets a body do what a motion file says: BVH as motion capture libraries "
            "(Mixamo, CMU, Rokoko, Xsens ...) and 3D programs write it, on a performer of the pack or "
            "on any upright body of your own.",
            inputs=[
                io.Combo.Input("file", options=bvh_files() or [NONE_FOUND],
                               tooltip="A .bvh file in ComfyUI's input folder or in a folder right "
                               "inside it. Reload the page after copying files."),
                io.Combo.Input("performer", options=unseen_first(bank.characters, 0),
                               tooltip="Who moves, where no 'body' is connected. 'unseen' ones are "
                               "new to the embedded models."),
                io.Int.Input("frames", default=13, min=0, max=MOST_FRAMES,
                             tooltip="Length of the clip; 4n+1 fits video models. 0 = to the end of "
                             f"the file, at most {MOST_FRAMES}."),
                io.Float.Input("start", default=0.0, min=0.0, max=3600.0, step=0.1,
                               tooltip="Where in the file the clip begins, in seconds. Many files "
                               "begin with a T-pose."),
                io.Float.Input("fps", default=SAMPLE_FPS, min=1.0, max=240.0, step=0.5,
                               tooltip="Frames a second of the result."),
                io.Float.Input("speed", default=1.0, min=0.05, max=20.0, step=0.05,
                               tooltip="2 = twice as fast as recorded."),
                io.Combo.Input("faces", options=[TO_CAMERA, AS_FILED],
                               tooltip="Whether the clip is turned so that its first frame faces the "
                               "source camera."),
                io.Int.Input("clothes_seed", default=1_000_003, min=0, max=2**31 - 1,
                             tooltip="Which clothes and hair the performer wears; they stand a little "
                             "off the body."),
                BODY.Input("body", optional=True, tooltip="A body of your own that is to move "
                           "instead, in its own build; what it does is left out. Its template must be "
                           "an upright person."),
            ],
            outputs=[
                BODY_OUTPUT,
                io.String.Output(display_name="note", tooltip="What the file holds, and what was "
                                 "guessed."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, file: str, performer: str, frames: int, start, fps, speed, faces, clothes_seed,
        body: Body | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        if file not in bvh_files():  # a connected name could point anywhere
            raise ValueError(
                f"'file' is '{file}', but ComfyUI's input folder has no such motion: put a .bvh file "
                "there, press R on the page and pick it."
            )
        bvh = read_bvh(Path(folder_paths.get_input_directory()) / file)
        times, notes = _moments(bvh, frames, start, fps, speed)
        found = motion_of_bvh(bvh, Path(file).name, times, fps, faces == TO_CAMERA)
        notes += [found.note] if found.note else []
        if body is None:
            moved = performer_body(performer.split()[0], found.motion, clothes_seed)
        else:
            _check_size(len(times), len(body.rest))
            moved = with_motion(body, found.motion, run.counted(TOTAL_STEPS))
        return io.NodeOutput(moved, run.say(cls, "; ".join(notes)))

    # No validate_inputs here: it would switch off ComfyUI's own check that the file is in the list.

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **settings) -> str:
        # `file` is None while it comes from another node that has not run.
        path = Path(folder_paths.get_input_directory()) / (file or "")
        changed = path.stat().st_mtime_ns if path.is_file() else "missing"
        return f"{file} {changed} {sorted((k, str(v)) for k, v in settings.items() if k != 'body')}"


def _moments(bvh: Bvh, frames: int, start: float, fps: float, speed: float):
    """Seconds in the file, and what there is to say about them."""
    length = (bvh.frame_count - 1) * bvh.seconds
    notes = [f"the file holds {length:.1f} s at {1 / bvh.seconds:.0f} frames a second"]
    if start > length:
        raise ValueError(
            f"'start' is {start:g} s, but the motion in the file is over at {length:.1f} s: let it "
            "begin earlier."
        )
    if not frames:
        frames = min(int((length - start) / speed * fps + 1e-6) + 1, MOST_FRAMES)
        notes.append(f"{frames} frames")
    times = start + torch.arange(frames, dtype=torch.float64) * speed / fps
    if times[-1] > length + 1e-6:
        notes.append(f"the motion is over after {length:.1f} s: its last pose is held")
    if snap_frames(frames) != frames:
        notes.append(f"video models take 4n+1 frames, such as {snap_frames(frames)}")
    return times, notes


def _check_size(frames: int, vertices: int) -> None:
    if frames * vertices > MAX_VERTEX_MOMENTS:
        raise ValueError(
            f"'body' has {vertices:,} vertices, too many for {frames} frames: use fewer 'frames' or a "
            "coarser mesh (20,000 vertices are plenty)."
        )


NODES: list[type[io.ComfyNode]] = [BodyFromBVH]
