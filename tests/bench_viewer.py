"""What the 4D view costs in a browser: `.venv/bin/python tests/bench_viewer.py [--peers FOLDER]`.

The peers Spark (@sparkjsdev/spark, with three and fflate) and GaussianSplats3D
(@mkkellogg/gaussian-splats-3d) are npm packages: unpack them side by side into a folder as spark, three,
fflate and gaussian-splats-3d. Without it, they are left out with a line.

Method
- A page with nothing but the renderer, in headless Chromium, which draws by a processor here
  (SwiftShader): 512 x 512 pixels, no adapting to a slow machine. The same Gaussians for all: a dancing
  performer's surface, the first frame as PLY for the peers, opacities and colours as they are; the same
  camera, which turns by 1.5 degrees a picture. Contenders take turns in one run, medians count.
- "draw" waits for every picture's pixels: what a picture costs, all threads together, on this
  machine. "script" is Chromium's own count of the page's JavaScript a picture while pictures are not
  waited for, which hardly depends on the graphics card; "pictures/s" are drawn meanwhile.
- "sort" is what our worker does for a picture that lies between two kept frames (of the peers it isn't
  known); "uploaded" the bytes handed to WebGL a picture, as far as they are handed as arrays. "area" is
  what the quads of a picture cover together, in pictures (overdraw), by the pack's own formula.
- "playing" also goes on in time by half a kept frame a picture, which peers can't.
- "like ours" is the PSNR between a peer's picture and ours, over the performer: all draw the same.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from bench_geometry import load_pack, machine
from bench_page import SCRIPTS, Costs, browser_page, serve
from dancing_avatar import dancing_avatar

COUNTS = (20_000, 100_000)
SIZE = 512
FRAMES = 6
PICTURES = 6
"""Of a round, each."""
ROUNDS = 3
DISTANCE, FOV, ELEVATION = 3.0, 35.0, 5.0
COUNT_BYTES = """
window.uploaded = 0;
const counted = (name) => {
  const whole = WebGL2RenderingContext.prototype[name];
  WebGL2RenderingContext.prototype[name] = function (...given) {
    for (const each of given) if (ArrayBuffer.isView(each)) window.uploaded += each.byteLength;
    return whole.apply(this, given);
  };
};
['bufferData', 'bufferSubData', 'texImage2D', 'texSubImage2D', 'texSubImage3D', 'texImage3D'].forEach(counted);"""
PAGE = """<!doctype html><meta charset=utf-8><style>body { margin: 0 } canvas { display: block }</style>
<script type=importmap>{"imports": {"three": "/peers/three/build/three.module.js",
  "three/addons/": "/peers/three/examples/jsm/",
  "@sparkjsdev/spark": "/peers/spark/dist/spark.module.js", "fflate": "/peers/fflate/esm/browser.js"}}</script>
<canvas width=SIZE height=SIZE></canvas>
<script type=module>
import { makeContender } from '/CONTENDER.js';
window.contender = await makeContender(document.querySelector('canvas'), 'N', SIZE);
window.isReady = true;
</script>"""
OURS = """
import { eyeOf, lookFrom } from '/js/pack/avatar_look.js';
import { SplatScene } from '/js/pack/splat_scene.js';
import { DepthOrder } from '/js/pack/splat_order.js';
import { SplatSorting } from '/js/pack/splat_sorting.js';
import { MAGIC, kept, readStream } from '/js/pack/splat_stream.js';
import { openStoredFile } from '/js/pack/stored_file.js';
export async function makeContender(canvas, name, size) {
  const began = performance.now();
  const { header, take } = await openStoredFile({ filename: name + '.turnsplat' }, MAGIC);
  const frames = [];
  const toward = (eye) => eye.axes[2].map((v, i) => v * header.size[i]);
  const eyeAt = (azimuth) => eyeOf(lookFrom([azimuth, ELEVATION, DISTANCE, FOV, 0, 0, 0]), 1, 1);
  let scene, sorting;
  await readStream(header, take, (still) => {
    scene = new SplatScene(canvas, header);
    scene.setStill(still);
    sorting = new SplatSorting(header.count, (order) => scene.setOrder(order), () => {});
  }, (f, frame) => { frames[f] = frame; sorting.addFrame(f, new Uint16Array(frame.texels.buffer)); });
  const loaded = performance.now() - began;
  return { loaded, gl: scene.gl, draw(azimuth, time) {
    const eye = eyeAt(azimuth);
    const moment = kept(header.times, time, frames.length);
    sorting.ask(moment, toward(eye));
    if (sorting.held) scene.draw(frames, moment, eye, { inner: [0, 0, 0], outer: [0, 0, 0], cell: 0 });
  }, sort(azimuth) { // what the worker does
    const order = new DepthOrder(header.count), given = new Uint32Array(header.count);
    for (const f of [0, 1]) {
      const words = new Uint16Array(frames[f].texels.buffer);
      order.setFrame(f, Uint16Array.from({ length: 3 * header.count }, (_, i) => words[8 * Math.floor(i / 3) + (i % 3)]));
    }
    const times = Array.from({ length: 5 }, (_, i) => {
      const began = performance.now();
      order.sort(0, 1, 0.5, toward(eyeAt(azimuth + i)), given);
      return performance.now() - began;
    });
    return times.sort((a, b) => a - b)[2];
  } };
}"""
PEER_CAMERA = """
import * as THREE from 'three';
// The pack's world has y down and z forward; three.js's y up and z backward.
export function lookAt(camera, azimuth, elevation = ELEVATION, distance = DISTANCE) {
  const [a, e] = [azimuth, elevation].map((v) => v * Math.PI / 180);
  camera.position.set(distance * Math.sin(a) * Math.cos(e), distance * Math.sin(e), distance * Math.cos(a) * Math.cos(e));
  camera.lookAt(0, 0, 0);
  camera.updateMatrixWorld();
}
export function makeRenderer(canvas, size) {
  const renderer = new THREE.WebGLRenderer({ canvas, antialias: false });
  renderer.setPixelRatio(1);
  renderer.setSize(size, size, false);
  return [renderer, new THREE.PerspectiveCamera(FOV, 1, 0.05, 50)];
}"""
SPARK = """
import * as THREE from 'three';
import { SparkRenderer, SplatMesh } from '@sparkjsdev/spark';
import { lookAt, makeRenderer } from '/peer_camera.js';
export async function makeContender(canvas, name, size) {
  const [renderer, camera] = makeRenderer(canvas, size);
  const scene = new THREE.Scene();
  scene.add(new SparkRenderer({ renderer }));
  const began = performance.now();
  const mesh = new SplatMesh({ url: '/files/' + name + '.ply' });
  scene.add(mesh);
  await mesh.initialized;
  return { loaded: performance.now() - began, gl: renderer.getContext(), draw(azimuth) {
    lookAt(camera, azimuth);
    renderer.render(scene, camera);
  } };
}"""
GS3D = """
import * as THREE from 'three';
import * as GS3D from '/peers/gaussian-splats-3d/build/gaussian-splats-3d.module.js';
import { lookAt, makeRenderer } from '/peer_camera.js';
export async function makeContender(canvas, name, size) {
  const [renderer, camera] = makeRenderer(canvas, size);
  const viewer = new GS3D.Viewer({ selfDrivenMode: false, renderer, camera, useBuiltInControls: false,
    sharedMemoryForWorkers: false, gpuAcceleratedSort: false, sceneRevealMode: GS3D.SceneRevealMode.Instant,
    logLevel: GS3D.LogLevel.None });
  const began = performance.now();
  await viewer.addSplatScene('/files/' + name + '.ply', { showLoadingUI: false, splatAlphaRemovalThreshold: 1 });
  return { loaded: performance.now() - began, gl: renderer.getContext(), draw(azimuth) {
    lookAt(camera, azimuth);
    viewer.update();
    viewer.render();
  } };
}"""
CONTENDERS = {"ours": OURS, "Spark": SPARK, "GaussianSplats3D": GS3D}
FOLDERS = {
    "Spark": ("spark", "three", "fflate"),
    "GaussianSplats3D": ("gaussian-splats-3d", "three"),
}
DRAW = """async ([count, first, speed, isWaiting]) => {
  const { contender } = window, { gl } = contender, times = [], pixel = new Uint8Array(4);
  window.uploaded = 0;
  for (let i = 0; i < count; i++) {
    await new Promise(requestAnimationFrame);
    const began = performance.now();
    contender.draw(1.5 * (first + i), (speed * i) % LAST);
    if (isWaiting) gl.readPixels(0, 0, 1, 1, gl.RGBA, gl.UNSIGNED_BYTE, pixel);
    times.push(performance.now() - began);
  }
  return { times, uploaded: window.uploaded / count, sort: contender.sort?.(1.5 * first) };
}""".replace("LAST", str(FRAMES - 1))
SNAPSHOT = """async (azimuth) => {
  const { contender } = window, canvas = document.querySelector('canvas');
  for (let i = 0; i < 6; i++) { // until the order of this view has come
    contender.draw(azimuth, 0);
    await new Promise((done) => setTimeout(done, 150));
  }
  contender.draw(azimuth, 0);
  return canvas.toDataURL('image/png').split(',')[1];
}"""


@dataclass
class Row:
    """Medians are taken of these, milliseconds; one entry a picture or a round."""

    draw: list[float] = field(default_factory=list)
    sort: list[float] = field(default_factory=list)
    script: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    uploaded: float = 0.0
    like: float = math.inf


def written(script: str) -> str:
    """A script with the camera's numbers in it."""
    for name, value in (("ELEVATION", ELEVATION), ("DISTANCE", DISTANCE), ("FOV", FOV)):
        script = script.replace(name, str(value))
    return script


def area(splats) -> float:  # Splats
    """What the quads of js/splat_scene.js cover in front, in pictures."""
    from turnaround.models.looks import Look
    from turnaround.models.rasterize_splats import PIXEL_LOW_PASS, Lens, projected

    rig = Look(0.0, ELEVATION, DISTANCE, FOV, (0.0, 0.0, 0.0)).rig(SIZE, SIZE)
    focal, middle = float(rig.K[0, 0, 0]), float(rig.K[0, 0, 2])
    lens = Lens((focal, focal), (middle, middle), (SIZE, SIZE))
    conics = projected(splats, lens, rig.T_camera_world[0], PIXEL_LOW_PASS).conics
    determinants = conics[:, 0] * conics[:, 2] - conics[:, 1] ** 2
    spread = 2 * (255 * splats.opacities.sigmoid()).clamp(min=1).log()  # squared
    return float((4 * spread / determinants.sqrt()).sum() / SIZE**2)


def write_files(folder: Path) -> dict[int, float]:
    """What a node would leave, and the peers' PLY; gives the areas of the quads."""
    from turnaround.models.cloud_file import AXES
    from turnaround.models.splat_files import write_ply
    from turnaround.models.splat_stream import write_splat_stream

    areas = {}
    for count in COUNTS:
        avatar = dancing_avatar(count, FRAMES)
        write_splat_stream(folder / f"{count}.turnsplat", avatar)
        write_ply(folder / f"{count}.ply", avatar.at(0), axes=AXES[0])
        areas[count] = area(avatar.at(0))
    return areas


def picture(page) -> np.ndarray:  # [H, W, 3] float
    import base64

    from PIL import Image

    png = base64.b64decode(page.evaluate(SNAPSHOT, 30.0))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(float)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    there = np.maximum(a, b).max(-1) > 5
    return float(10 * np.log10(255**2 / np.mean((a - b)[there] ** 2)))


def measure(page, costs: Costs, row: Row, turn: int, speed: float) -> None:
    first = turn * PICTURES
    row.draw += page.evaluate(DRAW, [PICTURES, first, speed, True])["times"]
    before = costs.read()
    told = page.evaluate(DRAW, [PICTURES, first, speed, False])
    spent = costs.read() - before
    row.sort += [told["sort"]] if told["sort"] is not None else []
    row.script.append(1000 * spent.script / PICTURES)
    row.rate.append(PICTURES / spent.clock)
    row.uploaded = told["uploaded"]


def compare(browser, url: str, count: int, names: list[str]) -> dict[str, Row]:
    rows, pages = {}, {}
    for name in names:
        page = browser_page(browser, f"{url}/{name}-{count}.html", COUNT_BYTES, (SIZE, SIZE))
        page.wait_for_function("() => window.isReady", timeout=45_000)
        pages[name] = page, Costs(page), picture(page)
    for name, (_, _, shown) in pages.items():
        rows[name] = Row(like=psnr(shown, pages["ours"][2]) if name != "ours" else math.inf)
    rows["ours, playing"] = Row()
    for turn in range(ROUNDS):
        for name, (page, costs, _) in pages.items():
            page.bring_to_front()
            measure(page, costs, rows[name], turn, 0.0)
            if name == "ours":
                measure(page, costs, rows["ours, playing"], turn, 0.5)
    for page, _, shown in pages.values():
        assert shown.max() > 100, "a contender drew nothing"
        page.close()
    return rows


def table(rows: dict[str, Row], covered: float) -> str:
    head = "draw ms | script ms | sort ms | uploaded kB | pictures/s | like ours dB | area"
    lines = [f"| | {head} |", "|" + "---|" * 8]
    for name, row in rows.items():
        timed = [
            f"{statistics.median(v):.1f}" if v else "–" for v in (row.draw, row.script, row.sort)
        ]
        like = "–" if math.isinf(row.like) else f"{row.like:.1f}"
        rate = f"{statistics.median(row.rate):.1f}"
        cells = [*timed, f"{row.uploaded / 1e3:.0f}", rate, like]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {f'{covered:.1f}' if name.startswith('ours') else '–'} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, help="a folder of unpacked npm packages")
    chosen = parser.parse_args()
    names = ["ours"]
    for name, folders in FOLDERS.items():
        if chosen.peers and all((chosen.peers / folder).is_dir() for folder in folders):
            names.append(name)
        else:
            print(
                f"{name}: left out, as {' and '.join(folders)} are not in a folder given as --peers"
            )
    load_pack()
    print(f"{machine(torch.device('cpu'))}; {SIZE}x{SIZE}, {ROUNDS} rounds of {PICTURES} pictures")
    with tempfile.TemporaryDirectory() as folder:
        areas = write_files(Path(folder))
        scripts = {"/peer_camera.js": PEER_CAMERA} | {f"/{n}.js": CONTENDERS[n] for n in names}
        pages = {path: written(script) for path, script in scripts.items()}
        for name in names:
            for count in COUNTS:
                page = (
                    PAGE.replace("CONTENDER", name)
                    .replace("'N'", f"'{count}'")
                    .replace("SIZE", str(SIZE))
                )
                pages[f"/{name}-{count}.html"] = page
        roots = {"/files/": Path(folder), "/js/pack/": SCRIPTS}
        if chosen.peers:
            roots["/peers/"] = chosen.peers
        with serve(pages, roots) as (url, browser):
            for count in COUNTS:
                print(
                    f"\n{count:,} Gaussians\n\n{table(compare(browser, url, count, names), areas[count])}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
