"""Conditions: what every camera of a rig is told about the performer."""

from comfy_api.latest import io

from ..models.cameras import Rig
from ..models.geometry import render_conditions
from ..models.points import OrientedPoints
from ..models.views import Views
from . import run
from .geometry import CATEGORY
from .sockets import CLOUD, RIG, VIEWS


class RenderConditions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundRenderConditions",
            display_name="Render Conditions",
            category=CATEGORY,
            description="Draws the points into every camera of the rig: the colours that were "
            "seen, camera-dependent normal maps (the unseen side of the body is black), and what "
            "is seen, unseen or empty.",
            inputs=[
                CLOUD.Input("cloud", tooltip="From Performer Geometry."),
                RIG.Input("rig", tooltip="The cameras to draw for."),
                io.Combo.Input("back_colors", options=["kept", "blanked"],
                               tooltip="Colours on the unseen side: those of the seen side, a good guess for "
                               "clothes (Turnaround-Tiny was trained so), or black."),
            ],
            outputs=[
                VIEWS.Output(display_name="partial", tooltip="Seen colours; mask = seen side."),
                VIEWS.Output(display_name="normals", tooltip="Normal maps: red = right, green = up, blue = "
                             "towards the camera; black = unseen side, grey = nothing."),
                VIEWS.Output(display_name="visibility", tooltip="White = seen, grey = unseen side of the body, "
                             "black = nothing."),
                VIEWS.Output(display_name="depth", tooltip="Metres from each camera."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, cloud: OrientedPoints, rig: Rig, back_colors: str) -> io.NodeOutput:
        drawn = render_conditions(cloud, rig, back_colors, run.progress(len(rig)))
        seen = (drawn.visibility == 1).float()
        if not (drawn.visibility > 0).any():
            raise ValueError(
                "No camera of the rig sees the performer: the cameras look elsewhere or stand "
                "inside the body; use an Orbit Rig with the cloud connected."
            )
        blind = (drawn.visibility > 0).flatten(1).any(1).logical_not().nonzero()[:, 0].tolist()
        run.say(cls, f"views {blind} see nothing of the performer" if blind else "")
        shown = drawn.visibility[:, :, None].expand(-1, -1, 3, -1, -1)
        body = (drawn.visibility > 0).float()
        return io.NodeOutput(
            Views(drawn.partial, seen, rig, cloud.fps),
            Views(drawn.normals, body, rig, cloud.fps),
            Views(shown, seen, rig, cloud.fps),
            Views(drawn.depth[:, :, None], body, rig, cloud.fps),
        )


NODES: list[type[io.ComfyNode]] = [RenderConditions]
