"""The example workflow as a creator meets it: template browser, Run, result on screen."""

import contextlib
import json
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGSHIP = ROOT / "workflows" / "01_performer_turnaround.json"


@pytest.fixture(scope="module")
def page(open_page):
    page = open_page()
    yield page
    page.close()


def test_template_runs_by_clicking(page, server, tmp_path):
    before = set(server.get("/history"))
    _open_templates(page)
    page.get_by_text("ComfyUI-Turnaround").first.click()
    page.get_by_text("performer turnaround", exact=False).first.click()
    wanted = len(json.loads(FLAGSHIP.read_text())["nodes"])
    page.wait_for_function(f"() => window.app.graph.nodes.length === {wanted}", timeout=30_000)
    # A node whose type ComfyUI doesn't know has no constructor of its own.
    assert page.evaluate("() => window.app.graph.nodes.every(n => !n.has_errors)")
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


def _open_templates(page) -> None:
    """The page opens its template browser by itself for a new user; then it covers the button."""
    from playwright.sync_api import TimeoutError as Covered

    with contextlib.suppress(Covered):
        page.locator(".templates-tab-button").click(timeout=5000)


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
