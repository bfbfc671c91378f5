"""`data check` and `data show`, and the picture in the terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opticnerve.cli import tokens
from opticnerve.cli.ask import draw
from opticnerve.data.encode.tokenize import encode
from opticnerve.types import ask


def test_check_of_good_data_is_zero(opticnerve: Callable[..., Any], captions: Path) -> None:
    ran = opticnerve("data", "check", captions, "--json")
    assert ran.code == 0, ran.err
    assert (ran.json["good"], ran.json["bad"]) == (4, 0)


def test_check_of_bad_data_is_three_and_names_the_lines(opticnerve: Callable[..., Any], captions: Path) -> None:
    with captions.open("a", encoding="utf-8") as file:
        file.write('{"image": "none.png", "caption": "gone"}\n{"image":\n')
    ran = opticnerve("data", "check", captions)
    assert ran.code == 3
    assert f"{captions}:5" in ran.out
    assert f"{captions}:6" in ran.out


def test_check_of_a_recipe_counts_tokens_and_finds_what_is_too_long(
    opticnerve: Callable[..., Any], recipe_file: Path
) -> None:
    ran = opticnerve("data", "check", recipe_file, "--json")
    assert ran.code == 0, ran.err
    [report] = ran.json["data"].values()
    assert report["tokens"]["min"] > 0
    recipe_file.write_text(recipe_file.read_text(encoding="utf-8").replace("steps: 1", "steps: 1\n  max_length: 3"))
    ran = opticnerve("data", "check", recipe_file, "--json")
    assert ran.code == 3
    [report] = ran.json["data"].values()
    assert report["kinds"]["too-long"]["count"] == 4


def test_check_finds_test_data_in_the_training_data(opticnerve: Callable[..., Any], captions: Path) -> None:
    test = captions.with_name("test.jsonl")
    test.write_text(captions.read_text(encoding="utf-8").splitlines()[1] + "\n", encoding="utf-8")
    ran = opticnerve("data", "check", captions, "--against", test, "--json")
    assert ran.code == 0 and ran.json["ok"] and not ran.json["leaks"]["ok"]
    assert ran.json["leaks"]["pictures"]["count"] == ran.json["leaks"]["answers"]["count"] == 1
    ran = opticnerve("data", "check", captions, "--against", test, "--quick", "--fail-on-leaks")
    assert ran.code == 3 and f"{test}:1: also in {captions}:2" in ran.out


def test_overrides_as_plan_and_train_take_them(
    opticnerve: Callable[..., Any], recipe_file: Path, captions: Path
) -> None:
    ran = opticnerve("data", "check", recipe_file, "stages.0.data.0.limit=2", "--json")
    assert [r["good"] for r in ran.json["data"].values()] == [2]
    assert opticnerve("data", "check", captions, "limit=1", "--json").json["good"] == 1
    assert opticnerve("data", "check", captions, "nonsense=1").code == 1
    assert opticnerve("data", "show", recipe_file, "stages.0.data.0.limit=2", "--index", "2").code == 1


def test_data_without_a_picture_for_a_recipe_with_an_encoder(
    opticnerve: Callable[..., Any], recipe_file: Path, captions: Path
) -> None:
    said = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    captions.write_text(said * 4, encoding="utf-8")
    assert opticnerve("data", "check", recipe_file, "--json").json["warning"]
    remarks = opticnerve("plan", recipe_file, "--json").json["remarks"]
    assert any("none of its samples has a picture" in r["text"] for r in remarks if r["level"] == "warning")


def test_check_of_a_missing_file_is_an_error(opticnerve: Callable[..., Any], tmp_path: Path) -> None:
    assert opticnerve("data", "check", tmp_path / "none.jsonl").code == 1


def test_show_marks_the_answer_and_only_the_answer(opticnerve: Callable[..., Any], recipe_file: Path) -> None:
    ran = opticnerve("data", "show", recipe_file, "--id", "sample-2", "--json")
    assert ran.code == 0, ran.err
    learned = [p for p in ran.json["pieces"] if p["trained"]]
    assert "".join(p["text"] for p in learned if p["kind"] == "text") == "a blue picture"
    assert learned[-1]["kind"] == "special"
    assert [p["kind"] for p in ran.json["pieces"]].count("image") == 1
    assert sum(p["count"] for p in ran.json["pieces"]) == ran.json["tokens"]
    plain = opticnerve("data", "show", recipe_file, "--index", "2")
    assert "▦ image ×" in plain.out
    assert f"{ran.json['tokens']} tokens: {ran.json['trained']} trained" in plain.out


def test_show_says_which_samples_there_are(opticnerve: Callable[..., Any], recipe_file: Path, captions: Path) -> None:
    ran = opticnerve("data", "show", recipe_file, "--index", "4")
    assert ran.code == 1
    assert "0 to 3" in ran.err
    assert "sample-0" in opticnerve("data", "show", recipe_file, "--id", "none").err
    assert "--model" in opticnerve("data", "show", captions).err


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet=st.characters(blacklist_categories=("Cs", "Co")), min_size=1, max_size=20))
def test_every_token_is_in_one_piece(docked: Callable[..., Any], question: str) -> None:
    processor = _processor(docked)
    picture = PIL.Image.new("RGB", (8, 8))
    encoded = encode(ask(f"q{question}", picture, picture, answer="yes ✓"), processor)
    found = tokens.pieces(encoded, processor)
    assert sum(p.count for p in found) == len(encoded.input_ids)
    assert sum(p.count for p in found if p.trained) == encoded.supervised
    assert [p.count for p in found if p.kind == "image"] == [processor.num_image_tokens] * 2


_made: dict[str, Any] = {}


def _processor(docked: Callable[..., Any]) -> Any:
    if "processor" not in _made:
        _made["processor"] = docked().processor
    return _made["processor"]


def test_a_picture_is_drawn_two_pixels_to_a_cell() -> None:
    image = PIL.Image.new("RGB", (4, 4), "red")
    image.paste("blue", (0, 2, 4, 4))
    drawn = draw(image, columns=4)
    assert drawn.plain == "▀▀▀▀\n▀▀▀▀\n"
    first, last = drawn.spans[0].style, drawn.spans[-2].style
    assert "255,0,0" in str(first)
    assert "0,0,255" in str(last)
