"""For the browser tests of the widgets: a page with a graph, its views in space, and what a creator
does with them."""

from __future__ import annotations

import io
import json

import numpy as np
from PIL import Image

COUNT_DRAWINGS = """
window.drawings = 0; window.drewAt = 0;
for (const name of ['drawArrays', 'drawElementsInstanced']) {
  const draw = WebGL2RenderingContext.prototype[name];
  WebGL2RenderingContext.prototype[name] = function (...given) {
    window.drawings++; window.drewAt = performance.now();
    return draw.apply(this, given);
  };
}"""
NO_WEBGL2 = """
const get = HTMLCanvasElement.prototype.getContext;
HTMLCanvasElement.prototype.getContext = function (kind, ...given) {
  return kind === 'webgl2' ? null : get.call(this, kind, ...given);
};"""


def prepared(script: str = "", **settings):
    """For `open_page`: a creator who knows ComfyUI, so no template browser lies over the graph."""

    def prepare(page):
        known = json.dumps({"Comfy.TutorialCompleted": True, **settings})
        page.route(
            "**/api/settings", lambda r: r.fulfill(body=known, content_type="application/json")
        )
        if script:
            page.add_init_script(script)

    return prepare


def load(page, graph: dict, shown: int = 2, size: tuple[int, int] = (420, 560)) -> None:
    """A graph whose last `shown` nodes stand side by side in the middle of the screen, unscaled."""
    first = len(graph) + 1 - shown
    places = {id: {"pos": [-900, 300 * id]} for id in range(1, first)}
    for n in range(shown):
        places[first + n] = {"pos": [(size[0] + 20) * n + 100, 140], "size": size}
    load_at(page, graph, places)


def load_at(page, graph: dict, places: dict[int, dict]) -> None:
    """A graph, unscaled, each node with its `pos` and perhaps its `size`."""
    page.wait_for_function("() => window.app.graph.nodes.length")  # its own first graph has come
    page.evaluate("graph => window.app.loadApiJson(graph, 'test.json')", graph)
    page.wait_for_function(f"() => window.app.graph.nodes.length === {len(graph)}")
    # The newer nodes take places and sizes from a loaded graph only.
    page.evaluate(
        """async (places) => {
          const { graph, canvas } = window.app, saved = graph.serialize();
          for (const node of saved.nodes) Object.assign(node, places[node.id]);
          await window.app.loadGraphData(saved, true, false);
          canvas.ds.scale = 1; canvas.ds.offset = [0, 0]; canvas.setDirty(true, true);
        }""",
        {str(id): place for id, place in places.items()},
    )


def run(page, kind: str, state: str = "ready") -> None:
    """Queue the graph, and wait until it has run and all views of a kind are in a state."""
    page.evaluate(
        """() => new Promise((done) => {
          window.app.api.addEventListener('execution_success', done, { once: true });
          window.app.queuePrompt(0, 1);
        })"""
    )
    wait_for_views(page, kind, state)


def wait_for_views(page, kind: str, state: str = "ready") -> None:
    page.wait_for_function(
        """([kind, state]) => { const views = [...document.querySelectorAll(`.turnaround-${kind}`)];
          return views.length && views.every(v => v.dataset.state === state); }""",
        arg=[kind, state],
        timeout=120_000,
    )


def view_of(page, kind: str, node: int):
    """The view of a node; their order in the page is not that of the graph."""
    page.evaluate(
        """([kind, id]) => {
          const named = (w) => w.name === `${kind}_view`;
          window.app.graph.getNodeById(id).widgets.find(named).element.dataset.node = id;
        }""",
        [kind, node],
    )
    return page.locator(f".turnaround-{kind}[data-node='{node}']")


def shot(view) -> np.ndarray:  # [H, W, 3]
    """What is on screen where the view is."""
    picture = Image.open(io.BytesIO(view.locator(".stage").screenshot())).convert("RGB")
    return np.asarray(picture).astype(int)


def colourful(picture: np.ndarray) -> int:
    """Pixels that are clearly not grey: the performer, as ground and backdrop are grey."""
    return int((picture[..., :3].max(-1) - picture[..., :3].min(-1) > 40).sum())


def drag(view, dx: float, dy: float, button: str = "left") -> None:
    box = view.locator("canvas").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    mouse = view.page.mouse
    mouse.move(x, y)
    mouse.down(button=button)
    mouse.move(x + dx, y + dy, steps=3)
    mouse.up(button=button)


def fingers(page, kind: str, *places: tuple[float, float]) -> None:
    """A touch: "touchStart", "touchMove" or "touchEnd", with all fingers that are down."""
    points = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(places)]
    if not hasattr(page, "touch"):
        page.touch = page.context.new_cdp_session(page)
    page.touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})


def middle_of(locator) -> tuple[float, float]:
    box = locator.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def graph_place(page, node: int = 3) -> list[float]:
    """Zoom, place and a node of the graph: what a view must leave alone."""
    return page.evaluate(
        "id => [window.app.canvas.ds.scale, ...window.app.canvas.ds.offset,"
        " ...window.app.graph.getNodeById(id).pos]",
        node,
    )


def lose_context(page, node: int = 3) -> None:
    page.evaluate(
        """id => {
          const canvas = document.querySelector(`[data-node="${id}"] canvas`);
          window.lose = canvas.getContext('webgl2').getExtension('WEBGL_lose_context');
          window.lose.loseContext();
        }""",
        node,
    )


def problems(page) -> list[str]:
    """What the page's console complained of about the pack."""
    return [p for p in page.problems if "/extensions/ComfyUI-Turnaround" in p]
