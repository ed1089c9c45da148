"""Turntables, and which pictures a subject can be learned from."""

import math

import pytest
import torch
from turnaround.models.cameras import Rig, look_at, merge_rigs, orbit_rig, project
from turnaround.models.subject_pictures import between, evenly, learning_size, turntable, usable

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
    with pytest.raises(ValueError, match="'views' has one picture"):
        usable(full(1), ring(1))
    with pytest.raises(ValueError, match="subject in 1 of 3 pictures: connect masks"):
        usable(full(3) * torch.tensor([1.0, 0, 0])[:, None, None], ring(3))


def test_positive_turns_carry_what_faces_the_camera_to_the_left():
    """As the help page says."""
    rig = turntable(8, W, H)
    pixels, _ = project(torch.tensor([[0.0, 0.0, -0.3]]), rig.select([0, 1]))
    assert float(pixels[0, 0, 0]) == pytest.approx(W / 2, abs=1e-3)
    assert float(pixels[1, 0, 0]) < W / 2 - 1


def test_some_of_a_clip_have_the_cameras_that_they_have_in_all_of_it():
    whole, some = turntable(300, W, H, chosen=range(250)), turntable(300, W, H, chosen=[0, 7, 249])
    assert torch.equal(some.T_camera_world, whole.select([0, 7, 249]).T_camera_world)
    with pytest.raises(ValueError, match="'images' has 300 pictures, and a rig holds 256"):
        turntable(300, W, H)


@pytest.mark.parametrize(("count", "most"), [(200, 30), (31, 30), (30, 30), (3, 30)])
def test_evenly_chosen_ones_are_never_far_apart(count, most):
    chosen = evenly(count, most)
    assert len(chosen) == min(count, most) == len(set(chosen)) and chosen[-1] < count
    gaps = [b - a for a, b in zip(chosen, [*chosen[1:], count], strict=True)]
    assert max(gaps) - min(gaps) <= 1


def test_pictures_are_made_smaller_and_never_larger():
    assert learning_size(1920, 1080, 832) == (832, 464)
    assert learning_size(100, 130, 832) == (96, 128)
    assert learning_size(1080, 1920, 240) == (128, 240)


def test_cameras_between_stand_halfway():
    found, near = between(ring(8), 3)
    assert near == [0, 3, 5]
    step = 2 * math.pi / 8
    for camera, n in zip(found.azimuths.tolist(), near, strict=True):
        off = (camera - n * step + math.pi) % (2 * math.pi) - math.pi
        assert abs(off) == pytest.approx(step / 2, abs=1e-4)
    assert torch.allclose(found.centers.norm(dim=1), torch.tensor(3.0), atol=1e-4)
    # They look at the middle, upright.
    pixels, depth = project(torch.zeros(1, 3), found)
    assert torch.allclose(pixels[:, 0], torch.tensor([W / 2, H / 2]), atol=0.01)
    assert bool((found.T_camera_world[:, 1, 1] > 0.99).all()) and bool((depth > 0).all())


def test_opposite_cameras_have_none_between():
    found, near = between(ring(2), 4)
    assert torch.allclose(found.T_camera_world, ring(2).T_camera_world, atol=1e-4)
    assert near == [0, 1]


def test_masks_that_are_the_wrong_way_round_are_one_sentence():
    with pytest.raises(ValueError, match="'images' are white in all corners .* Invert Mask"):
        usable(1 - full(6), ring(6), "images")


def test_cameras_that_look_away_from_each_other_are_one_sentence():
    rig = ring(4)
    T = rig.T_camera_world.clone()
    T[:, :3] = torch.diag(torch.tensor([-1.0, 1.0, -1.0])) @ T[:, :3]
    with pytest.raises(ValueError, match="don't look at a common place"):
        usable(full(4), Rig(rig.K, T, W, H))
