"""What Preview Views and every node with views hand to the page's player."""

import json
import sys
from types import SimpleNamespace

import folder_paths
import pytest
import torch
from comfy_api.internal import make_locked_method_func
from comfy_api.latest import io
from turnaround.models.views import Views
from turnaround.nodes import NODES, node_previews, showing_views
from turnaround.nodes.clips import ImagesToViews
from turnaround.nodes.node_previews import is_wanted
from turnaround.nodes.sockets import VIEWS
from turnaround.nodes.views import PreviewViews


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    (tmp_path / "temp").mkdir()
    return tmp_path


@pytest.fixture
def page(monkeypatch):
    """A server whose page waits for the result."""
    instance = SimpleNamespace(client_id="page", send_progress_text=lambda *_: None)
    fake = SimpleNamespace(PromptServer=SimpleNamespace(instance=instance))
    monkeypatch.setitem(sys.modules, "server", fake)
    return instance


def views(V=3, frames=5, H=16, W=32, seed=0) -> Views:
    generator = torch.Generator().manual_seed(seed)
    return Views(torch.rand(V, frames, 3, H, W, generator=generator))


def executed(node, **inputs) -> io.NodeOutput:
    """As ComfyUI runs a node's class: a locked copy of it."""
    node.GET_SCHEMA()
    clone = node.PREPARE_CLASS_CLONE({})
    return make_locked_method_func(node, "EXECUTE_NORMALIZED", clone)(**inputs)


def exists(folders, item) -> bool:
    path = folders / item["type"] / item["subfolder"] / item["filename"]
    return path.is_file() and path.stat().st_size == item["bytes"]


def test_preview_writes_a_grid_and_every_view_alone(folders):
    output = PreviewViews.execute(views(64, 3), 2)
    (item,) = output.ui["turnaround_views"]
    assert (item["views"], item["frames"], item["size"]) == (64, 3, [32, 16])
    assert exists(folders, item) and exists(folders, {**item["alone"], "type": "temp"})
    assert output.args[0].shape == (1, 64 * 16, 2 * 32, 3)


def test_preview_of_two_sends_both_and_refuses_other_cameras(folders):
    output = PreviewViews.execute(views(), 2, views(frames=4, H=8, W=16, seed=1))
    first, second = output.ui["turnaround_views"]
    assert [first["name"], second["name"]] == ["views", "compare"]
    assert first["filename"] != second["filename"] and exists(folders, second)
    with pytest.raises(ValueError, match="'compare' has 2 views but 'views' 3"):
        PreviewViews.execute(views(), 2, views(V=2))


def test_every_node_with_views_shows_them_and_no_other_is_touched():
    for node in NODES:
        gives_views = any(o.io_type == VIEWS.io_type for o in node.define_schema().outputs or [])
        shown = showing_views(node)
        assert (shown is not node) == gives_views
        assert shown.GET_SCHEMA().node_id == node.GET_SCHEMA().node_id
        assert shown.GET_NODE_INFO_V1() == node.GET_NODE_INFO_V1()


def test_a_node_s_result_is_the_same_with_its_views_shown(folders, page):
    images = torch.rand(6, 16, 32, 3, generator=torch.Generator().manual_seed(0))
    plain = ImagesToViews.execute(images, 2, 16.0)
    shown = executed(showing_views(ImagesToViews), images=images, views=2, fps=16.0)
    assert torch.equal(shown.args[0].frames, plain.args[0].frames)
    (item,) = shown.ui["turnaround_views"]
    assert (item["name"], item["slot"], item["views"], item["frames"]) == ("views", 0, 2, 3)
    assert item["alone"] is None and exists(folders, item)
    assert len(json.dumps(shown.ui)) < 1000  # what goes through the page's socket


def test_several_outputs_of_views_are_several_items_and_other_ui_stays(folders, page):
    class Two(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            outputs = [VIEWS.Output(display_name="a"), io.Int.Output(display_name="n")]
            return io.Schema("Two", outputs=[*outputs, VIEWS.Output(display_name="b")])

        @classmethod
        def execute(cls):
            return io.NodeOutput(views(), 7, views(V=1), ui={"text": ["hello"]})

    output = executed(showing_views(Two))
    items = output.ui["turnaround_views"]
    assert [(i["name"], i["slot"], i["views"]) for i in items] == [("a", 0, 3), ("b", 2, 1)]
    assert output.ui["text"] == ["hello"] and output.args[1] == 7


def test_nothing_is_written_without_a_page_or_against_the_settings(folders, page):
    page.client_id = None
    assert not is_wanted()
    output = executed(
        showing_views(ImagesToViews), images=torch.zeros(2, 16, 16, 3), views=1, fps=8.0
    )
    assert output.ui is None and list((folders / "temp").iterdir()) == []
    page.client_id = "page"
    assert is_wanted()
    settings = folders / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    for choice, wanted in (("off", False), ("closed", True), ("open", True)):
        settings.write_text(json.dumps({"Turnaround.ViewsOnNodes": choice}))
        assert is_wanted() == wanted
    settings.write_text("{ half a fi")
    assert is_wanted()


def test_a_full_disk_fails_no_node(folders, page, monkeypatch):
    def full(*given):
        raise OSError("No space left on device")

    monkeypatch.setattr(node_previews, "write_streams", full)
    images = torch.zeros(2, 16, 16, 3)
    output = executed(showing_views(ImagesToViews), images=images, views=1, fps=8.0)
    assert output.ui is None and len(output.args[0]) == 1


def test_cancel_stops_the_writing(folders, page, monkeypatch):
    import comfy.model_management as mm

    mm.interrupt_current_processing()
    with pytest.raises(mm.InterruptProcessingException):
        node_previews.stored(views(), "views", 0)
    assert [p for p in (folders / "temp").rglob("*") if p.is_file()] == []
