"""A text for every view: the creator's own, and where the camera stands."""

import math
from typing import get_args

import torch
from comfy.sd import CLIP
from comfy_api.latest import io

from ..models.cameras import Rig
from ..models.view_prompts import Wording, stack_texts, view_prompts
from . import run
from .conditioning import CATEGORY
from .sockets import RIG


class ViewPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundViewPrompts",
            display_name="View Prompts",
            category=CATEGORY,
            description="Encodes your text once a view and says in each where its camera stands: "
            "front view, side view facing left, back view, from above ...",
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the model, such as umt5_xxl."),
                RIG.Input("rig", tooltip="The cameras of the views."),
                io.String.Input("text", multiline=True, default="",
                                tooltip="Your text, the same for all views. The camera's words come "
                                "behind it, or where you write {view}."),
                io.Combo.Input("wording", options=list(get_args(Wording)),
                               tooltip="How sides are told: where the performer looks in the "
                               "picture, which side of the body is seen, or not at all."),
                io.Float.Input("front_azimuth", default=0.0, min=-360.0, max=360.0, step=1.0,
                               optional=True,
                               tooltip="Azimuth in degrees from which the performer is seen from "
                               "the front: 0 when your camera filmed the front, 180 the back."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="conditioning", tooltip="One text a view, for "
                                       "'positive' of the conditioning nodes."),
                io.String.Output(display_name="prompts", tooltip="The text of every view, one a "
                                 "line."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, clip, rig: Rig, text: str, wording: Wording, front_azimuth=0.0
    ) -> io.NodeOutput:
        if clip is None:
            raise ValueError(
                "'clip' is empty, because the loaded checkpoint has no text encoder: connect the "
                "CLIP of a Load CLIP node."
            )
        prompts = view_prompts(rig, text, wording, math.radians(front_azimuth))
        listed = "\n".join(f"{label}: {p}" for label, p in zip(rig.labels, prompts, strict=True))
        return io.NodeOutput(_encoded(clip, prompts), listed)


def _encoded(clip: CLIP, prompts: list[str]) -> list:
    """All prompts as one CONDITIONING, each different one encoded by itself."""
    bar, encoded = run.progress(len(prompts)), {}
    for v, prompt in enumerate(prompts):
        if prompt not in encoded:
            # One entry, or, where another node schedules the text encoder, one for each part.
            encoded[prompt] = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        bar(v + 1, len(prompts))
    return [_one_batch(entries) for entries in zip(*(encoded[p] for p in prompts), strict=True)]


def _one_batch(entries: tuple[list, ...]) -> list:
    """The same entry of every view's CONDITIONING as one of V rows."""
    values = dict(entries[0][1])
    if values.get("pooled_output") is not None:
        values["pooled_output"] = torch.cat([more["pooled_output"] for _, more in entries])
    return [stack_texts([text for text, _ in entries]), values]


NODES: list[type[io.ComfyNode]] = [ViewPrompts]
