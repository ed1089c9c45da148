"""Turntables, and which pictures a subject can be learned from."""

import math

import pytest
import torch
from turnaround.models.cameras import Rig, look_at, merge_rigs, orbit_rig
from turnaround.models.subject_pictures import turntable, usable

W, H = 48, 64


def ring(count: int) -> Rig:
    angles = torch.arange(count) * (2 * math.pi / count)
    return orbit_rig(angles, torch.zeros(count), 3.0, 0.7, W, H)


def full(count: int):
    masks = torch.zeros(count, H, W)
    masks[:, 20:40, 20:30] = 1
    return masks


def test_a_whole_turn_never_shows_a_side_twice():
    rig = turntable(8, W, H)
    assert torch.allclose(
        rig.azimuths.diff().remainder(2 * math.pi), torch.tensor(math.pi / 4), atol=1e-5
    )
    assert float((rig.azimuths[-1] - rig.azimuths[0]).abs()) > 0.1


def test_part_of_a_turn_ends_where_it_ends():
    rig = turntable(5, W, H, turns=-0.5, elevation=0.2)
    assert float((rig.azimuths[-1] - rig.azimuths[0]).abs()) == pytest.approx(math.pi, abs=1e-4)
    assert torch.allclose(rig.elevations, torch.tensor(0.2), atol=1e-5)


def test_one_picture_is_no_turn():
    with pytest.raises(ValueError, match="'images' has 1 picture, and a turn needs two"):
        turntable(1, W, H)


def test_good_pictures_are_all_kept():
    found = usable(full(6), ring(6))
    assert found.chosen == list(range(6)) and found.note == ""


def test_what_does_not_show_the_subject_is_left_out_by_number():
    masks = full(6)
    masks[[1, 4]] = 0
    away = look_at(torch.tensor([[0.0, 0.0, -3.0]]), torch.tensor([9.0, 0.0, -3.0]))
    rig = merge_rigs([ring(6), Rig(ring(1).K, away, W, H)])
    found = usable(torch.cat([masks, full(1)]), rig)
    assert found.chosen == [0, 2, 3, 5]
    assert found.note == (
        "left out: pictures 2, 5 without the subject; picture 7 whose camera looks past it"
    )


def test_too_few_pictures_are_one_sentence():
    with pytest.raises(ValueError, match="'references' has one picture"):
        usable(full(1), ring(1))
    with pytest.raises(ValueError, match="subject in 1 of 3 pictures: connect masks"):
        usable(full(3) * torch.tensor([1.0, 0, 0])[:, None, None], ring(3))
