"""How MV-Opt's objective fell, as a picture."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw, ImageFont

from .cameras_picture import INK, PAPER, RING
from .mv_opt_objective import History

WIDTH, HEIGHT, EDGE = 960, 420, 56
CURVE = (255, 170, 60)
COLOURS = ((90, 170, 255), (120, 210, 120), (230, 120, 200), (200, 200, 110))
"""Of the terms, in the order in which the history names them."""


def history_picture(history: History) -> Image.Image:
    """Left: the objective over all steps, logarithmic. Right: its terms before and after."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=15)
    if not history.total:
        draw.text((EDGE, HEIGHT // 2), "nothing was refined", fill=INK, font=font)
        return picture
    _draw_curve(draw, font, history.total)
    _draw_terms(draw, font, history.terms)
    return picture


def _draw_curve(draw: ImageDraw.ImageDraw, font, total: list[float]) -> None:
    left, right, top, bottom = EDGE, WIDTH * 6 // 10, EDGE, HEIGHT - EDGE
    logs = [math.log10(max(value, 1e-12)) for value in total]
    low, high = min(logs), max(logs)
    span = max(high - low, 1e-6)
    draw.rectangle([left, top, right, bottom], outline=RING)
    draw.text((left, 14), "objective (logarithmic), step by step", fill=INK, font=font)
    for value, y in ((high, top), (low, bottom)):
        draw.text((left - 6, y), f"{10**value:.3g}", fill=INK, font=font, anchor="rm")
    draw.text((right, bottom + 8), f"{len(total) - 1} steps", fill=INK, font=font, anchor="ra")
    last = max(1, len(logs) - 1)
    points = [
        (left + (right - left) * n / last, bottom - (bottom - top) * (value - low) / span)
        for n, value in enumerate(logs)
    ]
    draw.line(points if len(points) > 1 else points * 2, fill=CURVE, width=2)


def _draw_terms(draw: ImageDraw.ImageDraw, font, terms: list[dict[str, float]]) -> None:
    left, right, top, bottom = WIDTH * 66 // 100, WIDTH - 20, EDGE, HEIGHT - EDGE
    draw.text((left, 14), "its terms, before and after", fill=INK, font=font)
    largest = max(sum(terms[0].values()), sum(terms[-1].values()), 1e-12)
    width = (right - left) // 5
    for n, (name, found) in enumerate((("before", terms[0]), ("after", terms[-1]))):
        x, y = left + n * (width + 20), float(bottom)
        for colour, value in zip(COLOURS, found.values(), strict=False):
            high = (bottom - top) * value / largest
            draw.rectangle([x, y - high, x + width, y], fill=colour)
            y -= high
        draw.text((x + width / 2, bottom + 8), name, fill=INK, font=font, anchor="ma")
    for n, (colour, name) in enumerate(zip(COLOURS, terms[0], strict=False)):
        y = top + 24 * n
        draw.rectangle([right - 90, y, right - 78, y + 12], fill=colour)
        draw.text((right - 72, y - 2), name, fill=INK, font=font)
