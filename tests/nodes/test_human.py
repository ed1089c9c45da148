"""The human nodes in ComfyUI: loading, sockets, notes, and what is refused."""

import math
import sys

import folder_paths
import pytest
import torch
from safetensors.torch import save_file
from turnaround.models.cameras import orbit_rig
from turnaround.models.human_net import HumanNet
from turnaround.models.views import Views
from turnaround.nodes import embedded, geometry, human, run
from turnaround.nodes.human import HumanGeometry, LoadHumanNet

WIDTHS = (8, 8, 8, 8, 8)
FRAMES, HEIGHT, WIDTH = 3, 60, 48


class _Hidden:
    unique_id = "1"


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, one_thread):
    # Notes are read from the output; without a server there is nobody to send them to.
    for node in (HumanGeometry, geometry.PerformerGeometry):
        monkeypatch.setattr(node, "hidden", _Hidden())
    monkeypatch.delitem(sys.modules, "server", raising=False)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of a tiny net that takes everything bright as a person."""
    torch.manual_seed(0)
    with torch.inference_mode(False):
        net = HumanNet(WIDTHS)
        state = {k: v.detach().clone() for k, v in net.state_dict().items()}
    # One channel carries brightness from the stem to the masks; the rest stays random.
    for key in ("stem", "up2.from_skip", "up2.from_below", "fine", "surface"):
        state[f"{key}.weight"][:1] = 0
        state[f"{key}.bias"][:1] = 0
    state["stem.weight"][0, :3] = 1 / 75
    state["up2.from_skip.weight"][0, 0] = 1
    path = tmp_path_factory.mktemp("nets") / "tiny_human.safetensors"
    state["surface.weight"][:5] = 0
    state["surface.bias"][:5] = -6
    state["surface.weight"][:5, 0] = 12
    state["fine.weight"][0, 0, 1, 1] = 1
    save_file({k: v.half() for k, v in state.items()}, path)
    return path


@pytest.fixture
def net(weights):
    return human.load_human(str(weights))


def pictures(person=True):
    frames = torch.full((FRAMES, HEIGHT, WIDTH, 3), 0.1)
    if person:
        frames[:, 12:50, 18:32] = 1.0
    return frames


def run_node(net, **changes):
    options = dict(person="largest", number=0, frames="one clip", fov=40.0, performer_height=0.0,
                   nobody="stop", images=pictures())  # fmt: skip
    return HumanGeometry.execute(net, **{**options, **changes}).result


def test_the_list_holds_the_creators_folder_and_the_embedded_one(weights, monkeypatch):
    embedded.register()
    paths, _ = folder_paths.folder_names_and_paths[human.FOLDER]
    assert str(embedded.TINY / "human") in paths
    assert paths[0].endswith("turnaround_human")
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, human.FOLDER, ([str(weights.parent)], set())
    )
    folder_paths.filename_list_cache.pop(human.FOLDER, None)
    assert human.human_nets() == ["tiny_human.safetensors"]
    loaded = LoadHumanNet.execute("tiny_human.safetensors").result[0]
    assert isinstance(loaded.model, HumanNet)
    folder_paths.filename_list_cache.pop(human.FOLDER, None)


def test_missing_weights_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, human.FOLDER, ([str(tmp_path)], set()))
    folder_paths.filename_list_cache.pop(human.FOLDER, None)
    assert LoadHumanNet.define_schema().inputs[0].options == [human.NONE_FOUND]
    with pytest.raises(ValueError, match="put turnaround_tiny_human.safetensors"):
        LoadHumanNet.execute(human.NONE_FOUND)
    folder_paths.filename_list_cache.pop(human.FOLDER, None)


def test_another_models_file_is_refused(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a human net"):
        human.load_human(str(tmp_path / "other.safetensors"))


def test_outputs_fit_the_sockets_they_go_to(net):
    mask, depth, views, normals, pose, preview, note = run_node(net)
    assert mask.shape == (FRAMES, HEIGHT, WIDTH)
    for image in (depth, normals, preview):
        assert image.shape == (FRAMES, HEIGHT, WIDTH, 3)
        assert image.isfinite().all() and image.min() >= 0 and image.max() <= 1
    assert views.frames.shape == (1, FRAMES, 1, HEIGHT, WIDTH)
    assert len(pose) == FRAMES and pose[0]["canvas_width"] == WIDTH
    assert len(pose[0]["people"][0]["pose_keypoints_2d"]) == 54
    truth = torch.zeros(HEIGHT, WIDTH)
    truth[12:50, 18:32] = 1
    assert ((mask[0] > 0.5) == (truth > 0.5)).float().mean() > 0.9
    assert "m away" in note and "40°" in note


def test_depth_goes_into_performer_geometry(net):
    mask, _, views, *_ = run_node(net)
    video = Views(pictures().movedim(-1, 1)[None], mask[None])
    cloud, *_ = geometry.PerformerGeometry.execute(
        video, "metres", 40.0, 1.7, 1, depth_views=views
    ).result
    assert len(cloud.positions) > 100


def test_height_and_field_of_view_set_the_distance(net):
    def distance(**options):
        depth = run_node(net, **options)[2].frames
        return float(depth[depth > 0].median())

    assert distance(performer_height=2.0) == pytest.approx(
        2 * distance(performer_height=1.0), rel=0.02
    )
    ratio = math.tan(math.radians(30)) / math.tan(math.radians(15))
    # The relief does not scale with the distance.
    assert distance(fov=30.0) == pytest.approx(ratio * distance(fov=60.0), rel=0.15)


def test_a_clips_own_camera_wins_over_fov(net):
    rig = orbit_rig(torch.zeros(1), torch.zeros(1), 3.0, math.radians(25), WIDTH, HEIGHT)
    video = Views(pictures().movedim(-1, 1)[None], None, rig, 24.0)
    *_, note = result = run_node(net, video=video, fov=90.0)
    assert "25°" in note and result[2].rig is rig and result[2].fps == 24.0


def test_nobody_stops_or_gives_an_empty_mask(net):
    with pytest.raises(ValueError, match="No person was found in the 3 frames"):
        run_node(net, images=pictures(person=False))
    mask, depth, views, _, pose, _, note = run_node(
        net, images=pictures(person=False), nobody="empty mask"
    )
    assert mask.sum() == 0 and depth.sum() == 0 and views.frames.sum() == 0
    assert all(frame["people"] == [] for frame in pose) and "no person" in note


def test_one_frame_is_told_to_make_a_still(net):
    assert "stands still" in run_node(net, images=pictures()[:1])[-1]
    assert "stands still" not in run_node(net)[-1]
    assert "stands still" not in run_node(
        net, images=pictures()[:1], frames="unrelated pictures"
    )[-1]  # fmt: skip


def test_no_clip_several_views_and_depth_are_refused(net):
    with pytest.raises(ValueError, match="Connect 'video' or 'images'"):
        run_node(net, images=None)
    frames = pictures().movedim(-1, 1)[None]
    with pytest.raises(ValueError, match="has 2 views"):
        run_node(net, video=Views(frames.repeat(2, 1, 1, 1, 1)))
    with pytest.raises(ValueError, match="carries depth"):
        run_node(net, video=Views(frames[:, :, :1]))


def test_alpha_and_grey_pictures_work(net):
    grey = run_node(net, images=pictures()[..., :1])[0]
    alpha = run_node(net, images=torch.cat([pictures(), torch.ones(FRAMES, HEIGHT, WIDTH, 1)], -1))[
        0
    ]
    torch.testing.assert_close(grey, alpha)


def test_progress_comes_with_a_picture_and_the_cancel_button_works(net, monkeypatch):
    import comfy.model_management as mm
    import comfy.utils

    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *a, **k: seen.append(a))
    run_node(net)
    assert seen[-1][0] == seen[-1][1] == 3 * FRAMES and seen[-1][2] is not None
    mm.interrupt_current_processing(True)
    try:
        with pytest.raises(mm.InterruptProcessingException):
            run_node(net)
    finally:
        mm.interrupt_current_processing(False)
    assert callable(run.progress)
