"""`peft`: adapters alone, which peft puts onto the stock language model, and onto a dock's parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel

from errors import refused
from opticnerve.export.export import export
from opticnerve.inference.load import load_model
from opticnerve.language.lora import remove_lora
from opticnerve.models.checkpoint.delta import read

pytestmark = pytest.mark.usefixtures("private_cache", "in_this_process")
Make = Callable[..., Path]
IDS = torch.arange(12)[None]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"targets": ["q_proj", "v_proj"], "alpha": 3}), ("llama", {"dora": True}),
        ("gpt2", {"rank_stabilised": True}), ("llama", {"init": "pissa", "rank_stabilised": True}),
        ("gpt2", {"init": "pissa", "dora": True}), ("qwen3_moe", {}),
        ("qwen3_moe", {"targets": ["q_proj", "v_proj", "gate_up_proj", "experts.down_proj"]}),
        ("mixtral", {"targets": ["experts.down_proj"]}),
    ],
    ids=str,
)  # fmt: skip
def test_on_the_stock_language_model(saved: Make, tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    run = saved(family, lora={"rank": 4, **options})
    done = export(run, "peft", tmp_path / "out")
    assert done.proof is not None  # over the dock, with pictures
    assert done.proof.difference < 1e-5
    model, _ = load_model(run, device="cpu")
    said = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == read(run)["bases"]["language"]["name"]
    assert "targets" not in options or set(said["target_modules"]) == {
        t for t in options["targets"] if t[1:] == "_proj"
    }
    assert {n.split("experts.")[1] for n in said["target_parameters"] or ()} == {
        t.removeprefix("experts.") for t in options.get("targets", ()) if t[1:] != "_proj"
    }
    stock = tf.AutoModelForCausalLM.from_pretrained(said["base_model_name_or_path"])
    with torch.no_grad():
        bare = stock(IDS).logits
        wanted = model.language_model(IDS).logits
        found = PeftModel.from_pretrained(stock, tmp_path / "out")(input_ids=IDS).logits
        assert not torch.allclose(bare, wanted, atol=1e-3)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        remove_lora(model.language_model)
        torch.testing.assert_close(model.language_model(IDS).logits, bare, rtol=1e-4, atol=1e-5)


def test_of_encoder_and_fusion(saved: Make, tmp_path: Path) -> None:
    model, processor = load_model(
        saved("llama", lora={"rank": 2}, fusion={"type": "cross_attention", "every": 1}), device="cpu"
    )
    model.image.fusion.layers[0].alpha_cross_attn.data.fill_(0.5)
    for part in ("image.encoder", "image.fusion"):
        model.give_lora({"rank": 2}, part)
        for name, parameter in model.part_parameters(f"{part}.lora").items():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    done = export(tmp_path / "saved", "peft", tmp_path / "out")
    assert done.proof is not None
    assert done.proof.difference < 1e-5
    assert {p.parent.name for p in (tmp_path / "out").rglob("adapter_config.json")} == {
        "out",
        "image.encoder",
        "image.fusion",
    }
    assert any("names no base model" in note for note in done.notes)


def test_refused(saved: Make, tmp_path: Path) -> None:
    with refused("unsupported", "no adapter", "merged"):
        export(saved("llama"), "peft", tmp_path / "out")
    with refused("unsupported", "lora.when: media"):
        export(saved("llama", lora={"rank": 2, "when": "media"}), "peft", tmp_path / "out")
