"""Rigs as text: where cameras stand, what is said of wrong lines, and that nothing is lost."""

import math

import pytest
import torch
from turnaround.models.camera_lines import parse_camera_lines, rig_from_lines, rig_to_lines
from turnaround.models.cameras import (
    framing_distance,
    intrinsics,
    look_at,
    merge_rigs,
    orbit_rig,
    project,
)


def orbit(*stands, fov=0.6):
    """[(azimuth, elevation, distance)] in degrees and metres."""
    rigs = [
        orbit_rig(torch.tensor([math.radians(a)]), torch.tensor([math.radians(e)]), d, fov, 96, 128)
        for a, e, d in stands
    ]
    return merge_rigs(rigs)


def test_line_is_a_camera_of_an_orbit():
    rig = rig_from_lines("0 0 3.2\n90 20 4.5 50\n", 35.0, 96, 128)
    torch.testing.assert_close(rig.K[0], intrinsics(math.radians(35), 96, 128))
    torch.testing.assert_close(rig.K[1], intrinsics(math.radians(50), 96, 128))
    torch.testing.assert_close(rig.T_camera_world, orbit((0, 0, 3.2), (90, 20, 4.5)).T_camera_world)
    assert (rig.width, rig.height, rig.names) == (96, 128, ())


def test_positive_azimuth_is_right_and_positive_elevation_above():
    center = rig_from_lines("90 30 2", 35.0, 96, 128).centers[0]
    wanted = torch.tensor([2 * math.cos(math.radians(30)), -1.0, 0.0])
    torch.testing.assert_close(center, wanted, atol=1e-5, rtol=0)


def test_every_camera_looks_at_the_middle():
    rig = rig_from_lines("0 0 3\n200 -40 1.5\n90 90 2\n10 -90 2", 35.0, 96, 128)
    pixels, depth = project(torch.zeros(1, 3), rig)
    torch.testing.assert_close(pixels[:, 0], torch.tensor([48.0, 64.0]).expand(4, 2))
    torch.testing.assert_close(depth[:, 0], torch.tensor([3.0, 1.5, 2.0, 2.0]))


def test_commas_comments_and_empty_lines_are_fine():
    text = "# my rig\n\n 0, 0,3.2 \r\n-45\t1e1 2  # left, low # really\n"
    first, second = parse_camera_lines(text)
    assert (first.azimuth, first.elevation, first.distance, first.fov) == (0, 0, 3.2, None)
    assert (second.azimuth, second.elevation, second.name) == (-45, 10, "left, low # really")


def test_names_become_the_labels_of_the_views():
    rig = rig_from_lines("0 0 3 # front\n90 0 3", 35.0, 96, 128)
    assert rig.labels == ("front", "90°")


@pytest.mark.parametrize("text", ["", " \n\t", "# nothing\n#"])
def test_text_without_cameras(text):
    assert parse_camera_lines(text) == []
    with pytest.raises(ValueError, match="names no camera: write azimuth"):
        rig_from_lines(text, 35.0, 96, 128)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("90 0", "'90 0': write azimuth, elevation and distance"),
        ("90 0 3 35 1", "'90 0 3 35 1': write azimuth"),
        ("right 0 3", "'right 0 3': write azimuth"),
        ("nan 0 3", "'nan 0 3': write azimuth"),
        ("0 0 inf", "'0 0 inf': write azimuth"),
        ("0 91 3", "elevation is 91, but it must lie between -90 and 90"),
        ("0 0 0", "distance is 0, but it must lie between 0.1 and 100"),
        ("0 0 -3", "distance is -3"),
        ("0 0 3 171", "field of view is 171, but it must lie between 1 and 170"),
    ],
)
def test_wrong_line_is_named_in_one_sentence(line, fault):
    with pytest.raises(ValueError) as error:
        parse_camera_lines(f"0 0 3\n# words\n{line}\n")
    assert str(error.value).startswith("Line 3 of 'cameras' is ")
    assert fault in str(error.value) and str(error.value).endswith(".")


def test_too_many_cameras_and_endless_lines_are_short_sentences():
    with pytest.raises(ValueError, match="257 lines with a camera, but a rig has at most 256"):
        parse_camera_lines("0 0 3\n" * 257)
    assert len(parse_camera_lines("0 0 3\n" * 256)) == 256
    with pytest.raises(ValueError) as error:
        parse_camera_lines("9" * 100_000)
    assert len(str(error.value)) < 400


def test_orbit_survives_the_way_through_text():
    rig = orbit((0, 0, 3.2), (359.99999, 12.3456, 1.75), (181.5, -80, 20), fov=math.radians(41.7))
    text, is_whole = rig_to_lines(rig)
    again = rig_from_lines(text, 10.0, 96, 128)
    assert is_whole and text.splitlines()[1].startswith("0 12.3456 1.75 41.7 # ")
    torch.testing.assert_close(again.T_camera_world, rig.T_camera_world, atol=1e-4, rtol=0)
    torch.testing.assert_close(again.K, rig.K, atol=1e-2, rtol=0)
    assert again.labels == rig.labels


def test_what_text_cannot_say_is_told():
    aside = orbit((0, 0, 3.2))
    T = look_at(aside.centers, torch.tensor([0.2, 0.0, 0.0]))
    shifted = aside.K.clone()
    shifted[:, 0, 2] += 3
    for rig in (
        type(aside)(aside.K, T, 96, 128),
        type(aside)(shifted, aside.T_camera_world, 96, 128),
    ):
        text, is_whole = rig_to_lines(rig)
        assert not is_whole and text.startswith("0 0 3.2 ")


def test_camera_inside_the_performer_is_moved_out_and_told():
    rig = orbit((30, 0, 0.02))
    text, is_whole = rig_to_lines(rig)
    assert text.startswith("30 0 0.1 ") and not is_whole


def test_fitting_distance_of_the_page_is_framing_distance():
    """The figure that the browser test holds js/rig_edits.js to."""
    distance = framing_distance(0.35, 0.85, math.radians(35), 192, 240)
    assert math.ceil(distance * 100) / 100 == pytest.approx(3.42)
