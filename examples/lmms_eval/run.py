"""The same questions to the same model under lmms-eval and under `opticnerve eval`: the answers must be the same ones.

    pip install opticnerve lmms-eval==0.7.3 easy-vqa
    python examples/lmms_eval/run.py             # the starter model, 20 questions about shapes
    python examples/lmms_eval/run.py runs/demo --questions 200

The questions, the pictures and all results stand in `--folder` afterwards. Ends with 1 if an answer differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

TASKS = Path(__file__).resolve().parent / "tasks"
TASK, CHOICES = "easy_vqa_opticnerve", "easy_vqa_choices_opticnerve"


def write_questions(folder: Path, count: int) -> Path:
    """`count` of easy-VQA's test questions, evenly spread, in the form that `opticnerve eval --data` reads."""
    import easy_vqa

    texts, answers, pictures = easy_vqa.get_test_questions()
    paths, choices = easy_vqa.get_test_image_paths(), sorted(easy_vqa.get_answers())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "questions.jsonl"
    lines = []
    for n in (i * len(texts) // count for i in range(count)):
        picture = Path(paths[pictures[n]])
        shutil.copy(picture, folder)
        lines.append({"image": picture.name, "question": texts[n], "answer": answers[n], "choices": choices})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def lmms_eval(folder: Path, model: str, task: str, batch_size: int, *options: str) -> list[dict[str, Any]]:
    """What lmms-eval notes of each question."""
    out = folder / task
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "opticnerve", "--model_args", f"pretrained={model}",
        "--tasks", task, "--include_path", str(TASKS), "--batch_size", str(batch_size),
        "--output_path", str(out), "--log_samples", *options,
    ]  # fmt: skip
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "LMMS_EVAL_DATASETS_CACHE": str(folder / "cache")}
    emit(" ".join(command))
    subprocess.run(command, cwd=folder, check=True, env=os.environ | offline)
    newest = max(out.rglob(f"*_samples_{task}.jsonl"), key=lambda p: p.stat().st_mtime)
    lines = [json.loads(line) for line in newest.read_text(encoding="utf-8").splitlines()]
    return sorted(lines, key=lambda line: int(line["doc_id"]))


def own(data: Path, model: str, metric: str) -> dict[str, Any]:
    """The one task of `opticnerve eval`'s results."""
    out = data.with_name(f"{metric}.json")
    command = [
        sys.executable, "-m", "opticnerve_launch", "eval", model, "--data", str(data), "--metric", metric,
        "--out", str(out),
    ]  # fmt: skip
    emit(" ".join(command))
    subprocess.run(command, check=True)
    [task] = json.loads(out.read_text(encoding="utf-8"))["tasks"]
    return dict(task)


def compare(found: dict[str, Any], samples: list[dict[str, Any]]) -> tuple[float, list[str]]:
    """lmms-eval's accuracy, and what it answered otherwise than `opticnerve eval`."""
    theirs = {line["input"] + Path(line["input_media"][0]).name: line["filtered_resps"] for line in samples}
    ours = {s["question"] + Path(s["image"]).name: s["prediction"] for s in found["samples"]}
    different = [f"{k}: {ours[k]!r} here, {theirs[k]!r} under lmms-eval" for k in ours if ours[k] != theirs[k]]
    return sum(line["accuracy"] for line in samples) / len(samples), different


def emit(*lines: str) -> None:
    sys.stdout.write("\n  ".join(lines) + "\n")
    sys.stdout.flush()


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("model", nargs="?", default="starter")
    given.add_argument("--folder", type=Path, default=Path("lmms-eval"))
    given.add_argument("--questions", type=int, default=20)
    given.add_argument("--batch-size", type=int, default=8)
    args = given.parse_args()
    folder, model = args.folder.resolve(), args.model
    model = str(Path(model).resolve()) if Path(model).exists() else model
    data = write_questions(folder, args.questions)
    answered, chosen = own(data, model, "vqa"), own(data, model, "multiple_choice")
    accuracy, different = compare(answered, lmms_eval(folder, model, TASK, args.batch_size))
    choices = lmms_eval(folder, model, CHOICES, args.batch_size, "--force_simple")
    by_likelihood = sum(line["acc"] for line in choices) / len(choices)
    emit(f"\n{'':<24}opticnerve eval   lmms-eval")
    emit(f"{'accuracy, generated':<24}{answered['accuracy']:<18.4f}{accuracy:.4f}")
    emit(f"{'accuracy, by likelihood':<24}{chosen['accuracy']:<18.4f}{by_likelihood:.4f}")
    emit(f"{len(answered['samples'])} answers compared one by one, {len(different)} differ", *different)
    sys.exit(bool(different) or (accuracy, by_likelihood) != (answered["accuracy"], chosen["accuracy"]))


if __name__ == "__main__":
    main()
