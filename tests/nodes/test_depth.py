"""Align Depth and Refine Depth: whatever depth nodes give becomes metres, or one sentence."""

import math

import pytest
import torch
from turnaround.models.cameras import Rig, intrinsics
from turnaround.models.points import points_from_depth, unproject_depth
from turnaround.models.views import Views
from turnaround.nodes.depth import AXES, AlignDepth, RefineDepth

SIZE, FRAMES, FOV = 48, 5, 40.0
K = intrinsics(math.radians(FOV), SIZE, SIZE)


class _Hidden:
    unique_id = "1"


@pytest.fixture(autouse=True)
def _hidden(monkeypatch):
    for node in (AlignDepth, RefineDepth):
        monkeypatch.setattr(node, "hidden", _Hidden())


def ball(count=FRAMES):
    """Metres [F, H, W] of a ball of 0.6 m that walks away before a wall at 6 m; mask; normals."""
    rays = unproject_depth(torch.ones(1, SIZE, SIZE), K)
    centre = torch.zeros(count, 3, 1, 1)
    centre[:, 2, 0, 0] = 3 + 0.05 * torch.arange(count)
    a, b = rays.square().sum(1), (rays * centre).sum(1)
    inner = b * b - a * (centre.square().sum(1) - 0.36)
    masks = inner > 0
    depth = torch.where(masks, (b - inner.clamp(min=0).sqrt()) / a, 6.0)
    normals = torch.where(masks[:, None], (rays * depth[:, None] - centre) / 0.6, 0.0)
    return depth, masks.float(), normals


def image(values):
    return values[..., None].expand(-1, -1, -1, 3)


def metric(depth=None, masks=None, rig=None):
    true, inside, _ = ball()
    depth = true * inside if depth is None else depth
    return Views(depth[None, :, None], (inside if masks is None else masks)[None], rig)


def align(pictures, *given, **sockets):
    return AlignDepth.execute(image(pictures), *given, **sockets).result


PICTURES = {
    "near is black": lambda z: (z - 2) / 5,
    "near is white": lambda z: (7 - z) / 5,
    "1 / depth, near is white": lambda z: 0.9 / z * 2,
    "1 / depth, near is black": lambda z: 1 - 0.9 / z * 2,
}


@pytest.mark.parametrize("kind", PICTURES)
def test_eight_bit_pictures_of_every_convention_become_metres(kind):
    depth, masks, _ = ball()
    pictures = (PICTURES[kind](depth) * 255).round() / 255
    views, preview, note = align(pictures, metric())
    error = (views.frames[0, :, 0] - depth).abs()[masks > 0.5]
    assert float(error.max()) < 0.05  # a grey level is 2 cm, or 3 to 4 cm where 1 / depth is stored
    assert ("1 / depth" in note) == ("1 / depth" in kind) and kind[-5:] in note
    assert preview.shape == (FRAMES, SIZE, 3 * SIZE, 3)
    assert not views.frames[0, :, 0][masks < 0.5].any()


def test_a_coarse_metric_depth_leaves_the_pictures_their_size():
    depth, masks, _ = ball()
    small = Views(depth[None, :, None, 1::3, 1::3], masks[None, :, 1::3, 1::3],
                  Rig(K[None] * torch.tensor([[1 / 3], [1 / 3], [1]]), torch.eye(4)[None], 16, 16))  # fmt: skip
    views, *_ = align(depth / 7, small, "depth")
    assert views.frames.shape[-2:] == (SIZE, SIZE) and views.rig.width == SIZE
    torch.testing.assert_close(views.rig.K[0], K)
    inner = torch.nn.functional.avg_pool2d(masks, 9, 1, 4) > 0.99
    assert float((views.frames[0, :, 0] - depth).abs()[inner].max()) < 0.03


def test_fifty_known_points_and_a_cloud_do_as_well():
    depth, masks, _ = ball()
    sparse = torch.zeros_like(depth)
    sparse[:, ::7, ::7] = depth[:, ::7, ::7]
    colors = torch.full((FRAMES, 3, SIZE, SIZE), 0.5)
    cloud = points_from_depth(colors, depth * masks, masks, K)
    for given in ({"metric": metric(sparse * masks)}, {"cloud": cloud, "mask": masks}):
        views, *_ = align(1 / depth, **given)
        error = (views.frames[0, :, 0] - depth).abs()[masks > 0.5]
        assert float(error.max()) < 0.005


def test_body_keypoints_do_and_their_note_says_pose():
    depth, masks, _ = ball()
    points = unproject_depth(depth, K)
    frames = []
    for f in range(FRAMES):
        y, x = masks[f].nonzero()[::40].T
        frames.append([{"pred_keypoints_3d": points[f, :, y, x].T + 0.05 * torch.eye(3)[2],
                        "pred_cam_t": torch.zeros(3),
                        "pred_keypoints_2d": torch.stack([x, y], 1) + 0.5}])  # fmt: skip
    pose = {"frames": frames, "image_size": (SIZE, SIZE)}
    views, _, note = align(1 / depth, pose=pose, mask=masks, fov=FOV)
    assert float((views.frames[0, :, 0] - depth).abs()[masks > 0.5].median()) < 0.06
    assert "'pose'" in note


def flat_pose(height):
    joints = [[0.0, 0.0, 0.0]] * 18
    for number, row in {1: 0.0, 8: 0.29, 11: 0.29, 9: 0.53, 12: 0.53, 10: 0.78, 13: 0.78}.items():
        joints[number] = [20.0, row * height, 1.0]
    person = {"pose_keypoints_2d": [v for j in joints for v in j]}
    return [{"people": [person], "canvas_height": SIZE, "canvas_width": SIZE}] * FRAMES


def test_flat_keypoints_give_the_distance_and_say_that_the_rest_is_a_guess():
    depth, masks, _ = ball()
    true = 3.0
    pose = flat_pose(float(K[1, 1]) * 1.2 / true)
    views, _, note = align(1 / depth, pose=pose, mask=masks, fov=FOV, performer_height=1.2)
    found = views.frames[0, :, 0][masks > 0.5]
    assert float(found.median()) == pytest.approx(true, abs=0.25) and "guess" in note


ALIGN_REFUSED = {
    "nothing to align with": (lambda z: image(z), {}, "Connect 'metric', 'cloud' or 'pose'"),
    "colour map": (lambda z: torch.stack([z / 7, 1 - z / 7, z * 0], -1), {"metric"}, "coloured"),
    "constant": (lambda z: image(0 * z + 0.5), {"metric"}, "0.5 all over the performer"),
    "black": (lambda z: image(0 * z), {"metric"}, "0 all over the performer"),
    "NaN": (lambda z: image(z * math.nan), {"metric"}, "no finite value inside the mask"),
    "infinite": (lambda z: image(z * math.inf), {"metric"}, "no finite value inside the mask"),
    "too few frames": (lambda z: image(z[:3]), {"metric"}, "'depth' has 3 frames but 'metric' has 5"),
    "another shape": (lambda z: image(z[:, :, :24]), {"metric"}, "another shape"),
    "empty pose": (lambda z: image(z), {"pose"}, "'pose' holds no frames"),
}  # fmt: skip


@pytest.mark.parametrize("case", ALIGN_REFUSED)
def test_what_align_depth_cannot_use_is_one_sentence(case):
    make, sockets, sentence = ALIGN_REFUSED[case]
    given = {"metric": metric(), "pose": []}
    with pytest.raises(ValueError, match=sentence):
        AlignDepth.execute(make(ball()[0]), **{name: given[name] for name in sockets})


def test_metric_without_a_usable_value_colour_or_several_views_are_refused():
    depth, *_ = ball()
    for bad in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="share 0 points"):
            align(depth, metric(torch.full_like(depth, bad)))
    with pytest.raises(ValueError, match="'metric' carries colour"):
        align(depth, Views(torch.zeros(1, FRAMES, 3, SIZE, SIZE)))
    with pytest.raises(ValueError, match="'metric' has 2 views"):
        align(depth, Views(torch.ones(2, FRAMES, 1, SIZE, SIZE)))
    with pytest.raises(ValueError, match="'mask' has 2 frames"):
        align(depth, metric(), mask=torch.ones(2, SIZE, SIZE))
    with pytest.raises(ValueError, match="connect 'mask' too"):
        align(depth, pose=flat_pose(10.0))


def test_one_frame_and_a_frame_where_nobody_is_go_through():
    depth, masks, _ = ball(1)
    views, *_ = align(depth, metric(depth * masks, masks))
    assert float((views.frames[0, :, 0] - depth).abs()[masks > 0.5].max()) < 0.005
    depth, masks, _ = ball()
    masks[2] = 0
    views, *_ = align(depth, metric(depth * masks, masks))
    assert not views.frames[0, 2].any() and views.frames.isfinite().all()


# ---------------------------------------------------------------- refine


def colours(normals, axes):
    right, up = AXES[axes]
    return (0.5 + 0.5 * normals * torch.tensor([right, -up, -1.0])[:, None, None]).movedim(1, -1)


def refine(depth, axes="red right, green up", **sockets):
    return RefineDepth.execute(depth, axes, 12.0, FOV, **sockets).result


def noisy():
    depth, masks, _ = ball()
    generator = torch.Generator().manual_seed(0)
    return metric((depth + 0.01 * torch.randn(depth.shape, generator=generator)) * masks)


def test_the_same_normals_in_four_colour_conventions_give_the_same_depth():
    *_, normals = ball()
    found = [refine(noisy(), axes, normals=colours(normals, axes)) for axes in AXES]
    for views, _, note in found[1:]:
        torch.testing.assert_close(views.frames, found[0][0].frames, rtol=0, atol=1e-5)
        assert "agree better" not in note
    depth, masks, _ = ball()
    inner = torch.nn.functional.avg_pool2d(masks, 5, 1, 2) > 0.99
    before = (noisy().frames[0, :, 0] - depth)[inner].std()
    assert float((found[0][0].frames[0, :, 0] - depth)[inner].std()) < 0.4 * float(before)


@pytest.mark.parametrize("true", AXES)
def test_wrong_axes_are_noticed_and_the_right_ones_named(true):
    *_, normals = ball()
    wrong = next(a for a in AXES if a != true)
    note = refine(noisy(), wrong, normals=colours(normals, true))[2]
    assert f"'{true}' would agree better" in note


def test_normals_that_face_away_are_said_to_be_none():
    *_, normals = ball()
    turned = normals * torch.tensor([1.0, 1.0, -1.0])[:, None, None]
    assert "no normal map" in refine(noisy(), normals=colours(turned, "red right, green up"))[2]


def test_without_normals_noise_goes_and_the_note_says_so():
    depth, masks, _ = ball()
    views, preview, note = refine(noisy())
    inner = torch.nn.functional.avg_pool2d(masks, 5, 1, 2) > 0.99
    before = (noisy().frames[0, :, 0] - depth)[inner].std()
    assert float((views.frames[0, :, 0] - depth)[inner].std()) < 0.7 * float(before)
    assert "no normals" in note and preview.shape == (FRAMES, SIZE, 3 * SIZE, 3)


@pytest.mark.parametrize("fov", [5.0, 120.0])
@pytest.mark.parametrize(
    "spoil", [lambda n: 0.2 * n, lambda n: 0 * n + 0.5, lambda n: n * math.nan, lambda n: n[..., :1]],
    ids=["short", "grey", "NaN", "one channel"],
)  # fmt: skip
def test_poor_normals_and_extreme_lenses_leave_finite_depth(spoil, fov):
    *_, normals = ball()
    given = spoil(colours(normals, "red right, green up"))
    views, preview, _ = RefineDepth.execute(
        noisy(), "red right, green up", 12.0, fov, normals=given
    ).result
    assert views.frames.isfinite().all() and preview.isfinite().all() and (views.frames >= 0).all()


def test_depth_that_says_nothing_is_one_sentence_and_holes_of_nan_are_filled():
    depth, masks, normals = ball()
    for bad in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="no usable depth inside the mask"):
            refine(metric(torch.full_like(depth, bad)))
    with pytest.raises(ValueError, match="no usable depth inside the mask"):
        refine(metric(), mask=torch.zeros(FRAMES, SIZE, SIZE))
    with pytest.raises(ValueError, match="'normals' has 2 frames but the depth has 5"):
        refine(metric(), normals=torch.zeros(2, SIZE, SIZE, 3))
    holed = depth * masks
    holed[:, 20:24, 20:24], holed[:, 26, 26] = math.nan, math.inf
    views, *_ = refine(metric(holed), normals=colours(normals, "red right, green up"))
    filled = views.frames[0, :, 0, 20:24, 20:24]
    assert float((filled - depth[:, 20:24, 20:24]).abs().max()) < 0.005


def test_the_cancel_button_stops_the_refinement():
    import comfy.model_management as mm

    mm.interrupt_current_processing(True)
    try:
        with pytest.raises(mm.InterruptProcessingException):
            refine(noisy())
    finally:
        mm.interrupt_current_processing(False)
