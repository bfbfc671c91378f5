"""From a recipe's data entries to conversations, the starter kit's names included, and to the examples of an epoch."""

from __future__ import annotations

import importlib
import os
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opticnerve.data.dataset.dataset import Entry, Example, Examples, Groups, Samples
from opticnerve.data.dataset.index import held_out, in_twentieth, index_of
from opticnerve.data.dataset.mixture import Mixture, mixed_shares
from opticnerve.data.dataset.opened import OnError
from opticnerve.data.dataset.read import DataSource
from opticnerve.data.dataset.streaming import Stream, Streams
from opticnerve.data.formats.boxes import BoxOptions
from opticnerve.data.media.cloud import in_cloud
from opticnerve.data.media.timeline import sampling_of
from opticnerve.data.sources.base import Streaming
from opticnerve.data.sources.cloud import local_copy
from opticnerve.recipe import DataSpec, Stage
from opticnerve.types import Conversation, Frame, OpticNerveError

# Names that stand for data of the starter kit: the module that prepares it, and the file among those that it makes.
STARTER = {
    "starter/easy-vqa/captions": ("easy_vqa", "captions"),
    "starter/easy-vqa/train-questions": ("easy_vqa", "questions"),
    "starter/easy-vqa/test-questions": ("easy_vqa", "test"),
    "starter/easy-vqa/conversations": ("easy_vqa", "conversations"),
    "starter/easy-vqa/preferences": ("easy_vqa", "preferences"),
    "starter/emoji/train": ("emoji", "train"),
    "starter/emoji/held-out-vendor": ("emoji", "vendor"),
    "starter/emoji/held-out-emoji": ("emoji", "emoji"),
    "starter/emoji/held-out-both": ("emoji", "both"),
    "starter/receipts/train": ("receipts", "train"),
    "starter/receipts/test": ("receipts", "test"),
    "starter/receipts/characters": ("receipts", "characters"),
    "starter/receipts/lines": ("receipts", "lines"),
    "starter/receipts/regions": ("receipts", "regions"),
    "starter/receipts/whole": ("receipts", "whole"),
    "starter/spoken-words/captions": ("spoken_words", "captions"),
    "starter/spoken-words/train": ("spoken_words", "questions"),
    "starter/spoken-words/held-out-voices": ("spoken_words", "held-out-voices"),
    "starter/spoken-words/held-out-words": ("spoken_words", "held-out-words"),
}


def load_data(
    spec: DataSpec, *, on_error: OnError | None = None, left_out: Counter[str] | None = None
) -> Sequence[Conversation]:
    """All conversations of one data entry, in file order; each is read from its file when it is asked for.

    Of a stream, the first `limit`, in memory. `left_out` counts the records that `where` leaves out, under it.

    Raises:
        DataError: a bad sample, unless `on_error` takes it.
        OpticNerveError: no such file or starter name; a stream without a limit.
    """
    if not spec.streaming:
        samples = _indexed(spec, on_error)
        if left_out is not None and spec.where is not None:
            left_out[spec.where] += samples.found.left_out
        return samples
    if spec.limit is None:
        raise OpticNerveError(
            f"{spec.path} is streamed, and here all of it is wanted; give a limit, and the first so many samples are "
            f"taken, or download it and leave streaming out",
            kind="unsupported",
        )
    return list(stream_data(spec, on_error=on_error, left_out=left_out))


def _indexed(spec: DataSpec, on_error: OnError | None) -> Samples:
    source = source_of(spec)
    index = index_of(source, on_error)
    if source.group_by_image:
        groups = Groups.of(index.rows["picture"])
        samples = Samples(index, np.arange(len(groups), dtype=np.uint32)[: source.limit], groups)
    else:
        samples = Samples(index)
    if spec.split == "all":
        return samples
    rows = index.rows[samples.first_rows()]
    held = in_twentieth(rows["side"]) & (rows["pieces"] > 0)
    return samples.only(np.flatnonzero(held == (spec.split == "held_out")).astype(np.uint32))


def stream_data(
    spec: DataSpec, *, on_error: OnError | None = None, left_out: Counter[str] | None = None
) -> Iterator[Conversation]:
    """The same conversations, one after another in a single pass, and nothing kept."""
    found = source_of(spec).read(on_error, left_out=left_out)
    return (c for c in found if spec.split == "all" or held_out(c) == (spec.split == "held_out"))


def source_of(spec: DataSpec) -> DataSource:
    """What a data entry reads: environment variables filled in, starter data made."""
    path = os.path.expandvars(spec.path)
    media = os.path.expandvars(spec.media) if spec.media else None
    trusted = spec.allow_outside_media
    annotations, cache = (os.path.expandvars(p) if p else None for p in (spec.annotations, spec.media_cache))
    above = re.split(r"[*?\[{]", path)[0].rpartition("/")[0] if in_cloud(path) else None
    if not spec.streaming:
        path = _here(path)
        annotations = _here(annotations) if annotations else None
    if path.startswith("starter/"):
        path, media = _starter(path)
        trusted = True
    if media is None and not Path(path).is_dir():  # of a folder, all is here
        media = above
    stream = Streaming(spec.subset, spec.hub_split or "train", spec.revision) if spec.streaming else None
    frames = sampling_of(spec.frames if isinstance(spec.frames, int) else spec.frames.model_dump())
    return DataSource(
        path, spec.format, media, spec.prompt, spec.limit, trusted, spec.group_by_image, frames, stream,
        tuple(spec.ignore), None if spec.streaming else spec.hub_split, tuple(spec.repair), spec.columns, spec.roles,
        annotations, cache, spec.where, spec.allow_private_hosts,
        None if spec.boxes is None else BoxOptions(spec.boxes.style, spec.boxes.frame),
    )  # fmt: skip


def _here(path: str) -> str:
    """A path on this machine, where it may be one in a cloud."""
    return str(local_copy(path)) if in_cloud(path) else path


def load_streams(stage: Stage, *, seed: int) -> Streams:
    """The streams of a stage, whose entries are all streamed.

    Raises:
        DataError: one of them cannot be opened, or has no format.
    """
    made = []
    for number, spec in enumerate(stage.data):
        source = source_of(spec)
        source.check()
        made.append(Stream(source, key=f"{seed}/{stage.name}/{number}", window=spec.shuffle_window, limit=spec.limit))
    shares = mixed_shares(stage, [])
    mixture = None if shares is None else Mixture(shares, block=stage.batch_size, key=f"{seed}/{stage.name}")
    return Streams(made, [spec.repeat for spec in stage.data], mixture)


def load_examples(
    specs: Sequence[DataSpec], *, on_error: OnError | None = None, split: float | None = None, held_out: bool = False
) -> Examples:
    """Examples: one conversation, or, with `share_prefix`, all questions about one picture and how many of
    them to draw at a time.

    Args:
        split: a share that `validate` holds out; `held_out`: those are wanted, not the others.
    """
    entries = []
    for spec in specs:
        if spec.streaming:
            raise OpticNerveError(
                f"{spec.path} is streamed: how many samples it has is not known before it is read", kind="unsupported"
            )
        samples = _indexed(spec, on_error)
        if split is not None:
            samples = samples.apart(split, held_out=held_out)
        if not samples:
            none = f", and {samples.found.left_out:,} records do not meet {spec.where!r}" if spec.where else ""
            of = "" if split is None else f" {'within' if held_out else 'outside of'} the split of {split:g}"
            raise OpticNerveError(f"{spec.path} holds no usable sample{of}{none}", kind="empty")
        groups = samples.by_picture() if spec.share_prefix else None
        entries.append(Entry(samples, groups, spec.per_image, spec.repeat))
    return Examples(entries)


def by_picture(conversations: Sequence[Conversation]) -> list[list[Conversation]]:
    """Conversations about the same pictures, together; in order of first appearance."""
    groups: dict[Any, list[Conversation]] = {}
    for conversation in conversations:
        key = tuple(
            p.source if isinstance(p.source, Path | bytes | Frame) else id(p.source) for p in conversation.pieces
        )
        # Text-only samples share no picture; each stays by itself.
        groups.setdefault(key or id(conversation), []).append(conversation)
    return list(groups.values())


def draw(example: Example, rng: random.Random) -> list[Conversation]:
    """The conversations of an example that one sample trains on."""
    conversations, count = example
    if count is None or count >= len(conversations):
        return list(conversations)
    return [conversations[k] for k in rng.sample(range(len(conversations)), count)]  # only these are read


def fixed_sample(conversations: Sequence[Conversation], count: int | None, *, seed: int = 0) -> list[Conversation]:
    """The same random sample every time, in file order."""
    if count is None or count >= len(conversations):
        return list(conversations)
    chosen = sorted(random.Random(seed).sample(range(len(conversations)), count))
    return [conversations[i] for i in chosen]


def _starter(name: str) -> tuple[str, str]:
    if name not in STARTER:
        raise OpticNerveError(f"unknown starter data {name!r}; known: {', '.join(STARTER)}", kind="unknown-name")
    module, key = STARTER[name]
    made = importlib.import_module(f"opticnerve.starter.{module}").prepare()
    return str(made[key]), str(made["media"])
