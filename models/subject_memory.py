"""What a step of learning a subject needs of memory, before it is tried.

Stage: Train Subject. Counted, not guessed: what a Wan block of Turnaround-Tiny (width 256, feed-forward
1024) keeps for its gradient is 14.7 numbers a channel and token while its weights stand still, 1.2 when
it is computed anew on the way back.
"""

from __future__ import annotations

from dataclasses import dataclass

from .feature_field import KEPT, SAMPLES
from .subject import FINE_SAMPLES, RAYS, Shape

BLOCK, ANEW = 10.7, 1.2
"""Numbers a token and channel that a block keeps: beside the feed-forward's own; computed anew."""
COPIES = 4
"""Of what is learned, in float32: itself, its gradient, Adam's two."""
A_PLACE = 2200
"""Bytes that a field keeps for each of the places x references that are looked at (2,130 to 2,490 with
eight to three references)."""
MARGIN = 1.2


@dataclass(frozen=True)
class Backbone:
    """What of a DiT determines the memory."""

    width: int
    feed_forward: int
    depth: int
    """Blocks."""
    item: int
    """Bytes of a number."""


def step_bytes(
    backbone: Backbone,
    shape: Shape,
    learned: int,  # numbers that are learned
    pictures: int,  # whose features are kept
    targets: int,
    references: int,  # of a step
    tokens: int,  # of a picture
    anew: bool,  # blocks are computed anew on the way back
) -> int:
    """Beside the model's own weights."""
    here = targets * tokens * backbone.item
    whole = (BLOCK * backbone.width + backbone.feed_forward) * here
    blocks = backbone.depth * (ANEW * backbone.width * here if anew else whole)
    features = (
        len(shape.blocks) * (pictures + 2 * targets) * tokens * backbone.width * backbone.item
    )
    on_the_way = whole  # of the block whose gradient is being made
    rays = ((SAMPLES, 1), (FINE_SAMPLES, RAYS**2)) if shape.blocks else ()
    places = sum(min(KEPT, references * samples * n * tokens) for samples, n in rays)
    fields = targets * places * A_PLACE
    return int(MARGIN * (blocks + on_the_way + features + fields) + COPIES * 4 * learned)
