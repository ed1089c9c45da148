"""A small server and a headless Chromium for benchmarks of the widgets, without ComfyUI."""

from __future__ import annotations

import contextlib
import http.server
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1] / "js"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--use-gl=angle",
    "--use-angle=swiftshader", "--disable-background-networking", "--no-first-run",
]  # fmt: skip
PAGE_OF_COMFYUI = {
    "/favicon.ico": "",
    # What the scripts want of ComfyUI's page, from js/pack/ two folders up.
    "/scripts/app.js": "export const app = { registerExtension() {},"
    " ui: { settings: { getSettingValue: () => 'en' } } };",
    "/scripts/api.js": "export const api = { apiURL: (path) => path };",
}
KINDS = {".js": "text/javascript", ".html": "text/html"}


@dataclass
class Spent:
    """Seconds."""

    clock: float
    busy: float
    """Of the page's main thread, with layout and painting."""
    script: float
    """Of that, JavaScript."""

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.clock - other.clock, self.busy - other.busy, self.script - other.script)


class Costs:
    """Chromium's own count of what a page has cost so far."""

    def __init__(self, page) -> None:
        self.session = page.context.new_cdp_session(page)
        self.session.send("Performance.enable")

    def read(self) -> Spent:
        told = self.session.send("Performance.getMetrics")["metrics"]
        of = {each["name"]: each["value"] for each in told}
        return Spent(of["Timestamp"], of["TaskDuration"], of["ScriptDuration"])


def _handler(pages: dict[str, str], roots: dict[str, Path]) -> type:
    class Files(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:  # noqa: N802
            path, _, query = self.path.partition("?")
            if path == "/view":
                path = "/files/" + query.partition("filename=")[2].partition("&")[0]
            content = self.found(path)
            if content is None:
                self.send_error(404)
                return
            asked = self.headers.get("Range")
            if asked:
                first, last = (int(v) for v in asked.removeprefix("bytes=").split("-"))
                content = content[first : last + 1]
            self.send_response(206 if asked else 200)
            self.send_header(
                "Content-Type", KINDS.get(Path(path).suffix, "application/octet-stream")
            )
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # a page that is closed
                self.wfile.write(content)

        def found(self, path: str) -> bytes | None:
            if path in pages:
                return pages[path].encode()
            for start, root in roots.items():
                file = root / path.removeprefix(start)
                if path.startswith(start) and ".." not in path and file.is_file():
                    return file.read_bytes()
            return None

        def log_message(self, *_: object) -> None:
            pass

    return Files


@contextlib.contextmanager
def serve(pages: dict[str, str], roots: dict[str, Path]) -> Iterator[tuple]:
    """The server's address and a browser; `pages` are texts by path, `roots` folders by their start."""
    from playwright.sync_api import sync_playwright

    executable = next((shutil.which(b) for b in BROWSERS if shutil.which(b)), None)
    if executable is None:
        raise SystemExit("There is no Chromium on this machine.")
    handler = _handler(PAGE_OF_COMFYUI | pages, roots)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
            yield f"http://127.0.0.1:{server.server_port}", browser
            browser.close()
    finally:
        server.shutdown()


def browser_page(browser, url: str, script: str, size: tuple[int, int]):
    """A page that says on the console's behalf what went wrong in it."""
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    page.on("pageerror", lambda e: print(f"  {url}: {e}"))
    page.on("console", lambda m: print(f"  {m.text} {m.location}") if m.type == "error" else None)
    page.add_init_script(script)
    page.goto(url)
    return page
