"""Each kind of ending has its exit code, and an error is one message without a traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opticnerve.cli.guard import Stopped, guarded


def test_a_missing_recipe_is_an_error_of_one_line(opticnerve: Callable[..., Any], tmp_path: Path) -> None:
    ran = opticnerve("train", tmp_path / "none.yaml")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("error: ")
    assert "none.yaml" in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("words", [("--debug", "train"), ("train", "--debug")])
def test_debug_shows_the_traceback_wherever_it_stands(
    opticnerve: Callable[..., Any], tmp_path: Path, words: tuple[str, ...]
) -> None:
    ran = opticnerve(*words, tmp_path / "none.yaml")
    assert ran.code == 1
    assert "Traceback" in ran.err


@pytest.mark.parametrize(
    "words", [(), ("nonsense",), ("train",), ("ask", "starter"), ("train", "a.yaml", "--nonsense")]
)
def test_a_wrong_command_line_is_two(opticnerve: Callable[..., Any], words: tuple[str, ...]) -> None:
    assert opticnerve(*words).code == 2


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), Stopped("saved to here; go on with --resume")])
def test_an_interruption_is_130(raised: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    def command() -> None:
        raise raised

    with pytest.raises(typer.Exit) as left:
        guarded(command)()
    assert left.value.exit_code == 130
    assert (str(raised) or "stopped") in capsys.readouterr().err


def test_our_own_faults_keep_their_traceback() -> None:
    def command() -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        guarded(command)()


def test_an_unknown_key_in_an_override_names_the_nearest(opticnerve: Callable[..., Any], recipe_file: Path) -> None:
    ran = opticnerve("train", recipe_file, "stages.0.stepz=5")
    assert ran.code == 1
    assert "steps" in ran.err


@pytest.mark.parametrize("words", [("ask", "starter", "what?", "--image"), ("chat", "starter", "--image")])
def test_a_wrong_picture_is_found_before_the_model_is_loaded(
    opticnerve: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    import opticnerve.inference.load as load

    monkeypatch.setattr(load, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    ran = opticnerve(*words, tmp_path / "none.png")
    assert ran.code == 1
    assert "none.png does not exist" in ran.err
