"""Everything that a node shows is there in English and in Chinese."""

import json
import re
import sys
from pathlib import Path

import pytest
from turnaround.nodes import NODES

sys.path.append(str(Path(__file__).resolve().parents[1]))
import golden  # noqa: E402  (a script beside the tests' folders)

HAN = re.compile(r"[\u4e00-\u9fff]")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
QUOTED = re.compile(r"(?<!\w)'([^']+)'(?!\w)")
FOLDER = golden.CHINESE.parent


@pytest.fixture(scope="module")
def words():
    return json.loads(golden.WORDS.read_text(encoding="utf-8"))


def test_the_words_are_those_of_the_nodes(words):
    """`python dev.py golden` adds new ones, empty, and takes unused ones away."""
    assert list(words) == golden.english()


def test_every_word_is_translated(words):
    missing = [word for word, chinese in words.items() if not chinese]
    assert not missing, f"write them into {golden.WORDS.name}, then run `python dev.py golden`"


def test_what_the_page_gets_is_built_from_the_words(words):
    assert golden.CHINESE.read_text(encoding="utf-8") == golden.as_json(golden.chinese(words))
    assert golden.ENGLISH.read_text(encoding="utf-8") == golden.as_json(golden.in_english())


def test_both_languages_name_the_same_sockets():
    """But for the few English words with braces, which the page takes from the node itself."""
    english, chinese = (
        json.loads(file.read_text(encoding="utf-8")) for file in (golden.ENGLISH, golden.CHINESE)
    )

    def words(told: dict) -> set:
        sides = [(side, told.get(side, {})) for side in ("inputs", "outputs")]
        return {k for k in told if isinstance(told[k], str)} | {
            (side, name) for side, sockets in sides for name in sockets
        }

    assert english.keys() == chinese.keys() == {n.GET_SCHEMA().node_id for n in NODES}
    for node, told in chinese.items():
        assert words(english[node]) <= words(told), node
    missing = sum(len(words(told) - words(english[node])) for node, told in chinese.items())
    assert missing == sum(bool(golden.SYNTAX.search(word)) for word in golden.english())


@pytest.mark.parametrize("node", NODES, ids=lambda n: n.GET_SCHEMA().node_id)
def test_nothing_is_lost_in_translation(node, words):
    """Chinese, with the same numbers, and with the names that stand on the node in Latin letters."""

    def check(word: str) -> str:
        chinese = words[word]
        if chinese:
            assert HAN.search(chinese), word
            assert not golden.SYNTAX.search(chinese), word
            assert sorted(NUMBER.findall(word)) == sorted(NUMBER.findall(chinese)), word
            assert set(QUOTED.findall(word)) == set(QUOTED.findall(chinese)), word
            assert not re.search(f"(?<={HAN.pattern})[,;:?!]|[,;:?!](?={HAN.pattern})", chinese), (
                word
            )
        return chinese

    golden.shown(node, check)


def test_every_place_in_the_menu_is_translated():
    categories = json.loads((FOLDER / "main.json").read_text(encoding="utf-8"))["nodeCategories"]
    used = {part for n in NODES for part in n.GET_SCHEMA().category.split("/")}
    assert used - {"Turnaround"} == set(categories)
    assert all(HAN.search(name) for name in categories.values())
    for name, chinese in categories.items():
        assert name.split()[0] == chinese.split()[0]  # the number that sorts it


def test_words_not_translated_yet_stay_english_in_the_page():
    assert golden.shown(NODES[0], lambda word: "") == {}
