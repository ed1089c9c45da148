"""Stable Background: the performer of every view over one background that holds still."""

import torch
from comfy_api.latest import io
from torch import Tensor

from ..models.background import stable_background
from ..models.relief import check_performer, mask_from_plain_background
from ..models.views import Views, as_pictures, view_labels
from . import run
from .geometry import fit_pictures
from .sockets import VIEWS
from .views import frames_to_image, image_to_frames

CATEGORY = "Turnaround/5 refine"
STILL, FOLLOW = "still", "follow"


class StableBackground(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundStableBackground",
            display_name="Stable Background",
            category=CATEGORY,
            description="Puts the performer of every view over one steady background: what the "
            "frames agree about, cleaned of the performer, of flicker and of swimming. What no "
            "frame shows is painted in, or comes from a picture of yours.",
            inputs=[
                VIEWS.Input("views", tooltip="Colour views of a sampler, of real cameras, or one "
                            "clip; with masks of the performer, unless 'mask' brings them."),
                io.MultiType.Input("mask", types=[VIEWS, io.Mask], optional=True,
                                   tooltip="The performer in white: masks of all frames of the "
                                   "first view, then of the second, ...; or views that carry "
                                   "them. Replaces the masks of the views."),
                io.Image.Input("plate", optional=True,
                               tooltip="Your own background, taken as it is: one picture a view "
                               "(for example the output 'plate' after an inpainting node), or one "
                               "for all."),
                io.Int.Input("grow", default=4, min=0, max=64,
                             tooltip="Pixels around the performer that are not trusted to show "
                             "background: raise it where a ghost or a rim of the performer stays "
                             "in 'plate'."),
                io.Combo.Input("camera", options=[STILL, FOLLOW],
                               tooltip="still: the cameras stand. follow: finds how each camera "
                               "turns or zooms, by its background, and moves the plate with it."),
            ],
            outputs=[
                VIEWS.Output(display_name="views", tooltip="The performer, untouched, over the "
                             "steady background; with the masks that were used."),
                io.Image.Output(display_name="plate", tooltip="The background alone, one picture a "
                                "view. Send it with 'hole' through an inpainting node and back "
                                "into 'plate'."),
                io.Mask.Output(display_name="hole", tooltip="White where no frame ever showed the "
                               "background, one mask a view."),
                io.String.Output(display_name="note", tooltip="How much was painted in, how the "
                                 "cameras move, and what could not be done."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, views: Views, grow: int, camera: str, mask: Views | Tensor | None = None, plate=None
    ) -> io.NodeOutput:
        _check_colour(views)
        notes: list[str] = []
        masks = _masks(views, mask, notes)
        check_performer(masks.flatten(0, 1))
        masked = Views(views.frames, masks, views.rig, views.fps)
        steps = len(views) * views.frames.shape[1]
        result = stable_background(
            masked, grow, camera == FOLLOW, _plate(plate, len(views)), run.progress(steps)
        )
        note = run.say(cls, "; ".join([*notes, *result.notes]))
        steady = Views(result.frames, masks, views.rig, views.fps)
        return io.NodeOutput(steady, frames_to_image(result.plates), result.holes.float(), note)


def _check_colour(views: Views) -> None:
    """One sentence where there is no background to look at."""
    if views.frames.shape[2] != 3:
        raise ValueError("'views' carries depth, not colour: connect the views themselves.")
    if views.frames.dtype == torch.uint8:
        return
    for label, clip in zip(view_labels(views), views.frames, strict=True):
        bad = [f for f, frame in enumerate(clip) if not frame.isfinite().all()]
        if bad:
            raise ValueError(
                f"'views' holds NaN or infinity in view {label}, frames {bad[:5]}: look at them "
                "with Preview Views, and make them again; often the VAE or a half-precision model "
                "is the cause."
            )


def _plate(plate: Tensor | None, views: int) -> Tensor | None:  # [V or 1, 3, h, w]
    """The plate socket, checked."""
    if plate is None:
        return None
    if len(plate) not in (1, views):
        raise ValueError(
            f"'plate' has {len(plate)} pictures but there are {views} views: connect one picture a "
            "view, or a single one for all."
        )
    if not plate.isfinite().all():
        raise ValueError("'plate' holds NaN or infinity: make that picture again.")
    return image_to_frames(plate).float().clamp(0, 1)


def _masks(views: Views, mask: Views | Tensor | None, notes: list[str]) -> Tensor:
    """The performer [V, F, H, W], from the socket, the views, or a plain background."""
    V, count, _, H, W = views.frames.shape
    if mask is None:
        return views.masks if views.masks is not None else _guessed(views, notes)
    if isinstance(mask, Views):
        if mask.masks is None:
            raise ValueError(
                "'mask' is connected to views without masks: connect views that have them, or a "
                "MASK with the performer in white."
            )
        given = mask.masks
    else:
        given = _by_view(mask[None] if mask.ndim == 2 else mask, V, count)
    if tuple(given.shape[:2]) != (V, count):
        raise ValueError(
            f"'mask' has {given.shape[0]} views x {given.shape[1]} frames but 'views' {V} x "
            f"{count}: connect masks of the same views."
        )
    if not given.isfinite().all():
        raise ValueError("'mask' holds NaN or infinity: make it again.")
    flat = fit_pictures("mask", given.flatten(0, 1), (V * count, H, W), notes, "'views'")
    return flat.unflatten(0, (V, count)).clamp(0, 1)


def _by_view(mask: Tensor, V: int, count: int) -> Tensor:  # [N, h, w] -> [V, F, h, w]
    """Masks view after view; a single one is for all frames."""
    if len(mask) == 1:
        return mask.expand(V, count, -1, -1)
    if len(mask) != V * count:
        raise ValueError(
            f"'mask' has {len(mask)} masks but there are {V} views x {count} frames: give one mask "
            "a frame, view after view, or a single one for all."
        )
    return mask.unflatten(0, (V, count))


def _guessed(views: Views, notes: list[str]) -> Tensor:
    """Masks by the plain background of each view."""
    masks = []
    for v, label in enumerate(view_labels(views)):
        masks.append(mask_from_plain_background(as_pictures(views, v)))
        if not 0.005 < float(masks[-1].mean()) < 0.7:
            raise ValueError(
                f"There is no mask, and the background of view {label} is not plain enough to "
                "guess one: connect a 'mask' that shows the performer in white."
            )
    notes.append("there was no mask: it is guessed from the plain background")
    return torch.stack(masks)


NODES: list[type[io.ComfyNode]] = [StableBackground]
