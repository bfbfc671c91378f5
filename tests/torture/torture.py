"""Kill a run again and again, resume it each time, and compare it with one that nobody has touched.

    python tests/torture/torture.py --kills 50

A run of two stages (a connector, then LoRA with dropout; packed rows, the frozen vision encoder's features cached) of tiny random
models in float32 is trained once in peace. Then it is trained in lives that end by SIGKILL: at a random moment, or in a
chosen place (in mid-checkpoint, in mid-cache-write, …; see `faults`). Each next life is `opticnerve train --resume RUN`.
A run that came through is compared with the first one, and the next begins, with an empty cache, until all kills are
spent. Every deterministic figure of metrics.jsonl, the SHA-256 of all weights, and all answers must be the same.

Each life is forked from this process, which has imported everything and computed nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import torch  # noqa: E402
from faults import FAULTS  # noqa: E402

import opticnerve_launch  # noqa: E402, F401
import tiny  # noqa: E402
from opticnerve import recipe as recipes  # noqa: E402
from opticnerve.cli.main import app  # noqa: E402
from opticnerve.common import drawing  # noqa: E402
from opticnerve.features import store as feature_cache  # noqa: E402
from opticnerve.language.chat_template import CHATML  # noqa: E402
from opticnerve.runs import pipeline  # noqa: E402, F401

CLOCKS = ("elapsed_s", "waited_s", "tokens_per_second", "samples_per_second", "waiting", "peak_memory_bytes", "mfu")
SAVE_EVERY, STEPS = 3, (10, 14)
FIRST = ("in mid-cache-write", "in mid-checkpoint")
"""Where the first kills happen, so that a short form has them."""


def make_recipe(folder: Path) -> Path:
    """Tiny models, data and a recipe on disk."""
    language = tiny.save_language(folder / "language", chat_template=CHATML)
    vision_encoder = tiny.save_vision(folder / "eye")
    captions, questions = tiny.save_captions(folder / "data", 12), tiny.save_questions(folder / "data", 12)
    common = {"save_every": SAVE_EVERY, "cache_features": True, "pack": {"tokens": 160, "window": 24}, "batch_size": 2}
    made = {
        "name": "torture", "precision": "fp32", "forgetting": False,
        "model": {"language": {"name": language}, "image": {"encoder": {"type": "hf_vision", "name": vision_encoder}}},
        "stages": [
            {"name": "align", "train": {"connector": 1e-2}, "data": [{"path": str(captions)}], "steps": STEPS[0],
             **common},
            {"name": "instruct", "train": {"connector": 1e-3, "language.lora": 1e-2}, "accumulate": 2,
             "lora": {"rank": 2, "dropout": 0.2}, "data": [{"path": str(captions)}, {"path": str(questions)}],
             "steps": STEPS[1], **common},
        ],
        "evaluate": [{"data": {"path": str(questions)}, "sample": 6, "max_new_tokens": 3, "image_dependence": 4}],
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(recipes.dump(recipes.load(made)), encoding="utf-8")
    return path


def life(recipe: Path, run: Path, cache: Path, log: Path, *, fault: tuple[str, int] | None = None,
         seconds: float | None = None) -> str:  # fmt: skip
    """One process: `finished`, or `killed` in a place or after some seconds; raises where it failed by itself."""
    words = (
        ["train", "--resume", str(run)]
        if (run / "recipe.yaml").is_file()
        else ["train", str(recipe), "--out", str(run)]
    )
    if "--resume" not in words and run.exists() and any(run.iterdir()):
        words.append("--resume")
    began = time.monotonic()
    if (child := os.fork()) == 0:
        code = 1
        try:
            with log.open("a") as file:
                os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            os.environ["OPTICNERVE_CACHE"] = str(cache)
            feature_cache.SHARD_BYTES = 8_000  # several shards of the few pictures
            drawing._DPI = 30  # the card's plots would take half of the time
            if fault is not None:
                FAULTS[fault[0]](fault[1])
            code = app(words, standalone_mode=False) or 0
        except BaseException as e:
            print(f"{type(e).__name__}: {e}", file=sys.stderr)
            code = getattr(e, "exit_code", 1)
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if seconds is not None and time.monotonic() - began > seconds:
            os.kill(child, signal.SIGKILL)
            seconds = None
        time.sleep(0.002)
    if os.WIFSIGNALED(status):
        return "killed"
    if os.WEXITSTATUS(status):
        raise SystemExit(
            f"a life ended with exit code {os.WEXITSTATUS(status)} ({words}, {fault}):\n{log.read_text()[-3000:]}"
        )
    return "finished"


def outcome(run: Path) -> dict[str, Any]:
    """All of a run folder that a clock, or the number of its lives, has no part in."""
    found: dict[str, Any] = {}
    for folder in sorted((run / "stages").iterdir()):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        found[f"{folder.name} curve"] = [{k: v for k, v in json.loads(x).items() if k not in CLOCKS} for x in lines]
        result = json.loads((folder / "result.json").read_text())
        found[f"{folder.name} result"] = {k: v for k, v in result.items() if k != "seconds"}
    for file in sorted(run.glob("*.safetensors")):
        found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    results = json.loads((run / "results.json").read_text())
    return found | {k: results[k] for k in ("tasks", "image_dependence")}


def left_behind(run: Path) -> list[Path]:
    return [p for p in run.rglob(".writing-*") if not p.name.startswith(".writing-card")]


@dataclass
class BadSampleCounter:
    """What the kills came to."""

    kills: int = 0
    runs: int = 0
    places: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


def torture(folder: Path, kills: int, seed: int, *, emit: Any = print) -> BadSampleCounter:
    """Run the whole; raises SystemExit where a run differs."""
    rng, tally, began = random.Random(seed), BadSampleCounter(), time.monotonic()
    recipe, log = make_recipe(folder), folder / "log.txt"
    started = time.monotonic()
    life(recipe, folder / "peace", folder / "cache-peace", log)
    peaceful, wanted = time.monotonic() - started, outcome(folder / "peace")
    steps = sum(len(v) for k, v in wanted.items() if k.endswith("curve"))
    emit(f"undisturbed: {steps} steps in {peaceful:.1f} s, weights {wanted['trained.safetensors'][:16]}…")
    faults = list(FAULTS)
    rng.shuffle(faults)
    faults.sort(key=lambda name: (*FIRST, name).index(name))
    while tally.kills < kills:
        run, cache = folder / f"run-{tally.runs}", folder / f"cache-{tally.runs}"
        while True:
            fault, seconds, fresh = None, None, not run.exists()
            if tally.kills < kills:
                if tally.kills % 2 == 0:  # each place comes up before any comes again
                    fault = (faults[0], rng.randint(1, 2))
                else:
                    seconds = rng.uniform(0.0, 0.8 * peaceful)
            state = life(recipe, run, cache, log, fault=fault, seconds=seconds)
            if state == "finished":
                if fault is not None and fresh:  # a whole run has no such place; the rest of one leaves it to the next
                    faults.append(faults.pop(0))
                break
            tally.kills += 1
            place = fault[0] if fault else "at a random moment"
            tally.places[place] += 1
            if fault:
                faults.remove(fault[0])
                faults = faults or rng.sample(list(FAULTS), len(FAULTS))
        tally.runs += 1
        found = outcome(run)
        for key, value in wanted.items():
            if found.get(key) != value:
                raise SystemExit(
                    f"run {tally.runs} differs after {tally.kills} kills in {key}:\n{value}\n{found.get(key)}"
                )
        if left := left_behind(run):
            raise SystemExit(f"run {tally.runs} left half-written files: {left}")
        emit(f"run {tally.runs} came through and is the same; {tally.kills} kills so far")
        shutil.rmtree(run)
        shutil.rmtree(cache)
    tally.seconds = time.monotonic() - began
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tally = torture(Path(folder), options.kills, options.seed, emit=lambda text: print(text, flush=True))
    print(f"{tally.kills} kills in {tally.runs} runs, all the same bit by bit, {tally.seconds:.0f} s")
    for place, count in sorted(tally.places.items(), key=lambda item: (-item[1], item[0])):
        print(f"  {count:3d}  {place}")


if __name__ == "__main__":
    main()
