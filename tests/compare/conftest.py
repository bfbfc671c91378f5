"""Rows without training."""

from __future__ import annotations

from typing import Any

import pytest
from pretended import pretend

from opticnerve.compare import rows


@pytest.fixture
def performed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every row is pretended, in this process; the list of what was asked for."""
    asked: list[dict[str, Any]] = []

    def perform(spec: dict[str, Any]) -> dict[str, Any]:
        asked.append(spec)
        return pretend(spec)

    monkeypatch.setattr(rows, "_here", perform)
    monkeypatch.setattr(rows, "in_process", perform)
    return asked
