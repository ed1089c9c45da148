"""Another motion for a body, or for the body of an avatar (stage: BODY + motion -> BODY).

The result is of the same mesh as the body, on its template, around the performer's centre over the clip.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from .body import Body
from .fit_skeleton import own_skeleton
from .performer import (
    draw_appearance,
    dressed_rest,
    load_performers,
    surface_colors,
    surface_coordinates,
)
from .reshape_body import reshaped
from .skeleton import (
    Motion,
    Skeleton,
    motion_of,
    performer_skeleton,
    recognised,
)

OnStep = Callable[[], None]


def with_motion(body: Body, motion: Motion, on_step: OnStep = lambda: None) -> Body:
    """A body in its own build, in another motion."""
    vertices = own_skeleton(body, on_step).posed(motion).to(body.vertices)
    return replace(body, vertices=vertices, neutral=None, fps=motion.fps).centred()


def same_mesh(one: Body, other: Body) -> bool:
    return torch.equal(one.faces.cpu(), other.faces.cpu()) and len(one.rest) == len(other.rest)


def moved_like(body: Body, mover: Body, share: float, on_step: OnStep = lambda: None) -> Body:
    """A body in the motion of another one, of any mesh.

    `share`: whose build, 0 = the body's own, 1 = the mover's, as far as the meshes are one; between
    different meshes only bones are common, and the build stays the body's own. Bones are read off both,
    which for the pack's own performers is nearly exact; two other bodies of one mesh have their
    triangles' stretches exchanged (`reshape_body`), which asks nothing about bones."""
    if not same_mesh(body, mover):
        motion = motion_of(mover, own_skeleton(mover, on_step))
        return with_motion(body, motion, on_step)
    theirs = replace(body, vertices=mover.vertices, neutral=None, fps=mover.fps).centred()
    if share == 1:
        return theirs
    bones = recognised(body), recognised(mover)
    if None not in bones:
        vertices = bones[0].posed(motion_of(mover, bones[1]))
        own = replace(theirs, vertices=vertices.to(body.vertices)).centred()
    else:
        own = replace(theirs, vertices=reshaped(mover, body).vertices).centred()
    mixed = torch.lerp(own.vertices, theirs.vertices, share)
    return replace(theirs, vertices=mixed).centred()


def performer_body(character: str, motion: Motion, clothes_seed: int) -> Body:
    """One of the pack's performers, dressed as Sample Body has them, in any motion."""
    bank, look = load_performers(), draw_appearance(clothes_seed)
    rest, joints = dressed_rest(character, look)
    vertices = Skeleton(rest, joints, performer_skeleton().weights).posed(motion)
    colors = surface_colors(surface_coordinates(bank), look)
    return Body(vertices, bank.faces, bank.canonical, colors, fps=motion.fps).centred()
