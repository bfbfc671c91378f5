"""vLLM: what the plugin takes, its towers, and the same greedy answers where OPTICNERVE_VLLM_PYTHON names an interpreter
that has vLLM (and opticnerve)."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

import tiny
from errors import refused
from opticnerve import vllm_plugin
from opticnerve.export.export import export
from opticnerve.inference.load import load_model
from opticnerve.vllm_plugin import towers

pytestmark = pytest.mark.usefixtures("private_cache")
Make = Callable[..., Path]
ENGINE = os.environ.get("OPTICNERVE_VLLM_PYTHON")
ROOT = Path(__file__).parents[2]


def spec(fusion: str = "splice") -> dict[str, Any]:
    return {part: {"type": kind} for part, kind in (("encoder", "e"), ("connector", "c"), ("fusion", fusion))}


@pytest.mark.parametrize(
    ("given", "facts"),
    [
        ({"towers": {"image": spec("cross_attention")}}, ["image fusion is cross_attention", "fusion splice"]),
        ({"towers": {"image": spec()}, "lora": {"rank": 2, "when": "media"}}, ["lora.when: media", "nearest: lora"]),
        ({"towers": {"image": spec()}, "lora": {"rank": 2}}, ["its adapter", "--to merged"]),
        ({"towers": {}}, ["neither vision encoder nor audio encoder"]),
    ],
)
def test_what_vllm_would_run_otherwise_is_refused_with_a_way_out(
    given: dict[str, Any], facts: list[str], tmp_path: Path
) -> None:
    config = SimpleNamespace(**{"lora": None, **given})
    with refused("unsupported", *facts):
        towers.check(config, tmp_path)


def test_a_plain_splice_is_taken_and_a_folder_without_its_bases_is_not(saved: Make, tmp_path: Path) -> None:
    plain = SimpleNamespace(lora=None, towers={"image": spec()})
    towers.check(plain, tmp_path)
    with refused("unsupported", "opticnerve export"):
        towers.check(plain, saved("llama", "siglip_vision_model"))


def test_a_connector_that_reads_the_question_is_refused() -> None:
    towers.check_tower("image", SimpleNamespace(wants_text=False))
    with refused("unsupported", "image", "qformer"):
        towers.check_tower("image", SimpleNamespace(wants_text=True))


def test_it_registers_once_and_names_a_class_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, str] = {}

    def register(name: str, path: str) -> None:
        assert name not in known
        known[name] = path

    registry = SimpleNamespace(get_supported_archs=lambda: known, register_model=register)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    vllm_plugin.register()
    vllm_plugin.register()
    ((architecture, path),) = known.items()
    assert architecture == "OpticNerveForConditionalGeneration"
    module, _, name = path.partition(":")
    source = importlib.util.find_spec(module)
    assert source is not None
    assert f"class {name}(" in Path(str(source.origin)).read_text()


def test_the_entry_point_is_declared() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert declared["vllm.general_plugins"] == {"opticnerve": "opticnerve.vllm_plugin:register"}


@pytest.mark.parametrize(
    ("vision_encoder", "options"),
    [
        # In files, transformers calls DINOv2's attention otherwise than its modules do.
        ("dinov2", {"connector": "pixel_shuffle"}),
        ("siglip_vision_model", {"tiling": {"type": "anyres"}}),
    ],
)
def test_towers_alone_are_the_models_own(
    vision_encoder: str, options: dict[str, Any], saved: Make, tmp_path: Path
) -> None:
    model, _ = load_model(saved("llama", vision_encoder, **options), device="cpu")
    model.save_pretrained(tmp_path)
    state = {n: t for n, t in load_file(tmp_path / "model.safetensors").items() if n.startswith("image.")}
    config = AutoConfig.from_pretrained(tmp_path)
    found = towers.load_towers(config, state, ["image"], dtype=torch.float32)["image"]
    theirs, ours = found.state_dict(), model.image.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[n], ours[n]) for n in ours)
    assert not found.training
    assert not any(p.requires_grad for p in found.parameters())
    del state["image.connector.input_mean"]
    with refused("mismatch", "image.connector.input_mean"):
        towers.load_towers(config, state, ["image"], dtype=torch.float32)


@pytest.mark.parametrize("tiling", [None, {"type": "anyres"}])
def test_the_processor_says_how_many_rows_a_picture_becomes(tiling: Any, saved: Make) -> None:
    _, processor = load_model(saved("llama", "siglip_vision_model", tiling=tiling), device="cpu")
    for width, height in ((40, 40), (97, 33), (30, 140)):
        picture = tiny.picture().resize((width, height))
        made = processor(images=[picture], text=processor.image_token, return_tensors="pt")
        assert len(made["pixel_values"]) == processor.image_pieces(height, width)


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 32: vLLM's attention on a CPU takes no smaller ones."""
    small = tiny.language_config

    def config(family: str, vocabulary: int) -> Any:
        made = small(family, vocabulary)
        made.update({"hidden_size": 128, "head_dim": 32})
        return made

    monkeypatch.setattr(tiny, "language_config", config)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("wide")
@pytest.mark.skipif(ENGINE is None, reason="OPTICNERVE_VLLM_PYTHON names no interpreter with vllm")
@pytest.mark.parametrize(
    ("to", "vision_encoder", "options"),
    [
        ("hf-llava", "clip_vision_model", {"layer": -2}),
        ("merged", "dinov2", {"connector": "pixel_shuffle"}),
        ("merged", "siglip_vision_model", {"tiling": {"type": "anyres"}}),
    ],
)
def test_vllm_gives_the_same_greedy_answers(
    to: str, vision_encoder: str, options: dict[str, Any], saved: Make, tmp_path: Path
) -> None:
    # A `kind` of its own: the folders of the other tests hold models with smaller heads.
    export(saved("llama", vision_encoder, kind="byte-level, trimmed offsets", **options), to, tmp_path / "out")
    script = ROOT / "examples" / "serve_with_vllm.py"
    command = [sys.executable, str(script), str(tmp_path / "out"), "--vllm-python", str(ENGINE)]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "8 of 8 prompts and greedy answers are the same" in done.stdout
