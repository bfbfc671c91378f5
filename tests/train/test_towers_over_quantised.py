"""Dual encoders and classifiers with LoRA on their encoders, over plain encoders and over ones in 4 or 8 bits: what an
adapter learns is what it learns over the dequantised weights, and a folder is the model that was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import worlds
from test_two_towers import make, resumed, train  # noqa: F401 (a fixture)
from torch import Tensor, nn

import tiny
from errors import refused
from opticnerve import recipe as recipes
from opticnerve.inference.load import load_any
from opticnerve.language.lora import is_lora
from opticnerve.language.quantization import dequantize, quantized_layers
from opticnerve.models.family import build
from opticnerve.models.freeze import freeze
from opticnerve.plan import plan
from opticnerve.recipe import Recipe
from opticnerve.train.loop import run_stage
from opticnerve.types import RecipeError

pytestmark = pytest.mark.usefixtures("private_cache")
ADAPTERS = {"image.encoder.lora": 1e-2, "text.encoder.lora": 1e-2}
KINDS = {"dual": {"image.projection": 1e-2}, "late": {"classifier": 1e-2}}
BITS = {"image": "nf4", "text": "int8"}


@pytest.fixture
def over(make: Callable[..., Recipe]) -> Callable[..., Recipe]:  # noqa: F811
    """A recipe of a kind of model, its encoders quantised as `bits` say."""

    def made(kind: str, bits: dict[str, str] = BITS, **stage: Any) -> Recipe:
        if bits:
            pytest.importorskip("bitsandbytes")
        raw = make(kind, **{"train": KINDS[kind] | ADAPTERS, "lora": {"rank": 4}, "steps": 4, **stage})
        given = raw.model_dump(mode="json", exclude_none=True)
        for tower, how in bits.items():
            given["model"][tower]["encoder"]["quantize"] = how
        return recipes.load(given)

    return made


def outputs(dock: Any, model: Any = None, **labels: Any) -> Any:
    """What a model makes of two pictures and two texts."""
    given = dock.processor(images=[tiny.picture(1), tiny.picture(2)], text=["red", "what is it?"], return_tensors="pt")
    return (model or dock.model)(**given, **labels)


def logits(dock: Any, model: Any = None) -> Tensor:
    with torch.no_grad():
        out = outputs(dock, model)
    found: Tensor = out.logits_per_text if "logits_per_text" in out else out.logits
    return found


def step_of(dock: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one batch."""
    dock.model.zero_grad()
    two = {"return_loss": True} if hasattr(dock.model, "logit_scale") else {"labels": torch.tensor([0, 1])}
    loss = outputs(dock, **two).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in dock.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bits", [BITS, {"image": "int8"}, {"text": "nf4"}], ids=["both", "image", "text"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_of_lora_over_the_dequantised_weights(
    over: Callable[..., Recipe], kind: str, bits: dict[str, str]
) -> None:
    recipe = over(kind, bits)
    dock = build(recipe)
    assert {n.split(".encoder.")[0]: q.kind for n, q in quantized_layers(dock.model).items()} == bits
    for part in ADAPTERS:
        dock.model.give_lora({"rank": 4}, part.removesuffix(".lora"))
    for name, parameter in dock.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    freeze(dock.model, recipe.stages[0].train)
    dock.model.eval()  # no dropout
    loss, grads = step_of(dock)
    dequantize(dock.model, torch.float32)
    assert not quantized_layers(dock.model)
    wanted, wanted_grads = step_of(dock)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    assert grads.keys() == wanted_grads.keys() == {n for n, p in dock.model.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in grads if is_lora(n)} == {"image", "text"}
    for name, grad in grads.items():
        close = 1e-6 * float(wanted_grads[name].abs().max())
        torch.testing.assert_close(grad, wanted_grads[name], rtol=1e-5, atol=close)
    whole = build(over(kind, {}))
    assert not torch.allclose(logits(whole), logits(build(over(kind, bits))), rtol=1e-5)  # the lost digits do count


@pytest.mark.parametrize(
    ("kind", "bits", "options"),
    [
        ("dual", BITS, {"rank_stabilised": True}), ("late", BITS, {"dropout": 0.1}), ("dual", {}, {"init": "pissa"}),
        ("late", {}, {"dora": True}),
    ],
    ids=lambda v: str(v),
)  # fmt: skip
def test_resumed_bit_for_bit_and_loaded_as_it_was_trained(
    over: Callable[..., Recipe], tmp_path: Path, kind: str, bits: dict[str, str],
    options: dict[str, Any],
) -> None:  # fmt: skip
    recipe = over(kind, bits, lora={"rank": 4, **options}, save_every=2)
    whole, curve = train(recipe, tmp_path / "whole")
    broken, again = resumed(recipe, tmp_path / "broken", stop_at=2)
    assert again == curve
    state = whole.model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in broken.model.state_dict().items())
    begun = build(recipe).model.state_dict()
    trained = (*KINDS[kind], "text.projection")
    if options.get("init") != "pissa":  # which takes what the adapter begins with out of the weights
        still = {n: t for n, t in state.items() if ".lora_" not in n and not n.startswith(trained)}
        assert all(torch.equal(begun[n.replace(".base_layer", "")], t) for n, t in still.items())
    for tower in ("image", "text"):
        assert any(n.startswith(tower) and "lora_B" in n and n.endswith("weight") and t.any() for n, t in state.items())

    folder, wanted = tmp_path / "whole/stages/0-learn", logits(whole)
    loaded, _ = load_any(folder, device="cpu")  # dequantised: the same numbers
    assert not quantized_layers(loaded)
    assert torch.equal(logits(whole, loaded), wanted)
    assert set(loaded.adapters) == {"image.encoder", "text.encoder"}
    for name, layer in quantized_layers(whole.model).items():
        assert torch.equal(loaded.get_submodule(name).weight, layer.dequantized(torch.float32)), name
    bases = json.loads((folder / "bases.json").read_text())["bases"]
    assert {tower: base["quantize"] for tower, base in bases.items() if "quantize" in base} == bits
    fresh = build(recipe)
    assert set(fresh.load_stage(folder)) == {n for n, p in whole.model.named_parameters() if p.requires_grad}
    assert torch.equal(logits(fresh, fresh.model.eval()), wanted)
    assert quantized_layers(fresh.model).keys() == quantized_layers(whole.model).keys()


@pytest.mark.parametrize("bits", [{}, {"image": "nf4"}], ids=["plain", "nf4"])
def test_stages_that_follow_each_other(over: Callable[..., Recipe], tmp_path: Path, bits: dict[str, str]) -> None:
    """An adapter beside what an earlier stage opened, and a stage that goes on with an adapter."""
    opened = over("dual", bits, train={"text.encoder.last(1)": 1e-2}, lora=None)
    beside = over("dual", bits, lora={"rank": 2, **({} if bits else {"init": "pissa"})})
    after = over("dual", bits, train={"text.projection": 1e-2}, lora=None)
    dock, trained = build(opened), set[str]()
    for number, recipe in enumerate((opened, beside, after)):
        run_stage(dock, recipe, recipe.stages[0], tmp_path / str(number), trained_before=trained)
    again = build(opened)
    for number in range(3):
        assert again.load_stage(tmp_path / str(number)) <= set(dict(again.model.named_parameters()))
    state = dock.model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in again.model.state_dict().items())
    loaded, _ = load_any(tmp_path / "2", device="cpu")
    assert torch.equal(logits(dock, loaded), logits(dock, dock.model.eval()))


def test_a_locked_image_encoder_in_fewer_bits_is_seen_once(over: Callable[..., Recipe], tmp_path: Path) -> None:
    """LiT (Zhai et al. 2022), in bf16, from a cache of what the quantised encoder sees."""
    stage = {"train": {"text.encoder.lora": 1e-2, "image.projection": 1e-2}}
    recipe = over("dual", {"image": "nf4"}, cache_features=True, **stage).model_copy(update={"precision": "bf16"})
    live = over("dual", {"image": "nf4"}, **stage).model_copy(update={"precision": "bf16"})
    dock, cached = train(recipe, tmp_path / "cached")
    _, seen = train(live, tmp_path / "live")
    assert cached == pytest.approx(seen, rel=1e-2)
    assert quantized_layers(dock.model)
    loaded, _ = load_any(tmp_path / "cached/stages/0-learn", device="cpu")
    assert torch.equal(logits(dock, loaded), logits(dock))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_loaded_in_fewer_bits_by_transformers(over: Callable[..., Recipe], tmp_path: Path, kind: str) -> None:
    """The encoders' layers, nothing that was trained beside them."""
    pytest.importorskip("bitsandbytes")
    dock = build(over(kind, {}))
    for part in ADAPTERS:
        dock.model.give_lora({"rank": 2}, part.removesuffix(".lora"))
    dock.model.save_pretrained(tmp_path)
    how = tf.BitsAndBytesConfig(load_in_8bit=True)
    loaded = type(dock.model).from_pretrained(tmp_path, quantization_config=how, dtype=torch.float32)
    changed = {n for n, p in loaded.named_parameters() if not p.is_floating_point()}
    assert {n.split(".encoder.model.")[0] for n in changed} == {"image", "text"}
    assert not any(".lora_" in n for n in changed)
    found, wanted = logits(dock, loaded), logits(dock)
    assert nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.99


@pytest.mark.slow
def test_two_processes_are_one(over: Callable[..., Recipe], tmp_path: Path) -> None:
    """DDP over codes and scales, negatives gathered from both."""
    worlds.two_are_one(over("dual", accumulate=2).model_dump(mode="json"), tmp_path)


def test_other_bases_than_it_was_trained_over(over: Callable[..., Recipe], tmp_path: Path) -> None:
    train(over("dual", {"image": "nf4"}), tmp_path)
    with refused("mismatch", "int8"):
        build(over("dual", {"image": "int8"})).load_stage(tmp_path / "stages/0-learn")


def test_what_is_refused(over: Callable[..., Recipe], make: Callable[..., Recipe], tmp_path: Path) -> None:  # noqa: F811
    for kind, part in (("dual", "image.encoder"), ("late", "text.encoder.last(1)")):
        with refused("recipe", part, "quantize", f"{part.split('.')[0]}.encoder.lora", error=RecipeError):
            over(kind, train={part: 1e-3}, lora=None)
        with refused("conflict", part):
            freeze(build(over(kind)).model, {part: 1e-3})
    with refused("recipe", "nf4", "int8", error=RecipeError):
        over("dual", {"image": "fp4"})
    for train_ in (
        {"text.encoder.lora": 1e-3, "text.encoder": 1e-4},
        {"image.encoder.lora": 1e-3, "image.encoder.last(1)": 1e-4},
    ):
        with refused("recipe", "both change the same weights", error=RecipeError):
            over("dual", {}, train=train_)
    with refused("recipe", "when: media", error=RecipeError):
        over("dual", {}, lora={"when": "media"})
    with refused("recipe", "cache_features", error=RecipeError):
        over("dual", {}, cache_features=True)
    early = build(make("early"))
    for part in ("image.encoder", "language"):
        with refused("unsupported", part, "text.encoder"):
            early.model.give_lora({}, part)
    with refused("unknown-name", "text.encoder.lora"):
        freeze(early.model, {"text.encoder.lora": 1e-3})
    early.model.give_lora({"rank": 2}, "text.encoder")
    assert not any(map(is_lora, early.model.part_parameters("text.encoder")))
    assert not any(map(is_lora, early.model.part_parameters("text.encoder.last(1)")))
    frozen = freeze(early.model, {"text.encoder.lora": 1e-3})
    assert [r.part for r in frozen.rows if r.trained] == ["text.encoder.lora"]


def test_an_adapter_that_an_early_stage_gave_and_a_text_that_was_read(make: Callable[..., Recipe]) -> None:  # noqa: F811
    """A classifier remembers the texts that it read: not beyond a change of its adapter."""
    dock = build(make("early"))
    asked = {"pixel_values": torch.zeros(1, 3, 8, 8), "input_ids": torch.tensor([[3, 4, 5]])}
    with torch.no_grad():
        before = dock.model(**asked).logits
        dock.model.give_lora({"rank": 2}, "text.encoder")
        assert torch.equal(dock.model(**asked).logits, before)
        for name, parameter in dock.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.5)
        assert not torch.allclose(dock.model(**asked).logits, before, atol=1e-4)


@pytest.mark.parametrize("bits", [{}, BITS], ids=["plain", "quantised"])
@pytest.mark.parametrize("kind", KINDS)
def test_foreseen(over: Callable[..., Recipe], kind: str, bits: dict[str, str]) -> None:
    """`plan` knows the parts, what trains, and the bytes of the tensors, without a weight."""
    recipe = over(kind, bits)
    made = plan.make(recipe)
    [stage] = made.stages
    dock = build(recipe)
    assert sum(s.parameters for s in made.shapes) == sum(p.numel() for p in build(over(kind, {})).model.parameters())
    for part in ADAPTERS:
        dock.model.give_lora({"rank": 4}, part.removesuffix(".lora"))
    wanted = freeze(dock.model, recipe.stages[0].train)
    assert [(r.part, r.parameters, r.trained) for r in stage.frozen.rows] == [
        (r.part, r.parameters, r.trained) for r in wanted.rows
    ]
    held = sum(p.nbytes for p in dock.model.parameters())
    held += sum(b.nbytes for layer in quantized_layers(dock.model).values() for b in layer.buffers())
    assert stage.memory.weights == held
    assert stage.memory.optimizer == 8 * wanted.trained
    assert stage.memory.activations > 0
    assert stage.flops > 0
    assert not any("activations" in r.text for r in made.remarks)
    assert not plan.weights_at_hand(recipe)
