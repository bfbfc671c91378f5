"""Bad samples that are left out: counted, the first of them named, and too many refused."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import overload

from opticnerve.recipe.data import BadSamples
from opticnerve.types import DataError, OpticNerveError

NAMED, SHOWN = 100, 5
"""How many are kept by name, and how many of these an error shows."""


class BadSampleCounter(Sequence[str]):
    """Takes each bad sample (as `on_error`), and counts it once, however often it is met.

    As a sequence it is as long as there are bad samples; the first hundred can be looked at.

    Args:
        rule: a stage's `bad_samples`. stage: its name, for the error.

    Raises:
        OpticNerveError: when called, or given how many there are (`of`): more are bad than the rule allows.
    """

    def __init__(self, rule: str | BadSamples, stage: str = "") -> None:
        self.rule, self.stage = rule, stage
        self.named: list[str] = []
        self._seen: set[int] = set()
        self._total: int | None = None

    def __call__(self, error: DataError) -> None:
        text = str(error)
        key = int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little")
        if key in self._seen:
            return
        self._seen.add(key)
        if len(self.named) < NAMED:
            self.named.append(text)
        self._check()

    def of(self, total: int) -> None:
        """Say how many samples there are, good and bad, so that a share of them is known."""
        self._total = total
        self._check()

    @property
    def allowed(self) -> int | None:
        """How many bad ones may be left out; None if that is not bounded, or not known yet."""
        if not isinstance(self.rule, BadSamples):
            return None
        if self.rule.limit is not None:
            return self.rule.limit
        assert self.rule.share is not None
        return None if self._total is None else int(self.rule.share * self._total)

    def __len__(self) -> int:
        return len(self._seen)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> list[str]: ...
    def __getitem__(self, number: int | slice) -> str | list[str]:
        return self.named[number]

    def _check(self) -> None:
        if self.allowed is None or len(self) <= self.allowed:
            return
        assert isinstance(self.rule, BadSamples)
        of = "" if self._total is None else f" of {self._total:,}"
        rule = f"limit {self.rule.limit}" if self.rule.limit is not None else f"share {self.rule.share:g}"
        more = f"; and {len(self) - SHOWN:,} more" if len(self) > SHOWN else ""
        raise OpticNerveError(
            f"stage {self.stage}: {len(self):,} samples{of} are bad, bad_samples allows {self.allowed:,} ({rule}): "
            f"{'; '.join(self.named[:SHOWN])}{more}. Look at all of them with `opticnerve data check`, mend or remove "
            f"them, or allow more",
            kind="bad-samples",
        )
