"""Edit Rig: its text, the rig that goes through, and the widget that the page is asked for."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from comfy_api.latest import io
from turnaround.models.cameras import intrinsics, orbit_rig
from turnaround.nodes.rig_editor import EIGHT_ROUND, RigEditor

WIDGETS = dict(cameras="0 0 3.2\n90 10 4 50", fov=35.0, width=128, height=160)


@pytest.fixture(autouse=True)
def _said(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="turnaround")
    monkeypatch.setattr(RigEditor, "hidden", SimpleNamespace(unique_id="1"))


def ring(width=96, height=128, fov=0.6):
    return orbit_rig(torch.tensor([0.0, 2.0]), torch.zeros(2), 2.5, fov, width, height)


def test_text_is_the_rig():
    output = RigEditor.execute(**WIDGETS)
    (rig,) = output.result
    assert [round(math.degrees(a)) for a in rig.azimuths.tolist()] == [0, 90]
    torch.testing.assert_close(rig.centers.norm(dim=1), torch.tensor([3.2, 4.0]))
    torch.testing.assert_close(rig.K[0], intrinsics(math.radians(35), 128, 160))
    torch.testing.assert_close(rig.K[1], intrinsics(math.radians(50), 128, 160))
    assert not output.ui


def test_first_rig_is_eight_cameras_round_the_performer():
    (rig,) = RigEditor.execute(**WIDGETS | {"cameras": EIGHT_ROUND}).result
    assert [round(math.degrees(a)) % 360 for a in rig.azimuths.tolist()] == [*range(0, 360, 45)]


def test_sizes_are_snapped_and_said(caplog):
    (rig,) = RigEditor.execute(**WIDGETS | {"width": 130}).result
    assert rig.width == 128 and "130x160 became 128x160" in caplog.text


def test_connected_rig_goes_through_an_empty_text_untouched(caplog):
    rig = ring()
    output = RigEditor.execute(**WIDGETS | {"cameras": "# none yet"}, rig=rig)
    assert output.result == (rig,) and "goes through" in caplog.text


def test_text_wins_over_the_connected_rig_which_the_page_is_shown():
    output = RigEditor.execute(**WIDGETS, rig=ring())
    (rig,) = output.result
    assert len(rig) == 2 and rig.width == 128
    (start,) = output.ui["turnaround_rig"]
    assert start == {
        "cameras": "0 0 2.5 34.3775\n114.5916 0 2.5 34.3775", "width": 96, "height": 128,
        "whole": True,
    }  # fmt: skip


def test_nothing_at_all_is_one_sentence():
    with pytest.raises(ValueError, match="no rig is connected: add a camera in the editor"):
        RigEditor.execute(**WIDGETS | {"cameras": "\n"})


def test_wrong_text_is_said_before_anything_runs():
    assert RigEditor.validate_inputs(cameras="0 0 3") is True
    assert RigEditor.validate_inputs(cameras="") is True  # a rig may be connected
    assert RigEditor.validate_inputs(cameras=None) is True  # comes by a link
    assert RigEditor.validate_inputs(cameras="0 0").startswith("Line 1 of 'cameras' is '0 0'")


def test_page_is_asked_for_the_editor_and_links_of_text_fit():
    info = RigEditor.GET_NODE_INFO_V1()["input"]
    kind, options = info["required"]["cameras"]
    assert kind == io.String.io_type and options["widgetType"] == "TURNAROUND_RIG_EDITOR"
    assert [*info["required"], *info["optional"]] == ["cameras", "fov", "width", "height", "rig"]
