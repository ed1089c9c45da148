"""Boots the real ComfyUI with the pack, and a browser, once for all tests of this folder."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--use-gl=angle",
    "--use-angle=swiftshader", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-quic", "--no-first-run",
]  # fmt: skip


def load_dev():
    spec = importlib.util.spec_from_file_location("turnaround_dev", ROOT / "dev.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_configure():
    # Terminated tests end like those that Ctrl+C ends: the ComfyUI that they started goes with them.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def dev():
    return load_dev()


@pytest.fixture(scope="session")
def server(dev):
    tree = os.environ.get("COMFYUI_DIR")
    if not tree or not dev.venv_python().exists():
        pytest.skip("no ComfyUI here: run the tests through `python dev.py test`")
    with dev.running_host(Path(tree)) as host:
        dev.give_real_clip(host)
        yield host


@pytest.fixture(scope="session")
def object_info(server):
    return server.get("/object_info")


@pytest.fixture(scope="module")  # its event loop must not outlive this folder's tests
def browser(server):
    executable = next((shutil.which(b) for b in BROWSERS if shutil.which(b)), None)
    if executable is None:
        pytest.skip("no Chromium on this machine: the browser tests are left out")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def open_page(browser, server):
    """Opens ComfyUI's page in a fresh profile; `page.problems` gathers what its console complains of.

    `prepare` gets the page before ComfyUI is loaded.
    """

    def open_(width: int = 1800, height: int = 1000, prepare=lambda page: None):
        page = browser.new_page(viewport={"width": width, "height": height})
        page.problems = []
        page.on(
            "console",
            lambda m: page.problems.append(f"{m.text} {m.location}") if m.type == "error" else None,
        )
        page.on("pageerror", lambda e: page.problems.append(str(e.stack or e)))
        prepare(page)
        page.goto(server.url, wait_until="load", timeout=60_000)
        page.wait_for_function("() => window.app?.graph && window.app.canvas", timeout=60_000)
        return page

    return open_


PAGE_ONLY = {"MarkdownNote", "Note", "Reroute"}
SHOWN = """() => app.graph._nodes.map(n => [String(n.id), n.type,
  n.type in LiteGraph.registered_node_types,
  Object.fromEntries((n.widgets ?? []).map(w => [w.name, w.value]))])"""
STANDS = """kinds => app.graph._nodes.length === Object.keys(kinds).length
  && app.graph._nodes.every(n => kinds[n.id] === n.type)"""


@pytest.fixture(scope="session")
def open_template(dev):
    """Opens a workflow by clicking in the template browser; every node must be known and have the
    values of the file."""
    from playwright.sync_api import TimeoutError as Covered

    def open_(page, path: Path) -> None:
        workflow = json.loads(path.read_text(encoding="utf-8"))
        nodes = {str(node["id"]): node for node in workflow["nodes"]}
        pack = page.get_by_text(dev.PACK_FOLDER).first
        if not pack.is_visible():
            # It opens by itself for a new user, a little later; then it covers this button.
            with contextlib.suppress(Covered):
                page.locator(".templates-tab-button").click(timeout=5000)
        pack.click()
        page.get_by_test_id(f"template-workflow-{path.stem}").click()
        kinds = {i: node["type"] for i, node in nodes.items()}
        page.wait_for_function(STANDS, arg=kinds, timeout=30_000)
        for i, kind, known, values in page.evaluate(SHOWN):
            assert known or kind in PAGE_ONLY, kind
            named = nodes[i]["widgets_values_named"]
            kept = {name: value for name, value in values.items() if name in named}
            assert kept == {name: named[name] for name in kept}, kind
            assert kept or not named or kind in PAGE_ONLY, kind

    return open_


@pytest.fixture(scope="session")
def fits_schema():
    """Checks that the running ComfyUI knows nodes of a file, their widgets in order, and links."""
    widget_types = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}

    def specs(kind: str, object_info: dict) -> dict:
        sockets = object_info[kind]["input"]
        return {**sockets.get("required", {}), **sockets.get("optional", {})}

    def fits(nodes: list[dict], links: list[tuple], object_info: dict) -> None:
        for node in nodes:
            assert node["widgets_values"] == list(node["widgets_values_named"].values())
            if node["type"] == "MarkdownNote":
                continue
            known = specs(node["type"], object_info)
            widgets = [
                k for k, s in known.items() if isinstance(s[0], list) or s[0] in widget_types
            ]
            named = [k for k in node["widgets_values_named"] if k != "control_after_generate"]
            assert named == widgets, node["type"]
            fetched = {model["name"] for model in node["properties"].get("models", [])}
            for name in named:
                value, options = node["widgets_values_named"][name], known[name][0]
                asleep = node.get("mode") == 2  # its file is still to be chosen
                if isinstance(options, list) and value not in fetched and not asleep:
                    assert value in options, (node["type"], name)
        by_id = {node["id"]: node for node in nodes}
        for source, slot, target, socket, kind in links:
            assert object_info[by_id[source]["type"]]["output"][slot] == kind
            entry = by_id[target]["inputs"][socket]
            spec = specs(by_id[target]["type"], object_info)[entry["name"]]
            # A socket of several types names them all.
            assert spec[0] == entry["type"] and (spec[0] == "*" or kind in spec[0].split(","))

    return fits
