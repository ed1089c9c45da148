"""Preview Avatar in the page: pictures as the pack's renderer draws them, controls, the camera that
goes back into the graph, what happens to nodes, files and graphics cards."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import view_pages as pages
from dancing_avatar import dancing_avatar
from PIL import Image
from turnaround.models.avatar import Avatar, NodeMotion, save_avatar
from turnaround.models.avatar_free import NodeCloud, follow, nodes_at_rest
from turnaround.models.avatar_light import even_light
from turnaround.models.looks import Look, read_look
from turnaround.models.rasterize_splats import PIXEL_LOW_PASS, render
from turnaround.models.splats import Splats
from view_pages import (
    COUNT_DRAWINGS,
    NO_WEBGL2,
    colourful,
    drag,
    fingers,
    graph_place,
    load,
    lose_context,
    middle_of,
    prepared,
    problems,
    shot,
)

pytestmark = pytest.mark.usefixtures("one_thread")

FRAMES, COUNT, FPS = 4, 12_000, 8.0
PICTURE = 320, 400
REST = 350  # milliseconds without drawing after which a picture is final
FILE, TURNS = "viewer_test.safetensors", "viewer_turns.safetensors"
NOWHERE = Look(0.0, 0.0, 1.0, 35.0, (0.0, 0.0, 0.0))
COUNT_LOADS = """
window.loads = 0; window.workers = 0;
const fetched = window.fetch;
window.fetch = function (url, ...given) {
  if (String(url).includes('.turnsplat')) window.loads++;
  return fetched.call(this, url, ...given);
};
const ended = Worker.prototype.terminate;
Worker.prototype.terminate = function () { if (this.sorts) window.workers--; return ended.call(this); };
window.Worker = class extends Worker {
  constructor(url, ...given) {
    super(url, ...given);
    this.sorts = String(url).includes('splat_sorter'); // the page has workers of its own
    if (this.sorts) window.workers++;
  }
};
"""


@pytest.fixture(scope="module")
def avatar(server):
    """Also lies where Load Avatar finds it."""
    made = dancing_avatar(COUNT, FRAMES, FPS, degree=1)
    folder = server.base / "output" / "avatars"
    folder.mkdir(parents=True, exist_ok=True)
    save_avatar(folder / FILE, made)
    yield made
    (folder / FILE).unlink()


def graph(cameras=("", ""), file=FILE):
    def preview(camera, **more):
        inputs = {"avatar": ["1", 0], "camera": camera, "width": PICTURE[0], "height": PICTURE[1]}
        return {"class_type": "TurnaroundPreviewAvatar", "inputs": inputs | more}

    return {
        "1": {"class_type": "TurnaroundLoadAvatar", "inputs": {"name": file}},
        "2": {
            "class_type": "TurnaroundOrbitRig",
            "inputs": {
                "views": 4, "start_azimuth": 0.0, "span": 360.0, "elevation": 10.0, "layers": 1,
                "layer_step": 20.0, "fov": 35.0, "distance": 3.5, "width": 192, "height": 240,
            },
        },
        "3": preview(cameras[0], rig=["2", 0]),
        "4": preview(cameras[1]),
    }  # fmt: skip


def view_of(page, node):
    return pages.view_of(page, "avatar", node)


def run(page, state="ready"):
    pages.run(page, "avatar", state)


@pytest.fixture(scope="module")
def page(open_page, avatar):
    page = open_page(1300, 800, prepared(COUNT_DRAWINGS + COUNT_LOADS))
    load(page, graph())
    run(page)
    yield page
    page.close()


@pytest.fixture
def view(page):
    """Node 3's view, as it is when the graph has just run."""
    view = view_of(page, 3)
    for name, value in (("speed", "1"), ("ending", "loop"), ("background", "dark")):
        view.locator(f".{name}").select_option(value)
    view.locator("canvas").focus()
    page.keyboard.press("Home")
    page.keyboard.press("0")
    return view


def rest(view):
    view.page.wait_for_function(
        f"""() => document.querySelector("[data-node='{view.get_attribute("data-node")}']")
          .dataset.sorted === 'true' && performance.now() - window.drewAt > {REST}""",
        timeout=20_000,
    )


def picture(view) -> np.ndarray:  # [H, W, 3]
    """What is on the canvas once drawing has come to rest."""
    rest(view)
    return shot(view)


def saved(view) -> np.ndarray:  # [H, W, 4] uint8
    """The PNG that the view saves."""
    rest(view)
    with view.page.expect_download() as download:
        view.locator(".save").click()
    return np.asarray(Image.open(download.value.path()).convert("RGBA"))


def look_of(view) -> Look:
    """Where the view is: what it writes into the node's widget."""
    view.locator("canvas").focus()
    view.page.keyboard.press("c")
    return read_look(camera_words(view), NOWHERE)


def camera_words(view):
    return view.page.evaluate(
        "id => window.app.graph.getNodeById(id).widgets.find(w => w.name === 'camera').value",
        int(view.get_attribute("data-node")),
    )


def drawn(avatar, look, time) -> tuple[torch.Tensor, torch.Tensor]:
    """What the pack's renderer draws: [3, H, W] over black, [H, W]."""
    rig = look.rig(*PICTURE)
    with torch.no_grad():
        seen = render(
            avatar.at(time), rig.K[0], rig.T_camera_world[0], *PICTURE, geometry=False,
            low_pass=PIXEL_LOW_PASS,
        )  # fmt: skip
    return seen.color.clamp(0, 1), seen.alpha


def psnr(shot: np.ndarray, color: torch.Tensor) -> float:
    """Decibels over the pixels where there is a performer."""
    error = torch.from_numpy(shot[..., :3].copy()).movedim(-1, 0) / 255 - color
    there = color.amax(0) > 0.02
    return float(-10 * error[:, there].square().mean().log10())


def test_the_performer_stands_upright_in_the_middle(view):
    shot = picture(view)
    rows, columns = np.nonzero(shot.max(-1) - shot.min(-1) > 40)
    H, W = shot.shape[:2]
    assert H > 300 and colourful(shot) > 0.02 * H * W
    assert np.ptp(rows) > 1.2 * np.ptp(columns)
    assert 0.4 * H < np.ptp(rows) < H - 2 and abs(columns.mean() - W / 2) < 0.1 * W


def on_black(view):
    view.locator(".background").select_option("colour")
    view.locator(".colour").fill("#000000")


def test_pictures_are_those_of_the_packs_renderer(view, avatar):
    on_black(view)
    found = []
    for dx, dy, wheel, frame in ((0, 0, 0, 0), (70, 25, -500, 2), (-160, -30, -300, 3)):
        drag(view, dx, dy)
        view.locator("canvas").hover()
        view.page.mouse.wheel(0, wheel)
        view.page.keyboard.press("Home")
        for _ in range(frame):
            view.page.keyboard.press("ArrowRight")
        color, _ = drawn(avatar, look_of(view), frame)
        found.append(psnr(saved(view), color))
    assert min(found) > 35, found


def test_a_time_between_frames_is_near_the_avatars_own(view, avatar):
    on_black(view)
    view.locator(".time").fill("1.5")
    shot = saved(view)
    color, _ = drawn(avatar, look_of(view), 1.5)
    wrong, _ = drawn(avatar, look_of(view), 1.0)
    assert psnr(shot, color) > psnr(shot, wrong) + 3


def test_before_the_checker_a_saved_picture_has_no_background(view, avatar):
    view.locator(".background").select_option("checker")
    shot = saved(view)
    _, alpha = drawn(avatar, look_of(view), 0)
    error = torch.from_numpy(shot[..., 3].copy()) / 255 - alpha
    assert error.abs().mean() < 0.005 and shot[2, 2, 3] == 0 and shot[..., 3].max() > 250
    assert shot.shape == (PICTURE[1], PICTURE[0], 4)


def test_dragging_turns_the_view_and_leaves_the_graph_alone(view, page):
    before, place = picture(view), graph_place(page)
    drag(view, 90, 20)
    after = picture(view)
    assert (abs(after - before).max(-1) > 30).mean() > 0.01
    assert graph_place(page) == place
    view.locator("canvas").dblclick()
    assert look_of(view).azimuth == pytest.approx(0, abs=0.1)


def test_right_dragging_moves_the_performer_with_the_mouse(view):
    before = np.nonzero(np.ptp(picture(view), -1) > 40)[1].mean()
    drag(view, 60, 0, "right")
    after = np.nonzero(np.ptp(picture(view), -1) > 40)[1].mean()
    assert abs(after - before - 60) < 8


def test_wheel_zooms_the_view_and_not_the_graph(view, page):
    before, place = colourful(picture(view)), graph_place(page)
    view.locator("canvas").hover()
    page.mouse.wheel(0, -300)
    assert colourful(picture(view)) > 1.4 * before
    assert graph_place(page) == place


def test_two_fingers_zoom_the_view_and_not_the_graph(view, page):
    before, place = look_of(view).distance, graph_place(page)
    x, y = middle_of(view.locator("canvas"))
    fingers(page, "touchStart", (x - 30, y), (x + 30, y))
    fingers(page, "touchMove", (x - 60, y), (x + 60, y))
    fingers(page, "touchEnd")
    assert graph_place(page) == place
    assert look_of(view).distance == pytest.approx(before / 2, rel=0.1)


def test_keys_step_turn_zoom_and_go_to_cameras(view, page):
    first = look_of(view)
    view.locator("canvas").focus()
    page.keyboard.press("ArrowLeft")
    assert view.locator("output").inner_text() == f"{FRAMES} / {FRAMES}"
    page.keyboard.press("ArrowRight")
    assert view.locator("output").inner_text() == f"1 / {FRAMES}"
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("+")
    turned = look_of(view)
    assert turned.azimuth < first.azimuth - 5 and turned.distance < first.distance
    view.locator("canvas").focus()
    page.keyboard.press("2")
    there = look_of(view)
    assert (there.azimuth, there.elevation) == pytest.approx((90, 10), abs=0.02)
    away = there.rig(192, 240).centers[0].norm()
    assert float(away) == pytest.approx(3.5, abs=0.01)
    assert view.locator(".cameras").input_value() == "rig 1"
    view.locator(".cameras").select_option("side 2")
    assert abs(look_of(view).azimuth) == pytest.approx(180, abs=0.01)


def test_scrubbing_shows_another_moment(view):
    before = picture(view)
    view.locator(".time").fill(str(FRAMES - 1))
    assert (abs(picture(view) - before).max(-1) > 30).mean() > 0.005
    assert view.locator("output").inner_text() == f"{FRAMES} / {FRAMES}"


def frame_is(page, frame):
    page.wait_for_function(
        f"() => document.querySelector('[data-node=\"3\"]').dataset.frame === '{frame}'",
        timeout=20_000,
    )


def test_playing_goes_on_and_a_paused_view_draws_nothing(view, page):
    view.locator(".play").click()
    frame_is(page, 2)
    frame_is(page, 1)  # it has begun again
    view.locator(".play").click()
    rest(view)
    drawings = page.evaluate("() => window.drawings")
    page.wait_for_timeout(REST)
    assert page.evaluate("() => window.drawings") == drawings


def test_once_stops_at_the_end_and_to_and_fro_comes_back(view, page):
    view.locator(".speed").select_option("0.5")
    view.locator(".ending").select_option("once")
    view.locator(".play").click()
    frame_is(page, FRAMES - 1)
    rest(view)
    assert view.locator("output").inner_text() == f"{FRAMES} / {FRAMES}"
    view.locator(".ending").select_option("swing")
    seen = page.evaluate(
        """() => new Promise((done) => {
          const view = document.querySelector('[data-node="3"]');
          const seen = [];
          const watch = new MutationObserver(() => {
            if (seen.at(-1) !== view.dataset.frame) seen.push(view.dataset.frame);
            if (seen.length > 5) { watch.disconnect(); done(seen.map(Number)); }
          });
          watch.observe(view, { attributes: true });
          view.querySelector('.play').click();
        })"""
    )
    assert all(abs(a - b) == 1 for a, b in zip(seen, seen[1:], strict=False)), seen
    view.locator(".play").click()


def test_a_hidden_page_draws_nothing_and_no_time_goes_by(view, page):
    hide = """hidden => {
      Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });
      document.dispatchEvent(new Event('visibilitychange'));
    }"""
    view.locator(".speed").select_option("0.1")
    view.locator(".play").click()
    page.wait_for_timeout(100)
    page.evaluate(hide, True)
    page.wait_for_timeout(150)
    drawings, time = page.evaluate(
        "() => [window.drawings, document.querySelector('[data-node=\"3\"] .time').value]"
    )
    page.wait_for_timeout(700)
    assert page.evaluate("() => window.drawings") == drawings
    after = page.evaluate(
        f"""async () => {{
          ({hide})(false);
          while (window.drawings <= {drawings}) await new Promise(requestAnimationFrame);
          return document.querySelector('[data-node="3"] .time').value;
        }}"""
    )
    # A tenth of 8 frames a second: 0.56 frames if time had gone on.
    assert float(after) - float(time) < 0.4
    view.locator(".play").click()
    page.evaluate("() => { delete document.hidden; }")


def test_backgrounds(view):
    corner = {}
    for kind in ("dark", "light", "checker", "colour"):
        view.locator(".background").select_option(kind)
        if kind == "colour":
            view.locator(".colour").fill("#00b140")
        corner[kind] = picture(view)[40:64, 20:44].reshape(-1, 3)
    assert corner["dark"].max() < 80 < 200 < corner["light"].min()
    assert np.ptp(corner["checker"]) > 20
    assert abs(corner["colour"] - [0, 0xB1, 0x40]).max() < 4


def test_use_camera_goes_out_and_neither_moves_nor_loads_the_view(view, page, server):
    drag(view, 80, -30)
    view.locator(".keep").click()
    kept = look_of(view)
    before, loads = picture(view), page.evaluate("() => window.loads")
    run(page)
    shown = page.evaluate("() => window.app.nodeOutputs['3'].turnaround_avatar[0]")
    assert shown["look"] == pytest.approx(kept.numbers()) and kept.azimuth < -10
    assert page.evaluate("() => window.loads") == loads
    middle = slice(30, -30)
    assert (abs(picture(view) - before)[middle, middle].max(-1) > 30).mean() < 0.001


def test_a_written_camera_is_gone_to(view, page):
    page.evaluate(
        "() => { window.app.graph.getNodeById(3).widgets.find(w => w.name === 'camera').value ="
        " 'azimuth 90, distance 2'; }"
    )
    run(page)
    look = look_of(view)
    assert look.azimuth == pytest.approx(90) and look.distance == pytest.approx(2)


def test_a_camera_from_another_node_is_not_written_over(view, page):
    page.evaluate(
        """() => { const node = window.app.graph.getNodeById(3);
          window.was = node.inputs;
          node.inputs = [{ name: 'camera', link: 99 }]; }"""
    )
    words = camera_words(view)
    drag(view, 50, 0)
    view.locator(".keep").click()
    view.get_by_text("comes from another node").wait_for()
    page.evaluate("() => { window.app.graph.getNodeById(3).inputs = window.was; }")
    assert camera_words(view) == words


def test_a_reloaded_workflow_keeps_choices_and_camera_and_needs_no_run(view, page):
    view.locator(".background").select_option("light")
    view.locator(".speed").select_option("0.25")
    kept = look_of(view).numbers()
    page.evaluate(
        """async () => {
          const outputs = window.app.nodeOutputs;
          await window.app.loadGraphData(window.app.graph.serialize());
          window.app.nodeOutputs = outputs;
        }"""
    )
    page.wait_for_function(
        "() => [...document.querySelectorAll('.turnaround-avatar')]"
        ".filter(v => v.dataset.state === 'ready').length === 2",
        timeout=20_000,
    )
    view = view_of(page, 3)
    assert view.locator(".background").input_value() == "light"
    assert view.locator(".speed").input_value() == "0.25"
    assert read_look(camera_words(view), NOWHERE).numbers() == kept
    saved_node = page.evaluate("() => window.app.graph.serialize().nodes.find(n => n.id === 3)")
    assert saved_node["widgets_values"] == [camera_words(view), *PICTURE]


def test_a_lost_context_comes_back_by_itself(view, page):
    before = colourful(picture(view))
    lose_context(page)
    view.get_by_text("click here to wake it").wait_for()
    page.evaluate("() => window.lose.restoreContext()")
    page.wait_for_function(
        "() => document.querySelector('[data-node=\"3\"]').dataset.state === 'ready'"
    )
    assert abs(colourful(picture(view)) - before) < 0.02 * before


def test_a_lost_context_is_woken_by_a_click_without_loading_again(view, page):
    before, loads = colourful(picture(view)), page.evaluate("() => window.loads")
    lose_context(page)
    view.get_by_text("click here to wake it").wait_for()
    view.locator(".stage").click()
    page.wait_for_function(
        "() => document.querySelector('[data-node=\"3\"]').dataset.state === 'ready'"
    )
    assert abs(colourful(picture(view)) - before) < 0.02 * before
    assert page.evaluate("() => window.loads") == loads


def test_a_removed_node_gives_its_context_and_its_worker_back(page):
    workers = page.evaluate("() => window.workers")
    lost = page.evaluate(
        """() => {
          const node = window.app.graph.getNodeById(4);
          const view = node.widgets.find((w) => w.name === 'avatar_view').element;
          const gl = view.querySelector('canvas').getContext('webgl2');
          window.app.graph.remove(node);
          return gl.isContextLost();
        }"""
    )
    assert lost and page.evaluate("() => window.workers") == workers - 1 == 1
    assert view_of(page, 3).get_attribute("data-state") == "ready"


def test_a_cleared_temp_folder_is_one_sentence(page):
    page.evaluate(
        """() => {
          const shown = window.app.nodeOutputs['3'].turnaround_avatar[0];
          window.app.graph.getNodeById(3).onExecuted({ turnaround_avatar: [
            { ...shown, filename: 'gone.turnsplat', checksum: 'gone' }] });
        }"""
    )
    view_of(page, 3).get_by_text("run the node again").wait_for()


def test_nothing_of_ours_complained(page):
    assert problems(page) == []


def test_without_webgl2_there_is_a_sentence_and_a_picture(open_page, avatar):
    page = open_page(1300, 800, prepared(NO_WEBGL2))
    load(page, graph())
    run(page, "failed")
    view = view_of(page, 3)
    assert "WebGL2" in view.locator(".words").inner_text()
    page.wait_for_function("() => document.querySelector('[data-node=\"3\"] img').naturalWidth")
    assert colourful(shot(view)) > 1000
    assert problems(page) == []
    page.close()


@pytest.fixture
def in_turns(server, avatar):
    """Two clouds without a body, two frames each: the performer of the first frame and of the last."""
    clouds, parts = [], [avatar.at(0), avatar.at(FRAMES - 1)]
    for splats in parts:
        nodes = nodes_at_rest(splats.means, 20, 2)
        goes = torch.tensor([[[0.0, 0.0, 0.0]], [[0.1, 0.0, 0.0]]]).expand_as(nodes.goes)
        normals = torch.nn.functional.normalize(splats.means, dim=1)
        moving = replace(nodes, goes=goes.contiguous())
        clouds.append(NodeCloud(moving, follow(splats.means, nodes), normals))
    splats = Splats(*map(torch.cat, zip(*(part.tensors() for part in parts), strict=True)))
    made = Avatar(splats, NodeMotion(tuple(clouds), even_light(splats.means)), FPS)
    file = server.base / "output" / "avatars" / TURNS
    save_avatar(file, made)
    yield made
    file.unlink()


def test_clouds_that_take_turns_are_shown_in_theirs(open_page, in_turns):
    page = open_page(1300, 800, prepared(COUNT_DRAWINGS))
    load(page, graph(file=TURNS))
    run(page)
    view = view_of(page, 3)
    on_black(view)
    found = []
    for time in (0.0, 1.0, 1.4, 1.6, 2.0, 2.5, 3.0):
        view.locator(".time").fill(str(time))
        color, _ = drawn(in_turns, look_of(view), time)
        found.append(psnr(saved(view), color))
    assert min(found) > 35, found
    assert problems(page) == []
    page.close()


def test_newer_nodes_of_the_page_show_the_view_too(open_page, avatar):
    """ComfyUI's nodes drawn by Vue ("Nodes 2.0") hand wheel and room out differently."""
    page = open_page(1300, 800, prepared(COUNT_DRAWINGS, **{"Comfy.VueNodes.Enabled": True}))
    load(page, graph())
    run(page)
    view = view_of(page, 3)
    before, place = colourful(picture(view)), graph_place(page)
    assert view.locator("canvas").bounding_box()["height"] > 200 and before > 500
    drag(view, 60, 10)
    view.locator("canvas").hover()
    page.mouse.wheel(0, -250)
    assert colourful(picture(view)) > 1.2 * before
    assert graph_place(page) == place
    kept = look_of(view)
    run(page)
    shown = page.evaluate("() => window.app.nodeOutputs['3'].turnaround_avatar[0]")
    assert shown["look"] == pytest.approx(kept.numbers()) and kept.azimuth < -5
    page.close()
