"""The example package of parts from outside: by entry point, by dotted path, docked, saved, and loaded with leave."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from errors import refused
from opticnerve import recipe, registry
from opticnerve.models import OpticNerveForConditionalGeneration
from opticnerve.models.vlm.build import Dock, dock, dock_recipe

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "third_party"
ENCODER, CONNECTOR = "example_parts.encoder:ConvStemEncoder", "example_parts.connector:WindowPoolConnector"

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's source on the path; it is not installed."""
    monkeypatch.syspath_prepend(EXAMPLE / "src")


@pytest.fixture
def installed(importable: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What an installer leaves beside the source: the entry points of `pyproject.toml`."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    site = tmp_path / "site"
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n", encoding="utf-8"
    )
    lines = [
        line
        for group, parts in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {target}" for name, target in parts.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.syspath_prepend(site)
    for kind in (registry.encoders, registry.connectors):  # as in a fresh process, and as before afterwards
        monkeypatch.setattr(kind, "_targets", dict(kind._targets))
        monkeypatch.setattr(kind, "_entry_points_read", False)
    return site


@pytest.fixture
def vision_encoder(importable: None, tmp_path: Path) -> str:
    """A folder with the encoder's weights."""
    from example_parts.encoder import ConvStemEncoder

    torch.manual_seed(3)
    ConvStemEncoder(width=16, depth=3, image_size=32).save(tmp_path / "eye")
    return str(tmp_path / "eye")


def logits(made: Any) -> torch.Tensor:
    from opticnerve.inference.generate import Answerer
    from opticnerve.types import ask

    with torch.no_grad():
        return made[0](**Answerer(*made).inputs([ask("what is it?", tiny.picture(1))])).logits


def test_found_by_the_names_of_its_entry_points(installed: Path) -> None:
    for kind, name, path in (
        (registry.encoders, "conv_stem", ENCODER),
        (registry.connectors, "window_pool", CONNECTOR),
    ):
        assert name in kind.names()
        assert kind.get(name, allow_dotted=False) is kind.get(path)
        with refused("remote-code", "trust_remote_code=True"):
            kind.get(path, allow_dotted=False)


def test_not_found_by_name_where_it_is_not_installed(importable: None) -> None:
    with refused("unknown-name", "'window_pool'"):
        registry.connectors.get("window_pool")
    assert registry.connectors.get(CONNECTOR).__name__ == "WindowPoolConnector"


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("name", ["test_encoder", "test_connector"])
def test_its_own_tests_pass(name: str) -> None:
    """They hold the parts to the contract."""
    spec = importlib.util.spec_from_file_location("example_tests", EXAMPLE / "tests" / "test_parts.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    getattr(module, name)()


@pytest.mark.usefixtures("installed")
def test_docked_by_name_it_loads_as_any_other_model(
    vision_encoder: str, language_folder: Callable[..., str], tmp_path: Path
) -> None:
    made = dock({"type": "conv_stem", "name": vision_encoder}, {"type": "window_pool", "window": 2}, language_folder())
    assert made.model.image.num_tokens == 4  # a map of 4 × 4, pooled
    made.model.save_pretrained(tmp_path / "model")
    made.processor.save_pretrained(tmp_path / "model")
    tower = json.loads((tmp_path / "model" / "config.json").read_text())["towers"]["image"]
    assert tower["encoder"]["type"] == "conv_stem"
    assert tower["connector"] == {"type": "window_pool", "calibrate": True, "window": 2}
    again = OpticNerveForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert torch.equal(logits((again, made.processor)), logits(tuple(made)))


class TestByDottedPath:
    @pytest.fixture
    def made(self, vision_encoder: str, language_folder: Callable[..., str]) -> Dock:
        """The example's own recipe, on a tiny language model."""
        changes = {
            "model.language.name": language_folder(),
            "model.image.encoder.name": vision_encoder,
            "precision": "fp32",
        }
        read = recipe.load(EXAMPLE / "recipe.yaml", [f"{key}={value}" for key, value in changes.items()])
        assert (read.model.image.encoder.type, read.model.image.connector.type) == (ENCODER, CONNECTOR)
        return dock_recipe(read)

    @pytest.fixture
    def saved(self, made: Dock, tmp_path: Path) -> Path:
        made.model.save_pretrained(tmp_path / "model")
        made.processor.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def test_a_saved_folder_loads_with_leave_only(self, made: Dock, saved: Path) -> None:
        with refused("remote-code", ENCODER, "trust_remote_code=True"):
            OpticNerveForConditionalGeneration.from_pretrained(saved)
        again = OpticNerveForConditionalGeneration.from_pretrained(saved, trust_remote_code=True)
        assert torch.equal(logits((again, made.processor)), logits(tuple(made)))
        with refused("remote-code", "trust_remote_code=True"):  # leave was given for one folder, once
            OpticNerveForConditionalGeneration.from_pretrained(saved)

    def test_without_leave_its_code_is_not_even_imported(
        self, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "trap.py").write_text("raise SystemExit('imported')", encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        config = json.loads((saved / "config.json").read_text())
        for part in ("encoder", "connector", "fusion"):
            changed = json.loads(json.dumps(config))
            for other in ("encoder", "connector"):  # so that it gets as far as the one in question
                changed["towers"]["image"][other] = {"type": "linear"} if other == "connector" else _plain_eye()
            changed["towers"]["image"][part]["type"] = "trap:Part"
            (saved / "config.json").write_text(json.dumps(changed))
            with refused("remote-code", part, "'trap:Part'"):
                OpticNerveForConditionalGeneration.from_pretrained(saved)

    def test_where_the_package_is_missing_the_error_says_so(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(EXAMPLE / "src")])
        for module in [m for m in sys.modules if m.startswith("example_parts")]:
            monkeypatch.delitem(sys.modules, module)
        with refused("not-installed", "'example_parts'"):
            OpticNerveForConditionalGeneration.from_pretrained(saved, trust_remote_code=True)


def _plain_eye() -> dict[str, Any]:
    return {"type": "hf_vision", "architecture": tiny.vision_config("vit").to_dict()}


def test_the_command_line_lists_it(installed: Path) -> None:
    """In a process of its own, as users have it: found by its metadata on the path."""
    done = subprocess.run(
        [sys.executable, "-m", "opticnerve_launch", "parts", "window_pool", "--json"],
        capture_output=True, text=True, check=False, env={**_environment(), "PYTHONPATH": f"{installed}:{EXAMPLE / 'src'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (page,) = json.loads(done.stdout)
    assert (page["kind"], page["target"]) == ("connector", CONNECTOR)
    assert page["options"][0] == {
        "name": "window", "type": "int", "default": "2", "meaning": "side of the square in tokens.",
    }  # fmt: skip


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize(
    ("path", "options", "refusal"),
    [
        (CONNECTOR, {"in_size": 4, "out_size": 4, "in_tokens": 15}, ("refused", 15, "2 × 2")),
        (CONNECTOR, {"in_size": 4, "out_size": 4, "in_tokens": 16, "window": 3}, ("refused", 16)),
        (ENCODER, {"image_size": 20, "depth": 3}, ("refused", "image_size", 20, 3, 8)),
    ],
)
def test_its_errors_follow_the_house(path: str, options: dict[str, Any], refusal: tuple[Any, ...]) -> None:
    kind = registry.encoders if path == ENCODER else registry.connectors
    with refused(*refusal):
        kind.get(path)(**options)
    with refused("refused", "nowhere", "config.json"):
        registry.encoders.get(ENCODER).from_pretrained("nowhere")


def test_the_package_needs_nothing_of_ours_copied() -> None:
    """It builds on opticnerve's public modules alone, and its files are the ones that its README lists."""
    text = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    files = [p.relative_to(EXAMPLE) for p in EXAMPLE.rglob("*") if p.suffix in (".py", ".toml", ".yaml")]
    own = [p for p in files if p.name != "__init__.py" and not {"build", "dist"} & set(p.parts)]
    assert own and all(f"]({p})" in text for p in own)
