"""The scoreboard's numbers: identities, values worked out by hand, and other people's code."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from turnaround.models.cameras import Rig, intrinsics, look_at
from turnaround.models.metrics import (
    cross_view_consistency,
    decibels,
    depth_errors,
    flicker,
    haarpsi,
    keypoint_error,
    mask_iou,
    normal_angle,
    psnr,
    ssim,
)

V, FRAMES, H, W = 2, 2, 40, 36


def pictures(seed=0, size=(H, W)):
    """Smooth random colours [V, F, 3, H, W], between 0.1 and 0.9."""
    noise = torch.rand(V * FRAMES, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(noise, size=size, mode="bicubic").clamp(0, 1)
    return (0.1 + 0.8 * smooth).unflatten(0, (V, FRAMES))


def region():
    where = torch.zeros(V, FRAMES, H, W)
    where[..., 8:30, 10:28] = 1
    return where


def noise_like(x, seed=1):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


def shifted(x, pixels):
    return torch.roll(x, pixels, dims=-1)


def blurred(x, times):
    flat = x.flatten(0, 1)
    for _ in range(times):
        flat = F.avg_pool2d(F.pad(flat, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return flat.view_as(x)


PICTURE_SCORES = [psnr, ssim, haarpsi]


@pytest.mark.parametrize("score", PICTURE_SCORES)
def test_equal_pictures_have_the_best_score(score):
    best = math.inf if score is psnr else 1
    assert score(pictures(), pictures()) == pytest.approx(best, abs=1e-9)
    assert score(pictures(), pictures(), region()) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("score", PICTURE_SCORES)
@pytest.mark.parametrize("damage", ["noise", "blur", "shift"])
def test_more_damage_scores_lower(score, damage):
    x = pictures()
    worse = {
        "noise": lambda n: x + 0.02 * n * noise_like(x),
        "blur": lambda n: blurred(x, n),
        "shift": lambda n: shifted(x, n),
    }[damage]
    scores = [score(worse(n), x, region()) for n in (1, 2, 3)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[-1]


@pytest.mark.parametrize("score", PICTURE_SCORES)
def test_only_the_region_counts(score):
    x, where = pictures(), torch.zeros(V, FRAMES, H, W)
    where[..., :10] = 1
    damaged = x.clone()
    # The furthest that a window reaches: 8 coefficients of halved pixels, 16 pixels.
    damaged[..., 27:] = 0
    assert score(damaged, x, where) == pytest.approx(score(x, x, where))


@pytest.mark.parametrize("score", PICTURE_SCORES)
def test_the_order_of_views_does_not_count(score):
    x, y = pictures(), pictures() + 0.03 * noise_like(pictures())
    order = [1, 0]
    assert score(y[order], x[order], region()[order]) == pytest.approx(score(y, x, region()))


@pytest.mark.parametrize("score", PICTURE_SCORES)
def test_an_empty_region_has_no_score(score):
    assert math.isnan(score(pictures(), pictures(1), torch.zeros(V, FRAMES, H, W)))


def test_a_constant_error_of_a_tenth_is_20_db():
    assert psnr(pictures() + 0.1, pictures()) == pytest.approx(20, abs=1e-4)
    assert decibels(0.01) == pytest.approx(40)


def test_half_the_pixels_wrong_cost_3_db():
    x = pictures()
    y = x.clone()
    y[..., : W // 2] += 0.1
    assert psnr(y, x) == pytest.approx(20 + 10 * math.log10(2), abs=1e-4)


def test_a_soft_mask_weighs_the_error():
    x = pictures()
    y = x.clone()
    y[..., : W // 2] += 0.1
    where = torch.ones(V, FRAMES, H, W)
    where[..., : W // 2] = 0.25
    assert psnr(y, x, where) == pytest.approx(20 + 10 * math.log10(5), abs=1e-4)


def test_psnr_is_that_of_scikit_image():
    x, y = pictures(), pictures() + 0.05 * noise_like(pictures())
    theirs = peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=1)
    assert psnr(y, x) == pytest.approx(theirs, abs=1e-4)


def test_ssim_is_that_of_scikit_image():
    x = pictures()[0, 0]
    y = x + 0.05 * noise_like(x)
    theirs = structural_similarity(
        x.numpy().astype(np.float64), y.numpy().astype(np.float64), channel_axis=0, data_range=1,
        gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    )  # fmt: skip
    inside = torch.zeros(H, W)
    inside[5:-5, 5:-5] = 1  # scikit-image leaves out where the window hangs over the edge
    assert ssim(y, x, inside) == pytest.approx(theirs, abs=1e-5)


def test_ssim_of_flat_pictures_is_the_luminance_term():
    a, b = torch.full((3, H, W), 0.2), torch.full((3, H, W), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert ssim(a, b) == pytest.approx(expected, rel=1e-5)


def test_haarpsi_is_that_of_piq():
    """Values of `piq.haarpsi` 0.8.0 on these pictures; its padding differs at the borders."""
    x = pictures(size=(48, 64)).flatten(0, 1)
    y = (x + 0.05 * noise_like(x)).clamp(0, 1)
    theirs = [0.919817, 0.906795, 0.903084, 0.922798]
    assert [haarpsi(a, b) for a, b in zip(y, x, strict=True)] == pytest.approx(theirs, abs=2e-4)


def test_haarpsi_sees_a_wrong_colour_of_equal_brightness():
    x = pictures()
    tinted = x + 0.2 * torch.tensor([0.114, 0.0, -0.299])[:, None, None]  # luma stays
    assert haarpsi(tinted, x) < 0.999
    assert haarpsi(tinted, x) > haarpsi(x + 0.2 * noise_like(x), x)


def test_mask_iou_of_half_overlapping_squares_is_a_third():
    a, b = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    a[..., 0:4], b[..., 2:6] = 1, 1
    assert mask_iou(a, b) == pytest.approx(1 / 3)
    assert mask_iou(a, a) == 1
    assert math.isnan(mask_iou(a * 0, a * 0))


def test_depth_that_is_a_tenth_too_far_is_right_up_to_scale_only():
    depth = torch.linspace(2, 3, 16).view(4, 4)
    assert depth_errors(depth * 1.1, depth, depth > 0) == pytest.approx((0, 0.1), abs=1e-6)
    assert math.isnan(depth_errors(depth, depth, depth < 0)[0])


def test_mask_iou_falls_as_a_mask_moves_away():
    a = region()
    scores = [mask_iou(shifted(a, n), a) for n in (0, 2, 4, 8)]
    assert scores == sorted(scores, reverse=True) and scores[0] == 1


@pytest.mark.parametrize("degrees", [0.0, 0.01, 30.0, 90.0, 180.0])
def test_turned_normals_have_the_angle_of_the_turn(degrees):
    angle = math.radians(degrees)
    truth = torch.zeros(1, 1, 3, 4, 4)
    truth[:, :, 2] = -1
    turned = truth.clone()
    turned[:, :, 0], turned[:, :, 2] = math.sin(angle), -math.cos(angle)
    assert normal_angle(2 * turned, truth) == pytest.approx(degrees, abs=1e-4)


def test_pixels_without_a_normal_do_not_count():
    truth = torch.zeros(1, 1, 3, 2, 2)
    truth[:, :, 2] = 1
    missing = truth.clone()
    missing[..., 0] = 0
    assert normal_angle(missing, truth) == 0


def test_keypoints_3_right_and_4_down_are_5_pixels_off():
    truth = torch.rand(V, FRAMES, 5, 2)
    error = keypoint_error(truth + torch.tensor([3.0, 4.0]), truth, torch.full((V, FRAMES), 50.0))
    assert error.pixels == pytest.approx(5, abs=1e-4)
    assert error.share == pytest.approx(0.1, abs=1e-5)


def test_hidden_keypoints_do_not_count():
    truth, visible = torch.zeros(1, 2, 2), torch.tensor([[1.0, 0.0]])
    guess = torch.tensor([[[0.0, 2.0], [99.0, 99.0]]])
    assert keypoint_error(guess, truth, torch.tensor([20.0]), visible).pixels == 2


def moving_texture(step, extra=0.0):
    """A texture that moves `step` whole pixels a frame, with a brightness jump of `extra`."""
    x = pictures()[:1, :1]
    frames = torch.cat([shifted(x, step * f) + extra * (f % 2) for f in range(3)], 1)
    flow = torch.zeros(1, 2, 2, H, W)
    flow[:, :, 0] = step
    seen = torch.ones(1, 2, H, W)
    seen[..., W - step :] = 0  # leaves the picture
    return frames, flow, seen


def test_a_texture_that_moves_with_its_flow_does_not_flicker():
    assert flicker(*moving_texture(3)) < 1e-5


def test_flicker_is_the_jump_in_brightness():
    assert flicker(*moving_texture(3, extra=0.2)) == pytest.approx(0.2, abs=1e-5)


def test_a_wrong_flow_flickers():
    frames, flow, seen = moving_texture(3)
    scores = [
        flicker(frames, flow + torch.tensor([n, 0.0])[:, None, None], seen) for n in (0, 1, 2)
    ]
    assert scores == sorted(scores) and scores[2] > 0.01


def plane_clip(texture_error=0.0):
    """A textured plane 3 m away, slanted, seen by three cameras: colours, depth and rig."""
    size = 48
    eyes = torch.tensor([[-0.5, 0.0, -3.0], [0.4, 0.1, -3.1], [0.0, -0.4, -2.9]])
    T = look_at(eyes, torch.zeros(3))
    rig = Rig(intrinsics(math.radians(30), size, size).expand(3, 3, 3).clone(), T, size, size)
    normal = F.normalize(torch.tensor([0.2, 0.1, -1.0]), dim=0)
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    colors, depths = [], []
    for v in range(3):
        K = rig.K[v]
        rays = torch.stack(
            [(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], torch.ones_like(x)], -1
        )
        world = rays @ T[v, :3, :3]
        depth = -(eyes[v] @ normal) / (world @ normal)  # the plane goes through the origin
        points = eyes[v] + depth[..., None] * world
        # Waves of half a metre: 0.03 pixels of bilinear reading are far below the tolerance.
        colors.append(0.5 + 0.4 * torch.sin(points * 12.0).movedim(-1, 0) + texture_error * v)
        depths.append(depth)
    return torch.stack(colors)[:, None], torch.stack(depths)[:, None], rig


def test_a_plane_looks_the_same_from_every_camera():
    agreed = cross_view_consistency(*plane_clip())
    # Bilinear reading of a wave of 12 rad/m at 0.033 m a pixel: (0.4)² / 8 * 0.4 at most.
    assert agreed.rmse < 0.01
    assert agreed.psnr > 40
    assert agreed.pairs > 6 * 1000


def test_a_flat_colour_is_exactly_consistent():
    colors, depth, rig = plane_clip()
    assert cross_view_consistency(colors * 0 + 0.3, depth, rig).rmse < 1e-6


def test_cross_view_error_is_the_colour_difference():
    """Cameras that differ by e, e and 2e: the mean square over ordered pairs is 2 e²."""
    colors, depth, rig = plane_clip()
    flat = colors * 0 + 0.3 + 0.1 * torch.arange(3.0)[:, None, None, None, None]
    pairs = cross_view_consistency(flat, depth, rig)
    low, high = 0.1, 0.2
    assert low < pairs.rmse < high
    two = cross_view_consistency(flat[:2], depth[:2], rig.select([0, 1]))
    assert two.rmse == pytest.approx(0.1, abs=1e-5)
    assert two.psnr == pytest.approx(20, abs=1e-3)


def test_cross_view_error_grows_with_the_disagreement():
    scores = [cross_view_consistency(*plane_clip(e)).rmse for e in (0.0, 0.02, 0.05)]
    assert scores == sorted(scores)


def test_the_order_of_cameras_does_not_count():
    colors, depth, rig = plane_clip(0.05)
    order = [2, 0, 1]
    turned = cross_view_consistency(colors[order], depth[order], rig.select(order))
    straight = cross_view_consistency(colors, depth, rig)
    assert turned.rmse == pytest.approx(straight.rmse, rel=1e-6)
    assert turned.pairs == straight.pairs


def test_hidden_surface_is_not_compared():
    """A camera whose view is blocked a metre before the plane shares nothing with the others."""
    colors, depth, rig = plane_clip()
    depth[2] -= 1
    colors[2] = 0
    blocked = cross_view_consistency(colors, depth, rig)
    two = cross_view_consistency(colors[:2], depth[:2], rig.select([0, 1]))
    assert blocked.pairs == two.pairs
    assert blocked.rmse == pytest.approx(two.rmse, rel=1e-6)


def test_pictures_of_different_shape_are_refused():
    with pytest.raises(ValueError, match="compare pictures of the same"):
        psnr(pictures(), pictures()[:1])
    with pytest.raises(ValueError, match="one mask a picture"):
        psnr(pictures(), pictures(), region()[:1])
    with pytest.raises(ValueError, match="one flow for each pair"):
        flicker(pictures(), torch.zeros(V, FRAMES, 2, H, W))
