"""lmms-eval itself asks a tiny model: what it gets is what the model says, for pictures, two of them, none, and choices.

`OPTICNERVE_LMMS_EVAL_PYTHON` names the Python of an environment that has both packages, if not this one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from opticnerve.inference.generate import Answerer
from opticnerve.inference.likelihood import answer_scores
from opticnerve.models.vlm.build import Dock
from opticnerve.types import Conversation, ImagePart, Message, TextPart, ask

PYTHON = os.environ.get("OPTICNERVE_LMMS_EVAL_PYTHON") or (
    sys.executable if importlib.util.find_spec("lmms_eval") else ""
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON, reason="lmms-eval is not installed, and OPTICNERVE_LMMS_EVAL_PYTHON names no Python"
    ),
]
EXAMPLE = Path(__file__).resolve().parents[2] / "examples/lmms_eval/tasks"
CHOICES = ["yes", "no", "red"]
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
process_results: !function utils.score
metric_list: [{metric: accuracy, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def asked(docked: Callable[..., Dock], tmp_path: Path) -> tuple[Dock, list[dict[str, Any]]]:
    """A model in `model`, questions in `questions.jsonl` and tasks in `tasks`, all under `tmp_path`."""
    dock = docked("llama")
    dock.model.eval()
    dock.model.save_pretrained(tmp_path / "model")
    dock.processor.save_pretrained(tmp_path / "model")
    path = tiny.save_questions(tmp_path, pictures=2, each=2)
    questions = [json.loads(line) | {"choices": CHOICES} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(q) + "\n" for q in questions))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for file in EXAMPLE.iterdir():
        if file.is_file():
            (tasks / file.name).write_text(file.read_text())
    two = "\ndef two(doc):\n    return pictures(doc) + pictures({'image': 'q1.png'})\n"
    (tasks / "utils.py").write_text((EXAMPLE / "utils.py").read_text() + two)
    (tasks / "two.yaml").write_text(
        f"task: opticnerve_two\n{COMMON}doc_to_visual: !function utils.two\ngeneration_kwargs: {{max_new_tokens: 5}}\n"
    )
    (tasks / "words.yaml").write_text(
        f"task: opticnerve_words\n{COMMON}generation_kwargs: {{max_new_tokens: 9, until: [o, u]}}\n"
    )
    return dock, questions


def lmms_eval(folder: Path, tasks: str, *options: str) -> dict[str, list[Any]]:
    """Task → what lmms-eval was answered, document by document."""
    out = folder / f"out{len(options)}"
    command = [
        PYTHON, "-m", "lmms_eval", "--model", "opticnerve", "--model_args", "pretrained=model,device=cpu", "--tasks",
        tasks, "--include_path", "tasks", "--batch_size", "3", "--output_path", str(out), "--log_samples", *options,
    ]  # fmt: skip
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "LMMS_EVAL_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(
        command, cwd=folder, env=os.environ | offline, capture_output=True, text=True, check=False
    )  # fmt: skip
    found = {}
    for task in tasks.split(","):
        files = list(out.rglob(f"*_samples_{task}.jsonl"))
        assert files, done.stdout[-2000:] + done.stderr[-8000:]
        lines = sorted(map(json.loads, files[0].read_text().splitlines()), key=lambda line: int(line["doc_id"]))
        found[task] = lines
    return found


def test_it_is_answered_as_the_model_answers(asked: tuple[Dock, list[dict[str, Any]]], tmp_path: Path) -> None:
    dock, questions = asked
    answerer = Answerer(dock.model, dock.processor)
    one = [ask(q["question"], tmp_path / q["image"]) for q in questions]
    two = [
        Conversation((Message("user", (*(ImagePart(tmp_path / n) for n in (q["image"], "q1.png")), TextPart(q["question"]))),))
        for q in questions
    ]  # fmt: skip
    words = answerer.answer([ask(q["question"]) for q in questions], max_new_tokens=9)
    expected = {
        "easy_vqa_opticnerve": [a.partition("\n\n")[0] for a in answerer.answer(one, max_new_tokens=32)],
        "opticnerve_two": answerer.answer(two, max_new_tokens=5),
        "opticnerve_words": [re.split("[ou]", a)[0].strip() for a in words],
    }
    assert expected["opticnerve_words"] != words  # so that `until` has something to end
    names = ",".join(expected)
    chat = lmms_eval(tmp_path, names)
    assert {t: [line["filtered_resps"] for line in lines] for t, lines in chat.items()} == expected
    simple = lmms_eval(tmp_path, f"{names},easy_vqa_choices_opticnerve", "--force_simple")
    chosen = simple.pop("easy_vqa_choices_opticnerve")
    assert {t: [line["filtered_resps"] for line in lines] for t, lines in simple.items()} == expected
    for line, conversation in zip(chosen, one, strict=True):
        scores = answer_scores(dock.model, dock.processor, conversation, CHOICES)
        losses = [float(loss) for loss, _ in line["filtered_resps"]]
        assert losses == pytest.approx([-s for s in scores], abs=1e-4)
        assert line["acc"] == float(line["target"] == str(losses.index(min(losses))))
