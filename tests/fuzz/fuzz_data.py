"""Hostile data files: bytes of each format, records with values of wrong types, and paths that lead elsewhere."""

from __future__ import annotations

import functools
import io
import json
import os
import random
from pathlib import Path
from typing import Any

import fuzz_mutate as hurt
import PIL.Image
from fuzz_target import Target

from opticnerve.data.dataset.read import read
from opticnerve.data.formats.rules import REPAIRS
from opticnerve.data.media.open import open_image
from opticnerve.registry import data_formats
from opticnerve.types import Conversation, DataError, Frame, ImagePart

FORMATS = ("auto", *data_formats)
GOOD: dict[str, list[dict[str, Any]]] = {
    "captions": [{"image": "1.png", "caption": "a red circle"}, {"file_name": "2.png", "captions": ["a", "b"]}],
    "vqa": [
        {"image": "1.png", "question": "what shape?", "answer": "circle", "type": "shape"},
        {"image": ["1.png", "2.png"], "question": "same?", "answers": ["no", {"answer": "no"}], "id": 7},
    ],
    "llava": [
        {"id": "a", "image": "1.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}]},
        {"video": "clip", "system": "be brief", "conversations": [{"from": "human", "value": "<video> What?"}, {"from": "gpt", "value": "x"}]},
    ],
    "chat": [
        {"messages": [
            {"role": "user", "content": [{"type": "image", "image": "1.png"}, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": "a circle"}]},
        {"images": ["1.png"], "videos": ["clip"], "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "audio", "path": "1.png"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "x"}]}]},
    ],
    "completion": [
        {"images": ["1.png"], "prompt": "<image> what?", "completion": "x", "weight": 1},
        {"image_path": "1.png", "prompt": [{"role": "user", "content": "what?"}], "completion": [{"role": "assistant", "content": "x", "loss": True}]},
    ],
    "preference": [
        {"picture": "1.png", "prompt": "what?", "chosen": "x", "rejected": "y"},
        {"prompt": [{"role": "user", "content": "<img>1.png</img> what?"}], "chosen": [{"role": "assistant", "content": "x"}], "rejected": "y"},
    ],
    "choices": [
        {"image": "1.png", "question": "which?", "options": ["x", "y"], "answer": "B"},
        {"image": "1.png", "question": "which?", "A": "x", "B": "y", "answer": 1, "train": True},
        {"image_1": "1.png", "question": "<image 1> which?", "options": "['x', 'y']", "answer": "B", "hint": "look"},
        {"image": "1.png", "question": "which?", "choices": ["x", "y"], "correct_choice_idx": 1, "direct_answers": ["y"]},
    ],
    "texts": [
        {"images": ["1.png"], "texts": [{"user": "what?", "assistant": "x", "source": "y"}], "relevance_ratings": [5]},
        {"images": [], "texts": [{"user": "what?", "assistant": "x", "system": "be brief"}]},
    ],
    "instruction": [
        {"image": "1.png", "instruction": "look", "input": "what?", "output": "x", "history": [["a", "b"]]},
        {"query": "what?", "response": "x", "history": [["a", "b"]], "images": ["1.png"]},
    ],
    "layouts": [
        {"imgname": "1.png", "query": "what?", "label": "x"},
        {"image": "1.png", "text": "{\"question\": \"what?\", \"chosen\": \"x\", \"rejected\": \"y\"}"},
        {"filepath": ".", "filename": "1.png", "sentences": [{"raw": "x"}, "y"], "split": "train"},
        {"images": ["1.png"], "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}], "rejected_response": "y"},
        {"id": 1, "qas": [{"question": "what?", "answer": "x"}], "image": "1.png"},
    ],
}  # fmt: skip
COCO = {"images": [{"id": 1, "file_name": "1.png"}], "annotations": [{"id": 1, "image_id": 1, "caption": "x"}] * 2}


def media(folder: Path) -> Path:
    """A media folder, a secret beside it, and in the folder all sorts of ways out of it."""
    inside = folder / "media"
    if not inside.exists():
        (inside / "clip").mkdir(parents=True)
        for place in ("1.png", "2.png", "clip/0.png", "clip/1.png"):
            PIL.Image.new("RGB", (4, 4)).save(inside / place)
        PIL.Image.new("RGB", (4, 4), "red").save(folder / "secret.png")
        (folder / "secret").mkdir()
        PIL.Image.new("RGB", (4, 4), "red").save(folder / "secret/0.png")
        (inside / "link.png").symlink_to(folder / "secret.png")
        (inside / "up").symlink_to(folder)
        (inside / "loop").symlink_to(inside / "loop")
        (inside / "zero").symlink_to("/dev/zero")
        (inside / "clip2").mkdir()
        (inside / "clip2/0.png").symlink_to(folder / "secret.png")
        os.mkfifo(inside / "pipe.png")
    return inside


def look(conversation: Conversation, inside: Path) -> None:
    """What was accepted lies within the media folder, and can be opened, or says why not."""
    for part in conversation.pieces:
        source = part.source.source if isinstance(part.source, Frame) else part.source
        if isinstance(source, Path):
            assert source.resolve().is_relative_to(inside.resolve()), f"read from outside: {source}"
        if isinstance(part, ImagePart):
            try:
                opened = open_image(part.source, where=conversation.where)
            except DataError:
                continue
            assert opened.getpixel((0, 0)) != (255, 0, 0), f"the secret was read: {part.source}"


# -- the bytes of a file: a line that says its suffix and the format, and the file ------------------------------------


@functools.cache
def parquet(kind: str) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{k: json.dumps(v) for k, v in GOOD[kind][0].items()}] * 3), out)
    return out.getvalue()


def written(suffix: str, records: list[Any]) -> bytes:
    if suffix == "parquet":
        return parquet("captions")
    if suffix in ("csv", "tsv", "txt", "token"):
        separator = "," if suffix == "csv" else "\t"
        rows = [[str(v) for v in r.values()] for r in records if isinstance(r, dict)]
        names = list(records[0]) if records and isinstance(records[0], dict) else ["image"]
        return "\n".join(separator.join(map(str, row)) for row in [names, *rows]).encode("utf-8", "surrogatepass")
    lines = [json.dumps(r) for r in records]
    return ("[" + ",\n".join(lines) + "]" if suffix == "json" else "\n".join(lines)).encode()


def objects(rng: random.Random, rows: list[dict[str, Any]]) -> bytes:
    """A JSON object that holds records: under a key, by their ids, or as Karpathy's splits."""
    said = {"filename": "1.png", "sentences": [{"raw": "x"}], "split": "train"}
    kinds: tuple[dict[str, Any], ...] = (
        {"info": {}, "data_subtype": "train2014", "data": rows}, {str(n): row for n, row in enumerate(rows)},
        {"images": [said] * 2, "dataset": "coco"}, {"annotations": rows, "info": "x"},
    )  # fmt: skip
    return json.dumps(rng.choice(kinds), indent=rng.choice((None, 1))).encode()


WITHOUT_HEADER = b'1.png#0\tx, y, z\n2.png#1\t"open\n1.png\thttps://x.org/1.png\n'


def make_file(rng: random.Random) -> bytes:
    suffix = rng.choice(("jsonl", "jsonl", "json", "json", "csv", "tsv", "txt", "token", "parquet"))
    kind = rng.choice(list(GOOD))
    good = written(suffix, GOOD[kind])
    if suffix in ("txt", "token") and rng.random() < 0.7:
        good = WITHOUT_HEADER
    elif suffix in ("json", "jsonl") and rng.random() < 0.3:
        good = objects(rng, GOOD[kind])
    if suffix == "json" and rng.random() < 0.3:
        good = rng.choice((json.dumps(COCO, indent=rng.choice((None, 1))).encode(), written("jsonl", GOOD[kind])))
    data = hurt.bytes_hurt(rng, good, others=[written("json", GOOD["chat"]), parquet(kind)])
    if suffix in ("json", "jsonl") and rng.random() < 0.1:
        data = hurt.json_bytes(rng, GOOD[kind])
    return f"{suffix} {rng.choice((*FORMATS, 'hf'))}\n".encode() + data


def run_file(data: bytes, folder: Path) -> None:
    head, _, body = data.partition(b"\n")
    suffix, _, format = head.decode("ascii", "replace").partition(" ")
    if suffix not in ("jsonl", "json", "csv", "tsv", "txt", "token", "parquet"):
        return
    inside = media(folder)
    file = folder / f"data.{suffix}"
    file.write_bytes(body)
    errors: list[DataError] = []
    repair = list(REPAIRS) if len(body) % 2 else []
    for conversation in read(
        file, format=format or "auto", media=inside, frames=2, repair=repair, on_error=errors.append
    ):
        look(conversation, inside)
    for error in errors:
        assert len(str(error)) < 2_000


# -- records as JSON says them, with values of wrong types ------------------------------------------------------------


def make_records(rng: random.Random) -> bytes:
    kind = rng.choice(list(GOOD))
    named = kind if kind in FORMATS else "vqa"
    return f"{rng.choice(('auto', named))}\n".encode() + hurt.json_bytes(rng, hurt.json_hurt(rng, GOOD[kind], most=4))


def run_records(data: bytes, folder: Path) -> None:
    format, _, body = data.partition(b"\n")
    run_file(b"json " + format + b"\n" + body, folder)


# -- paths ------------------------------------------------------------------------------------------------------------

PIECES = (
    "..", ".", "/", "//", "\\", "..\\", "1.png", "secret.png", "link.png", "up", "loop", "zero", "pipe.png", "clip", "clip2", "media",
    "file://", "file:///", "FILE://", "file:", "\0", "%2e%2e", "%00", "~", "~root", "$HOME", "C:\\", "\\\\host\\share", "/dev/zero",
    "/dev/stdin", "/proc/self/environ", "/proc/self/fd/0", "/etc/passwd", "CON", "‥", "．．", "\u2215", "\u202e", "\u200b", "é", "e\u0301",
    "x" * 300, "x/" * 2_500, " ", "\n", ":", "|", "*", "?", "http:", "https://", "ftp://h/x", "data:", "data:image/png;base64,", "smb://",
    "\ud800", "media/../../secret.png", "secret/0.png",
)  # fmt: skip
FIELDS = ("image", "file_name", "audio", "video", "images", "picture", "videos", "imagePath")


def make_path(rng: random.Random) -> bytes:
    path: Any = rng.choice(("", "/")).join(rng.choice(PIECES) for _ in range(rng.randint(1, 5)))
    if rng.random() < 0.1:
        path = str(rng.choice((path, "@/secret.png", "@/media/../secret.png", "@/media/1.png", "file://@/secret.png")))
    if rng.random() < 0.1:
        path = rng.choice(([path, "1.png"], {"path": path}, {"path": path, "bytes": None}, [[path]]))
    return json.dumps({"field": rng.choice(FIELDS), "path": path}).encode()


def run_path(data: bytes, folder: Path) -> None:
    try:
        case = json.loads(data)
        field, path = case["field"], json.loads(json.dumps(case["path"]).replace("@", json.dumps(str(folder))[1:-1]))
    except (ValueError, TypeError, KeyError, RecursionError):
        return
    turns = [{"from": "human", "value": "<image> what?"}, {"from": "gpt", "value": "x"}]
    record = {field: path, "conversations": turns} if field.startswith("video") else {field: path, "caption": "x"}
    inside = media(folder)
    file = folder / "data.json"
    file.write_text(json.dumps([record]))
    for conversation in read(file, media=inside, frames=2):
        look(conversation, inside)


# -- column maps ------------------------------------------------------------------------------------------------------

SOURCES = (
    "q", "meta.q", "meta.list.0", "meta.list.*.q", "text.q", "{q}", "{hint}\\n{q}\\n{choices}", "{choices:words}", "{answer:letter}",
    "{answer:place}", "{n:04d}.png", "{n:4}", "=constant", "={", "{{{q}}}", "{", "}", "{:x}", "", "..", "*", "{meta}", "{meta.list}",
)  # fmt: skip
NAMES = ("question", "answer", "image", "caption", "messages", "messages.role", "messages.content", "choices", "id")


def make_columns(rng: random.Random) -> bytes:
    row = {"q": "what?", "meta": {"q": "x", "list": [{"q": "y"}]}, "text": '{"q": "z"}', "answer": rng.choice((1, "B", "x", None)),
           "choices": ["x", "y"], "n": rng.choice((1, "1", None)), "hint": "", "image": "1.png"}  # fmt: skip
    columns = {rng.choice(NAMES): rng.choice(SOURCES) for _ in range(rng.randint(1, 4))}
    return json.dumps(columns).encode() + b"\n" + hurt.json_bytes(rng, hurt.json_hurt(rng, [row] * 2, most=3))


def run_columns(data: bytes, folder: Path) -> None:
    head, _, body = data.partition(b"\n")
    try:
        columns = {str(k): str(v) for k, v in json.loads(head).items()}
    except (ValueError, AttributeError, RecursionError):
        return
    inside = media(folder)
    file = folder / "data.json"
    file.write_bytes(body)
    for conversation in read(file, media=inside, columns=columns, roles={"x": "user"}, on_error=lambda e: None):
        look(conversation, inside)


TARGETS = (
    Target("columns", make_columns, run_columns),
    Target("data-files", make_file, run_file),
    Target("records", make_records, run_records),
    Target("paths", make_path, run_path),
)
