"""The benchmark of generation runs, and both sides say the same tokens."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sys.modules.pop("generate", None)
    import generate

    return generate


@pytest.mark.parametrize(("batch", "questions"), [(1, 0), (5, 0), (1, 3)])
def test_every_side_says_the_same(batch: int, questions: int, generate: Any) -> None:
    sides = ["transformers", "opticnerve", *(f"opticnerve, {name}" for name in generate.ABLATED)]
    if questions:
        sides.append("transformers, one batch")
    said = [
        generate.trial(argparse.Namespace(side=side, quick=True, batch=batch, questions=questions)) for side in sides
    ]
    assert said[0].notes["distinct"] > 1
    assert all(trial.check == said[0].check for trial in said if "grouped" not in sides[said.index(trial)])
