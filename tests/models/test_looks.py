"""Looks: text there and back, rigs from looks and looks from rigs, what is refused."""

import math

import pytest
import torch
from turnaround.models.cameras import orbit_rig
from turnaround.models.looks import Look, looks_of, read_look

FRONT = Look(0.0, 5.0, 3.0, 35.0, (0.1, -0.2, 0.3))


def test_empty_text_is_what_is_missing():
    assert read_look("", FRONT) == FRONT
    assert read_look(" , ;\n", FRONT) == FRONT


def test_every_part_is_read_in_any_order_and_case():
    text = "at 1 -2.5 .5, FOV 60; distance 2e0\nelevation -10, azimuth +370"
    assert read_look(text, FRONT) == Look(370.0, -10.0, 2.0, 60.0, (1.0, -2.5, 0.5))


def test_what_is_left_out_stays():
    assert read_look("azimuth 90", FRONT) == Look(90.0, 5.0, 3.0, 35.0, FRONT.at)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("left", "'left'"),
        ("azimuth", "'azimuth'"),
        ("azimuth 3 4", "'azimuth 3 4'"),
        ("at 0 0", "'at 0 0'"),
        ("distance 0", "distance 0"),
        ("distance -2", "distance -2"),
        ("fov 170", "fov 170"),
        ("at 1e400 0 0", "too large"),
    ],
)
def test_what_is_no_camera_is_one_sentence(text, word):
    with pytest.raises(ValueError, match=word):
        read_look(text, FRONT)


def test_straight_above_keeps_a_horizon():
    assert read_look("elevation 90", FRONT).elevation == 89


def test_a_look_is_the_orbit_of_its_numbers():
    rig = Look(30.0, 10.0, 2.0, 40.0, (0.1, 0.2, 0.3)).rig(320, 240)
    at = torch.tensor([0.1, 0.2, 0.3])
    same = orbit_rig(
        torch.tensor([math.radians(30)]), torch.tensor([math.radians(10)]), 2.0, math.radians(40),
        320, 240, at,
    )  # fmt: skip
    assert torch.equal(rig.T_camera_world, same.T_camera_world) and torch.equal(rig.K, same.K)
    assert rig.width == 320 and rig.height == 240


def test_looks_of_a_rig_are_its_cameras():
    around = torch.tensor([0.0, 1.0, 2.5, -3.0])
    above = torch.tensor([0.0, 0.4, -0.7, 0.1])
    at = torch.tensor([0.3, -0.1, 0.2])
    rig = orbit_rig(around, above, 2.5, 0.7, 96, 128, at)
    for i, look in enumerate(looks_of(rig, at)):
        again = look.rig(96, 128)
        torch.testing.assert_close(
            again.T_camera_world[0], rig.T_camera_world[i], atol=1e-5, rtol=0
        )
        torch.testing.assert_close(again.K[0], rig.K[i], atol=1e-3, rtol=0)
        assert look.distance == pytest.approx(2.5, abs=1e-5)


def test_a_camera_that_looks_past_the_middle_keeps_its_direction():
    rig = orbit_rig(
        torch.zeros(1), torch.zeros(1), 2.0, 0.7, 96, 128, torch.tensor([0.5, 0.0, 0.0])
    )
    (look,) = looks_of(rig, torch.zeros(3))
    assert look.at == pytest.approx((0.5, 0.0, 0.0), abs=1e-6)
    (behind,) = looks_of(rig, torch.tensor([0.0, 0.0, -9.0]))
    assert behind.distance == 0.1


def test_text_of_a_look_survives():
    text = "azimuth -12.3, elevation 4, distance 2.75, fov 35, at 0.01 -0.9 0"
    assert read_look(text, FRONT).numbers() == [-12.3, 4, 2.75, 35, 0.01, -0.9, 0]
