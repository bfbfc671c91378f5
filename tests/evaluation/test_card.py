from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import yaml

from errors import refused
from opticnerve.common import drawing
from opticnerve.common.drawing import smooth
from opticnerve.runs.card import plots
from opticnerve.runs.card.card import write_card
from opticnerve.runs.card.plots import samples_plot
from opticnerve.runs.folder import read_metrics
from opticnerve.types import DataError


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_DPI", 60)


def edit(run_dir: Path, **changes: object) -> None:
    path = run_dir / "results.json"
    results = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in results.items() if v is not None}))


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_finished_run_is_told_in_full(run_dir: Path) -> None:
    card = write_card(run_dir).read_text()
    front = front_matter(card)
    assert front["pipeline_tag"] == "image-text-to-text" and front["library_name"] == "opticnerve"
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.951
    for said in (
        "95.1%", "always “no”", "37.1%", "94.1% – 96.0%", "+44.0 points", "+2.00%", "yes, bit by bit", "517,248", "3 × 128 × 128", "16 × 576",
        "2.98 GiB", "opticnerve demo", 'opticnerve ask', "AutoModelForImageTextToText",
        "**tf_efficientnet_lite0**", "from_pretrained(\"demo\")",
    ):  # fmt: skip
        assert said in card, said
    assert "WARNING" not in card and "unfinished" not in card
    linked = {run_dir / line.split("](")[1].rstrip(")") for line in card.splitlines() if line.startswith("![")}
    assert {p.name for p in linked} == {"loss-align.png", "loss-instruct.png", "image-dependence.png", "samples.png"}
    for plot in linked:
        with PIL.Image.open(plot) as picture:
            assert picture.width > 300 and len(picture.convert("RGB").getcolors(1 << 24) or []) > 50


def test_curves_are_drawn_where_there_are_new_steps(run_dir: Path) -> None:
    write_card(run_dir)
    files = [run_dir / "plots" / f"loss-{name}.png" for name in ("align", "instruct")]
    before = [f.stat().st_mtime_ns for f in files]
    with (run_dir / "stages/1-instruct/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 126, "loss": 9.0}) + "\n")
    write_card(run_dir)
    assert [f.stat().st_mtime_ns > was for f, was in zip(files, before, strict=True)] == [False, True]


def test_a_model_that_does_not_look_gets_the_warning(run_dir: Path) -> None:
    edit(run_dir, image_dependence={"n": 500, "real": 0.90, "blank": 0.86, "shuffled": 0.87})
    card = write_card(run_dir).read_text()
    assert "> [!WARNING]" in card and "DO NOT DEPEND ON THE PICTURE" in card
    assert card.index("WARNING") < card.index("## What was docked")


@pytest.mark.parametrize(
    "key",
    ["model", "tasks", "image_dependence", "forgetting", "stages", "seconds", "peak_memory_bytes", "machine", "seed"],
)
def test_any_missing_result_leaves_a_card(run_dir: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "save", lambda figure, path: path)  # rendering takes longer than all the rest
    edit(run_dir, **{key: None})
    card = write_card(run_dir).read_text()
    if key in {"tasks", "image_dependence", "forgetting", "model"}:
        assert "yet" in card
    assert ("unfinished" in card) == (key == "stages")


def test_an_empty_run_folder_leaves_a_card(tmp_path: Path) -> None:
    card = write_card(tmp_path).read_text()
    assert "not evaluated yet" in card and "No stage has begun" in card


def test_no_results_and_a_stage_without_steps(run_dir: Path) -> None:
    (run_dir / "results.json").unlink()
    shutil.rmtree(run_dir / "stages" / "1-instruct")
    (run_dir / "stages" / "1-instruct").mkdir()
    card = write_card(run_dir).read_text()
    assert "Stage `instruct` has no steps yet" in card and "(unfinished)" in card


def test_what_others_wrote_does_not_become_layout(run_dir: Path) -> None:
    card = write_card(run_dir).read_text()
    row = next(line for line in card.splitlines() if "of course" in line)
    assert row.count(" | ") == 3 and "\\*of course\\*" in row


def test_a_missing_folder_and_broken_json_are_named(tmp_path: Path) -> None:
    with refused("missing-file", tmp_path / "nowhere"):
        write_card(tmp_path / "nowhere")
    (tmp_path / "results.json").write_text('{"tasks": [')
    with refused("damaged", tmp_path / "results.json"):
        write_card(tmp_path)


def test_metrics_of_a_killed_and_resumed_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 2, "loss": 1}\n{"step": 3, "lo')
    assert [(m["step"], m["loss"]) for m in read_metrics(path)] == [(1, 3), (2, 1)]
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with refused("damaged", "metrics.jsonl:2", error=DataError):
        read_metrics(path)


def test_smoothing_keeps_a_constant_and_skips_what_is_not_finite() -> None:
    assert np.allclose(smooth(np.full(200, 1.5)), 1.5)
    assert np.allclose(smooth(np.array([np.nan, 2.0, np.nan, 2.0]))[1:], 2.0)


def test_a_loss_that_is_not_finite_is_said(run_dir: Path) -> None:
    path = run_dir / "stages" / "0-align" / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": Infinity}\n')
    assert (write_card(run_dir).parent / "plots" / "loss-align.png").is_file()


def test_samples_with_a_lost_picture_odd_sizes_and_dollar_signs(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (300, 90), "teal").save(tmp_path / "wide.png")
    samples = [
        {"image": None, "question": "why $x_1$?", "answer": "a", "prediction": "", "right": False},
        {"image": "wide.png", "question": "", "answer": "a", "prediction": "$b", "right": True},
        {"image": "lost.png", "question": "a caption", "answer": "b", "prediction": "c"},
    ]
    assert samples_plot(samples, tmp_path / "s.png", folder=tmp_path, title="odd").is_file()


def test_captions_and_yes_no_have_their_own_tables(run_dir: Path) -> None:
    described = {"name": "pictures", "harness": "captions", "n": 300, "cider": 0.8123, "bleu4": 0.2, "rouge_l": 0.4567}
    asked = {"name": "pope", "harness": "POPE's rule", "n": 1000, "accuracy": 0.8, "ci95": [0.77, 0.82]}
    shares = {"precision": 0.71, "recall": 0.92, "f1": 0.8015, "yes_share": 0.634}
    never = {"precision": None, "recall": 0.0, "f1": 0.0, "yes_share": 0.0}
    edit(run_dir, tasks=[described, asked | shares, asked | never | {"name": "never yes"}])
    card = write_card(run_dir).read_text()
    assert "| captions | n | CIDEr | BLEU-4 | ROUGE-L |" in card
    assert "| **pictures** | 300 | 0.812 | 0.200 | 0.457 |" in card
    assert "| yes or no | n | precision of yes | recall of yes | F1 | share of yes |" in card
    assert "| **pope** | 1,000 | 71.0% | 92.0% | 80.2% | 63.4% |" in card
    assert "| **never yes** | 1,000 | – | 0.0% | 0.0% | 0.0% |" in card
    # A run of before ROUGE-L was measured.
    edit(run_dir, tasks=[{k: v for k, v in described.items() if k != "rouge_l"}])
    assert "| **pictures** | 300 | 0.812 | 0.200 | – |" in write_card(run_dir).read_text()
