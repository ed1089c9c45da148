"""The pack in ComfyUI's newest page and its newer node renderer, on the oldest server it runs on."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
from blueprint_chain import join_blueprints

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


@pytest.fixture(scope="module")
def host(dev, tmp_path_factory):
    tree = os.environ.get("COMFYUI_DIR")
    if not tree or not dev.venv_python().exists():
        pytest.skip("no ComfyUI here: run the tests through `python dev.py test`")
    static = dev.ensure_newest_page()
    if static is None:
        pytest.skip("ComfyUI's newest page can't be fetched")
    base = tmp_path_factory.mktemp("newest")
    for folder in ("custom_nodes", "models", "input", "output", "temp", "user/default"):
        (base / folder).mkdir(parents=True)
    settings = {
        "Comfy.TutorialCompleted": True,
        "Comfy.VueNodes.Enabled": True,
        "Comfy.Locale": "zh",
    }
    (base / "user" / "default" / "comfy.settings.json").write_text(json.dumps(settings))
    (base / "custom_nodes" / dev.PACK_FOLDER).symlink_to(ROOT, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dev, "workspace", lambda: base)
        with dev.running_host(Path(tree), extra=("--front-end-root", str(static))) as host:
            yield host


@pytest.fixture(scope="module")
def page(host):
    spec = importlib.util.spec_from_file_location(
        "conftest_host", Path(__file__).with_name("conftest.py")
    )
    shared = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shared)
    found = (shutil.which(name) for name in shared.BROWSERS)
    executable = next((path for path in found if path), None)
    if executable is None:
        pytest.skip("no Chromium on this machine: the browser tests are left out")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=shared.ARGUMENTS)
        page = browser.new_page(viewport={"width": 1500, "height": 900})
        page.problems = []
        page.on("console", lambda m: page.problems.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: page.problems.append(str(e.stack or e)))
        page.goto(host.url, wait_until="load", timeout=60_000)
        page.wait_for_function("() => window.app?.graph && window.app.canvas", timeout=60_000)
        yield page
        browser.close()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflow_opens_from_the_templates_with_all_its_values(page, open_template, path):
    page.problems.clear()
    open_template(page, path)
    page.wait_for_timeout(500)
    assert [p for p in page.problems if "Turnaround" in p] == []


def test_blueprints_join_to_a_chain(page):
    page.problems.clear()
    join_blueprints(page)
    assert [p for p in page.problems if "Turnaround" in p] == []


def test_nodes_and_menu_are_in_chinese(page):
    made = page.evaluate(
        "() => { const n = LiteGraph.createNode('TurnaroundOrbitRig');"
        " return [n.title, n.constructor.category]; }"
    )
    assert made == ["环绕相机阵列", "Turnaround/3 相机"]


def test_a_calibration_is_uploaded_by_a_click(page):
    page.evaluate("() => { app.graph.clear(); }")
    page.evaluate(
        "() => { const n = LiteGraph.createNode('TurnaroundRigFromFile');"
        " n.pos = [300, 200]; app.graph.add(n); app.canvas.ds.scale = 1; app.canvas.ds.offset = [0, 0]; }"
    )
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="选择文件上传").click()
    file = {"name": "cameras.json", "mimeType": "application/json", "buffer": b"[]"}
    chooser.value.set_files(file)
    page.wait_for_function(
        "() => app.graph.nodes[0].widgets.find(w => w.name === 'file').value === 'cameras.json'",
        timeout=10_000,
    )
    # The node shows it, and so does its list.
    page.locator("[data-node-id]").get_by_text("cameras.json").first.wait_for(timeout=5_000)
    assert page.evaluate("() => app.graph.serialize().nodes[0].widgets_values") == [
        "cameras.json",
        True,
    ]
