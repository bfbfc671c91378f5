"""LoRA on encoders and fusions: beside bit-equal frozen weights, resumed, saved, merged, planned for and asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from errors import refused
from opticnerve import recipe as recipes
from opticnerve.inference.generate import Answerer
from opticnerve.inference.load import load_model
from opticnerve.language.lora import is_lora
from opticnerve.models import OpticNerveForConditionalGeneration
from opticnerve.models.freeze import freeze
from opticnerve.models.vlm.build import Dock, dock_recipe, merge
from opticnerve.plan import plan
from opticnerve.recipe import Recipe
from opticnerve.train.loop import run_stage
from opticnerve.types import RecipeError, ask
from opticnerve.vllm_plugin.towers import check

TOWER = {"image.encoder.lora": 1e-2, "fusion.lora": 1e-2}
ALL = {**TOWER, "connector": 1e-2, "language.lora": 1e-2}
QUESTION = ask("what is it?", tiny.picture(1))
load = OpticNerveForConditionalGeneration.from_pretrained


@pytest.fixture
def adapted(make_recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """A recipe of a dock with cross-attention whose stage trains adapters."""

    def make(train: dict[str, float] = ALL, quantize: str | None = None, **stage: Any) -> Recipe:
        made = make_recipe(**{"train": train, "lora": {"rank": 4}, **stage}).model_dump(mode="json", exclude_none=True)
        made["model"]["image"]["fusion"] = {"type": "cross_attention", "every": 1}
        made["model"]["image"]["encoder"]["quantize"] = quantize
        return recipes.load(made)

    return make


def opened(recipe: Recipe) -> Dock:
    """A dock whose cross-attention says something, as it does once it was trained."""
    made = dock_recipe(recipe)
    for layer in made.model.image.fusion.layers:
        layer.alpha_cross_attn.data.fill_(0.5)
        layer.alpha_dense.data.fill_(0.5)
    return made


def logits(made: Dock, model: Any = None) -> Tensor:
    asked = Answerer(made.model, made.processor).inputs([QUESTION])
    with torch.no_grad():
        found: Tensor = (model or made.model)(**asked).logits
    return found


@pytest.mark.parametrize(
    ("quantize", "options"),
    [(None, {"dropout": 0.1}), (None, {"dora": True}), (None, {"init": "pissa"}), ("int8", {"rank_stabilised": True})],
    ids=lambda v: str(v),
)
def test_resumed_loaded_saved_and_merged(
    adapted: Callable[..., Recipe], train: Callable[..., Any], resumed_exactly: Callable[..., Any], tmp_path: Path,
    quantize: Any, options: dict[str, Any],
) -> None:  # fmt: skip
    if quantize:
        pytest.importorskip("bitsandbytes")
    recipe = adapted(quantize=quantize, lora={"rank": 4, **options})
    whole, _ = resumed_exactly(recipe, opened=opened)
    state = whole.model.state_dict()
    begun = opened(recipe).model.state_dict()
    if options.get("init") != "pissa":  # which takes what the adapter begins with out of the weights
        for name, tensor in state.items():
            if not is_lora(name) and ".connector." not in name:
                assert torch.equal(begun[name.replace(".base_layer", "")], tensor), name
    for part in ("image.encoder", "image.fusion", "language_model"):
        moved = [n for n in state if n.startswith(part) and "lora_B" in n and n.endswith("weight") and state[n].any()]
        assert moved, part

    folder, wanted = tmp_path / "whole/stages/0-align", logits(whole)
    assert torch.equal(logits(whole, load(folder)), wanted)
    assert set(load(folder).adapters) == {"language", "image.encoder", "image.fusion"}
    fresh = opened(recipe)
    fresh.load_stage(folder)
    fresh.model.eval()
    assert torch.equal(logits(fresh), wanted)
    if not quantize:  # those are saved dequantised
        whole.model.save_pretrained(tmp_path / "saved")
        assert torch.equal(logits(whole, load(tmp_path / "saved")), wanted)
        whole.processor.save_pretrained(tmp_path / "saved")
        stage = {**recipe.stages[0].model_dump(mode="json", exclude_none=True), "train": {"connector": 1e-2}}
        del stage["lora"]
        goes_on, _ = train(
            recipes.load({"precision": "fp32", "model": {"from": str(tmp_path / "saved")}, "stages": [stage]}), "on"
        )
        assert torch.equal(logits(goes_on, load(tmp_path / "on/stages/0-align")), logits(goes_on))
    merged = load(merge(folder, tmp_path / "merged"))
    assert not any("lora" in n for n in merged.state_dict())
    assert not merged.adapters
    torch.testing.assert_close(logits(whole, merged), wanted, rtol=1e-4, atol=1e-4)


def test_an_adapter_beside_what_an_earlier_stage_trained(
    adapted: Callable[..., Recipe], train: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = adapted({"fusion": 1e-2, "encoder": 1e-3, "language.last(1)": 1e-3}, lora=None)
    made = opened(recipe)
    first: set[str] = set()
    run_stage(made, recipe, recipe.stages[0], tmp_path / "0-all", trained_before=first)
    second = adapted(lora={"rank": 4, "init": "pissa"})
    run_stage(made, second, second.stages[0], tmp_path / "1-beside", trained_before=first)
    assert torch.equal(logits(made, load(tmp_path / "1-beside")), logits(made))
    again = dock_recipe(recipe)
    for folder in ("0-all", "1-beside"):
        again.load_stage(tmp_path / folder)
    assert torch.equal(logits(made, again.model.eval()), logits(made))


def test_asked_and_refused_where_it_cannot_go(
    adapted: Callable[..., Recipe], train: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = adapted({"image.encoder.lora": 1e-2})
    made, _ = train(recipe, "run")
    folder = tmp_path / "run/stages/0-align"
    made.processor.save_pretrained(folder)
    answers = [Answerer(m, p).answer([QUESTION], max_new_tokens=4) for m, p in (
        (made.model, made.processor), load_model(folder, device="cpu"))]  # fmt: skip
    assert answers[0] == answers[1]
    with refused("unsupported", "image adapter", "merged"):
        check(made.model.config, tmp_path)
    second = adapted({"image.encoder.lora": 1e-2}, lora={"rank": 3})
    with refused("conflict", "image.encoder", "rank"):
        train(second, "two", dock=made)


def test_whole_parts_leave_their_adapters_frozen(adapted: Callable[..., Recipe]) -> None:
    made = dock_recipe(adapted())
    with refused("unknown-name", "image.encoder.lora"):
        freeze(made.model, {"encoder.lora": 1e-3})
    for part in ("image.encoder", "image.fusion"):
        made.model.give_lora({"rank": 2}, part)
        assert not any(map(is_lora, made.model.part_parameters(part)))
        adapter = made.model.part_parameters(f"{part}.lora")
        assert all(n.startswith(f"{part}.") for n in adapter)
        assert [r.part for r in freeze(made.model, {f"{part}.lora": 1e-3}).rows if r.trained] == [f"{part}.lora"]
        assert {n for n, p in made.model.named_parameters() if p.requires_grad} == set(adapter)
    assert not any(map(is_lora, made.model.part_parameters("encoder.last(1)")))


def test_foreseen(adapted: Callable[..., Recipe], train: Callable[..., Any]) -> None:
    recipe = adapted(lora={"rank": 4, "targets": ["q_proj", "fc1"]})
    foreseen = plan.make(recipe).stages[0]
    made, _ = train(recipe)
    assert foreseen.frozen.to_dict() == freeze(made.model, ALL).to_dict()
    assert foreseen.memory.weights == sum(p.nbytes for p in made.model.parameters())
    assert {n.split(".lora_")[0].rsplit(".", 1)[-1] for n in made.model.state_dict() if is_lora(n)} == {"q_proj", "fc1"}


def test_what_is_refused(adapted: Callable[..., Recipe], make_recipe: Callable[..., Recipe]) -> None:
    for train in (
        {"image.encoder.lora": 1e-3, "encoder": 1e-4}, {"encoder.lora": 1e-3, "image.encoder.last(1)": 1e-4},
        {"fusion.lora": 1e-3, "fusion": 1e-4},
    ):  # fmt: skip
        with refused("recipe", "both change the same weights", error=RecipeError):
            adapted(train)
    with refused("recipe", "when: media", error=RecipeError):
        adapted({"image.encoder.lora": 1e-3}, lora={"when": "media"})
    with refused("recipe", "cache_features", error=RecipeError):
        adapted({"image.encoder.lora": 1e-3}, cache_features=True)
    with refused("recipe", "lora", error=RecipeError):
        adapted({"connector": 1e-3})
    for quantized in ("image.encoder", "encoder.last(1)"):
        with refused("recipe", "image.encoder.lora", error=RecipeError):
            adapted({quantized: 1e-3}, "int8", lora=None)
    made = dock_recipe(make_recipe(vision_encoder="test_efficientnet"))
    for part in ("image.encoder", "image.fusion"):  # convolutions; soft tokens in the text
        with refused("unsupported", part, "linear"):
            made.model.give_lora({}, part)
    made = dock_recipe(make_recipe(vision_encoder="test_vit"))
    encoder: Any = made.model.image.encoder
    attention: Any = type(encoder.model.blocks[0].attn)
    own = attention.forward
    try:  # as timm's EVA does it
        attention.forward = lambda self, x, *rest, **named: torch.nn.functional.linear(
            torch.nn.functional.linear(x, self.qkv.weight)[..., : x.shape[-1]], self.proj.weight
        )
        with refused("unsupported", "image.encoder.lora", "qkv", "[fc1, fc2]"):
            made.model.give_lora({}, "image.encoder")
    finally:
        attention.forward = own
    with refused("conflict", "when: media"):
        dock_recipe(adapted()).model.give_lora({"when": "media"}, "image.encoder")
