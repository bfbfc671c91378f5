"""The spoken corpus: nothing held out is ever trained on, and what a file says is what its clip says."""

from __future__ import annotations

import json
import wave
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from errors import refused
from opticnerve.starter import spoken_words
from opticnerve.starter.spoken_words import (
    HELD_OUT_WORDS,
    RATE,
    SECONDS,
    SPLITS,
    WORDS,
    Split,
    clips,
    prepare,
    questions,
)
from opticnerve.types import OpticNerveError

TYPES = {"word", "first word", "second word", "both words", "yes/no"}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def samples(path: Path) -> Any:
    with wave.open(str(path)) as sound:
        assert (sound.getnchannels(), sound.getsampwidth(), sound.getframerate()) == (1, 2, RATE)
        return np.frombuffer(sound.readframes(sound.getnframes()), "<i2").astype(np.float32) / 32768


class TestThePlan:
    def test_no_word_and_no_speaker_is_on_both_sides(self) -> None:
        assert not set(WORDS) & set(HELD_OUT_WORDS)
        assert len(set(WORDS)) == len(WORDS)
        said = {split: {w for c in clips(split) for w in c.words} for split in SPLITS}
        speakers = {split: {c.voice.split("+")[1] for c in clips(split)} for split in SPLITS}
        assert said["train"] == said["held-out-voices"] == set(WORDS)
        assert said["held-out-words"] == set(HELD_OUT_WORDS)
        assert not speakers["train"] & speakers["held-out-voices"]
        assert speakers["held-out-words"] == speakers["train"]

    def test_no_held_out_word_is_in_a_training_question_either(self) -> None:
        asked = {w for c in clips("train") for q, a, _ in questions(c, "train") for w in f"{q} {a}".split()}
        assert not asked & set(HELD_OUT_WORDS)

    @pytest.mark.parametrize("split", SPLITS)
    def test_it_is_the_same_every_time_and_every_word_is_said_alone(self, split: str) -> None:
        assert clips(split) == clips(split)
        assert len({c.file for c in clips(split)}) == len(clips(split))
        alone = Counter(c.words[0] for c in clips(split) if len(c.words) == 1)
        assert set(alone.values()) == {SPLITS[split].singles}

    @pytest.mark.parametrize("split", SPLITS)
    def test_answers_are_true_and_yes_is_as_frequent_as_no(self, split: str) -> None:
        answers: Counter[str] = Counter()
        for clip in clips(split):
            for question, answer, kind in questions(clip, split):
                assert kind in TYPES
                if kind == "yes/no":
                    answers[answer] += 1
                    asked = question.removeprefix("is the word ").removesuffix(" spoken?")
                    assert asked in SPLITS[split].words
                    assert (asked in clip.words) == (answer == "yes")
                else:
                    place = {"first word": slice(0, 1), "second word": slice(1, 2)}.get(kind, slice(None))
                    assert answer == " ".join(clip.words[place])
        assert answers["yes"] == answers["no"]


class TestAbsentTools:
    def test_an_absent_synthesiser_names_the_remedy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(spoken_words.shutil, "which", lambda name: None)
        with refused("not-installed", "espeak-ng", "apt-get install espeak-ng"):
            prepare()

    def test_a_program_that_names_no_version(self) -> None:
        with refused("damaged", "espeak-ng"):
            spoken_words.version("true")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A corpus of all words, of few clips each."""
    pytest.importorskip("soxr", reason="sound needs `pip install 'opticnerve[audio]'`")
    try:
        spoken_words.locate()
    except OpticNerveError as e:
        pytest.skip(str(e))
    few = {name: Split(s.words[:6], s.speakers, singles=2, phrases=6) for name, s in SPLITS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spoken_words, "SPLITS", few)
        yield prepare(tmp_path_factory.mktemp("spoken") / "corpus")


class TestTheCorpus:
    def test_files(self, prepared: dict[str, Path]) -> None:
        assert set(prepared) == {"captions", "questions", "held-out-voices", "held-out-words", "media"}
        for name in ("captions", "questions", "held-out-voices", "held-out-words"):
            assert rows(prepared[name])
            assert all((prepared["media"] / r["audio"]).is_file() for r in rows(prepared[name]))
        assert len(rows(prepared["captions"])) == 18
        assert {r["type"] for r in rows(prepared["questions"])} == TYPES
        assert len({r["id"] for r in rows(prepared["questions"])}) == len(rows(prepared["questions"]))

    def test_captions_and_answers_agree(self, prepared: dict[str, Path]) -> None:
        said = {r["audio"]: r["caption"] for r in rows(prepared["captions"])}
        for row in rows(prepared["questions"]):
            if row["type"] in ("word", "both words"):
                assert row["answer"] == said[row["audio"]]

    def test_clips_are_loud_short_and_start_after_their_lead(self, prepared: dict[str, Path]) -> None:
        for clip in clips("train"):
            heard = samples(prepared["media"] / clip.file)
            assert 0.2 * RATE < len(heard) <= SECONDS * RATE
            assert 0.05 < np.abs(heard).max() <= 1
            lead = round(clip.lead * RATE)
            assert not heard[:lead].any()
            assert np.abs(heard[lead : lead + RATE // 10]).max() > 0.001

    def test_the_same_clip_is_spoken_the_same(self, prepared: dict[str, Path]) -> None:
        clip = clips("train")[3]
        again = spoken_words.speak(clip, spoken_words.locate())
        assert np.array_equal(again / 32768, samples(prepared["media"] / clip.file))

    def test_a_second_call_synthesises_nothing(
        self, prepared: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(spoken_words, "speak", lambda *_: pytest.fail("spoke"))
        assert prepare(prepared["media"]) == prepared

    def test_all_or_nothing(self, tmp_path: Path, prepared: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
        def breaks(clip: Any, program: str) -> Any:
            if clip.file.endswith("0007.wav"):
                raise OpticNerveError("no more breath")
            return np.zeros(10, np.int16)

        monkeypatch.setattr(spoken_words, "speak", breaks)
        with refused("refused", "no more breath"):
            prepare(tmp_path / "corpus")
        assert not list(tmp_path.iterdir())

    def test_a_folder_of_something_else_is_left_alone(
        self, tmp_path: Path, prepared: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(spoken_words, "speak", lambda *_: np.zeros(10, np.int16))
        (tmp_path / "mine.txt").write_text("mine")
        with refused("exists-already", tmp_path):
            prepare(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]

    def test_a_missing_voice_is_not_replaced_by_another(
        self, prepared: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        program = spoken_words.locate()
        clip = spoken_words.Clip("train/0.wav", ("dog",), "xx+m1", 50, 150, 0.0)
        with refused("refused", "xx+m1"):
            spoken_words.speak(clip, program)
        monkeypatch.setattr(spoken_words, "ACCENTS", ("en-us", "en-nowhere"))
        with refused("unknown-name", "en-nowhere", "espeak-ng"):
            spoken_words.check_voices(program)
