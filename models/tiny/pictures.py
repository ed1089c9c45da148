"""Procedural training pictures: shapes with edges, gradients and fabric-like patterns.

They widen what the tiny VAE has seen beyond the synthetic people: flat, striped, checked and noisy
regions, hard and soft edges, and normal-map-like shading.
"""

from __future__ import annotations

import cv2
import numpy as np


def _pattern(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(8, 48)
    u = x * np.cos(angle) + y * np.sin(angle)
    v = -x * np.sin(angle) + y * np.cos(angle)
    a, b = rng.uniform(0, 1, 3), rng.uniform(0, 1, 3)
    kind = rng.choice(6, p=[0.4, 0.12, 0.06, 0.16, 0.06, 0.2])
    if kind == 0:
        t = np.zeros_like(u)
    elif kind == 1:
        t = (np.sin(2 * np.pi * u / period) > 0).astype(np.float32)
    elif kind == 2:
        t = ((np.sin(2 * np.pi * u / period) > 0) ^ (np.sin(2 * np.pi * v / period) > 0)) * 1.0
    elif kind == 3:
        t = 0.5 + 0.5 * np.sin(2 * np.pi * u / (2 * period))
    elif kind == 4:
        t = (((u % period) - period / 2) ** 2 + ((v % period) - period / 2) ** 2) < period**2 / 9
    else:
        t = (u - u.min()) / (np.ptp(u) + 1e-6)
    picture = a + (b - a) * np.asarray(t, np.float32)[..., None]
    return picture + rng.normal(0, rng.choice([0, 0.01]), picture.shape)


def _blob(rng: np.random.Generator, size: int) -> np.ndarray:
    mask = np.zeros((size, size), np.float32)
    centre = rng.integers(0, size, 2).tolist()
    if rng.random() < 0.6:
        axes = rng.integers(2, max(3, size // 3), 2).tolist()
        cv2.ellipse(mask, centre, axes, rng.uniform(0, 180), 0, 360, 1.0, -1, cv2.LINE_AA)
    else:
        corners = (np.array(centre) + rng.normal(0, size / 4, (rng.integers(3, 6), 2))).astype(int)
        cv2.fillPoly(mask, [corners], 1.0, cv2.LINE_AA)
    return mask


def _normal_shading(rng: np.random.Generator, size: int) -> np.ndarray:
    height = cv2.GaussianBlur(
        rng.normal(0, 1, (size, size)).astype(np.float32), (0, 0), rng.uniform(3, 10)
    )
    gy, gx = np.gradient(height / (height.std() + 1e-6))
    normal = np.stack([-gx * 3, gy * 3, np.ones_like(gx)], -1)
    return 0.5 + 0.5 * normal / np.linalg.norm(normal, axis=-1, keepdims=True)


def procedural_picture(
    rng: np.random.Generator,
    size: int,
) -> np.ndarray:  # [size, size, 3] float32, 0..1
    """One random picture."""
    background = rng.choice([0.5, 0.0, 1.0]) if rng.random() < 0.5 else None
    picture = (
        np.full((size, size, 3), background) if background is not None else _pattern(rng, size)
    )
    for _ in range(rng.integers(1, 9)):
        mask = _blob(rng, size)[..., None]
        if rng.random() < 0.3:
            mask = cv2.GaussianBlur(mask, (0, 0), rng.uniform(0.5, 3))[..., None]
        kind = rng.random()
        fill = (
            _normal_shading(rng, size)
            if kind < 0.25
            else np.zeros(3)
            if kind < 0.35
            else _pattern(rng, size)
        )
        shade = 1 - rng.uniform(0, 0.5) * np.linspace(0, 1, size)[:, None, None]
        picture = picture * (1 - mask) + fill * shade * mask
    return picture.clip(0, 1).astype(np.float32)
