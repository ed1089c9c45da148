"""Preview Cloud in the page: what is drawn, what the mouse does, what happens to nodes."""

import numpy as np
import pytest
import view_pages as pages
from view_pages import (
    COUNT_DRAWINGS,
    NO_WEBGL2,
    colourful,
    drag,
    graph_place,
    load,
    prepared,
    problems,
    shot,
)

FRAMES = 5
REST = 600  # milliseconds without drawing after which a picture is final
GRAPH = {
    "1": {
        "class_type": "TurnaroundSamplePerformer",
        "inputs": {
            "performer": "kira (unseen)", "motion": "dance_b (unseen)", "frames": FRAMES,
            "width": 96, "height": 128, "start": 1.2, "clothes_seed": 1_000_003,
        },
    },
    "2": {
        "class_type": "TurnaroundPerformerGeometry",
        "inputs": {
            "video": ["1", 0], "depth_views": ["1", 1], "depth_convention": "metres", "fov": 40.0,
            "performer_height": 1.7, "erosion": 1, "far_side": "guessed",
        },
    },
    "3": {"class_type": "TurnaroundPreviewCloud", "inputs": {"cloud": ["2", 0], "max_points": 60000}},
    "4": {"class_type": "TurnaroundPreviewCloud", "inputs": {"cloud": ["2", 0], "max_points": 1000}},
}  # fmt: skip
SIZE = 380, 480


def view_of(page, node):
    return pages.view_of(page, "cloud", node)


def run(page, state="ready"):
    pages.run(page, "cloud", state)


@pytest.fixture(scope="module")
def page(open_page):
    page = open_page(1300, 760, prepared(COUNT_DRAWINGS))
    load(page, GRAPH, size=SIZE)
    run(page)
    yield page
    page.close()


@pytest.fixture
def view(page):
    """Node 3's view, as it is when the graph has just run."""
    view = view_of(page, 3)
    view.locator("select").select_option("color")
    view.locator(".home").click()
    view.locator("input").fill("0")
    return view


def picture(view) -> np.ndarray:  # [H, W, 3]
    """What is on the canvas once drawing has come to rest."""
    view.page.wait_for_function(
        f"() => window.drawings > 0 && performance.now() - window.drewAt > {REST}"
    )
    return shot(view)


def test_performer_stands_upright_in_the_middle(view):
    shot = picture(view)
    rows, columns = np.nonzero(shot.max(-1) - shot.min(-1) > 40)
    H, W = shot.shape[:2]
    assert H > 300  # of the node's 480: nothing else takes the view's room
    assert colourful(shot) > 0.02 * H * W
    # Upright: taller than wide; framed: it uses most of the height and is not cut off.
    assert np.ptp(rows) > 1.4 * np.ptp(columns)
    assert 0.5 * H < np.ptp(rows) < H - 2
    # The hair is brown, the socks of these clothes are lilac, and hair is above.
    blue = shot[..., 2] - shot[..., 1]
    assert blue[rows.max() - 4][columns.min() : columns.max()].max() > 40
    assert blue[rows.min() + 4][columns.min() : columns.max()].max() < 20


def test_dragging_turns_the_view_and_leaves_the_graph_alone(view, page):
    before, place = picture(view), graph_place(page)
    drag(view, 90, 20)
    after = picture(view)
    assert (abs(after - before).max(-1) > 30).mean() > 0.02
    assert graph_place(page) == place
    view.locator("canvas").dblclick()
    # Back at the source camera's view; but the hint is gone, and the edge shows the focus.
    middle = slice(10, -30)
    assert (abs(picture(view) - before)[middle, middle].max(-1) > 30).mean() < 0.001


def test_right_dragging_moves_the_performer_with_the_mouse(view):
    before = np.nonzero(np.ptp(picture(view), -1) > 40)[1].mean()
    drag(view, 60, 0, "right")
    after = np.nonzero(np.ptp(picture(view), -1) > 40)[1].mean()
    assert abs(after - before - 60) < 8


def test_wheel_zooms_the_view_and_not_the_graph(view, page):
    before, place = colourful(picture(view)), graph_place(page)
    view.locator("canvas").hover()
    page.mouse.wheel(0, -250)
    assert colourful(picture(view)) > 1.3 * before
    assert graph_place(page) == place


def test_wheel_beside_the_view_still_zooms_the_graph(view, page):
    place = graph_place(page)
    page.mouse.move(90, 700)
    page.mouse.wheel(0, -100)
    assert graph_place(page)[0] > place[0]
    page.evaluate(
        "() => { const { canvas } = window.app; canvas.ds.scale = 1; canvas.ds.offset = [0, 0];"
        " canvas.setDirty(true, true); }"
    )


def test_scrubbing_shows_another_frame(view):
    before = picture(view)
    view.locator("input").fill(str(FRAMES - 1))
    assert (abs(picture(view) - before).max(-1) > 30).mean() > 0.005
    assert view.locator("output").inner_text() == f"{FRAMES} / {FRAMES}"


def test_arrow_keys_step_and_wrap_around(view):
    view.locator("canvas").focus()
    view.page.keyboard.press("ArrowLeft")
    assert view.locator("output").inner_text() == f"{FRAMES} / {FRAMES}"
    view.page.keyboard.press("ArrowRight")
    assert view.locator("output").inner_text() == f"1 / {FRAMES}"


def test_every_meaning_of_the_colours_looks_different(view):
    shots = []
    for mode in ("color", "normals", "seen", "depth"):
        view.locator("select").select_option(mode)
        shots.append(picture(view))
    for i, a in enumerate(shots):
        for b in shots[:i]:
            assert (abs(a - b).max(-1) > 40).mean() > 0.02


def test_guessed_points_are_orange_behind_and_hidden_in_front(view):
    view.locator("select").select_option("seen")

    def orange():
        shot = picture(view)
        return int(((shot[..., 0] > 180) & (shot[..., 2] < 110)).sum())

    in_front = orange()
    # 3.5 radians a view's height: half a turn.
    drag(view, int(np.pi / 3.5 * view.locator("canvas").bounding_box()["height"]), 0)
    assert orange() > 10 * max(in_front, 20)


def test_ground_can_be_light(view):
    dark = picture(view)[5, 5].mean()
    view.locator(".ground").click()
    assert picture(view)[5, 5].mean() > dark + 100
    view.locator(".ground").click()


def test_playing_moves_on_and_a_paused_view_draws_nothing(view, page):
    picture(view)
    view.locator(".play").click()
    page.wait_for_function(
        "() => document.querySelector('[data-node=\"3\"]').dataset.frame === '2'", timeout=20_000
    )
    view.locator(".play").click()
    picture(view)
    drawings = page.evaluate("() => window.drawings")
    page.wait_for_timeout(REST)
    assert page.evaluate("() => window.drawings") == drawings


def test_resizing_the_node_resizes_the_canvas(view, page):
    width = view.locator("canvas").bounding_box()["width"]
    resize = """width => { window.app.graph.getNodeById(3).setSize([width, 480]);
                           window.app.canvas.setDirty(true, true); }"""
    page.evaluate(resize, 300)
    page.wait_for_function(
        "() => document.querySelector('[data-node=\"3\"] canvas').width < 300", timeout=5000
    )
    assert view.locator("canvas").bounding_box()["width"] == width - 80
    page.evaluate(resize, 380)


def test_reloaded_workflow_keeps_choices_and_shows_the_cloud_without_a_run(view, page):
    view.locator("select").select_option("depth")
    page.evaluate(
        """async () => {
          const outputs = window.app.nodeOutputs;
          await window.app.loadGraphData(window.app.graph.serialize());
          window.app.nodeOutputs = outputs;
        }"""
    )
    page.wait_for_function(
        "() => [...document.querySelectorAll('.turnaround-cloud')]"
        ".filter(v => v.dataset.state === 'ready').length === 2",
        timeout=20_000,
    )
    assert view_of(page, 3).locator("select").input_value() == "depth"


def test_choices_are_no_widget_values(page):
    saved = page.evaluate("() => window.app.graph.serialize().nodes.find(n => n.id === 3)")
    assert saved["widgets_values"] == [60000]


def test_removed_node_gives_its_graphics_context_back(page):
    lost = page.evaluate(
        """() => {
          const node = window.app.graph.getNodeById(4);
          const view = node.widgets.find((w) => w.name === 'cloud_view').element;
          const gl = view.querySelector('canvas').getContext('webgl2');
          window.app.graph.remove(node);
          return gl.isContextLost();
        }"""
    )
    assert lost
    page.wait_for_function("() => document.querySelectorAll('.turnaround-cloud').length === 1")
    assert page.locator(".turnaround-cloud").get_attribute("data-state") == "ready"


def test_lost_context_is_said_and_a_click_wakes_the_view(page):
    page.evaluate(
        "() => document.querySelector('.turnaround-cloud canvas').getContext('webgl2')"
        ".getExtension('WEBGL_lose_context').loseContext()"
    )
    view = page.locator(".turnaround-cloud")
    view.get_by_text("click here to wake it").wait_for()
    view.locator(".stage").click()
    page.wait_for_function(
        "() => document.querySelector('.turnaround-cloud').dataset.state === 'ready'"
    )
    assert colourful(picture(view)) > 500


def test_cleared_temp_folder_is_one_sentence(page):
    page.evaluate(
        """() => window.app.graph.getNodeById(3).onExecuted({ turnaround_cloud: [
          { filename: 'gone.turncloud', subfolder: '', type: 'temp', checksum: 1 }] })"""
    )
    page.locator(".turnaround-cloud").get_by_text("run the node again").wait_for()


def test_nothing_of_ours_complained(page):
    assert problems(page) == []


def test_missing_webgl2_is_one_sentence(open_page):
    page = open_page(1300, 760, prepared(NO_WEBGL2))
    load(page, GRAPH, size=SIZE)
    run(page, "failed")
    assert "WebGL2" in page.locator(".turnaround-cloud .words").first.inner_text()
    assert problems(page) == []
    page.close()


def test_newer_nodes_of_the_page_show_the_view_too(open_page):
    """ComfyUI's nodes drawn by Vue ("Nodes 2.0") hand wheel and room out differently."""
    page = open_page(1300, 760, prepared(COUNT_DRAWINGS, **{"Comfy.VueNodes.Enabled": True}))
    load(page, GRAPH, size=SIZE)
    run(page)
    view = view_of(page, 3)
    before, place = colourful(picture(view)), graph_place(page)
    box = view.locator("canvas").bounding_box()
    assert box["height"] > 200 and before > 500
    drag(view, 60, 10)
    view.locator("canvas").hover()
    page.mouse.wheel(0, -250)
    assert colourful(picture(view)) > 1.2 * before
    assert graph_place(page) == place
    page.close()
