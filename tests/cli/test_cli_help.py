"""Help answers at once: nothing heavy is imported for it, and it shows a command to paste."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

COMMANDS = [
    "",
    "demo",
    "plan",
    "train",
    "ask",
    "chat",
    "eval",
    "merge",
    "export",
    "serve",
    "ui",
    "push",
    "import",
    "parts",
    "data",
    "data check",
    "data show",
]
HEAVY = ("torch", "transformers", "datasets", "matplotlib", "peft", "timm", "pydantic", "numpy", "PIL")
# One process for all, which has imported what it has: of a command that imports too much, those behind it say so, too.
PROBE = f"""
import io, json, sys, opticnerve_launch
from contextlib import redirect_stdout
found = {{}}
for line in json.load(sys.stdin):
    sys.argv, out = ["opticnerve", *line.split()], io.StringIO()
    try:
        with redirect_stdout(out):
            opticnerve_launch.main()
    except SystemExit as left:
        found[line] = [left.code or 0, out.getvalue(), [m for m in {HEAVY!r} if m in sys.modules]]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    """What is typed → exit code, what is printed, and what heavy there was in `sys.modules` by then."""
    asked = json.dumps(["--version", *(f"{command} --help".strip() for command in COMMANDS)])
    done = subprocess.run([sys.executable, "-c", PROBE], input=asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy_and_shows_an_example(command: str, said: dict[str, Any]) -> None:
    code, printed, heavy = said[f"{command} --help".strip()]
    assert (code, heavy) == (0, [])
    # `data` only leads to its two commands; every other help has something to paste.
    assert (f"opticnerve {command}".strip() if command else "opticnerve demo") in printed


def test_exit_codes_are_in_the_help(said: dict[str, Any]) -> None:
    for code in ("0", "1", "2", "3", "130"):
        assert any(line.strip().startswith(f"{code}  ") for line in said["--help"][1].splitlines())


def test_version_is_the_package_s(said: dict[str, Any]) -> None:
    import opticnerve

    code, printed, heavy = said["--version"]
    assert (code, heavy) == (0, [])
    assert printed.split() == ["opticnerve", opticnerve.__version__]


def test_the_module_runs_by_name() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "opticnerve_launch", "--version"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
