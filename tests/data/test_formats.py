"""Formats of other packages: found by entry point, held to the contract that the built-in ones keep."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from layouts import png

from opticnerve import registry
from opticnerve.data.dataset.read import read
from opticnerve.data.formats.base import DataFormat, Sample, has
from opticnerve.data.formats.converters import format_of
from opticnerve.data.formats.fields import Fields, take, text
from opticnerve.data.formats.media import Context
from opticnerve.data.formats.turns import said
from opticnerve.recipe.loading import data_entry
from opticnerve.testing import ContractError, check_format


class Riddles(DataFormat):
    """A third party's."""

    name = "riddles"
    wants = "a picture, riddle and solution"
    example = ({"image": "1.png", "riddle": "what is red?", "solution": "the circle"},)

    def fits(self, record: dict[str, Any]) -> bool:
        return has(record, "riddle") and has(record, "solution")

    def samples(self, fields: Fields, context: Context, id: str) -> Iterator[Sample]:
        words = text(take(fields, ("riddle",), "riddle"), "riddle")
        answer = text(take(fields, ("solution",), "solution"), "solution")
        yield id, [said("user", words), said("assistant", answer, tags=False)], {}


@pytest.mark.parametrize("name", registry.data_formats.names())
def test_the_built_in_ones_keep_the_contract(name: str) -> None:
    check_format(lambda: format_of(name))


def test_one_of_another_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_format(Riddles)
    monkeypatch.setitem(registry.data_formats._targets, "riddles", Riddles)  # as its entry point would
    (tmp_path / "1.png").write_bytes(png())
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in Riddles.example))
    for format in ("auto", "riddles"):
        assert data_entry({"path": "d.jsonl", "format": format})
        (sample,) = read(tmp_path / "d.jsonl", format=format)
        assert (sample.answer, len(sample.images)) == ("the circle", 1)


class Greedy(Riddles):
    def fits(self, record: dict[str, Any]) -> bool:
        return True


class Careless(Riddles):
    def samples(self, fields: Fields, context: Context, id: str) -> Iterator[Sample]:
        yield id, [said("user", fields["riddle"].strip()), said("assistant", fields["solution"])], {}


class Blind(Riddles):
    def samples(self, fields: Fields, context: Context, id: str) -> Iterator[Sample]:
        fields.get("thumbnail_of_it")
        yield from super().samples(fields, context, id)


class Forgetful(Riddles):
    def samples(self, fields: Fields, context: Context, id: str) -> Iterator[Sample]:
        yield from ()


class Ambiguous(Riddles):
    example = ({**Riddles.example[0], "question": "what?", "answer": "red"},)


@pytest.mark.parametrize(
    ("format", "says"),
    [
        (Greedy, "every file"),
        (Careless, "AttributeError"),
        (Blind, "thumbnail"),
        (Forgetful, "no sample"),
        (Ambiguous, "vqa"),
    ],
)
def test_each_broken_promise_is_listed(format: type[DataFormat], says: str) -> None:
    with pytest.raises(ContractError, match=says):
        check_format(format)
