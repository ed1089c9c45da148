"""People in BVH files: rigs of many names and rests against motions that are known."""

import math
import sys
from pathlib import Path

import pytest
import torch
from turnaround.models import performer
from turnaround.models.bvh import parse_bvh
from turnaround.models.bvh_motion import LEGS, find_person, motion_of_bvh
from turnaround.models.performer import JOINTS, PARENTS, load_performers
from turnaround.models.skeleton import (
    ANKLES,
    KNEES,
    Motion,
    Skeleton,
    _carried,
    chained,
    leg_length,
    performer_skeleton,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bvh_writer import MIXAMO, Y_UP, Z_UP, bvh_text  # noqa: E402  (beside the tests' folders)

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = {
    "mixamo": tuple(f"mixamorig:{name}" for name in MIXAMO),
    "rokoko": tuple(n.replace("UpLeg", "Thigh").replace("Leg", "Shin") for n in MIXAMO),
    "knees": (
        "Hips", "Chest", "Chest2", "Neck", "Head",
        "LeftShoulder", "LeftElbow", "LeftWrist", "RightShoulder", "RightElbow", "RightWrist",
        "LeftHip", "LeftKnee", "LeftAnkle", "RightHip", "RightKnee", "RightAnkle",
    ),
    "blender": (
        "spine", "spine.001", "spine.003", "spine.004", "spine.006",
        "upper_arm.L", "forearm.L", "hand.L", "upper_arm.R", "forearm.R", "hand.R",
        "thigh.L", "shin.L", "foot.L", "thigh.R", "shin.R", "foot.R",
    ),
    "biped": (
        "Bip01 Pelvis", "Bip01 Spine", "Bip01 Spine1", "Bip01 Neck", "Bip01 Head",
        "Bip01 L UpperArm", "Bip01 L Forearm", "Bip01 L Hand",
        "Bip01 R UpperArm", "Bip01 R Forearm", "Bip01 R Hand",
        "Bip01 L Thigh", "Bip01 L Calf", "Bip01 L Foot",
        "Bip01 R Thigh", "Bip01 R Calf", "Bip01 R Foot",
    ),
    "poser": (
        "hip", "abdomen", "chest", "neck", "head",
        "lShldr", "lForeArm", "lHand", "rShldr", "rForeArm", "rHand",
        "lThigh", "lShin", "lFoot", "rThigh", "rShin", "rFoot",
    ),
    "unreal": (
        "pelvis", "spine_01", "spine_03", "neck_01", "head",
        "upperarm_l", "lowerarm_l", "hand_l", "upperarm_r", "lowerarm_r", "hand_r",
        "thigh_l", "calf_l", "foot_l", "thigh_r", "calf_r", "foot_r",
    ),
    "smpl": (
        "Pelvis", "Spine1", "Spine3", "Neck", "Head",
        "L_Shoulder", "L_Elbow", "L_Wrist", "R_Shoulder", "R_Elbow", "R_Wrist",
        "L_Hip", "L_Knee", "L_Ankle", "R_Hip", "R_Knee", "R_Ankle",
    ),
}  # fmt: skip
KIRA = "kira"


def danced(character: str = KIRA, motion: str = "dance_a") -> tuple[Skeleton, Motion, float]:
    """A performer's own bones and what they do, in all frames of the motion."""
    bank = load_performers()
    seconds = float(bank.tensors[f"motion.{motion}.seconds"])
    count = min(40, len(bank.tensors[f"motion.{motion}.rotations"]))
    rotations, pelvis = performer.sample_motion(bank, motion, torch.arange(count) * seconds)
    index = bank.characters.index(character)
    mean = performer_skeleton()
    joints = bank.tensors["rest_joints"][index]
    skeleton = Skeleton(bank.tensors["rest_vertices"][index].float(), joints, mean.weights)
    return skeleton, Motion(rotations, pelvis, skeleton.hanging()[1], 1 / seconds), seconds


def written(skeleton: Skeleton, motion: Motion, names=MIXAMO, **settings) -> str:
    turns, _ = skeleton.hanging()
    rotations = motion.rotations @ turns
    return bvh_text(
        names, PARENTS, skeleton.joints, rotations, motion.pelvis, 1 / motion.fps, **settings
    )


def read(text: str, motion: Motion, to_camera: bool = False) -> Motion:
    times = torch.arange(len(motion)) / motion.fps
    return motion_of_bvh(parse_bvh(text, "a.bvh"), "a.bvh", times, motion.fps, to_camera).motion


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Millimetres, the largest; the whole clip may stand elsewhere."""
    gap = one - one.mean((0, 1)) - other + other.mean((0, 1))
    return 1000 * float(gap.norm(dim=-1).max())


@pytest.mark.parametrize("axes", [Y_UP, Z_UP])
@pytest.mark.parametrize("unit", [1.0, 100.0, 39.37])
def test_a_performers_own_motion_comes_back_from_its_file(axes, unit):
    skeleton, motion, _ = danced()
    found = read(written(skeleton, motion, axes=axes, unit=unit), motion)
    assert apart(skeleton.posed(found), skeleton.posed(motion)) < 1


@pytest.mark.parametrize("rig", NAMES)
def test_rigs_of_all_names(rig):
    skeleton, motion, _ = danced()
    person = find_person(parse_bvh(written(skeleton, motion, NAMES[rig]), "a.bvh"), "a.bvh")
    order = parse_bvh(written(skeleton, motion), "a.bvh").names
    for joint, name in zip(JOINTS, MIXAMO, strict=True):
        if joint in person.numbers:
            assert person.numbers[joint] == order.index(name), joint
    assert (person.pelvis, person.chest) == (order.index("Hips"), order.index("Spine1"))
    assert person.spine == (order.index("Spine"),) * 2


@pytest.mark.parametrize("degrees", [0, 45, 85])
def test_arms_at_rest_may_stand_anywhere(degrees):
    """T, A and hanging arms: the same motion, counted from another rest."""
    skeleton, motion, _ = danced()
    posed = torch.eye(3).repeat(1, 17, 1, 1)
    for side, sign in (("L", 1), ("R", -1)):
        angle = math.radians(90 - degrees) * sign
        c, s = math.cos(angle), math.sin(angle)
        # About the axis that points forwards, from hanging arms outwards.
        turn = torch.tensor([[c, s, 0], [-s, c, 0], [0, 0, 1]])
        for joint in ("shoulder", "elbow", "wrist"):
            posed[0, JOINTS.index(f"{joint}.{side}")] = turn
    _, bones = skeleton.hanging()
    rest = chained(posed, torch.zeros(1, 3), bones)[0]
    text = bvh_text(MIXAMO, PARENTS, rest, motion.rotations @ posed[0].mT, motion.pelvis, 1 / 30)
    found = read(text, Motion(motion.rotations, motion.pelvis, motion.bones, 30.0))
    assert torch.allclose(found.rotations, motion.rotations, atol=1e-4)


def test_a_rest_that_is_no_pose_is_replaced_by_a_frame_that_stands():
    """Every bone's own axes turned anyhow: such files pile up at rest and stand in frame 0."""
    skeleton, motion, _ = danced()
    _, bones = skeleton.hanging()
    stand = torch.eye(3).repeat(1, 17, 1, 1)
    rotations = torch.cat([stand, motion.rotations])
    pelvis = torch.cat([motion.pelvis[:1], motion.pelvis])
    own, _ = torch.linalg.qr(torch.randn(17, 3, 3, generator=torch.Generator().manual_seed(1)))
    own = own * torch.linalg.det(own)[:, None, None]
    piled = chained(own.mT[None], torch.zeros(1, 3), bones)[0]
    text = bvh_text(MIXAMO, PARENTS, piled, rotations @ own, pelvis, 1 / 30)
    times = (1 + torch.arange(len(motion))) / 30
    made = motion_of_bvh(parse_bvh(text, "a.bvh"), "a.bvh", times, 30.0, False)
    assert "frame 0 serves" in made.note
    assert torch.allclose(made.motion.rotations, motion.rotations, atol=1e-3)


def test_a_file_that_never_stands_is_refused():
    skeleton, motion, _ = danced()
    bent = skeleton.joints.clone()
    for side in "LR":  # as if sitting on the floor, with the legs forwards
        for joint in ("knee", "ankle"):
            j = JOINTS.index(f"{joint}.{side}")
            bent[j] = bent[PARENTS[j]] + torch.tensor([0, 0, -0.4])
    still = torch.eye(3).repeat(4, 17, 1, 1)
    text = bvh_text(MIXAMO, PARENTS, bent, still, torch.zeros(4, 3), 1 / 30)
    with pytest.raises(ValueError, match="doesn't stand"):
        read(text, motion)


def test_it_can_face_the_camera_at_its_first_frame():
    skeleton, motion, _ = danced()
    c, s = math.cos(2.0), math.sin(2.0)
    turn = torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    away = Motion(turn @ motion.rotations, motion.pelvis @ turn.T, motion.bones, motion.fps)
    found = read(written(skeleton, away), motion, to_camera=True)
    front = -found.rotations[0, 0, :, 2]
    assert float(front[0]) == pytest.approx(0, abs=1e-4) and front[2] < -0.5
    straight = read(written(skeleton, motion), motion, to_camera=True)
    assert torch.allclose(found.rotations, straight.rotations, atol=1e-4)
    assert torch.allclose(found.pelvis, straight.pelvis, atol=1e-4)


def test_a_turned_knee_moves_what_hangs_on_it_only():
    skeleton, motion, _ = danced()
    still = motion.rotations[:1].repeat(2, 1, 1, 1)
    bent = still.clone()
    c, s = math.cos(0.8), math.sin(0.8)
    turn = torch.tensor([[1, 0, 0], [0, c, -s], [0, s, c]])
    for joint in ("knee.L", "ankle.L"):
        bent[1, JOINTS.index(joint)] = turn @ bent[1, JOINTS.index(joint)]
    pelvis = motion.pelvis[:1].repeat(2, 1)
    moves = Motion(bent, pelvis, motion.bones, 30.0)
    found = read(written(skeleton, moves), moves)
    change = (found.rotations[1] - found.rotations[0]).flatten(1).norm(dim=1)
    moved = {JOINTS[j] for j in (change > 1e-3).nonzero()[:, 0].tolist()}
    assert moved == {"knee.L", "ankle.L"}


def test_feet_that_stand_do_not_slide_on_other_legs():
    """A dancer who stays over the left foot, on a body with longer thighs and shorter shins."""
    skeleton, motion, _ = danced("ada")
    rotations = motion.rotations
    pelvis = (
        motion.pelvis - chained(rotations, motion.pelvis, motion.bones)[:, JOINTS.index("ankle.L")]
    )
    # The right foot is lifted throughout.
    rotations = rotations.clone()
    c, s = math.cos(1.5), math.sin(1.5)
    lift = rotations[:, JOINTS.index("hip.L")] @ torch.tensor([[1.0, 0, 0], [0, c, s], [0, -s, c]])
    for joint in ("hip.R", "knee.R", "ankle.R"):
        rotations[:, JOINTS.index(joint)] = lift
    stands = Motion(rotations, pelvis, motion.bones, 30.0)
    _, bones = skeleton.hanging()
    bones = bones.clone()
    bones[list(KNEES)] *= 1.2
    bones[list(ANKLES)] *= (leg_length(motion.bones) - float(bones[KNEES[0]].norm())) / float(
        bones[ANKLES[0]].norm()
    )
    feet = chained(rotations, _carried(stands, bones), bones)[:, JOINTS.index("ankle.L")]
    plain = pelvis * leg_length(bones) / leg_length(motion.bones)
    slid = chained(rotations, plain, bones)[:, JOINTS.index("ankle.L")]
    assert (feet - feet[0]).norm(dim=1).max() < 1e-3
    assert (slid - slid[0]).norm(dim=1).max() > 0.02


def test_a_file_of_turns_only_keeps_a_foot_on_the_ground():
    skeleton, motion, _ = danced()
    text = written(skeleton, motion)
    text = text.replace("6 Xposition Yposition Zposition", "3")
    head, numbers = text.split("Frame Time:")
    rows = numbers.split("\n")
    rows = [rows[0], *(" ".join(row.split()[3:]) for row in rows[1:])]
    made = motion_of_bvh(
        parse_bvh(head + "Frame Time:" + "\n".join(rows), "a.bvh"), "a.bvh",
        torch.arange(10) / motion.fps, motion.fps, False,
    )  # fmt: skip
    assert "turns only" in made.note
    found = made.motion
    feet = chained(found.rotations, found.pelvis, found.bones)[
        :, [JOINTS.index("ankle.L"), JOINTS.index("ankle.R")], 1
    ]
    assert torch.allclose(feet.amax(1), torch.zeros(10), atol=1e-4)
    assert torch.equal(found.pelvis[:, [0, 2]], torch.zeros(10, 2))


def test_legs_are_as_long_whatever_the_unit():
    skeleton, motion, _ = danced()
    for unit in (0.01, 1000.0):
        found = read(written(skeleton, motion, unit=unit), motion)
        assert leg_length(found.bones) == pytest.approx(LEGS)
        assert found.bones[list(KNEES)].norm(dim=1).min() > 0.3


def test_names_that_say_nothing_are_refused_in_a_sentence():
    skeleton, motion, _ = danced()
    text = written(skeleton, motion).replace("LeftForeArm", "Bone7").replace("RightUpLeg", "Bone8")
    with pytest.raises(ValueError, match="left elbow, right hip") as error:
        find_person(parse_bvh(text, "a.bvh"), "a.bvh")
    assert "Bone7" in str(error.value) and "'a.bvh'" in str(error.value)


def test_limbs_in_pieces_are_refused_in_a_sentence():
    skeleton, motion, _ = danced()
    text = written(skeleton, motion)
    text = text.replace("LeftForeArm", "?").replace("RightHand", "LeftForeArm")
    text = text.replace("?", "RightHand")
    with pytest.raises(ValueError, match="no limb"):
        find_person(parse_bvh(text, "a.bvh"), "a.bvh")
