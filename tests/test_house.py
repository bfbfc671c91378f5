"""The order of the house: what may be imported when, what each file promises, whose words are used.

docs/architecture.md says why; the layers themselves stand in pyproject.toml and are checked by import-linter.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "opticnerve"
MODULES = sorted(SOURCE.rglob("*.py"))
LOOSE = {"__init__.py", "types.py", "registry.py"}
MOST_LINES, FEWEST_LINES = 400, 60
# Private poetry, by what the field says instead (docs/architecture.md, "Words").
POETRY = {
    "eye", "eyes", "ear", "ears", "brain", "brains", "visit", "visits", "usable", "tally", "lean", "chooser", "dice",
    "judge", "judges", "shelf", "wholes", "park", "parked", "roomy", "pulse", "told", "shadow", "verdict",
    "condemn", "door", "talk", "looking",
}  # fmt: skip
# Ordinary words, which nothing is to be called by alone.
VAGUE = {"say", "place", "words", "look", "seen", "rest", "drop", "move", "meet", "unit", "units", "idle", "blank"}


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports() -> grimp.ImportGraph:
    """Who imports whom, imports for annotations alone included."""
    return grimp.build_graph("opticnerve", exclude_type_checking_imports=False, cache_dir=None)


def name_of(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def lines_of(path: Path) -> int:
    return path.read_text(encoding="utf-8").count("\n")


def defined(path: Path) -> Iterator[str]:
    """What a file gives a name to: functions, classes, arguments, attributes and variables."""
    for node in ast.walk(tree(path)):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name


def pieces(name: str) -> list[str]:
    """`vision_attention`, `VisionAttention` → vision, attention."""
    return [p.lower() for p in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


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


class TestImports:
    def test_nothing_imports_in_a_circle(self) -> None:
        found = imports()
        ahead = {m: found.find_modules_directly_imported_by(m) for m in found.modules}
        left = set(ahead)
        while True:  # what imports nothing of the rest, or is imported by none of it, is in no circle
            wanted = {other for m in left for other in ahead[m] & left}
            kept = {m for m in left & wanted if ahead[m] & left}
            if kept == left:
                break
            left = kept
        assert not sorted(left)

    def test_the_top_has_no_loose_modules(self) -> None:
        assert {p.name for p in SOURCE.glob("*.py")} == LOOSE

    def test_the_version_stands_in_one_place(self) -> None:
        from opticnerve import __version__

        written = [name_of(p) for p in MODULES if f'version__ = "{__version__}"' in p.read_text(encoding="utf-8")]
        assert written == ["common/version.py"]
        assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text("utf-8")


class TestFiles:
    @pytest.mark.parametrize("path", MODULES, ids=name_of)
    def test_every_file_says_what_it_is_for(self, path: Path) -> None:
        assert ast.get_docstring(tree(path)), "no docstring"
        bare = [n.lineno for n in ast.walk(tree(path)) if isinstance(n, ast.ExceptHandler) and n.type is None]
        assert not bare, f"bare except at {bare}"

    def test_a_file_is_a_chapter(self) -> None:
        assert not {name_of(p): n for p in MODULES if (n := lines_of(p)) > MOST_LINES}

    def test_no_paragraph_stands_alone(self) -> None:
        """Short files are shared by several; what only one file uses stands in it."""
        found = imports()
        alone = {}
        for path in MODULES:
            module = "opticnerve." + name_of(path).removesuffix(".py").replace("/", ".")
            if path.name == "__init__.py" or lines_of(path) >= FEWEST_LINES:
                continue
            users = found.find_modules_that_directly_import(module)
            if len(users) == 1:
                alone[name_of(path)] = users
        assert not alone


class TestWords:
    def test_a_class_name_stands_once(self) -> None:
        names = Counter(n.name for p in MODULES for n in ast.walk(tree(p)) if isinstance(n, ast.ClassDef))
        assert not [name for name, count in names.items() if count > 1]

    def test_identifiers_are_the_fields_words(self) -> None:
        found = set()
        for path in MODULES:
            called = {n.name for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
            wrong = {name for name in defined(path) if POETRY & set(pieces(name)) or (name in VAGUE and name in called)}
            found |= {f"{name_of(path)}: {name}" for name in wrong}
        assert not sorted(found)


class TestOneFunctionEach:
    def test_only_ops_replaces_the_forward_of_others(self) -> None:
        replaced = re.compile(r"\.forward = |AttentionInterface\.register\(|_attn_implementation = ")
        allowed = {
            "common/private_names.py",
            "encoders/hf_vision.py",
        }  # the attribute's name; the meta device, for plan
        found = {name_of(p) for p in MODULES if replaced.search(p.read_text("utf-8")) and p.parent.name != "ops"}
        assert found <= allowed

    def test_files_are_written_by_one_function(self) -> None:
        """What a run keeps is whole or not there (`common.atomic`)."""
        written = re.compile(r"\.write_text\(|\.write_bytes\(")
        engines = SOURCE / "export" / "checks"  # programs for other engines' environments, where opticnerve is not
        found = [name_of(p) for p in MODULES if written.search(p.read_text("utf-8")) and p.parent != engines]
        assert found == ["common/atomic.py"]


def test_errors_are_matched_by_kind() -> None:
    """Tests of our own errors go by their kind and their facts (`tests/errors.py`), which stay when the words change."""
    ours = {
        "OpticNerveError",
        "DataError",
        "RecipeError",
        "HubError",
        "DiskFull",
        "Diverged",
        "LostProcess",
        "ApiError",
    }
    found = []
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.raises" and node.args:
                named = set(re.findall(r"\w+", ast.unparse(node.args[0])))
                if named & ours and any(k.arg == "match" for k in node.keywords):
                    found.append(f"{path.name}:{node.lineno}")
    assert not found


def test_any_is_rare_among_parameters() -> None:
    counted: Counter[bool] = Counter()
    for path in MODULES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                counted.update(ast.unparse(a.annotation) == "Any" for a in args if a.annotation is not None)
    assert counted[True] / counted.total() <= 0.03
