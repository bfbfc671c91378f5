"""Which records are wanted: `where: "relevance_min > 3 and lang in ['en', 'ja']"`, a condition on their fields.

A closed language, parsed by Python's `ast` and walked here; nothing is evaluated as code:

- fields by their names in the file (or, where it has none such, in the format): `relevance`, `meta.score`,
  `ratings[0]`, and in backquotes what is no plain name; `min(…)`, `max(…)` and `len(…)` of one that is a list;
- numbers, texts, true, false, null, lists of these;
- `==`, `!=`, `<`, `<=`, `>`, `>=`, `in`, `not in`, `is null`, `is not null`, `and`, `or`, `not`, parentheses.

A number in a text (a table's cell) compares with numbers as one, and is more or less than another as a number. A field
that is not there, NaN and null are one: equal to null, and neither less nor more than anything.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from opticnerve.data.formats.columns import found
from opticnerve.data.formats.fields import brief
from opticnerve.types import DataError

Fields = Mapping[str, Any]
Term = Callable[[Callable[[str], object]], object]
"""From what looks a field up to a value."""

_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|`([^`]+)`""")
_CONSTANTS = {"null": None, "none": None, "true": True, "false": False}
_ORDER: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[[Any], object]] = {"min": min, "max": max, "len": len}
_MISSING = object()
_LONGEST, _DEEPEST = 4_096, 50


@dataclass
class Where:
    """A condition, ready for records. `names`: the fields that it looks at.

    Raises:
        DataError: something else than such a condition (kind `where`).
    """

    text: str
    names: tuple[str, ...] = field(init=False)
    _holds: Term = field(init=False, repr=False)

    def __post_init__(self) -> None:
        reader = _Parser(self.text)
        self._holds = reader.condition(reader.tree)
        self.names = tuple(dict.fromkeys(reader.names))

    def keeps(self, record: Fields, mapped: Callable[[], Fields]) -> bool:
        """Whether a record is wanted; `mapped`: it under the format's names.

        Raises:
            DataError: what is compared cannot be, such as a word with a number.
        """
        return bool(self._holds(lambda name: _value(_look(name, record, mapped))))

    def missing(self, records: Sequence[tuple[Fields, Fields]]) -> str | None:
        """The first field that none of some records (as they lie there, and mapped) has."""
        for name in self.names:
            if all(found(r, name, _MISSING) is found(m, name, _MISSING) is _MISSING for r, m in records):
                return name
        return None

    def met_by_none(self, where: str) -> DataError:
        problem = f"no record meets the condition {self.text[:200]!r}"
        return DataError(problem, where=where, remedy="correct it, or leave where out", kind="empty-file")


def _look(name: str, record: Fields, mapped: Callable[[], Fields]) -> object:
    value = found(record, name, _MISSING)
    return found(mapped(), name, None) if value is _MISSING else value


def _value(value: object) -> object:
    """A field's value as something to compare."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, Decimal):
        return float(value)
    return value if value is None or isinstance(value, str | int | float | bytes | list | dict) else str(value)


class _Parser:
    """From a text to functions; every kind of node that is not named here is refused."""

    def __init__(self, text: str) -> None:
        self.text, self.names = text, list[str]()
        self._quoted: dict[str, str] = {}
        if len(text) > _LONGEST:
            raise self._wrong(f"{len(text):,} characters, {_LONGEST:,} are read")
        try:
            self.tree: ast.AST = ast.parse(_QUOTED.sub(self._name_of, text).strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
            raise self._wrong(str(getattr(e, "msg", "") or e)) from None
        level: list[ast.AST] = [self.tree]
        for _ in range(_DEEPEST):
            level = [inner for node in level for inner in ast.iter_child_nodes(node)]
        if level:
            raise self._wrong(f"it is nested more than {_DEEPEST} deep")

    def _name_of(self, match: re.Match[str]) -> str:
        """A name in backquotes as one that Python takes."""
        if match[1] is None:
            return match[0]
        made = f"_quoted_{len(self._quoted)}"
        self._quoted[made] = match[1]
        return made

    def condition(self, node: ast.AST) -> Term:
        match node:
            case ast.BoolOp(op=op, values=values):
                parts, which = [self.condition(v) for v in values], all if isinstance(op, ast.And) else any
                return lambda look: which(part(look) for part in parts)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                inner = self.condition(operand)
                return lambda look: not inner(look)
            case ast.Compare(left=left, ops=ops, comparators=others):
                terms = [self.term(n) for n in (left, *others)]
                tests = [_comparison(op) for op in ops]
                return lambda look: all(
                    test(a(look), b(look)) for a, test, b in zip(terms, tests, terms[1:], strict=False)
                )
        term, shown = self.term(node), ast.unparse(node)
        return lambda look: _truth(term(look), self._shown(shown))

    def term(self, node: ast.AST) -> Term:
        match node:
            case ast.Constant(value=str() | int() | float() | None as value):
                return lambda look: value
            case ast.Name(id=name) if name.lower() in _CONSTANTS:
                constant = _CONSTANTS[name.lower()]
                return lambda look: constant
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
                return lambda look: -number
            case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
                terms = [self.term(item) for item in items]
                return lambda look: [term(look) for term in terms]
            case ast.Call(func=ast.Name(id=name), args=[inner], keywords=[]) if name in _FUNCTIONS:
                term = self.term(inner)
                return lambda look: _of_list(name, term(look))
        path = self._path(node)
        self.names.append(path)
        return lambda look: look(path)

    def _path(self, node: ast.AST) -> str:
        match node:
            case ast.Name(id=name):
                return self._quoted.get(name, name)
            case ast.Attribute(value=inner, attr=name):
                return f"{self._path(inner)}.{self._quoted.get(name, name)}"
            case ast.Subscript(value=inner, slice=ast.Constant(value=str() | int() as step)):
                return f"{self._path(inner)}.{step}"
        raise self._wrong(f"{self._shown(ast.unparse(node))!r} is neither a field nor a value nor a comparison")

    def _shown(self, text: str) -> str:
        for made, name in self._quoted.items():
            text = text.replace(made, f"`{name}`")
        return text[:60]

    def _wrong(self, problem: str) -> DataError:
        return DataError(
            f"where: {self.text[:120]!r} is no condition: {problem}", kind="where",
            remedy="write it as relevance > 3 and lang == 'en', with ==, !=, <, <=, >, >=, in, and, or, not; "
            "a name with other signs than letters stands in backquotes",
        )  # fmt: skip


def _comparison(op: ast.cmpop) -> Callable[[object, object], bool]:
    if type(op) in _ORDER:
        return lambda a, b: _ordered(_ORDER[type(op)], a, b)
    if isinstance(op, ast.In | ast.NotIn):
        return lambda a, b: _among(a, b) == isinstance(op, ast.In)
    return lambda a, b: _same(a, b) == isinstance(op, ast.Eq | ast.Is)


def _same(a: object, b: object) -> bool:
    a, b = _alike(a, b)
    return a == b


def _ordered(less: Callable[[Any, Any], bool], a: object, b: object) -> bool:
    if a is None or b is None:
        return False
    a, b = _alike(a, b)
    if isinstance(a, str) and isinstance(b, str) and _is_number(x := _number(a)) and _is_number(y := _number(b)):
        a, b = x, y  # two cells of a table
    try:
        return less(a, b)
    except TypeError:
        problem = f"where: {brief(a)} and {brief(b)} are neither less nor more than each other"
        raise DataError(problem, remedy="compare numbers with numbers", kind="where") from None


def _among(a: object, many: object) -> bool:
    if many is None:
        return False
    if isinstance(many, str):
        return isinstance(a, str) and a in many
    if isinstance(many, list):
        return any(_same(a, b) for b in many)
    raise DataError(f"where: nothing is in {brief(many)}", remedy="wanted a list or a text", kind="where")


def _alike(a: object, b: object) -> tuple[Any, Any]:
    """Both as numbers, where one is a number and the other a text of one."""
    if isinstance(a, str) and _is_number(b):
        return _number(a), b
    return (a, _number(b)) if isinstance(b, str) and _is_number(a) else (a, b)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _truth(value: object, shown: str) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    problem = f"where: {shown} is {brief(value)}, neither true nor false"
    raise DataError(problem, remedy=f"compare it, as in {shown} > 3", kind="where")


def _of_list(name: str, value: object) -> object:
    """`len` of null is 0, `min` and `max` of nothing are null; what is null or NaN in a list is not there. Texts of
    numbers are numbers; beside these a word has no place."""
    listed = [v for v in map(_value, value) if v is not None] if isinstance(value, list) else value
    if listed is None or listed == []:
        return 0 if name == "len" else None
    try:
        if isinstance(listed, str | bytes | dict) and name != "len":  # whose least letter nobody means
            raise TypeError
        if isinstance(listed, list):
            listed = [_number(v) if isinstance(v, str) else v for v in listed]
        return _FUNCTIONS[name](listed)
    except TypeError:
        raise DataError(f"where: {name} of {brief(value)}", remedy="wanted a list of numbers", kind="where") from None
