"""The animatable route: one picture and a body that moves, as points over time."""

import math
from dataclasses import replace
from typing import get_args

import comfy.model_management as mm
import torch
from comfy_api.latest import io

from ..models.body import Body
from ..models.carry_points import Depth, FarSide, carry_points, centred, same_size
from ..models.cloud_file import finite
from ..models.fit_body import Align, Fit, body_height, fit_body
from ..models.points import OrientedPoints
from . import run
from .geometry import CATEGORY
from .sockets import BODY, CLOUD

MISFIT, DOUBT = 0.06, 0.02
"""Shares of the height: median distance of points and body that is refused, and that gets a word."""
LEAST_OVERLAP, POOR_OVERLAP = 0.4, 0.8
"""What body and performer share in the picture: less is refused, or gets a word. A body in another
pose still shares half."""
POINT_BYTES = 44 * 2
"""Of a point in a frame; as much again while frames are put together."""


class AnimatePoints(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundAnimatePoints",
            display_name="Animate Points",
            category=CATEGORY,
            description="Lets a body that moves carry along what one picture shows: the points of "
            "the picture hang on the body and follow it through all its frames. So one picture and "
            "a motion become a performer in motion, to be seen from every side.",
            inputs=[
                CLOUD.Input("cloud", tooltip="The picture as points: Performer Geometry of a clip "
                            "of one frame."),
                BODY.Input("body", tooltip="The motion: a body from Sample Body, Anny Body, Body "
                           "from SAM 3D Body, Body from Mesh or Load Body."),
                io.Int.Input("fits_frame", default=0, min=0, max=10_000,
                             tooltip="The frame, from 0, in which the body stands as in the "
                             "picture. With 'picture_body' connected: a frame of that one."),
                io.Combo.Input("align", options=list(get_args(Align)),
                               tooltip="How the body is brought to the picture's points: place = "
                               "moved only; size and turn = also sized, and turned about the "
                               "vertical; off = it stands right already."),
                io.Combo.Input("far_side", options=list(get_args(FarSide)),
                               tooltip="What the picture did not show: 'of the body' = the body's "
                               "own surface, in the colours of the seen side; 'of the cloud' = as "
                               "Performer Geometry guessed it, for a body that is only roughly "
                               "like the performer."),
                io.Combo.Input("depth", options=list(get_args(Depth)),
                               tooltip="'near the body' = points that lie far before or behind "
                               "the body are brought to it along the line of sight; hardly "
                               "anything changes where the depth is good. 'as it is' = wide "
                               "skirts and exact depth."),
                BODY.Input("picture_body", optional=True,
                           tooltip="The body as it stands in the picture, of the same mesh (SAM 3D "
                           "Body of the picture). Then no frame of 'body' needs to have the "
                           "picture's pose."),
            ],
            outputs=[
                CLOUD.Output(display_name="cloud", tooltip="The points in every frame of the "
                             "body, for Orbit Rig and Render Conditions."),
                BODY.Output(display_name="body", tooltip="The motion, sized and placed as the "
                            "points are; for Render Body Maps of the same rig."),
                io.String.Output(display_name="note", tooltip="How the body was placed, and how "
                                 "well it fits."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, cloud: OrientedPoints, body: Body, fits_frame: int, align, far_side, depth,
        picture_body: Body | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        if cloud.frame_count != 1:
            raise ValueError(
                f"'cloud' has {cloud.frame_count} frames, but a body carries one picture: give "
                "Performer Geometry a clip of one frame."
            )
        held = _standing(body, fits_frame, picture_body)
        _check_memory(len(cloud.positions), body.frame_count)
        cloud, lost = finite(cloud)
        bar = run.progress(body.frame_count + 1)
        fit = fit_body(cloud, held, fits_frame, align)
        notes = [f"{lost:,} points with NaN or infinity were left out"] if lost else []
        notes.append(_described(fit, fits_frame))
        bar(1, body.frame_count + 1)
        held = fit.body
        motion = held if picture_body is None else same_size(body, held, fits_frame)
        carried = carry_points(
            cloud, held, fits_frame, motion, far_side, depth,
            lambda done, total: bar(done + 1, total + 1),
        )  # fmt: skip
        if picture_body is not None:
            held = replace(held, vertices=held.vertices[fits_frame][None], neutral=None)
        return io.NodeOutput(*centred(carried, motion, held), run.say(cls, "; ".join(notes)))


def _standing(body: Body, frame: int, picture_body: Body | None) -> Body:
    """The body that holds the points in the picture, or a sentence."""
    held, name = (body, "body") if picture_body is None else (picture_body, "picture_body")
    if frame >= held.frame_count:
        raise ValueError(
            f"'fits_frame' is {frame}, but '{name}' has {held.frame_count} frames: use 0 to "
            f"{held.frame_count - 1}."
        )
    if not torch.equal(held.faces, body.faces):
        raise ValueError(
            f"'picture_body' has {held.vertices.shape[1]} vertices and {len(held.faces)} triangles "
            f"but 'body' {body.vertices.shape[1]} and {len(body.faces)}, or in another order: take "
            "both from the same kind of body."
        )
    return held


def _check_memory(points: int, frames: int) -> None:
    need, total = points * frames * POINT_BYTES, mm.get_total_memory(torch.device("cpu"))
    if need > total:
        raise ValueError(
            f"{points:,} points in {frames} frames need {need / 1e9:.0f} GB, but this computer has "
            f"{total / 1e9:.0f} GB: use a smaller picture or a shorter motion."
        )


def _described(fit: Fit, frame: int) -> str:
    """How the body was moved and how well it fits now, or a sentence where it does not fit."""
    metres, share = fit.distance * body_height(fit.body), 100 * fit.overlap
    if fit.distance > MISFIT or fit.overlap < LEAST_OVERLAP:
        raise ValueError(
            f"The body lies {100 * metres:.0f} cm from the picture's points (median) and covers "
            f"{share:.0f} % of the performer in the picture, so it does not stand as the picture "
            "shows: check 'fits_frame', switch 'align' on, or connect 'picture_body'."
        )
    x, y, z = (round(100 * v) for v in fit.stand.place)
    said = [
        f"the body was moved by {x}, {y}, {z} cm (right, down, away), sized by "
        f"{fit.stand.size:.2f} and turned by {round(math.degrees(fit.stand.turn))}°",
        f"it lies {100 * metres:.1f} cm from the picture's points (median) and covers "
        f"{share:.0f} % of the performer in the picture",
    ]
    if fit.distance > DOUBT or fit.overlap < POOR_OVERLAP:
        said.append(f"that is a poor fit: is the body in the picture's pose in frame {frame}?")
    return "; ".join(said)


NODES: list[type[io.ComfyNode]] = [AnimatePoints]
