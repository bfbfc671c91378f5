from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import refused
from opticnerve.evaluation import image_dependence as module
from opticnerve.evaluation.image_dependence import deranged_pictures, image_dependence
from opticnerve.evaluation.tasks import most_frequent_answer, run_captions, run_vqa
from opticnerve.types import Conversation, DataError, Frame, ImagePart, ask

RED, BLUE = (200, 20, 20), (20, 20, 200)


def questions(tmp_path: Path, n: int = 40) -> list[Conversation]:
    found = []
    for i in range(n):
        colour = ["red", "blue"][i % 2]
        path = tmp_path / f"{i // 2}-{colour}.png"
        PIL.Image.new("RGB", (8, 6), RED if colour == "red" else BLUE).save(path)
        found.append(replace(ask("which colour?", path, answer=colour, type=f"type {i % 3}"), id=str(i)))
    return found


def looks(prompts: list[Conversation]) -> list[str]:
    """A model that sees: it names the first picture's colour."""
    answers = []
    for c in prompts:
        source = c.images[0].source
        picture = source if isinstance(source, PIL.Image.Image) else PIL.Image.open(source)
        answers.append({RED: "Red.", BLUE: "blue"}.get(picture.convert("RGB").getpixel((0, 0)), "grey"))
    return answers


def test_vqa_scores_by_type_and_shows_progress(tmp_path: Path) -> None:
    asked = questions(tmp_path)
    ticks: list[tuple[int, int]] = []
    got = run_vqa(lambda ps: ["red"] * len(ps), asked, name="colours", keep=10, progress=lambda *t: ticks.append(t))
    assert got["n"] == 40 and got["accuracy"] == 0.5 and got["ci95"][0] < 0.5 < got["ci95"][1]
    assert sum(t["n"] for t in got["by_type"].values()) == 40
    assert Counter(s["right"] for s in got["samples"]) == {True: 5, False: 5}
    assert got["samples"][0]["question"] == "which colour?" and Path(got["samples"][0]["image"]).is_file()
    assert ticks[-1] == (40, 40)


def test_the_model_is_never_shown_the_answer(tmp_path: Path) -> None:
    def spy(prompts: list[Conversation]) -> list[str]:
        assert all(c.answer is None for c in prompts)
        return [""] * len(prompts)

    assert run_vqa(spy, questions(tmp_path), name="x")["accuracy"] == 0


def test_ten_answers_are_scored_softly() -> None:
    c = ask("?", answers=["red"] * 2 + [f"colour {i}" for i in range(8)])
    got = run_vqa(lambda ps: ["red"] * len(ps), [c], name="x")
    assert got["accuracy"] == pytest.approx(0.6) and "soft" in got["harness"]
    few = run_vqa(lambda ps: ["rouge"] * len(ps), [ask("?", answers=["red", "rouge"])], name="x")
    assert few["accuracy"] == 1 and "exact match" in few["harness"]


def test_the_most_frequent_answer_is_scored_by_the_same_rule() -> None:
    got = most_frequent_answer([ask("?", answer=a) for a in ("Yes.", "yes", "no", "the yes")])
    assert (got["answer"], got["accuracy"], got["n"]) == ("yes", 0.75, 4)
    with refused("empty"):
        most_frequent_answer([])


def test_pictures_are_kept_in_the_run_folder(tmp_path: Path) -> None:
    picture = PIL.Image.new("RGB", (2000, 1000), RED)
    got = run_vqa(lambda ps: ["red"], [ask("?", picture, answer="red")], name="a/b test", run_dir=tmp_path / "run")
    with PIL.Image.open(tmp_path / "run" / got["samples"][0]["image"]) as kept:
        assert kept.size == (384, 192)
    assert picture.size == (2000, 1000)


def test_what_cannot_be_scored_is_refused(tmp_path: Path) -> None:
    with refused("no-answer", "q.jsonl:3", "question 7", error=DataError):
        run_vqa(looks, [replace(ask("?"), id="7", where="q.jsonl:3")], name="x")
    with refused("empty"):
        run_vqa(looks, [], name="x")
    with refused("wrong-shape", "1 answers to 40"):
        run_vqa(lambda ps: ["one"], questions(tmp_path), name="x")


def test_captions_are_scored_against_all_references(tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("pycocoevalcap")
    refs = [["a dog runs on the beach", "one dog at the sea"], ["two men ride a red bus"], ["a bowl of green soup"]]
    asked = [ask("describe", captions=r) for r in refs]
    got = run_captions(lambda ps: [r[0] for r in refs][: len(ps)], asked, name="captions")
    assert got["bleu4"] == pytest.approx(1) and got["cider"] > 5 and got["n"] == 3 and "accuracy" not in got


def test_a_model_that_looks_depends_on_the_picture(tmp_path: Path) -> None:
    got = image_dependence(looks, questions(tmp_path))
    assert (got["n"], got["real"], got["blank"]) == (40, 1.0, 0.0) and got["real_minus_blank"] == 1
    assert got["shuffled"] < 0.9
    assert got["ci95"]["real"][1] == 1


def test_a_model_that_does_not_look_does_not(tmp_path: Path) -> None:
    got = image_dependence(lambda ps: ["red"] * len(ps), questions(tmp_path))
    assert got["real"] == got["blank"] == got["shuffled"] == 0.5


def test_the_three_passes_see_what_they_should(tmp_path: Path) -> None:
    asked = questions(tmp_path)
    passes: list[list[Conversation]] = []

    def spy(prompts: list[Conversation]) -> list[str]:
        passes.append(prompts)
        return [""] * len(prompts)

    ticks: list[tuple[int, int]] = []
    image_dependence(spy, asked, progress=lambda *t: ticks.append(t))
    real, blank, shuffled = passes
    assert [c.images for c in real] == [c.images for c in asked]
    for c in blank:
        picture = c.images[0].source
        assert (
            isinstance(picture, PIL.Image.Image)
            and picture.size == (8, 6)
            and picture.getcolors() == [(48, (128,) * 3)]
        )
    assert all(a.images[0].source != b.images[0].source for a, b in zip(asked, shuffled, strict=True))
    assert ticks == [(40, 120), (80, 120), (120, 120)]


def frame_of(part: ImagePart) -> Frame:
    assert isinstance(part.source, Frame)
    return part.source


def test_of_videos_the_frames_are_exchanged_in_two_ways(tmp_path: Path) -> None:
    """With another video's, one by one in their order; and with their own in another order. What stands before each
    stays."""
    films = [tmp_path / name for name in "abc"]
    asked = [
        ask("when?", answer="now").shown([ImagePart(Frame(film, k, 4), f"<{k}.0 seconds>") for k in range(4)])
        for film in films for _ in range(2)
    ]  # fmt: skip
    passes: list[list[Conversation]] = []

    def spy(prompts: list[Conversation]) -> list[str]:
        passes.append(prompts)
        return ["now"] * len(prompts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "open_image", lambda *_, **__: PIL.Image.new("RGB", (8, 6)))
        got = image_dependence(spy, asked)
    assert got["shuffled_frames"] == 1 and got["ci95"].keys() == {"real", "blank", "shuffled", "shuffled_frames"}
    real, blank, others, own = passes
    for seen in passes:
        assert all(
            [p.timestamp for p in a.images] == [p.timestamp for p in b.images] for a, b in zip(asked, seen, strict=True)
        )
    for a, b, c in zip(real, others, own, strict=True):
        shown, exchanged, reordered = ([frame_of(p) for p in x.images] for x in (a, b, c))
        assert [f.index for f in exchanged] == [0, 1, 2, 3]
        assert len({f.source for f in exchanged}) == 1 and exchanged[0].source != shown[0].source
        assert {f.source for f in reordered} == {shown[0].source}
        assert sorted(f.index for f in reordered) == [0, 1, 2, 3]
        assert all(f.index != k for k, f in enumerate(reordered))
    assert own[0].images == own[1].images
    assert not any(isinstance(p.source, Frame) for c in blank for p in c.images)


@given(st.lists(st.integers(0, 6), min_size=2, max_size=30).filter(lambda x: len(set(x)) > 1), st.integers(0, 3))
def test_the_shuffle_is_a_fixed_derangement(which: list[int], seed: int) -> None:
    asked = [ask("?", Path(f"{i}.png")) for i in which]
    partner = deranged_pictures(asked, seed)
    again = deranged_pictures(asked[::-1], seed)
    assert partner == again
    assert len({p.source for p in partner.values()}) == len(partner) == len(set(which))
    for key, other in partner.items():
        assert isinstance(other, ImagePart) and str(Path(str(other.source)).resolve()) not in key


def test_one_picture_or_none_cannot_be_shuffled(tmp_path: Path) -> None:
    with refused("out-of-range", "two pictures"):
        image_dependence(looks, questions(tmp_path, 1))
    with refused("missing-field", "picture"):
        image_dependence(looks, [*questions(tmp_path), ask("?", answer="x")])


def test_balanced_questions_give_no_clue_by_their_words() -> None:
    from opticnerve.evaluation.image_dependence import balanced

    skewed = [ask("is it red?", pictured(i), answer="no" if i % 10 else "yes") for i in range(100)]
    fixed = [ask("is it there?", pictured(i), answer="yes") for i in range(20)]
    chosen = balanced([*skewed, *fixed], 10)
    assert sorted(c.answer or "" for c in chosen) == ["no"] * 5 + ["yes"] * 5
    assert chosen == balanced([*skewed, *fixed], 10)
    assert balanced(fixed, 10) == []


def pictured(number: int) -> bytes:
    return str(number).encode()
