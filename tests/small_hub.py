"""A small Hugging Face hub on this machine: what a client sees of the real one when it asks for a
file, and the troubles of real networks, for tests of downloads.

`HEAD|GET /<repository>/resolve/<revision>/<path>` tells X-Repo-Commit, X-Linked-Etag (the SHA-256) and
X-Linked-Size and leads on to another server, as the hub does for large files; that one serves bytes
and understands Range.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIECE = 2**16


@dataclass
class Hub:
    """What the servers have and how they misbehave."""

    files: dict[str, bytes] = field(default_factory=dict)
    """By `repository/path`."""
    url: str = ""
    store: str = ""
    breaks_after: list[int] = field(default_factory=list)
    """Bytes after which the connection is cut, one entry an answer that carries bytes."""
    stalls: threading.Event = field(default_factory=threading.Event)
    """While set, an answer stops after its first piece and waits."""
    knows_range: bool = True
    status: int = 0
    """Of every answer, instead of the file."""
    hides_checksum: bool = False
    instead: bytes | None = None
    """What is sent instead of the file's bytes."""
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and Range (or Authorization, if any came) of every request."""


def _handler(hub: Hub, stores: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            told = self.headers.get("Authorization") or self.headers.get("Range", "")
            hub.asked.append((self.command, self.path, told))
            if hub.status:
                self._plain(hub.status)
            elif stores:
                self._bytes(hub.files[self.path[1:]])
            else:
                self._redirect()

        def _plain(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _redirect(self) -> None:
            repository, _, rest = self.path[1:].partition("/resolve/")
            name = f"{repository}/{rest.partition('/')[2]}"
            if name not in hub.files:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = hub.files[name]
            self.send_response(302)
            self.send_header("Location", f"{hub.store}/{name}")
            self.send_header("X-Repo-Commit", COMMIT)
            if not hub.hides_checksum:
                self.send_header("X-Linked-Etag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Linked-Size", str(len(body)))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _bytes(self, body: bytes) -> None:
            body = body if hub.instead is None else hub.instead
            start = 0
            if hub.knows_range and "Range" in self.headers:
                start = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0])
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            rest = body[start:]
            if hub.breaks_after:
                self.wfile.write(rest[: hub.breaks_after.pop(0)])
                self.wfile.flush()
                self.close_connection = True
                return
            for begin in range(0, len(rest), PIECE):
                self.wfile.write(rest[begin : begin + PIECE])
                while hub.stalls.is_set():
                    time.sleep(0.05)

    return Handler


@contextmanager
def running() -> Iterator[Hub]:
    """Both servers, on ports of their own, until the end."""
    hub, servers = Hub(), []
    for stores in (False, True):
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub, stores))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
    hub.url, hub.store = (f"http://127.0.0.1:{s.server_address[1]}" for s in servers)
    try:
        yield hub
    finally:
        hub.stalls.clear()
        for server in servers:
            server.shutdown()
            server.server_close()


def place(monkeypatch, url: str) -> None:
    """Let huggingface_hub speak to `url`, as HF_ENDPOINT does when the library is imported."""
    from huggingface_hub import constants, file_download

    values = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
    }
    for module in (constants, file_download):  # older versions copied them
        for name, value in values.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
