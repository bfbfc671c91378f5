"""The order of the house: what may be imported when, and what each file promises."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "opticnerve"
MODULES = sorted(SOURCE.rglob("*.py"))


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.parametrize(
    "module",
    [
        "opticnerve.recipe",
        "opticnerve.registry",
        "opticnerve.types",
        "opticnerve.starter.weights",
        "opticnerve.cli.main",
    ],
)
def test_the_command_line_starts_without_torch(module: str) -> None:
    heavy = "[m for m in ('torch', 'transformers', 'timm', 'matplotlib', 'datasets') if m in sys.modules]"
    assert python(f"import sys, opticnerve_launch, {module}; print({heavy})").strip() == "[]"


@pytest.mark.slow
def test_importing_the_package_registers_it() -> None:
    code = "import opticnerve, transformers; print(type(transformers.AutoConfig.for_model('opticnerve')).__name__)"
    assert python(code).strip() == "OpticNerveConfig"


def test_the_packages_names_resolve() -> None:
    import opticnerve

    assert all(getattr(opticnerve, name) is not None for name in opticnerve.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        opticnerve.nonsense  # noqa: B018


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_every_file_says_what_it_is_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        return
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "no docstring"
    bare = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler) and n.type is None]
    assert not bare, f"bare except at {bare}"
