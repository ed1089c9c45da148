"""Depth from Views: metres from the masks of several cameras."""

from comfy_api.latest import io

from ..models.silhouettes import depth_from_silhouettes, masks_of_views, refine_depth_by_colour
from ..models.views import Views
from . import run
from .geometry import CATEGORY, MUCH_BARE
from .sockets import VIEWS

BYTES_A_PIXEL = 24
"""Masks and depth of all views, before and after colours, as float."""


class DepthFromViews(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundDepthFromViews",
            display_name="Depth from Views",
            category=CATEGORY,
            description="Finds the depth of every view, in metres, from the performer's outlines "
            "in all views: for real cameras, or views that came without depth. Needs at least "
            "three cameras around the performer; eight give millimetres, four some centimetres.",
            inputs=[
                VIEWS.Input("views", tooltip="At least three views with a rig: the same moments "
                            "seen from around. Without masks, a plain background is taken away."),
                io.Boolean.Input("use_colours", default=True,
                                 tooltip="Outlines show no hollows (armpits, between the legs), so "
                                 "their shape is too fat: on = each place is moved inwards to where "
                                 "the neighbouring views show the same colours. Off = outlines "
                                 "alone, faster; for views whose patterns don't match."),
            ],
            outputs=[
                VIEWS.Output(display_name="depth", tooltip="Metres from each camera, 0 = nothing "
                             "there; with the masks and the rig of the views."),
                io.String.Output(display_name="note", tooltip="What was found, and what is missing."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, views: Views, use_colours=True) -> io.NodeOutput:
        _check(views)
        V, count = views.frames.shape[:2]
        run.check_memory("Depths", views.rig, count, BYTES_A_PIXEL)
        # Guessing the masks of a view takes about as long as the depth of four frames.
        before = 0 if views.masks is not None else V * count
        steps = before + count * (8 if use_colours else 4)
        bar = run.progress(steps)
        masks = masks_of_views(views, lambda done, _: bar(done * count, steps))
        if masks is None:
            raise ValueError(
                "'views' have no masks, and their background is not plain enough to guess them: "
                "connect masks that show the performer in white to the node that makes the views."
            )
        depth = depth_from_silhouettes(
            masks, views.rig, lambda done, _: bar(before + 4 * done, steps)
        )
        if not depth.any():
            raise ValueError(
                "The outlines of 'views' meet nowhere, so there is no depth: check that masks show "
                "the performer in white, and that the rig is that of these very views, in the same "
                "order."
            )
        if use_colours:
            depth = refine_depth_by_colour(
                views.frames,
                depth,
                views.rig,
                lambda done, _: bar(before + 4 * (count + done), steps),
            )
        found = Views(depth[:, :, None], masks, views.rig, views.fps)
        return io.NodeOutput(found, run.say(cls, _note(found, use_colours, views.masks is None)))


def _check(views: Views) -> None:
    """One sentence about what is missing."""
    if views.frames.shape[2] != 3:
        raise ValueError("'views' carry depth already: connect colour views, or use that depth.")
    if views.rig is None:
        raise ValueError(
            "'views' know no cameras: make them with a rig, as Images to Views and Decode Views take "
            "it."
        )


def _note(found: Views, use_colours: bool, guessed: bool) -> str:
    near, far = found.depth_range
    known, inside = found.frames[:, :, 0] > 0, found.masks > 0.5
    how = "outlines and colours" if use_colours else "outlines alone"
    parts = [f"depth from {how} of {len(found)} views: {near:.2f} to {far:.2f} m"]
    if guessed:
        parts.append("there were no masks: they are guessed from the plain background")
    empty = (~known.flatten(2).any(2).any(0)).nonzero()[:, 0].tolist()
    if empty:
        parts.append(
            f"frames {empty} stay empty: fewer than three masks show the performer, or they meet "
            "nowhere"
        )
    shown = inside.sum((1, 2, 3)).clamp(min=1)
    bare = 1 - (known & inside).sum((1, 2, 3)) / shown
    for label, share in zip(found.rig.labels, bare.tolist(), strict=True):
        if share > MUCH_BARE:
            parts.append(f"{label}: {100 * share:.0f} % of the mask fits no other view")
    return "; ".join(parts)


NODES: list[type[io.ComfyNode]] = [DepthFromViews]
