"""The widgets' words: each has its Chinese (js/words_zh.js), and each of the Chinese is used."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [p for p in sorted((ROOT / "js").glob("*.js")) if p.stem not in ("words", "words_zh")]
SAID = re.compile(r'\bt\(\s*("(?:[^"\\]|\\.)*")?')
TABLE = re.compile(r"export const ZH = (\{.*\});", re.DOTALL)
HELD = re.compile(r"\{(\w+)\}")
QUOTED = re.compile(r"'([a-z_]+)'")


def said() -> dict[str, str]:
    """Every word that a script says in English, and which script."""
    found = {}
    for path in SCRIPTS:
        for literal in SAID.findall(path.read_text(encoding="utf-8")):
            assert literal, f"{path.name}: a word must be written out where it is said"
            found[json.loads(literal)] = path.name
    return found


@pytest.fixture(scope="module")
def chinese() -> dict[str, str]:
    text = (ROOT / "js" / "words_zh.js").read_text(encoding="utf-8")
    return json.loads(TABLE.search(text)[1])


def test_every_word_has_its_chinese_and_none_is_left_over(chinese):
    words = said()
    assert len(words) > 100
    assert {w: words[w] for w in words if w not in chinese} == {}
    assert [w for w in chinese if w not in words] == []
    assert [w for w in chinese if not re.search(r"[\u4e00-\u9fff]", chinese[w])] == []


def test_both_languages_name_the_same_values_sockets_and_keys(chinese):
    for english, word in chinese.items():
        assert set(HELD.findall(word)) == set(HELD.findall(english)), english
        assert set(QUOTED.findall(word)) == set(QUOTED.findall(english)), english
        for key in ("Ctrl+A", "Escape", "Home", "End", "PNG", "WebGL2", "(c", "(p)", "(D)", "(S)"):
            assert (key in english) <= (key.strip("()") in word), english


def test_words_can_stand_in_markup(chinese):
    # Those with quotes are set as text.
    for word in (w for pair in chinese.items() for w in pair):
        assert not set(word) & set("<>&"), word
