"""The page's texts: both languages say everything, and a browser gets the one that it asks for."""

from __future__ import annotations

import re
import string
from pathlib import Path

import pytest

from errors import refused
from opticnerve import ui
from opticnerve.ui.i18n import LANGUAGES, RUN_TEXTS, TEXTS, Translations, preferred


def _fields(text: str) -> set[str | None]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


@pytest.mark.parametrize("texts", [TEXTS, RUN_TEXTS], ids=["page", "runs"])
def test_both_languages_have_the_same_keys_and_the_same_blanks(texts: dict[str, dict[str, str]]) -> None:
    assert set(texts) == set(LANGUAGES)
    assert set(texts["en"]) == set(texts["ja"])
    for key, english in texts["en"].items():
        assert english.strip()
        assert texts["ja"][key].strip()
        assert _fields(english) == _fields(texts["ja"][key]), key


def test_no_key_means_two_things() -> None:
    assert not set(TEXTS["en"]) & set(RUN_TEXTS["en"])


def test_japanese_is_japanese() -> None:
    kana_or_kanji = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")
    plain = {key for key, text in TEXTS["ja"].items() if not kana_or_kanji.search(text)}
    assert plain == {"title"}


def test_every_text_that_the_page_asks_for_is_there() -> None:
    asked = set()
    for path in Path(ui.__file__).parent.glob("*.py"):
        asked |= set(re.findall(r"\bwords\(\s*\"(\w+)\"", path.read_text(encoding="utf-8")))
    assert len(asked) > 30
    for language in LANGUAGES:
        for key in asked:
            assert Translations(language)(key)


def test_values_are_filled_in() -> None:
    assert Translations("en")("took", seconds="1.5") == "1.5 s"
    assert Translations("ja")("took", seconds="1.5") == "1.5 秒"


def test_an_unknown_key_is_an_error() -> None:
    with pytest.raises(KeyError, match="nothing"):
        Translations("en")("nothing")


def test_an_unknown_language_is_an_error_that_names_those_there_are() -> None:
    with refused("unknown-name", "'fr'", "en and ja"):
        Translations("fr")


@pytest.mark.parametrize(
    ("header", "language"),
    [
        ("ja", "ja"),
        ("ja-JP,ja;q=0.9,en;q=0.8", "ja"),
        ("en-GB,en;q=0.9,ja;q=0.8", "en"),
        ("fr,de;q=0.9", "en"),
        ("fr, ja;q=0.3", "ja"),
        ("en;q=0.2, ja;q=0.7", "ja"),
        ("ja;q=0", "en"),
        ("ja;q=much", "en"),
        ("", "en"),
    ],
)
def test_the_language_that_a_browser_prefers(header: str, language: str) -> None:
    assert preferred(header) == language
