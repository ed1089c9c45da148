"""Views cut out around the performer."""

from comfy_api.latest import io

from ..models.cameras import Rig
from ..models.crop_views import cropped_views
from ..models.views import Views, view_labels
from . import run
from .cameras import CATEGORY, filmed_by, size_inputs, snapped_size
from .sockets import RIG, VIEWS


class CropViews(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundCropViews",
            display_name="Crop Views",
            category=CATEGORY,
            description="Cuts every view out around the performer, with one window that holds him in "
            "all frames, and gives each camera of the rig what belongs to its window: more pixels of "
            "him, less of the room.",
            inputs=[
                VIEWS.Input("views", tooltip="Views with masks of the performer, straightened before."),
                *size_inputs(384, 480),
                io.Float.Input("margin", default=0.12, min=0.0, max=2.0, step=0.01,
                               tooltip="Free space around the performer: 0.12 = 12 percent more than "
                               "the height, or width, that he fills."),
                RIG.Input("rig", optional=True, tooltip="The cameras of the views, where 'views' have "
                          "none; replaces that of 'views'."),
            ],
            outputs=[
                VIEWS.Output(display_name="views", tooltip="The cut-out views with masks and rig. Where "
                             "a window reaches beyond its picture, the picture's rim is repeated, and "
                             "is no performer in the masks."),
                RIG.Output(display_name="rig", tooltip="The cameras of the cut-out views, to look at "
                           "results from."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, views: Views, width, height, margin, rig: Rig | None = None) -> io.NodeOutput:
        width, height = snapped_size(cls, width, height)
        if rig is not None or views.rig is not None:
            rig = filmed_by(views, rig)
        bar = run.progress(len(views))
        cut, windows = cropped_views(
            views, rig, width, height, margin, lambda v: bar(v + 1, len(views))
        )
        enlarged = height / (windows[:, 3] - windows[:, 1])
        if enlarged.max() > 1.05:
            v = int(enlarged.argmax())
            run.say(
                cls,
                f"view {view_labels(views)[v]} was enlarged {enlarged[v]:.1f} times: a smaller width "
                "and height shows as much",
            )
        return io.NodeOutput(cut, cut.rig)


NODES: list[type[io.ComfyNode]] = [CropViews]
