"""Taking values out of a record: by one of several names, of the type wanted, and remembering which were taken.

A record is handed to its format's reader as `Fields`, which note each key that is looked up. What was not looked up and
names a picture, or changes what is learned, is an error (`rules.check_unread`): no format needs to know the fields of
the others. Errors do not say which record it was; `dataset.read` adds that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from opticnerve.types import DataError


class Fields(dict[str, Any]):
    """An object of a record. `read`: the keys that were looked up. What lies in it is wrapped when it is looked up.

    Iterating, `in` and `list()` are no looking up. `ignored` keys are not there, at any depth.
    """

    __slots__ = ("ignored", "read")

    def __init__(self, given: dict[str, Any], ignored: frozenset[str] = frozenset()) -> None:
        super().__init__({k: v for k, v in given.items() if k not in ignored} if ignored else given)
        self.read: set[str] = set()
        self.ignored = ignored

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        value = super().__getitem__(key)
        if type(value) is dict:
            value = Fields(value, self.ignored)
        elif type(value) is list and any(type(v) is dict for v in value):
            value = [Fields(v, self.ignored) if type(v) is dict else v for v in value]
        else:
            return value
        super().__setitem__(key, value)
        return value

    def get(self, key: str, default: object = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401  (`dict.get` would note nothing)

    def raw(self) -> Iterator[tuple[str, Any]]:
        """(key, value), nothing noted."""
        return iter(super().items())


def empty(value: object) -> bool:
    """Whether a value says nothing: null, NaN (a table's missing number), blank text, and what holds nothing else."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    if isinstance(value, str | bytes):
        return not value.strip()
    if isinstance(value, list):
        return all(v is None or v == "" or _nulls(v) for v in value)
    return _nulls(value)


def _nulls(value: object) -> bool:
    return isinstance(value, dict) and all(v is None for v in value.values())


def find(fields: dict[str, Any], names: Sequence[str]) -> Any:
    """The value under the first of `names` that is there and neither null nor NaN; else None."""
    for name in names:
        value = fields.get(name)
        if value is not None and not (isinstance(value, float) and math.isnan(value)):
            return value
    return None


def take(fields: dict[str, Any], names: Sequence[str], what: str) -> Any:
    """As `find`.

    Raises:
        DataError: there is none; the message lists the fields that there are and the names wanted (`missing-field`).
    """
    value = find(fields, names)
    if value is None:
        raise missing(fields, names, what)
    return value


def missing(fields: dict[str, Any], names: Sequence[str], what: str) -> DataError:
    there = ", ".join(str(n) for n in list(fields)[:12]) or "none"
    problem = f"no {what}: the fields here are {there}"
    return DataError(problem, remedy=f"wanted {' or '.join(names)}", kind="missing-field")


def text(value: object, what: str) -> str:
    """A string; numbers are written out, whole ones without a point: tables keep a column of whole numbers with holes
    in it as 1.0, 2.0, NaN.

    Raises:
        DataError: anything else (kind `wrong-type`).
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)
    raise DataError(f"the {what} is not text but {brief(value)}", kind="wrong-type")


def objects(value: object, what: str) -> list[Fields]:
    """A list of JSON objects.

    Raises:
        DataError: anything else (kind `wrong-type`).
    """
    if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
        raise DataError(f"{what} is not a list of objects but {brief(value)}", kind="wrong-type")
    return [v if isinstance(v, Fields) else Fields(v) for v in value]


def brief(value: object) -> str:
    shown = repr(value[:60] if isinstance(value, str | bytes) else value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '…'}"
