"""Annotators: what the nets' answers mean, the library as reference, and what is refused."""

import importlib.util
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from turnaround.models import annotators
from turnaround.models.annotators import MIDAS, NORMALBAE, OPENPOSE, ZOE
from turnaround.models.geometry import encode_normals

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("controlnet_aux") is None,
    reason="the optional package controlnet-aux is not installed",
)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def nets():
    """The library's own networks with seeded random weights, each built once."""
    built = {}

    def of(annotator):
        if annotator not in built:
            torch.manual_seed(0)
            with annotators._library():
                built[annotator] = annotator.build().eval()
        return built[annotator]

    return of


def pictures(count=1, height=64, width=64):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def as_bytes(picture):
    return (picture * 255).round().byte().movedim(0, -1).numpy()


# --- conventions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "colour"),
    [
        # NormalBae says x left, y up, z towards the camera; a wall turned to the right by 30
        # degrees says -0.5 along x and must come out redder than grey.
        ((-0.5, 0.0, math.sqrt(0.75)), (0.75, 0.5, 0.5 + math.sqrt(0.75) / 2)),
        ((0.0, 0.5, math.sqrt(0.75)), (0.5, 0.75, 0.5 + math.sqrt(0.75) / 2)),
        ((0.0, 0.0, 2.0), (0.5, 0.5, 1.0)),  # and comes out at unit length
    ],
)
def test_walls_turned_right_are_red_and_floors_green(said, colour):
    answer = torch.tensor(said).view(1, 3, 1, 1)
    normals = annotators.normals_from_normalbae(answer)
    torch.testing.assert_close(
        encode_normals(normals.movedim(1, -1)).flatten(), torch.tensor(colour)
    )


def test_near_is_white_for_both_depth_nets_and_the_clip_is_scaled_as_a_whole():
    metres = torch.tensor([[2.0, 4.0], [3.0, 10.0]])  # two frames
    white = annotators.near_is_white(metres, ZOE)
    torch.testing.assert_close(white, (10 - metres) / 8)
    white = annotators.near_is_white(1 / metres, MIDAS)
    torch.testing.assert_close(white, (1 / metres - 0.1) / 0.4)


def test_a_clip_without_depth_is_black_and_not_nan():
    assert annotators.near_is_white(torch.full((2, 3), 7.0), MIDAS).eq(0).all()


# --- the library as reference ---------------------------------------------------------------------


@needs_library
def test_normals_are_the_detectors_with_red_mirrored(nets):
    with annotators._library():
        from controlnet_aux import NormalBaeDetector
    frame = pictures()
    frame = (frame * 255).round() / 255
    reference = NormalBaeDetector(nets(NORMALBAE))(
        as_bytes(frame[0]), detect_resolution=64, image_resolution=64, output_type="np"
    )
    reference = torch.from_numpy(reference).float() / 255
    ours = encode_normals(annotators.estimate_normals(nets(NORMALBAE), frame, 64)[0].movedim(0, -1))
    ours[..., 0] = 1 - ours[..., 0]
    # The detector cuts to whole bytes.
    torch.testing.assert_close(ours, reference + 0.5 / 255, atol=0.6 / 255, rtol=0)
    assert ours.std() > 0.01  # the picture is not flat, so a swapped axis would show


@needs_library
def test_depth_is_the_detectors(nets):
    with annotators._library():
        from controlnet_aux import MidasDetector
    frame = (pictures() * 255).round() / 255
    reference = MidasDetector(nets(MIDAS))(as_bytes(frame[0]), detect_resolution=64,
                                           image_resolution=64)  # fmt: skip
    reference = torch.from_numpy(reference[..., 0]).float() / 255
    depth = annotators.estimate_depth(nets(MIDAS), MIDAS, frame, 64)
    ours = annotators.near_is_white(depth, MIDAS)[0]
    torch.testing.assert_close(ours, reference + 0.5 / 255, atol=0.6 / 255, rtol=0)
    # Nothing of the last frame stays behind on the device.
    assert nets(MIDAS).pretrained.activations == {}


@needs_library
def test_weights_of_openposes_own_files_find_their_branches(nets):
    from controlnet_aux.open_pose.util import transfer

    state = nets(OPENPOSE).state_dict()
    file = {key.split(".", 1)[1]: value for key, value in state.items()}
    ours = annotators.as_weights(file)
    assert ours.keys() == state.keys()
    assert all(ours[k] is v for k, v in transfer(nets(OPENPOSE), file).items())


@needs_library
@pytest.mark.parametrize("annotator", [NORMALBAE, OPENPOSE], ids=lambda a: a.label)
def test_weights_are_recognised_and_loaded(nets, annotator):
    state = nets(annotator).state_dict()
    file = {"model": {f"module.{k}": v.half() for k, v in state.items()}, "epoch": 3}
    weights = annotators.as_weights(file)
    assert annotators.recognise(weights, annotator.task, "x") is annotator
    loaded = annotators.build_net(annotator, weights, "x").state_dict()
    assert all(torch.equal(loaded[k], v.half().to(v)) for k, v in state.items())


# --- pose from known answers ----------------------------------------------------------------------

# Shares of the person's box, in OpenPose's order: nose, neck, right arm, left arm, right leg, left
# leg, eyes, ears.
STANDING = torch.tensor([
    [.50, .10], [.50, .22], [.35, .22], [.28, .38], [.25, .52], [.65, .22], [.72, .38], [.75, .52],
    [.42, .52], [.42, .74], [.42, .95], [.58, .52], [.58, .74], [.58, .95], [.46, .07], [.54, .07],
    [.41, .09], [.59, .09],
])  # fmt: skip
# Bones with the channels of the field that leads from their first to their second point.
FIELDS = {
    (1, 2): 12, (2, 3): 14, (3, 4): 16, (1, 5): 20, (5, 6): 22, (6, 7): 24, (1, 8): 0, (8, 9): 2,
    (9, 10): 4, (1, 11): 6, (11, 12): 8, (12, 13): 10, (1, 0): 28, (0, 14): 30, (14, 16): 34,
    (0, 15): 32, (15, 17): 36,
}  # fmt: skip


class Seeing(nn.Module):
    """Answers as OpenPose's network would that sees people, given as shares of the frame."""

    def __init__(self, people, aspect=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.people = people
        self.aspect = aspect  # the net gets 184 rows, and columns filled up to a multiple of 8
        self.seen = None

    def forward(self, data):
        self.seen = data
        h, w = data.shape[-2] // 8, data.shape[-1] // 8
        y, x = (torch.arange(n) + 0.5 for n in (h, w))
        cells = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # [h, w, 2]
        heat, field = torch.zeros(1, 19, h, w), torch.zeros(1, 38, h, w)
        for person in self.people:
            points = person * h * torch.tensor([self.aspect, 1.0])
            for n, point in enumerate(points):
                bump = (-(cells - point).square().sum(-1) / 2).exp()
                heat[0, n] = torch.maximum(heat[0, n], bump)
            for (a, b), channel in FIELDS.items():
                along = F.normalize(points[b] - points[a], dim=0)
                length = (points[b] - points[a]).norm()
                t = ((cells - points[a]) @ along).clamp(0, float(length))
                near = (cells - points[a] - t[..., None] * along).norm(dim=-1) < 1.5
                field[0, channel : channel + 2][:, near] = along[:, None]
        return field, heat


def standing(left, top, width, height):
    return torch.tensor([left, top]) + STANDING * torch.tensor([width, height])


@needs_library
@pytest.mark.parametrize(("height", "width"), [(184, 184), (368, 184), (92, 92)])
def test_keypoints_come_back_in_pixels_of_the_frame(height, width):
    person = standing(0.1, 0.02, 0.8, 0.96)
    frames = pictures(1, height, width)
    (found,) = annotators.estimate_poses(Seeing([person], width / height), frames)
    assert found.shape == (1, 18, 3)
    error = found[0, :, :2] - person * torch.tensor([width, height])
    # A cell of the net is 1/23 of the height; a lost half pixel would show in the mean.
    assert error.norm(dim=-1).max() < 1
    assert error.mean(0).abs().max() < 0.2
    assert found[0, :, 2].min() > 0.5


@needs_library
def test_the_largest_person_comes_first_and_the_net_sees_blue_green_red():
    small, large = standing(0.62, 0.3, 0.35, 0.5), standing(0.02, 0.02, 0.6, 0.96)
    net = Seeing([small, large])
    red = torch.zeros(1, 3, 184, 184)
    red[:, 0] = 1
    (found,) = annotators.estimate_poses(net, red)
    assert len(found) == 2
    assert found[0, 10, 1] > found[1, 10, 1]  # the large one's ankle is lower
    blue_of_net, _, red_of_net = net.seen[0].flatten(1).mean(1)
    assert red_of_net > 0.4 and blue_of_net == -0.5
    (frame,) = annotators.poses_json([found], 184, 184)
    assert len(frame["people"]) == 2 and frame["canvas_width"] == 184
    assert frame["people"][0]["pose_keypoints_2d"][:2] == found[0, 0, :2].tolist()


@needs_library
def test_nobody_gives_no_people():
    poses = annotators.estimate_poses(Seeing([]), pictures(2, 64, 48))
    assert [len(p) for p in poses] == [0, 0]
    assert [f["people"] for f in annotators.poses_json(poses, 48, 64)] == [[], []]


# --- one frame after the other --------------------------------------------------------------------


class Brightness(nn.Module):
    """A depth net that calls bright pixels near, and keeps its features as MiDaS does."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.activations = {}
        self.sizes = []

    def forward(self, x):
        self.activations["1"] = x
        self.sizes.append(tuple(x.shape[-2:]))
        return x.mean(1) * self.weight


def test_depth_has_the_clips_size_and_the_net_gets_multiples_of_32():
    net = Brightness()
    ramp = torch.linspace(0, 1, 150).expand(2, 3, 100, 150)
    depth = annotators.estimate_depth(net, MIDAS, ramp, 64)
    assert depth.shape == (2, 100, 150) and net.sizes == [(64, 96)] * 2
    # The net sees -1..1; scaling there and back leaves a ramp a ramp.
    torch.testing.assert_close(depth, 2 * ramp[:, 0] - 1, atol=0.02, rtol=0)
    assert net.activations == {}


def test_progress_shows_each_frame_and_may_stop_the_run():
    net, seen = Brightness(), []

    def on_step(done, total, preview):
        seen.append((done, total, tuple(preview.shape)))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        annotators.estimate_depth(net, MIDAS, pictures(3, 48, 32), 64, on_step)
    assert seen == [(1, 3, (3, 48, 32)), (2, 3, (3, 48, 32))]
    assert net.activations == {}


def test_nothing_but_numbers_comes_out():
    net = Brightness()
    with torch.no_grad():
        net.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="MiDaS gave no numbers for frame 0: .* dpt_hybrid"):
        annotators.estimate_depth(net, MIDAS, pictures(), 64)


def test_frames_that_no_net_can_take_are_refused():
    broken = pictures(3)
    broken[1, 0, 5, 5] = torch.nan
    with pytest.raises(ValueError, match="Frame 1 of the clip holds values that are no numbers"):
        annotators.estimate_depth(Brightness(), MIDAS, broken, 64)
    with pytest.raises(ValueError, match="900x20, too narrow"):
        annotators.estimate_poses(Brightness(), torch.zeros(1, 3, 20, 900))


def test_memory_follows_what_the_net_gets():
    at = [annotators.working_memory(NORMALBAE, 1920, 1080, r) for r in (256, 512)]
    assert at[1] == pytest.approx(4 * at[0], rel=0.1)
    # Zoe and OpenPose shrink inside.
    assert annotators.working_memory(ZOE, 640, 480, 512) == annotators.working_memory(
        ZOE, 1920, 1080, 1024
    )
    assert annotators.working_memory(OPENPOSE, 4000, 4000, 0) < 50e6


# --- files and packages that are not right --------------------------------------------------------


def test_another_nets_file_is_named():
    weights = {NORMALBAE.key: torch.zeros(1)}
    with pytest.raises(ValueError, match="'a.pt' holds NormalBae, a net for normals, but depth is"):
        annotators.recognise(weights, "depth", "a.pt")
    with pytest.raises(ValueError, match="is no known net, but pose is .* body_pose_model.pth"):
        annotators.recognise({"weight": torch.zeros(1)}, "pose", "a.pt")


def test_files_without_weights_give_none():
    assert annotators.as_weights(torch.zeros(1)) == {}
    assert annotators.as_weights({"epoch": 3, "model": "a name"}) == {}


@needs_library
def test_incomplete_weights_are_counted(nets):
    weights = dict(nets(OPENPOSE).state_dict())
    del weights["model0.conv1_1.bias"]
    weights["model0.conv1_2.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match="1 of its 184 weights are missing and 1 have another"):
        annotators.build_net(OPENPOSE, weights, "a.pth")


def test_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "controlnet_aux", None)
    for name in [n for n in sys.modules if n.startswith("controlnet_aux.")]:
        monkeypatch.delitem(sys.modules, name)
    for annotator in annotators.ANNOTATORS:
        with pytest.raises(ValueError, match="needs the package controlnet-aux.*pip install"):
            annotators.build_net(annotator, {}, "a.pt")
    with pytest.raises(ValueError, match="needs the package controlnet-aux"):
        annotators.estimate_poses(Brightness(), pictures())


def test_a_package_that_does_not_start_is_one_sentence(monkeypatch, tmp_path):
    for name in [n for n in sys.modules if n.split(".")[0] == "controlnet_aux"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "controlnet_aux").mkdir()
    (tmp_path / "controlnet_aux" / "__init__.py").write_text("import math; math.no_such_thing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"does not work here \(AttributeError: .*no_such_thing"):
        annotators.build_net(MIDAS, {}, "a.pt")
