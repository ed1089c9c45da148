"""The table of checkpoints: sound in itself, and the same wherever it is shown."""

import json
import re
import sys
from pathlib import Path

import pytest
from turnaround.models.checkpoints import BY_HAND, ROUTES, gigabytes, route

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import golden  # noqa: E402  (a script beside the tests' folders)

FILES = {c for r in ROUTES for c in r.checkpoints}


def test_only_safetensors_are_fetched():
    assert all(c.fetchable for c in FILES)
    assert not any(c.fetchable for r in BY_HAND for c in r.checkpoints)


@pytest.mark.parametrize("checkpoint", sorted(FILES, key=str), ids=lambda c: c.file)
def test_a_row_can_be_used(checkpoint):
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint.repository)
    # Nothing may lead out of the folder.
    assert re.fullmatch(r"[\w][\w.-]*\.safetensors", checkpoint.file)
    assert re.fullmatch(r"[\w/]*", checkpoint.place) and re.fullmatch(r"\w+", checkpoint.folder)
    assert 1e8 < checkpoint.size < 5e10 and checkpoint.licence
    assert re.fullmatch(r"([0-9a-f]{64})?", checkpoint.sha256)


def test_names_are_said_once():
    assert len({r.name for r in ROUTES}) == len(ROUTES)
    assert len({c.file for c in FILES}) == len(FILES)


def test_workflows_ask_for_the_same_files():
    """What the page offers to download is in the table, at the same address, in the same folder."""
    known = {(c.file, c.folder, c.page.replace("/blob/", "/resolve/")) for c in FILES}
    asked = set()
    for path in (ROOT / "workflows").glob("*.json"):
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            for model in node["properties"].get("models", []):
                asked.add((model["name"], model["directory"], model["url"]))
    assert asked and asked <= known


def test_annotators_are_the_pack_s_own():
    from turnaround.models.annotators import ANNOTATORS, REPOSITORY

    told = {(c.repository, c.file) for r in BY_HAND for c in r.checkpoints}
    assert told == {(REPOSITORY, a.file) for a in ANNOTATORS}


@pytest.mark.parametrize("name", golden.TABLES)
def test_pages_show_the_checkpoints(name):
    """`python dev.py golden` writes them into the pages."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert golden.with_tables(name) == text
    for each in (*ROUTES, *BY_HAND):
        assert each.name in text and all(
            c.page in text and c.folder in text for c in each.checkpoints
        )


def test_sizes_are_for_people():
    assert gigabytes(6_735_906_897) == "6.74 GB" and gigabytes(253_815_318) == "254 MB"


def test_an_unknown_name_is_one_sentence():
    with pytest.raises(ValueError, match="no 'Wan 9' to get: choose one of 'Wan 2.1 VACE 1.3B'"):
        route("Wan 9")
