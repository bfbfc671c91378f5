"""DoRA, rank stabilisation and PiSSA: what they compute, and that folders, merges and resumed stages keep it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from errors import refused
from opticnerve.inference.generate import Answerer
from opticnerve.language.lora import add_lora, is_lora, linear_layers, merge_lora
from opticnerve.models import OpticNerveForConditionalGeneration
from opticnerve.models.vlm.build import Dock, merge
from opticnerve.recipe import LoraSpec
from opticnerve.types import ask

KINDS: dict[str, dict[str, Any]] = {
    "dora": {"dora": True}, "rank-stabilised": {"rank_stabilised": True}, "pissa": {"init": "pissa"},
    "gaussian dora": {"dora": True, "init": "gaussian"},
    "orthogonal": {"init": "orthogonal"},
}  # fmt: skip
load = OpticNerveForConditionalGeneration.from_pretrained


def logits(made: Dock, model: Any = None) -> Tensor:
    asked = Answerer(made.model, made.processor).inputs([ask("what is it?", tiny.picture(1))])
    with torch.no_grad():
        found: Tensor = (model or made.model)(**asked).logits
    return found


def disturb(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_lora(name):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_begins_as_the_model_and_is_merged_to_what_it_computes(
    docked: Callable[..., Dock], kind: str, family: str
) -> None:
    made = docked(family)
    before = logits(made)
    made.model.give_lora({"rank": 4, **KINDS[kind]})
    torch.testing.assert_close(logits(made), before, rtol=1e-3, atol=1e-4)
    disturb(made.model)
    trained = logits(made)
    assert not torch.allclose(trained, before, atol=1e-3)
    merge_lora(made.model.language_model)
    torch.testing.assert_close(logits(made), trained, rtol=1e-3, atol=1e-4)


def test_scales() -> None:
    language = tiny.language_model("llama", 50)
    add_lora(language, {"rank": 4, "alpha": 8, "rank_stabilised": True})
    layer = language.get_submodule(linear_layers(language)[0])
    assert layer.scaling["opticnerve"] == 8 / 4**0.5


def test_pissa_takes_the_first_singular_vectors_out() -> None:
    language = tiny.language_model("llama", 50)
    name = linear_layers(language)[0]
    whole = language.get_submodule(name).weight.detach().clone()
    values = torch.linalg.svdvals(whole)
    add_lora(language, {"rank": 4, "init": "pissa"})
    left = torch.linalg.svdvals(language.get_submodule(name).base_layer.weight)
    torch.testing.assert_close(left[:8], values[4:12], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["dora", "pissa"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_folders_and_resumed_stages_keep_it(
    make_recipe: Callable[..., Any], resumed_exactly: Callable[..., Any], tmp_path: Path, kind: str, precision: str
) -> None:
    stage = {"train": {"connector": 1e-2, "language.lora": 1e-2}, "lora": {"rank": 4, **KINDS[kind]}}
    recipe = make_recipe(precision=precision, **stage)
    whole, _ = resumed_exactly(recipe)
    folder, wanted = tmp_path / "whole" / "stages" / "0-align", logits(whole)
    assert torch.equal(logits(whole, load(folder)), wanted)
    whole.model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(whole, load(tmp_path / "saved")), wanted)
    tolerance = 1e-4 if precision == "fp32" else 1e-1
    merged = load(merge(folder, tmp_path / "merged"))
    assert not any("lora" in n or "start" in n for n in merged.state_dict())
    torch.testing.assert_close(logits(whole, merged), wanted, rtol=tolerance, atol=tolerance)


def test_what_does_not_go_together(docked: Callable[..., Dock]) -> None:
    for kind in ({"dora": True}, {"init": "pissa"}):
        with pytest.raises(ValueError, match="when: media"):
            LoraSpec(when="media", **kind)
        made = docked()
        layer = made.model.language_model.get_submodule(linear_layers(made.model.language_model)[0])
        layer.weight = nn.Parameter(layer.weight.data.to(torch.uint8), requires_grad=False)
        with refused("conflict", "quantised"):
            made.model.give_lora(kind)


def test_folders_say_no_more_than_before() -> None:
    """An older version reads what uses nothing new."""
    assert set(LoraSpec().options()) == {"rank", "alpha", "dropout", "targets", "when"}
    assert LoraSpec(dora=True).options()["dora"] is True
