"""Going through all data before training: every sample read, every picture opened, everything wrong listed at once."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from opticnerve.data.check.leakage import Listed, Side, answers_of, dhash, near_pairs
from opticnerve.data.dataset.read import DataSource
from opticnerve.data.encode.tokenize import Encoded
from opticnerve.data.media.open import image_digest, open_image
from opticnerve.types import Conversation, DataError, ImagePart, OpticNerveError, TextPart

Encode = Callable[[Conversation], Encoded]


@dataclass
class DataReport:
    """What `check` found. Lengths are kept as histograms, so that the report stays small."""

    good: int = 0
    bad: int = 0
    kinds: dict[str, Listed] = field(default_factory=dict)
    turns: int = 0  # assistant turns: what is learned from
    images: int = 0  # mentions of pictures
    distinct_images: int = 0  # by content; by path where pictures were not opened
    images_per_sample: Counter[int] = field(default_factory=Counter)
    audios: int = 0
    answer_words: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    duplicates: Listed = field(default_factory=Listed)
    near_pictures: Listed = field(default_factory=Listed)  # look alike and are not the same
    repeated_answers: Listed = field(default_factory=Listed)  # beside those of whole samples
    control_words: Listed = field(default_factory=Listed)  # words that spell a special token of the language model
    repaired: Counter[str] = field(default_factory=Counter)  # samples that a repair changed, by its name
    left_out: Counter[str] = field(default_factory=Counter)  # records that do not meet `where`, by what it says
    media_opened: bool = True

    @property
    def samples(self) -> int:
        return self.good + self.bad

    @property
    def ok(self) -> bool:
        """There is something to learn from, and nothing that training would refuse. Duplicates are no refusal."""
        return self.good > 0 and self.bad == 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        made = {f.name: getattr(self, f.name) for f in fields(self)} | {
            "kinds": {k: v.to_dict() for k, v in self._by_count()},
            "images_per_sample": {str(k): v for k, v in sorted(self.images_per_sample.items())},
            "answer_words": spread(self.answer_words), "tokens": spread(self.tokens), "repaired": dict(self.repaired),
            "left_out": dict(self.left_out),
        }  # fmt: skip
        plain = {k: v.to_dict() if isinstance(v, Listed) else v for k, v in made.items()}
        return {"ok": self.ok, "samples": self.samples, **plain}

    def _by_count(self) -> list[tuple[str, Listed]]:
        return sorted(self.kinds.items(), key=lambda kv: -kv[1].count)

    def render(self, console: Console) -> None:
        """A table of counts, then what is wrong, worst first, with places."""
        counts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in self._lines():
            counts.add_row(name, value)
        console.print(counts)
        for kind, listed in self._by_count():
            print_listed(console, f"[bold red]{escape(kind)}[/]: {listed.count:,}", listed)
        for name, listed in (
            ("exact duplicates", self.duplicates),
            ("the same question and answer on the same picture", self.repeated_answers),
            ("pictures that look like another", self.near_pictures),
            ("words that spell a control token (model.language.sanitize_control_tokens)", self.control_words),
        ):
            if listed.count:
                print_listed(console, f"[bold yellow]{name}[/]: {listed.count:,}", listed)
        console.print(self._status())

    def _lines(self) -> Iterator[tuple[str, str]]:
        yield "samples", f"{self.samples:,}, {self.good:,} good and {self.bad:,} bad"
        yield "assistant turns", f"{self.turns:,}"
        how = "different by content" if self.media_opened else "different by path, not opened"
        per = ", ".join(f"{k} in {v:,}" for k, v in sorted(self.images_per_sample.items()))
        yield "images", f"{self.images:,}, {self.distinct_images:,} {how}; per sample: {per or 'none'}"
        if self.audios:
            yield "sounds", f"{self.audios:,}"
        if words := spread(self.answer_words):
            yield "words per answer", _spread_text(words)
        if tokens := spread(self.tokens):
            yield "tokens per sample", _spread_text(tokens)

        if self.repaired:
            yield "repaired", ", ".join(f"{name} in {count:,}" for name, count in sorted(self.repaired.items()))
        if self.left_out:
            yield "left out", ", ".join(f"{count:,} by where: {text}" for text, count in self.left_out.items())

    def _status(self) -> str:
        if self.ok:
            return "[bold green]Ready to train.[/]"
        if self.bad:
            return f"[bold red]{self.bad:,} of {self.samples:,} samples cannot be trained on.[/]"
        return "[bold red]There is no sample at all.[/]"


def check(
    data: Iterable[DataSource | Conversation | DataError],
    *,
    open_media: bool = True,
    max_listed: int = 20,
    encode: Encode | None = None,
    max_length: int | None = None,
    on_progress: Callable[[int], None] | None = None,
    side: Side | None = None,
) -> DataReport:
    """Go through everything; bad samples and unreadable files are counted and listed, never raised.

    Args:
        data: sources (each read to its end), conversations, or errors found by others.
        open_media: decode every picture (each file once), and find duplicates by content instead of by path.
        max_listed: examples kept for each kind of trouble.
        encode: makes a sample's tokens as the model gets them; with `max_length`, longer ones are bad, kind
            `too-long`.
        on_progress: told the number of samples seen, after each.
        side: takes what is in the good samples, to compare training with test by `overlap.leaks`.
    """
    if max_length is not None and encode is None:
        raise OpticNerveError(
            "max_length without encode: give the function that makes a sample's tokens", kind="missing-field"
        )
    report = DataReport(media_opened=open_media)
    pictures = _Pictures(open_media)
    own = Side()
    first_seen: dict[bytes, str] = {}
    for item in _all(data, report.left_out):
        try:
            if isinstance(item, DataError):
                raise item
            identities = [pictures.identify(part, item.where) for part in item.images]
            if encode is not None:
                _count(item, encode(item), max_length, report, max_listed)
        except DataError as e:
            report.bad += 1
            report.kinds.setdefault(e.kind, Listed()).add(e.where, _message(e), max_listed)
        else:
            _add(item, identities, report, first_seen, own, max_listed)
        if on_progress is not None:
            on_progress(report.samples)
    report.distinct_images = len(pictures.good)
    own.looks = pictures.looks
    _compare_looks(own, report, max_listed)
    if side is not None:
        side.merge(own)
    return report


def spread(histogram: Counter[int]) -> dict[str, float]:
    """Minimum, median, mean, 95th percentile and maximum of a histogram; empty for an empty one."""
    total = histogram.total()
    if not total:
        return {}

    def at(share: float) -> int:
        seen = 0
        for value in sorted(histogram):
            seen += histogram[value]
            if seen >= share * total:
                return value
        raise AssertionError("a share above one")

    mean = sum(v * n for v, n in histogram.items()) / total
    return {"min": min(histogram), "median": at(0.5), "mean": round(mean, 2), "p95": at(0.95), "max": max(histogram)}


class _Pictures:
    """Each picture opened once, however many samples show it; a bad one is bad in all of them."""

    def __init__(self, open_media: bool) -> None:
        self.open_media = open_media
        self.good: set[str] = set()
        self.looks: dict[str, int] = {}
        self._files: dict[Path, str | DataError] = {}

    def identify(self, part: ImagePart, where: str) -> str:
        source = part.source
        if not isinstance(source, Path):
            return self._identified(part, where)
        if source not in self._files:
            try:
                self._files[source] = self._identified(part, where)
            except DataError as e:
                self._files[source] = e
        found = self._files[source]
        if isinstance(found, DataError):
            raise DataError(found.problem, where=where, remedy=found.remedy, kind=found.kind)
        return found

    def _identified(self, part: ImagePart, where: str) -> str:
        if self.open_media:
            picture = open_image(part.source, where=where)
            identity = image_digest(part.source, where=where)
            self.looks[identity] = dhash(picture)
        else:
            identity = str(part.source) if isinstance(part.source, Path) else image_digest(part.source, where=where)
        self.good.add(identity)
        return identity


def _all(
    data: Iterable[DataSource | Conversation | DataError], left_out: Counter[str]
) -> Iterator[Conversation | DataError]:
    for item in data:
        if not isinstance(item, DataSource):
            yield item
            continue
        waiting: list[DataError] = []
        found = item.read(waiting.append, left_out=left_out)
        while True:
            try:
                conversation = next(found, None)
            except DataError as e:
                waiting.append(e)
                conversation = None
            yield from waiting
            waiting.clear()
            if conversation is None:
                break
            yield conversation


def _count(item: Conversation, made: Encoded, max_length: int | None, report: DataReport, max_listed: int) -> None:
    length = len(made.input_ids)
    if made.control_words:
        spelled = ", ".join(dict.fromkeys(made.control_words))
        report.control_words.add(item.where or item.id, f"the words hold {spelled}", max_listed)
    report.tokens[length] += 1
    if max_length is not None and length > max_length:
        remedy = "shorten it, raise the maximum length, or split it into several samples"
        raise DataError(f"{length:,} tokens, {max_length:,} fit", where=item.where, remedy=remedy, kind="too-long")


def _add(
    item: Conversation,
    identities: list[str],
    report: DataReport,
    first_seen: dict[bytes, str],
    own: Side,
    max_listed: int,
) -> None:  # fmt: skip
    answers = [m for m in item.messages if m.role == "assistant"]
    report.good += 1
    report.turns += sum(m.learn for m in answers)
    report.images += len(identities)
    report.audios += len(item.audios)
    report.repaired.update(item.meta.get("repaired", ()))
    report.images_per_sample[len(identities)] += 1
    report.answer_words.update(len(m.text.split()) for m in answers)
    place = item.where or item.id
    content = _digest(item, identities)
    if content in first_seen:
        report.duplicates.add(place, f"the same pictures and words as {first_seen[content]}", max_listed)
    else:
        first_seen[content] = place
        again = next((own.answers[a] for a in answers_of(item, identities) if a in own.answers), None)
        if again is not None:
            report.repeated_answers.add(place, f"a question with the answer that it has in {again}", max_listed)
    own.add(item, identities)


def _compare_looks(own: Side, report: DataReport, max_listed: int) -> None:
    """Count the pictures that look like one before them."""
    names, hashes = own.looks_array()
    counted: set[int] = set()
    for i, j in near_pairs(hashes):
        if j not in counted:
            counted.add(j)
            place, other = own.pictures.get(names[j], ""), own.pictures.get(names[i], "")
            report.near_pictures.add(place, f"a picture that looks like one of {other}", max_listed)


def _digest(item: Conversation, identities: list[str]) -> bytes:
    """What makes two samples the same: roles, words, pictures and tools, in order."""
    pictures = iter(identities)
    content: list[object] = [item.tools]
    for message in item.messages:
        parts: list[tuple[str, str]] = []
        for part in message.parts:
            match part:
                case TextPart(text):
                    parts.append(("text", text))
                case ImagePart():
                    parts.append(("image", next(pictures)))
                case _:
                    parts.append(("audio", str(part.source)))
        content.append((message.role, message.learn, parts, message.calls))
    return hashlib.blake2b(repr(content).encode(), digest_size=16).digest()


def _message(error: DataError) -> str:
    return error.problem + (f" ({error.remedy})" if error.remedy else "")


def _spread_text(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:,g}" for name, value in values.items())


def print_listed(console: Console, title: str, listed: Listed) -> None:
    console.print(title)
    for where, message in listed.examples:
        line = f"  {escape(where)}: {escape(message)}" if where else f"  {escape(message)}"
        console.print(line, highlight=False, soft_wrap=True)  # places stay whole, to be copied and clicked
    if listed.count > len(listed.examples):
        console.print(f"  … and {listed.count - len(listed.examples):,} more")
