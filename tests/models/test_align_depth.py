"""Relative depth to metres: exact on exact input, steady and unmoved by outliers."""

import math

import pytest
import torch
from turnaround.models.align_depth import (
    UNDER_THE_SKIN,
    align_depth,
    body_keypoint_depth,
    cloud_depth,
    drift,
    pose_distance,
)
from turnaround.models.cameras import intrinsics
from turnaround.models.depth import depth_at, grey_depth, resize_depth, without_blanks
from turnaround.models.points import points_from_depth

FRAMES, SIZE = 7, 24


@pytest.fixture(params=[False, True], ids=["depth", "inverse depth"])
def inverse(request):
    return request.param


def clip(inverse: bool):
    """Metres of a bump that walks away; values with another scale and shift each frame."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, SIZE), torch.linspace(-1, 1, SIZE), indexing="ij")
    metres = 3 - 0.4 * (1 - x**2 - y**2) + 0.1 * torch.arange(FRAMES)[:, None, None]
    scale, shift = torch.linspace(0.5, 1.5, FRAMES), torch.linspace(-0.2, 0.3, FRAMES)
    wanted = 1 / metres if inverse else metres
    return metres, (wanted - shift[:, None, None]) / scale[:, None, None], scale, shift


def test_exact_input_gives_exact_metres_scale_and_shift(inverse):
    metres, values, scale, shift = clip(inverse)
    found = align_depth(values, metres, torch.ones_like(metres), inverse, steadiness=0)
    torch.testing.assert_close(found.metres, metres, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.scale, scale, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.shift, shift, rtol=0, atol=1e-4)
    assert float(found.error.max()) < 1e-5


def test_a_fifth_of_wrong_points_hardly_moves_the_result(inverse):
    metres, values, *_ = clip(inverse)
    torch.manual_seed(0)
    coarse = metres * (1 + 0.01 * torch.randn_like(metres))
    coarse = torch.where(torch.rand_like(metres) < 0.2, coarse + 1, coarse)
    found = align_depth(values, coarse, torch.ones_like(metres), inverse, steadiness=0)
    # Least squares would be off by the mean of what is wrong, 0.2 m.
    assert float((found.metres - metres).abs().mean()) < 0.005


def test_background_that_a_coarse_mask_takes_in_does_not_turn_the_line(inverse):
    metres, values, scale, shift = clip(inverse)
    wall = ((1 / 8 if inverse else 8) - shift) / scale
    torch.manual_seed(0)
    spoilt = torch.where(torch.rand_like(metres) < 0.15, wall[:, None, None], values)
    found = align_depth(spoilt, metres, torch.ones_like(metres), inverse, steadiness=0)
    torch.testing.assert_close(found.scale, scale, rtol=1e-3, atol=0)
    torch.testing.assert_close(found.shift, shift, rtol=0, atol=1e-3)


def test_values_that_fall_with_depth_are_found_by_a_negative_scale():
    metres, values, *_ = clip(False)
    found = align_depth(-values, metres, torch.ones_like(metres), steadiness=0)
    torch.testing.assert_close(found.metres, metres, rtol=0, atol=1e-5)
    assert float(found.scale.max()) < 0


def test_a_frame_without_target_follows_its_neighbours():
    metres, *_ = clip(False)
    target = metres.clone()
    target[3] = 0
    found = align_depth((metres - 0.3) / 0.7, target, torch.ones_like(metres))
    torch.testing.assert_close(found.metres, metres, rtol=0, atol=1e-4)
    assert found.error[3].isnan() and float(found.error[2]) < 1e-5


def test_steadiness_takes_trembling_of_the_target_away():
    metres, *_ = clip(False)
    torch.manual_seed(0)
    trembling = metres + 0.1 * torch.randn(FRAMES, 1, 1)
    jumps = [
        float((align_depth(metres, trembling, torch.ones_like(metres), steadiness=s).metres - metres)
              .mean((1, 2)).diff().abs().mean())
        for s in (0.0, 0.1, 1.0, 100.0)
    ]  # fmt: skip
    assert jumps == sorted(jumps, reverse=True)
    assert jumps[0] == pytest.approx(
        float(trembling.sub(metres)[:, 0, 0].diff().abs().mean()), rel=0.05
    )
    assert jumps[-1] < 0.1 * jumps[0]


def test_outside_the_mask_and_where_values_are_not_finite_nothing_is_known():
    metres, values, *_ = clip(False)
    masks = torch.ones_like(metres)
    masks[:, :5] = 0
    values[0, 10, 10] = torch.inf
    found = align_depth(values, metres, masks, steadiness=0).metres
    assert not found[:, :5].any() and found[0, 10, 10] == 0
    assert found.isfinite().all()


def test_no_common_point_is_one_sentence():
    metres, values, *_ = clip(False)
    with pytest.raises(ValueError, match="share 0 points inside the mask"):
        align_depth(values, torch.zeros_like(metres), torch.ones_like(metres))


def test_values_without_shape_or_without_a_finite_one_are_one_sentence_each():
    metres, *_ = clip(False)
    with pytest.raises(ValueError, match="0.25 all over the performer"):
        align_depth(torch.full_like(metres, 0.25), metres, torch.ones_like(metres))
    for mask, values in ((torch.zeros_like(metres), metres), (torch.ones_like(metres), metres / 0)):
        with pytest.raises(ValueError, match="no finite value inside the mask"):
            align_depth(values, metres, mask)


def test_nine_points_a_frame_are_enough_and_one_frame_too(inverse):
    metres, values, *_ = clip(inverse)
    sparse = torch.zeros_like(metres)
    sparse[:, 3::8, 3::8] = metres[:, 3::8, 3::8]
    for chosen in (slice(None), slice(0, 1)):
        found = align_depth(
            values[chosen], sparse[chosen], torch.ones_like(metres[chosen]), inverse, steadiness=0
        )
        torch.testing.assert_close(found.metres, metres[chosen], rtol=0, atol=1e-4)


# ---------------------------------------------------------------- frames stretched one by one


def stretched_clip():
    """A ball on the floor before a wall; each frame stretched by its own black and white."""
    metres, *_ = clip(False)
    scene = torch.nn.functional.pad(metres, (12, 12, 12, 12))
    inside = scene > 0
    behind = 4.0 + torch.linspace(0, 2, 48)[:, None].expand(48, 48)
    scene = torch.where(inside, scene, behind)
    torch.manual_seed(0)
    scale, shift = 1 + 0.2 * torch.randn(FRAMES, 1, 1), 0.2 * torch.randn(FRAMES, 1, 1)
    return scene, inside, (scene / 6 * scale + shift)


def test_the_background_tells_how_frames_were_stretched():
    scene, inside, values = stretched_clip()
    gain, offset = drift(values, inside)
    back = gain[:, None, None] * values + offset[:, None, None]
    first = back[:1][~inside[:1]]
    for frame, mask in zip(back, inside, strict=True):
        assert float((frame[~mask] - first).abs().max()) < 1e-5


def test_steadiness_does_not_smear_frames_that_were_stretched_one_by_one():
    scene, inside, values = stretched_clip()
    masks, target = inside.float(), torch.where(inside, scene, 0.0)
    for steadiness in (0.1, 10.0):
        found = align_depth(values, target, masks, steadiness=steadiness).metres
        assert float((found - scene)[inside].abs().max()) < 0.005
    # Without the background the lines are held as they are, and lag behind the stretch.
    cut = torch.where(inside, values, 0.0)
    assert (
        float((align_depth(cut, target, masks, steadiness=10.0).metres - scene)[inside].abs().max())
        > 0.05
    )


def test_a_black_background_is_no_background():
    scene, inside, values = stretched_clip()
    gain, offset = drift(torch.where(inside, values, 0.0), inside)
    assert (gain == 1).all() and (offset == 0).all()


# ---------------------------------------------------------------- what to align with

K = intrinsics(math.radians(40), SIZE, SIZE)


def test_a_cloud_gives_its_depth_back_in_the_camera_that_saw_it():
    metres, *_ = clip(False)
    colors = torch.full((FRAMES, 3, SIZE, SIZE), 0.5)
    cloud = points_from_depth(colors, metres, torch.ones_like(metres), K, erosion=0)
    found = cloud_depth(cloud, SIZE, SIZE)
    assert (found > 0).float().mean() > 0.95  # guessed points behind are left out
    torch.testing.assert_close(found[found > 0], metres[found > 0], rtol=0, atol=1e-4)
    small = cloud_depth(cloud, SIZE // 2, SIZE // 2)
    nearest = -torch.nn.functional.max_pool2d(-torch.where(found > 0, found, 99.0), 2)
    torch.testing.assert_close(small[small > 0], nearest[small > 0], rtol=0, atol=1e-4)


def test_body_keypoints_are_brought_to_our_lens():
    generator = torch.Generator().manual_seed(0)
    body = torch.randn(70, 3, generator=generator) * torch.tensor([0.2, 0.5, 0.1])
    away = torch.tensor([0.1, 0.0, 6.0])
    theirs = 2.0 * float(K[1, 1])  # twice the lens: half the distance in our camera
    at = body + away
    pixels = at[:, :2] / at[:, 2:] * theirs + SIZE / 2
    person = {"pred_keypoints_3d": body, "pred_cam_t": away, "pred_keypoints_2d": 2 * pixels}
    pose = {"frames": [[person], []], "image_size": (2 * SIZE, 2 * SIZE)}
    found = body_keypoint_depth(pose, 2, SIZE, SIZE, float(K[1, 1]))
    told = found[0][found[0] > 0]
    assert len(told) > 20 and not found[1].any()
    assert float(told.median()) == pytest.approx(3 - UNDER_THE_SKIN, abs=0.06)  # spread 0.1 / 2
    with pytest.raises(ValueError, match="shows nobody"):
        body_keypoint_depth({**pose, "frames": [[], []]}, 2, SIZE, SIZE, 30.0)


def skeleton(height: float, canvas=(200, 100), legs=True, share=False):
    """OpenPose's frame of somebody `height` pixels tall, standing."""
    joints = [[0.0, 0.0, 0.0]] * 18
    rows = {1: 0.18, 8: 0.47, 11: 0.47, 9: 0.72, 12: 0.72, 10: 0.96, 13: 0.96}
    for number, row in rows.items():
        if legs or number in (1, 8, 11):
            joints[number] = [50.0, row * height, 0.9]
    if share:
        joints = [[x / canvas[1], y / canvas[0], c] for x, y, c in joints]
    person = {"pose_keypoints_2d": [v for j in joints for v in j]}
    return {"people": [person], "canvas_height": canvas[0], "canvas_width": canvas[1]}


@pytest.mark.parametrize("changed", [{}, {"legs": False}, {"share": True}])
def test_the_height_of_a_flat_skeleton_gives_the_distance(changed):
    # 100 of 200 rows are 1.7 m, so at f = 300 of 400 rows the performer is 300 * 1.7 / 200 m away.
    frames = [skeleton(100, **changed)] * 3
    found = pose_distance(frames, 3, 400, 300.0, 1.7)
    torch.testing.assert_close(found, torch.full((3,), 2.55), rtol=0.01, atol=0)


def test_a_bent_moment_and_a_missing_skeleton_do_not_change_the_distance():
    frames = [skeleton(100)] * 20
    frames[7], frames[12] = skeleton(60), {"people": [], "canvas_height": 200}
    assert float(pose_distance(frames, 20, 400, 300.0, 1.7).std()) < 1e-4
    with pytest.raises(ValueError, match="neck and hips in no frame"):
        pose_distance([{"people": []}] * 3, 3, 400, 300.0, 1.7)


def test_depth_at_a_distance_knows_near_from_far_by_the_background():
    metres, *_ = clip(False)
    ball = torch.nn.functional.pad(metres[:1], (12, 12, 12, 12))
    inside = ball > 0
    scene = torch.where(inside, ball, 6.0)
    for values in (scene, -scene):
        found = depth_at(values, inside.float(), torch.tensor([5.0]), 1.7)[inside]
        assert float(found.median()) == pytest.approx(5.0, abs=0.3)
        assert float(torch.corrcoef(torch.stack([found, ball[inside]]))[0, 1]) > 0.99


# ---------------------------------------------------------------- depth pictures


def test_a_colour_map_is_refused_and_grey_with_jpeg_noise_is_not():
    grey = torch.linspace(0, 1, 64).expand(1, 32, 64)
    turbo = torch.stack([grey, 1 - grey, (2 * grey - 1).abs()], -1)
    with pytest.raises(ValueError, match="'depth' is coloured"):
        grey_depth(turbo, "depth")
    torch.manual_seed(0)
    noisy = grey[..., None] + 0.02 * torch.randn(1, 32, 64, 3)
    assert float((grey_depth(noisy, "depth") - grey).abs().max()) < 0.05
    assert torch.equal(grey_depth(grey[..., None], "depth"), grey)  # one channel


def test_resized_depth_is_smooth_on_surfaces_and_has_no_value_between_two():
    x = torch.linspace(0, 1, 32).expand(1, 32, 32).clone()
    depth = torch.where(x > 0.5, 5 + 0.2 * x, 3 + 0.2 * x)
    large = resize_depth(depth, 96, 96)
    assert not ((large > 3.2) & (large < 5)).any()
    assert len(large[0, 0].unique()) > 80  # no stairs of three pixels
    depth[0, :4] = torch.nan
    assert resize_depth(depth, 96, 96)[0, :12].isnan().all()
    assert resize_depth(depth, 96, 96)[0, 12:].isfinite().all()


def test_black_inside_the_mask_is_nothing_only_where_nothing_else_is_dark():
    values = torch.linspace(0.2, 1, 100).view(1, 10, 10).clone()
    values[0, 0, :3] = 0
    masks = torch.ones_like(values)
    assert without_blanks(values, masks).isnan().sum() == 3
    values[0, 0, 3] = 0.01
    assert not without_blanks(values, masks).isnan().any()


def blurred_ball(size=96):
    """Metres of a ball before a wall, its mask, and inverse depth with the ramp of a network."""
    K = intrinsics(math.radians(35), size, size)
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    rays = torch.stack([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], torch.ones_like(x)])
    a, b = rays.square().sum(0), rays[2] * 4
    inner = b * b - a * (16 - 0.36)
    metres = torch.where(inner > 0, (b - inner.clamp(min=0).sqrt()) / a, 6.5)[None]
    mask = (inner > 0).float()[None]
    x = torch.arange(-3, 4.0)
    bell = torch.exp(-0.5 * x**2)
    bell = (bell / bell.sum()).view(1, 1, 1, -1)
    padded = torch.nn.functional.pad(1 / metres[:, None], (3, 3, 3, 3), mode="replicate")
    ramp = torch.nn.functional.conv2d(torch.nn.functional.conv2d(padded, bell), bell.mT)[:, 0]
    return metres, mask, ramp


def test_the_ramp_at_an_outline_does_not_flatten_the_body():
    """The outline's pixels lie between ball and wall: they would stretch the line towards the wall."""
    metres, mask, ramp = blurred_ball()
    torch.manual_seed(0)
    coarse = metres * (1 + 0.05 * torch.randn_like(metres))
    found = align_depth(ramp, coarse, mask, True)
    inside = (mask > 0.5) & (metres < 3.6)  # the ball's middle, clear of the ramp
    true, got = metres[inside], found.metres[inside]
    slope = float(
        ((true - true.mean()) * (got - got.mean())).sum() / (true - true.mean()).square().sum()
    )
    assert 0.87 < slope < 1.1  # with the ramp: 0.45


def test_a_performer_of_a_few_pixels_is_aligned_by_the_edge_too():
    metres, values, scale, _ = clip(False)
    thin = torch.zeros_like(metres)
    thin[:, :, 11:13] = 1  # nothing of it is clear of its edge
    found = align_depth(values, metres, thin, False, steadiness=0)
    torch.testing.assert_close(found.scale, scale, rtol=1e-3, atol=0)
