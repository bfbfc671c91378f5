"""Hostile conditions on records, and tool turns on their way through a chat template."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import fuzz_mutate as hurt
from fuzz_data import look, media
from fuzz_target import Target

import tiny
from opticnerve.data.dataset.read import read
from opticnerve.data.encode.tokenize import encode
from opticnerve.data.formats.where import Where
from opticnerve.encoders.base import make_image_processor
from opticnerve.models import OpticNerveProcessor
from opticnerve.types import DataError

# -- conditions -------------------------------------------------------------------------------------------------------

ROW: dict[str, Any] = {
    "n": 4, "cell": "3.5", "word": "en", "list": [5, "3", None], "words": ["a", "b"], "meta": {"n": 2, "list": [{"n": 1}]},
    "a b": 1, "good": True, "none": None, "bytes": "x" * 40, "image": "1.png", "caption": "x",
}  # fmt: skip
TERMS = (
    "n", "cell", "word", "list", "words", "meta.n", "meta['n']", "list[0]", "list[-1]", "meta.list[0].n", "`a b`", "`a b", "good", "none",
    "absent", "min(list)", "max(words)", "len(meta)", "len(none)", "max(max(list))", "3", "-2", "3.5", "1e999", "'en'", '"\\x00"', "null",
    "true", "[1, 'x', null]", "()", "{1}", "9" * 400, "n.__class__", "__import__('os')", "n + 1", "x if y else z", "lambda: n", "f'{n}'", "...", "1j",
)  # fmt: skip
SIGNS = ("==", "!=", "<", "<=", ">", ">=", "in", "not in", "is", "is not", "=", "and", "or", "<>", "&", "is null #")


def condition(rng: random.Random, depth: int = 3) -> str:
    terms, signs = (TERMS[:11], SIGNS[:8]) if rng.random() < 0.8 else (TERMS, SIGNS)
    match rng.randrange(5) if depth else 0:
        case 0 | 1:
            return " ".join(
                [rng.choice(terms), *(f"{rng.choice(signs)} {rng.choice(terms)}" for _ in range(rng.randint(0, 2)))]
            )
        case 2:
            return f"{rng.choice(('not ', '', '-', 'min', 'len'))}({condition(rng, depth - 1)})"
        case 3:
            return f"{condition(rng, depth - 1)} {rng.choice(('and', 'or'))} {condition(rng, depth - 1)}"
    return rng.choice(("(", "not ", "n.", "[", "-")) * rng.choice((3, 60, 900)) + condition(rng, depth - 1)


def make_where(rng: random.Random) -> bytes:
    text = condition(rng).encode()
    if rng.random() < 0.3:
        text = hurt.bytes_hurt(rng, text, others=[condition(rng).encode()], most=2)
    return (
        text.replace(b"\n", b" ")
        + b"\n"
        + hurt.json_bytes(rng, [hurt.json_hurt(rng, ROW) if rng.random() < 0.7 else ROW])
    )


def run_where(data: bytes, folder: Path) -> None:
    text, _, body = data.partition(b"\n")
    where = text.decode("utf-8", "surrogateescape")
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = [ROW]
    if isinstance(found, list) and found and isinstance(found[0], dict):
        assert Where(where).keeps(found[0], dict) in (True, False)
    inside = media(folder)
    file = folder / "where.jsonl"
    file.write_bytes(json.dumps(ROW).encode())
    for conversation in read(
        file, media=inside, where=where, format="captions", ignore=["bytes"], on_error=lambda e: None
    ):
        look(conversation, inside)


# -- tool turns -------------------------------------------------------------------------------------------------------

CALL = {
    "type": "function",
    "id": "c1",
    "function": {"name": "weather", "arguments": {"place": "Bern", "days": [1, {"n": None}]}},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "x",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
TALKS: tuple[dict[str, Any], ...] = (
    {"tools": [TOOL], "images": ["1.png"], "messages": [
        {"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"sky": "blue"}', "tool_call_id": "c1", "name": "weather"}, {"role": "assistant", "content": "blue"}]},
    {"tools": json.dumps([TOOL["function"]]), "conversations": [
        {"from": "human", "value": "what?"}, {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "blue"}, {"from": "gpt", "value": "blue"}]},
    {"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
                  {"role": "function", "name": "f", "content": "x"}, {"role": "assistant", "content": "x"}]},
)  # fmt: skip


@functools.cache
def processor() -> OpticNerveProcessor:
    template = (Path(__file__).parents[1] / "templates/qwen2.5.jinja").read_text()
    pictures = make_image_processor(size=32, mean=[0.5] * 3, std=[0.5] * 3)
    return OpticNerveProcessor(pictures, tiny.tokenizer(chat_template=template), num_image_tokens=3)


def make_tools(rng: random.Random) -> bytes:
    return hurt.json_bytes(rng, hurt.json_hurt(rng, [rng.choice(TALKS) for _ in range(2)], most=4))


def run_tools(data: bytes, folder: Path) -> None:
    inside = media(folder)
    file = folder / "tools.json"
    file.write_bytes(data)
    for conversation in read(file, media=inside, on_error=lambda e: None):
        try:
            encoded = encode(conversation, processor())
        except DataError:
            continue
        assert any(label >= 0 for label in encoded.labels)


TARGETS = (
    Target("where", make_where, run_where),
    Target("tools", make_tools, run_tools),
)
