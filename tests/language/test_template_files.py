"""The files under `tests/templates` write what the real templates of their models write."""

from __future__ import annotations

import pytest
from jinja2 import TemplateError

import conversations
import real_tokenizers
import tiny

# Where the real one is, if a package has it. A comment says what the others are checked by.
REAL = {
    "gemma": "gguf:gemma2:2b",
    "llama-2": "gguf:llama2:7b",
    "llama-3": "trl:llama3",
    "phi-3": "trl:phi3",
    "qwen2.5": "trl:qwen2_5",
    "qwen3": "trl:qwen3",
    "smollm2": "gguf:smollm2:135m",
    "zephyr": "gguf:tinyllama:1.1b",  # TinyLlama was trained with Zephyr's
}


@pytest.mark.parametrize("name", REAL)
def test_a_template_of_ours_writes_what_the_real_one_writes(name: str) -> None:
    ours, real = real_tokenizers.template(f"file:{name}"), real_tokenizers.template(REAL[name])
    words = tiny.tokenizer(bos="<s>", eos="</s>")

    def written(template: str, chat: list[dict[str, str]], cue: bool) -> str:
        try:
            return str(
                words.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=cue)
            )
        except TemplateError:
            return "refused"

    for sample in conversations.samples(120, seed=6):
        chat = [{"role": m.role, "content": m.text} for m in sample.conversation.messages]
        assert written(ours, chat, False) == written(real, chat, False)
        assert written(ours, chat[:-1], True) == written(real, chat[:-1], True)
