"""A person in a BVH file, whatever the rig is called (stage: BVH -> motion that any body can take).

Hands, elbows, hips ... are known by their names, as Mixamo, CMU, Rokoko, Xsens, Biped, Poser, Blender
and SMPL exports have them; back and head by how the tree hangs together. The figure must stand once: in
the file's rest pose (T, A, arms down), or, where that is no pose at all, in a frame. From there, turns
are counted; directions of limbs are the file's in any case.

Units don't matter: lengths count against the legs'. The axis nearest to feet -> head is up.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .bvh import Bvh
from .performer import JOINTS, PARENTS, rest_alignment
from .skeleton import ANKLES, Motion, chained, leg_length, nearest_rotations

WORDS = {
    "wrist": ("hand", "wrist"),
    "elbow": ("forearm", "lowerarm", "lowarm", "elbow", "radius"),
    "shoulder": ("upperarm", "uparm", "humerus", "arm", "shldr", "shoulder"),
    "ankle": ("foot", "ankle"),
    "knee": ("lowerleg", "lowleg", "knee", "shin", "calf", "tibia", "leg"),
    "hip": ("upleg", "upperleg", "thigh", "femur", "hip"),
}
"""How names of joints end, without their side; of the same limb, the earlier word is the joint that
is meant (a rig with LeftArm calls the collar bone LeftShoulder)."""
SIDES = {"left": "L", "l": "L", "right": "R", "r": "R"}
SPINE_AT = 0.3
"""Share of the way from hips to neck at which the performers' spine turns."""
STANDING = 0.6
"""What the least upright of back, thighs and shins must have of the vertical, at least."""
UPRIGHT = 0.8
"""The same of the back's mean over a motion, for its up to be believed."""
TRIED_FRAMES = 300
"""Of a long motion, in which a standing figure is looked for."""


@dataclass(frozen=True)
class Person:
    """Which joint of a file is what."""

    numbers: dict[str, int]
    """The performers' joints but pelvis, spine and chest -> number in the file."""
    pelvis: int
    spine: tuple[int, int]
    """Two joints; the spine turns as the mean of both."""
    chest: int


def _spoken(name: str) -> tuple[str, str]:
    """The side ("L", "R" or "") and the rest of a joint's name, in small letters."""
    name = name.rpartition(":")[2]
    words = [w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]
    sides = [SIDES[w] for w in words if w in SIDES]
    rest = "".join(w for w in words if w not in SIDES)
    for word, side in (("left", "L"), ("right", "R")):  # names in one case: lefthand
        if not sides and rest.startswith(word):
            return side, rest.removeprefix(word)
    return (sides[0] if sides else ""), rest


def _word(rest: str) -> str:
    """The longest known word that a name ends with."""
    known = [w for words in WORDS.values() for w in words if rest.endswith(w)]
    return max(known, key=len, default="")


def _limbs(bvh: Bvh) -> dict[str, int]:
    """Joints of arms and legs, by the performers' names."""
    spoken = [_spoken(name) for name in bvh.names]
    ends = [("", "") if bvh.names[j].endswith(" end") else (side, _word(rest))
            for j, (side, rest) in enumerate(spoken)]  # fmt: skip
    found = {}
    for joint, words in WORDS.items():
        for side in "LR":
            there = [ends.index((side, word)) for word in words if (side, word) in ends]
            if there:
                found[f"{joint}.{side}"] = there[0]
    # Files without hands or feet still say where the bone before them ends.
    for near, end in (("elbow", "wrist"), ("knee", "ankle")):
        for side in "LR":
            above = found.get(f"{near}.{side}", -1)
            below = [j for j, parent in enumerate(bvh.parents) if parent == above >= 0]
            if f"{end}.{side}" not in found and below:
                found[f"{end}.{side}"] = below[0]
    return found


def _line(bvh: Bvh, joint: int) -> list[int]:
    """From the root to a joint."""
    line = [joint]
    while bvh.parents[line[-1]] >= 0:
        line.append(bvh.parents[line[-1]])
    return line[::-1]


def _meeting(bvh: Bvh, one: int, other: int) -> int:
    """The nearest joint that both hang on."""
    return [a for a, b in zip(_line(bvh, one), _line(bvh, other), strict=False) if a == b][-1]


def find_person(bvh: Bvh, name: str) -> Person:
    """ValueError naming what was looked for in vain."""
    limbs = _limbs(bvh)
    wanted = [f"{joint}.{side}" for joint in WORDS for side in "LR"]
    missing = [joint for joint in wanted if joint not in limbs]
    if missing:
        listed = ", ".join(f"{SIDE_NAMES[m[-1]]} {m[:-2]}" for m in missing)
        raise ValueError(
            f"'{name}' has no joint that is called like {listed} (its joints: "
            f"{', '.join(n for n in bvh.names if not n.endswith(' end'))[:300]}): name the joints as "
            "Mixamo, CMU, Rokoko or Blender do (LeftArm, LeftForeArm, LeftHand ...)."
        )
    for side in "LR":
        for chain in (("shoulder", "elbow", "wrist"), ("hip", "knee", "ankle")):
            a, b, c = (limbs[f"{joint}.{side}"] for joint in chain)
            if a not in _line(bvh, b)[:-1] or b not in _line(bvh, c)[:-1]:
                raise ValueError(
                    f"In '{name}' the joints {bvh.names[a]}, {bvh.names[b]} and {bvh.names[c]} don't "
                    "hang on one another, so they are no limb: export the deforming skeleton alone."
                )
    pelvis = _meeting(bvh, limbs["hip.L"], limbs["hip.R"])
    chest = _meeting(bvh, limbs["shoulder.L"], limbs["shoulder.R"])
    neck, head = _head(bvh, chest, {limbs["shoulder.L"], limbs["shoulder.R"]})
    return Person(limbs | {"neck": neck, "head": head}, pelvis, _spine(bvh, pelvis, chest), chest)


SIDE_NAMES = {"L": "left", "R": "right"}


def _head(bvh: Bvh, chest: int, shoulders: set[int]) -> tuple[int, int]:
    """Neck and head: by name, or the longest line above the chest that holds no arm; the chest itself
    where there is none."""
    lines = [_line(bvh, j) for j in range(len(bvh.names)) if not bvh.names[j].endswith(" end")]
    above = [line[line.index(chest) + 1 :] for line in lines if chest in line[:-1]]
    above = [line for line in above if not shoulders & set(line)]
    if not above:
        return chest, chest
    named = [line for line in above if _spoken(bvh.names[line[-1]]) == ("", "head")]
    # Collar bones without arms on them have a side; a neck has none.
    plain = [line for line in above if not any(_spoken(bvh.names[j])[0] for j in line)]
    line = named[0] if named else max(plain or above, key=len)
    return (line[-2] if len(line) > 1 else chest), line[-1]


def _spine(bvh: Bvh, pelvis: int, chest: int) -> tuple[int, int]:
    line = _line(bvh, chest)
    line = line[line.index(pelvis) :] if pelvis in line else [_meeting(bvh, pelvis, chest), chest]
    between = line[1:-1]
    if not between:
        return line[0], chest
    rest = bvh.rest()
    ways = (rest[line[1:]] - rest[line[:-1]]).norm(dim=1).cumsum(0)
    begins = ways[:-1] / ways[-1].clamp(min=1e-12)  # of the joints between
    # The neck is about as far above the chest's joint as that is above the hips.
    reached = [j for j, begin in zip(between, begins, strict=True) if begin / 2 <= SPINE_AT]
    chosen = reached[-1] if reached else between[0]
    return chosen, chosen


# ---------------------------------------------------------------- its motion


@dataclass(frozen=True)
class BvhMotion:
    motion: Motion
    note: str


def motion_of_bvh(
    bvh: Bvh,
    name: str,
    times: Tensor,  # [n] seconds from the first frame
    fps: float,
    to_camera: bool,
) -> BvhMotion:
    """The file's person at some times; what is before or after the motion is its first or last pose.

    `to_camera`: turned so that the first of those frames faces the source camera."""
    person = find_person(bvh, name)
    notes = []
    rest, turned = _standing(bvh, person, name, notes)
    place = (times.double() / bvh.seconds).clamp(0, bvh.frame_count - 1)
    low = place.floor().long().clamp(max=max(bvh.frame_count - 2, 0))
    high = (low + 1).clamp(max=bvh.frame_count - 1)
    asked, where = torch.cat([low, high]).unique(return_inverse=True)
    rotations, places = _roles(person, *bvh.pose(asked))
    axes = _axes(rest)
    world = _world_axes(bvh, person, axes, notes)
    figure = rest @ axes.T
    hang = rest_alignment(figure.float()).double()
    bones = torch.zeros_like(figure)
    for j, parent in enumerate(PARENTS[1:], 1):
        bones[j] = hang[parent] @ (figure[j] - figure[parent])
    rotations = world @ rotations @ turned.mT @ axes.T @ hang.mT
    pelvis = places[:, 0] @ world.T
    if not bvh.travels:
        pelvis = _grounded(rotations, bones)
        notes.append("the file holds turns only, so the figure stays on its spot")
    metres = LEGS / leg_length(bones)
    found = Motion(rotations, pelvis * metres, bones * metres, 1 / bvh.seconds)
    motion = found.resampled(where[: len(low)] + (place - low))
    return BvhMotion(_ready(motion, fps, to_camera), "; ".join(notes))


LEGS = 0.86
"""Metres from hip to ankle: the unit of a file is not known, so all figures have the same legs."""


def _ready(motion: Motion, fps: float, to_camera: bool) -> Motion:
    rotations, pelvis = motion.rotations, motion.pelvis
    if to_camera:
        facing = -rotations[0, 0, :, 2]
        if facing[[0, 2]].norm() > 0.3:  # lying figures face up or down
            x, _, z = F.normalize(facing * facing.new_tensor([1.0, 0, 1]), dim=0).tolist()
            turn = rotations.new_tensor([[-z, 0, x], [0, 1, 0], [-x, 0, -z]])
            rotations, pelvis = turn @ rotations, pelvis @ turn.T
    pelvis = pelvis - pelvis[:1] * pelvis.new_tensor([1.0, 0, 1])
    return Motion(rotations.float(), pelvis.float(), motion.bones.float(), fps)


def _roles(
    person: Person,
    rotations: Tensor,  # [n, J, 3, 3]
    places: Tensor,  # [n, J, 3]
) -> tuple[Tensor, Tensor]:  # [n, 17, 3, 3], [n, 17, 3]
    """The performers' 17 joints; places of pelvis, spine and chest spread from hips to neck."""
    n = person.numbers
    own = {name: rotations[:, n[name]] for name in n}
    own |= {"pelvis": rotations[:, person.pelvis], "chest": rotations[:, person.chest]}
    own["spine"] = nearest_rotations(rotations[:, list(person.spine)].mean(1))
    at = {name: places[:, n[name]] for name in n}
    at["pelvis"] = (at["hip.L"] + at["hip.R"]) / 2
    top = (at["shoulder.L"] + at["shoulder.R"]) / 2
    at["spine"], at["chest"] = (torch.lerp(at["pelvis"], top, share) for share in (0.2, 0.5))
    if n["neck"] == person.chest:
        at["neck"] = top
    return torch.stack([own[j] for j in JOINTS], 1), torch.stack([at[j] for j in JOINTS], 1)


def _uprightness(places: Tensor) -> tuple[Tensor, Tensor]:  # [n, 17, 3] -> [n], [n, 3]
    """How straight back, thighs and shins stand over one another: the least of their shares of the
    way from feet to shoulders; and that way."""

    def at(*names: str) -> Tensor:
        return places[:, [JOINTS.index(name) for name in names]].mean(1)

    feet, top = at("ankle.L", "ankle.R"), at("shoulder.L", "shoulder.R")
    up = F.normalize(top - feet, dim=1)
    parts = [top - at("pelvis")]
    for side in "LR":
        hip, knee, ankle = (at(f"{joint}.{side}") for joint in ("hip", "knee", "ankle"))
        parts += [hip - knee, knee - ankle]
    shares = [(F.normalize(part, dim=1) * up).sum(1) for part in parts]
    return torch.stack(shares, 1).amin(1), up


def _standing(
    bvh: Bvh, person: Person, name: str, notes: list[str]
) -> tuple[Tensor, Tensor]:  # [17, 3] places, [17, 3, 3] turns, in the file's axes
    """The figure from which turns are counted."""
    still = torch.eye(3).double().expand(1, len(bvh.names), 3, 3)
    turns, places = _roles(person, still, bvh.rest()[None])
    if _uprightness(places)[0][0] > STANDING:
        return places[0], turns[0]
    step = max(1, bvh.frame_count // TRIED_FRAMES)
    tried = torch.arange(0, bvh.frame_count, step)
    turns, places = _roles(person, *bvh.pose(tried))
    upright, _ = _uprightness(places)
    best = int(upright.argmax())
    # The first frame is meant to be the rest where programs write one.
    best = 0 if upright[0] > 0.95 * upright[best] else best
    if not upright[best] > STANDING:
        raise ValueError(
            f"The figure in '{name}' doesn't stand, neither at rest nor in any frame, so nobody knows "
            "what its turns are counted from: export it with a T-pose as rest or as first frame."
        )
    notes.append(f"the file's rest is no standing pose: frame {int(tried[best])} serves as one")
    return places[best], turns[best]


def _axes(rest: Tensor) -> Tensor:  # [17, 3] -> [3, 3], ours = matrix @ theirs
    """From the axes of a standing figure: its right, the file's axis that is down, its back."""
    _, up = _uprightness(rest[None])
    up = _nearest_axis(up[0])
    left = sum(
        rest[JOINTS.index(f"{joint}.L")] - rest[JOINTS.index(f"{joint}.R")]
        for joint in ("hip", "shoulder")
    )
    left = F.normalize(left - (left * up).sum() * up, dim=0)
    back = torch.linalg.cross(left, -up)
    return torch.stack([left, -up, back])


def _nearest_axis(way: Tensor) -> Tensor:  # [3]
    axis = torch.zeros_like(way)
    axis[way.abs().argmax()] = way[way.abs().argmax()].sign()
    return axis


def _world_axes(bvh: Bvh, person: Person, axes: Tensor, notes: list[str]) -> Tensor:  # [3, 3]
    """The axes in which the motion goes on: those of the rest, but for files whose rest lies in other
    axes than their motion, which are turned upright as their backs are over the motion."""
    step = max(1, bvh.frame_count // TRIED_FRAMES)
    _, places = _roles(person, *bvh.pose(torch.arange(0, bvh.frame_count, step)))
    _, ways = _uprightness(places)
    mean = ways.mean(0)
    up = _nearest_axis(mean)
    if (up * mean).sum() < UPRIGHT or torch.equal(up, -axes[1]):
        return axes
    notes.append("the motion has another axis up than the file's rest: it was turned upright")
    side = _nearest_axis(F.normalize(torch.linalg.cross(up, up.roll(1)), dim=0))
    return torch.stack([side, -up, torch.linalg.cross(side, -up)])


def _grounded(rotations: Tensor, bones: Tensor) -> Tensor:  # [F, 3]
    """Where a pelvis must be for the lower ankle to stay on the ground."""
    pelvis = bones.new_zeros(len(rotations), 3)
    feet = chained(rotations, pelvis, bones)[:, ANKLES, 1]
    pelvis[:, 1] = -feet.amax(1)
    return pelvis
