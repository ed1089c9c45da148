"""Preview Avatar as a node among others, in both of ComfyUI's node renderers: its camera as a rig for
the next node, undo, copies, subgraphs, fingers, and more views than a browser keeps alive."""

import pytest
import view_pages as pages
from dancing_avatar import dancing_avatar
from turnaround.models.avatar import save_avatar

pytestmark = pytest.mark.usefixtures("one_thread")

FILE = "nodes_test.safetensors"
FRAMES = 3
MANY = 18
"""Browsers keep 16 WebGL contexts."""
VIEW = 4
CAMERAS = """() => window.app.nodeOutputs['2']?.turnaround_rig?.[0]?.cameras"""


def graph(views: int = 1) -> dict:
    preview = {"avatar": ["1", 0], "camera": "", "width": 192, "height": 240}
    editor = {"cameras": "", "fov": 35, "width": 64, "height": 64, "rig": [str(VIEW), 0]}
    return {
        "1": {"class_type": "TurnaroundLoadAvatar", "inputs": {"name": FILE}},
        # Lets the rig through that comes in, and tells which it was.
        "2": {"class_type": "TurnaroundRigEditor", "inputs": editor},
        "3": {"class_type": "TurnaroundPreviewRig", "inputs": {"rig": ["2", 0]}},
        **{
            str(VIEW + i): {"class_type": "TurnaroundPreviewAvatar", "inputs": dict(preview)}
            for i in range(views)
        },
    }


@pytest.fixture(scope="module", autouse=True)
def avatar(server):
    folder = server.base / "output" / "avatars"
    folder.mkdir(parents=True, exist_ok=True)
    save_avatar(folder / FILE, dancing_avatar(1500, FRAMES))
    yield
    (folder / FILE).unlink()


@pytest.fixture(scope="module", params=["classic", "vue"])
def page(request, open_page):
    settings = {"Comfy.VueNodes.Enabled": request.param == "vue"}
    page = open_page(1300, 800, pages.prepared(pages.COUNT_DRAWINGS, **settings))
    pages.load(page, graph(), shown=1)
    pages.run(page, "avatar")
    yield page
    page.close()


@pytest.fixture
def view(page):
    view = pages.view_of(page, "avatar", VIEW)
    view.locator("canvas").dblclick()
    return view


def camera(page, node: int = VIEW, among: str = "window.app.graph") -> str:
    return page.evaluate(
        f"id => {among}.getNodeById(id).widgets.find(w => w.name === 'camera').value", node
    )


def azimuth(text: str) -> float:
    return float(text.split()[1].rstrip(","))


def rig_azimuth(page) -> float:
    """Of the rig that came out; around the world's origin, where a look is around the avatar."""
    return float(page.evaluate(CAMERAS).split()[0])


def apart(a: float, b: float) -> float:
    return abs((a - b + 180) % 360 - 180)


def steps(page) -> int:
    return page.evaluate(
        "() => window.app.extensionManager.workflow.activeWorkflow.changeTracker.undoQueue.length"
    )


def test_the_kept_camera_is_a_rig_for_the_next_node_and_can_be_undone(page, view):
    before, undos = camera(page), steps(page)
    pages.drag(view, 80, 0)
    view.locator("canvas").focus()
    page.keyboard.press("c")
    kept = camera(page)
    assert kept != before and azimuth(kept) < -20
    page.wait_for_function(
        f"() => window.app.extensionManager.workflow.activeWorkflow.changeTracker.undoQueue.length > {undos}"
    )
    pages.run(page, "avatar")
    assert apart(rig_azimuth(page), azimuth(kept)) < 1
    page.keyboard.press("Control+z")
    page.wait_for_function(
        f"""before => window.app.graph.getNodeById({VIEW}).widgets.find(w => w.name === 'camera').value
          === before""",
        arg=before,
    )
    # Undo has built the node anew; its view shows the avatar without a run.
    pages.wait_for_views(page, "avatar")
    view = pages.view_of(page, "avatar", VIEW)
    page.wait_for_timeout(700)
    assert pages.colourful(pages.shot(view)) > 200
    pages.run(page, "avatar")
    assert apart(rig_azimuth(page), 0) < 1


def test_one_finger_turns_and_two_move_without_touching_the_graph(page, view):
    place = pages.graph_place(page, VIEW)
    x, y = pages.middle_of(view.locator("canvas"))
    pages.fingers(page, "touchStart", (x, y))
    pages.fingers(page, "touchMove", (x + 40, y))
    pages.fingers(page, "touchMove", (x + 90, y))
    pages.fingers(page, "touchEnd")
    view.locator("canvas").focus()
    page.keyboard.press("c")
    turned = camera(page)
    assert azimuth(turned) < -15 and turned.endswith("at " + turned.split("at ")[1])
    pages.fingers(page, "touchStart", (x - 20, y), (x + 20, y))
    pages.fingers(page, "touchMove", (x - 20, y + 60), (x + 20, y + 60))
    pages.fingers(page, "touchEnd")
    page.keyboard.press("c")
    moved = camera(page)
    assert moved.split("at ")[0] == turned.split("at ")[0]  # neither turned nor zoomed
    assert moved.split("at ")[1] != turned.split("at ")[1]
    assert pages.graph_place(page, VIEW) == place


def test_a_copied_node_has_its_camera_and_choices_and_lives_on_its_own(page, view):
    view.locator(".background").select_option("light")
    pages.drag(view, -60, 0)
    view.locator("canvas").focus()
    page.keyboard.press("c")
    kept = camera(page)
    made = page.evaluate(
        f"""() => {{ const {{ canvas, graph }} = window.app, node = graph.getNodeById({VIEW});
          const before = new Set(graph.nodes.map((n) => n.id));
          canvas.selectItems?.([node]); canvas.copyToClipboard([node]); canvas.pasteFromClipboard();
          const copy = graph.nodes.find((n) => !before.has(n.id));
          copy.pos = [700, 140];
          graph.getNodeById(1).connect(0, copy, 0);
          return copy.id; }}"""
    )
    assert camera(page, made) == kept
    pages.run(page, "avatar")
    copy = pages.view_of(page, "avatar", made)
    assert copy.locator(".background").input_value() == "light"
    copy.locator(".background").select_option("dark")
    assert view.locator(".background").input_value() == "light"
    page.evaluate("id => window.app.graph.remove(window.app.graph.getNodeById(id))", made)
    assert page.locator(".turnaround-avatar canvas").count() == 1
    view.locator(".background").select_option("dark")


def test_inside_a_subgraph_the_view_shows_what_came_out_there(page, view):
    """The last test of a page: ComfyUI 0.3.75's newer nodes don't find the way back by script."""
    inner = page.evaluate(
        f"""() => {{
          const {{ graph, canvas }} = window.app;
          const made = graph.convertToSubgraph(new Set([graph.getNodeById(1), graph.getNodeById({VIEW})]));
          const host = graph.nodes.find((n) => n.isSubgraphNode?.());
          canvas.openSubgraph ? canvas.openSubgraph(host.subgraph, host) : canvas.setGraph(host.subgraph);
          for (const node of host.subgraph.nodes) node.pos = [node.type.includes('Preview') ? 300 : -300, 140];
          canvas.ds.scale = 1; canvas.ds.offset = [0, 0]; canvas.setDirty(true, true);
          return made.subgraph.nodes.find((n) => n.type === 'TurnaroundPreviewAvatar').id;
        }}"""
    )
    pages.run(page, "avatar")
    place = "window.app.canvas.graph"
    page.evaluate(
        f"id => {{ {place}.getNodeById(id).widgets.find(w => w.name === 'avatar_view')"
        ".element.dataset.node = 'inner'; }",
        inner,
    )
    inside = page.locator("[data-node=inner]")
    before = camera(page, inner, place)
    pages.drag(inside, 70, 0)
    inside.locator("canvas").focus()
    page.keyboard.press("c")
    assert camera(page, inner, place) != before
    assert pages.colourful(pages.shot(inside)) > 200


def test_nothing_of_ours_complained(page):
    assert pages.problems(page) == []


def test_of_more_views_than_the_browser_keeps_the_oldest_sleep_and_wake(open_page):
    page = open_page(1700, 900, pages.prepared(pages.COUNT_DRAWINGS))
    pages.load(page, graph(MANY), shown=MANY, size=(230, 500))
    page.evaluate(
        """([first, count]) => { const { graph, canvas } = window.app;
          for (let i = 0; i < count; i++) graph.getNodeById(first + i).pos = [250 * (i % 9) + 60, 80 + 560 * Math.floor(i / 9)];
          canvas.ds.scale = 0.7; canvas.ds.offset = [0, 60]; canvas.setDirty(true, true); }""",
        [VIEW, MANY],
    )
    page.evaluate("() => window.app.queuePrompt(0, 1)")
    states = (
        "() => [...document.querySelectorAll('.turnaround-avatar')].map((v) => v.dataset.state)"
    )
    page.wait_for_function(
        f"() => {{ const all = ({states})(); return all.length === {MANY} && all.every((s) => ['ready', 'asleep'].includes(s)); }}",
        timeout=120_000,
    )
    found = page.evaluate(states)
    assert 1 <= found.count("asleep") <= MANY - 14, found
    sleeping = page.locator(".turnaround-avatar[data-state=asleep]").first
    sleeping.evaluate("view => { view.dataset.node = 'sleeper'; }")
    woken = page.locator("[data-node=sleeper]")
    woken.locator(".stage").click()
    page.wait_for_function(
        "() => document.querySelector('[data-node=sleeper]').dataset.state === 'ready'"
    )
    page.wait_for_timeout(1500)
    assert pages.colourful(pages.shot(woken)) > 100
    assert pages.problems(page) == []
    page.close()
