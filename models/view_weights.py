"""View weights: how much every view counts when views look at each other.

Stage: rig or visibility -> weights of the multi-view attention in its mode `weighted` (MVAnimate:
alpha(m) = softmax over the views m of w(m) <q, k(m)>). A weight multiplies the logits, as if the
view's keys were scaled: 1 leaves a view as it is, less makes the others look at it less sharply, and
close to 0 its pixels all look alike to them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .cameras import Rig
from .cameras_picture import CAMERA, FIRST, INK, PAPER, PERSON, RING, SIZE
from .unseen import check_visibility, states
from .views import Views

LARGEST = 10.0
"""At ten times its logits a view's softmax picks single pixels; more is a typing error."""

LEAST = 0.01
"""However noisy, a view is not left out: for that, it should be picked out."""


@dataclass(frozen=True)
class ViewWeights:
    """One weight a view, in the order of the rig."""

    values: Tensor
    """[V] float32, above 0, at most LARGEST."""
    labels: tuple[str, ...]
    """The rig's labels."""

    def __post_init__(self) -> None:
        if self.values.ndim != 1 or not len(self.values):
            raise ValueError(f"View weights need shape [V], got {list(self.values.shape)}.")
        if len(self.labels) != len(self.values):
            raise ValueError(f"{len(self.values)} view weights have {len(self.labels)} labels.")
        for v, value in enumerate(self.values.tolist()):
            if not 0 < value <= LARGEST:
                raise ValueError(
                    f"The weight of view {v} ({self.labels[v]}) is {value:g}: weights lie above 0 "
                    f"and at most at {LARGEST:g}; write 0.01 for a view that should hardly count."
                )

    def __len__(self) -> int:
        return len(self.values)

    def _comfy_cache_tensors(self) -> list[Tensor]:
        return [self.values]

    def get_ram_usage(self) -> int:
        """Bytes held, for ComfyUI's cache accounting."""
        return self.values.numel() * self.values.element_size()


def weight_of_share(
    share: Tensor,  # [V] 0..1, of what a view shows that the source camera saw
    falloff: float,
) -> Tensor:  # [V] from exp(-falloff) to 1
    """w = exp(-falloff (1 - share)): 1 where all was seen, never 0.

    A falloff of ln(0.25 / 0.1) = 0.92 gives a view of which nothing was seen 0.4 of the weight of
    the source's own, the ratio of side to main views that MVAnimate starts from.
    """
    return torch.exp(-falloff * (1 - share))


def share_by_angle(rig: Rig) -> Tensor:  # [V]
    """The share of a ball's disc that the source camera, far in front of it, sees too.

    (1 + cos angle) / 2, as the phase of the moon: 1 from the front, 0.5 from the side, 0 from
    behind. The angle is that at the performer between the camera and azimuth 0.
    """
    centers = rig.centers.float()
    inside = (centers.norm(dim=1) < 1e-3).nonzero()[:, 0].tolist()
    if inside:
        raise ValueError(
            f"Camera {inside[0]} of the rig stands in the performer's middle, so it has no angle: "
            "move it away, or write the weights as a list."
        )
    return (1 - F.normalize(centers, dim=1)[:, 2]) / 2


def share_by_visibility(visibility: Views) -> Tensor:  # [V]
    """The share of the performer's pixels, over all frames, that the source camera saw."""
    check_visibility(visibility)
    counts = torch.tensor(
        [[int(part.sum()) for part in states(visibility, v)] for v in range(len(visibility))]
    )
    if not counts[:, 1].any():
        raise ValueError(
            "'visibility' shows no performer in any view: connect 'visibility' of a Render "
            "Conditions whose cameras see the performer."
        )
    return counts[:, 0] / counts[:, 1].clamp(min=1)


def weight_of_noise(
    variance: Tensor,  # [V] above 0
    falloff: float,
) -> Tensor:  # [V] from LEAST to LARGEST
    """w = (median variance / variance)^falloff; 1 is MVAnimate's inverse variance."""
    return (variance.median() / variance).pow(falloff).clamp(LEAST, LARGEST)


def weights_of_text(text: str, views: int) -> Tensor:  # [V]
    """'0.25, 0.25, 0.1' as numbers, one a view."""
    parts = [part for part in re.split(r"[,;\s]+", text) if part]
    try:
        values = [float(part) for part in parts]
    except ValueError:
        raise ValueError(
            f"'weight_list' is '{text[:40]}', which is no list of numbers: write one number a view, such as "
            "0.25, 0.25, 0.1, 0.1."
        ) from None
    if len(values) != views:
        raise ValueError(
            f"'weight_list' has {len(values)} numbers but the rig {views} cameras: write one number a "
            "view, in the order of the rig."
        )
    # NaN is no larger than 0 either.
    bad = next((v for v, value in enumerate(values) if not 0 < value < float("inf")), None)
    if bad is not None:
        raise ValueError(
            f"Number {bad + 1} of the {len(values)} in 'weight_list' is {parts[bad]}, but all must be "
            "above 0 and finite: write 0.01 for a view that should hardly count."
        )
    return torch.tensor(values)


def largest_is_one(values: Tensor) -> Tensor:
    """The same ratios; the view that counts most keeps the attention it was trained with."""
    return values / values.amax()


def weight_text(value: float) -> str:
    """Two digits that say something."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


COLUMN, ROWS, TALLEST = 320, 18, 44
"""Of the bars: pixels of a column, rows in it, and pixels of a row where there are few."""


def _disc(draw: ImageDraw.ImageDraw, place: tuple[float, float], radius: float, v: int) -> None:
    """A camera with its number; camera 0 is orange, as in every picture of a rig."""
    x, y = place
    color = FIRST if v == 0 else CAMERA
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=color, outline=PAPER)
    font = ImageFont.load_default(size=max(10, radius))
    draw.text(place, str(v), fill=PAPER, font=font, anchor="mm")


def _draw_turntable(weights: ViewWeights, rig: Rig) -> Image.Image:
    """The rig from above: the larger a camera and the brighter its line, the more it counts."""
    panel = Image.new("RGB", (SIZE, SIZE), PAPER)
    draw = ImageDraw.Draw(panel)
    # From above, the source camera stands at the bottom, as a creator stands before the performer.
    eyes = rig.centers[:, [0, 2]].cpu() * torch.tensor([1.0, -1.0])
    middle = SIZE / 2
    scale = middle / 1.3 / float(eyes.abs().amax().clamp(min=1e-3))
    places = [tuple(place) for place in (middle + eyes * scale).tolist()]
    ring = float(eyes.norm(dim=1).mean()) * scale
    draw.ellipse([middle - ring, middle - ring, middle + ring, middle + ring], outline=RING)
    shares = largest_is_one(weights.values).tolist()
    # The least first, so that what counts most lies on top.
    order = sorted(range(len(weights)), key=lambda v: shares[v])
    for v in order:
        bright = 0.3 + 0.7 * shares[v]
        ends = zip(PAPER, FIRST if v == 0 else CAMERA, strict=True)
        color = tuple(round(dark + (full - dark) * bright) for dark, full in ends)
        draw.line([places[v], (middle, middle)], fill=color, width=1 + round(7 * shares[v]))
    draw.ellipse([middle - 34, middle - 20, middle + 34, middle + 20], fill=PERSON)
    for v in order:
        # The area of a disc grows with the weight.
        _disc(draw, places[v], 8 + 16 * shares[v] ** 0.5, v)
    return panel


def _draw_bars(weights: ViewWeights) -> Image.Image:
    """One labelled bar a view; the largest weight fills its row."""
    columns = -(-len(weights) // ROWS)
    row = min(TALLEST, (SIZE - 44) // min(len(weights), ROWS))
    panel = Image.new("RGB", (columns * COLUMN, SIZE), PAPER)
    draw = ImageDraw.Draw(panel)
    font = ImageFont.load_default(size=15)
    shares = largest_is_one(weights.values).tolist()
    start, room = 120, COLUMN - 120 - 60
    for v, value in enumerate(weights.values.tolist()):
        left, middle = v // ROWS * COLUMN, 36 + (v % ROWS + 0.5) * row
        _disc(draw, (left + 16, middle), 11, v)
        draw.text((left + 34, middle), weights.labels[v][:10], fill=INK, font=font, anchor="lm")
        top, bottom = middle - row / 2 + 4, middle + row / 2 - 4
        draw.rectangle([left + start, top, left + start + room, bottom], fill=RING)
        length = max(2, round(room * shares[v]))
        color = FIRST if v == 0 else CAMERA
        draw.rectangle([left + start, top, left + start + length, bottom], fill=color)
        place = (left + start + room + 8, middle)
        draw.text(place, weight_text(value), fill=INK, font=font, anchor="lm")
    return panel


def weights_picture(weights: ViewWeights, rig: Rig) -> Image.Image:
    """The rig from above and bars beside it."""
    turntable, bars = _draw_turntable(weights, rig), _draw_bars(weights)
    picture = Image.new("RGB", (turntable.width + bars.width, SIZE), PAPER)
    picture.paste(turntable, (0, 0))
    picture.paste(bars, (turntable.width, 0))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=15)
    draw.text((10, 8), "from above", fill=INK, font=font)
    draw.text((turntable.width + 8, 8), "how much every view counts", fill=INK, font=font)
    return picture
