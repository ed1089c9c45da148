"""Bones in a body, and motion that any such body can take (stage: motion + BODY -> BODY).

All bodies get the performers' 17 joints. A motion says how each joint has turned from a figure that
stands upright, faces the source camera (-z) and lets arms and legs hang straight down; bodies that
rest otherwise (T, A) are first brought there by the smallest turns, so directions of limbs are those
of the motion whatever the rest poses were. Feet are carried to where the motion has them, as much
farther apart as the body is larger: what stands there does not slide here.

Frame: world of the pack (x right, y down, z forward, metres).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .body import Body, vertex_areas
from .performer import JOINTS, PARENTS, load_performers, rest_alignment
from .reshape_body import reshaped

HIPS, ANKLES = (JOINTS.index("hip.L"), JOINTS.index("hip.R")), (
    JOINTS.index("ankle.L"),
    JOINTS.index("ankle.R"),
)  # fmt: skip
KNEES = (JOINTS.index("knee.L"), JOINTS.index("knee.R"))
STANDS = 0.05
"""Metres, of legs one metre long: of feet, one that is so much lower counts e times as much."""
RIGID = 1e-3
"""How much the turn of what belongs to a bone alone counts beside the whole skin's."""
SHAPE_FRAMES, ROUNDS = 16, 3
"""From which a body's build is read, and how often."""
LOOKED_AT = 5
"""One vertex of so many is looked at to recognise somebody."""
SAME_SKIN = 0.0025
"""Metres between the bare skin of a performer and of a body that is this performer."""
HOLD, LOOSE = 1.0, 1e-3
"""How much a joint is held where it is (1 = as much as a bone that turns by 60 degrees pulls), and a
vertex: without, joints slide along bones that turn little."""


@dataclass(frozen=True)
class Motion:
    """How the 17 joints move over F frames."""

    rotations: Tensor
    """[F, 17, 3, 3] from the hanging figure to the world."""
    pelvis: Tensor
    """[F, 3] metres, the middle of the hips."""
    bones: Tensor
    """[17, 3] metres, from the parent to the joint in the hanging figure that moves so; its legs say
    how long steps are."""
    fps: float

    def __len__(self) -> int:
        return len(self.pelvis)

    def resampled(self, places: Tensor) -> Motion:  # [n] frames, may lie between two
        """The motion at other moments; turns along the shortest way, the ends are held."""
        places = places.clamp(0, len(self) - 1)
        low = places.floor().long().clamp(max=max(len(self) - 2, 0))
        high, part = (low + 1).clamp(max=len(self) - 1), (places - low)[:, None]
        mixed = torch.lerp(self.rotations[low], self.rotations[high], part[..., None, None])
        return replace(
            self,
            rotations=nearest_rotations(mixed),
            pelvis=torch.lerp(self.pelvis[low], self.pelvis[high], part),
        )


def nearest_rotations(matrices: Tensor) -> Tensor:  # [..., 3, 3]
    u, _, vh = torch.linalg.svd(matrices)
    signs = torch.ones_like(matrices[..., 0])
    signs[..., 2] = torch.linalg.det(u @ vh)
    return (u * signs[..., None, :]) @ vh


def chained(
    rotations: Tensor,  # [F, 17, 3, 3]
    pelvis: Tensor,  # [F, 3]
    bones: Tensor,  # [17, 3] in the axes that the rotations turn
) -> Tensor:  # [F, 17, 3]
    """Where the joints are."""
    places = [pelvis]
    for j, parent in enumerate(PARENTS[1:], 1):
        places.append(places[parent] + rotations[:, parent] @ bones[j])
    return torch.stack(places, 1)


def leg_length(bones: Tensor) -> float:  # [17, 3] metres
    """From hip to ankle, of both legs' mean."""
    return float(sum(bones[j].norm() for j in (*KNEES, *ANKLES)) / 2)


@dataclass(frozen=True)
class Skeleton:
    """A body at rest with bones in it."""

    rest: Tensor
    """[N, 3] upright, metres."""
    joints: Tensor
    """[17, 3]"""
    weights: Tensor
    """[N, 17] sum 1: how much each vertex follows each joint."""
    facing: Tensor = torch.eye(3)
    """[3, 3] turns it so that it faces -z."""

    def to(self, dtype: torch.dtype) -> Skeleton:
        return Skeleton(*(values.to(dtype) for values in vars(self).values()))

    def hanging(self) -> tuple[Tensor, Tensor]:  # [17, 3, 3], [17, 3]
        """Turns from the rest to the hanging figure, and that figure's bones."""
        turns = rest_alignment(self.joints @ self.facing.T) @ self.facing
        bones = torch.zeros_like(self.joints)
        for j, parent in enumerate(PARENTS[1:], 1):
            bones[j] = turns[parent] @ (self.joints[j] - self.joints[parent])
        return turns, bones

    def posed(self, motion: Motion) -> Tensor:  # [F, N, 3]
        """The body in motion (linear blend skinning)."""
        turns, bones = self.hanging()
        motion = replace(
            motion, **{k: getattr(motion, k).to(bones) for k in ("rotations", "pelvis", "bones")}
        )
        pelvis = _carried(motion, bones)
        places = chained(motion.rotations, pelvis, bones)
        return self.skinned(motion.rotations @ turns, places)

    def skinned(
        self,
        rotations: Tensor,  # [F, 17, 3, 3] from rest to world
        places: Tensor,  # [F, 17, 3] of the joints
    ) -> Tensor:  # [F, N, 3]
        offsets = places - (rotations @ self.joints[:, :, None])[..., 0]
        frames = []
        for turn, offset in zip(rotations, offsets, strict=True):
            blended = (self.weights @ turn.flatten(1)).view(-1, 3, 3)
            frames.append((blended @ self.rest[:, :, None])[..., 0] + self.weights @ offset)
        return torch.stack(frames)


def _carried(motion: Motion, bones: Tensor) -> Tensor:  # [F, 3]
    """The pelvis so that the foot which stands is where the motion has it.

    Hips may be wider than the mover's: by that much feet stay farther apart."""
    size = leg_length(bones) / leg_length(motion.bones)
    theirs = chained(motion.rotations, motion.pelvis, motion.bones)[:, ANKLES] * size
    wider = bones[list(HIPS)] - size * motion.bones[list(HIPS)]
    wanted = theirs + (motion.rotations[:, :1] @ wider[..., None])[..., 0]
    pelvis = size * motion.pelvis
    ours = chained(motion.rotations, pelvis, bones)[:, ANKLES]
    low = theirs[..., 1] / (STANDS * leg_length(bones))  # y is down
    return pelvis + ((wanted - ours) * low.softmax(1)[..., None]).sum(1)


# ---------------------------------------------------------------- of bodies


def performer_skeleton() -> Skeleton:
    """The bones of the mean performer, which is the template of every Sample Body."""
    bank = load_performers()
    joints = bank.tensors["rest_joints"].mean(0)
    return Skeleton(bank.canonical, joints, _bank_weights())


def _bank_weights() -> Tensor:  # [N, 17]
    weights = load_performers().tensors["weights"].float()
    return weights / weights.sum(1, keepdim=True)


def of_performers(faces: Tensor) -> bool:  # [M, 3]
    """Whether a mesh is that of the performers that come with the pack."""
    return torch.equal(faces.cpu(), load_performers().faces)


def motion_of(body: Body, skeleton: Skeleton) -> Motion:
    """What a body does, read off its vertices."""
    turns, bones = skeleton.hanging()
    rotations, places = bone_maps(_seen(body), skeleton, vertex_areas(body.rest, body.faces))
    return Motion(
        (rotations @ turns.double().mT).to(body.vertices), places[:, 0].to(body.vertices), bones,
        body.fps,
    )  # fmt: skip


def _seen(body: Body, most: int | None = None) -> Tensor:  # [F, N, 3] float64
    """All frames, or so many of them, spread over the clip."""
    count = min(most or body.frame_count, body.frame_count)
    return body.vertices[torch.linspace(0, body.frame_count - 1, count).round().long()].double()


def bone_maps(
    vertices: Tensor,  # [F, N, 3] float64
    skeleton: Skeleton,
    shares: Tensor,  # [N] float64, of the skin
) -> tuple[Tensor, Tensor]:  # [F, 17, 3, 3], [F, 17, 3] float64
    """Each bone's turn from rest to world, and where the joint at its head goes.

    Least squares over all of the skin for an affine map a bone, v = sum_j w_j (A_j r + b_j), of which
    the nearest turn is kept: exact for a body that was moved by these weights."""
    weights, J = skeleton.weights.double(), len(JOINTS)
    shares = shares[:, None]
    # Around each bone's joint, so that the last number of its map is where the joint goes.
    arms = F.pad(skeleton.rest.double()[:, None] - skeleton.joints.double(), (0, 1), value=1.0)
    blended = (arms * weights[..., None]).flatten(1)  # [N, 17 * 4]
    alone = RIGID * (shares * weights)[..., None] * arms  # [N, 17, 4]
    square = blended.T @ (shares * blended)
    square = square + torch.block_diag(*torch.einsum("njc,njd->jcd", alone, arms))
    both = (shares * blended + alone.flatten(1)).T
    found = torch.linalg.solve(square, both @ vertices).unflatten(1, (J, 4))
    return nearest_rotations(found[:, :, :3].mT), found[:, :, 3]


def settled(body: Body, skeleton: Skeleton) -> Skeleton:
    """The bones of a body in its own build, from a guess at them.

    By turns: how the bones turn over the clip, where they meet, and what the body at rest must be for
    that."""
    vertices, shares = _seen(body, SHAPE_FRAMES), vertex_areas(body.rest, body.faces)
    for _ in range(ROUNDS):
        rotations, offsets = _maps_of_rest(vertices, skeleton, shares)
        joints = _met(rotations, offsets, skeleton.joints.double())
        skeleton = replace(skeleton, joints=joints.to(skeleton.rest))
        skeleton = _unposed(vertices, rotations, offsets, skeleton)
    return skeleton


def recognised(body: Body) -> Skeleton | None:
    """The bones of a body that is one of the pack's performers, dressed; None = another one."""
    if not of_performers(body.faces):
        return None
    vertices, shares = _seen(body, SHAPE_FRAMES), vertex_areas(body.rest, body.faces)
    known = _nearest_performer(vertices, shares)
    if known is None:
        return None
    return _unposed(vertices, *_maps_of_rest(vertices, known, shares), known)


def _nearest_performer(vertices: Tensor, shares: Tensor) -> Skeleton | None:
    """The one whose bare skin lies on the body's when moved alike. Clothes stand off it, so the nearest
    quarter decides. None = a build of its own."""
    bank, weights = load_performers(), _bank_weights()
    some = slice(None, None, LOOKED_AT)
    seen = vertices[:: max(1, len(vertices) // 3), some]
    found = []
    rests = bank.tensors["rest_vertices"].float()
    for rest, joints in zip(rests, bank.tensors["rest_joints"], strict=True):
        thin = Skeleton(rest[some], joints, weights[some])
        moved = thin.to(torch.float64).skinned(*bone_maps(seen, thin, shares[some]))
        off = (moved - seen).norm(dim=-1).flatten()
        found.append((float(off.kthvalue(len(off) // 4).values), Skeleton(rest, joints, weights)))
    off, skeleton = min(found, key=lambda one: one[0])
    return skeleton if off < SAME_SKIN else None


def _maps_of_rest(
    vertices: Tensor, skeleton: Skeleton, shares: Tensor
) -> tuple[Tensor, Tensor]:  # [F, 17, 3, 3], [F, 17, 3]: world = rotation @ rest + offset
    rotations, places = bone_maps(vertices, skeleton, shares)
    return rotations, places - (rotations @ skeleton.joints.to(places)[:, :, None])[..., 0]


def built_like(body: Body) -> Tensor:  # [N, 3]
    """About the body's own build, standing as its template does."""
    rest = Body(body.rest[None], body.faces, body.rest)
    seen = replace(body, vertices=_seen(body, SHAPE_FRAMES).to(body.vertices), neutral=None)
    return reshaped(rest, seen).vertices[0]


def _met(
    rotations: Tensor,  # [F, 17, 3, 3]
    offsets: Tensor,  # [F, 17, 3]
    joints: Tensor,  # [17, 3]
) -> Tensor:  # [17, 3]
    """The places of the rest that a bone and its parent take to the same place, as nearly as can be;
    where they don't turn against each other, the joint stays."""
    hold = HOLD * len(offsets) * torch.eye(3).to(joints)
    found = joints.clone()
    for j, parent in enumerate(PARENTS[1:], 1):
        apart = rotations[:, j] - rotations[:, parent]
        gap = (offsets[:, parent] - offsets[:, j])[..., None]
        pulled = (apart.mT @ gap).sum(0)[:, 0] + hold @ joints[j]
        found[j] = torch.linalg.solve((apart.mT @ apart).sum(0) + hold, pulled)
    found[0] = found[list(HIPS)].mean(0)
    return found


def _unposed(
    vertices: Tensor,  # [F, N, 3]
    rotations: Tensor,  # [F, 17, 3, 3]
    offsets: Tensor,  # [F, 17, 3]
    skeleton: Skeleton,
) -> Skeleton:
    """The rest that these bones, joined, bring nearest to the vertices: least squares a vertex."""
    exact = skeleton.to(vertices.dtype)
    pelvis = rotations[:, 0] @ exact.joints[0] + offsets[:, 0]
    chain = chained(rotations, pelvis, exact.joints - exact.joints[list(PARENTS)])
    offsets = chain - (rotations @ exact.joints[:, :, None])[..., 0]
    hold = LOOSE * len(vertices)
    square = hold * torch.eye(3).to(vertices).repeat(len(exact.rest), 1, 1)
    pulled = hold * exact.rest
    for turn, offset, seen in zip(rotations, offsets, vertices, strict=True):
        blended = (exact.weights @ turn.flatten(1)).view(-1, 3, 3)
        square += blended.mT @ blended
        pulled = pulled + (blended.mT @ (seen - exact.weights @ offset)[..., None])[..., 0]
    rest = torch.linalg.solve(square, pulled)
    return replace(skeleton, rest=rest.to(skeleton.rest))
