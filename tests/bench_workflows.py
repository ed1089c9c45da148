"""What each example costs: `.venv/bin/python tests/bench_workflows.py [01 07 ...]`.

Method: a ComfyUI of its own for every workflow that needs no download, so that nothing is left from
the one before; the graph as it is in the file, once. "Clock" is from queueing to the end, "busy" the
processor time of ComfyUI's process and its threads meanwhile: other work on the machine delays the
one, hardly the other. "Memory" is the most that was resident at a time (VmHWM), ComfyUI and torch
included, which "empty" shows. Linux only.
"""

import argparse
import importlib.util
import json
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("turnaround_dev", ROOT / "dev.py")
dev = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dev)


def busy(pid: int) -> float:
    """Seconds of processor time so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def most_memory(pid: int) -> float:
    """GiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(x for x in status.splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def clock(entry: dict) -> float:
    """Seconds that ComfyUI itself says it took."""
    times = {kind: told["timestamp"] for kind, told in entry["status"]["messages"]}
    return (times["execution_success"] - times["execution_start"]) / 1000


def measure(tree: Path, path: Path) -> str:
    workflow = json.loads(path.read_text(encoding="utf-8"))
    with dev.running_host(tree) as host:
        dev.give_real_clip(host)
        prompt = dev.api_graph(workflow, host.get("/object_info"))
        pid = host.process.pid
        empty, before = most_memory(pid), busy(pid)
        entry = host.wait(host.queue(prompt), seconds=3600)
        if entry["status"]["status_str"] != "success":
            return f"| {path.stem} | failed: {entry['status']['messages'][-1]} | | | |"
        return (
            f"| {path.stem} | {clock(entry):.0f} s | {busy(pid) - before:.0f} s"
            f" | {most_memory(pid):.1f} GiB | {empty:.1f} GiB |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="*", help="only these, as 01 07")
    wanted = parser.parse_args().numbers
    tree = dev.ensure_host()
    print("| workflow | clock | busy | memory | empty |\n|---|---|---|---|---|", flush=True)
    for path in sorted((ROOT / "workflows").glob("*.json")):
        workflow = json.loads(path.read_text(encoding="utf-8"))
        fetched = any(node["properties"].get("models") for node in workflow["nodes"])
        if not fetched and (not wanted or path.stem[:2] in wanted):
            print(measure(tree, path), flush=True)


if __name__ == "__main__":
    main()
