"""The pages that readers see first: every link and picture of this repository is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "models/tiny/MODEL_CARD.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
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
    for path in (ROOT / "workflows").glob("*.json"):
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
