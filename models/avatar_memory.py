"""What distilling an avatar needs of memory, before it is tried.

Stage: Distill Avatar. Measured on a CPU as the process's peak over that before (free binding, steps
with gradients and Adam), drawn by numba: 5,000 Gaussians before 128² pixels 14 MiB, 256² 42, 512² 153,
1024² 646; 100,000 Gaussians before 1024² 704, 200,000 854. Drawn by torch alone: 16, 49, 174, 647;
739, 921. CUDA was not measured. Without a body several clouds may take turns: one of them has steps,
all are held.
"""

from __future__ import annotations

from .avatar_free_training import MORE
from .body import Body
from .distilling import Settings
from .views import Views

A_PIXEL, A_GAUSSIAN = 650, 1200
"""Bytes that a step keeps for each, degree 0."""
A_WAITING = 400
"""Bytes of a Gaussian whose turn it isn't, counted and not measured: itself, Adam's two, what it
follows, and its avatar."""
A_COEFFICIENT = 40
"""Bytes a Gaussian for each number of the harmonics above degree 0: itself, its gradient, Adam's two,
and what is drawn with."""
A_VERTEX = 44
"""Bytes a frame that are kept of the skin: places, turns, stretches, normals."""
A_TEXEL, TEXELS = 160, 2 * 128 * 128
"""Bytes a frame of the maps that the net of a body reads, and how many."""
MARGIN = 1.2
LEAST = 1000
"""Gaussians: with fewer nothing is worth learning."""


def _beside(settings: Settings, views: Views, body: Body | None) -> int:
    """Bytes whatever the number of Gaussians."""
    V, F, _, H, W = views.frames.shape
    held = A_PIXEL * H * W + 4 * V * F * H * W  # masks as numbers
    if body is not None:
        held += F * A_VERTEX * len(body.rest)
        held += F * A_TEXEL * TEXELS if settings.detail else 0
    return held


def _each(settings: Settings, views: Views, body: Body | None) -> float:
    """Bytes for each of the settings' Gaussians, however many clouds it will be."""
    numbers = 3 * ((settings.degree + 1) ** 2 - 1)
    learned = A_GAUSSIAN + A_COEFFICIENT * numbers
    if body is not None:
        return learned
    more = min(views.frames.shape[1] ** 0.5, MORE)
    waiting = A_WAITING + A_COEFFICIENT * numbers / 2
    return max(learned, learned / more + (more - 1 / more) * waiting)


def training_bytes(settings: Settings, views: Views, body: Body | None) -> int:
    """At the most Gaussians that the settings allow; beside the views themselves."""
    return int(
        MARGIN * (_beside(settings, views, body) + settings.most * _each(settings, views, body))
    )


def most_that_fit(free: int, settings: Settings, views: Views, body: Body | None) -> int:
    """Gaussians, at most the settings' own. ValueError where not even a few do."""
    room = free / MARGIN - _beside(settings, views, body)
    count = min(settings.most, int(room / _each(settings, views, body)))
    if count < LEAST:
        H, W = views.frames.shape[-2:]
        needed = int(
            MARGIN * (_beside(settings, views, body) + LEAST * _each(settings, views, body))
        )
        raise ValueError(
            f"Distilling 'views' of {W}x{H} needs {needed / 2**20:.0f} MiB of memory at least, and "
            f"{max(free, 0) / 2**20:.0f} MiB are free: lower 'resolution', or end other programs."
        )
    return count
