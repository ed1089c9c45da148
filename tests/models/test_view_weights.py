"""View weights and unseen masks: the formulas, their limits, and what is refused in one sentence."""

import math
from dataclasses import replace

import pytest
import torch
from einops import rearrange
from turnaround.models.cameras import Rig, intrinsics, orbit_rig
from turnaround.models.geometry import EMPTY, SEEN, UNSEEN_SIDE, render_conditions
from turnaround.models.points import OrientedPoints
from turnaround.models.unseen import grown, kept_latents, mask_pictures, unseen_mask
from turnaround.models.view_noise import noise_of_views
from turnaround.models.view_weights import (
    LARGEST,
    LEAST,
    ViewWeights,
    largest_is_one,
    share_by_angle,
    share_by_visibility,
    weight_of_noise,
    weight_of_share,
    weight_text,
    weights_of_text,
    weights_picture,
)
from turnaround.models.views import Views

pytestmark = pytest.mark.usefixtures("one_thread")


def ring(views: int, width: int = 16, height: int = 16, elevation: float = 0.0) -> Rig:
    azimuths = torch.arange(views) * (2 * math.pi / views)
    return orbit_rig(azimuths, torch.full((views,), elevation), 3.0, 0.6, width, height)


def visibility_of(states: torch.Tensor, rig: Rig | None = None) -> Views:
    """[V, F, H, W] bytes as Render Conditions gives them."""
    frames = states.to(torch.uint8)[:, :, None].expand(-1, -1, 3, -1, -1)
    return Views(frames, states == SEEN, rig)


def refusal(call) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".") and ". " not in text and "\n" not in text, "not one sentence"
    return text


# --- weights --------------------------------------------------------------------------------------


def test_share_by_angle_is_the_phase_of_the_moon():
    rig = ring(8)
    expected = [(1 + math.cos(math.radians(45 * v))) / 2 for v in range(8)]
    assert share_by_angle(rig).tolist() == pytest.approx(expected, abs=1e-6)


def test_angle_is_that_in_space():
    """60 degrees up and 60 around: cos = cos 60 cos 60."""
    angles = torch.tensor([math.pi / 3])
    rig = orbit_rig(angles, angles, 2.0, 0.6, 16, 16)
    assert float(share_by_angle(rig)) == pytest.approx((1 + 0.25) / 2, abs=1e-6)


def test_measured_share_of_a_ball_is_that_by_angle():
    """The formula by angle is exact for a ball seen from afar; here it is drawn and counted."""
    n = torch.arange(20_000) + 0.5
    polar, around = torch.acos(1 - 2 * n / len(n)), n * (math.pi * (1 + 5**0.5))
    normals = torch.stack(
        [polar.sin() * around.cos(), polar.cos(), polar.sin() * around.sin()], dim=1
    )
    # The source camera stands at -z.
    front = (normals[:, 2] < 0).float()
    count = len(normals)
    ball = OrientedPoints(
        normals * 0.5, normals, torch.ones(count, 3), torch.full((count,), 0.01), front,
        torch.tensor([0, count]), orbit_rig(torch.zeros(1), torch.zeros(1), 50.0, 0.03, 64, 64),
    )  # fmt: skip
    angles = torch.arange(5) * (math.pi / 4)
    rig = orbit_rig(angles, torch.zeros(5), 50.0, 0.03, 64, 64)
    drawn = visibility_of(render_conditions(ball, rig).visibility)
    # Measured: 0.0018 at most.
    torch.testing.assert_close(share_by_visibility(drawn), share_by_angle(rig), atol=5e-3, rtol=0)


def test_share_by_visibility_counts_the_performer_alone():
    states = torch.full((3, 2, 4, 4), EMPTY)
    states[0, :, 0] = SEEN
    states[1, 0, 0], states[1, 1, 0] = SEEN, UNSEEN_SIDE
    states[1, 1, 1] = UNSEEN_SIDE
    # 8 of 8, 4 of 12, and a view that sees nobody.
    assert share_by_visibility(visibility_of(states)).tolist() == pytest.approx([1, 1 / 3, 0])


def test_floats_are_read_as_bytes_are():
    states = torch.tensor([SEEN, UNSEEN_SIDE, EMPTY, SEEN])[:, None, None].expand(1, 1, 4, 4, 4)[0]
    views = visibility_of(states)
    floats = Views(views.frames.float() / 255)
    assert share_by_visibility(floats).equal(share_by_visibility(views))


def test_weights_fall_from_one_to_exp_of_minus_the_falloff():
    share = torch.linspace(0, 1, 11)
    weights = weight_of_share(share, 2.0)
    assert float(weights[-1]) == 1 and float(weights[0]) == pytest.approx(math.exp(-2))
    assert (weights.diff() > 0).all()
    assert weight_of_share(share, 0.0).equal(torch.ones(11))
    # The ratio of MVAnimate's side views to its main ones.
    assert float(weight_of_share(torch.zeros(1), math.log(2.5))) == pytest.approx(0.1 / 0.25)


def test_list_of_numbers():
    assert weights_of_text("0.25, 0.25;0.1\n 1e-1", 4).tolist() == pytest.approx(
        [0.25, 0.25, 0.1, 0.1]
    )
    assert largest_is_one(torch.tensor([0.25, 0.1])).tolist() == pytest.approx([1.0, 0.4])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("0.25, 0.25, 0.1", ["3 numbers", "4 cameras"]),
        ("1,1,1,1,1", ["5 numbers", "4 cameras"]),
        ("", ["0 numbers", "4 cameras"]),
        ("1, -1, 1, 1", ["Number 2 of the 4", "-1"]),
        ("1, 1, nan, 1", ["Number 3 of the 4", "nan"]),
        ("inf, 1, 1, 1", ["Number 1 of the 4", "inf"]),
        ("1, 1, 1, 0", ["Number 4 of the 4", "above 0"]),
        ("a lot, little", ["'a lot, little'", "no list of numbers"]),
    ],
)
def test_lists_that_do_not_fit_are_refused_in_one_sentence(text, parts):
    said = refusal(lambda: weights_of_text(text, 4))
    assert all(part in said for part in parts), said


@pytest.mark.parametrize(
    ("values", "labels", "part"),
    [
        (torch.ones(2, 2), ("a", "b"), "[2, 2]"),
        (torch.ones(0), (), "[0]"),
        (torch.ones(2), ("a",), "2 view weights have 1 labels"),
        (torch.tensor([1.0, 0.0]), ("a", "b"), "view 1 (b) is 0"),
        (torch.tensor([1.0, float("nan")]), ("a", "b"), "view 1 (b) is nan"),
        (torch.tensor([LARGEST + 1, 1.0]), ("a", "b"), "view 0 (a) is 11"),
    ],
)
def test_weights_are_checked_when_made(values, labels, part):
    with pytest.raises(ValueError) as caught:
        ViewWeights(values, labels)
    assert part in str(caught.value)


def test_weights_report_what_they_hold():
    weights = ViewWeights(torch.ones(5), tuple("abcde"))
    assert len(weights) == 5 and weights.get_ram_usage() == 20
    assert weights._comfy_cache_tensors()[0] is weights.values


def test_camera_inside_the_performer_has_no_angle():
    rig = Rig(intrinsics(0.6, 16, 16)[None], torch.eye(4)[None], 16, 16)
    assert "Camera 0 of the rig" in refusal(lambda: share_by_angle(rig))


def test_visibility_without_a_performer_is_refused():
    nobody = visibility_of(torch.zeros(2, 1, 4, 4))
    assert "no performer in any view" in refusal(lambda: share_by_visibility(nobody))


@pytest.mark.parametrize("count", [1, 8, 40])
def test_picture_has_a_bar_as_long_as_its_weight(count):
    rig = ring(count)
    values = torch.linspace(1, 0.25, count)
    picture = weights_picture(ViewWeights(values, rig.labels), rig)
    assert picture.height == 512
    if count == 8:
        # Middle rows of the first and the last bar: of the room's 140 pixels all, and a quarter.
        blue, orange = (90, 170, 255), (255, 170, 60)
        pixels = [[picture.getpixel((x, y)) for x in range(632, 773)] for y in (46, 354)]
        assert pixels[0].count(orange) == 141 and pixels[1].count(blue) == 36


def test_numbers_are_short_but_never_zero():
    assert [weight_text(w) for w in (1.0, 0.398, 0.0498, 1e-4)] == [
        "1.00",
        "0.40",
        "0.05",
        "0.0001",
    ]


# --- noise ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def patterned_ball() -> Views:
    """A ball before 8 cameras, one frame: waves on its front (z < 0), its back plain."""
    rig = ring(8, 72, 72)
    y, x = torch.meshgrid(torch.arange(72) + 0.5, torch.arange(72) + 0.5, indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)], -1)
    to_world = rig.T_camera_world[:, :3, :3].mT @ torch.linalg.inv(rig.K)
    ways = torch.nn.functional.normalize(torch.einsum("vij,hwj->vhwi", to_world, pixels), dim=-1)
    eyes = rig.centers[:, None, None]
    along = (ways * eyes).sum(-1)
    inner = along.square() - 9 + 0.7**2
    places = eyes + (-along - inner.clamp(min=0).sqrt())[..., None] * ways
    waves = (12 * places[..., 0]).sin() * (12 * places[..., 1]).sin() * (places[..., 2] < 0)
    colours = 0.5 + waves[:, None] * torch.tensor([0.25, 0.15, -0.2]).view(3, 1, 1)
    frames = (colours * (inner > 0)[:, None])[:, None]
    return Views(frames, (inner > 0)[:, None], rig)


def with_noise(views: Views, sigmas: torch.Tensor, size: int = 1) -> Views:
    """Every view with its own noise, in blotches of so many pixels."""
    V, F, C, H, W = views.frames.shape
    generator = torch.Generator().manual_seed(3)
    coarse = torch.randn(V * F, C, H // size, W // size, generator=generator)
    field = torch.nn.functional.interpolate(coarse, (H, W)).view_as(views.frames)
    return replace(views, frames=views.frames + sigmas.view(-1, 1, 1, 1, 1) * field)


def test_weight_is_inverse_to_the_variance():
    variances = torch.tensor([0.02, 0.04, 0.08]).square()
    weights = weight_of_noise(variances, 1.0)
    assert weights.tolist() == pytest.approx([4, 1, 0.25])
    assert weight_of_noise(variances, 0.5).tolist() == pytest.approx([2, 1, 0.5])
    assert weight_of_noise(variances, 0.0).tolist() == [1, 1, 1]
    extremes = weight_of_noise(torch.tensor([1e-9, 1.0, 1e9]), 5.0)
    assert extremes.tolist() == pytest.approx([LARGEST, 1, LEAST])


def test_clean_views_weigh_the_same_whatever_their_texture(patterned_ball):
    variances, across = noise_of_views(patterned_ball)
    assert across
    weights = largest_is_one(weight_of_noise(variances, 1.0))
    assert weights.amin() > 0.8


def test_noise_is_found_at_its_strength(patterned_ball):
    sigmas = torch.tensor([0.02, 0.02, 0.04, 0.04, 0.08, 0.08, 0.02, 0.02])
    moments = replace(
        patterned_ball,
        frames=patterned_ball.frames.repeat(1, 3, 1, 1, 1),
        masks=patterned_ball.masks.repeat(1, 3, 1, 1),
    )
    found = noise_of_views(with_noise(moments, sigmas))[0].sqrt()
    # A view's part of a sum is uncertain by a share of its partners' parts, hence the least noisy
    # ones, beside noisier ones, the most.
    assert (found / sigmas).log().abs().amax() < math.log(1.6)
    weights = weight_of_noise(found.square(), 1.0)
    few, some, many = (weights[sigmas == sigma].mean() for sigma in (0.02, 0.04, 0.08))
    assert 2.5 < few / some < 6 and 2.5 < some / many < 6  # 4 by the formula


@pytest.mark.parametrize("bad", [0, 3, 4])
def test_blotched_view_counts_least(patterned_ball, bad):
    sigmas = torch.zeros(8)
    sigmas[bad] = 0.08
    weights = weight_of_noise(noise_of_views(with_noise(patterned_ball, sigmas, 8))[0], 1.0)
    assert weights.argmin() == bad
    rest = weights[torch.arange(8) != bad]
    assert weights[bad] < rest.amin() / 10 and rest.amin() > rest.amax() / 3


def test_misplaced_view_counts_least(patterned_ball):
    frames = patterned_ball.frames.clone()
    frames[1] = frames[1].roll(6, -1)
    weights = weight_of_noise(noise_of_views(replace(patterned_ball, frames=frames))[0], 1.0)
    assert weights.argmin() == 1 and weights[1] < 0.5


def test_bytes_are_as_noisy_as_floats(patterned_ball):
    noisy = with_noise(patterned_ball, torch.full((8,), 0.04))
    stored = replace(noisy, frames=(noisy.frames * 255).round().clamp(0, 255).byte())
    same = replace(noisy, frames=stored.frames.float() / 255)
    assert torch.equal(noise_of_views(stored)[0], noise_of_views(same)[0])


def test_without_masks_flicker_tells():
    generator = torch.Generator().manual_seed(0)
    frames = torch.full((3, 6, 3, 32, 32), 0.5)
    sigmas = torch.tensor([0.02, 0.08, 0.04])
    frames += sigmas.view(3, 1, 1, 1, 1) * torch.randn(frames.shape, generator=generator)
    found, across = noise_of_views(Views(frames))
    assert not across
    torch.testing.assert_close(found.sqrt(), sigmas, rtol=0.15, atol=0)
    # A steady brightening is no flicker.
    ramp = torch.linspace(0.2, 0.8, 6).view(1, 6, 1, 1, 1).expand(3, 6, 3, 32, 32)
    assert noise_of_views(Views(ramp))[0].amax() < 1e-4


def test_views_that_tell_nothing_of_noise_are_refused(patterned_ball):
    two = Views(torch.rand(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert "2 frames are too few" in refusal(lambda: noise_of_views(two))


# --- unseen ---------------------------------------------------------------------------------------


def test_latent_pixel_is_kept_where_all_its_pictures_may_be():
    """Five pictures of 2x4 latent pixels: the first alone, the others as one."""
    kept = torch.ones(5, 16, 32, dtype=torch.bool)
    kept[0, :8, :8] = False  # of the first picture
    kept[2, 8:, 16:24] = False  # in one of four pictures
    expected = torch.ones(2, 2, 4, dtype=torch.bool)
    expected[0, 0, 0] = expected[1, 1, 2] = False
    assert kept_latents(kept, 8).equal(expected)


def test_against_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(9, 4, 6, generator=generator) < 0.8
    kept = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)
    kept &= torch.rand(kept.shape, generator=generator) < 0.96
    result = kept_latents(kept, 8)
    assert result.shape == (3, 4, 6) and 0.2 < result.float().mean() < 0.8
    squares = rearrange(kept, "f (h y) (w x) -> f h w (y x)", y=8, x=8).double().mean(-1)
    for t, pictures in enumerate(([0], [1, 2, 3, 4], [5, 6, 7, 8])):
        for y in range(4):
            for x in range(6):
                assert result[t, y, x] == all(squares[f, y, x] >= 0.9 for f in pictures)


def test_single_gaps_stay_closed_but_a_border_opens():
    kept = torch.ones(1, 16, 16, dtype=torch.bool)
    kept[0, 2, 2:8] = False  # 6 of 64
    kept[0, 8:, 8] = False  # 8 of 64: an edge along the square
    assert kept_latents(kept, 8)[0].tolist() == [[True, True], [True, False]]


def test_grown_reaches_across_corners_but_not_into_other_moments():
    mask = torch.zeros(2, 7, 7, dtype=torch.bool)
    mask[0, 3, 3] = True
    assert grown(mask, 0).equal(mask)
    wide = grown(mask, 2)
    assert wide[0, 1:6, 1:6].all() and wide.sum() == 25


STATES = torch.full((2, 5, 32, 48), EMPTY)
STATES[:, :, :, 16:32] = SEEN
STATES[1, :, 16:, 16:32] = UNSEEN_SIDE
"""A standing bar, seen; in the second view its lower half is the unseen side."""


def test_background_is_kept_or_made():
    visibility = visibility_of(STATES)
    keep = unseen_mask(visibility, (2, 2, 4, 6), 0, "keep")
    assert keep.shape == (2, 1, 2, 4, 6) and keep.dtype == torch.float32
    expected = torch.zeros(4, 6)
    expected[2:, 2:4] = 1
    assert keep[0].eq(0).all() and keep[1, 0].eq(expected).all()
    make = unseen_mask(visibility, (2, 2, 4, 6), 0, "make")
    outside = torch.ones(4, 6)
    outside[:, 2:4] = 0
    assert make[0, 0].eq(outside).all()
    assert make[1, 0].eq(torch.maximum(outside, expected)).all()


def test_margin_is_in_latent_pixels():
    grown_one = unseen_mask(visibility_of(STATES), (2, 2, 4, 6), 1, "keep")
    expected = torch.zeros(4, 6)
    expected[1:, 1:5] = 1
    assert grown_one[1, 0].eq(expected).all() and grown_one[0].eq(0).all()
    # A background that is made takes no margin off the performer.
    make = unseen_mask(visibility_of(STATES), (2, 2, 4, 6), 1, "make")
    assert make[0, 0, 0, :, 2:4].eq(0).all() and make[0, 0, 0].sum() == 16
    # The unseen side does: of the seen upper half its upper row is left.
    assert make[1, 0, 0, 0, 2:4].eq(0).all() and make[1, 0, 0].sum() == 22


def test_latents_of_16_pixels():
    mask = unseen_mask(visibility_of(STATES), (2, 2, 2, 3), 0, "keep")
    assert mask[1, 0, 0].tolist() == [[0, 0, 0], [0, 1, 0]]


def test_frames_beyond_4n_plus_1_and_odd_sizes_follow_the_encoder():
    """7 pictures are encoded as 5, and 44x32 as 48x32: scaled to fill, the middle cut out."""
    states = torch.full((1, 7, 32, 44), SEEN)
    states[:, 5:] = UNSEEN_SIDE
    assert unseen_mask(visibility_of(states), (1, 2, 4, 6), 0, "keep").eq(0).all()
    # Scaled by 48 / 44 to 48x35, of which one row is cut off above and two below: pixel rows 21 on
    # become rows 22 on of the picture, which lie in the third row of latent pixels.
    states[:, :5, 21:] = UNSEEN_SIDE
    mask = unseen_mask(visibility_of(states), (1, 2, 4, 6), 0, "keep")
    assert mask[0, 0, 0].amax(1).tolist() == mask[0, 0, 1].amin(1).tolist() == [0, 0, 1, 1]


def test_one_picture():
    mask = unseen_mask(visibility_of(STATES[:, :1]), (2, 1, 4, 6), 0, "keep")
    assert mask.shape == (2, 1, 1, 4, 6) and float(mask.sum()) == 4


def test_every_view_is_reported():
    steps = []
    unseen_mask(visibility_of(STATES), (2, 2, 4, 6), 0, "keep", lambda *step: steps.append(step))
    assert steps == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("grid", "parts"),
    [
        ((3, 2, 4, 6), ["3 views", "'visibility' 2"]),
        ((2, 3, 4, 6), ["3 latent frames, that is 9 pictures", "'visibility' 5"]),
        ((2, 2, 4, 8), ["8x4 latent pixels", "48x32"]),
        ((2, 2, 6, 4), ["4x6 latent pixels", "48x32"]),
        ((2, 2, 64, 96), ["96x64 latent pixels", "48x32"]),
    ],
)
def test_sizes_that_disagree_are_named(grid, parts):
    said = refusal(lambda: unseen_mask(visibility_of(STATES), grid, 1, "keep"))
    assert "'latent'" in said and all(part in said for part in parts), said


def test_what_is_no_visibility_is_refused():
    colours = torch.rand(2, 5, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    depth = torch.ones(2, 5, 1, 32, 48)
    broken = colours[:, :, :1].expand(-1, -1, 3, -1, -1).clone()
    broken[1, 2, :, 3, 3] = float("nan")
    for frames, part in ((colours, "colours"), (depth, "depth"), (broken, "NaN")):
        said = refusal(lambda f=frames: unseen_mask(Views(f), (2, 2, 4, 6), 1, "keep"))
        assert part in said
        assert part in refusal(lambda f=frames: share_by_visibility(Views(f)))


def test_pictures_are_orange_where_it_is_made_and_untouched_elsewhere():
    states = STATES.clone()
    states[0, 1:4] = EMPTY  # within the second latent frame: its last picture is shown
    visibility = visibility_of(states, ring(2, 48, 32))
    mask = unseen_mask(visibility, (2, 2, 4, 6), 0, "keep")
    shown = mask_pictures(visibility, mask)
    assert shown.frames.shape == (2, 2, 3, 32, 48) and shown.rig.labels == visibility.rig.labels
    assert shown.frames[0].equal(visibility.frames[0, ::4])
    red, green, blue = shown.frames[1, 0, :, 20, 20].tolist()
    # 0.4 of the unseen side's grey 128 and 0.6 of the orange.
    assert (red, green, blue) == (round(51.2 + 153), round(51.2 + 72), round(51.2))
    assert shown.frames[1, 0, :, 4, 20].tolist() == [255] * 3
