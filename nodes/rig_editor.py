"""Edit Rig: cameras that a creator drags, kept as text; js/rig_editor.js draws and edits it."""

from comfy_api.latest import io

from ..models.camera_lines import parse_camera_lines, rig_from_lines, rig_to_lines
from ..models.cameras import LONE_DISTANCE, Rig
from . import run
from .cameras import CATEGORY, size_inputs, snapped_size
from .sockets import RIG

EIGHT_ROUND = "\n".join(f"{azimuth} 0 {LONE_DISTANCE}" for azimuth in range(0, 360, 45))


class CameraLines(io.String.Input):
    """Text, for which the page has the editor instead of a text box."""

    def as_dict(self) -> dict:
        # Not io.String's own `widget_type`, which would replace the type that a link must have.
        return super().as_dict() | {"widgetType": "TURNAROUND_RIG_EDITOR"}


class RigEditor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundRigEditor",
            display_name="Edit Rig",
            category=CATEGORY,
            description="Cameras that you place by hand: seen from above and from the side, "
            "dragged, added, mirrored, spread evenly.",
            inputs=[
                CameraLines("cameras", multiline=True, default=EIGHT_ROUND,
                            tooltip="One camera a line: azimuth, elevation and distance in "
                            "degrees, degrees and metres, then its own field of view if it has "
                            "one, then # and a name. Empty = the connected rig goes through."),
                io.Float.Input("fov", default=35.0, min=5.0, max=120.0, step=1.0,
                               tooltip="Vertical field of view in degrees of the cameras that "
                               "have none of their own: 35 = ordinary lens, 60 = wide."),
                *size_inputs(192, 240),
                RIG.Input("rig", optional=True,
                          tooltip="A rig to start from: run the graph once, then take its cameras "
                          "over in the editor."),
            ],
            outputs=[RIG.Output(display_name="rig", tooltip="The cameras.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, cameras: str | None = None) -> bool | str:
        """What is wrong with the text is said before anything runs; None = it comes by a link."""
        try:
            parse_camera_lines(cameras or "")
        except ValueError as fault:
            return str(fault)
        return True

    @classmethod
    def execute(
        cls, cameras: str, fov: float, width: int, height: int, rig: Rig | None = None
    ) -> io.NodeOutput:
        shown = None
        if rig is not None:
            text, is_whole = rig_to_lines(rig)
            start = {"cameras": text, "width": rig.width, "height": rig.height, "whole": is_whole}
            shown = {"turnaround_rig": [start]}
        if parse_camera_lines(cameras):
            width, height = snapped_size(cls, width, height)
            return io.NodeOutput(rig_from_lines(cameras, fov, width, height), ui=shown)
        if rig is None:
            raise ValueError(
                "'cameras' names no camera and no rig is connected: add a camera in the editor, or "
                "write one a line, such as 90 0 3.2."
            )
        run.say(cls, "No cameras of its own: the connected rig goes through as it is")
        return io.NodeOutput(rig, ui=shown)


NODES: list[type[io.ComfyNode]] = [RigEditor]
