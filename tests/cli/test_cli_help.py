"""Help answers at once: nothing heavy is imported for it, and it shows a command to paste."""

from __future__ import annotations

import json
import subprocess
import sys

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
PROBE = f"""
import json, sys, opticnerve_launch
try:
    sys.argv = ["opticnerve", *sys.argv[1:]]
    opticnerve_launch.main()
finally:
    print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]), file=sys.stderr)
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PROBE, *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy_and_shows_an_example(command: str) -> None:
    done = run(*command.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr.splitlines()[-1]) == []
    # `data` only leads to its two commands; every other help has something to paste.
    assert (f"opticnerve {command}".strip() if command else "opticnerve demo") in done.stdout


def test_exit_codes_are_in_the_help() -> None:
    help_text = run("--help").stdout
    for code in ("0", "1", "2", "3", "130"):
        assert any(line.strip().startswith(f"{code}  ") for line in help_text.splitlines())


def test_version_is_the_package_s() -> None:
    import opticnerve

    done = run("--version")
    assert done.stdout.split() == ["opticnerve", opticnerve.__version__]


def test_the_module_runs_by_name() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "opticnerve_launch", "--version"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
