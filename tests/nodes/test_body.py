"""The body nodes: bodies from every socket and file, and maps that any node can take."""

import importlib.util
import logging
import math
import os
from types import SimpleNamespace

import comfy.model_management as mm
import folder_paths
import numpy as np
import pytest
import torch
from comfy_api.latest import Types
from turnaround.models.body import Body
from turnaround.models.body_sources import PHENOTYPE
from turnaround.models.cameras import orbit_rig
from turnaround.models.views import Views
from turnaround.nodes import body as nodes
from turnaround.nodes import run
from turnaround.nodes.views import PreviewViews, SamplePerformer

FIGURE = torch.tensor([[-0.3, 0.0, 0], [0.3, 0, 0], [0, 1.7, 0], [0, 0.5, 0.2]])
FACES = torch.tensor([[0, 1, 3], [1, 2, 3], [2, 0, 3], [0, 2, 1]])
RIG = orbit_rig(torch.tensor([0.0, math.pi]), torch.zeros(2), 4.0, math.radians(35), 32, 48)
SETTINGS = dict(
    reference_view=0, reference_frames=1, unseen_normals="kept", deformation_scale=0.0,
    motion_scale=0.0, crop_left=0, crop_top=0, crop_right=0, crop_bottom=0,
)  # fmt: skip
MAPS = (
    "pose", "deformation", "motion", "rays", "normals", "visibility", "depth", "reference_mask",
    "crop_mask",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _hosted(monkeypatch, caplog, tmp_path):
    """Nodes have an id, as in a run; ComfyUI's folders are empty ones."""
    caplog.set_level(logging.INFO, logger="turnaround")
    for node in [*nodes.NODES, PreviewViews, SamplePerformer]:
        hidden = SimpleNamespace(unique_id="1", prompt=None, extra_pnginfo=None)
        monkeypatch.setattr(node, "hidden", hidden)
    for folder in ("input", "temp"):
        (tmp_path / folder).mkdir()
        monkeypatch.setattr(folder_paths, f"{folder}_directory", str(tmp_path / folder))


def mesh(frames: int = 5) -> Types.MESH:
    step = torch.arange(frames)[:, None, None] * torch.tensor([0.1, 0, 0])
    return Types.MESH(FIGURE + step, FACES.expand(frames, 4, 3))


def body(frames: int = 5) -> Body:
    return nodes.BodyFromMesh.execute(mesh(frames), 0.0, 0, 16.0).result[0]


def render(of: Body, rig=RIG, **settings) -> dict:
    result = nodes.RenderBodyMaps.execute(of, rig, **(SETTINGS | settings)).result
    names = (*MAPS, "deformation_scale", "motion_scale", "note")
    return dict(zip(names, result, strict=True))


def write_obj(path, vertices=FIGURE) -> None:
    lines = ["v {} {} {}".format(*v) for v in vertices.tolist()]
    lines += ["f {} {} {}".format(*(np.array(f) + 1)) for f in FACES.tolist()]
    path.write_text("\n".join(lines))


def test_every_input_and_output_has_a_tooltip():
    for node in nodes.NODES:
        schema = node.define_schema()
        assert schema.description
        for part in [*schema.inputs, *schema.outputs]:
            assert part.tooltip, (schema.node_id, part)


def test_outputs_stand_in_the_order_of_the_schema():
    schema = nodes.RenderBodyMaps.define_schema()
    names = [out.display_name for out in schema.outputs]
    assert names == [*MAPS, "deformation_scale", "motion_scale", "note"]


def test_sample_body_lies_on_the_sample_performer():
    (made,) = nodes.SampleBody.execute(
        "kira (unseen)", "dance_a (unseen)", 1, 0.2, 1_000_003
    ).result
    *_, truth = SamplePerformer.execute(
        "kira (unseen)", "dance_a (unseen)", 1, 64, 64, 0.2, 1_000_003, RIG
    ).result
    outline = render(made)["depth"].masks
    # The performer's mask is a share of 2x2 samples, the map's is its pixel centre: they may differ
    # where something is thinner than a pixel.
    assert (outline[truth.masks == 1] == 1).float().mean() > 0.99
    assert (outline[truth.masks == 0] == 0).float().mean() > 0.99


def test_frames_of_a_sample_are_snapped_and_said(caplog):
    (made,) = nodes.SampleBody.execute("ada", "walk", 6, 0.2, 3).result
    assert made.frame_count == 5 and "6 frames became 5" in caplog.text


def test_mesh_batch_becomes_a_body_of_any_length():
    made, note = nodes.BodyFromMesh.execute(mesh(5), 1.7, 9, 24.0).result
    assert made.frame_count == 9 and made.fps == 48
    assert "5 frames became 9" in note and "template" in note


def test_pose_data_gives_body_camera_and_note():
    turned = (FIGURE * torch.tensor([1.0, -1, -1])).numpy()
    person = {"pred_vertices": turned, "pred_cam_t": np.array([0, 0, 4.0]), "focal_length": 500.0}
    data = {"frames": [[person], []], "faces": FACES.numpy(), "image_size": (470, 650)}
    made, camera, note = nodes.BodyFromSAM3D.execute(data, 0, 16.0).result
    assert made.frame_count == 2 and "missing in 1 of 2 frames (1)" in note
    assert (camera.width, camera.height) == (656, 464)  # as Video to Views would cut it
    assert (render(made, camera.resized(64, 48))["depth"].masks > 0).any()


def test_load_body_lists_and_reads_sequences_of_the_input_folder(tmp_path):
    (tmp_path / "input" / "walk").mkdir()
    for f in (1, 2, 10):
        write_obj(tmp_path / "input" / "walk" / f"a_{f}.obj", FIGURE + 0.1 * f)
    write_obj(tmp_path / "input" / "still.obj")
    combo = nodes.LoadBody.define_schema().inputs[0]
    assert combo.options == ["still.obj", "walk/a_1.obj"]
    made, note = nodes.LoadBody.execute("walk/a_1.obj", "y up", 0.0, 0, 16.0).result
    assert made.frame_count == 3 and "frame 0 serves as the template" in note
    made, _ = nodes.LoadBody.execute("walk/a_1.obj", "y up", 0.0, 5, 16.0).result
    assert made.frame_count == 5


@pytest.mark.parametrize("name", ["../secret.obj", "/etc/passwd", "walk/a_2.obj", ""])
def test_only_listed_files_are_opened(tmp_path, name):
    write_obj(tmp_path / "secret.obj")
    with pytest.raises(ValueError, match="input folder has no mesh sequence"):
        nodes.LoadBody.execute(name, "y up", 0.0, 0, 16.0)


def test_load_body_runs_again_when_any_file_of_the_sequence_changes(tmp_path):
    for f in (1, 2):
        write_obj(tmp_path / "input" / f"a_{f}.obj")
    before = nodes.LoadBody.fingerprint_inputs("a_1.obj", fps=16.0)
    assert nodes.LoadBody.fingerprint_inputs("a_1.obj", fps=16.0) == before
    os.utime(tmp_path / "input" / "a_2.obj", (1, 1))
    assert nodes.LoadBody.fingerprint_inputs("a_1.obj", fps=16.0) != before
    nodes.LoadBody.fingerprint_inputs(None)


@pytest.mark.skipif(importlib.util.find_spec("anny") is not None, reason="anny is installed")
def test_anny_body_without_anny_is_one_sentence():
    widgets = dict.fromkeys(PHENOTYPE, 0.5)
    with pytest.raises(ValueError, match="pip install anny"):
        nodes.AnnyBody.execute(**widgets, motion="walk", frames=1, start=0.0)


def test_maps_are_views_that_preview_views_shows(tmp_path):
    drawn = render(body())
    for name in MAPS:
        views = drawn[name]
        assert isinstance(views, Views) and views.frames.shape[:2] == (2, 5)
        assert views.rig is RIG and views.fps == 16 and views.masks is not None
        PreviewViews.execute(views, 2)
    assert drawn["depth"].frames.shape[2] == 1
    assert torch.equal(drawn["visibility"].masks, drawn["visibility"].frames[:, :, 0] == 255)


def test_scales_are_returned_and_said():
    drawn = render(body())
    assert drawn["motion_scale"] == pytest.approx(0.3, rel=1e-4)  # frames 1 to 4 of 0.1 m
    assert "of 'motion' 0.3 m" in drawn["note"]
    drawn = render(body(), motion_scale=0.1)
    assert drawn["motion_scale"] == 0.1 and "'motion' goes up to 3.0 times" in drawn["note"]


def test_crop_and_reference_reach_their_masks():
    drawn = render(body(), reference_view=1, reference_frames=2, crop_top=8)
    assert drawn["reference_mask"].masks[1, :2].all()
    assert (drawn["reference_mask"].frames == 255).sum() == 2 * 3 * 32 * 48
    assert drawn["crop_mask"].masks[1, 1, :8].all()
    assert (drawn["crop_mask"].frames == 255).sum() == 2 * 3 * 32 * 8


def test_frames_that_no_video_model_takes_are_told():
    assert "4 frames: video models take 4n+1, such as 1" in render(body(4))["note"]
    assert "4n+1" not in render(body(5))["note"]


def test_blind_views_are_named_and_all_blind_is_refused():
    away = RIG.T_camera_world.clone()
    away[1, :3, 3] += torch.tensor([50.0, 0, 0])
    half = type(RIG)(RIG.K, away, 32, 48)
    assert "views [1] see nothing" in render(body(), half)["note"]
    with pytest.raises(ValueError, match="No camera of the rig sees the body"):
        render(body(), half.select([1]))


def test_more_maps_than_memory_are_refused_with_both_numbers():
    huge = RIG.resized(32_000, 48_000).select([0] * 64)
    with pytest.raises(ValueError, match=r"need \d+ GB, but this computer has \d+ GB"):
        render(body(), huge)


def test_long_drawing_obeys_the_cancel_button(monkeypatch):
    def cancelled() -> None:
        raise mm.InterruptProcessingException

    monkeypatch.setattr(run.mm, "throw_exception_if_processing_interrupted", cancelled)
    with pytest.raises(mm.InterruptProcessingException):
        render(body())
