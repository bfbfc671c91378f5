"""Exact names, entry points, dotted paths."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest

from errors import refused
from opticnerve import registry
from opticnerve.registry import Registry


@pytest.fixture
def parts() -> Registry[Any]:
    return Registry("connector", group="opticnerve.nothing", builtin={"mlp": "opticnerve.connectors.mlp:MLPConnector"})


def test_exact_names_only(parts: Registry[Any]) -> None:
    assert parts.get("mlp").__name__ == "MLPConnector"
    for name in ("ml", "mlp2", "MLP", "my-mlp", ""):
        with refused("unknown-name", "connector", repr(name), "Known: mlp"):
            parts.get(name)
    with refused("unknown-name", "'mlp'"):
        parts.get("mpl")


def test_registering(parts: Registry[Any]) -> None:
    @parts.register("mine")
    class Mine:
        pass

    assert parts.get("mine") is Mine
    assert list(parts) == ["mine", "mlp"]
    with refused("exists-already", "'mine'"):
        parts.register("mine")(Mine)
    with refused("exists-already", "'mlp'"):
        parts.register("mlp")(Mine)


def test_dotted_paths_need_leave(parts: Registry[Any]) -> None:
    path = "opticnerve.connectors.mlp:LinearConnector"
    assert parts.get(path).__name__ == "LinearConnector"
    with refused("remote-code", "trust_remote_code=True"):
        parts.get(path, allow_dotted=False)
    assert parts.get("mlp", allow_dotted=False).__name__ == "MLPConnector"
    for wrong in ("opticnerve.nowhere:Thing", "opticnerve.types:Thing"):
        with refused("not-installed", "connector", repr(wrong)):
            parts.get(wrong)


def test_entry_points_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = [
        EntryPoint("theirs", "opticnerve.connectors.mlp:LinearConnector", "g"),
        EntryPoint("mlp", "opticnerve.connectors.mlp:LinearConnector", "g"),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: theirs if group == "g" else [])
    parts: Registry[Any] = Registry("connector", group="g", builtin={"mlp": "opticnerve.connectors.mlp:MLPConnector"})
    assert parts.names() == ["mlp", "theirs"]
    assert parts.get("theirs", allow_dotted=False).__name__ == "LinearConnector"
    # Nobody takes a built-in name over from outside.
    assert parts.get("mlp").__name__ == "MLPConnector"


@pytest.mark.parametrize("parts", [registry.encoders, registry.connectors, registry.fusions], ids=lambda p: p.kind)
def test_every_built_in_part_is_there(parts: Registry[Any]) -> None:
    for name in parts:
        assert isinstance(parts.get(name), type)
        assert (parts.get(name).__doc__ or "").strip()
