"""Edit Rig in the page: mouse, touch and keys on the drawings, undo, saving, copying, subgraphs, and
the rig that comes out. In both of ComfyUI's node renderers."""

import math
import time

import pytest
from view_pages import prepared

RENDERERS = {"classic": False, "vue": True}
RING = "\n".join(f"{azimuth} 0 3.2" for azimuth in range(0, 360, 45))
GRAPH = {
    "1": {
        "class_type": "TurnaroundRigEditor",
        "inputs": {"cameras": RING, "fov": 35, "width": 192, "height": 240},
    },
    # Tells, when it has run, which rig came in.
    "2": {
        "class_type": "TurnaroundRigEditor",
        "inputs": {"cameras": "0 0 2", "fov": 35, "width": 64, "height": 64, "rig": ["1", 0]},
    },
    "3": {"class_type": "TurnaroundPreviewRig", "inputs": {"rig": ["2", 0]}},
}
ONE = pytest.mark.parametrize("loaded", ["classic"], indirect=True)
"""For what goes on inside the editor alone: one renderer is enough."""
PLACE = [150, 130]
SIZE = [540, 640]


class Editor:
    """The editor of the graph's first node, and what a creator does with it."""

    def __init__(self, page):
        self.page, self.id = page, None

    def load(self, graph=GRAPH):
        page = self.page
        page.wait_for_function("() => window.app.graph.nodes.length")  # its own first graph
        page.evaluate("graph => window.app.loadApiJson(graph, 'rig.json')", graph)
        page.wait_for_function(f"() => window.app.graph.nodes.length === {len(graph)}")
        self.id = 1
        self.resize(SIZE)
        self.reset()

    def resize(self, size):
        """The newer nodes take places and sizes from a loaded graph only."""
        self.page.evaluate(
            """async ([place, size]) => {
              const saved = window.app.graph.serialize();
              for (const node of saved.nodes) node.pos = [place[0] + 700 * (node.id - 1), place[1]];
              for (const node of saved.nodes) if (node.id === 1) node.size = size;
              await window.app.loadGraphData(saved, true, false);
            }""",
            [PLACE, size],
        )

    def reset(self):
        """The ring, nothing chosen, the node in its place, nothing to undo."""
        self.page.evaluate(
            """(ring) => {
              const { graph, canvas } = window.app;
              const node = graph.getNodeById(1);
              for (const other of graph.nodes.filter((n) => n.id > 3)) graph.remove(other);
              const set = (name, value) => {
                const widget = node.widgets.find((w) => w.name === name);
                widget.value = value;
                widget.callback?.(value);
              };
              set('cameras', ring); set('fov', 35); set('width', 192); set('height', 240);
              canvas.deselectAll?.();
              canvas.ds.scale = 1; canvas.ds.offset = [0, 0];
              document.activeElement?.blur?.();
              canvas.setDirty(true, true);
              canvas.emitBeforeChange(); canvas.emitAfterChange();
              window.app.extensionManager.workflow.activeWorkflow.changeTracker.undoQueue.length = 0;
            }""",
            RING,
        )
        self.root.wait_for(state="attached")
        self.bring()
        if self.words:
            self.root.locator("[data-words]").click()
            self.settle()
        self.click_at("above", -0.9, -0.9)  # an empty corner: nothing is chosen
        self.undos = self.undo_steps

    def bring(self):
        """The editor's corner to PLACE on the screen, whichever renderer keeps the nodes' places."""
        self.settle()
        self.root.evaluate(
            """(root, [id, x, y]) => {
              const { ds, canvas, graph } = window.app.canvas;
              const node = graph.getNodeById(id);
              let box = root.getBoundingClientRect();
              if (!box.width) { // out of sight, where the classic renderer hides it
                const corner = canvas.getBoundingClientRect();
                const at = (i) => (node.pos[i] + ds.offset[i]) * ds.scale;
                box = { x: at(0) + corner.x, y: at(1) + corner.y };
              }
              ds.offset = [ds.offset[0] + (x - box.x) / ds.scale, ds.offset[1] + (y - box.y) / ds.scale];
              window.app.canvas.setDirty(true, true);
            }""",
            [self.id, *PLACE],
        )
        self.settle()
        self.root.wait_for(state="visible", timeout=8000)

    def settle(self):
        self.page.evaluate(
            "() => new Promise(r => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(r, 30))))"
        )

    @property
    def root(self):
        """The node's editor; their order in the page is not that of the graph."""
        self.page.evaluate(
            """id => {
              const inside = [...window.app.graph.nodes, ...(window.app.canvas.graph?.nodes ?? [])];
              const node = inside.find((n) => n.id == id);
              const old = document.querySelector('[data-node="tried"]');
              if (old) delete old.dataset.node;
              node.widgets.find((w) => w.name === 'cameras').element.dataset.node = 'tried';
            }""",
            self.id,
        )
        return self.page.locator(".turnaround-rig[data-node=tried]")

    @property
    def words(self):
        return not self.root.locator(".words").is_hidden()

    @property
    def text(self) -> str:
        return self.page.evaluate(
            "id => (window.app.canvas.graph ?? window.app.graph).getNodeById(id).widgets[0].value",
            self.id,
        )

    @property
    def lines(self) -> list[str]:
        return self.text.split("\n")

    @property
    def chosen(self) -> list[int]:
        marks = self.root.locator(".above [role=option]")
        flags = marks.evaluate_all("all => all.map((m) => m.getAttribute('aria-selected'))")
        return [i for i, flag in enumerate(flags) if flag == "true"]

    @property
    def undo_steps(self) -> int:
        return self.page.evaluate(
            "() => window.app.extensionManager.workflow.activeWorkflow.changeTracker.undoQueue.length"
        )

    def middle(self, part) -> tuple[float, float]:
        box = self.root.locator(part).bounding_box()
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def camera(self, number, pad="above") -> tuple[float, float]:
        """Where a camera's mark is, on the screen."""
        part = self.root.locator(
            f".{pad} g.camera:not([aria-hidden])" if pad == "above" else f".{pad} g.camera"
        )
        return tuple(
            part.nth(number).evaluate("""g => { const m = g.getScreenCTM(); return [m.e, m.f]; }""")
        )

    def click_at(self, pad, right, down, **more):
        """Click at shares (-1 to 1) of a pad."""
        box = self.root.locator(f".{pad}").bounding_box()
        x = box["x"] + box["width"] * (1 + right) / 2
        self.page.mouse.click(x, box["y"] + box["height"] * (1 + down) / 2, **more)
        self.settle()

    def choose(self, *numbers, key="Shift"):
        for i, number in enumerate(numbers):
            if i:
                self.page.keyboard.down(key)
            self.page.mouse.click(*self.camera(number))
            if i:
                self.page.keyboard.up(key)
        self.settle()

    def drag(self, start, end, steps=4):
        mouse = self.page.mouse
        mouse.move(*start)
        mouse.down()
        mouse.move(*end, steps=steps)
        mouse.up()
        self.settle()

    def around(self, degrees, share=1.0):
        """Where a camera of the ring would be at an azimuth, on the screen."""
        x0, y0 = self.camera(0)
        x4, y4 = self.camera(4)
        x, y, r = (x0 + x4) / 2, (y0 + y4) / 2, share * math.hypot(x0 - x4, y0 - y4) / 2
        return x + r * math.sin(math.radians(degrees)), y + r * math.cos(math.radians(degrees))

    def press(self, *keys):
        for key in keys:
            self.page.keyboard.press(key)
        self.settle()

    def number(self, name):
        return self.root.locator(f"[data-number={name}]")

    def button(self, deed):
        self.root.locator(f".bar [data-deed={deed}]").click()
        self.settle()

    def undo(self, keys="Control+z"):
        before = self.text
        self.page.keyboard.press(keys)
        self.page.wait_for_function(
            "([id, before]) => (window.app.canvas.graph ?? window.app.graph).getNodeById(id)?.widgets[0].value !== before",
            arg=[self.id, before],
            timeout=5000,
        )
        self.settle()

    def set_widget(self, name, value):
        self.page.evaluate(
            """([id, name, value]) => {
              const widget = window.app.graph.getNodeById(id).widgets.find((w) => w.name === name);
              widget.value = value;
              widget.callback?.(value);
            }""",
            [self.id, name, value],
        )
        self.settle()


@pytest.fixture(scope="module", params=RENDERERS)
def loaded(request, open_page):
    page = open_page(1300, 860, prepared(**{"Comfy.VueNodes.Enabled": RENDERERS[request.param]}))
    page.set_default_timeout(8000)
    editor = Editor(page)
    editor.load()
    yield editor
    page.close()


@pytest.fixture
def editor(loaded):
    loaded.reset()
    return loaded


def angles(editor) -> list[float]:
    return [float(line.split()[0]) for line in editor.lines]


def test_dragging_from_above_turns_a_camera_and_leaves_the_graph_alone(editor):
    place = "() => [...window.app.canvas.ds.offset, ...window.app.graph.getNodeById(1).pos]"
    before = editor.page.evaluate(place)
    editor.drag(editor.camera(1), editor.around(70))
    assert editor.lines == ["0 0 3.2", "70 0 3.2", *RING.split("\n")[2:]]
    assert editor.chosen == [1] and editor.number("azimuth").input_value() == "70"
    assert editor.page.evaluate(place) == before


def test_dragging_the_chosen_turns_all_of_them(editor):
    editor.choose(0, 2)
    assert editor.chosen == [0, 2]
    editor.drag(editor.camera(2), editor.around(60))
    assert angles(editor) == [330, 45, 60, 135, 180, 225, 270, 315]


def test_dragging_from_the_side_lifts_and_moves_the_chosen_only(editor):
    editor.choose(2)
    x, y = editor.camera(0, "side")
    feet = editor.root.locator(".side .figure").evaluate("g => g.getScreenCTM().e")
    reach = x - feet  # 3.2 m in pixels
    turn = math.radians(40)
    editor.drag((x, y), (feet + 1.25 * reach * math.cos(turn), y - 1.25 * reach * math.sin(turn)))
    assert editor.lines == [*RING.split("\n")[:2], "90 40 4", *RING.split("\n")[3:]]


@ONE
def test_one_spot_of_the_side_view_is_one_ring(editor):
    x, y = editor.camera(0, "side")
    editor.drag((x, y), (x, y - 60))
    assert editor.chosen == [*range(8)]
    assert len({tuple(line.split()[1:]) for line in editor.lines}) == 1
    assert float(editor.lines[0].split()[1]) > 5


@ONE
def test_empty_place_begins_a_rectangle_that_chooses(editor):
    x, y = editor.around(0, 0)
    right = editor.around(90)[0]
    editor.drag((right + 15, y - 100), (x + 10, y + 100))
    assert editor.chosen == [1, 2, 3]
    editor.click_at("above", -0.9, 0.9)
    assert editor.chosen == []


@ONE
def test_double_click_adds_a_camera_there(editor):
    editor.page.mouse.dblclick(*editor.around(22, 0.8))
    editor.settle()
    assert len(editor.lines) == 9 and editor.lines[8].endswith(" 0 3.2") and editor.chosen == [8]
    assert angles(editor)[8] == pytest.approx(22, abs=1)


@ONE
def test_buttons_edit_the_list(editor):
    editor.choose(1)
    editor.button("remove")
    assert angles(editor) == [0, 90, 135, 180, 225, 270, 315]
    editor.button("add")  # into the widest gap
    assert angles(editor)[-1] == 45 and editor.chosen == [7]
    editor.button("duplicate")
    assert angles(editor)[-1] == 60
    editor.button("mirror")
    assert angles(editor)[-1] == 300
    editor.button("renumber")
    assert angles(editor) == [0, 45, 60, 90, 135, 180, 225, 270, 300, 315]
    editor.button("all")
    editor.button("spread")
    assert angles(editor) == [*range(0, 360, 36)]
    editor.button("fit")  # models/cameras.framing_distance, tests/models/test_camera_lines.py
    assert {line.split()[2] for line in editor.lines} == {"3.42"}


@ONE
def test_spread_of_some_is_between_their_outer_two(editor):
    editor.drag(editor.camera(1), editor.around(80))
    editor.choose(7, 0, 1)
    editor.button("spread")
    assert angles(editor)[:2] == [17.5, 80] and angles(editor)[7] == 315


def test_keys_do_what_the_mouse_does(editor):
    editor.choose(0)
    editor.press("ArrowRight", "ArrowRight", "ArrowUp", "PageUp")
    assert editor.lines[0] == "2 1 3.25"
    editor.press("Shift+ArrowLeft", "Shift+ArrowDown", "Shift+PageDown")
    assert editor.lines[0] == "352 -9 2.75"
    editor.press("Tab")
    assert editor.chosen == [1]
    editor.press("Shift+Tab")
    assert editor.chosen == [0]
    editor.press("Delete")
    assert angles(editor) == [*range(45, 360, 45)]
    editor.press("Tab", "Control+a")
    assert editor.chosen == [*range(7)]
    editor.press("ArrowLeft", "Escape")
    assert angles(editor) == [*range(44, 315, 45)] and editor.chosen == []
    assert editor.page.evaluate("() => window.app.graph.nodes.length") == 3


def test_numbers_and_drawings_are_in_step_with_each_other(editor):
    editor.choose(3, 4)
    assert editor.number("azimuth").get_attribute("placeholder") == "mixed"
    for name, value in (("distance", "5"), ("fov", "50")):
        editor.number(name).fill(value)
        editor.number(name).press("Enter")
        editor.page.wait_for_timeout(100)  # newer pages take quicker changes for one
    assert editor.lines[3:5] == ["135 0 5 50", "180 0 5 50"]
    assert editor.undo_steps == editor.undos + 2
    editor.undo()  # of the graph, not of the typing
    assert editor.lines[3:5] == ["135 0 5", "180 0 5"]
    editor.undo("Control+y")
    assert editor.lines[3:5] == ["135 0 5 50", "180 0 5 50"]
    assert math.dist(editor.camera(4), editor.around(0, 0)) > math.dist(
        editor.camera(5), editor.around(0, 0)
    )
    editor.number("fov").fill("35")  # the node's own: no longer a camera's
    editor.number("fov").press("Enter")
    assert editor.lines[3] == "135 0 5"


def test_picture_is_in_step_with_the_nodes_own_widgets(editor):
    editor.choose(0)
    picture = editor.root.locator(".picture .edge")
    figure = editor.root.locator(".picture .figure")
    before = figure.bounding_box()["height"]
    assert 0.75 * picture.bounding_box()["height"] < before < picture.bounding_box()["height"]
    editor.set_widget("fov", 60)
    assert figure.bounding_box()["height"] < 0.65 * before
    assert editor.number("fov").input_value() == "60" and editor.text == RING
    editor.set_widget("width", 480)
    box = picture.bounding_box()
    assert box["width"] / box["height"] == pytest.approx(2, rel=0.03)


def test_undo_and_redo_are_the_pages_own_and_the_keyboard_stays(editor):
    editor.drag(editor.camera(1), editor.around(70), steps=12)
    assert editor.undo_steps == editor.undos + 1  # one step a drag
    turned = editor.text
    editor.press("ArrowUp")
    lifted = editor.text
    assert editor.undo_steps == editor.undos + 2
    editor.undo()
    assert editor.text == turned and editor.chosen == [1]
    editor.undo()
    assert editor.text == RING
    editor.undo("Control+y")
    editor.undo("Control+y")
    assert editor.text == lifted and editor.number("elevation").input_value() == "1"
    # The node is a new one, but keys go on where they were.
    editor.press("ArrowUp")
    assert editor.lines[1] == "70 2 3.2"


@ONE
def test_words_are_kept_and_faults_said(editor):
    editor.root.locator("[data-words]").click()
    area = editor.root.locator("textarea")
    area.fill("# mine\n0 0 3 # front\n90 0")
    fault = editor.root.locator(".fault").inner_text()
    assert fault.startswith('Line 3 is "90 0": write azimuth, elevation and distance')
    assert editor.root.locator("[data-deed=add]").is_disabled()
    assert editor.text == "# mine\n0 0 3 # front\n90 0"
    area.fill("# mine\n0 0 3 # front\n90 0 3 # side")
    area.blur()
    assert editor.root.locator(".fault").is_hidden()
    editor.root.locator("[data-words]").click()
    editor.settle()
    editor.choose(1)
    editor.press("ArrowRight")
    assert editor.text == "# mine\n0 0 3 # front\n91 0 3 # side"


def test_saved_and_loaded_graph_has_the_same_text(editor):
    text = "# by hand\n12.3456 -7 2.5 40 # close\n-90 0 3"
    editor.set_widget("cameras", text)
    saved = editor.page.evaluate("() => JSON.parse(JSON.stringify(window.app.graph.serialize()))")
    node = next(n for n in saved["nodes"] if n["id"] == 1)
    assert node["widgets_values"] == [text, 35, 192, 240]
    editor.set_widget("cameras", RING)
    editor.page.evaluate("graph => window.app.loadGraphData(graph, true, false)", saved)
    editor.settle()
    assert editor.text == text
    assert editor.root.locator(".above [role=option]").count() == 2


def test_copies_are_on_their_own(editor):
    editor.drag(editor.camera(1), editor.around(70))
    wanted = editor.text
    editor.page.evaluate(
        """() => { const { canvas, graph } = window.app;
          canvas.selectItems?.([graph.getNodeById(1)]); canvas.copyToClipboard([graph.getNodeById(1)]);
          canvas.pasteFromClipboard(); graph.add(graph.getNodeById(1).clone()); }"""
    )
    editor.settle()
    ids = editor.page.evaluate(
        "() => window.app.graph.nodes.map((n) => n.id).filter((id) => id > 3)"
    )
    assert len(ids) == 2
    try:
        for editor.id in ids:
            assert editor.text == wanted
        editor.set_widget("cameras", "5 0 3")
        assert editor.text == "5 0 3"
    finally:
        editor.id = 1
    assert editor.text == wanted


def test_narrow_node_in_a_zoomed_graph_shows_one_drawing_at_a_time(editor):
    editor.resize([300, 560])
    try:
        editor.page.evaluate("() => (window.app.canvas.ds.scale = 0.7)")
        editor.bring()
        editor.drag(editor.camera(1), editor.around(70))
        assert angles(editor)[1] == pytest.approx(70, abs=1)
        assert editor.root.locator(".side").is_hidden()
        editor.root.locator("[data-tab=side]:is(button)").click()
        editor.settle()
        assert editor.root.locator(".above").is_hidden()
        x, y = editor.camera(0, "side")
        editor.drag((x, y), (x, y - 30))
        assert float(editor.lines[1].split()[1]) > 5
        editor.root.locator("[data-tab=above]:is(button)").click()
    finally:
        editor.resize(SIZE)


def test_finger_drags_too(editor):
    session = editor.page.context.new_cdp_session(editor.page)

    def touch(kind, *points):
        session.send(
            "Input.dispatchTouchEvent",
            {"type": kind, "touchPoints": [{"x": x, "y": y} for x, y in points]},
        )

    x, y = editor.camera(2)
    touch("touchStart", (x + 14, y - 12))  # fingers are no needles
    for degrees in (95, 100, 110, 120):
        touch("touchMove", editor.around(degrees, 1.15))
    touch("touchEnd")
    editor.settle()
    assert 108 <= angles(editor)[2] <= 132 and angles(editor)[:2] == [0, 45]


@ONE
def test_everything_has_a_name_for_who_cannot_see_it(editor):
    bare = editor.root.evaluate(
        """root => [...root.querySelectorAll('button, input, textarea, [role=option], [role=img]')]
          .filter((e) => !e.getAttribute('aria-label') && !e.textContent.trim()
            && !e.closest('[hidden]')).map((e) => e.outerHTML)"""
    )
    assert bare == []
    label = editor.root.locator(".above [role=option]").nth(3).get_attribute("aria-label")
    assert label == "Camera 3: back right 135°, elevation 0°, 3.2 m"


def contrast(editor, name) -> float:
    """Of a part's stroke or fill against the editor's ground, as WCAG counts it."""
    colors = editor.root.evaluate(
        """(root, name) => {
          const paint = (color) => {
            const canvas = Object.assign(document.createElement('canvas'), { width: 1, height: 1 });
            const pen = canvas.getContext('2d');
            pen.fillStyle = color; pen.fillRect(0, 0, 1, 1);
            return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
          };
          const style = getComputedStyle(root.querySelector(name));
          return [paint(name.startsWith('text') ? style.fill : style.stroke),
            paint(getComputedStyle(root).backgroundColor)];
        }""",
        name,
    )

    def light(color):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light([c / 255 for c in color]) for color in colors), reverse=True)
    return (high + 0.05) / (low + 0.05)


@ONE
@pytest.mark.parametrize("palette", ["dark", "light"])
def test_cameras_are_seen_on_dark_and_light_pages(editor, palette):
    setting = "(palette) => window.app.extensionManager.setting.set('Comfy.ColorPalette', palette)"
    editor.page.evaluate(setting, palette)
    editor.choose(1)
    try:
        assert contrast(editor, ".above .camera.chosen rect") >= 3
        assert contrast(editor, ".above .camera:not(.chosen) circle:not(.focus)") >= 4.5
        assert contrast(editor, "text.word") >= 4.5
        # Without colours: another shape.
        assert editor.root.locator(".above [role=option].chosen rect").count() == 1
        assert editor.root.locator(".above [role=option]:not(.chosen) rect").count() == 0
    finally:
        editor.page.evaluate(setting, "dark")


def run(editor, server) -> dict:
    """The outputs of the queued graph."""
    before = set(server.get("/history"))
    editor.page.evaluate("() => window.app.queuePrompt(0, 1)")
    stop = time.monotonic() + 60
    while not (fresh := set(server.get("/history")) - before):
        assert time.monotonic() < stop
        editor.page.wait_for_timeout(100)
    entry = server.get("/history")[fresh.pop()]
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    return entry["outputs"]


def test_queued_rig_is_the_edited_one_and_can_be_taken_over(editor, server):
    editor.drag(editor.camera(1), editor.around(70))
    editor.choose(2)
    editor.press("Shift+ArrowUp")
    outputs = run(editor, server)
    (start,) = outputs["2"]["turnaround_rig"]
    assert (start["width"], start["height"], start["whole"]) == (192, 240, True)
    assert start["cameras"].split("\n")[:3] == ["0 0 3.2 35", "70 0 3.2 35", "90 10 3.2 35"]
    editor.id = 2
    try:
        editor.bring()
        taking = editor.root.get_by_text("Take over 8 cameras")
        taking.click()
        editor.settle()
        assert editor.text == start["cameras"] and taking.is_hidden()
        values = "() => window.app.graph.getNodeById(2).widgets.map((w) => w.value)"
        assert editor.page.evaluate(values)[1:4] == [35, 192, 240]
    finally:
        editor.id = 1


def test_subgraph_keeps_the_text_and_runs(editor, server):
    editor.drag(editor.camera(1), editor.around(70))
    wanted = editor.text
    inner = editor.page.evaluate(
        """async () => {
          const { graph, canvas } = window.app;
          const made = graph.convertToSubgraph(new Set([graph.getNodeById(1)]));
          const inside = made.subgraph.nodes.find((n) => n.type === 'TurnaroundRigEditor');
          const saved = JSON.parse(JSON.stringify(graph.serialize()));
          return [inside.id, inside.widgets[0].value, saved];
        }"""
    )
    editor.id, text, saved = inner
    try:
        assert text == wanted
        outputs = run(editor, server)
        (start,) = outputs["2"]["turnaround_rig"]
        assert start["cameras"].split("\n")[1] == "70 0 3.2 35"
        editor.page.evaluate("graph => window.app.loadGraphData(graph, true, false)", saved)
        editor.page.evaluate(
            """() => { const { graph, canvas } = window.app;
              const host = graph.nodes.find((n) => n.isSubgraphNode?.());
              canvas.openSubgraph ? canvas.openSubgraph(host.subgraph, host) : canvas.setGraph(host.subgraph); }"""
        )
        editor.settle()
        assert editor.text == wanted
        editor.bring()
        editor.choose(0)
        editor.press("ArrowRight")
        assert editor.lines[0] == "1 0 3.2"
        editor.undo()
        assert editor.text == wanted
    finally:
        editor.page.evaluate(
            "() => window.app.canvas.setGraph(window.app.rootGraph ?? window.app.graph)"
        )
        editor.load()


def test_nothing_of_ours_complained(editor):
    assert [p for p in editor.page.problems if "/extensions/ComfyUI-Turnaround" in p] == []
