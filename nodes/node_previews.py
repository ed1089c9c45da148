"""Small pictures of views for the page's player: on Preview Views and on every node with views."""

import json
import logging
import sys
from pathlib import Path

import comfy.model_management as mm
import folder_paths
from comfy_api.latest import io

from ..models.views import Views
from ..models.views_stream import ALONE, NODE, Size, Stream, keep_below, write_streams
from .sockets import VIEWS

log = logging.getLogger("turnaround")

OUTPUT = "turnaround_views"
"""What the page finds in a node's ui: a list, one item for each output of views."""
FOLDER = "turnaround_views"
"""Below ComfyUI's temp folder."""
SUFFIX = ".turnviews"
KEPT = 2 * 10**9
"""Bytes of all players' files; the oldest go, as ComfyUI empties its temp folder only at start."""
SETTING = "Turnaround.ViewsOnNodes"
OFF = "off"


def stored(views: Views, name: str, slot: int, size: Size = NODE, alone: bool = False) -> dict:
    """Write what the page shows of some views; the item of the node's ui.

    `alone`: also every view by itself, at its own size.
    """
    folder, stem, counter, subfolder, _ = folder_paths.get_save_image_path(
        f"{FOLDER}/views", folder_paths.get_temp_directory()
    )
    files = [f"{stem}_{counter:05}_{SUFFIX}", f"{stem}_{counter:05}_alone{SUFFIX}"]
    paths = [Path(folder) / file for file in files]
    streams = write_streams(views, paths[0], paths[1] if alone else None, size, ALONE, _obey_cancel)
    keep_below(Path(folder), KEPT, SUFFIX)
    told = [_told(s, f, subfolder) for s, f in zip(streams, files, strict=False)]
    V, frames, _, H, W = views.frames.shape
    return {
        **told[0], "name": name, "slot": slot, "views": V, "frames": frames, "size": [W, H],
        "alone": told[1] if alone else None,
    }  # fmt: skip


def _obey_cancel(done: int, total: int) -> None:
    mm.throw_exception_if_processing_interrupted()


def _told(stream: Stream, file: str, subfolder: str) -> dict:
    return {
        "filename": file, "subfolder": subfolder, "type": "temp",
        "checksum": stream.checksum, "bytes": stream.bytes, "start": stream.start,
        "cell": list(stream.cell),
    }  # fmt: skip


def is_wanted() -> bool:
    """Whether a page is there to see nodes' views, and its settings don't say no."""
    server = sys.modules.get("server")  # importing it would start half of a server
    instance = getattr(server.PromptServer, "instance", None) if server else None
    if instance is None or instance.client_id is None:
        return False
    settings = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    try:
        return json.loads(settings.read_text(encoding="utf-8")).get(SETTING) != OFF
    except (OSError, ValueError):  # none yet, or just being written
        return True


class _ShowsViews:
    """Put before a node's class: what it gives is shown on the node, too."""

    @classmethod
    def execute(cls, **inputs: object) -> io.NodeOutput:
        output = super().execute(**inputs)
        return with_previews(cls, output) if is_wanted() else output


def with_previews(node: type[io.ComfyNode], output: io.NodeOutput) -> io.NodeOutput:
    """The same output with small pictures of its views in the ui; they never fail a node."""
    ui = output.ui if isinstance(output.ui, dict) else output.ui.as_dict() if output.ui else {}
    sockets = node.SCHEMA.outputs  # as ComfyUI has kept it: the class is locked while it runs
    items = []
    try:
        for slot, (socket, value) in enumerate(zip(sockets, output.args or (), strict=False)):
            if socket.io_type == VIEWS.io_type and isinstance(value, Views):
                items.append(stored(value, socket.display_name or "views", slot))
    except OSError as error:  # a full disk
        log.warning("Turnaround: no pictures of the views on the node: %s", error)
    if items:
        output.ui = {**ui, OUTPUT: items}
    return output


def showing_views(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node's class; with views among its outputs, one that also shows them in the page."""
    if not any(o.io_type == VIEWS.io_type for o in node.define_schema().outputs or []):
        return node
    return type(node.__name__, (_ShowsViews, node), {"__module__": node.__module__})
