"""No library's warning reaches a user: the commands run with all warnings on, and every log is listened to."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
import yaml

import checkpoints
import tiny
from opticnerve.cli.main import main

pytestmark = pytest.mark.slow
LIBRARIES = ("transformers", "huggingface_hub", "datasets", "peft", "timm", "accelerate", "matplotlib", "torch", "PIL")


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name}: {record.getMessage()}")


@contextmanager
def heard() -> Iterator[list[str]]:
    """What libraries warn of within the block."""
    kept = _Kept()
    loggers = [logging.getLogger(name) for name in ("", *LIBRARIES)]
    for logger in loggers:
        logger.addHandler(kept)
    try:
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", ResourceWarning)
            yield kept.lines
        kept.lines += [f"{w.filename}:{w.lineno}: {w.category.__name__}: {w.message}" for w in raised]
    finally:
        for logger in loggers:
            logger.removeHandler(kept)


def run(*words: str) -> None:
    with heard() as lines, pytest.raises(SystemExit) as left:
        main(list(words))
    assert not left.value.code, words
    assert list(dict.fromkeys(lines)) == [], words


def as_published(language: str, folder: Path) -> str:
    """A language model whose files say what those of the hub do: sampling by default, a tokenizer's own length."""
    shutil.copytree(language, folder)
    changes: dict[str, dict[str, Any]] = {
        "generation_config.json": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8,
                                   "repetition_penalty": 1.05},
        "tokenizer_config.json": {"model_max_length": 16},
        "config.json": {"torch_dtype": "bfloat16"},
    }  # fmt: skip
    for name, change in changes.items():
        file = folder / name
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        file.write_text(json.dumps(found | change), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def work(
    tmp_path_factory: pytest.TempPathFactory, language_folder: Callable[..., str], vision_folder: Callable[..., str],
    bert_folder: str, private_cache: Path,
) -> Iterator[Path]:  # fmt: skip
    folder = tmp_path_factory.mktemp("quiet")
    tiny.save_captions(folder)
    tiny.save_questions(folder)
    checkpoints.save_llava(folder / "llava")
    stage = {"steps": 1, "batch_size": 2, "data": [{"path": "questions.jsonl"}], "gradient_checkpointing": True}
    recipe = {
        "precision": "fp32",
        "model": {
            "language": {"name": as_published(language_folder(), folder / "language")},
            "image": {"encoder": {"type": "hf_vision", "name": vision_folder()}},
        },
        "stages": [
            {"name": "align", **stage, "train": {"connector": 1e-3}, "data": [{"path": "captions.jsonl"}]},
            {"name": "tune", **stage, "train": {"connector": 1e-3, "language.lora": 1e-3}},
        ],
        "evaluate": [{"name": "questions", "data": {"path": "questions.jsonl"}, "max_new_tokens": 2}],
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def test_from_the_plan_to_other_formats(work: Path) -> None:
    asked = ("what colour? " * 12, "--image", "0.png", "--max-new-tokens", "2")
    for words in (
        ("plan", "recipe.yaml"), ("plan", "recipe.yaml", "--calibrate", "precision=bf16"), ("data", "check", "recipe.yaml"),
        ("data", "show", "recipe.yaml"), ("train", "recipe.yaml", "--out", "run"),
        ("eval", "run", "--data", "questions.jsonl", "--image-dependence", "2"), ("ask", "run", *asked),
        ("look", "run", *asked), ("merge", "run", "merged"), ("ask", "merged", *asked),
        ("export", "merged", "exported", "--to", "hf-llava"), ("import", "llava", "imported"), ("ask", "imported", *asked),
    ):  # fmt: skip
        run(*words)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_other_language_models(family: str, work: Path, language_folder: Callable[..., str]) -> None:
    run("train", "recipe.yaml", f"model.language.name={language_folder(family)}", "--out", family)


def test_a_connector_that_starts_from_a_bert(work: Path, bert_folder: str) -> None:
    run("plan", "recipe.yaml", "--calibrate", f"model.image.connector={{type: qformer, bert: {bert_folder}}}")


def test_an_eye_of_a_model_with_more_to_it(work: Path) -> None:
    """SigLIP's published configuration names a text tower's tokens beyond its vocabulary."""
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = tf.SiglipConfig(text_config=sizes, vision_config={**sizes, "image_size": 32, "patch_size": 8})
    tf.SiglipModel(config).save_pretrained("siglip")
    tf.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained("siglip")
    run("plan", "recipe.yaml", "--calibrate", "model.image.encoder.name=siglip")
