"""A tokenizer on the disk that is the one in memory: what it makes of words is what was trained on."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from opticnerve.types import OpticNerveError

# What tokenizers differ in: first spaces, white space, line breaks, digits, other scripts, beside special tokens.
_PROBES = ("dog", " dog", "42 犬です", "a\n\n b\t(c)", "🦊 é")


def keep_arguments(tokenizer: Any) -> None:
    """Have a tokenizer write down all arguments of its constructor: Llama's forgets `legacy`, by which it spaces words
    behind special tokens."""
    for name in inspect.signature(type(tokenizer).__init__).parameters:
        value = getattr(tokenizer, name, None)
        if name not in tokenizer.init_kwargs and isinstance(value, bool | int | float | str):
            tokenizer.init_kwargs[name] = value


def check_saved(tokenizer: Any, folder: Path) -> None:
    """Refuse a folder from which another tokenizer would come back.

    Raises:
        OpticNerveError: it makes other tokens of some words than the one in memory.
    """
    again = AutoTokenizer.from_pretrained(folder)
    marks = ["", *{t for t in (tokenizer.bos_token, tokenizer.eos_token, *tokenizer.all_special_tokens[-2:]) if t}]
    for text in [mark + probe for mark in marks for probe in _PROBES]:
        now, then = tokenizer(text)["input_ids"], again(text)["input_ids"]
        if now != then:
            a, b = tokenizer.convert_ids_to_tokens(now), again.convert_ids_to_tokens(then)
            raise OpticNerveError(
                f"the tokenizer comes back from {folder} as another: of {text!r} it makes {a}, saved and loaded {b}; "
                "save it as transformers' PreTrainedTokenizerFast (its tokenizer.json says all), and dock with that"
            )
