"""A picture of a rig: from above and from the side, cameras numbered, the performer in the middle."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .cameras import Rig

SIZE = 512
INK, PAPER, RING, CAMERA, FIRST, PERSON = (
    (235, 235, 235), (24, 26, 30), (70, 74, 82), (90, 170, 255), (255, 170, 60), (150, 220, 150),
)  # fmt: skip


def _to_panel(points: Tensor, scale: float) -> list[tuple[float, float]]:
    return [(SIZE / 2 + x * scale, SIZE / 2 + y * scale) for x, y in points.tolist()]


def _draw_panel(rig: Rig, axes: tuple[int, int], signs: tuple[int, int], title: str) -> Image.Image:
    """One orthographic look at the rig; `axes` are the world axes drawn right and down."""
    panel = Image.new("RGB", (SIZE, SIZE), PAPER)
    draw = ImageDraw.Draw(panel)
    sign = torch.tensor(signs, dtype=torch.float32)
    eyes = rig.centers[:, axes] * sign
    forward = rig.T_camera_world[:, 2, :3][:, axes] * sign
    reach = float(eyes.abs().amax().clamp(min=1.0)) * 1.25
    scale = SIZE / 2 / reach
    middle = SIZE / 2
    if axes == (0, 2):
        radius = float(eyes.norm(dim=1).mean()) * scale
        draw.ellipse(
            [middle - radius, middle - radius, middle + radius, middle + radius], outline=RING
        )
        draw.ellipse([middle - 0.25 * scale, middle - 0.15 * scale, middle + 0.25 * scale,
                      middle + 0.15 * scale], fill=PERSON)  # fmt: skip
    else:
        draw.rectangle([middle - 0.2 * scale, middle - 0.85 * scale, middle + 0.2 * scale,
                        middle + 0.85 * scale], fill=PERSON)  # fmt: skip
    font = ImageFont.load_default(size=15)
    places = _to_panel(eyes, scale)
    tips = _to_panel(eyes + forward * reach * 0.16, scale)
    for number in reversed(range(len(rig))):
        (x, y), tip = places[number], tips[number]
        color = FIRST if number == 0 else CAMERA
        draw.line([(x, y), tip], fill=color, width=2)
        draw.ellipse([x - 9, y - 9, x + 9, y + 9], fill=color)
        draw.text((x, y), str(number), fill=PAPER, font=font, anchor="mm")
    draw.text((10, 8), title, fill=INK, font=font)
    return panel


def rig_picture(rig: Rig) -> Image.Image:
    """Top view and side view beside each other; camera 0 is orange."""
    picture = Image.new("RGB", (2 * SIZE, SIZE + 28), PAPER)
    # From above, the source camera stands at the bottom, as a creator stands before the performer.
    picture.paste(_draw_panel(rig, (0, 2), (1, -1), "from above"), (0, 0))
    picture.paste(_draw_panel(rig, (2, 1), (1, 1), "from the side"), (SIZE, 0))
    line = (
        f"{len(rig)} views, {rig.width}x{rig.height}, distance "
        f"{float(rig.centers.norm(dim=1).mean()):.2f} m: "
        + "  ".join(f"{number}={label}" for number, label in enumerate(rig.labels))
    )
    font = ImageFont.load_default(size=14)
    ImageDraw.Draw(picture).text((10, SIZE + 5), line[:130], fill=INK, font=font)
    return picture
