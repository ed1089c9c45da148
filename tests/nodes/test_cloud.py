"""The cloud nodes in the real ComfyUI: files where they belong, notes, refusals, the cancel button."""

import math
from dataclasses import replace
from pathlib import Path

import comfy.model_management as mm
import folder_paths
import pytest
import torch
import torch.nn.functional as F
from turnaround.models.cameras import orbit_rig
from turnaround.models.cloud_file import AXES, read_ply
from turnaround.models.points import OrientedPoints
from turnaround.nodes import run
from turnaround.nodes.cloud import PreviewCloud, SaveCloud

FRAMES, COUNT = 3, 1500


@pytest.fixture(autouse=True)
def said(monkeypatch, tmp_path):
    """Folders of this test alone; gives what the nodes said."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    for folder in ("output", "temp"):
        (tmp_path / folder).mkdir()
    notes = []
    monkeypatch.setattr(run, "say", lambda cls, text: notes.append(text) or text)
    return notes


@pytest.fixture
def cloud():
    """An egg of random points in each of three frames."""
    draw = torch.Generator().manual_seed(0)
    normals = F.normalize(torch.randn(FRAMES * COUNT, 3, generator=draw), dim=1)
    return OrientedPoints(
        positions=normals * torch.tensor([0.3, 0.8, 0.2]),
        normals=normals,
        colors=torch.rand(FRAMES * COUNT, 3, generator=draw),
        radii=torch.full((FRAMES * COUNT,), 0.01),
        confidences=(-normals[:, 2]).clamp(0, 1),
        frame_offsets=torch.arange(FRAMES + 1) * COUNT,
        source=orbit_rig(torch.zeros(1), torch.zeros(1), 3.0, 0.6, 48, 64),
        fps=24.0,
    )


def test_preview_puts_one_whole_file_into_the_temp_folder_and_names_it(cloud):
    result = PreviewCloud.execute(cloud, 60_000)
    (shown,) = result.ui["turnaround_cloud"]
    folder = Path(folder_paths.get_temp_directory()) / shown["subfolder"]
    assert [f.name for f in folder.iterdir()] == [shown["filename"]]
    assert (folder / shown["filename"]).read_bytes()[:8] == b"TURNCLD1"
    assert shown["type"] == "temp" and shown["frames"] == FRAMES and shown["fps"] == 24
    assert shown["points"] == FRAMES * COUNT
    low, high = shown["box"]
    assert low == cloud.positions.amin(0).tolist() and high == cloud.positions.amax(0).tolist()


def test_preview_gives_an_image_of_eight_sides(cloud):
    turntable, note = PreviewCloud.execute(cloud, 60_000).result
    assert turntable.shape == (1, 320, 8 * 208, 3) and note == ""
    assert turntable.min() >= 0 and turntable.max() <= 1
    for side in turntable[0].chunk(8, dim=1):
        assert ((side - 0.5).abs().amax(-1) > 0.01).float().mean() > 0.1


def test_every_preview_has_a_file_of_its_own(cloud):
    names = [
        PreviewCloud.execute(cloud, 60_000).ui["turnaround_cloud"][0]["filename"] for _ in range(2)
    ]
    assert len(set(names)) == 2


def test_thinned_and_lost_points_are_said(cloud, said):
    positions = cloud.positions.clone()
    positions[:7] = math.nan
    _, note = PreviewCloud.execute(replace(cloud, positions=positions), 1000).result
    assert "7 points with NaN" in note and "even 1,000" in note and said == [note]


@pytest.mark.parametrize("node", [PreviewCloud, SaveCloud])
def test_a_cloud_without_points_is_one_sentence(cloud, node):
    empty = replace(cloud, positions=torch.full_like(cloud.positions, math.nan))
    given = (
        {"max_points": 1000} if node is PreviewCloud else {"filename_prefix": "a", "axes": AXES[0]}
    )
    with pytest.raises(ValueError, match="no points: check the mask"):
        node.execute(empty, **given)


def test_save_writes_one_ply_a_frame_below_the_output_folder(cloud, said):
    SaveCloud.execute(cloud, "turnaround/cloud", AXES[2])
    folder = Path(folder_paths.get_output_directory()) / "turnaround"
    files = sorted(f.name for f in folder.iterdir())
    assert files == [f"cloud_00001_frame{f:04}.ply" for f in range(FRAMES)]
    back = read_ply((folder / files[1]).read_bytes())
    assert back["x"].tolist() == cloud.positions[cloud.frame(1), 0].tolist()
    assert "3 files in output/turnaround" in said[0]


def test_saving_again_overwrites_nothing(cloud):
    for _ in range(2):
        SaveCloud.execute(cloud, "cloud", AXES[0])
    folder = Path(folder_paths.get_output_directory())
    assert len(list(folder.iterdir())) == 2 * FRAMES
    assert (folder / "cloud_00002_frame0000.ply").exists()


@pytest.mark.parametrize("prefix", ["../away", "/etc/cloud", " ", "a/../../b"])
def test_paths_outside_the_output_folder_are_refused(cloud, prefix):
    with pytest.raises(ValueError, match="only below ComfyUI's output folder"):
        SaveCloud.execute(cloud, prefix, AXES[0])


@pytest.mark.parametrize("node", [PreviewCloud, SaveCloud])
def test_the_cancel_button_stops_and_leaves_no_half_file(cloud, node, tmp_path):
    given = (
        {"max_points": 1000} if node is PreviewCloud else {"filename_prefix": "a", "axes": AXES[0]}
    )
    mm.interrupt_current_processing(True)
    try:
        with pytest.raises(mm.InterruptProcessingException):
            node.execute(cloud, **given)
    finally:
        mm.interrupt_current_processing(False)
    left = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert [f.suffix for f in left] == ([] if node is PreviewCloud else [".ply"])
    for file in left:
        assert len(read_ply(file.read_bytes())) == COUNT
