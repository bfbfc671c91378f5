"""Errors as tests expect them: by their kind and by the facts that a user must see, not by their prose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from opticnerve.types import OpticNerveError


@contextmanager
def refused(
    kind: str, *facts: object, error: type[OpticNerveError] = OpticNerveError
) -> Iterator[pytest.ExceptionInfo[OpticNerveError]]:
    """What happens inside is refused with an `error` of this kind, whose message holds all of these names, numbers and
    files."""
    with pytest.raises(error) as caught:
        yield caught
    assert caught.value.kind == kind, f"kind {caught.value.kind!r}, not {kind!r}, of: {caught.value}"
    missing = [str(fact) for fact in facts if str(fact) not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
