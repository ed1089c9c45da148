"""View prompts: which side a camera sees, in words, and texts of several lengths as one batch."""

import math

import pytest
import torch
import torch.nn.functional as F
from turnaround.models.cameras import merge_rigs, orbit_rig, project
from turnaround.models.view_prompts import stack_texts, view_phrase, view_prompts

FACING, OWN = "facing left or right", "own left or right side"


def rig_at(*degrees: float, elevation: float = 0.0):
    azimuths = torch.tensor([math.radians(d) for d in degrees])
    elevations = torch.full_like(azimuths, math.radians(elevation))
    return orbit_rig(azimuths, elevations, 3.0, 0.6, 64, 64)


def phrase(azimuth: float, elevation: float = 0.0, wording=FACING) -> str:
    return view_phrase(math.radians(azimuth), math.radians(elevation), wording)


@pytest.mark.parametrize("azimuth", [*range(-175, 0, 10), *range(5, 180, 10)])
def test_words_tell_what_the_picture_of_a_camera_shows(azimuth):
    """A performer who looks at azimuth 0, with the left hand at +x, projected into the camera."""
    chest, nose = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, -0.3])
    left_hand, right_hand = torch.tensor([0.5, 0.0, 0.0]), torch.tensor([-0.5, 0.0, 0.0])
    pixels, depth = project(torch.stack([chest, nose, left_hand, right_hand]), rig_at(azimuth))
    looks = float(pixels[0, 1, 0] - pixels[0, 0, 0])  # > 0: to the right of the picture
    turned_away = float(depth[0, 1] - depth[0, 0])  # > 0: the nose is behind the chest
    nearer = "left" if depth[0, 2] < depth[0, 3] else "right"
    words = phrase(azimuth)
    turn = abs(azimuth)
    if 22.5 < turn < 157.5:
        assert f"facing {'right' if looks > 0 else 'left'}" in words
        assert f"person's {nearer}" in phrase(azimuth, wording=OWN)
        assert ("away" in words) == (turned_away > 0 and turn > 112.5)
    else:
        assert ("behind" in words) == (turned_away > 0)
        assert "left" not in words and "right" not in words


def test_azimuth_90_sees_the_performers_left_and_a_picture_that_faces_left():
    assert phrase(90) == "side view in profile, facing left"
    assert phrase(-90) == phrase(270) == "side view in profile, facing right"
    assert phrase(90, wording=OWN) == "side view from the person's left"


def test_eighths_of_the_circle_are_told_apart_and_mirrored():
    eighths = [phrase(a) for a in range(0, 360, 45)]
    assert len(set(eighths)) == 8
    for azimuth in range(0, 181, 3):
        mirrored = phrase(azimuth).replace("left", "right")
        assert phrase(-azimuth) == (phrase(azimuth) if azimuth in (0, 180) else mirrored)


def test_views_halfway_between_two_eighths_are_mirrored_too():
    """16 cameras stand at 22.5 degrees; their float32 azimuths lie on both sides of it."""
    rig = rig_at(*(22.5 * i for i in range(16)))
    told = view_prompts(rig, "")
    for i in range(1, 8):
        assert told[16 - i] == told[i].replace("left", "right")


@pytest.mark.parametrize(
    ("elevation", "words"),
    [
        (0, "side view in profile, facing left"),
        (11, "side view in profile, facing left"),
        (20, "side view in profile, facing left, slightly from above"),
        (-20, "side view in profile, facing left, slightly from below"),
        (45, "side view in profile, facing left, from above"),
        (-60, "side view in profile, facing left, from below"),
        (80, "seen from directly above"),
        (-90, "seen from directly below"),
    ],
)
def test_height_is_told_where_it_shows(elevation, words):
    assert phrase(90, elevation) == words
    assert view_prompts(rig_at(90, elevation=elevation), "") == [words]


def test_front_camera_may_stand_elsewhere():
    rig = rig_at(0, 90, 180, 270)
    turned = view_prompts(rig, "", front=math.radians(90))
    assert turned == [view_prompts(rig_at(a), "")[0] for a in (-90, 0, 90, 180)]


def test_camera_stands_behind_the_text_or_at_its_place():
    rig = rig_at(180)
    assert view_prompts(rig, " A dancer. ") == ["A dancer, back view, seen from behind"]
    assert view_prompts(rig, "a {view} of a dancer", OWN) == ["a view from behind of a dancer"]
    assert view_prompts(rig, "") == ["back view, seen from behind"]


def test_text_alone_is_the_same_for_all_views():
    rig = merge_rigs([rig_at(0, 90), rig_at(0, elevation=60)])
    assert view_prompts(rig, "a dancer {view}", "text alone") == ["a dancer"] * 3


# --- texts as one batch ---------------------------------------------------------------------------


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_texts_of_one_length_are_stacked():
    texts = [draw(1, 5, 8, seed=s) for s in range(3)]
    assert torch.equal(stack_texts(texts), torch.cat(texts))


def test_repeated_text_is_attended_to_as_before():
    texts = [draw(1, length, 8, seed=length) for length in (4, 6)]
    stacked, query = stack_texts(texts), draw(1, 3, 8)
    assert stacked.shape == (2, 12, 8)
    for text, row in zip(texts, stacked, strict=True):
        before = F.scaled_dot_product_attention(query, text, text)
        after = F.scaled_dot_product_attention(query, row[None], row[None])
        torch.testing.assert_close(after, before, atol=1e-12, rtol=1e-12)


def test_lengths_without_a_small_common_multiple_get_zeros_behind():
    texts = [draw(1, length, 8, seed=length) for length in (5, 7)]
    stacked = stack_texts(texts)
    assert stacked.shape == (2, 7, 8)
    assert torch.equal(stacked[0, :5], texts[0][0]) and not stacked[0, 5:].any()
    assert torch.equal(stacked[1], texts[1][0])
