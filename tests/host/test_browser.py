"""The example workflows as a creator meets them: template browser, Run, result on screen."""

import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
FLAGSHIP = WORKFLOWS[0]
OUTSIDE = ("Failed to load resource", "Error fetching file size")
"""Without a network the page misses its own news, and sizes of files that a workflow offers."""


@pytest.fixture(scope="module")
def page(open_page):
    page = open_page()
    yield page
    page.close()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflow_opens_from_the_templates(page, open_template, path):
    page.problems.clear()
    open_template(page, path)
    page.wait_for_timeout(500)
    page.keyboard.press("Escape")  # what there is to download
    assert [p for p in page.problems if not p.startswith(OUTSIDE)] == []


def test_template_runs_by_clicking(page, server, open_template, tmp_path):
    before = set(server.get("/history"))
    open_template(page, FLAGSHIP)
    page.get_by_role("button", name="Run", exact=True).first.click()
    entry = _wait_for_new_history(page, server, before)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    page.wait_for_function(
        "() => window.app.graph.nodes.some(n => n.type === 'TurnaroundSaveViews'"
        " && window.app.nodeOutputs?.[n.id]?.images?.length)",
        timeout=30_000,
    )
    _show_results(page)
    page.screenshot(path=tmp_path / "result.png")
    ours = [p for p in page.problems if "/extensions/ComfyUI-Turnaround" in p]
    assert not ours


def _wait_for_new_history(page, server, before: set) -> dict:
    stop = time.monotonic() + 900
    while time.monotonic() < stop:
        fresh = set(server.get("/history")) - before
        if fresh:
            return server.get("/history")[fresh.pop()]
        page.wait_for_timeout(1000)
    raise TimeoutError("the workflow did not finish in the browser")


def _show_results(page) -> None:
    """Bring the result nodes into the picture, for whoever looks at the screenshot."""
    page.evaluate(
        "() => { const c = window.app.canvas; c.ds.scale = 0.62;"
        " c.ds.offset[0] = -1620; c.ds.offset[1] = 160; c.setDirty(true, true); }"
    )
    page.wait_for_timeout(3000)
