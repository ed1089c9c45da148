"""Boots the real ComfyUI with the pack, and a browser, once for all tests of this folder."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
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


@pytest.fixture(scope="session")
def dev():
    return load_dev()


@pytest.fixture(scope="session")
def server(dev):
    tree = os.environ.get("COMFYUI_DIR")
    if not tree or not dev.venv_python().exists():
        pytest.skip("no ComfyUI here: run the tests through `python dev.py test`")
    with dev.running_host(Path(tree)) as host:
        yield host


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
