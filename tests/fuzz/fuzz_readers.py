"""Hostile files for the readers of several: shards, saved tables, folders, a second file of answers, all of them by index
and, where they can be, as a stream; conditions on records; and tool turns on their way through a chat template."""

from __future__ import annotations

import functools
import gzip
import io
import json
import random
import shutil
import tarfile
from pathlib import Path
from typing import Any

import fuzz_mutate as hurt
import PIL.Image
from fuzz_data import GOOD, look, media
from fuzz_target import Target

import tiny
from opticnerve.data.dataset.load import load_data, stream_data
from opticnerve.data.dataset.read import read
from opticnerve.data.encode.tokenize import encode
from opticnerve.data.formats.where import Where
from opticnerve.encoders.base import make_image_processor
from opticnerve.models import OpticNerveProcessor
from opticnerve.recipe.loading import data_entry
from opticnerve.types import DataError

FOLDERS = {
    "tar": "shards/0.tar", "tar.gz": "shards/0.tar.gz", "answers": "answers.json", "questions": "questions.json",
    "arrow": "saved/data-00000-of-00001.arrow", "info": "saved/dataset_info.json", "state": "saved/state.json",
    "text": "pictures/a/1.txt", "picture": "pictures/a/1.png", "metadata": "listed/metadata.csv", "lines": "listed/metadata.jsonl",
}  # fmt: skip
"""Which file of a folder is the hostile one."""
ROWS = [{"question_id": n, "image": "1.png", "question": "what?"} for n in range(3)]
ANSWERS = [{"question_id": n, "answers": [{"answer": "x"}]} for n in range(3)]


@functools.cache
def picture() -> bytes:
    out = io.BytesIO()
    PIL.Image.new("RGB", (4, 4)).save(out, "PNG")
    return out.getvalue()


@functools.cache
def shard(kind: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in (
            ("a.png", picture()), ("a.txt", b"x"), ("b.json", json.dumps(GOOD[kind][0]).encode()), ("b.1.png", picture()),
            ("c.json", b'{"caption": null, "url": "http://x.org/c.png"}'), ("c.txt", b"x"), ("c.png", picture()), ("é/d.cls", b"1"),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


@functools.cache
def saved() -> dict[str, bytes]:
    """The files of a folder written by `datasets`."""
    import tempfile

    import datasets

    with tempfile.TemporaryDirectory() as made:
        datasets.Dataset.from_list([{"image": "1.png", "caption": "x", "n": [1, 2]}] * 3).save_to_disk(made)
        return {f"saved/{file.name}": file.read_bytes() for file in Path(made).iterdir()}


def make_folder(rng: random.Random) -> bytes:
    kind = rng.choice(list(FOLDERS))
    said = rng.choice(list(GOOD))
    good = {
        "tar": shard(said), "tar.gz": shard(said), "answers": json.dumps({"annotations": ANSWERS}).encode(), "questions": json.dumps({"questions": ROWS}).encode(),
        "text": "a dog é".encode(), "picture": picture(), "metadata": b"file_name,caption\n1.png,x\n2.png,y\n",
        "lines": b'{"file_name": "1.png", "caption": "x"}\n' * 2,
    }.get(kind) or saved()[FOLDERS[kind]]  # fmt: skip
    if kind in ("answers", "questions") and rng.random() < 0.5:
        key = "annotations" if kind == "answers" else "questions"
        data = hurt.json_bytes(rng, hurt.json_hurt(rng, {key: ANSWERS if kind == "answers" else ROWS}))
    else:
        data = hurt.bytes_hurt(rng, good, others=[shard(said)], most=3)
    return f"{kind}\n".encode() + (gzip.compress(data, 1) if kind == "tar.gz" and rng.random() < 0.7 else data)


def run_folder(data: bytes, folder: Path) -> None:
    head, _, body = data.partition(b"\n")
    kind = head.decode("ascii", "replace")
    if kind not in FOLDERS:
        return
    inside, hostile = media(folder), FOLDERS[kind]
    place = folder / "data"
    shutil.rmtree(place, ignore_errors=True)
    beside = {
        "shards": {}, "saved": saved(), "pictures": {"pictures/a/1.png": picture(), "pictures/a/1.txt": b"x"},
        "listed": {"listed/1.png": picture()},
    }.get(hostile.partition("/")[0]) or {"questions.json": json.dumps(ROWS).encode(), "answers.json": json.dumps(ANSWERS).encode()}  # fmt: skip
    for name, content in {**beside, hostile: body}.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    given: dict[str, Any] = {"path": str(place / hostile.partition("/")[0]), "media": str(inside), "frames": 2}
    if kind in ("answers", "questions"):
        given |= {"path": str(place / "questions.json"), "annotations": str(place / "answers.json")}
    if kind in ("text", "picture", "metadata", "lines"):
        del given["media"]
        inside = place
    errors: list[DataError] = []
    for sample in load_data(data_entry(given), on_error=errors.append):  # by index: each reader's `at`
        look(sample, inside)
    if kind in ("tar", "tar.gz"):
        streamed = {**given, "path": str(place / hostile), "streaming": True}
        for sample in stream_data(data_entry(streamed), on_error=errors.append):
            look(sample, inside)
    for error in errors:
        assert len(str(error)) < 2_000


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
    match rng.randrange(5) if depth else 0:
        case 0 | 1:
            return " ".join(
                [rng.choice(TERMS), *(f"{rng.choice(SIGNS)} {rng.choice(TERMS)}" for _ in range(rng.randint(0, 2)))]
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
    Target("folders", make_folder, run_folder),
    Target("where", make_where, run_where),
    Target("tools", make_tools, run_tools),
)
