"""What the player of views costs in a browser: `.venv/bin/python tests/bench_player.py`.

Method
- 8 views x 81 frames of 832x480 at 16 frames a second, moving noise with shapes, as Preview Views writes
  them (models/views_stream.py); the player in a bare page in headless Chromium, 1000 x 700 pixels, and
  once two of them compared with a wipe, and one view alone in its full size.
- It plays for some seconds. "shown" counts the frames that were drawn, of those that the clock went
  through; "main thread" and "script" are Chromium's own count of the page's busy time, per drawn
  frame. Pictures are unpacked by other threads.
- "unpacked" is the most that all pictures held by the player take at 4 bytes a pixel; "packed" what
  came over the wire and is kept. "heap" is the page's JavaScript.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from bench_geometry import load_pack, machine
from bench_page import SCRIPTS, Costs, browser_page, serve

VIEWS, FRAMES, WIDTH, HEIGHT, FPS = 8, 81, 832, 480, 16.0
PAGE_SIZE = 1000, 700
PLAYED = 8000
"""Milliseconds."""
COUNT_PICTURES = """
window.unpacked = 0; window.most = 0;
const make = window.createImageBitmap;
window.createImageBitmap = async (...given) => {
  const picture = await make(...given), bytes = 4 * picture.width * picture.height;
  const close = picture.close.bind(picture);
  picture.close = () => { window.unpacked -= bytes; close(); };
  window.unpacked += bytes;
  window.most = Math.max(window.most, window.unpacked);
  return picture;
};"""
PAGE = """<!doctype html><meta charset=utf-8><style>body { margin: 0 } #root { width: 100vw; height: 100vh;
  display: flex; flex-direction: column } .stage { position: relative; flex: 1 } canvas { position: absolute;
  width: 100%; height: 100% }</style><div id=root></div>
<script type=module>
import { ViewsPlayer } from '/js/pack/views_player.js';
const memory = {};
const player = new ViewsPlayer(document.querySelector('#root'), {
  recall: (key) => memory[key], remember: (key, value) => (memory[key] = value), title: () => 'bench' });
window.player = player;
player.show(ITEMS);
</script>"""
PLAY = """async (milliseconds) => {
  const { player } = window, root = player.root;
  player.seek(0);
  await new Promise((done) => setTimeout(done, 500));
  let shown = 0, last = null;
  const watch = new MutationObserver(() => {
    if (root.dataset.frame !== last) { last = root.dataset.frame; shown++; }
  });
  watch.observe(root, { attributes: true, attributeFilter: ['data-frame'] });
  player.play(true);
  const began = performance.now();
  await new Promise((done) => setTimeout(done, milliseconds));
  const seconds = (performance.now() - began) / 1000;
  watch.disconnect();
  player.play(false);
  return { shown, seconds };
}"""


def clip():  # -> Views
    """Bytes [V, F, 3, H, W]: soft noise that moves, as compressible as pictures of a camera."""
    from turnaround.models.views import Views

    generator = torch.Generator().manual_seed(0)
    small = torch.rand(VIEWS, 1, 3, HEIGHT // 8, WIDTH // 8, generator=generator)
    frames = torch.empty(VIEWS, FRAMES, 3, HEIGHT, WIDTH, dtype=torch.uint8)
    for v in range(VIEWS):
        large = torch.nn.functional.interpolate(small[v], (HEIGHT, WIDTH), mode="bicubic")[0]
        grain = 0.03 * torch.randn(3, HEIGHT, WIDTH, generator=generator)
        for f in range(FRAMES):
            moved = torch.roll(large, (2 * f, 5 * f), (1, 2)) + grain
            frames[v, f] = (255 * moved.clamp(0, 1)).byte()
    return Views(frames, fps=FPS)


def write_files(folder: Path) -> list[dict]:
    """A clip as Preview Views leaves it, twice: the items of its ui."""
    from turnaround.models.views_stream import write_streams

    paths = [folder / "views.turnviews", folder / "alone.turnviews"]
    sheets, alone = (
        {"filename": path.name, "subfolder": "", "type": "temp", "checksum": stream.checksum,
         "bytes": stream.bytes, "start": stream.start, "cell": list(stream.cell)}
        for path, stream in zip(paths, write_streams(clip(), *paths), strict=True)
    )  # fmt: skip
    shown = {"views": VIEWS, "frames": FRAMES, "size": [WIDTH, HEIGHT], "alone": alone}
    names = ("views", "compare")
    return [sheets | shown | {"name": name, "slot": slot} for slot, name in enumerate(names)]


def measure(browser, url: str, alone: int | None) -> list[str]:
    page = browser_page(browser, url, COUNT_PICTURES, PAGE_SIZE)
    page.wait_for_function("() => window.player?.root.dataset.state === 'ready'", timeout=60_000)
    page.evaluate("view => window.player.showAlone(view)", alone)
    costs = Costs(page)
    before = costs.read()
    told = page.evaluate(PLAY, PLAYED)
    spent = costs.read() - before
    most = page.evaluate("() => window.most")
    packed = page.evaluate(
        "() => [player.first, player.second].reduce((sum, f) => sum + (f ? f.packed.reduce((s, b) => s + b.size, 0) : 0), 0)"
    )
    heap = page.evaluate("() => performance.memory.usedJSHeapSize")
    page.close()
    return [
        f"{told['shown']} of {told['seconds'] * FPS:.0f}", f"{1000 * spent.busy / told['shown']:.1f}",
        f"{1000 * spent.script / told['shown']:.1f}", f"{most / 1e6:.0f}", f"{packed / 1e6:.1f}",
        f"{heap / 1e6:.0f}",
    ]  # fmt: skip


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    load_pack()
    with tempfile.TemporaryDirectory() as folder:
        items = write_files(Path(folder))
        pages = {
            f"/{count}.html": PAGE.replace("ITEMS", json.dumps(items[:count])) for count in (1, 2)
        }
        print(
            f"{machine(torch.device('cpu'))}; {VIEWS} views x {FRAMES} frames of {WIDTH}x{HEIGHT}\n"
        )
        head = "frames shown | main thread ms a frame | of it script ms | unpacked MB | packed MB | heap MB"
        print(f"| | {head} |\n|{'---|' * 7}")
        with serve(pages, {"/files/": Path(folder), "/js/pack/": SCRIPTS}) as (url, browser):
            for name, count, alone in (
                ("grid", 1, None),
                ("grid, wipe", 2, None),
                ("one view alone", 1, 0),
            ):
                cells = measure(browser, f"{url}/{count}.html", alone)
                print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
