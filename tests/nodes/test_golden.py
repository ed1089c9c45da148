"""Node ids, inputs, widgets and outputs are those that saved graphs were made with."""

import copy
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))
import golden  # noqa: E402  (a script beside the tests' folders)

HOW = "CONTRIBUTING.md, 'What saved graphs rely on', says how to change it"


def test_nothing_that_saved_graphs_rely_on_is_lost():
    lost = golden.broken(golden.kept(), golden.signatures())
    assert not lost, f"saved graphs would break; {HOW}:\n" + "\n".join(lost)


def test_what_is_new_is_written_down():
    new = golden.added(golden.kept(), golden.signatures())
    assert not new, f"run `python dev.py golden` and commit tests/golden/nodes.json: {new}"


NODE = {
    "inputs": {
        "video": {"type": "IMAGE"},
        "steps": {"type": "INT", "default": 6, "min": 1, "max": 9},
        "mode": {"type": "COMBO", "options": ["a", "b"]},
        "mask": {"type": "MASK", "optional": True},
    },
    "outputs": [["views", "VIEWS"], ["note", "STRING"]],
}


def changed(change) -> dict:
    new = {"N": copy.deepcopy(NODE)}
    change(new["N"])
    return new


def renamed(n):
    n["inputs"] = {("clip" if k == "video" else k): v for k, v in n["inputs"].items()}


def swapped(n):
    names = ["video", "mode", "steps", "mask"]
    n["inputs"] = {k: n["inputs"][k] for k in names}


def new_first_widget(n):
    n["inputs"] = {"seed": {"type": "INT", "default": 0}, **n["inputs"]}


BREAKING = {
    "renamed": (renamed, "input 'video' is gone"),
    "places": (swapped, "its inputs changed places"),
    "widget before": (new_first_widget, "a widget stands before old ones"),
    "kind": (lambda n: n["inputs"]["video"].update(type="VIDEO"), "takes VIDEO instead of IMAGE"),
    "needed now": (lambda n: n["inputs"]["mask"].pop("optional"), "must be connected now"),
    "new and needed": (lambda n: n["inputs"].update(x={"type": "MODEL"}), "make it optional"),
    "choice": (lambda n: n["inputs"]["mode"]["options"].remove("a"), "lost the choices ['a']"),
    "shorter": (lambda n: n["inputs"]["steps"].update(max=8), "ends at 8 instead of 9"),
    "later": (lambda n: n["inputs"]["steps"].update(min=2), "begins at 2 instead of 1"),
    "outputs": (lambda n: n["outputs"].insert(0, ["x", "IMAGE"]), "its outputs changed"),
    "output": (lambda n: n["outputs"][1].__setitem__(0, "text"), "its outputs changed"),
}
HARMLESS = {
    "widget at the end": lambda n: n["inputs"].update(x={"type": "INT", "default": 1}),
    "optional socket": lambda n: n["inputs"].update(x={"type": "MODEL", "optional": True}),
    "more kinds": lambda n: n["inputs"]["video"].update(type="IMAGE,VIDEO"),
    "more choices": lambda n: n["inputs"]["mode"]["options"].append("c"),
    "wider": lambda n: n["inputs"]["steps"].update(max=10, min=0),
    "default": lambda n: n["inputs"]["steps"].update(default=7),
    "output at the end": lambda n: n["outputs"].append(["x", "IMAGE"]),
}


@pytest.mark.parametrize("case", BREAKING)
def test_a_change_that_breaks_graphs_is_named(case):
    change, words = BREAKING[case]
    lost = golden.broken({"N": NODE}, changed(change))
    assert any(words in sentence for sentence in lost), lost


@pytest.mark.parametrize("case", HARMLESS)
def test_a_harmless_change_only_wants_to_be_written_down(case):
    new = changed(HARMLESS[case])
    assert golden.broken({"N": NODE}, new) == [] and golden.added({"N": NODE}, new) == ["N"]


def test_a_node_that_is_gone_is_named():
    assert golden.broken({"N": NODE}, {}) == ["N: the node is gone"]


def test_choices_that_are_files_of_this_machine_are_not_written_down():
    told = golden._input((["a.safetensors", "b.pt"], {"default": "b.pt"}), False)
    assert told == {"type": "COMBO"}
    assert golden._input((["(no subject found)"], {}), False) == {"type": "COMBO"}


def test_the_file_is_as_the_command_writes_it():
    assert golden.written(golden.kept()) == golden.FILE.read_text(encoding="utf-8")
