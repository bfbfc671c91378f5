"""Whatever takes a recipe takes every packaged one by its name, dots and all; what is no name says which there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny
from opticnerve.cli.guard import ERROR
from opticnerve.cli.main import main
from opticnerve.recipe import Recipe
from opticnerve.starter.demo import packaged

WHERE = Path(__file__).resolve().parents[2] / "recipes"
NAMES = sorted(p.stem for p in WHERE.glob("*.yaml"))


class Read(Exception):
    """A command has read its recipe, and goes no further."""


def test_names_are_those_of_the_files() -> None:
    assert packaged() == NAMES
    assert any("." in name for name in NAMES)


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a folder where something else is called as the recipes are; what is read is thrown."""
    from opticnerve import recipe

    def load(path: Any, overrides: Any = (), **_: Any) -> Recipe:
        raise Read(Path(path))

    for name in NAMES:
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "load", load)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "command",
    [
        ("plan", "NAME"), ("train", "NAME"), ("data", "check", "NAME"), ("data", "show", "NAME"),
        ("data", "show", "captions.jsonl", "--model", "NAME"), ("eval", "model", "--recipe", "NAME"),
        ("compare", "fusion", "--recipe", "NAME"), ("compare", "stages", "--recipe", "NAME"),
        ("compare", "connectors", "--recipe", "NAME"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_packaged_name_is_the_recipe(name: str, command: tuple[str, ...], stopped: None) -> None:
    tiny.picture(0, size=8).save("1.png")
    Path("captions.jsonl").write_text('{"image": "1.png", "caption": "a cat"}\n', encoding="utf-8")
    with pytest.raises(Read) as found:
        main([name if word == "NAME" else word for word in command])
    assert found.value.args == (WHERE / f"{name}.yaml",)


@pytest.mark.parametrize("typed", ["llava-1.5-7", "LLaVA-1.5-7B", "llava-1.5-7b.yaml", "no-such-recipe", "nor.this"])
@pytest.mark.parametrize("command", ["plan", "train"])
def test_another_name_lists_those_that_are_known(
    typed: str, command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main([command, typed])
    assert left.value.code == ERROR
    said = capsys.readouterr().err
    assert all(name in said for name in NAMES)
    assert ("'llava-1.5-7b'" in said.replace(repr(typed), "")) == ("llava" in typed.lower())


def test_a_folder_of_a_recipes_name_is_reached_by_its_path(stopped: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Read):
        main(["plan", "photos"])
    assert "./photos" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", "./photos"])
