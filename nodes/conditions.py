"""Conditions: what every camera of a rig is told about the performer."""

from typing import get_args

from comfy_api.latest import io

from ..models.cameras import Rig
from ..models.geometry import (
    GROUNDS,
    SEEN,
    BackColors,
    BackNormals,
    Look,
    NormalsSpace,
    ViewVector,
    render_conditions,
)
from ..models.points import OrientedPoints
from ..models.views import Views
from . import run
from .geometry import CATEGORY
from .sockets import CLOUD, RIG, VIEWS

BYTES = 14
"""Of all outputs a pixel: seven of pictures, four of depth, masks."""


WORKING_BYTES = 3 << 29
"""Of GPU memory: points, z-buffers and pictures of the frames that are drawn at once."""


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
                io.Combo.Input("back_colors", options=list(get_args(BackColors)),
                               tooltip="Colours on the unseen side: those of the seen side, a good guess for "
                               "clothes (Turnaround-Tiny was trained so), or black."),
                io.Combo.Input("back_normals", options=list(get_args(BackNormals)), optional=True,
                               tooltip="Normal map of the unseen side: black tells a sampler that "
                               "it was not seen; drawn = its normals as colours."),
                io.Combo.Input("normals_space", options=list(get_args(NormalsSpace)), optional=True,
                               tooltip="Whose right, up and towards the normals' colours mean: each "
                               "target camera's own (default), your camera's, or the world's "
                               "(towards = towards azimuth 0)."),
                io.Combo.Input("view_vector", options=list(get_args(ViewVector)), optional=True,
                               tooltip="A point counts as seen when it faces the camera: looked at "
                               "along its own line of sight (exact), or along the camera's axis."),
                io.Combo.Input("background", options=list(GROUNDS), optional=True,
                               tooltip="Behind the performer, in partial and normals. Grey keeps a "
                               "black back readable; others only for models trained so."),
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
    def execute(
        cls, cloud: OrientedPoints, rig: Rig, back_colors, back_normals="black",
        normals_space="target camera", view_vector="per point", background="grey",
    ) -> io.NodeOutput:  # fmt: skip
        run.check_memory("The pictures", rig, cloud.frame_count, BYTES)
        look = Look(back_colors, back_normals, normals_space, view_vector, background)
        drawn = render_conditions(
            cloud, rig, look, run.progress(1), run.drawing_device(WORKING_BYTES)
        )
        body = drawn.visibility > 0
        if not body.any():
            raise ValueError(
                "No camera of the rig sees the performer: the cameras look elsewhere or stand "
                "inside the body; use an Orbit Rig with the cloud connected."
            )
        blind = body.flatten(1).any(1).logical_not().nonzero()[:, 0].tolist()
        run.say(cls, f"views {blind} see nothing of the performer" if blind else "")
        seen = drawn.visibility == SEEN
        shown = drawn.visibility[:, :, None].expand(-1, -1, 3, -1, -1)
        return io.NodeOutput(
            Views(drawn.partial, seen, rig, cloud.fps),
            Views(drawn.normals, body, rig, cloud.fps),
            Views(shown, seen, rig, cloud.fps),
            Views(drawn.depth[:, :, None], body, rig, cloud.fps),
        )


NODES: list[type[io.ComfyNode]] = [RenderConditions]
