"""Clouds to look at and to keep: the 3D view in the page, PLY files."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..models.cloud_file import (
    AXES,
    TURNTABLE_VIEWS,
    finite,
    turntable,
    write_cloud_view,
    write_ply,
)
from ..models.points import OrientedPoints
from . import run
from .geometry import CATEGORY
from .sockets import CLOUD
from .views import check_prefix, frames_to_image

VIEW_SUFFIX = ".turncloud"


def _left_out(points: int) -> str:
    return f"{points:,} points with NaN or infinity were left out" if points else ""


class PreviewCloud(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundPreviewCloud",
            display_name="Preview Cloud",
            category=CATEGORY,
            description="Shows the points in 3D, over time: drag to turn, wheel to zoom, play or "
            "scrub through the frames, and colour them by what was seen and what is a guess.",
            inputs=[
                CLOUD.Input("cloud", tooltip="From Performer Geometry."),
                io.Int.Input("max_points", default=60_000, min=1000, max=500_000, step=1000,
                             tooltip="Points of one frame that the view draws at most; the rest is left out "
                             "evenly. Fewer load faster. The cloud itself stays whole."),
            ],
            outputs=[
                io.Image.Output(display_name="turntable", tooltip="The middle frame from eight sides, in one "
                                "strip."),
                io.String.Output(display_name="note", tooltip="What was left out of the view."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, cloud: OrientedPoints, max_points: int) -> io.NodeOutput:
        cloud, lost = finite(cloud)
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            "turnaround_cloud", folder_paths.get_temp_directory()
        )
        file = f"{name}_{counter:05}_{VIEW_SUFFIX}"
        bar = run.progress(cloud.frame_count)
        view = write_cloud_view(Path(folder) / file, cloud, max_points, bar)
        turning = run.progress(TURNTABLE_VIEWS)
        # Without the pictures of its steps: ComfyUI would show them in the node, over the 3D view.
        strip = turntable(cloud, lambda done, total, _: turning(done, total))
        note = run.say(cls, "; ".join(n for n in (_left_out(lost), view.note) if n))
        shown = {
            "filename": file, "subfolder": subfolder, "type": "temp", "frames": view.frames,
            "points": view.points, "fps": view.fps, "box": [view.low, view.high],
            "checksum": view.checksum,
        }  # fmt: skip
        return io.NodeOutput(frames_to_image(strip[None]), note, ui={"turnaround_cloud": [shown]})


class SaveCloud(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundSaveCloud",
            display_name="Save Cloud",
            category="Turnaround/9 save",
            description="Saves the points of every frame as a PLY file (place, normal, colour, "
            "confidence, radius) into ComfyUI's output folder, for Blender, MeshLab and others.",
            inputs=[
                CLOUD.Input("cloud", tooltip="From Performer Geometry."),
                io.String.Input("filename_prefix", default="turnaround/cloud",
                                tooltip="Folder and name below ComfyUI's output folder."),
                io.Combo.Input("axes", options=list(AXES),
                               tooltip="Which way is up in the file, so that the performer stands upright where "
                               "you open it. Metres in any case."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, cloud: OrientedPoints, filename_prefix: str, axes: str) -> io.NodeOutput:
        check_prefix(filename_prefix)
        cloud, lost = finite(cloud)
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        total = cloud.frame_count
        bar = run.progress(total)
        files = [f"{name}_{counter:05}_frame{f:04}.ply" for f in range(total)]
        for f, file in enumerate(files):
            write_ply(Path(folder) / file, cloud, f, axes)
            bar(f + 1, total)
        where = f"{total} files in output/{subfolder}, the first is {files[0]}"
        run.say(cls, "; ".join(n for n in (where, _left_out(lost)) if n))
        return io.NodeOutput()


NODES: list[type[io.ComfyNode]] = [PreviewCloud, SaveCloud]
