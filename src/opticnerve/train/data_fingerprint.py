"""Is it the data that the run began with? What a step sees follows from seed, step and data; a changed file would go
unnoticed otherwise, and the curve be that of no run."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

from opticnerve.data.dataset.streaming import Streams
from opticnerve.types import Conversation, Frame, OpticNerveError, TextPart

MOST, FIRST = 10_000, 64
"""So many units, evenly spread, are read to tell the data apart (of a stream the first ones): of larger data a change
elsewhere goes unnoticed."""


def fingerprint(sampler: Any) -> dict[str, Any]:
    """How many units there are, and hashes of what they say and of how they are packed, the same on every process.

    A file counts by its name alone: the folder may be another on another machine, and its content is not read here.
    """
    examples, said = sampler.examples, hashlib.sha256()
    if isinstance(examples, Streams):
        return _of_streams(examples, sampler)
    for number in range(0, len(examples), math.ceil(len(examples) / MOST)):
        conversations, count = examples[number]
        said.update(f"\n{count}".encode())
        for c in conversations:
            said.update(_words(c).encode(errors="replace"))
    found: dict[str, Any] = {"units": len(examples), "steps": sampler.steps, "sha256": said.hexdigest()[:24]}
    plan = sampler.plan
    if plan is not None:
        rows = hashlib.sha256(b"".join(bytes(memoryview(plan[row])) for row in range(len(plan)))).hexdigest()[:24]
        found |= {"rows": len(plan), "plan": rows}
    return found


def _of_streams(streams: Streams, sampler: Any) -> dict[str, Any]:
    """Of streamed data the first rows are read, and of the others the shards' names are known, with their sizes (or,
    on the hub, the revision)."""
    said = hashlib.sha256()
    for index in range(FIRST):
        for conversation in sampler.drawn(index):
            said.update(_words(conversation).encode(errors="replace"))
    streams.close()
    tells = hashlib.sha256("\n".join(streams.tells()).encode(errors="replace")).hexdigest()[:24]
    return {"steps": sampler.steps, "shards": tells, "sha256": said.hexdigest()[:24]}


def check(was: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """Refuse to go on with other data.

    Raises:
        OpticNerveError: names what differs, with both values.
    """
    if differs := [f"{k} was {was.get(k)} and is {now.get(k)}" for k in {**was, **now} if was.get(k) != now.get(k)]:
        raise OpticNerveError(
            f"{where} was written on other data: {'; '.join(differs)}. Bring the data back as it was, or train anew in "
            f"another folder"
        )


def _words(conversation: Conversation) -> str:
    """What a conversation says, and the names of the files that it shows."""
    said = [conversation.id]
    for message in conversation.messages:
        said.append(message.role)
        for part in message.parts:
            if isinstance(part, TextPart):
                said.append(part.text)
                continue
            source = part.source.source if isinstance(part.source, Frame) else part.source
            name = source.name if isinstance(source, Path) else ""
            size = len(source) if isinstance(source, bytes) else ""
            said.append(f"{type(part).__name__} {name}{size}")
    return "\0".join(said)
