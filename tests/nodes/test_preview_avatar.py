"""Preview Avatar in the real ComfyUI: its files, its camera, what is written once, refusals."""

from dataclasses import replace
from pathlib import Path

import comfy.model_management as mm
import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image
from turnaround.models.avatar import Avatar, SkinMotion
from turnaround.models.avatar_light import even_light
from turnaround.models.avatar_mesh import splats_on_body
from turnaround.models.body import Body
from turnaround.models.cameras import orbit_rig
from turnaround.models.fit_body import spread_evenly
from turnaround.models.splat_stream import read_splat_stream
from turnaround.nodes import preview_avatar, run
from turnaround.nodes.preview_avatar import PreviewAvatar

COUNT, FRAMES = 600, 3


@pytest.fixture(autouse=True)
def said(monkeypatch, tmp_path):
    """A temp folder of this test alone; gives what the node said."""
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    notes = []
    monkeypatch.setattr(run, "say", lambda cls, text: notes.append(text) or text)
    return notes


@pytest.fixture
def avatar():
    """A bright box, 1.6 m high, that moves to the right."""
    corners = torch.tensor([[x, y, z] for x in (-1.0, 1) for y in (-1, 1) for z in (-1, 1)])
    sides = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = torch.tensor([[s[0], s[i + 1], s[i]] for s in sides for i in (1, 2)])
    rest = corners * torch.tensor([0.3, 0.8, 0.2])
    moved = rest + torch.tensor([0.1, 0, 0]) * torch.arange(FRAMES)[:, None, None]
    body = Body(moved, faces, rest, fps=12.0)
    splats, _ = splats_on_body(body, COUNT, 0)
    splats = replace(splats, opacities=torch.full((COUNT,), 3.0), sh=torch.ones(COUNT, 1, 3))
    places = spread_evenly(rest[faces], COUNT)
    return Avatar(splats, SkinMotion(body, places, even_light(rest)), 12.0)


def shown(result):
    (value,) = result.ui["turnaround_avatar"]
    return value


def file_of(value):
    return Path(folder_paths.get_temp_directory()) / value["subfolder"] / value["filename"]


def test_the_file_is_the_avatar_and_the_camera_stands_before_it(avatar):
    result = PreviewAvatar.execute(avatar, "", 96, 128)
    value = shown(result)
    header, frames = read_splat_stream(file_of(value).read_bytes())
    assert header["frames"] == FRAMES and header["fps"] == 12 and len(frames[0]) == COUNT
    assert value["type"] == "temp" and value["picture"] == [96, 128] and value["cameras"] == []
    (rig,) = result.result
    assert len(rig) == 1 and (rig.width, rig.height) == (96, 128)
    assert rig.azimuths.abs().max() < 0.1 and rig.centers[0, 2] < -1
    assert value["look"] == value["first"] and value["look"][:2] == pytest.approx([0, 0], abs=1e-3)


def test_the_still_shows_all_of_it_from_the_camera(avatar):
    value = shown(PreviewAvatar.execute(avatar, "azimuth 180", 96, 128))
    picture = np.asarray(Image.open(file_of(value["still"])))
    assert picture.shape == (128, 96, 3)
    rows, columns = np.nonzero(picture.max(-1) > 100)
    assert rows.min() > 0 and rows.max() < 127 and np.ptp(rows) > 60
    assert columns.min() > 0 and columns.max() < 95


def test_a_written_camera_goes_out(avatar):
    text = "azimuth 90, elevation 20, distance 2.5, fov 50, at 0.1 0.2 0.3"
    result = PreviewAvatar.execute(avatar, text, 256, 256)
    (rig,) = result.result
    value = shown(result)
    assert value["camera"] == text and value["look"] == [90, 20, 2.5, 50, 0.1, 0.2, 0.3]
    away = rig.centers[0] - torch.tensor([0.1, 0.2, 0.3])
    assert away.norm().item() == pytest.approx(2.5, abs=1e-4) and away[0] > 2 and away[1] < -0.8


def test_another_camera_writes_no_other_avatar(avatar):
    first = shown(PreviewAvatar.execute(avatar, "", 96, 128))
    written = file_of(first).stat().st_mtime_ns
    second = shown(PreviewAvatar.execute(avatar, "azimuth 45", 96, 128))
    assert second["filename"] == first["filename"] and second["checksum"] == first["checksum"]
    assert file_of(second).stat().st_mtime_ns == written
    assert second["still"]["filename"] != first["still"]["filename"]
    brighter = replace(avatar, splats=replace(avatar.splats, sh=avatar.splats.sh + 0.1))
    assert shown(PreviewAvatar.execute(brighter, "", 96, 128))["checksum"] != first["checksum"]


def test_the_rig_is_a_list_of_cameras(avatar):
    rig = orbit_rig(torch.tensor([0.0, 1.0]), torch.zeros(2), 3.0, 0.6, 64, 64)
    cameras = shown(PreviewAvatar.execute(avatar, "", 96, 128, rig))["cameras"]
    assert [c["name"] for c in cameras] == list(rig.labels)
    assert cameras[1]["look"][0] == pytest.approx(57.2958, abs=1e-3)


def test_sizes_become_multiples_of_16_and_are_said(avatar, said):
    (rig,) = PreviewAvatar.execute(avatar, "", 100, 130).result
    assert rig.width % 16 == 0 and rig.height % 16 == 0
    assert any("100x130" in note for note in said)


def test_what_the_view_leaves_out_is_said(avatar, said):
    means = avatar.splats.means.clone()
    means[0] = 900.0
    PreviewAvatar.execute(replace(avatar, splats=replace(avatar.splats, means=means)), "", 96, 128)
    assert any(note.startswith("1 Gaussians") for note in said)


def test_a_camera_that_is_none_is_one_sentence(avatar):
    with pytest.raises(ValueError, match="'camera' holds 'from the left'"):
        PreviewAvatar.execute(avatar, "from the left", 96, 128)


def test_the_cancel_button_leaves_no_file(avatar, monkeypatch):
    mm.interrupt_current_processing()
    try:
        with pytest.raises(mm.InterruptProcessingException):
            PreviewAvatar.execute(avatar, "", 96, 128)
    finally:
        mm.interrupt_current_processing(False)
    assert list(Path(folder_paths.get_temp_directory()).iterdir()) == []


def test_it_is_registered():
    schema = PreviewAvatar.GET_SCHEMA()
    assert schema.is_output_node and [PreviewAvatar] == preview_avatar.NODES
    assert [i.id for i in schema.inputs] == ["avatar", "camera", "width", "height", "rig"]
