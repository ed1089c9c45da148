"""The player of views in the page: which frame each view shows, wipe, zoom, keys, saving, nodes.

Every picture carries its own frame's and view's number as blocks, so what is on screen tells it.
"""

import io

import numpy as np
import pytest
from PIL import Image
from view_pages import load_at, prepared

VIEWS, FRAMES, FPS = 6, 12, 10
WIDTH, HEIGHT = 384, 240
SHEET = 256  # pixels of a view on the sheets; see models/views_stream.GRID
BITS = 8  # blocks in a row: above the frame's number, below the view's
NODE, SOURCE = 5, 2  # Preview Views; Images to Views
PLACE, SIZE = [410, 130], [600, 560]

LIVE_PICTURES = """
window.live = new Set();
const make = window.createImageBitmap;
window.createImageBitmap = async (...given) => {
  const picture = await make(...given);
  const close = picture.close.bind(picture);
  picture.close = () => { window.live.delete(picture); close(); };
  window.live.add(picture);
  return picture;
};"""

# Of every cell the colours at the middle of every block: [cells][2][BITS][3].
READ_CELLS = """async (count) => {
  const { layOut } = await import('/extensions/ComfyUI-Turnaround/views_drawing.js');
  const root = document.querySelector("[data-node='%d']");
  const canvas = root.querySelector('canvas');
  const density = canvas.width / canvas.clientWidth;
  const cells = layOut(count, %f, canvas.width, canvas.height, 2 * density);
  const context = canvas.getContext('2d');
  const at = (x, y) => [...context.getImageData(Math.round(x), Math.round(y), 1, 1).data].slice(0, 3);
  return { frame: Number(root.dataset.frame), cells: cells.map(([x, y, w, h]) =>
    [0, 1].map((r) => Array.from({ length: %d }, (_, c) => at(x + w * (c + 0.5) / %d, y + h * (0.3 + 0.4 * r))))) };
}"""

CELL = """async ([id]) => {
  const { layOut } = await import('/extensions/ComfyUI-Turnaround/views_drawing.js');
  const canvas = document.querySelector(`[data-node='${id}'] canvas`);
  return layOut(%d, %f, canvas.clientWidth, canvas.clientHeight, 2)[%d];
}"""


def coded(view: int, frame: int, on: tuple, off: tuple) -> Image.Image:
    picture = np.empty((2, BITS, 3), np.uint8)
    for row, number in enumerate((frame, view)):
        for bit in range(BITS):
            picture[row, bit] = on if number >> bit & 1 else off
    scaled = picture.repeat(HEIGHT // 2, 0).repeat(WIDTH // BITS, 1)
    return Image.fromarray(scaled)


def number(blocks) -> int:
    return sum(int(block[0] > 128) << bit for bit, block in enumerate(blocks))


def is_other(block) -> bool:
    """Black and white are of 'views', red and blue of 'compare'."""
    return max(block) - min(block) > 100


@pytest.fixture(scope="module")
def graph(server):
    prompt, written = {}, []
    for name, first, colours in (
        ("views", 1, ((255, 255, 255), (0, 0, 0))),
        ("compare", 3, ((255, 0, 0), (0, 0, 255))),
    ):
        pictures = [coded(v, f, *colours) for v in range(VIEWS) for f in range(FRAMES)]
        path = server.base / "input" / f"turnaround_player_{name}.png"
        pictures[0].save(path, save_all=True, append_images=pictures[1:], default_image=False)
        written.append(path)
        prompt[str(first)] = {"class_type": "LoadImage", "inputs": {"image": path.name}}
        prompt[str(first + 1)] = {
            "class_type": "TurnaroundImagesToViews",
            "inputs": {"images": [str(first), 0], "views": VIEWS, "fps": FPS},
        }
    prompt[str(NODE)] = {
        "class_type": "TurnaroundPreviewViews",
        "inputs": {"views": ["2", 0], "moments": 2, "compare": ["4", 0]},
    }
    yield prompt
    for path in written:
        path.unlink()


class Player:
    """The player of a node, and what a creator does with it."""

    def __init__(self, page, node: int = NODE, graph: str = "window.app.graph"):
        self.page, self.node = page, node
        page.evaluate(
            f"id => {{ const node = {graph}.getNodeById(id); for (const w of node.widgets)"
            " if (w.name === 'views_player') w.element.dataset.node = id; }",
            node,
        )
        self.root = page.locator(f"[data-node='{node}']")
        self.canvas = self.root.locator("canvas")

    def told(self, key: str) -> str:
        return self.root.get_attribute(f"data-{key}") or ""

    def wait(self, **told) -> None:
        for key, value in told.items():
            self.page.wait_for_function(
                "([id, key, value]) => document.querySelector(`[data-node='${id}']`)"
                ".dataset[key] === value",
                arg=[self.node, key, str(value)],
                timeout=60_000,
            )

    def cells(self, count: int = VIEWS):
        script = READ_CELLS % (self.node, WIDTH / HEIGHT, BITS, BITS)
        seen = self.page.evaluate(script, count)
        return seen["frame"], seen["cells"]

    def seek(self, frame: int) -> None:
        self.root.locator("input").fill(str(frame))
        self.wait(frame=frame)

    def middle(self, view: int, u: float = 0.5, v: float = 0.5) -> tuple[float, float]:
        """A place of a cell of the grid, on screen."""
        box = self.canvas.bounding_box()
        x, y, w, h = self.page.evaluate(CELL % (VIEWS, WIDTH / HEIGHT, view), [self.node])
        return box["x"] + x + u * w, box["y"] + y + v * h

    def press(self, *keys: str) -> None:
        self.canvas.focus()
        for key in keys:
            self.page.keyboard.press(key)


def open_graph(open_page, graph, **settings):
    def prepare(page):
        page.answers = []
        page.on("requestfinished", lambda request: page.answers.append(request))
        prepared(LIVE_PICTURES, **settings)(page)

    page = open_page(1300, 760, prepare)
    places = {n: {"pos": [-400 if n % 2 else 70, 130 if n < 3 else 640]} for n in range(1, NODE)}
    load_at(page, graph, places | {NODE: {"pos": PLACE, "size": SIZE}})
    page.evaluate("() => window.app.queuePrompt(0, 1)")
    Player(page).wait(state="ready")
    return page


@pytest.fixture(scope="module")
def page(open_page, graph):
    page = open_graph(open_page, graph)
    yield page
    page.close()


@pytest.fixture
def player(page):
    """As it is when the graph has just run, without the wipe."""
    player = Player(page)
    player.press("Escape")
    player.root.locator(".ending").select_option("loop")
    player.root.locator(".speed").select_option("1")
    player.root.locator(".compare").select_option("")
    player.wait(state="ready")
    player.seek(0)
    return player


def test_only_small_sheets_are_fetched_until_a_view_is_looked_at(page, server):
    page.wait_for_timeout(400)  # longer than a player waits before it fetches full size
    fetched = [r for r in page.answers if "turnviews" in r.url]
    assert fetched and not [r for r in fetched if "alone" in r.url]
    stored = {f.name: f.stat().st_size for f in (server.base / "temp").rglob("*.turnviews")}
    for request in fetched:
        assert any(name in request.url for name in stored)
    assert sum(r.sizes()["responseBodySize"] for r in fetched) < 1e6


@pytest.mark.parametrize("frame", [0, 5, FRAMES - 1])
def test_every_view_shows_the_frame_of_the_timeline(player, frame):
    player.seek(frame)
    shown, cells = player.cells()
    assert shown == frame
    assert [(number(c[0]), number(c[1])) for c in cells] == [(frame, v) for v in range(VIEWS)]
    assert player.root.locator("output").inner_text() == f"{frame + 1} / {FRAMES}"


def test_while_playing_all_views_are_of_one_frame(player):
    """Also with the wipe: what is right of it is of the same frame."""
    player.root.locator(".compare").select_option("compare")
    player.wait(state="ready")
    player.press("Home", " ")
    seen = set()
    for _ in range(25):
        frame, cells = player.cells()
        seen.add(frame)
        for v, cell in enumerate(cells):
            assert (number(cell[0]), number(cell[1])) == (frame, v)
            assert is_other(cell[0][-1]) and not is_other(cell[0][0])
        player.page.wait_for_timeout(30)
    assert len(seen) > 5
    player.press(" ")
    frame = player.cells()[0]
    player.page.wait_for_timeout(400)
    assert player.cells()[0] == frame


def frames_shown(player, milliseconds: int) -> list[int]:
    """Every frame that is shown from now on, in order."""
    return player.page.evaluate(
        """([id, time]) => new Promise((done) => {
          const root = document.querySelector(`[data-node='${id}']`), seen = [];
          const watch = new MutationObserver(() => seen.push(Number(root.dataset.frame)));
          watch.observe(root, { attributeFilter: ['data-frame'] });
          root.querySelector('.play').click();
          setTimeout(() => { watch.disconnect(); root.querySelector('.play').click(); done(seen); }, time);
        })""",
        [player.node, milliseconds],
    )


def changes(seen: list[int]) -> list[int]:
    return [f for n, f in enumerate(seen) if n == 0 or seen[n - 1] != f]


def test_the_clock_keeps_the_clip_s_time_and_the_chosen_speed(player):
    seen = changes(frames_shown(player, 1500))
    assert 10 <= (seen[-1] - 0) % FRAMES + FRAMES * (seen.count(0) > 1) <= 16  # 15 at 10 a second
    player.seek(0)
    player.root.locator(".speed").select_option("0.25")
    assert 2 <= changes(frames_shown(player, 1500))[-1] <= 4


def test_to_and_fro_turns_round_at_the_last_frame(player):
    # Slow, so that a busy computer leaves none out (the clock takes gaps of 0.25 s at most).
    player.root.locator(".ending").select_option("swing")
    player.root.locator(".speed").select_option("0.25")
    player.seek(FRAMES - 2)
    seen = changes(frames_shown(player, 2500))
    steps, turn = np.diff(seen), int(np.argmax(seen))
    assert seen[turn] == FRAMES - 1 and seen[-1] < FRAMES - 2
    assert (steps[:turn] > 0).all() and (steps[turn:] < 0).all()
    player.root.locator(".ending").select_option("once")
    player.root.locator(".speed").select_option("1")
    player.seek(FRAMES - 3)
    assert changes(frames_shown(player, 1500))[-1] == FRAMES - 1


def test_keys_step_jump_and_go_on_from_the_other_end(player):
    for key, frame in (
        ("ArrowRight", 1), ("ArrowLeft", 0), ("ArrowLeft", FRAMES - 1), ("ArrowRight", 0),
        ("Shift+ArrowRight", 10), ("End", FRAMES - 1), ("Home", 0),
    ):  # fmt: skip
        player.press(key)
        player.wait(frame=frame)
    assert player.cells()[0] == 0
    player.press(" ")
    player.wait(frame=3)
    player.press(" ")


def test_a_click_shows_one_view_alone_in_full_size(player):
    player.page.mouse.click(*player.middle(4))
    player.wait(alone=4, sharp="true")
    assert number(player.cells(1)[1][0][1]) == 4
    player.press("ArrowRight")
    player.wait(frame=1, sharp="true")
    (cell,) = player.cells(1)[1]
    assert (number(cell[0]), number(cell[1])) == (1, 4)
    player.page.mouse.click(*player.middle(4))
    player.wait(alone="")
    player.press("2")
    player.wait(alone=1)
    player.press("9")  # there are only six
    player.wait(alone="")
    player.press("6", "0")
    player.wait(alone="")


def test_the_wipe_divides_every_view_and_follows_the_mouse(player):
    player.root.locator(".compare").select_option("compare")
    player.wait(state="ready")
    player.seek(7)
    mouse = player.page.mouse
    for to in (0.8, 0.3):
        start = next(u for u in (0.5, 0.8) if _on_wipe(player, u))
        mouse.move(*player.middle(4, start, 0.2))
        mouse.down()
        mouse.move(*player.middle(4, to, 0.2), steps=4)
        mouse.up()
        player.page.wait_for_timeout(100)
        frame, cells = player.cells()
        assert frame == 7
        for v, cell in enumerate(cells):
            places = [(c + 0.5) / BITS for c in range(BITS)]
            assert [is_other(b) for b in cell[0]] == [u > to for u in places]
            assert (number(cell[0]), number(cell[1])) == (7, v)
    player.press("c")
    player.wait(state="ready")
    assert player.root.locator(".compare").input_value() == ""
    saved = player.page.evaluate(
        "id => window.app.graph.serialize().nodes.find(n => n.id === id)", NODE
    )
    assert saved["properties"]["views_player"]["wipe"] == pytest.approx(0.3, abs=0.02)
    assert saved["widgets_values"] == [2]


def _on_wipe(player, share: float) -> bool:
    """Whether the white line is there."""
    told = player.page.evaluate(
        "id => window.app.graph.getNodeById(id).properties.views_player?.wipe ?? 0.5", NODE
    )
    return abs(told - share) < 0.02


def test_the_wheel_zooms_all_views_in_step_and_not_the_graph(player):
    graph_place = "() => [window.app.canvas.ds.scale, ...window.app.canvas.ds.offset]"
    place = player.page.evaluate(graph_place)
    player.seek(5)
    # Into the lower left corner, where the lowest two bits of the view's number are.
    player.page.mouse.move(*player.middle(2, 0.02, 0.98))
    for _ in range(4):
        player.page.mouse.wheel(0, -250)
    zoom = np.exp(0.0015 * 1000)
    player.page.wait_for_function(
        "id => Number(document.querySelector(`[data-node='${id}']`).dataset.zoom) > 4.4", arg=NODE
    )
    assert float(player.told("zoom")) == pytest.approx(zoom, rel=0.01)
    assert player.page.evaluate(graph_place) == place
    for v, cell in enumerate(player.cells()[1]):
        # 8 / 4.48 = 1.8 blocks wide: the first block reaches to 56 % of the cell.
        assert [b[0] > 128 for b in cell[1][:4]] == [bool(v & 1)] * 4
        assert [b[0] > 128 for b in cell[1][5:]] == [bool(v & 2)] * 3
    mouse = player.page.mouse
    mouse.move(*player.middle(1, 0.9, 0.5))
    mouse.down()
    mouse.move(*player.middle(1, 0.2, 0.5), steps=3)  # all move left together
    mouse.up()
    player.page.wait_for_timeout(100)
    for v, cell in enumerate(player.cells()[1]):
        assert [b[0] > 128 for b in cell[1][:2]] == [bool(v & 2)] * 2 or v < 4
        assert cell[1][6][0] > 128 if v & 4 else cell[1][6][0] < 128
    player.root.locator(".all").click()
    assert float(player.told("zoom")) == 1 or player.wait(zoom=1) is None


def saved_picture(player) -> tuple[str, np.ndarray]:
    with player.page.expect_download() as given:
        player.root.locator(".save").click()
    download = given.value
    with open(download.path(), "rb") as file:
        picture = Image.open(io.BytesIO(file.read()))
        assert picture.format == "PNG"
        return download.suggested_filename, np.asarray(picture.convert("RGB"))


def test_frames_are_saved_as_png(player):
    player.seek(9)
    player.press("4")
    player.wait(alone=3)
    name, picture = saved_picture(player)
    assert name == "Preview_Views_3_frame0009.png"
    assert picture.shape == (HEIGHT, WIDTH, 3)
    truth = np.asarray(coded(3, 9, (255,) * 3, (0,) * 3)).astype(int)
    difference = np.abs(picture.astype(int) - truth).max(-1)
    assert np.quantile(difference, 0.98) < 12  # JPEG, at the edges of blocks
    player.press("0")
    player.wait(alone="")
    name, grid = saved_picture(player)
    assert name == "Preview_Views_all_frame0009.png"
    columns = grid.shape[1] // WIDTH  # as on screen
    assert grid.shape == (VIEWS // columns * HEIGHT, columns * WIDTH, 3)
    for v in range(VIEWS):
        y, x = HEIGHT * (v // columns), WIDTH * (v % columns)
        rows = [y + round(HEIGHT * (0.3 + 0.4 * r)) for r in (0, 1)]
        blocks = [x + round(WIDTH * (c + 0.5) / BITS) for c in range(BITS)]
        assert [number([grid[r, c] for c in blocks]) for r in rows] == [9, v]


def pause(page) -> None:
    page.evaluate(
        """() => { Object.defineProperty(document, 'hidden', { value: true, configurable: true });
                   document.dispatchEvent(new Event('visibilitychange')); delete document.hidden; }"""
    )


def test_a_hidden_page_pauses(player):
    player.press(" ")
    player.wait(frame=2)
    pause(player.page)
    frame = player.told("frame")
    player.page.wait_for_timeout(500)
    assert player.told("frame") == frame
    player.press(" ")
    player.wait(frame=(int(frame) + 3) % FRAMES)
    player.press(" ")


def test_resizing_the_node_lays_the_views_out_anew(player):
    resize = """([id, size]) => { window.app.graph.getNodeById(id).setSize(size);
                                  window.app.canvas.setDirty(true, true); }"""
    before = player.canvas.bounding_box()["width"]
    player.page.evaluate(resize, [NODE, [380, 620]])
    player.page.wait_for_function(
        "([id, width]) => document.querySelector(`[data-node='${id}'] canvas`).width < width",
        arg=[NODE, before - 100],
    )
    player.page.wait_for_timeout(100)
    _, cells = player.cells()
    assert [number(c[1]) for c in cells] == list(range(VIEWS))
    player.page.evaluate(resize, [NODE, SIZE])


def test_nodes_with_views_open_a_small_player_where_there_is_room(page):
    small = Player(page, SOURCE)
    assert small.root.locator(".head").inner_text() == f"▾ 6 views × 12 of {WIDTH}×{HEIGHT}"
    small.wait(state="ready")
    small.seek(8)
    frame, cells = small.cells()
    assert frame == 8
    assert [(number(c[0]), number(c[1])) for c in cells] == [(8, v) for v in range(VIEWS)]
    height = "id => window.app.graph.getNodeById(id).size[1]"
    heights = []
    for _ in range(2):
        small.root.locator(".head").click()
        page.wait_for_function(
            "id => !document.querySelector(`[data-node='${id}'] canvas`)", arg=SOURCE
        )
        heights.append(page.evaluate(height, SOURCE))
        small.root.locator(".head").click()
        small.wait(state="ready")
        heights.append(page.evaluate(height, SOURCE))
    assert heights[:2] == heights[2:]  # folding and opening again changes nothing
    assert heights[1] - heights[0] > 150


def test_a_player_stays_folded_where_it_would_cover_a_node(page):
    state = """([id, above]) => {
      const { graph } = window.app, node = graph.getNodeById(id);
      const other = LiteGraph.createNode(node.type);
      graph.add(other);
      other.pos = [node.pos[0], node.pos[1] + above];
      other.onExecuted(window.app.nodeOutputs[id]);
      const head = other.widgets.find((w) => w.name === 'views_player').element.innerText;
      graph.remove(other);
      return head[0];
    }"""
    assert page.evaluate(state, [SOURCE, -800]) == "▾"
    assert page.evaluate(state, [SOURCE, -250]) == "▸"  # the node itself is below


def test_a_loaded_workflow_shows_its_views_without_a_run(player):
    player.root.locator(".ending").select_option("swing")
    player.page.evaluate(
        """async () => {
          const outputs = window.app.nodeOutputs;
          await window.app.loadGraphData(window.app.graph.serialize());
          window.app.nodeOutputs = outputs;
        }"""
    )
    again = Player(player.page)
    again.wait(state="ready")
    again.seek(4)
    assert [number(c[0]) for c in again.cells()[1]] == [4] * VIEWS
    assert again.root.locator(".ending").input_value() == "swing"


def test_out_of_sight_a_player_keeps_no_unpacked_pictures(player, page):
    move = (
        "([x]) => { window.app.canvas.ds.offset = [x, 0]; window.app.canvas.setDirty(true, true); }"
    )
    assert page.evaluate("() => window.live.size") > 0
    page.evaluate(move, [-3000])
    page.wait_for_function("() => window.live.size === 0", timeout=20_000)
    page.evaluate(move, [0])
    player.seek(3)
    assert [number(c[0]) for c in player.cells()[1]] == [3] * VIEWS


def test_players_inside_a_subgraph_show_what_came_out_there(page):
    saved = page.evaluate("() => JSON.parse(JSON.stringify(window.app.graph.serialize()))")
    inner = page.evaluate(
        """id => {
          const { graph } = window.app;
          graph.getNodeById(2).widgets[1].value = 7; // something to run anew
          const made = graph.convertToSubgraph(new Set([graph.getNodeById(2), graph.getNodeById(id)]));
          return made.subgraph.nodes.find((n) => n.type === 'TurnaroundPreviewViews').id;
        }""",
        NODE,
    )
    page.evaluate(
        """() => { const { graph, canvas } = window.app;
          const host = graph.nodes.find((n) => n.isSubgraphNode?.());
          canvas.openSubgraph ? canvas.openSubgraph(host.subgraph, host) : canvas.setGraph(host.subgraph);
          canvas.ds.scale = 1; canvas.ds.offset = [0, 0];
          for (const node of host.subgraph.nodes) node.pos = [node.type.includes('Preview') ? 410 : 70, 130];
          window.app.queuePrompt(0, 1); }"""
    )
    player = Player(page, inner, "window.app.canvas.graph")
    player.wait(state="ready")
    player.seek(9)
    assert [(number(c[0]), number(c[1])) for c in player.cells()[1]] == [
        (9, v) for v in range(VIEWS)
    ]
    page.evaluate("() => window.app.canvas.setGraph(window.app.rootGraph ?? window.app.graph)")
    page.evaluate("graph => window.app.loadGraphData(graph, true, false)", saved)
    page.evaluate("() => window.app.queuePrompt(0, 1)")
    Player(page).wait(state="ready")


def test_a_removed_node_gives_its_pictures_back(player, page):
    player.press("3")
    player.wait(alone=2, sharp="true")
    before = page.evaluate("() => window.live.size")
    kept = page.evaluate(
        """id => {
          const { graph } = window.app, node = graph.getNodeById(id);
          const copy = node.clone();
          graph.add(copy);
          graph.remove(node);
          return copy.id;
        }""",
        NODE,
    )
    assert before > 0
    for id_ in (SOURCE, 4):
        page.evaluate("id => window.app.graph.remove(window.app.graph.getNodeById(id))", id_)
    page.wait_for_function("() => window.live.size === 0", timeout=20_000)
    copy = Player(page, kept)
    assert copy.told("state") == "empty"


def test_a_cleared_temp_folder_is_one_sentence(page):
    copy = page.evaluate(
        """() => {
          const node = window.app.graph.nodes.find((n) => n.type === 'TurnaroundPreviewViews');
          node.onExecuted({ turnaround_views: [{ filename: 'gone.turnviews', subfolder: '',
            type: 'temp', checksum: 1, name: 'views', views: 2, frames: 3, size: [64, 64] }] });
          node.pos = [410, 130];
          return node.id;
        }"""
    )
    player = Player(page, copy)
    player.wait(state="failed")
    assert "run the node again" in player.root.locator(".words").inner_text()


def test_nothing_of_ours_complained(page):
    assert [p for p in page.problems if "/extensions/ComfyUI-Turnaround" in p] == []


def test_newer_nodes_of_the_page_show_the_player_too(open_page, graph):
    """ComfyUI's nodes drawn by Vue ("Nodes 2.0") hand wheel, keys and room out differently."""
    for source in ("2", "4"):
        graph[source]["inputs"]["fps"] = FPS + 1  # what has run already would not run again
    settings = {"Comfy.VueNodes.Enabled": True, "Turnaround.ViewsOnNodes": "folded"}
    page = open_graph(open_page, graph, **settings)
    player = Player(page)
    player.seek(6)
    assert player.canvas.bounding_box()["height"] > 200
    frame, cells = player.cells()
    assert [(number(c[0]), number(c[1])) for c in cells] == [(6, v) for v in range(VIEWS)]
    place = page.evaluate("() => [window.app.canvas.ds.scale, ...window.app.canvas.ds.offset]")
    player.page.mouse.move(*player.middle(1))
    player.page.mouse.wheel(0, -250)
    page.wait_for_function(
        "id => Number(document.querySelector(`[data-node='${id}']`).dataset.zoom) > 1.4", arg=NODE
    )
    assert place == page.evaluate(
        "() => [window.app.canvas.ds.scale, ...window.app.canvas.ds.offset]"
    )
    player.press("0", "ArrowRight", "3")
    player.wait(frame=7, alone=2)
    small = Player(page, SOURCE)
    assert small.root.locator("canvas").count() == 0  # folded, as the settings say
    small.root.locator(".head").click()
    small.wait(state="ready")
    small.seek(8)
    assert [number(c[0]) for c in small.cells()[1]] == [8] * VIEWS
    assert not [p for p in page.problems if "/extensions/ComfyUI-Turnaround" in p]
    page.close()
