"""Run folders such as training leaves behind, a page that holds the tabs alone, and a browser to look at it."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import yaml

from opticnerve.runs.card.card import write_card
from opticnerve.ui.i18n import RUN_TEXTS

EVIL = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>${window.hit=1} {{window.hit}}'


def words(language: str = "en") -> Callable[..., str]:
    def emit(key: str, **values: object) -> str:
        text = RUN_TEXTS[language][key]
        return text.format(**values) if values else text

    return emit


def line(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step, "loss": 0.2 + 2 * math.exp(-step / 10), "tokens": 100, "supervised_tokens": 50, "samples": 4,
        "grad_norm": 1.0, "learning_rate": {"connector": 1e-3}, "elapsed_s": 0.5 * step, "tokens_per_second": 200.0, **more,
    }  # fmt: skip


def make_run(
    root: Path, name: str, *, steps: int = 40, done: int | None = None, answers: int = 30, card: bool = False
) -> Path:
    """A run of one stage of `steps` steps, of which `done` are done; all and finished by default.

    Every third answer is wrong, and the first 24 have a picture. Drawing a card takes seconds: only if asked.
    """
    run = root / name
    stage = run / "stages" / "0-align"
    stage.mkdir(parents=True)
    recipe = {
        "name": name, "model": {"language": {"name": "some/brain"}, "image": {"encoder": {"type": "hf_vision", "name": "some/eye"}}},
        "stages": [{"name": "align", "train": {"connector": 1e-3}, "data": [{"path": "x.jsonl"}], "steps": steps}],
    }  # fmt: skip
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    done = steps if done is None else done
    (stage / "metrics.jsonl").write_text("".join(json.dumps(line(s)) + "\n" for s in range(1, done + 1)))
    results: dict[str, Any] = {"model": {"encoder": "eye", "language": "brain"}, "command": "opticnerve train x"}
    if done == steps:
        closing = {
            "name": "align",
            "steps": steps,
            "samples": 4 * steps,
            "tokens": 100 * steps,
            "seconds": 20.0,
            "final_loss": 0.2,
        }
        (stage / "result.json").write_text(json.dumps({**closing, "files": {}}))
        found = [_answer(i) for i in range(answers)]
        (run / "samples").mkdir()
        for i in range(min(24, answers)):
            PIL.Image.new("RGB", (64, 48), (200, 8 * i, 40)).save(run / "samples" / f"shapes-{i}.png")
        (run / "answers").mkdir()
        (run / "answers" / "shapes.jsonl").write_text("".join(json.dumps(a) + "\n" for a in found))
        kept = [{**a, "right": a["right"] >= 0.5, "image": f"samples/shapes-{i}.png"} for i, a in enumerate(found[:24])]
        results |= {
            "stages": [closing],
            "tasks": [{"name": "shapes", "n": 300, "accuracy": 0.9, "ci95": [0.86, 0.93], "harness": "h", "samples": kept}],
            "image_dependence": {"n": 300, "real": 0.9, "blank": 0.5, "shuffled": 0.4},
            "forgetting": [{"after": "untouched", "perplexity": 21.3}, {"after": "align", "perplexity": 21.3}],
            "seconds": {"total": 75.0}, "peak_memory_bytes": 3 * 2**30,
        }  # fmt: skip
    (run / "results.json").write_text(json.dumps(results), encoding="utf-8")
    if card:
        write_card(run)
    return run


def _answer(i: int) -> dict[str, Any]:
    right = i % 3 != 0
    return {"id": str(i), "type": "color", "question": f"what color is shape {i}?", "answer": "red",
            "prediction": "red" if right else "blue", "right": float(right)}  # fmt: skip


@contextmanager
def served(build: Callable[[], None]) -> Iterator[str]:
    """The address of a page that holds what `build` makes."""
    gradio = pytest.importorskip("gradio", reason="the interface needs gradio (opticnerve[ui])")
    with gradio.Blocks() as page:
        build()
    _, address, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, inbrowser=False)
    try:
        yield address
    finally:
        page.close()


def apart(run: Callable[[], None]) -> None:
    """In a thread of its own: Playwright's loop must not meet another test's."""
    failed: list[BaseException] = []

    def inner() -> None:
        try:
            run()
        except BaseException as e:
            failed.append(e)

    thread = threading.Thread(target=inner)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
