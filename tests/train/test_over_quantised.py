"""Stages over frozen weights in 4 and 8 bits: what an adapter learns is what it learns over the dequantised weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import worlds
from torch import nn

import tiny
from errors import refused
from opticnerve import recipe as recipes
from opticnerve.data.collators.next_token import Collator
from opticnerve.data.dataset.load import load_data
from opticnerve.data.encode.packing import pack
from opticnerve.data.encode.tokenize import encode
from opticnerve.export.export import RECORD, export
from opticnerve.export.formats import Options
from opticnerve.inference.generate import Answerer
from opticnerve.language.quantization import QuantizedLinear, dequantize, planned_bytes, quantized_layers
from opticnerve.models import OpticNerveForConditionalGeneration
from opticnerve.models.freeze import freeze
from opticnerve.models.vlm.build import Dock, dock, dock_recipe, merge, quantization
from opticnerve.objectives.next_token import NextToken
from opticnerve.plan import plan
from opticnerve.recipe import Recipe
from opticnerve.types import RecipeError, ask

pytest.importorskip("bitsandbytes")
KINDS = ("nf4", "int8")
CONFIGS: dict[str, Callable[[], Any]] = {
    "nf4": lambda: tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "int8": lambda: {"load_in_8bit": True},
}
QUESTION = ask("what is it?", tiny.picture(1))
TRAIN = {"connector": 1e-2, "language.lora": 1e-2}
load = OpticNerveForConditionalGeneration.from_pretrained


@pytest.fixture
def over(make_recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """A recipe over quantised parts: `language` and `image` as kinds."""

    def make(language: str | None = "nf4", image: str | None = None, **stage: Any) -> Recipe:
        made = make_recipe(**{"train": TRAIN, "lora": {"rank": 4}, **stage}).model_dump(mode="json", exclude_none=True)
        made["model"]["language"]["quantize"] = language
        made["model"]["image"]["encoder"]["quantize"] = image
        return recipes.load(made)

    return make


def step_of(made: Dock, recipe: Recipe) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch."""
    batch = Collator(made.processor)(
        [pack([[encode(c, made.processor)]]) for c in load_data(recipe.stages[0].data[0])[:3]]
    )
    loss, _ = NextToken(made.model)(batch)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in made.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("image", [None, "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_of_lora_over_the_dequantised_weights(
    over: Callable[..., Recipe], kind: str, image: str | None
) -> None:
    recipe, found = over(kind, image), []
    for plain in (False, True):
        made = dock_recipe(recipe)
        torch.manual_seed(0)
        made.model.give_lora({"rank": 4})
        for name, parameter in made.model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        if plain:
            dequantize(made.model, torch.float32)
            assert not quantized_layers(made.model)
        freeze(made.model, TRAIN)
        found.append(step_of(made, recipe))
    (loss, grads), (wanted, wanted_grads) = found
    assert torch.allclose(loss, wanted, rtol=1e-5)
    assert grads.keys() == wanted_grads.keys()
    assert any("lora_A" in n for n in grads)
    for name, grad in grads.items():
        torch.testing.assert_close(
            grad, wanted_grads[name], rtol=1e-5, atol=1e-6 * float(wanted_grads[name].abs().max())
        )
    made = dock_recipe(over(None))
    made.model.give_lora({"rank": 4})
    freeze(made.model, TRAIN)
    assert not torch.allclose(step_of(made, recipe)[0], wanted, rtol=1e-5)  # the digits that are gone do count


def test_what_is_quantised(over: Callable[..., Recipe]) -> None:
    """Linear layers of the decoder and of the encoder, nothing else; the tables say how many weights they stand for."""
    made, whole = dock_recipe(over("nf4", "int8")), dock_recipe(over(None))
    layers = quantized_layers(made.model)
    assert {n.split(".layers.")[0] for n in layers} == {"language_model.model", "image.encoder.model.encoder"}
    plain = {n for n, p in made.model.named_parameters() if p.is_floating_point() and p.ndim > 1}
    assert {"language_model.lm_head.weight", "language_model.model.embed_tokens.weight"} & plain
    assert all(n in plain for n, p in whole.model.named_parameters() if ".connector." in n and p.ndim > 1)
    shown, wanted = (freeze(m.model, {"connector": 1e-3}) for m in (made, whole))
    assert [r.parameters for r in shown.rows] == [r.parameters for r in wanted.rows]
    assert "nf4" in next(r.dtype for r in shown.rows if r.part == "language")
    off = quantization(made.model)
    assert 0.05 < off["language"]["distance"] < 0.15
    assert 0 < off["image"]["distance"] < 0.01


def test_casting_a_model_leaves_the_scales_their_digits() -> None:
    for kind in KINDS:
        layer = QuantizedLinear(nn.Linear(40, 24), kind)  # type: ignore[arg-type]
        before = layer.dequantized(torch.float32)
        assert torch.equal(layer.bfloat16().float().dequantized(torch.float32), before)


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_bit_for_bit_and_loaded_as_it_was_trained(
    over: Callable[..., Recipe], resumed_exactly: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    recipe = over(kind, "int8", precision="bf16")
    whole, _ = resumed_exactly(recipe)
    folder = tmp_path / "whole" / "stages" / "0-align"
    reference = json.loads((folder / "dock.json").read_text())
    bases = reference["bases"]
    assert (bases["language"]["quantize"], bases["image"]["quantize"]) == (kind, "int8")
    assert reference["format"] == 2  # who reads formats up to 1 alone would put the adapter beside the plain weights
    loaded = load(folder)
    asked = Answerer(loaded, whole.processor).inputs([QUESTION])
    with torch.no_grad():
        wanted = whole.model(**asked).logits
        assert torch.equal(loaded(**asked).logits, wanted)
        assert torch.equal(load(folder, quantization_config=CONFIGS[kind]())(**asked).logits, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_exported_dequantised(
    over: Callable[..., Recipe], train: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    made, _ = train(over(kind, "int8"), "run")
    folder = tmp_path / "run" / "stages" / "0-align"
    asked = Answerer(made.model, made.processor).inputs([QUESTION])
    with torch.no_grad():
        wanted = made.model(**asked).logits
    folders = {"merged": merge(folder, tmp_path / "merged"), "saved": tmp_path / "saved"}
    made.model.save_pretrained(folders["saved"])
    for plain in folders.values():
        model = load(plain)
        assert not quantized_layers(model)
        torch.testing.assert_close(model(**asked).logits, wanted, rtol=1e-4, atol=1e-5)
    done = export(folder, "merged", tmp_path / "exported", options=Options(unchecked=True))
    told = json.loads((tmp_path / "exported" / RECORD).read_text())
    assert told["quantization"] == done.quantization == quantization(made.model)
    assert any(kind in note for note in told["notes"])
    assert told["rounding"] < 1e-4


def test_another_kind_than_it_was_trained_over(
    over: Callable[..., Recipe], train: Callable[..., Any], tmp_path: Path
) -> None:
    train(over("nf4"), "run")
    folder = tmp_path / "run" / "stages" / "0-align"
    with refused("conflict", "nf4", "int8"):
        load(folder, quantization_config=CONFIGS["int8"]())
    for given in (tf.BitsAndBytesConfig(load_in_4bit=True), {"load_in_8bit": True, "llm_int8_skip_modules": ["a"]}):
        with refused("unsupported", "opticnerve merge"):
            load(folder, quantization_config=given)


def test_a_plain_run_loaded_in_fewer_bits(
    over: Callable[..., Recipe], train: Callable[..., Any], tmp_path: Path
) -> None:
    train(over(None), "run")
    folder = tmp_path / "run" / "stages" / "0-align"
    assert json.loads((folder / "dock.json").read_text())["format"] == 1  # as ever
    model = load(folder, quantization_config=CONFIGS["nf4"]())
    assert {layer.kind for layer in quantized_layers(model).values()} == {"nf4"}
    assert not quantized_layers(model.image)


def test_a_recipe_goes_on_from_a_quantised_run(
    over: Callable[..., Recipe], train: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = over("nf4", "int8")
    begun, _ = train(recipe, "run")
    folder = tmp_path / "run" / "stages" / "0-align"
    begun.processor.save_pretrained(folder)
    stage = recipe.stages[0].model_dump(mode="json", exclude_none=True)

    def on(**changes: Any) -> Recipe:
        return recipes.load({"precision": "fp32", "model": {"from": str(folder)}, "stages": [{**stage, **changes}]})

    assert plan.make(on()).stages[0].memory.weights == plan.make(recipe).stages[0].memory.weights
    made, _ = train(on(), "on")
    assert {layer.kind for layer in quantized_layers(made.model.image).values()} == {"int8"}
    assert {layer.kind for layer in quantized_layers(made.model.language_model).values()} == {"nf4"}
    reference = json.loads((tmp_path / "on/stages/0-align/dock.json").read_text())
    assert (reference["format"], reference["bases"]["language"]["quantize"]) == (2, "nf4")
    asked = Answerer(made.model, made.processor).inputs([QUESTION])
    with torch.no_grad():
        loaded = load(tmp_path / "on/stages/0-align")
        assert torch.equal(loaded(**asked).logits, made.model(**asked).logits)
    with refused("unsupported", "compile", "quantised"):
        train(on(compile=True), "compiled")
    with refused("conflict", "language.last"):
        train(on(train={"language.last(1)": 1e-3}, lora=None), "opened")


@pytest.mark.slow
def test_two_processes_are_one(over: Callable[..., Recipe], tmp_path: Path) -> None:
    """DDP over codes and scales, which are no floating-point numbers."""
    worlds.two_are_one(over("nf4", "int8").model_dump(mode="json"), tmp_path)


@pytest.mark.parametrize(
    ("language", "image", "part"),
    [
        ("nf4", None, "language"), ("int8", None, "language.last(1)"), (None, "nf4", "encoder"),
        (None, "int8", "image.encoder.last(1)"),
    ],
)  # fmt: skip
def test_quantised_weights_do_not_train(
    over: Callable[..., Recipe], language: str | None, image: str | None, part: str
) -> None:
    with refused("recipe", part, "quantize", error=RecipeError):
        over(language, image, train={part: 1e-4}, lora=None)
    made = dock_recipe(over(language, image))
    with refused("conflict", part):
        freeze(made.model, {part: 1e-4})


def test_what_else_is_refused(
    over: Callable[..., Recipe], language_folder: Callable[..., str], vision_folder: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with refused("recipe", "nf4", "int8", error=RecipeError):
        over("int4")
    with refused("recipe", "nf4", "int8", error=RecipeError):
        over(None, "fp4")
    with refused("recipe", "compile", error=RecipeError):
        over("nf4", compile=True)
    with refused("unsupported", "quantize"):  # its layers are none of torch's linear ones
        dock(vision_folder(), "mlp", {"name": language_folder("gpt2"), "quantize": "nf4"})
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with refused("not-installed", "opticnerve[quantised]"):
        dock_recipe(over("nf4"))


@pytest.mark.parametrize("kind", KINDS)
def test_foreseen(over: Callable[..., Recipe], kind: str) -> None:
    """The bytes that `plan` counts are those of the tensors."""
    recipe = over(kind, "nf4", precision="bf16")
    foreseen = plan.make(recipe).stages[0]
    made = dock_recipe(recipe)
    made.model.give_lora({"rank": 4})
    layers = quantized_layers(made.model).values()
    held = sum(p.nbytes for p in made.model.parameters())
    held += sum(b.nbytes for layer in layers for b in layer.buffers())
    assert foreseen.memory.weights == held
    assert foreseen.total == freeze(made.model, TRAIN).total
    assert all(
        planned_bytes(x.kind, nn.Linear(x.in_features, x.out_features, device="meta"))
        == sum(t.nbytes for t in (x.weight, x.codes, x.scales))
        for x in layers
    )  # fmt: skip
