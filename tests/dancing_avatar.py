"""A small avatar for the 4D view: a performer's surface, dancing, some of it hardly there."""

from __future__ import annotations

from dataclasses import replace

import torch


def dancing_avatar(count: int, frames: int, fps: float = 8.0, degree: int = 0):  # -> Avatar
    """`count` Gaussians; with harmonics (`degree` 1) its colours shimmer in light that comes from a side."""
    from turnaround.models.avatar import Avatar, SkinMotion
    from turnaround.models.avatar_light import even_light
    from turnaround.models.avatar_mesh import splats_on_body
    from turnaround.models.body_sources import sample_body

    torch.manual_seed(0)
    body = sample_body("kira", "dance_b", torch.arange(frames) / fps + 1.2, 1_000_003, fps)
    body = getattr(body, "body", body)
    splats, places = splats_on_body(body, count, degree=degree)
    sh, light = splats.sh.clone(), even_light(body.rest)
    if degree:
        sh[:, 1:] = 0.15 * torch.randn(1, 3, 3)
        light[1] += 0.4
    opacities = splats.opacities + 1.5 * torch.rand(count)
    return Avatar(replace(splats, sh=sh, opacities=opacities), SkinMotion(body, places, light), fps)
