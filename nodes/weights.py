"""How much every view counts, and which parts of it are left to the sampler."""

from dataclasses import replace
from typing import get_args

import comfy.utils
import numpy as np
import torch
from comfy_api.latest import io
from torch import Tensor

from ..models.cameras import Rig
from ..models.silhouettes import masks_of_views
from ..models.unseen import Background, mask_pictures, unseen_mask
from ..models.view_noise import noise_of_views
from ..models.view_weights import (
    ViewWeights,
    largest_is_one,
    share_by_angle,
    share_by_visibility,
    weight_of_noise,
    weight_of_share,
    weight_text,
    weights_of_text,
    weights_picture,
)
from ..models.views import Views, grid_video, view_labels
from . import run
from .conditioning import CATEGORY
from .sockets import RIG, VIEWS, WEIGHTS
from .views import frames_to_image

BY_ANGLE, BY_VISIBILITY, AS_LIST = "by angle", "by visibility", "list"
BY_NOISE = "by noise"
LARGEST_IS_ONE, AS_GIVEN = "largest is 1", "as given"


class ViewWeightsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundViewWeights",
            display_name="View Weights",
            category=CATEGORY,
            description="Says how much every view counts when the views look at each other: less "
            "the farther a camera is from yours, less the less of the performer your camera saw, "
            "less the noisier a view is, or as you write it.",
            inputs=[
                RIG.Input("rig", tooltip="The cameras of the views that are sampled."),
                io.Combo.Input("method", options=[BY_ANGLE, BY_VISIBILITY, AS_LIST, BY_NOISE],
                               tooltip="by angle: falls with the angle to your camera. by "
                               "visibility: falls with the share of the performer that your camera "
                               "did not see. list: your own numbers. by noise: falls with "
                               "what a view shows and no other repeats."),
                io.Float.Input("falloff", default=0.9, min=0.0, max=5.0, step=0.05,
                               tooltip="How fast weights fall: 0 = all views count the same, 0.9 = "
                               "a view from behind counts 0.4, 3 = 0.05. For 'by noise': how "
                               "sharply noise counts, 1 = half the variance, twice the weight. "
                               "Unused by 'list'."),
                io.String.Input("weight_list", default="0.25, 0.25, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1",
                                tooltip="For 'list': one number a view, in the order of the rig."),
                io.Combo.Input("scale", options=[LARGEST_IS_ONE, AS_GIVEN],
                               tooltip="largest is 1: only the ratios count, and the best view is "
                               "looked at as the model was trained. as given: the numbers as they "
                               "are; all far below 1 blurs what views take from each other."),
                VIEWS.Input("visibility", optional=True,
                            tooltip="From Render Conditions; for 'by visibility'."),
                VIEWS.Input("views", optional=True,
                            tooltip="The finished views that are to be weighed, with masks if "
                            "there are any; for 'by noise'."),
            ],
            outputs=[
                WEIGHTS.Output(display_name="weights", tooltip="For View Sync in mode 'weighted', or "
                               "for a node that fuses views."),
                io.Image.Output(display_name="picture", tooltip="The cameras from above and a bar a "
                                "view: how much each counts."),
                io.String.Output(display_name="note", tooltip="The weights in numbers."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, rig: Rig, method, falloff, weight_list, scale, visibility: Views | None = None,
        views: Views | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        how = method
        if method == BY_ANGLE:
            values = weight_of_share(share_by_angle(rig), falloff)
        elif method == BY_VISIBILITY:
            values = weight_of_share(share_by_visibility(_fitting(visibility, rig)), falloff)
        elif method == BY_NOISE:
            variances, across = _noise(views, rig)
            values = weight_of_noise(variances, falloff)
            levels = [round(255 * float(variance) ** 0.5) for variance in variances]
            told = "differences between views" if across else "flicker alone"
            how = f"{method} (from {told}, in grey levels: {', '.join(map(str, levels))})"
        else:
            values = weights_of_text(weight_list, len(rig))
        if scale == LARGEST_IS_ONE:
            values = largest_is_one(values)
        weights = ViewWeights(values, rig.labels)
        pairs = zip(weights.labels, values.tolist(), strict=True)
        note = f"{how}: " + ", ".join(f"{label} {weight_text(w)}" for label, w in pairs)
        run.say(cls, note)
        image = torch.from_numpy(np.array(weights_picture(weights, rig))).float()[None] / 255
        return io.NodeOutput(weights, image, note)


def _fitting(visibility: Views | None, rig: Rig) -> Views:
    """The visibility of the rig's views, or one sentence."""
    if visibility is None:
        raise ValueError(
            "'by visibility' needs 'visibility': connect the output of that name of Render "
            "Conditions, or choose 'by angle'."
        )
    if len(visibility) != len(rig):
        raise ValueError(
            f"'visibility' has {len(visibility)} views but the rig {len(rig)} cameras: connect the "
            "rig that the conditions were rendered with."
        )
    return visibility


def _noise(views: Views | None, rig: Rig) -> tuple[Tensor, bool]:
    """The variance of every view's noise, and whether views were compared; or one sentence."""
    if views is None:
        raise ValueError(
            "'by noise' needs 'views': connect the finished views that are to be weighed, or choose "
            "'by angle'."
        )
    if views.frames.shape[2] != 3:
        raise ValueError("'views' carry depth, not colour: connect the finished pictures.")
    if len(views) != len(rig):
        raise ValueError(
            f"'views' are {len(views)} but the rig has {len(rig)} cameras: connect the rig of these "
            "very views."
        )
    V, frames, _, H, W = views.frames.shape
    # Guessing the masks of a view takes longer than comparing its frames.
    steps = V + frames
    bar = run.progress(steps)
    masks = masks_of_views(views, lambda done, _: bar(done, steps))
    own = views.rig if views.rig is not None else rig.filled(W, H)
    known = replace(views, masks=masks, rig=own)
    return noise_of_views(known, lambda done, total: bar(V + done * frames // total, steps))


class UnseenOnly(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundUnseenOnly",
            display_name="Sample Unseen Only",
            category=CATEGORY,
            description="Masks a latent so that any sampler after it leaves alone what your camera "
            "saw and makes only the rest.",
            inputs=[
                io.Latent.Input("latent", tooltip="What is kept where your camera saw it: the "
                                "partial colours or finished views, from Encode Views."),
                VIEWS.Input("visibility", tooltip="From the Render Conditions of the same views."),
                io.Int.Input("grow", default=1, min=0, max=16,
                             tooltip="Latent pixels (8 or 16 picture pixels) around unseen parts "
                             "of the performer that are made too, so that seams close."),
                io.Combo.Input("background", options=list(get_args(Background)),
                               tooltip="Where nothing of the performer is drawn: keep it, or make "
                               "it too, so that hair and clothes may grow beyond the points."),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="With its mask; for Multi-View "
                                 "Sampler, KSampler or SamplerCustomAdvanced."),
                io.Image.Output(display_name="mask", tooltip="The visibility, orange where it is "
                                "made; one picture a latent frame."),
                io.String.Output(display_name="note", tooltip="How much of every view is made."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, latent, visibility: Views, grow: int, background) -> io.NodeOutput:
        latent = unseen_only(latent, visibility, grow, background, run.progress(len(visibility)))
        mask = latent["noise_mask"]
        made = mask.flatten(1).mean(1).tolist()
        pairs = zip(view_labels(visibility), made, strict=True)
        note = "made anew: " + ", ".join(f"{label} {share:.0%}" for label, share in pairs)
        run.say(cls, note)
        picture = frames_to_image(grid_video(mask_pictures(visibility, mask)))
        return io.NodeOutput(latent, picture, note)


def unseen_only(
    latent: dict,
    visibility: Views,
    grow: int = 1,
    background: Background = "keep",
    on_step: run.Progress | None = None,
) -> dict:
    """The latent with a mask that leaves what the source camera saw as it is."""
    samples = latent["samples"]
    _check_content(samples)
    grid = (len(samples), *samples.shape[2:])
    mask = unseen_mask(visibility, grid, grow, background, on_step).to(samples.device)
    if latent.get("noise_mask") is not None:
        # What another node keeps stays kept.
        other = comfy.utils.reshape_mask(latent["noise_mask"], samples.shape)[:, :1]
        mask = torch.minimum(mask, other.to(mask))
    return {**latent, "noise_mask": mask}


def _check_content(samples: Tensor) -> None:
    """One sentence when there is nothing to keep."""
    if samples.ndim != 5:
        raise ValueError(
            f"'latent' holds pictures (shape {list(samples.shape)}), not videos: connect the "
            "latent of Encode Views."
        )
    if not samples.isfinite().all():
        raise ValueError(
            "'latent' holds NaN or infinity: look at it with Decode Views, and encode the views "
            "again."
        )
    empty = samples.flatten(1).any(1).logical_not().nonzero()[:, 0].tolist()
    if empty:
        which = "'latent' is" if len(empty) == len(samples) else f"Views {empty} of 'latent' are"
        raise ValueError(
            f"{which} empty, so there is nothing to keep: encode 'partial' of Render Conditions "
            "with Encode Views first and connect that."
        )


NODES: list[type[io.ComfyNode]] = [ViewWeightsNode, UnseenOnly]
