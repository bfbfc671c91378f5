"""A small corpus of spoken words, synthesised by espeak-ng: clips of one or two words, captions, and questions on them.

What is never trained on is kept in two splits of its own: the trained words in voices of other speakers, and words
that no training clip says, in the trained voices. Which clips there are is fixed by a seed; espeak-ng speaks the same
samples every time, so one version of it makes one corpus.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import tempfile
import wave
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opticnerve.common import atomic
from opticnerve.common.cache import cache_dir, new_folder
from opticnerve.types import OpticNerveError, to_install

if TYPE_CHECKING:
    from numpy.typing import NDArray

PROGRAM = "espeak-ng"
RATE = 16_000
SECONDS = 2  # no clip is longer: one window of the recipe's audio encoder


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Common words without a twin that sounds the same (no "flour", no "red").
WORDS = _listed(
    """
    dog cat pig duck lion tiger monkey rabbit turtle dolphin spider zebra camel snake frog chicken penguin elephant
    giraffe kitten apple banana lemon cherry grape melon tomato potato carrot pepper garlic butter cheese honey sugar
    pizza salad coffee chocolate sandwich pumpkin green yellow black white pink golden three five six seven nine eleven
    twelve twenty hundred million window kitchen bottle pillow blanket carpet mirror basket pencil scissors hammer
    ladder umbrella computer telephone lamp spoon cup finger elbow stomach mouth river mountain ocean island desert
    garden winter morning rainbow cloud moon star leaf stone volcano school market church village castle bridge street
    airport doctor teacher farmer baby father sister uncle bicycle rocket helicopter boat wagon engine guitar trumpet
    violin football happy angry lazy clever gentle empty simple funny narrow broken jump dance whisper follow remember
    listen begin travel answer music holiday question picture money power
    """
)
HELD_OUT_WORDS = _listed(
    """
    goat eagle donkey parrot wolf orange onion milk biscuit cabbage purple silver ten thirty thousand table candle
    bucket camera fork shoulder tooth forest thunder summer valley hospital station soldier brother train piano drum
    hungry dirty little swim carry number history
    """
)
ACCENTS = ("en-us", "en-gb", "en-gb-x-rp", "en-gb-x-gbclan")
SPEAKERS = ("m1", "m2", "m3", "m4", "m5", "m6", "f1", "f2", "f3")
HELD_OUT_SPEAKERS = ("m7", "m8", "f4", "f5")
_LAYOUT = 1  # raise when anything that decides the files below changes
_SEED = "spoken words"
_MARKER = "corpus.json"


@dataclass(frozen=True)
class Split:
    """Who says what: each word alone `singles` times, and `phrases` clips of two words."""

    words: Sequence[str]
    speakers: Sequence[str]
    singles: int
    phrases: int


SPLITS = {
    "train": Split(WORDS, SPEAKERS, singles=12, phrases=1200),
    "held-out-voices": Split(WORDS, HELD_OUT_SPEAKERS, singles=2, phrases=150),
    "held-out-words": Split(HELD_OUT_WORDS, SPEAKERS, singles=5, phrases=100),
}


@dataclass(frozen=True)
class Clip:
    """One recording before it is made. `voice`: espeak-ng's accent and speaker; `pitch` (50 is the speaker's own);
    `speed` in words a minute; `lead`: seconds of silence before the first word."""

    file: str
    words: tuple[str, ...]
    voice: str
    pitch: int
    speed: int
    lead: float

    @property
    def id(self) -> str:
        return self.file.removesuffix(".wav").replace("/", "-")


def clips(split: str) -> list[Clip]:
    """The recordings of a split, the same on every machine."""
    plan, rng = SPLITS[split], random.Random(f"{_SEED}: {split}")
    said = [(word,) for word in plan.words for _ in range(plan.singles)]
    said += [tuple(rng.sample(plan.words, 2)) for _ in range(plan.phrases)]  # type: ignore[misc]
    return [
        Clip(
            file=f"{split}/{number:04}.wav",
            words=words,
            voice=f"{rng.choice(ACCENTS)}+{rng.choice(plan.speakers)}",
            pitch=rng.randint(30, 70),
            speed=rng.randint(140, 190),
            lead=round(rng.uniform(0.0, 0.2), 3),
        )
        for number, words in enumerate(said)
    ]


def questions(clip: Clip, split: str) -> list[tuple[str, str, str]]:
    """(question, answer, type) on one clip; of yes and no there are as many."""
    rng = random.Random(f"{_SEED}: {clip.file}")
    other = rng.choice([w for w in SPLITS[split].words if w not in clip.words])
    asked = [("what word is spoken?", clip.words[0], "word")]
    if len(clip.words) > 1:
        asked = [
            (f"what is the {n} word?", w, f"{n} word") for n, w in zip(("first", "second"), clip.words, strict=True)
        ]
        asked.append(("what words are spoken?", " ".join(clip.words), "both words"))
    there = rng.choice(clip.words)
    return [*asked, *((f"is the word {w} spoken?", a, "yes/no") for w, a in ((there, "yes"), (other, "no")))]


def prepare(folder: Path | None = None) -> dict[str, Path]:
    """Synthesise the corpus into `folder` (default: in the cache), unless it is there already: all of it or nothing.

    Returns:
        `captions` (train/captions.jsonl: what each training clip says), `questions` (train/questions.jsonl),
        `held-out-voices` and `held-out-words` (their questions.jsonl), and `media`: the folder that the clips' paths
        start from.

    Raises:
        OpticNerveError: espeak-ng or soxr is not installed, or it has none of these voices.
    """
    program = locate()
    folder = folder or cache_dir() / f"spoken-words-{_LAYOUT}-{PROGRAM}-{version(program)}"
    if not (folder / _MARKER).is_file():
        check_voices(program)
        with new_folder(folder) as new:
            for split in SPLITS:
                _write_split(new, split, program)
            counts = {split: len(clips(split)) for split in SPLITS}
            atomic.write(new / _MARKER, json.dumps({PROGRAM: version(program), "layout": _LAYOUT, "clips": counts}))
        if not (folder / _MARKER).is_file():
            raise OpticNerveError(
                f"{folder} holds something else than the spoken words; remove it", kind="exists-already"
            )
    return {
        "captions": folder / "train" / "captions.jsonl",
        "questions": folder / "train" / "questions.jsonl",
        **{split: folder / split / "questions.jsonl" for split in SPLITS if split != "train"},
        "media": folder,
    }


def locate() -> str:
    """The synthesiser's program.

    Raises:
        OpticNerveError: it is not installed.
    """
    if (program := shutil.which(PROGRAM)) is None:
        raise OpticNerveError(
            f"the spoken words are synthesised by {PROGRAM}, which is not installed; run `apt-get install {PROGRAM}` "
            f"(Debian, Ubuntu) or `brew install {PROGRAM}` (macOS)",
            kind="not-installed",
        )
    return program


def version(program: str) -> str:
    """`1.51`, of "eSpeak NG text-to-speech: 1.51  Data at: …"."""
    said = _run(program, "--version").stdout
    found = re.search(r":\s*(\d[\w.]*)", said)
    if found is None:
        raise OpticNerveError(
            f"{program} --version says {said.strip()!r}, which names no version; reinstall {PROGRAM}", kind="damaged"
        )
    return found[1]


def check_voices(program: str) -> None:
    """Refuse an espeak-ng without these accents and speakers: it would use another without a word.

    Raises:
        OpticNerveError: names those that are missing.
    """
    for kind, wanted in (("en", set(ACCENTS)), ("variant", {*SPEAKERS, *HELD_OUT_SPEAKERS})):
        known = {word.removeprefix("!v/") for word in _run(program, f"--voices={kind}").stdout.split()}
        if missing := sorted(wanted - known):
            raise OpticNerveError(
                f"this {PROGRAM} ({version(program)}) has no voice {', '.join(missing)}; install {PROGRAM} 1.49 or "
                "newer with its data",
                kind="unknown-name",
            )


def speak(clip: Clip, program: str) -> np.ndarray[Any, np.dtype[np.int16]]:
    """The clip's samples (N,), int16, 16 kHz: silence, the words, and a twentieth of a second behind them.

    Raises:
        OpticNerveError: espeak-ng fails, or the clip is longer than a window.
    """
    with tempfile.TemporaryDirectory() as scratch:
        spoken = Path(scratch) / "clip.wav"
        settings = ("-v", clip.voice, "-p", str(clip.pitch), "-s", str(clip.speed), "-w", str(spoken))
        done = _run(program, *settings, " ".join(clip.words))
        if done.returncode or not spoken.is_file():
            raise OpticNerveError(f"{PROGRAM} cannot speak with the voice {clip.voice}: {done.stderr.strip()[-300:]}")
        with wave.open(str(spoken)) as sound:
            samples_N = np.frombuffer(sound.readframes(sound.getnframes()), "<i2").astype(np.float32) / 32768
            samples_N = _resample(samples_N, sound.getframerate())
    loud = np.flatnonzero(np.abs(samples_N) > 0.01 * np.abs(samples_N).max())
    if not len(loud):
        raise OpticNerveError(
            f"{PROGRAM} gave only silence for {' '.join(clip.words)!r} with the voice {clip.voice}", kind="empty"
        )
    words_N = samples_N[loud[0] : loud[-1] + 1]
    padded_N = np.pad(words_N, (round(clip.lead * RATE), RATE // 20))
    if len(padded_N) > SECONDS * RATE:
        raise OpticNerveError(
            f"{clip.id} takes {len(padded_N) / RATE:.2f} seconds, more than the {SECONDS} of a window", kind="too-long"
        )
    samples: np.ndarray[Any, np.dtype[np.int16]] = np.rint(padded_N.clip(-1, 1) * 32767).astype(np.int16)
    return samples


def _run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


def _resample(samples_N: NDArray[Any], rate: int) -> Any:
    try:
        import soxr
    except ImportError as e:
        raise OpticNerveError(
            f"sound needs the package soxr; run `{to_install('opticnerve[audio]')}`", kind="not-installed"
        ) from e
    return soxr.resample(samples_N, rate, RATE)


def _write_split(folder: Path, split: str, program: str) -> None:
    (folder / split).mkdir()
    planned = clips(split)

    def record(clip: Clip) -> None:
        with wave.open(str(folder / clip.file), "wb") as sound:
            sound.setparams((1, 2, RATE, 0, "NONE", ""))
            sound.writeframes(speak(clip, program).astype("<i2").tobytes())

    # The work is done in other processes: threads are enough to keep the cores busy.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(record, planned):
            pass
    if split == "train":
        captions = ({"id": c.id, "audio": c.file, "caption": " ".join(c.words)} for c in planned)
        atomic.write_lines(folder / split / "captions.jsonl", captions)
    asked = (
        {"id": f"{clip.id}-q{number}", "audio": clip.file, "question": question, "answer": answer, "type": kind}
        for clip in planned
        for number, (question, answer, kind) in enumerate(questions(clip, split))
    )
    atomic.write_lines(folder / split / "questions.jsonl", asked)
