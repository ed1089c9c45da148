"""The three blueprints in ComfyUI's page, joined from a clip to saved views by whoever has a page."""

import contextlib
import json
from pathlib import Path

from playwright.sync_api import TimeoutError

FOLDER = Path(__file__).resolve().parent.parent / "subgraphs"
CHAIN = (
    ("Turnaround Clip to Conditions", {"views": 4, "width": 96, "height": 128}),
    ("Turnaround Views Together", {"steps": 2}),
    ("Turnaround Refine and Deflicker", {"iterations": 1}),
)
JOIN = """([ids, values]) => {
  const add = (type, given) => {
    const node = LiteGraph.createNode(type); app.graph.add(node); set(node, given); return node; };
  const set = (node, given) => {
    for (const w of node.widgets) if (w.name in given) w.value = given[w.name]; };
  const join = (from, to, ...names) => { for (const name of names)
    from.connect(from.findOutputSlot(name), to, to.findInputSlot(name)); };
  const nodes = ids.map(id => app.graph.getNodeById(id));
  nodes.forEach((node, k) => set(node, values[k]));
  const [conditions, views, refined] = nodes;
  const clip = add("TurnaroundSamplePerformer", {frames: 5, width: 192, height: 256});
  const saved = add("TurnaroundSaveViews", {filename_prefix: "turnaround/blueprints"});
  join(clip, conditions, "video");
  join(conditions, views, "partial", "normals", "performer", "rig");
  join(views, refined, "views");
  join(conditions, refined, "depth");
  join(refined, saved, "views");
}"""


def join_blueprints(page) -> dict:
    """Puts the blueprints into an empty graph, found by typing as a creator finds nodes, and joins
    them; gives what Run would send, with every value checked."""
    page.evaluate("() => app.graph.clear()")
    for k, (name, _) in enumerate(CHAIN):
        x, y = 250 + 400 * k, 300
        _open_search(page, x, y)
        page.keyboard.type(name.lower())
        page.get_by_text(name).first.wait_for()
        page.keyboard.press("Enter")
        page.wait_for_function(f"() => app.graph._nodes.length === {k + 1}")
        page.mouse.click(x, y)  # newer pages let a node hang on the pointer until then
        page.wait_for_timeout(600)  # so that this click and the next two are no double click
    titles = page.evaluate("() => app.graph._nodes.map(n => [n.title, n.id])")
    ids = [dict(titles)[name] for name, _ in CHAIN]
    page.evaluate(JOIN, [ids, [values for _, values in CHAIN]])
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    told = {node["class_type"]: node["inputs"] for node in prompt.values()}
    for name, values in CHAIN:
        for kind, (wanted, joined) in _inside(name, values).items():
            given = {k: v for k, v in told[kind].items() if not isinstance(v, list)}
            assert given == wanted, kind
            assert {k for k, v in told[kind].items() if isinstance(v, list)} == joined, kind
    return prompt


def _open_search(page, x: int, y: int) -> None:
    """By a double click; on a busy machine a page may take it for two single ones."""
    box = page.locator("input:focus")
    for _ in range(5):
        page.mouse.dblclick(x, y)
        with contextlib.suppress(TimeoutError):
            return box.wait_for(timeout=6_000)
    raise AssertionError("no double click opened the search box")


def _inside(name: str, values: dict) -> dict[str, tuple[dict, set]]:
    """What each node of a blueprint is told: its values, some set from outside, and what is joined."""
    inside = definition(FOLDER / f"{name}.json")
    outside = {
        k: values[i["name"]] for i in inside["inputs"] if i["name"] in values for k in i["linkIds"]
    }
    told = {}
    for node in inside["nodes"]:
        wanted = {**node["widgets_values_named"]}
        wanted.pop("control_after_generate", None)
        links = {i["name"]: i["link"] for i in node["inputs"] if i["link"] is not None}
        wanted |= {k: outside[link] for k, link in links.items() if link in outside}
        told[node["type"]] = wanted, links.keys() - wanted.keys()
    told.pop("MarkdownNote")
    return told


def read(path: Path) -> dict:
    # ComfyUI reads these files in the system's encoding.
    return json.loads(path.read_text(encoding="ascii"))


def definition(path: Path) -> dict:
    (inside,) = read(path)["definitions"]["subgraphs"]
    return inside
