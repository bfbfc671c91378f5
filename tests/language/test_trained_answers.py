"""A model answers its own training questions, whatever its tokenizer and template write between prompt and answer.

A tiny language model with a real tokenizer is trained on four pictures until it knows their answers by heart, with the
project's own loop, and then asked as `ask` asks. A token that is read in training, and neither prompted nor learned,
shows here as a wrong answer at a low loss.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import transformers as tf

import families
from families import FAMILIES
from opticnerve import recipe as recipes
from opticnerve.inference.generate import Answerer
from opticnerve.models.vlm.build import dock_recipe
from opticnerve.train.loop import run_stage
from opticnerve.types import Conversation, ask

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("private_cache")]
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 160, 30), "yellow": (230, 210, 40)}
# By question: what a word, a digit, a kanji and a parenthesis do to the space before them differs by tokenizer.
ANSWERS = {
    "Which?": ("ruby", "sea", "grass", "sun"),
    "What?": ("42", "7", "犬です", "(a) frog"),
}
# One family for each way in which a tokenizer and a template meet; (family, recipe's options of the language model).
ASKED = {
    "qwen-3": {},
    "qwq, keep": {"thinking": "keep"},
    "llama-2": {},
    "llama-2, vicuna": {"chat_template": "vicuna"},
    "llama-3, vicuna": {"chat_template": "vicuna"},
    "mistral-v0.1": {},
    "mistral-v0.3": {},
    "gemma-2": {},
    "deepseek-v3, vicuna": {"chat_template": "vicuna"},
    "deepseek-r1-distill, empty": {"thinking": "empty"},
    "gpt-oss": {},
    "phi-3": {},
    "smollm2": {},
}


def questions(folder: Path) -> Path:
    lines = []
    for i, (colour, rgb) in enumerate(COLOURS.items()):
        PIL.Image.new("RGB", (32, 32), rgb).save(folder / f"{colour}.png")
        lines += [{"image": f"{colour}.png", "question": q, "answer": answers[i]} for q, answers in ANSWERS.items()]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def save_language(folder: Path, name: str) -> str:
    """A tiny Llama with a family's real tokenizer: its whole table, at a width that makes it small."""
    words = families.tokenizer(FAMILIES[name])
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("case", ASKED)
def test_it_answers_what_it_learned(case: str, vision_folder: Callable[..., str], tmp_path: Path) -> None:
    data = questions(tmp_path)
    language: dict[str, Any] = {"name": save_language(tmp_path / "language", case.partition(",")[0]), **ASKED[case]}
    stage = {
        "name": "learn", "train": {"connector": 1e-2, "language": 1e-2}, "data": [{"path": str(data)}],
        "batch_size": 8, "steps": 220 if case == "gpt-oss" else 150,
    }  # fmt: skip
    encoder = {"type": "hf_vision", "name": vision_folder()}
    recipe = recipes.load({
        "seed": 0, "precision": "fp32", "stages": [stage], "model": {"language": language, "image": {"encoder": encoder}},
    })  # fmt: skip
    made = dock_recipe(recipe)
    folder = tmp_path / "run"
    run_stage(made, recipe, recipe.stages[0], folder, trained_before=set(), resume=False)
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.1
    asked: list[Conversation] = [ask(q, tmp_path / f"{c}.png") for q in ANSWERS for c in COLOURS]
    wanted = [answer for answers in ANSWERS.values() for answer in answers]
    assert Answerer(made.model, made.processor).answer(asked, max_new_tokens=16) == wanted
