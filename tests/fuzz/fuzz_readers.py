"""Hostile files for the readers of several: shards, saved tables, folders, a second file of answers, all of them by index
and, where they can be, as a stream."""

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

from opticnerve.data.dataset.load import load_data, stream_data
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
    said, stored = rng.choice(list(GOOD)), saved()  # (importing datasets is no part of a case)
    good = {
        "tar": shard(said), "tar.gz": shard(said), "answers": json.dumps({"annotations": ANSWERS}).encode(), "questions": json.dumps({"questions": ROWS}).encode(),
        "text": "a dog é".encode(), "picture": picture(), "metadata": b"file_name,caption\n1.png,x\n2.png,y\n",
        "lines": b'{"file_name": "1.png", "caption": "x"}\n' * 2,
    }.get(kind) or stored[FOLDERS[kind]]  # fmt: skip
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


TARGETS = (Target("folders", make_folder, run_folder),)
