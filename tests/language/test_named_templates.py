"""The templates that a recipe names, on real tokenizers: `chatml`, `vicuna`, and the alignment form `caption`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import conversations
import real_tokenizers
from conversations import Sample
from families import Family
from opticnerve.data.encode.tokenize import encode
from opticnerve.encoders.base import make_image_processor
from opticnerve.language.chat_template import set_template, stage_template
from opticnerve.models import OpticNerveProcessor
from opticnerve.types import Message
from prompt_contract import Broken, examine, scorer

pytestmark = pytest.mark.slow
# Whether a sequence begins with the begin token: where the tokenizer writes one by itself, or the model's own template
# does. SmolLM2's begin token opens a turn of ChatML, cl100k's is its end token, and gpt-oss was trained without one.
BEGINS = {
    "llama2": True, "llama3": True, "llama3.1": True, "qwen2.5": False, "qwen3": False, "gemma2": True, "gemma3": True,
    "deepseek-v3": True, "gpt-oss": False, "mistral-v1": True, "mistral-v3": True, "mistral-v7": True, "tekken": True,
    "smollm2": False,
}  # fmt: skip


@pytest.fixture(scope="module", params=BEGINS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def words(name: str) -> Any:
    """A real tokenizer with its own template, padding as opticnerve's loader sets it."""
    made = real_tokenizers.tokenizer(name)
    if made.pad_token_id is None:
        made.pad_token = made.eos_token
    return made


@pytest.mark.parametrize("template", ["vicuna", "caption", "chatml"])
def test_named_templates(name: str, words: Any, template: str) -> None:
    end, own = words.eos_token, words.chat_template
    if template == "chatml":
        end = "<|im_end|>"
        if end not in words.get_vocab():
            words.add_tokens(["<|im_start|>", end], special_tokens=True)
    pictures = make_image_processor(size=8, mean=[0.5] * 3, std=[0.5] * 3)
    if template == "caption":
        form = stage_template("caption", words)
    else:
        set_template(words, template)
        form = None
    proc = OpticNerveProcessor(pictures, words, num_image_tokens=2, chat_template=form)
    words.chat_template = own
    family = Family(name, "own", (end,))
    begin, others = words.bos_token_id, []

    def check(sample: Sample) -> None:
        if template == "caption":  # a picture and its caption, and nothing else
            user = Message("user", (conversations.PICTURES[0],))
            sample = Sample(replace(sample.conversation, messages=(user, sample.conversation.messages[-1])))
        examine(family, proc, sample)
        ids = encode(sample.conversation, proc).input_ids
        if BEGINS[name] and ids[0] != begin:
            raise Broken("no begin token")
        if BEGINS[name] and begin in ids[1:]:
            raise Broken("two begin tokens")
        others.append(ids[0] == begin)

    scorer(f"{name} with {template}", conversations.samples(60, seed=4), check)
    if name in ("qwen2.5", "qwen3", "smollm2") and template == "vicuna":
        assert not any(others)
