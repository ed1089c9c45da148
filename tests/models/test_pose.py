"""Keypoints in space: exact where views are exact, robust where one is wrong, smooth without lag."""

import math

import pytest
import torch
from turnaround.models import pose as pose_module
from turnaround.models.cameras import Rig, intrinsics, look_at, orbit_rig
from turnaround.models.human_frames import OPENPOSE18
from turnaround.models.human_net import CROP, HEAT_STRIDE, HumanOutput
from turnaround.models.performer import draw_appearance, pose_performer
from turnaround.models.performer_truth import KEYPOINTS, keypoints_3d
from turnaround.models.pose import (
    MHR_POINTS,
    Pose,
    detect_keypoints,
    epipolar_error,
    openpose_keypoints,
    project,
    read_heat,
    sam3d_keypoints,
    smooth_motion,
    triangulate,
    triangulated_pose,
)
from turnaround.models.views import Views

pytestmark = pytest.mark.usefixtures("one_thread")

V, F, P = 6, 4, 5
W, H = 96, 128


def ring(views=V, elevation=0.3, distance=3.0, fov=0.7):
    angles = torch.arange(views) * 2 * math.pi / views
    return orbit_rig(angles, torch.full((views,), elevation), distance, fov, W, H)


def exact(points, rig):
    """Pixels [V, F, P, 2] in float64, straight from K (R x + t)."""
    T, K = rig.T_camera_world.double(), rig.K.double()
    camera = torch.einsum("vij,fpj->vfpi", T[:, :3, :3], points) + T[:, None, None, :3, 3]
    return torch.einsum("vij,vfpj->vfpi", K, camera)[..., :2] / camera[..., 2:]


def random_points(seed=0, frames=F, count=P):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(frames, count, 3, generator=generator, dtype=torch.float64) - 0.5


def sure(value=1.0, views=V, frames=F, count=P):
    return torch.full((views, frames, count), value, dtype=torch.float64)


# --- triangulation --------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [2, 3, 6])
def test_exact_projections_give_exact_points(views):
    rig = ring(7).select(list(range(views)))
    points = random_points()
    found = triangulate(exact(points, rig), sure(views=views), rig)
    torch.testing.assert_close(found.points, points, rtol=0, atol=1e-9)
    # s / (1 + s), s = views that agree fully.
    torch.testing.assert_close(found.found, torch.full((F, P), views / (1 + views)).double())
    assert float(found.error.max()) < 1e-6


def test_projection_in_single_precision_is_the_exact_one():
    points, rig = random_points(), ring()
    torch.testing.assert_close(
        project(points.float(), rig).double(), exact(points, rig), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("wrong", [40.0, 400.0])
def test_a_gross_outlier_in_one_view_is_ignored_and_named_by_its_error(wrong):
    points, rig = random_points(), ring()
    pixels = exact(points, rig)
    pixels[2, 1, 3] += torch.tensor([wrong, -wrong])
    found = triangulate(pixels, sure(), rig)
    torch.testing.assert_close(found.points, points, rtol=0, atol=1e-6)
    assert found.error.argmax() == (2 * F + 1) * P + 3
    assert float(found.error.max()) == pytest.approx(min(wrong * 2**0.5, math.hypot(W, H)), 1e-3)
    assert float(found.found[1, 3]) == pytest.approx(5 / 6, abs=1e-3)


def test_three_wrong_views_of_eight_are_outvoted():
    """Starting strict instead of generous would lose one keypoint in twenty."""
    rig, generator = ring(8), torch.Generator().manual_seed(5)
    points = random_points(frames=10, count=26)
    pixels = exact(points, rig)
    wrong = torch.rand(8, 10, 26, generator=generator).argsort(0) < 3
    anywhere = torch.rand(pixels.shape, generator=generator) * torch.tensor([W, H])
    pixels = torch.where(wrong[..., None], anywhere.double(), pixels)
    found = triangulate(pixels, sure(1.0, 8, 10, 26), rig)
    assert float((found.points - points).norm(dim=-1).max()) < 0.01
    assert float(found.found.min()) > 0.8


def test_confidences_weigh_as_one_over_the_variance():
    """Scatter of many noisy copies of one point against the inverse of the weighted normal matrix."""
    rig, count, noise = ring(4), 3000, 0.05
    point = torch.tensor([0.2, -0.3, 0.1], dtype=torch.float64)
    confidence = torch.tensor([1.0, 0.5, 0.1, 0.02], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    pixels = exact(point.expand(1, count, 3), rig)
    scatter = torch.randn(pixels.shape, generator=generator, dtype=torch.float64)
    pixels = pixels + noise * scatter / confidence.sqrt()[:, None, None, None]
    found = triangulate(pixels, confidence[:, None, None].expand(4, 1, count), rig).points[0]
    slopes = torch.autograd.functional.jacobian(lambda x: exact(x[None, None], rig)[:, 0, 0], point)
    normal = torch.einsum("v,vki,vkj->ij", confidence / noise**2, slopes, slopes)
    expected = torch.linalg.inv(normal)
    # 3000 copies know a variance to 2.6 percent; equal weights would give 2.1 times as much.
    torch.testing.assert_close(found.T.cov(), expected, rtol=0.1, atol=0.05 * float(expected.max()))
    torch.testing.assert_close(found.mean(0), point, rtol=0, atol=1e-4)


def test_the_order_of_the_views_changes_nothing():
    rig, generator = ring(), torch.Generator().manual_seed(2)
    pixels = exact(random_points(), rig)
    pixels = pixels + 2 * torch.randn(pixels.shape, generator=generator, dtype=torch.float64)
    pixels[1, 0, 0] += 50
    confidence = torch.rand(V, F, P, generator=generator, dtype=torch.float64)
    order = [4, 2, 0, 5, 1, 3]
    one = triangulate(pixels, confidence, rig)
    other = triangulate(pixels[order], confidence[order], rig.select(order))
    torch.testing.assert_close(one.points, other.points, rtol=0, atol=1e-9)
    torch.testing.assert_close(one.found, other.found, rtol=0, atol=1e-9)
    torch.testing.assert_close(one.error[order], other.error, rtol=0, atol=1e-6)


def test_what_fewer_than_two_views_see_is_not_found():
    points, rig, confidence = random_points(), ring(), sure()
    confidence[1:, 0, 0] = 0
    confidence[:, 0, 1] = 0
    pixels = exact(points, rig)
    pixels[3:, 0, 2] = torch.nan
    found = triangulate(pixels, confidence, rig)
    assert found.found[0].tolist() == pytest.approx([0, 0, 3 / 4, 6 / 7, 6 / 7])
    assert found.points.isfinite().all() and found.error.isfinite().all()
    torch.testing.assert_close(found.points[0, 2], points[0, 2], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("degrees", "known"), [(2.0, False), (8.0, True), (180.0, False)])
def test_rays_that_hardly_cross_tell_no_place(degrees, known):
    angles = torch.tensor([0.0, math.radians(degrees)])
    rig = orbit_rig(angles, torch.zeros(2), 3.0, 0.7, W, H)
    # The origin lies on the line between opposite cameras.
    found = triangulate(exact(torch.zeros(1, 1, 3).double(), rig), sure(1, 2, 1, 1), rig)
    assert bool(found.found > 0) == known


@pytest.mark.parametrize("facing", [True, False])
def test_a_point_behind_the_cameras_is_not_found(facing):
    """Both see something in the middle of their pictures: their axes cross, before or behind them."""
    eyes = torch.tensor([[0.0, 0.0, -3.0], [3.0, 0.0, 0.0]])
    ahead = eyes * (0 if facing else 2)
    T = torch.cat([look_at(eye[None], target) for eye, target in zip(eyes, ahead, strict=True)])
    rig = Rig(intrinsics(0.7, W, H).repeat(2, 1, 1), T, W, H)
    middle = torch.tensor([W / 2, H / 2]).double().expand(2, 1, 1, 2)
    assert bool(triangulate(middle, sure(1, 2, 1, 1), rig).found > 0) == facing


# --- epipolar -------------------------------------------------------------------------------------


def test_one_point_in_two_views_has_no_epipolar_error():
    rig = ring()
    pixels = exact(random_points(), rig)
    assert float(epipolar_error(pixels[0], pixels[2], rig.select([0, 2])).max()) < 1e-9


def test_side_by_side_the_epipolar_error_is_the_difference_in_height():
    T = torch.eye(4).repeat(2, 1, 1)
    T[1, 0, 3] = -0.4
    rig = Rig(intrinsics(0.7, W, H).repeat(2, 1, 1), T, W, H)
    a, b = W * torch.rand(2, 7, 2, generator=torch.Generator().manual_seed(3)).double()
    torch.testing.assert_close(epipolar_error(a, b, rig), (a - b)[:, 1].abs())


def test_on_a_level_ring_it_is_nearly_so_the_longer_the_lens():
    """Lines lean by the perspective alone, so the difference falls as one over the distance."""
    gaps = []
    for distance in (20.0, 100.0):
        rig = ring(8, 0.0, distance, 2 / distance).select([0, 1])
        pixels = exact(random_points(), rig)
        pixels[1, ..., 1] += 3.0
        gaps.append(float((epipolar_error(*pixels, rig) - 3.0).abs().max()))
    assert gaps[1] < 0.05 and gaps[0] == pytest.approx(5 * gaps[1], rel=0.3)


def test_the_epipolar_error_is_the_same_both_ways_and_has_gradients():
    rig = ring().select([0, 1])
    a, b = (exact(random_points(s), rig)[s].requires_grad_() for s in (0, 1))
    forth = epipolar_error(a, b, rig)
    torch.testing.assert_close(forth, epipolar_error(b, a, rig.select([1, 0])))
    assert torch.autograd.gradcheck(lambda a, b: epipolar_error(a, b, rig), (a, b))


# --- smoothing ------------------------------------------------------------------------------------


def moving(power, frames=12):
    t = torch.arange(frames, dtype=torch.float64)[:, None, None] / frames
    return t**power * torch.tensor([[[1.0, -2.0, 0.5]], [[0.3, 0.0, 4.0]]]).double()[:, 0]


@pytest.mark.parametrize("power", [0, 1, 2])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 12])
def test_straight_and_parabolic_motion_stays_as_it_is(power, frames):
    points = moving(power, frames)
    smooth = smooth_motion(points, torch.full(points.shape[:2], 0.8))
    # The largest ratio lets a second difference through but for 1e-5 of it.
    torch.testing.assert_close(smooth, points, rtol=0, atol=1e-5 * 8 / frames**2 + 1e-9)


def test_missing_frames_are_filled_on_the_way():
    found = torch.full((12, 2), 0.8)
    found[4:6, 0] = 0
    away = []
    for power in (1, 2):
        points = moving(power)
        filled = smooth_motion(torch.where(found[..., None] > 0, points, 0.0), found)
        away.append(float((filled - points).norm(dim=-1).max()))
    before, after = points[3, 0], points[6, 0]
    straight = float((torch.lerp(before, after, 1 / 3) - points[4, 0]).norm())
    assert away[0] < 1e-6 and away[1] < straight / 3


def test_before_its_first_and_after_its_last_frame_a_keypoint_rests():
    points, found = moving(1), torch.full((12, 2), 0.8)
    found[:3, 0] = found[9:, 0] = 0
    smooth = smooth_motion(torch.where(found[..., None] > 0, points, 0.0), found)
    torch.testing.assert_close(smooth[:4, 0], points[3, 0].expand(4, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(smooth[8:, 0], points[8, 0].expand(4, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(smooth[:, 1], points[:, 1], rtol=0, atol=1e-6)


def test_a_keypoint_never_found_is_the_middle_of_the_others():
    points, found = torch.cat([moving(1), moving(1)], 1), torch.full((12, 4), 0.8)
    found[:, 3] = 0
    smooth = smooth_motion(points, found)
    torch.testing.assert_close(smooth[:, 3], points[:, :3].mean(1), rtol=0, atol=1e-6)


def jitter(error):
    return float(error.diff(dim=0).diff(dim=0).square().sum(-1).mean().sqrt())


@pytest.fixture(scope="module")
def kick():
    """A spinning kick at 16 frames a second, [25, 26, 3], among the fastest motions there are."""
    posed = pose_performer("leo", "spinkick", 0.2 + torch.arange(25) / 16, draw_appearance(5))
    return keypoints_3d(posed).double()


def test_noise_and_outliers_go_and_a_fast_kick_neither_lags_nor_slows(kick):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wrong = torch.rand(kick.shape[:2], generator=generator) < 0.05
    noisy = kick + 0.02 * normal(*kick.shape) + 0.3 * wrong[..., None] * normal(*kick.shape)
    smooth = smooth_motion(noisy, torch.full(kick.shape[:2], 0.8))
    error = smooth - kick
    assert jitter(error) < 0.3 * jitter(noisy - kick)
    assert float(error.square().mean()) < 0.25 * float((noisy - kick).square().mean())
    # Least squares of the error against the speed: the shift, in frames, that would align best.
    speed = (kick[2:] - kick[:-2]) / 2
    lag = float((error[1:-1] * speed).sum() / speed.square().sum())
    assert abs(lag) < 0.02
    kept = float((((smooth[2:] - smooth[:-2]) / 2) * speed).sum() / speed.square().sum())
    assert kept == pytest.approx(1, abs=0.06)


def test_frames_that_few_views_agree_on_count_less(kick):
    generator = torch.Generator().manual_seed(1)
    found = torch.full(kick.shape[:2], 0.9)
    found[::4] = 0.2
    noise = 0.01 + 0.2 * (found < 0.5)
    noisy = kick + noise[..., None] * torch.randn(kick.shape, generator=generator)
    told, not_told = smooth_motion(noisy, found), smooth_motion(noisy, torch.full_like(found, 0.9))
    assert float((told - kick).square().mean()) < 0.6 * float((not_told - kick).square().mean())


def test_long_clips_have_no_seams(monkeypatch):
    generator = torch.Generator().manual_seed(4)
    true = torch.sin(torch.arange(97, dtype=torch.float64) / 6)[:, None, None].expand(97, 2, 3)
    noisy = true + 0.02 * torch.randn(true.shape, generator=generator, dtype=torch.float64)
    whole = smooth_motion(noisy, torch.full((97, 2), 0.8))
    monkeypatch.setattr(pose_module, "WINDOW", 30)
    monkeypatch.setattr(pose_module, "OVERLAP", 10)
    parts = smooth_motion(noisy, torch.full((97, 2), 0.8))
    assert jitter(parts - true) < 1.1 * jitter(whole - true) < 0.5 * jitter(noisy - true)
    assert float((parts - whole).abs().max()) < 0.02  # the noise's standard deviation


# --- reading --------------------------------------------------------------------------------------


def spot(x, y, sigma=1.2, size=(48, 40)):
    """A map's logits: a Gaussian of `sigma` cells around cell (x, y)."""
    row, column = torch.arange(size[0])[:, None], torch.arange(size[1])
    return -((column - x) ** 2 + (row - y) ** 2) / (2 * sigma**2)


def test_a_map_as_taught_is_sure_and_a_wider_one_less():
    place, certain = read_heat(torch.stack([spot(20, 30), spot(20, 30, 2.4)])[None])
    torch.testing.assert_close(place, torch.tensor([20.5, 30.5]).expand(1, 2, 2) * HEAT_STRIDE)
    wide = 2 * (2.4**2 - 1.2**2) * HEAT_STRIDE**2
    assert certain[0].tolist() == pytest.approx([1, 1 / (1 + wide / 16)], rel=0.01)


def test_of_two_hands_the_likelier_is_taken_not_the_middle():
    heat = torch.logaddexp(spot(8, 20), spot(30, 20) - 0.3)[None, None]
    place, certain = read_heat(heat)
    torch.testing.assert_close(place[0, 0], torch.tensor([34.0, 82.0]))
    assert float(certain) < 0.01


class Stub(torch.nn.Module):
    """Knows that people are what is bright, and that all their keypoints are in the middle."""

    def forward(self, pictures):
        B, _, h, w = pictures.shape
        logits = (pictures.mean(1) - 0.75) * 60
        half = torch.zeros(B, h // 2, w // 2)
        bright = torch.nn.functional.avg_pool2d((logits > 0).float()[:, None], HEAT_STRIDE)[:, 0]
        rows, columns = (torch.arange(n) + 0.0 for n in bright.shape[1:])
        total = bright.sum((1, 2)).clamp(min=1e-6)
        x, y = (bright.sum(1) @ columns) / total, (bright.sum(2) @ rows) / total
        heat = torch.stack([spot(a, b, size=bright.shape[1:]) for a, b in zip(x, y, strict=True)])
        return HumanOutput(
            logits, logits, half, torch.stack([half, half, half - 1], 1),
            heat[:, None].expand(B, len(KEYPOINTS), -1, -1), torch.zeros(B, len(KEYPOINTS), 2),
            torch.zeros(B, len(KEYPOINTS)), torch.tensor([100.0, 1.7]).log().expand(B, 2),
        )  # fmt: skip


def test_views_are_read_one_by_one_and_frames_without_a_person_or_with_nan_are_unsure():
    frames = torch.full((2, 3, 3, 96, 72), 0.2)
    frames[0, :, :, 30:70, 20:40] = 1
    frames[1, :2, :, 30:70, 40:60] = 1
    frames[0, 1, 0, 5, 5] = torch.nan
    steps = []
    seen = detect_keypoints(Stub(), Views(frames), on_step=lambda *step: steps.append(step[:2]))
    assert seen.pixels.shape == (2, 3, len(KEYPOINTS), 2) and seen.boxes.shape == (2, 3, 4)
    assert seen.present.tolist() == [[True, False, True], [True, True, False]]
    assert ((seen.sure[..., 0] > 0.5) == seen.present).all()
    middles = torch.tensor([[30.0, 50.0], [50.0, 50.0]])
    error = (seen.pixels[:, 0, 0] - middles).abs()
    assert float(error.max()) < 2  # half a cell of the heat map, in pixels of the frame
    assert steps[-1] == (18, 18) and steps == sorted(steps)
    assert CROP[0] % HEAT_STRIDE == 0


def person(x, y, size, certain=0.9, count=18):
    return {"pose_keypoints_2d": [v for n in range(count) for v in (x + size * n, y, certain)]}


def test_openpose_frames_come_view_by_view_in_the_views_pixels():
    frames = [
        {"people": [person(10, f, 1.0), person(100, f, 2.0)], "canvas_width": 2 * W,
         "canvas_height": 2 * H} for f in range(6)
    ]  # fmt: skip
    frames[4] = {"people": [], "canvas_width": 2 * W, "canvas_height": 2 * H}
    pixels, certain = openpose_keypoints(frames, 2, W, H)
    assert pixels.shape == (2, 3, 18, 2)
    # The larger of both people, on half of the canvas's pixels.
    torch.testing.assert_close(pixels[1, 0, :, 0], 50 + torch.arange(18.0))
    assert pixels[:, :, 0, 1].tolist() == [[0, 0.5, 1], [1.5, 0, 2.5]]
    assert certain[1].amax(1).tolist() == pytest.approx([0.9, 0, 0.9])


def test_openpose_25_points_shares_of_the_canvas_and_nan_are_understood():
    new = person(10, 5, 1.0, count=25)
    share = person(0.1, 0.5, 0.01)
    broken = person(10, 5, 1.0)
    broken["pose_keypoints_2d"][3] = math.nan
    frames = [{"people": [p], "canvas_width": W, "canvas_height": H} for p in (new, share, broken)]
    pixels, certain = openpose_keypoints(frames, 1, W, H)
    assert pixels[0, 0, :, 0].tolist() == [10 + n + (n >= 8) for n in range(18)]
    torch.testing.assert_close(pixels[0, 1, :, 0], W * (0.1 + 0.01 * torch.arange(18.0)))
    assert certain[0, 2, 1] == 0 and pixels.isfinite().all() and certain[0, 2, 2] > 0


def test_sam_3d_bodys_points_get_their_names():
    points = torch.arange(140.0).view(70, 2)
    pose = {"image_size": (2 * H, 2 * W), "frames": [[{"pred_keypoints_2d": points}], []]}
    pixels, certain = sam3d_keypoints(pose, 2, W, H)
    names = list(MHR_POINTS)
    assert pixels[0, 0, names.index("wrist.L")].tolist() == [62.0, 62.5]
    assert certain[:, 0, 0].tolist() == [1, 0]
    assert set(names) <= set(KEYPOINTS) and set(OPENPOSE18) <= set(names)
    for spoil, says in (
        ({"image_size": None}, "size of its pictures"),
        ({"frames": [[{"pred_keypoints_2d": points[:17]}]]}, "17 keypoints"),
    ):
        with pytest.raises(ValueError, match=says):
            sam3d_keypoints({**pose, **spoil}, 1, W, H)


# --- together -------------------------------------------------------------------------------------

NAMES = tuple("abcde")


def test_the_pose_holds_what_was_seen_and_where_it_is():
    points, rig = random_points(frames=1).expand(F, -1, -1), ring()
    pixels, confidence = exact(points, rig).float(), sure().float()
    confidence[:, 2, 1] = 0
    pixels[0, 1, 1] = torch.nan
    pose, raw = triangulated_pose(pixels, confidence, rig, NAMES)
    torch.testing.assert_close(pose.points.double(), points, rtol=0, atol=1e-5)
    assert pose.found[2, 1] == 0 and (pose.found > 0).sum() == F * P - 1
    assert pose.sure[0, 1, 1] == 0 and pose.pixels.isfinite().all()
    assert raw.points[2, 1].tolist() == [0, 0, 0]
    parts = (pose.points, pose.found, pose.pixels, pose.sure)
    assert pose.get_ram_usage() == 4 * sum(p.numel() for p in parts)


def test_views_that_never_agree_are_one_sentence():
    rig, pixels = ring(), exact(random_points(), ring())
    with pytest.raises(ValueError, match="No keypoint is seen alike"):
        triangulated_pose(pixels, sure(0.0), rig, NAMES)
    with pytest.raises(ValueError, match="one view"):
        triangulated_pose(pixels[:1], sure(views=1), rig.select([0]), NAMES)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        ({"points": torch.zeros(F, 0, 3)}, "holds no keypoints"),
        ({"found": torch.zeros(F, P + 1)}, "as many confidences"),
        ({"names": NAMES[1:]}, "as many confidences"),
        ({"sure": None}, "or neither"),
        ({"pixels": torch.zeros(V, F + 1, P, 2)}, "pixels of shape"),
        ({"points": torch.full((F, P, 3), torch.nan)}, "NaN"),
        ({"found": torch.full((F, P), 1.5)}, "between 0 and 1"),
    ],
)
def test_a_pose_that_contradicts_itself_is_refused(spoil, says):
    good = dict(points=torch.zeros(F, P, 3), found=torch.zeros(F, P),
                pixels=torch.zeros(V, F, P, 2), sure=torch.zeros(V, F, P), names=NAMES)  # fmt: skip
    assert Pose(**{**good, "pixels": None, "sure": None}).get_ram_usage() == 4 * F * P * 4
    with pytest.raises(ValueError, match=says):
        Pose(**{**good, **spoil})
