"""BVH files: written by hand, poses by formula, in float64; damaged files in one sentence."""

import math
from pathlib import Path

import pytest
import torch
from turnaround.models.bvh import parse_bvh, read_bvh

ARM = """HIERARCHY
ROOT base
{
  OFFSET 0 1 0
  CHANNELS 6 Xposition Yposition Zposition Zrotation Xrotation Yrotation
  JOINT middle
  {
    OFFSET 2 0 0
    CHANNELS 3 Yrotation Zrotation Xrotation
    End Site
    {
      OFFSET 3 0 0
    }
  }
}
MOTION
Frames: 2
Frame Time: 0.04
0 0 0  0 0 0  0 0 0
10 20 30  90 0 0  0 90 0
"""


def about(axis: str, degrees: float) -> torch.Tensor:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    rows = {
        "x": [[1, 0, 0], [0, c, -s], [0, s, c]],
        "y": [[c, 0, s], [0, 1, 0], [-s, 0, c]],
        "z": [[c, -s, 0], [s, c, 0], [0, 0, 1]],
    }[axis]
    return torch.tensor(rows, dtype=torch.float64)


def places(text: str, frame: int) -> torch.Tensor:
    return parse_bvh(text, "arm.bvh").pose(torch.tensor([frame]))[1][0]


def test_an_arm_of_two_bones_stands_where_the_formula_has_it():
    bvh = parse_bvh(ARM, "arm.bvh")
    assert bvh.names == ("base", "middle", "middle end") and bvh.parents == (-1, 0, 1)
    assert bvh.frame_count == 2 and bvh.seconds == 0.04 and bvh.travels
    assert bvh.rest().tolist() == [[0, 1, 0], [2, 1, 0], [5, 1, 0]]
    # Places of the root stand for its offset. A quarter turn about z takes x to y, another y to -x.
    assert places(ARM, 0).tolist() == [[0, 0, 0], [2, 0, 0], [5, 0, 0]]
    truth = torch.tensor([[10, 20, 30], [10, 22, 30], [7, 22, 30]]).double()
    assert torch.allclose(places(ARM, 1), truth, atol=1e-12)


@pytest.mark.parametrize("order", ["xyz", "xzy", "yxz", "yzx", "zxy", "zyx"])
def test_turns_are_applied_in_the_order_in_which_they_are_listed(order):
    listed = " ".join(f"{axis.upper()}rotation" for axis in order)
    text = ARM.replace("Yrotation Zrotation Xrotation", listed)
    text = text.replace("10 20 30  90 0 0  0 90 0", "0 0 0  0 0 0  20 -50 110")
    rotations, _ = parse_bvh(text, "arm.bvh").pose(torch.tensor([1]))
    truth = about(order[0], 20) @ about(order[1], -50) @ about(order[2], 110)
    assert torch.allclose(rotations[0, 1], truth, atol=1e-12)
    assert torch.equal(rotations[0, 0], torch.eye(3).double())


def test_any_order_of_channels():
    text = ARM.replace(
        "6 Xposition Yposition Zposition Zrotation Xrotation Yrotation",
        "6 Zrotation Zposition Yposition Yrotation Xposition Xrotation",
    ).replace("10 20 30  90 0 0  0 90 0", "90 30 20 0 10 0  0 90 0")
    assert torch.allclose(places(text, 1), places(ARM, 1), atol=1e-12)


def test_a_turn_of_one_joint_moves_its_children_only():
    turned = ARM.replace("10 20 30  90 0 0  0 90 0", "0 0 0  0 0 0  0 35 0")
    before, after = places(turned, 0), places(turned, 1)
    assert torch.equal(before[:2], after[:2]) and (before[2] - after[2]).norm() > 1


def test_spacing_case_lines_and_marks_of_other_programs():
    odd = "\ufeff" + ARM.replace("\n", "\r\n").replace("ROOT base\r\n{", "Root base {")
    odd = odd.replace("10 20 30  90", "10 20 30\r\n 90").replace("MOTION", "Motion\t")
    odd = odd.replace("Frame Time:", "Frame  Time :") + "\r\n\r\n"
    assert torch.equal(places(odd.lstrip("\ufeff"), 1), places(ARM, 1))


def test_a_file_is_read_with_its_byte_order_mark(tmp_path: Path):
    (tmp_path / "a.bvh").write_bytes(b"\xef\xbb\xbf" + ARM.encode())
    assert read_bvh(tmp_path / "a.bvh").frame_count == 2


def test_places_of_children_may_be_added_to_their_offsets():
    six = "CHANNELS 6 Xposition Yposition Zposition Yrotation Zrotation Xrotation"
    text = ARM.replace("CHANNELS 3 Yrotation Zrotation Xrotation", six)
    motion = text.index("0 0 0  0 0 0")
    stands = text[:motion] + "0 0 0 0 0 0 2 0 0 0 0 0\n0 0 0 0 0 0 2 0 0 0 0 0\n"
    added = text[:motion] + "0 0 0 0 0 0 0 0 0 0 0 0\n0 0 0 0 0 0 0 0 0 0 0 0\n"
    assert torch.equal(places(stands, 1), places(added, 1))


def test_unfinished_last_frames_are_left_out():
    assert parse_bvh(ARM + "1 2 3\n", "arm.bvh").frame_count == 2
    assert parse_bvh(ARM.replace("  0 90 0", ""), "arm.bvh").frame_count == 1


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("HIERARCHY", "HIRARCHY", "is no BVH motion"),
        ("MOTION", "", "is no BVH motion"),
        ("OFFSET 2 0 0", "OFFSET 2 0", "'middle' the offset '2 0'"),
        ("OFFSET 2 0 0", "OFFSET 2 0 nan", "not 3 numbers"),
        ("3 Yrotation", "4 Yrotation", "'middle' the channels"),
        ("Yrotation Zrotation Xrotation", "Yrotation Zrotation Wrotation", "Wrotation"),
        ("Frame Time: 0.04", "Frame Time: 0", "how long a frame lasts"),
        ("Frame Time: 0.04\n", "", "how long a frame lasts"),
        ("Frame Time: 0.04", "Frame Time: fast", "how long a frame lasts"),
        ("10 20 30", "10 20 30,5", "decimal signs"),
        ("10 20 30", "10 20 inf", "NaN or infinity"),
        ("}\nMOTION", "}}\nMOTION", "closes more braces"),
        ("ROOT base\n{", "{", "outside of a joint"),
    ],
)  # fmt: skip
def test_damaged_files_in_one_sentence(old, new, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        parse_bvh(ARM.replace(old, new), "arm.bvh")
    assert "'arm.bvh'" in str(error.value)


def test_files_without_frames_in_one_sentence():
    with pytest.raises(ValueError, match="no whole frame of 9 numbers"):
        parse_bvh(ARM[: ARM.index("0 0 0  0 0 0")], "arm.bvh")
