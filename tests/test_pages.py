"""What readers see first: links and pictures of the pages are there, examples are laid out."""

import itertools
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "models/tiny/MODEL_CARD.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
LINK = re.compile(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")


def links(page: Path) -> list[str]:
    return [a or b for a, b in LINK.findall(page.read_text(encoding="utf-8"))]


def anchors(page: Path) -> set[str]:
    """As GitHub names headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for link in links(page):
        if link.startswith(("http://", "https://")):
            continue
        place, _, anchor = link.partition("#")
        target = page.parent / place if place else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_readme_shows_every_workflow_and_blueprint():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in WORKFLOWS:
        row = next(
            x
            for x in readme.splitlines()
            if x[:1] == "|" and f"*{path.stem.replace('_', ' ')}*" in x
        )
        *_, picture, name, teaches, time, memory, fetched, _ = row.split("|")
        assert f"workflows/{path.stem}.jpg" in picture
        assert all(cell.strip() for cell in (name, teaches, time, memory, fetched)), path.stem
    for path in (ROOT / "subgraphs").glob("*.json"):
        assert f"**{path.stem}**" in readme


def test_readme_names_every_node():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    words = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert [node for node, told in words.items() if told["display_name"] not in readme] == []


def inside(inner: list[float], outer: list[float]) -> bool:
    """Whether a box x, y, width, height lies in another."""
    return all(
        outer[k] <= inner[k] and inner[k] + inner[k + 2] <= outer[k] + outer[k + 2] for k in (0, 1)
    )


def apart(a: list[float], b: list[float]) -> bool:
    return any(a[k] + a[k + 2] <= b[k] or b[k] + b[k + 2] <= a[k] for k in (0, 1))


GROWN = {
    "TurnaroundRenderConditions": 476,
    "TurnaroundHumanGeometry": 646,
    "TurnaroundPreviewViews": 362,
}
"""Heights that nodes have in the page after a run: with the picture of their progress and a note."""


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_nodes_of_an_example_stand_apart_and_in_a_group(path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    groups = [group["bounding"] for group in workflow["groups"]]
    title = 30  # stands above a node's position
    boxes = {
        (node["id"], node["type"]): [
            node["pos"][0], node["pos"][1] - title, node["size"][0],
            max(node["size"][1], GROWN.get(node["type"], 0)) + title,
        ]
        for node in workflow["nodes"]
    }  # fmt: skip
    for what, box in boxes.items():
        assert any(inside(box, group) for group in groups), what
    for (a, box), (b, other) in itertools.combinations(boxes.items(), 2):
        assert apart(box, other), (a, b)
