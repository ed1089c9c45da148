"""What saved graphs and readers rely on, written down: `python dev.py golden` writes it anew.

- tests/golden/nodes.json: every node's id, inputs, widgets and outputs, as a running ComfyUI tells
  them. A change that would break saved graphs is refused, unless asked for with --break.
- the tables of models/checkpoints.py in README.md and in the help page of Get Models.
- locales/en/nodeDefs.json and locales/zh/nodeDefs.json, what the page shows in English and Chinese:
  the nodes' own words, and each looked up in locales/words_zh.json. New words are added there with
  nothing behind them, unused ones go.

Differences are told in sentences by `broken` and `added`; tests/nodes/test_golden.py asks them.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = Path(__file__).resolve().parent / "golden" / "nodes.json"
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
KEPT = ("default", "min", "max", "options")
FROM_DISK = re.compile(r"\.[a-z]\w{1,10}$|^\(")
"""Choices that are files (or say that there are none) differ from machine to machine."""
WORDS = ROOT / "locales" / "words_zh.json"
CHINESE = ROOT / "locales" / "zh" / "nodeDefs.json"
ENGLISH = ROOT / "locales" / "en" / "nodeDefs.json"
SYNTAX = re.compile(r"[{}|@]")
"""What some pages read as a place to fill in, a choice or a link, and don't show."""
TABLES = {"README.md": "table", "js/docs/TurnaroundGetModels.md": "listing"}
"""Pages that show the checkpoints, and as what; the panel of help pages is narrow."""


def signature(node: type) -> dict:
    """Inputs by name in the page's order, and outputs, of one node class."""
    info = node.GET_NODE_INFO_V1()
    told = info["input"]
    inputs = {}
    for kind in ("required", "optional"):
        for name, spec in told.get(kind, {}).items():
            inputs[name] = _input(spec, kind == "optional")
    return {
        "inputs": inputs,
        "outputs": [list(pair) for pair in zip(info["output_name"], info["output"], strict=True)],
    }


def _input(spec: tuple, optional: bool) -> dict:
    kind, settings = spec[0], dict(spec[1]) if len(spec) > 1 else {}
    if isinstance(kind, list):
        kind, settings = "COMBO", {**settings, "options": kind}
    if any(FROM_DISK.search(str(choice)) for choice in settings.get("options", [])):
        settings.pop("options")
        settings.pop("default", None)
    kept = {key: settings[key] for key in KEPT if settings.get(key) is not None}
    return {"type": kind, **({"optional": True} if optional else {}), **kept}


def signatures() -> dict[str, dict]:
    """Of all nodes, by id. A ComfyUI must be importable, as in tests/nodes."""
    from turnaround.nodes import NODES

    return {n.GET_SCHEMA().node_id: signature(n) for n in NODES}


def is_widget(told: dict) -> bool:
    return told["type"] in WIDGETS


def broken(old: dict[str, dict], new: dict[str, dict]) -> list[str]:
    """What saved graphs would lose, one sentence a change."""
    lost = [f"{node}: the node is gone" for node in old if node not in new]
    for node in old.keys() & new.keys():
        lost += [f"{node}: {what}" for what in _broken(old[node], new[node])]
    return sorted(lost)


def _broken(old: dict, new: dict) -> list[str]:
    before, after = old["inputs"], new["inputs"]
    lost = [f"input '{name}' is gone" for name in before if name not in after]
    both = [name for name in before if name in after]
    for name in both:
        lost += [f"input '{name}' {what}" for what in _narrowed(before[name], after[name])]
    if [name for name in after if name in before] != both:
        lost.append("its inputs changed places")
    widgets = [[n for n, told in side.items() if is_widget(told)] for side in (before, after)]
    if widgets[1][: len(widgets[0])] != widgets[0]:
        lost.append("a widget stands before old ones: saved values would move; new ones go last")
    lost += [
        f"input '{name}' is new and must be connected: make it optional"
        for name, told in after.items()
        if name not in before and not told.get("optional") and not is_widget(told)
    ]
    if new["outputs"][: len(old["outputs"])] != old["outputs"]:
        lost.append("its outputs changed: names, kinds and places stay, new ones go last")
    return lost


def _narrowed(before: dict, after: dict) -> list[str]:
    lost = []
    if not set(before["type"].split(",")) <= set(after["type"].split(",")):
        lost.append(f"takes {after['type']} instead of {before['type']}")
    if before.get("optional") and not after.get("optional"):
        lost.append("must be connected now")
    if gone := [c for c in before.get("options", []) if c not in after.get("options", [c])]:
        lost.append(f"lost the choices {gone}")
    if after.get("min", before.get("min", 0)) > before.get("min", after.get("min", 0)):
        lost.append(f"begins at {after['min']} instead of {before.get('min')}")
    if after.get("max", before.get("max", 0)) < before.get("max", after.get("max", 0)):
        lost.append(f"ends at {after['max']} instead of {before.get('max')}")
    return lost


def added(old: dict[str, dict], new: dict[str, dict]) -> list[str]:
    """What else differs, by node."""
    return sorted(node for node in new if old.get(node) != new[node])


def written(nodes: dict[str, dict]) -> str:
    """The file's text: one line an input, so that a change can be read."""
    lines = []
    for node in sorted(nodes):
        inputs = ",\n".join(
            f"   {json.dumps(name)}: {json.dumps(told, ensure_ascii=False)}"
            for name, told in nodes[node]["inputs"].items()
        )
        inputs = f"{{\n{inputs}\n  }}" if inputs else "{}"
        outputs = json.dumps(nodes[node]["outputs"])
        lines.append(f' {json.dumps(node)}: {{\n  "inputs": {inputs},\n  "outputs": {outputs}\n }}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def kept() -> dict[str, dict]:
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def with_tables(name: str) -> str:
    """A page of TABLES with the checkpoints between their marks."""
    from turnaround.models import checkpoints

    text = (ROOT / name).read_text(encoding="utf-8")
    shown = getattr(checkpoints, TABLES[name])
    for mark, routes in (("checkpoints", checkpoints.ROUTES), ("by hand", checkpoints.BY_HAND)):
        block = f"<!-- {mark} -->\n{shown(routes)}\n<!-- /{mark} -->"
        marks = rf"<!-- {mark} -->\n.*?<!-- /{mark} -->"
        text = re.sub(marks, lambda _, block=block: block, text, flags=re.S)
    return text


def shown(node: type, said: Callable[[str], str]) -> dict:
    """What the page shows of a node, each English word given to `said`; empty answers are left out."""
    schema = node.GET_SCHEMA()
    sockets = {
        "inputs": {i.id: {"tooltip": said(i.tooltip)} for i in schema.inputs or []},
        "outputs": {
            str(n): {"tooltip": said(o.tooltip)} for n, o in enumerate(schema.outputs or [])
        },
    }
    told = {
        side: {name: words for name, words in each.items() if words["tooltip"]}
        for side, each in sockets.items()
    }
    names = {"display_name": said(schema.display_name), "description": said(schema.description)}
    return {key: value for key, value in {**names, **told}.items() if value}


def english() -> list[str]:
    """Every word that nodes show, once, in their order."""
    from turnaround.nodes import NODES

    words: dict[str, None] = {}
    for node in NODES:
        shown(node, lambda word: words.setdefault(word) or word)
    return list(words)


def in_english() -> dict[str, dict]:
    """nodeDefs.json: what the page could misread stays out, and it shows the node's own word."""
    return _of_all_nodes(lambda word: "" if SYNTAX.search(word or "") else word)


def chinese(words: dict[str, str]) -> dict[str, dict]:
    """nodeDefs.json: what is not translated stays out, and the page shows it in English."""
    return _of_all_nodes(lambda word: words.get(word, ""))


def _of_all_nodes(said: Callable[[str], str]) -> dict[str, dict]:
    from turnaround.nodes import NODES

    told = {n.GET_SCHEMA().node_id: shown(n, said) for n in NODES}
    return {node: words for node, words in told.items() if words}


def as_json(data: dict) -> str:
    return json.dumps(data, ensure_ascii=False, indent=1) + "\n"


def write_words() -> None:
    words = json.loads(WORDS.read_text(encoding="utf-8"))
    words = {word: words.get(word, "") for word in english()}
    WORDS.write_text(as_json(words), encoding="utf-8")
    CHINESE.write_text(as_json(chinese(words)), encoding="utf-8")
    ENGLISH.parent.mkdir(exist_ok=True)
    ENGLISH.write_text(as_json(in_english()), encoding="utf-8")
    missing = [word for word in words if not words[word]]
    sys.stdout.write("".join(f"not in Chinese yet: {word}\n" for word in missing))


def main(arguments: list[str]) -> None:
    spec = importlib.util.spec_from_file_location("in_comfyui", ROOT / "tests" / "in_comfyui.py")
    in_comfyui = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(in_comfyui)
    in_comfyui.start()
    for name in TABLES:
        (ROOT / name).write_text(with_tables(name), encoding="utf-8")
    old, new = kept(), signatures()
    lost = broken(old, new)
    if lost and "--break" not in arguments:
        raise SystemExit("Saved graphs would break:\n  " + "\n  ".join(lost))
    sys.stdout.write("\n".join(added(old, new)) + f"\n{len(new)} nodes\n")
    FILE.write_text(written(new), encoding="utf-8")
    write_words()


if __name__ == "__main__":
    main(sys.argv[1:])
