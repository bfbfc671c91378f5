"""A benchmark's trials in the process of the test, where each would have one of its own, and import everything again."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/NAME.py, whose `main` runs its sides here (that a process hands its trial over, test_gpu.py sees)."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sys.modules.pop(name, None)  # what else goes by that name
    module, side_by_side = importlib.import_module(name), importlib.import_module("side_by_side")

    def run_side(path: str, side: str, arguments: list[str]) -> Any:
        handed: list[Any] = []
        monkeypatch.setattr(module, "finish", handed.append)
        run(module, monkeypatch, "--side", side, *arguments)
        return handed[0]

    monkeypatch.setattr(side_by_side, "run_side", run_side)
    return module


def run(module: Any, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """`python benchmarks/NAME.py WORDS`."""
    verbosity = tf.logging.get_verbosity()
    monkeypatch.setattr(sys, "argv", [module.__file__, *words])
    module.main()
    tf.logging.set_verbosity(verbosity)
