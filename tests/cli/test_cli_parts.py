"""`opticnerve parts`: what it says agrees with the classes, and it says it without importing them."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from errors import refused
from opticnerve import registry
from opticnerve.cli import part_docs
from opticnerve.registry import Registry

REGISTRIES = [r for r in vars(registry).values() if isinstance(r, Registry)]
PARTS = [pytest.param(kind, name, id=f"{kind.kind}-{name}") for kind in REGISTRIES for name in kind.names()]


def test_the_list_has_every_part_with_a_line(opticnerve: Callable[..., Any]) -> None:
    listed = opticnerve("parts", "--json").json
    assert [(row["kind"], row["name"]) for row in listed] == [(k.kind, n) for k in REGISTRIES for n in k.names()]
    assert all(len(row["summary"]) > 20 and row["summary"][-1] in ".:" for row in listed)
    shown = opticnerve("parts").out
    for row in listed:
        assert row["name"] in shown
        assert row["summary"][:60] in shown
    for kind in REGISTRIES:
        assert shown.count(f"{kind.kind} ") >= 1


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_a_page_agrees_with_the_class(kind: Registry[Any], name: str, opticnerve: Callable[..., Any]) -> None:
    """Read from the source without running it, and still what Python says of the class itself."""
    (page,) = [p for p in opticnerve("parts", name, "--json").json if p["kind"] == kind.kind]
    cls = kind.get(name)
    wanted = {
        n: p.default
        for n, p in inspect.signature(cls).parameters.items()
        if n not in part_docs.GIVEN and not n.startswith("_")
    }
    found = {o["name"]: o["default"] for o in page["options"]}
    assert set(wanted) <= set(found) <= {*wanted, "name"}
    for option, default in wanted.items():
        if default is inspect.Parameter.empty:
            assert found[option] in (part_docs.REQUIRED, part_docs.FROM_THE_NAME)
        else:
            assert ast.literal_eval(found[option]) == default
    assert all(o["meaning"] and "see `" not in o["meaning"][:5] for o in page["options"]), page["options"]
    assert page["target"] == f"{cls.__module__}:{cls.__qualname__}"


@pytest.mark.parametrize("kind", [registry.encoders, registry.connectors, registry.fusions], ids=lambda k: k.kind)
def test_every_part_of_a_tower_names_its_source(kind: Registry[Any], opticnerve: Callable[..., Any]) -> None:
    for name in kind.names():
        (page,) = opticnerve("parts", name, "--json").json
        assert "et al." in page["source"] or "http" in page["source"], name


def test_mlps_page(opticnerve: Callable[..., Any]) -> None:
    out = opticnerve("parts", "mlp").out
    assert "mlp  connector, opticnerve.connectors.mlp:MLPConnector" in out
    assert "Liu et al. 2024, Improved Baselines, section 3.2" in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert rows["depth"][1] == "2"
    assert rows["activation"][1] == "'gelu'"
    assert " ".join(rows["calibrate"][2:]).startswith("whether training may measure")  # said by the base class
    assert "in_size" not in rows  # the neighbours know


def test_where_the_weights_have_a_name(opticnerve: Callable[..., Any]) -> None:
    def options(name: str) -> dict[str, str]:
        return {o["name"]: o["default"] for o in opticnerve("parts", name, "--json").json[0]["options"]}

    assert options("hf_vision")["name"] == options("timm")["name"] == "required"
    assert options("hf_vision")["architecture"] == "from the name"
    assert "name" not in options("patches")
    assert "name" not in options("pair")  # each of the two has one
    assert "name" not in options("mlp")


def test_an_unknown_name_lists_near_ones(opticnerve: Callable[..., Any]) -> None:
    ran = opticnerve("parts", "pixelshuffle")
    assert ran.code == 1
    assert "no part is called 'pixelshuffle'; near it: pixel_shuffle" in ran.err
    assert "opticnerve parts" in ran.err
    assert "near it" not in opticnerve("parts", "xyzzy").err


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """(name, source) → a module that can be found."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        importlib.invalidate_caches()

    return write


class TestDottedPaths:
    def test_a_part_from_elsewhere_is_read_and_not_run(
        self, module: Callable[[str, str], None], opticnerve: Callable[..., Any]
    ) -> None:
        module(
            "far_away",
            '"""Pooling (Doe et al. 2020, section 2)."""\n'
            "from opticnerve.connectors.mlp import MLPConnector as Base\n"
            'raise SystemExit("nobody may run this")\n'
            "class Pooled(Base):\n"
            '    """Fewer tokens.\n\n    Args:\n        group: so many\n            make one.\n'
            '        stride: how far apart.\n    """\n'
            "    def __init__(self, *, in_size, group: int = 2, stride=None, **other): ...\n",
        )
        (page,) = opticnerve("parts", "far_away:Pooled", "--json").json
        assert page["kind"] == "connector"
        assert [(o["name"], o["default"], o["meaning"]) for o in page["options"]] == [
            ("group", "2", "so many make one."),
            ("stride", "None", "how far apart."),
        ]
        assert page["source"] == "Pooling (Doe et al. 2020, section 2)."

    @pytest.mark.parametrize(
        ("path", "says"),
        [
            ("no_such_module:Part", "there is no Python source"),
            ("opticnerve.connectors.mlp:Part", "opticnerve.connectors.mlp has no class Part"),
            ("opticnerve.types:Features", "is no part: it builds on none of Encoder, Connector, Fusion"),
            ("math:floor", "there is no Python source"),
            ("no.such.package:Part", "cannot find no.such.package"),
        ],
    )
    def test_what_is_no_part(self, path: str, says: str, opticnerve: Callable[..., Any]) -> None:
        ran = opticnerve("parts", path)
        assert (ran.code, says in ran.err) == (1, True), ran.err


def test_a_part_that_cannot_be_read_is_listed_nevertheless(
    opticnerve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.connectors.names()
    monkeypatch.setitem(registry.connectors._targets, "gone", "a_package_that_left:Part")
    (row,) = [r for r in opticnerve("parts", "--json").json if r["name"] == "gone"]
    assert "a_package_that_left" in row["summary"]
    assert opticnerve("parts", "gone").code == 1


def test_a_part_registered_in_this_program(monkeypatch: pytest.MonkeyPatch, opticnerve: Callable[..., Any]) -> None:
    from opticnerve.connectors.mlp import LinearConnector

    registry.connectors.names()
    monkeypatch.setitem(registry.connectors._targets, "mine", LinearConnector)
    assert "one matrix" in opticnerve("parts", "mine").out


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import json, sys, opticnerve_launch\nfrom opticnerve.cli.parts import parts\n"
        "parts('qformer', True)\nheavy = [m for m in ('torch', 'transformers', 'timm') if m in sys.modules]\n"
        "print(json.dumps(heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stderr.splitlines()[-1]) == []
    assert json.loads(done.stdout)[0]["name"] == "qformer"


@pytest.mark.parametrize(
    ("doc", "wanted"),
    [
        ("Does it.\n\nArgs: a, b: both. c: the third: one.", {"a": "both.", "b": "both.", "c": "the third: one."}),
        ("Does it.\n\nArgs:\n    a: one\n        and more. Note: a.\n    b: two.", {"a": "one and more. Note: a.", "b": "two."}),
        ("Does it.\n\nArgs:\n    a: one.\n\nRaises:\n    b: no.", {"a": "one."}),
        ("Does it.", {}),
    ],
)  # fmt: skip
def test_what_stands_under_args(doc: str, wanted: dict[str, str]) -> None:
    assert part_docs._arguments(doc, {"a", "b", "c"}) == wanted


def test_the_first_sentence() -> None:
    assert part_docs.summary("As Xiao et al. 2021 did. And more.\n\nMore.") == "As Xiao et al. 2021 did."
    assert part_docs.summary("Over\nlines") == "Over lines"
    with refused("unknown-name", "opticnerve.types", "Nothing"):
        part_docs.read("opticnerve.types:Nothing")
