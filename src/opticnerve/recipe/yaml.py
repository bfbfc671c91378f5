"""YAML that somebody else may have written: plain values alone, and no more of them than a recipe needs.

PyYAML's safe loader runs no code, but a few lines of aliases unfold to more than memory holds ("billion laughs"), deep
nesting ends the stack, and its constructors raise whatever they trip over (a month 99, an integer of 5,000 digits).
"""

from __future__ import annotations

from typing import Any

import yaml

from opticnerve.types import RecipeError

MAX_CHARACTERS = 250_000
MAX_VALUES = 10_000  # aliases count with all that they stand for
MAX_DEPTH = 30


def parse(text: str) -> Any:
    """YAML → plain Python values.

    Raises:
        RecipeError: not YAML, more than the bounds above, tags that make objects, or an alias of what it stands in.
    """
    if len(text) > MAX_CHARACTERS:
        raise RecipeError(f"{len(text):,} characters of YAML, more than the {MAX_CHARACTERS:,} that are read")
    try:
        return yaml.load(text, Loader=_BoundedLoader)  # noqa: S506 (a safe loader, with bounds)
    except RecipeError:
        raise
    except yaml.YAMLError as e:
        raise RecipeError(f"not readable YAML: {e}") from e
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as e:
        raise RecipeError(
            f"not readable YAML: a value does not fit its kind ({brief(str(e) or type(e).__name__)})"
        ) from e


def brief(shown: str, most: int = 200) -> str:
    """No more than fits a message."""
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


class _BoundedLoader(yaml.SafeLoader):
    """Counts while it splits the text and builds the tree of nodes, before any value is made of them."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._values = 0
        self._size_of: dict[str, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            name = str(event.anchor)
            if name in self.anchors and name not in self._size_of:
                raise RecipeError(f"not readable YAML: *{name} stands in what it stands for{event.start_mark}")
            self._count(self._size_of.get(name, 0))
            return super().compose_node(parent, index)
        before = self._values
        self._count(1)
        node = super().compose_node(parent, index)
        if event.anchor is not None:
            self._size_of[event.anchor] = self._values - before
        return node

    # The scanner reads ahead, and takes the longer for each bracket the more of them are open.
    def fetch_flow_collection_start(self, token: Any) -> None:
        self._check_depth()
        super().fetch_flow_collection_start(token)

    def add_indent(self, column: int) -> bool:
        self._check_depth()
        return bool(super().add_indent(column))

    def _check_depth(self) -> None:
        if self.flow_level + len(self.indents) >= MAX_DEPTH:
            raise RecipeError(f"YAML nested deeper than {MAX_DEPTH} levels{self.get_mark()}")

    def _count(self, more: int) -> None:
        self._values += more
        if self._values > MAX_VALUES:
            raise RecipeError(f"more than {MAX_VALUES:,} values, aliases counted with all that they stand for")
