"""`opticnerve look` writes a picture, tells scripts where the peaks are, and says what it cannot do."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import tiny
from cli.conftest import Ran
from opticnerve.interpret.attribution import Attribution, Map
from opticnerve.interpret.plot import attribution_plot
from opticnerve.interpret.teacher_forcing import Word
from opticnerve.models.vlm.build import dock

QUESTION = "what colour is the circle?"


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory, language_folder: Callable[..., str], vision_folder: Callable[..., str],
    private_cache: Path,
) -> dict[str, Path]:  # fmt: skip
    """A splice and a cross-attention model on disk."""
    made = {}
    for name, fusion in (("splice", "splice"), ("cross", {"type": "cross_attention", "every": 1, "heads": 4})):
        docked = dock({"type": "hf_vision", "name": vision_folder()}, "mlp", language_folder("llama"), fusion=fusion)
        words = docked.processor.tokenizer
        nothing = [i for i in range(len(words)) if not words.decode([i], skip_special_tokens=True).strip()]
        docked.model.generation_config.suppress_tokens = nothing
        made[name] = tmp_path_factory.mktemp(name)
        docked.model.save_pretrained(made[name])
        docked.processor.save_pretrained(made[name])
    return made


@pytest.fixture
def run(opticnerve: Callable[..., Ran]) -> Callable[..., Ran]:
    return partial(opticnerve, "look")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    tiny.picture(3).resize((60, 40)).save(path)
    return path


@pytest.mark.parametrize(("name", "method"), [("splice", "relevance"), ("cross", "cross_attention")])
def test_a_picture_and_json(
    name: str, method: str, models: dict[str, Path], run: Callable[..., Ran], picture: Path, tmp_path: Path
) -> None:
    out = tmp_path / "made" / "where.png"
    ran = run(models[name], QUESTION, "-i", picture, "-o", out, "--grid", 4, "--max-new-tokens", 4, "--json")
    assert ran.code == 0, ran.err
    with PIL.Image.open(out) as drawn:
        assert drawn.format == "PNG"
    found = ran.json
    assert [m["method"] for m in found["maps"]] == [method, "occlusion"]
    for each in found["maps"]:
        assert np.array(each["grids"]).shape == (len(found["words"]), 4, 4)
        for grid, peak in zip(each["grids"], each["peaks"], strict=True):
            row, column = int(peak["y"] * 4), int(peak["x"] * 4)
            assert grid[row][column] == np.max(grid)
    assert "".join(w["text"] for w in found["words"]) == "".join(found["answer"].split())
    assert found["output"] == str(out)


def test_people_read_the_answer_first(
    models: dict[str, Path], run: Callable[..., Ran], picture: Path, tmp_path: Path
) -> None:
    words = ("-m", "attention", "--layer", 1, "--head", 0, "--max-new-tokens", 3, "--grid", 3, "--patch", 1)
    ran = run(models["splice"], QUESTION, "-i", picture, "-o", tmp_path / "w.png", *words)
    assert ran.code == 0, ran.err
    assert "attention: " in ran.out
    assert "from the left" in ran.out
    assert "written: " in ran.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "exactly one --image FILE to look at, not 0"),
        (("-i", "{picture}", "-i", "{picture}"), "not 2"),
        (("-i", "nowhere.png"), "nowhere.png"),
        (("-i", "{picture}", "-o", "where.jpg"), "ends in .png, not where.jpg"),
        (("-i", "{picture}", "-o", "."), "ends in .png, not ."),
        (("-i", "{picture}", "-m", "intuition"), "unknown method 'intuition'; known: attention"),
        (("-i", "{picture}", "-m", "attention", "--layer", "2"), "no layer 2: this model has 2, 0 to 1"),
        (("-i", "{picture}", "-m", "attention", "--head", "4"), "no head 4: this model has 4, 0 to 3"),
        (("-i", "{picture}", "--head", "1"), "leave them out"),
        (("-i", "{picture}", "-m", "cross_attention"), "no layers of cross-attention"),
        (("-i", "{picture}", "--grid", "99"), "does not fit a picture of 32 × 32"),
    ],
)
def test_bad_input(
    words: tuple[str, ...], message: str, models: dict[str, Path], run: Callable[..., Ran], picture: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    ran = run(models["splice"], QUESTION, "--max-new-tokens", 2, *(w.format(picture=picture) for w in words))
    assert ran.code == 1
    assert message in " ".join(ran.err.split())
    assert not ran.out
    assert not (tmp_path / "where.png").exists()


@pytest.mark.filterwarnings("ignore:Glyph")  # not every machine has a font for East Asian scripts
def test_long_answers_and_dollars_are_drawn(tmp_path: Path) -> None:
    words = [
        Word(w, (i,)) for i, w in enumerate(re.findall(r"\S+", "it costs $5 or $6 and 赤い is extraordinarily long"))
    ]
    rng = np.random.default_rng(0)
    maps = [Map("relevance", rng.random((10, 4, 4)), "note", None), Map("occlusion", -rng.random((10, 6, 6)), "note")]
    looked = Attribution(" ".join(w.text for w in words), words, [-0.1] * 10, maps, (10.0, 0.0, 50.0, 40.0))
    path = attribution_plot(looked, tiny.picture(0).resize((60, 40)), "why $x$?", tmp_path / "long.png")
    with PIL.Image.open(path) as drawn:
        width, height = drawn.size
    assert height > 1500 > 500 < width
