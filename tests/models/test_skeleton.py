"""Bones in bodies: skinning by formula, motion read back off a skin, bones found in unknown meshes."""

import math
from dataclasses import replace

import pytest
import torch
from turnaround.models import fit_skeleton
from turnaround.models.body import Body
from turnaround.models.body_sources import sample_body
from turnaround.models.performer import JOINTS, load_performers, sample_motion
from turnaround.models.skeleton import (
    Motion,
    Skeleton,
    chained,
    leg_length,
    motion_of,
    nearest_rotations,
    performer_skeleton,
    recognised,
)

pytestmark = pytest.mark.usefixtures("one_thread")
TIMES = 0.3 + torch.arange(5) / 8


def danced(skeleton: Skeleton, motion: str = "dance_a") -> Motion:
    rotations, pelvis = sample_motion(load_performers(), motion, TIMES)
    return Motion(rotations, pelvis, skeleton.hanging()[1], 8.0)


def dressed(character: str, motion: str = "dance_a") -> Body:
    return sample_body(character, motion, TIMES, 1_000_003, 8.0)


def test_hanging_limbs_hang():
    turns, bones = performer_skeleton().hanging()
    still = torch.eye(3).repeat(1, 17, 1, 1)
    joints = chained(still, torch.zeros(1, 3), bones)[0]
    for side in "LR":
        for a, b in (("shoulder", "elbow"), ("elbow", "wrist"), ("hip", "knee"), ("knee", "ankle")):
            way = joints[JOINTS.index(f"{b}.{side}")] - joints[JOINTS.index(f"{a}.{side}")]
            assert torch.allclose(way / way.norm(), torch.tensor([0, 1.0, 0]), atol=1e-6)
    assert torch.allclose(turns @ turns.mT, torch.eye(3).expand(17, 3, 3), atol=1e-6)


def test_a_turned_joint_turns_its_skin_and_what_hangs_on_it_alone():
    skeleton = performer_skeleton()
    turns, bones = skeleton.hanging()
    rotations = turns.mT.repeat(2, 1, 1, 1)  # the rest pose itself
    c, s = math.cos(0.6), math.sin(0.6)
    turn = torch.tensor([[1.0, 0, 0], [0, c, -s], [0, s, c]])
    for name in ("elbow.L", "wrist.L"):
        rotations[1, JOINTS.index(name)] = turn @ rotations[1, JOINTS.index(name)]
    pelvis = skeleton.joints[:1].repeat(2, 1)
    rest, bent = skeleton.posed(Motion(rotations, pelvis, bones, 8.0))
    assert torch.allclose(rest, skeleton.rest, atol=1e-5)
    share = skeleton.weights[:, [JOINTS.index("elbow.L"), JOINTS.index("wrist.L")]].sum(1)
    elbow = skeleton.joints[JOINTS.index("elbow.L")]
    whole = (rest - elbow) @ turn.T + elbow
    assert torch.allclose(bent, rest + share[:, None] * (whole - rest), atol=1e-5)


def test_motion_is_read_back_off_the_skin_that_it_moved():
    skeleton = performer_skeleton()
    motion = danced(skeleton)
    body = Body(skeleton.posed(motion), load_performers().faces, skeleton.rest, fps=8.0)
    found = motion_of(body, skeleton)
    assert torch.allclose(found.rotations, motion.rotations, atol=5e-3)
    assert torch.allclose(found.pelvis, motion.pelvis, atol=5e-4)
    assert leg_length(found.bones) == pytest.approx(leg_length(motion.bones))


def test_larger_legs_take_longer_steps():
    skeleton = performer_skeleton()
    motion = danced(skeleton)
    giant = Skeleton(2 * skeleton.rest, 2 * skeleton.joints, skeleton.weights)
    assert torch.allclose(giant.posed(motion), 2 * skeleton.posed(motion), atol=1e-5)


def test_a_template_may_face_elsewhere():
    skeleton = performer_skeleton()
    motion = danced(skeleton)
    away = torch.diag(torch.tensor([-1.0, 1, -1]))
    turned = Skeleton(skeleton.rest @ away, skeleton.joints @ away, skeleton.weights, away)
    assert torch.allclose(turned.posed(motion), skeleton.posed(motion), atol=1e-5)


def test_moments_between_frames():
    skeleton = performer_skeleton()
    motion = danced(skeleton)
    found = motion.resampled(torch.tensor([-1.0, 1.0, 1.5, 9.0]))
    assert torch.allclose(found.rotations[:2], motion.rotations[[0, 1]], atol=1e-5)
    assert torch.allclose(found.pelvis[2], motion.pelvis[1:3].mean(0))
    assert torch.allclose(found.rotations[3], motion.rotations[-1], atol=1e-5)
    middle = found.rotations[2]
    assert torch.allclose(middle.mT @ middle, torch.eye(3).expand(17, 3, 3), atol=1e-5)


def test_nearest_rotations_mirror_nothing():
    flat = torch.diag(torch.tensor([1.0, 1.0, -0.1]))
    assert torch.allclose(nearest_rotations(flat), torch.eye(3), atol=1e-6)


@pytest.mark.parametrize("character", ["kira", "leo", "hugo"])
def test_the_packs_performers_are_recognised_in_their_clothes(character):
    body = dressed(character)
    bank = load_performers()
    skeleton = recognised(body)
    assert torch.equal(
        skeleton.joints, bank.tensors["rest_joints"][bank.characters.index(character)]
    )
    back = skeleton.posed(motion_of(body, skeleton))
    assert (back - body.vertices).norm(dim=-1).mean() < 0.004


def test_other_builds_are_not_recognised():
    body = dressed("kira")
    wide = replace(body, vertices=body.vertices * torch.tensor([1.1, 1.0, 1.0]))
    assert recognised(wide) is None


def test_bones_are_found_in_a_mesh_that_nobody_knows(monkeypatch):
    """Leo, numbered anew and in a pose of his own at rest, arms hanging, turned away, in centimetres."""
    monkeypatch.setattr(fit_skeleton, "STEPS", 60)
    monkeypatch.setattr(fit_skeleton, "TRIAL_STEPS", 12)
    monkeypatch.setattr(fit_skeleton, "ARMS", (-0.6, 0.0))
    monkeypatch.setattr(fit_skeleton, "FACES", (0.0, 1.0))
    bank = load_performers()
    index = bank.characters.index("leo")
    weights = performer_skeleton().weights
    leo = Skeleton(
        bank.tensors["rest_vertices"][index].float(), bank.tensors["rest_joints"][index], weights
    )
    turns, bones = leo.hanging()
    c, s = math.cos(0.25), math.sin(0.25)
    rotations = torch.eye(3).repeat(1, 17, 1, 1)
    for side, sign in (("L", 1), ("R", -1)):
        for joint in ("shoulder", "elbow", "wrist"):
            out = torch.tensor([[c, sign * s, 0], [-sign * s, c, 0], [0, 0, 1]])
            rotations[0, JOINTS.index(f"{joint}.{side}")] = out
    stand = Motion(rotations, leo.joints[:1], bones, 8.0)
    away = torch.diag(torch.tensor([-100.0, 100, -100]))
    order = torch.randperm(len(weights), generator=torch.Generator().manual_seed(0))
    number = torch.empty_like(order)
    number[order] = torch.arange(len(order))
    found = fit_skeleton.fit_skeleton(leo.posed(stand)[0][order] @ away, number[bank.faces])
    truth = chained(rotations, leo.joints[:1], bones)[0] @ away
    assert (found.joints - truth).norm(dim=1).mean() < 2 and (found.joints - truth).norm(
        dim=1
    ).max() < 5
    assert (found.weights - weights[order]).abs().sum(1).mean() / 2 < 0.03
    assert torch.allclose(found.facing, torch.diag(torch.tensor([-1.0, 1, -1])), atol=1e-6)


def test_what_is_no_upright_person_is_refused(monkeypatch):
    monkeypatch.setattr(fit_skeleton, "STEPS", 5)
    monkeypatch.setattr(fit_skeleton, "TRIAL_STEPS", 5)
    monkeypatch.setattr(fit_skeleton, "ARMS", (0.0,))
    lying = dressed("kira").rest[:, [1, 0, 2]] * torch.tensor([1.0, 1, -1])
    with pytest.raises(ValueError, match="no bones can be found"):
        fit_skeleton.fit_skeleton(lying, load_performers().faces)
