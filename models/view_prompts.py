"""What a text encoder is told of every camera: the creator's text and where the camera stands.

Stage: rig + text -> one prompt a view, and their encodings as one batch.

Which side is which: a camera at azimuth 90 stands at +x, where the performer, who faces the source
camera, has the left hand. So the picture shows the performer's own left side, and in the picture the
performer looks to the left: towards the viewer's left, as in a left-facing portrait. Both wordings
below therefore say "left" from azimuth 0 to 180 and "right" from 180 to 360. "facing" speaks as
captions of pictures do, from the viewer; "own side" names the side of the body that is shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .cameras import Rig

Wording = Literal["facing left or right", "own left or right side", "text alone"]

PLACE = "{view}"
"""Where in the creator's text the camera goes; without it, behind the text."""

AROUND: dict[str, tuple[str, ...]] = {
    "facing left or right": (
        "front view, facing the camera",
        "three-quarter front view, facing {side}",
        "side view in profile, facing {side}",
        "three-quarter back view, turned away and facing {side}",
        "back view, seen from behind",
    ),
    "own left or right side": (
        "view from the front",
        "three-quarter view from the front and the person's {side}",
        "side view from the person's {side}",
        "three-quarter view from behind and the person's {side}",
        "view from behind",
    ),
}
"""By eighths of the circle, from the front to the back."""
ABOVE = ((67.5, "seen from directly {end}"), (35.0, "from {end}"), (12.0, "slightly from {end}"))
"""Degrees of elevation from which on a camera is called so. Below 12 people call it level."""


def view_phrase(
    azimuth: float,  # radians, 0 = where the performer is seen from the front
    elevation: float,  # radians, above the horizon is positive
    wording: Wording = "facing left or right",
) -> str:
    """Where one camera stands, as a prompt says it."""
    # To a thousandth: cameras that a rig puts halfway between two eighths must not be told apart by
    # rounding, since their mirror images aren't.
    turn = round(math.degrees(math.remainder(azimuth, math.tau)), 3)
    tilt = round(math.degrees(elevation), 3)
    eighth = int((abs(turn) + 22.5) // 45)
    around = AROUND[wording][eighth].format(side="left" if turn > 0 else "right")
    end = "above" if tilt > 0 else "below"
    heights = [words.format(end=end) for least, words in ABOVE if abs(tilt) >= least]
    if not heights:
        return around
    # From straight above or below there is no front or side left to speak of.
    return heights[0] if abs(tilt) >= ABOVE[0][0] else f"{around}, {heights[0]}"


def view_prompts(
    rig: Rig,
    text: str,
    wording: Wording = "facing left or right",
    front: float = 0.0,  # radians, azimuth from which the performer is seen from the front
) -> list[str]:
    """One prompt a view: the text, with the camera at its `{view}` or behind it."""
    text = text.strip()
    if wording == "text alone":
        return [text.replace(PLACE, "").strip()] * len(rig)
    prompts = []
    for azimuth, elevation in zip(rig.azimuths.tolist(), rig.elevations.tolist(), strict=True):
        phrase = view_phrase(azimuth - front, elevation, wording)
        if PLACE in text:
            prompts.append(text.replace(PLACE, phrase))
        else:
            prompts.append(", ".join(part for part in (text.rstrip(" ,.;"), phrase) if part))
    return prompts


REPEATS = 4
"""How often a text is repeated at most to make it as long as another (ComfyUI's limit too)."""


def stack_texts(
    texts: Sequence[Tensor],  # of [1, L, C], L may differ
) -> Tensor:  # [V, L, C]
    """Encoded texts as one batch.

    A text that is repeated whole leaves attention to it as it was, so lengths with a small common
    multiple (CLIP's chunks of 77) are made equal so. Others get zeros behind, which is how Wan's text
    encoder itself fills up to 512 tokens.
    """
    lengths = {text.shape[1] for text in texts}
    common = math.lcm(*lengths)
    if common <= REPEATS * min(lengths):
        return torch.cat([text.repeat(1, common // text.shape[1], 1) for text in texts])
    stacked = texts[0].new_zeros(len(texts), max(lengths), texts[0].shape[2])
    for row, text in zip(stacked, texts, strict=True):
        row[: text.shape[1]] = text[0]
    return stacked
