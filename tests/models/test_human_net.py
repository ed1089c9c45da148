"""The human net: crops and what comes back from them, gradients, whom it chooses, empty pictures."""

import pytest
import torch
import torch.nn.functional as F
from turnaround.models import human_net
from turnaround.models.human_frames import (
    OPENPOSE18,
    Looking,
    aimed_camera,
    choose_person,
    estimate_humans,
    find_people,
    openpose_json,
    smooth_over_time,
    to_openpose,
)
from turnaround.models.human_net import (
    CROP,
    HumanNet,
    HumanOutput,
    box_to_crop,
    crop_frames,
    estimate_keypoints,
    human_layout,
    inside_box,
    paste,
    soft_argmax,
    to_frame,
)
from turnaround.models.metrics import mask_iou
from turnaround.models.performer_truth import KEYPOINTS

P = len(KEYPOINTS)
TINY = (8, 8, 8, 8, 8)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return HumanNet(TINY).eval()


class Stub(torch.nn.Module):
    """Knows that people are what is bright: exact answers for the plumbing around a real net."""

    scale = 100.0  # pixels of a crop a metre

    def forward(self, pictures):
        B, _, H, W = pictures.shape
        logits = (pictures.mean(1) - 0.75) * 60
        half = torch.zeros(B, H // 2, W // 2)
        keypoints = torch.tensor([W / 2, H / 2]).expand(B, P, 2)
        normals = torch.stack([half, half, half - 1], 1)
        scale = torch.tensor([self.scale, 1.7]).log().expand(B, 2)
        return HumanOutput(
            logits, logits, half, normals, torch.zeros(B, P, 4, 4), keypoints,
            torch.full((B, P), 3.0), scale,
        )  # fmt: skip


def frames_with(*boxes, width=120, height=90, count=1):
    frames = torch.full((count, 3, height, width), 0.2)
    for x0, y0, x1, y1 in boxes:
        frames[..., y0:y1, x0:x1] = 1.0
    return frames


def test_outputs_have_the_shapes_they_promise(net):
    out = net(torch.rand(2, 3, 64, 32))
    assert out.mask.shape == out.anyone.shape == (2, 64, 32)
    assert out.relief.shape == (2, 32, 16) and out.normals.shape == (2, 3, 32, 16)
    assert out.keypoints.shape == (2, P, 2) and out.confidence.shape == (2, P)
    assert out.scale.shape == (2, 2)
    torch.testing.assert_close(out.normals.norm(dim=1), torch.ones(2, 32, 16))


def test_other_sizes_are_refused_with_the_size(net):
    with pytest.raises(ValueError, match="not 30x64"):
        net(torch.rand(1, 3, 64, 30))


def test_default_net_is_small_and_its_file_tells_its_layout(net):
    with torch.device("meta"):
        default = HumanNet()
    assert sum(p.numel() for p in default.parameters()) < 3e6
    assert human_layout(net.state_dict()) == (TINY, P)
    with pytest.raises(ValueError, match="not a human net"):
        human_layout({"blocks.0.weight": torch.zeros(1)})


def test_soft_argmax_of_a_sharp_peak_is_the_middle_of_its_cell():
    heat = torch.zeros(1, 1, 6, 5)
    heat[0, 0, 4, 1] = 50
    torch.testing.assert_close(soft_argmax(heat, 4)[0][0, 0], torch.tensor([6.0, 18.0]))


def test_keypoints_carry_exact_gradients_to_the_picture(monkeypatch):
    """Against central differences in float64, through crop, net and soft-argmax."""
    torch.manual_seed(1)
    net = HumanNet(TINY, keypoints=3).double().eval()
    monkeypatch.setattr(human_net, "CROP", (64, 64))
    # The net's heads work in float32 for half-precision weights; here everything stays float64.
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    frames = torch.rand(1, 3, 40, 40, dtype=torch.float64)
    box = torch.tensor([[-3.0, 3.0, 35.0, 41.0]], dtype=torch.float64)
    weights = torch.randn(1, 3, 2, dtype=torch.float64)

    def total(picture):
        return (estimate_keypoints(net, picture, box)[0] * weights).sum()

    frames.requires_grad_()
    (gradient,) = torch.autograd.grad(total(frames), frames)
    direction = torch.randn_like(frames)
    step = 1e-6
    with torch.no_grad():
        slope = (total(frames + step * direction) - total(frames - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-9)
    assert gradient.abs().sum() > 0


def test_crop_of_the_whole_frame_is_the_frame():
    frames = torch.rand(2, 3, 12, 10)
    boxes = torch.tensor([[0.0, 0, 10, 12]]).expand(2, 4)
    torch.testing.assert_close(crop_frames(frames, boxes, 10, 12), frames)


def test_crop_beyond_the_frame_is_grey():
    crop = crop_frames(torch.ones(1, 3, 10, 10), torch.tensor([[-10.0, 0, 10, 10]]), 20, 10)
    torch.testing.assert_close(crop[..., :9], torch.full((1, 3, 10, 9), 0.5))
    torch.testing.assert_close(crop[..., 11:], torch.ones(1, 3, 10, 9))
    away = crop_frames(torch.ones(1, 3, 10, 10), torch.tensor([[50.0, 50, 60, 60]]), 8, 8)
    torch.testing.assert_close(away, torch.full((1, 3, 8, 8), 0.5))


def test_shrinking_a_crop_averages_and_does_not_alias():
    stripes = torch.zeros(1, 3, 64, 64)
    stripes[..., ::2] = 1
    crop = crop_frames(stripes, torch.tensor([[0.0, 0, 64, 64]]), 16, 16)
    torch.testing.assert_close(crop, torch.full_like(crop, 0.5), rtol=0, atol=0.02)


def test_paste_undoes_a_crop():
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(50.0), indexing="ij")
    frame = torch.stack([x, y])
    box = torch.tensor([8.0, 4.0, 40.0, 36.0])
    crop = crop_frames(torch.cat([frame, x[None]])[None], box[None], 32, 32)[0, :2]
    back = paste(crop, box, 50, 40)
    inside = inside_box(box, 50, 40)
    assert int(inside.sum()) == 32 * 32
    torch.testing.assert_close(back[:, inside], frame[:, inside], rtol=0, atol=1e-3)


def test_keypoints_go_from_crop_to_frame():
    boxes = torch.tensor([[10.0, 20, 30, 60]])
    points = torch.tensor([[[0.0, 0], [160, 192], [80, 96]]])
    expected = torch.tensor([[[10.0, 20], [30, 60], [20, 40]]])
    torch.testing.assert_close(to_frame(points, boxes, (160, 192)), expected)


def test_crop_holds_the_box_in_the_nets_shape():
    for box in ([10.0, 10, 20, 60], [0.0, 50, 100, 60]):
        crop = box_to_crop(torch.tensor(box))
        assert crop[0] <= box[0] and crop[1] <= box[1] and crop[2] >= box[2] and crop[3] >= box[3]
        ratio = (crop[2] - crop[0]) / (crop[3] - crop[1])
        assert float(ratio) == pytest.approx(CROP[0] / CROP[1])


def test_people_are_connected_parts_by_size_and_crumbs_are_none():
    mask = torch.zeros(40, 60)
    mask[5:30, 5:12] = 1
    mask[10:38, 40:55] = 1
    mask[0, 30] = 1
    people = find_people(mask)
    assert [p.tolist() for p in people] == [[40, 10, 55, 38, 420], [5, 5, 12, 30, 175]]
    assert find_people(torch.zeros(8, 8)) == []


def test_a_winding_person_is_one_person():
    mask = torch.zeros(33, 33)
    mask[::8] = 1
    for n, y in enumerate(range(0, 32, 8)):
        mask[y : y + 8, -1 if n % 2 else 0] = 1
    assert len(find_people(mask)) == 1


PEOPLE = [
    torch.tensor([60.0, 10, 90, 80, 2000]),
    torch.tensor([30.0, 10, 50, 60, 900]),
    torch.tensor([0.0, 0, 10, 30, 300]),
    torch.tensor([95.0, 0, 97, 3, 5]),
]


@pytest.mark.parametrize(
    ("choice", "index", "found"),
    [("largest", 0, 0), ("centre", 0, 1), ("from the left", 0, 2), ("from the left", 1, 1),
     ("from the left", 9, 0)],
)  # fmt: skip
def test_the_chosen_person(choice, index, found):
    box = choose_person(PEOPLE, (100, 80), choice, index, None)
    assert torch.equal(box, PEOPLE[found][:4])


def test_the_same_person_is_followed():
    box = choose_person(PEOPLE, (100, 80), "largest", 0, torch.tensor([32.0, 12, 50, 60]))
    assert torch.equal(box, PEOPLE[1][:4])
    assert choose_person([], (100, 80), "largest", 0, None) is None


def test_smoothing_keeps_constants_fills_gaps_and_stops_at_jumps():
    values = torch.tensor([[1.0], [1], [99], [1], [5], [5]])
    known = torch.tensor([True, True, False, True, True, True])
    jumps = torch.tensor([False, False, False, False, True, False])
    smooth = smooth_over_time(values, known, 2.0, jumps)
    torch.testing.assert_close(smooth[:, 0], torch.tensor([1.0, 1, 1, 1, 5, 5]))
    still = smooth_over_time(values[known], torch.ones(5, dtype=torch.bool), 0.0)
    torch.testing.assert_close(still, values[known])


def test_smoothing_takes_jitter_away():
    torch.manual_seed(0)
    noisy = torch.linspace(0, 10, 40)[:, None] + torch.randn(40, 1)
    smooth = smooth_over_time(noisy, torch.ones(40, dtype=torch.bool), 2.0)
    assert smooth.diff(n=2, dim=0).std() < 0.1 * noisy.diff(n=2, dim=0).std()


@pytest.mark.parametrize("size", [(120, 90), (64, 200), (401, 83)])
def test_the_person_is_found_at_any_size(size):
    width, height = size
    box = (int(0.3 * width), int(0.2 * height), int(0.5 * width), int(0.9 * height))
    frames = frames_with(box, width=width, height=height, count=2)
    humans = estimate_humans(Stub(), frames, 200.0)
    truth = torch.zeros(2, height, width)
    truth[:, box[1] : box[3], box[0] : box[2]] = 1
    assert humans.masks.shape == truth.shape and humans.present.all() and humans.note == ""
    assert min(mask_iou(m, t) for m, t in zip(humans.masks, truth, strict=True)) > 0.9
    middle = torch.tensor([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2])
    assert (humans.keypoints[0, 0] - middle).norm() < 3


def test_distance_is_focal_length_over_pixels_a_metre():
    frames = frames_with((50, 20, 70, 70))
    humans = estimate_humans(Stub(), frames, 300.0)
    zoom = float(humans.boxes[0, 2] - humans.boxes[0, 0]) / CROP[0]
    middle = float(humans.depth[0, 45, 60])
    assert middle == pytest.approx(300 / (Stub.scale * zoom), rel=1e-3)
    tall = estimate_humans(Stub(), frames, 300.0, Looking(height=3.4))
    assert float(tall.depth[0, 45, 60]) == pytest.approx(2 * middle, rel=1e-3)
    assert tall.height == 3.4


def test_depth_and_normals_belong_to_the_frames_camera():
    """Somebody at the frame's edge who faces the camera: the normal points back along the ray."""
    frames = frames_with((100, 30, 115, 60))
    humans = estimate_humans(Stub(), frames, 100.0)
    x = float(humans.boxes[0, [0, 2]].mean())
    ray = torch.nn.functional.normalize(torch.tensor([(x - 60) / 100, 0.0, 1.0]), dim=0)
    normal = humans.normals[0, :, 45, 107]
    assert float(normal @ ray) < -0.99
    body = humans.masks[0] > 0.5
    assert (humans.depth[0][body] > 0).all() and (humans.depth[0][~body] == 0).all()
    torch.testing.assert_close(normal.norm(), torch.tensor(1.0))


def test_the_aimed_camera_sees_the_boxes_middle_straight_ahead():
    box = torch.tensor([80.0, 10, 100, 50])
    aim, rays = aimed_camera(box, 90.0, (60.0, 45.0), 120, 90)
    torch.testing.assert_close(aim @ aim.T, torch.eye(3), rtol=0, atol=1e-6)
    assert float(aim.det()) == pytest.approx(1)
    ray = torch.nn.functional.normalize(rays[:, 29:31, 89:91].mean((1, 2)), dim=0)
    torch.testing.assert_close(aim[:, 2], ray, rtol=0, atol=1e-5)


def test_several_people_are_said_and_the_choice_is_kept():
    frames = frames_with((10, 20, 25, 80), (60, 10, 100, 85))
    largest = estimate_humans(Stub(), frames, 200.0)
    assert "2 people" in largest.note and "largest" in largest.note
    assert largest.masks[0, 50, 80] > 0.5 and largest.keypoints[0, 0, 0] > 60
    left = estimate_humans(Stub(), frames, 200.0, Looking("from the left", 0))
    assert left.keypoints[0, 0, 0] < 40


def test_frames_without_anybody_stay_empty_and_are_named():
    frames = frames_with((50, 20, 70, 70), count=5)
    frames[1:3] = 0.2
    humans = estimate_humans(Stub(), frames, 200.0)
    assert humans.present.tolist() == [True, False, False, True, True]
    assert "frames 1-2" in humans.note
    assert humans.masks[1:3].sum() == 0 and humans.confidence[1:3].sum() == 0


def test_nobody_at_all_is_empty_and_finite():
    humans = estimate_humans(Stub(), torch.zeros(3, 3, 50, 60), 200.0)
    assert "no person" in humans.note and not humans.present.any()
    for values in (humans.masks, humans.depth, humans.normals, humans.keypoints):
        assert values.abs().sum() == 0


@pytest.mark.parametrize("picture", ["black", "white", "noise"])
def test_a_real_net_never_gives_nan(net, picture):
    frames = {"black": torch.zeros, "white": torch.ones, "noise": torch.rand}[picture](1, 3, 40, 30)
    with torch.no_grad():
        humans = estimate_humans(net, frames, 50.0)
    for values in (humans.masks, humans.depth, humans.normals, humans.keypoints):
        assert values.isfinite().all()


def test_tiny_frames_are_refused_with_their_size():
    with pytest.raises(ValueError, match="4x40"):
        estimate_humans(Stub(), torch.zeros(1, 3, 40, 4), 200.0)


def test_chunks_and_progress_do_not_change_the_result(net):
    torch.manual_seed(2)
    frames = F.interpolate(torch.rand(3, 3, 4, 3), (40, 30), mode="bilinear")
    steps = []
    with torch.no_grad():
        one = estimate_humans(
            net, frames, 50.0, Looking(chunk=1), on_step=lambda *a: steps.append(a[:2])
        )
        all_at_once = estimate_humans(net, frames, 50.0, Looking(chunk=3))
    assert steps[-1] in ((9, 9), (3, 9))  # the second look is left out when nobody is there
    torch.testing.assert_close(one.masks, all_at_once.masks, rtol=0, atol=1e-4)


def test_openpose_has_its_order_its_neck_and_leaves_doubt_out():
    points = torch.arange(2.0 * P).view(1, P, 2)
    sure = torch.full((1, P), 0.9)
    sure[0, KEYPOINTS.index("wrist.R")] = 0.1
    xy, c = to_openpose(points, sure)
    assert xy.shape == (1, 18, 2) and OPENPOSE18[4] == "wrist.R" and c[0, 4] == pytest.approx(0.1)
    shoulders = [KEYPOINTS.index(k) for k in ("shoulder.L", "shoulder.R")]
    torch.testing.assert_close(xy[0, 1], points[0, shoulders].mean(0))
    humans = estimate_humans(Stub(), frames_with((50, 20, 70, 70)), 200.0)
    (frame,) = openpose_json(humans, 120, 90)
    assert frame["canvas_width"] == 120 and frame["canvas_height"] == 90
    assert len(frame["people"][0]["pose_keypoints_2d"]) == 54
    assert openpose_json(estimate_humans(Stub(), torch.zeros(1, 3, 50, 60), 9.0), 60, 50) == [
        {"people": [], "canvas_width": 60, "canvas_height": 50}
    ]
