"""Errors as tests expect them: by their kind and by the facts that a user must see, not by their prose."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from opticnerve.types import OpticNerveError


@contextmanager
def refused(
    kind: str, *facts: object, error: type[OpticNerveError] = OpticNerveError
) -> Iterator[pytest.ExceptionInfo[OpticNerveError]]:
    """What happens inside is refused with an `error` of this kind, whose message holds all of these names, numbers and
    files. A number stands for itself, not for a part of a longer one."""
    with pytest.raises(error) as caught:
        yield caught
    message = str(caught.value)
    assert caught.value.kind == kind, f"kind {caught.value.kind!r}, not {kind!r}, of: {message}"
    missing = [fact for fact in facts if not _holds(message, fact)]
    assert not missing, f"{missing} not in: {message}"


def _holds(message: str, fact: object) -> bool:
    if isinstance(fact, int | float):
        return re.search(rf"(?<![\w.-]){re.escape(str(fact))}(?![\w]|[.,]\d)", message) is not None
    return str(fact) in message
