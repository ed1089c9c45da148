"""MV-Opt Refine: views that disagree, flicker and shake are made to agree."""

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..models.cameras import Rig
from ..models.mv_opt import Refined, paper_order, refine
from ..models.mv_opt_objective import History, Settings
from ..models.mv_opt_paper import refine_paper
from ..models.mv_opt_picture import history_picture
from ..models.pose import Pose, detect_keypoints
from ..models.view_weights import ViewWeights
from ..models.views import Views, as_pictures
from . import run
from .background import CATEGORY
from .human import HUMAN, pixels_of
from .sockets import POSE, RIG, VIEWS, WEIGHTS
from .views import frames_to_image

SOUND, PAPER = "steady", "paper"
LOSS = io.Custom("LOSS_MAP")


class MVOptRefine(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundMVOptRefine",
            display_name="MV-Opt Refine",
            category=CATEGORY,
            description="Makes all views agree: takes out colour casts, flicker and shaking, and "
            "puts back what one view shows in another place, without blurring. For views from any "
            "sampler or from real cameras.",
            inputs=[
                VIEWS.Input("views", tooltip="The coloured views, from Decode Views or cameras."),
                io.Combo.Input("mode", options=[SOUND, PAPER], tooltip="steady: compares only what "
                               "two views both see, and motion with motion. paper: MVAnimate's "
                               "losses to the letter; they are least when nobody moves and all "
                               "views are equal, so pictures suffer: for comparison only."),
                io.Float.Input("surface", default=1.0, min=0.0, max=4.0, step=0.1,
                               tooltip="How much views are held to the same colours and texture "
                               "where they see the same surface. 0 = off. Not used by 'paper'."),
                io.Float.Input("temporal", default=1.0, min=0.0, max=4.0, step=0.1,
                               tooltip="How much colours are held over time, and shaking that no "
                               "other view has is taken out. 0 = off. Not used by 'paper'."),
                io.Float.Input("pose_strength", default=1.0, min=0.0, max=4.0, step=0.1,
                               tooltip="How much the performer is held to where the geometry, or "
                               "'pose', has it. 0 = off. Not used by 'paper'."),
                io.Float.Input("fidelity", default=1.0, min=0.1, max=10.0, step=0.1,
                               tooltip="How much pictures stay as they are; raise it when too much "
                               "changes. Not used by 'paper'."),
                io.Int.Input("iterations", default=8, min=1, max=50,
                             tooltip="Rounds over all views at every moment; it stops earlier "
                             "when nothing is gained."),
                io.Int.Input("sweeps", default=2, min=1, max=10,
                             tooltip="Passes over the whole clip. 'paper' makes one."),
                io.Int.Input("chunk", default=16, min=1, max=1000, tooltip="Frames whose surfaces "
                             "are compared at a time. Less takes less memory; the result is the "
                             "same."),
                RIG.Input("rig", optional=True,
                          tooltip="The cameras, when the views don't know theirs."),
                VIEWS.Input("depth", optional=True, tooltip="From Render Conditions: tells which "
                            "places of two views are the same surface. Without it, the shape is "
                            "guessed from the outlines of three views or more."),
                POSE.Input("pose", optional=True, tooltip="From Triangulate Pose: finds shaking "
                           "where the background is not plain."),
                WEIGHTS.Input("weights", optional=True, tooltip="From View Weights, best 'by "
                              "noise': views with more weight keep more of what they were."),
                HUMAN.Input("human_net", optional=True,
                            tooltip="From Load Human Net; for mode 'paper', which needs it."),
            ],
            outputs=[
                VIEWS.Output(display_name="views", tooltip="The refined views."),
                LOSS.Output(display_name="loss", tooltip="The objective after every step, for "
                            "nodes that plot losses."),
                io.Image.Output(display_name="history", tooltip="The same as a picture, with the "
                                "share of every term. It never rises."),
                io.String.Output(display_name="note", tooltip="How much the objective fell, and "
                                 "what was left out."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, views: Views, mode, surface, temporal, pose_strength, fidelity, iterations, sweeps,
        chunk, rig: Rig | None = None, depth: Views | None = None, pose: Pose | None = None,
        weights: ViewWeights | None = None, human_net: ModelPatcher | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        if rig is None and views.rig is None and depth is not None:
            rig = depth.rig
        views = with_rig(views, rig)
        _check(views, depth, pose, weights)
        values = weights.values if weights is not None else None
        if mode == PAPER:
            refined = _as_published(views, human_net, values, iterations)
        else:
            settings = Settings(
                temporal, pose_strength, surface, fidelity, iterations, sweeps, chunk=chunk
            )
            metres = depth.frames[:, :, 0] if depth is not None else None
            step = run.progress(sweeps * views.frames.shape[1])
            refined = refine(views, metres, pose, values, settings, step)
        note = run.say(cls, _note(refined))
        result = Views(refined.frames, views.masks, views.rig, views.fps)
        picture = frames_to_image(pixels_of(history_picture(refined.history))[None])
        return io.NodeOutput(result, {"loss": refined.history.total}, picture, note)


def with_rig(views: Views, rig: Rig | None) -> Views:
    """The views with the cameras that were connected, or their own."""
    if views.frames.shape[2] != 3:
        raise ValueError("'views' holds depth: connect the coloured views.")
    if rig is None:
        return views
    if len(rig) != len(views):
        raise ValueError(
            f"'rig' has {len(rig)} cameras but 'views' {len(views)} views: connect the rig that the "
            "views were made with."
        )
    H, W = views.frames.shape[-2:]
    return Views(views.frames, views.masks, rig.filled(W, H), views.fps)


def _check(
    views: Views, depth: Views | None, pose: Pose | None, weights: ViewWeights | None
) -> None:
    """One sentence for what does not belong to these views."""
    V, count, _, H, W = views.frames.shape
    if depth is not None:
        if depth.frames.shape[2] != 1:
            raise ValueError(
                "'depth' holds pictures, not metres: connect 'depth' of Render Conditions or Depth "
                "from Views."
            )
        shape = (*depth.frames.shape[:2], *depth.frames.shape[-2:])
        if shape != (V, count, H, W):
            raise ValueError(
                f"'depth' has {shape[0]} views x {shape[1]} frames of {shape[3]}x{shape[2]}, but "
                f"'views' {V} x {count} of {W}x{H}: connect the depth of the same views."
            )
    if pose is not None:
        seen = len(pose.pixels) if pose.pixels is not None else V
        if len(pose.points) != count or seen != V:
            raise ValueError(
                f"'pose' has {seen} views x {len(pose.points)} frames, but 'views' {V} x {count}: "
                "connect the pose of the same views."
            )
    if weights is not None and len(weights) != V:
        raise ValueError(
            f"'weights' has {len(weights)} weights but 'views' {V} views: connect the rig of these "
            "views to View Weights."
        )


def _as_published(
    views: Views, human_net: ModelPatcher | None, weights, iterations: int
) -> Refined:
    """MVAnimate's own losses, on pixels."""
    if human_net is None:
        raise ValueError(
            "Mode 'paper' compares keypoints and needs 'human_net': connect Load Human Net, or "
            "choose 'steady'."
        )
    mm.load_models_gpu([human_net])
    device = human_net.load_device
    frames = as_pictures(views).nan_to_num(0.5)
    V, count = frames.shape[:2]
    total = 2 * V * count
    step = run.progress(total)
    found = detect_keypoints(
        human_net.model, views, device,
        lambda done, of, preview=None: step(V * count * done // max(of, 1), total, preview),
    )  # fmt: skip
    boxes = torch.where(found.present[..., None], found.boxes, torch.nan)
    frames, history = refine_paper(
        frames, boxes, human_net.model, paper_order(views.rig, V), weights, iterations,
        lambda done, of, preview=None: step(V * count + V * count * done // of, total, preview),
    )  # fmt: skip
    return Refined(
        frames, history, ("as published: pictures are compared without regard to cameras",)
    )


def _note(refined: Refined) -> str:
    history: History = refined.history
    notes = list(refined.notes)
    if history.total:
        first, last = history.total[0], history.total[-1]
        fell = f"{1 - last / first:.0%}" if first > 0 else "nothing"
        notes.insert(0, f"the objective fell by {fell} in {len(history.order)} steps")
    return "; ".join(notes)


NODES: list[type[io.ComfyNode]] = [MVOptRefine]
