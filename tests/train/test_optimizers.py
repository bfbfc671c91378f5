"""Optimizers by name, layer-wise rates, averages and schedules: each goes on exactly, and takes what `plan` says."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from errors import refused
from opticnerve import recipe as recipes
from opticnerve.inference.generate import Answerer
from opticnerve.models import OpticNerveForConditionalGeneration
from opticnerve.models.freeze import Frozen
from opticnerve.plan import plan
from opticnerve.train import checkpoint
from opticnerve.train.optim import MasterAdamW, schedule, state_bytes
from opticnerve.types import RecipeError, ask

EIGHT_BIT = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
NAMES = ["adamw", "adamw_bf16", "muon", "adafactor", pytest.param("adamw_8bit", marks=EIGHT_BIT)]
TRAIN = {"connector": 1e-2, "language": 1e-3}


def stage_folder(folder: Path, name: str) -> Path:
    return folder / name / "stages" / "0-align"


def tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    return [t for v in state.values() for t in tensors(v)] if isinstance(state, dict) else []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_resumed_to_the_bit(
    make_recipe: Callable[..., Any], resumed_exactly: Callable[..., Any], tmp_path: Path, name: str, precision: str
) -> None:
    how = {"schedule": "wsd", "cooldown": 0.5} | ({"layer_decay": 0.5, "ema": 0.9} if precision == "bf16" else {})
    recipe = make_recipe(precision=precision, optimizer=name, train=TRAIN, save_every=3, **how)
    _, result = resumed_exactly(recipe)
    assert result.final_loss > 0
    last = [checkpoint.load(checkpoint.checkpoints(stage_folder(tmp_path, f))[-1]) for f in ("whole", "broken")]
    first, second = (tensors(state["optimizer"]) for state in last)
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_learns(name: str) -> None:
    """A random matrix is brought nearer to another by every one of them."""
    torch.manual_seed(0)
    layer, wanted = nn.Linear(80, 80), torch.randn(80, 80) / 10
    made = MasterAdamW(
        Frozen([], {"language": {f"layers.0.{n}": p for n, p in layer.named_parameters()}}, {"language": 1e-2}),
        betas=(0.9, 0.95), weight_decay=0.0, name=name,
    )  # fmt: skip
    losses = []
    for _ in range(60):
        loss = (layer.weight - wanted).square().sum() + layer.bias.square().sum()
        loss.backward()
        made.clip(None)
        made.step(1.0)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_takes_what_plan_says(make_recipe: Callable[..., Any], name: str) -> None:
    from opticnerve.models.freeze import freeze
    from opticnerve.models.vlm.build import dock_recipe

    recipe = make_recipe(precision="bf16", optimizer=name, ema=0.9, train=TRAIN)
    made = dock_recipe(recipe)
    frozen = freeze(made.model, TRAIN)
    optimizer = MasterAdamW(frozen, betas=(0.9, 0.95), weight_decay=0.0, name=name, ema=0.9)
    for _, weight, _ in optimizer.weights:
        weight.grad = torch.ones_like(weight)
    optimizer.clip(None)
    optimizer.step(1.0)
    state = optimizer.state_dict()
    held = 0
    for tensor in tensors({k: v for k, v in state.items() if k not in ("masters", "averages")}):
        held += tensor.nbytes if tensor.numel() > 1 and tensor.shape != (256,) else 0  # neither steps nor maps
    shapes = {n: w.shape for n, w, _ in optimizer.weights}
    assert held == pytest.approx(sum(state_bytes(name, n, s) for n, s in shapes.items()), rel=0.02)
    foreseen = plan.make(recipe).stages[0].memory.optimizer
    assert foreseen == sum(state_bytes(name, n, s) + 8 * s.numel() for n, s in shapes.items())


@pytest.mark.parametrize("second", [0.95, 0.999])
def test_moments_in_bf16_follow_adamw(second: float) -> None:
    """A second moment that began large shrinks as AdamW's does, with every beta, and the global generator stays."""
    ways: list[tuple[Tensor, Any]] = []
    state = torch.get_rng_state()
    for name in ("adamw", "adamw_bf16"):
        weight = nn.Parameter(torch.zeros(64, 64))
        made = MasterAdamW(
            Frozen([], {"connector": {"w": weight}}, {"connector": 1e-2}),
            betas=(0.9, second),
            weight_decay=0.1,
            name=name,
        )
        for step in range(200):
            weight.grad = torch.full_like(weight, 1.0 if step else 30.0)
            made.clip(None)
            made.step(1.0)
        ways.append((weight.detach(), made.state_dict()["adam"]["state"][0]))
    assert torch.equal(torch.get_rng_state(), state)
    (wanted, theirs), (found, ours) = ways
    torch.testing.assert_close(found.mean(), wanted.mean(), rtol=2e-2, atol=0)
    for key in ("exp_avg", "exp_avg_sq"):
        assert ours[key].dtype == torch.bfloat16
        torch.testing.assert_close(ours[key].float().mean(), theirs[key].mean(), rtol=2e-2, atol=0)


def test_layers_below_go_slower() -> None:
    names = ["model.embed_tokens.w", "model.layers.0.w", "model.layers.1.w", "model.norm.w", "lm_head.w"]
    weights = {f"language_model.{n}": nn.Parameter(torch.ones(2, 2)) for n in names}
    head = {"image.connector.layers.0.w": nn.Parameter(torch.ones(2, 2))}
    made = MasterAdamW(
        Frozen([], {"language": weights, "image.connector": head}, {"language": 1e-2, "image.connector": 1e-2}),
        betas=(0.9, 0.95), weight_decay=0.0, layer_decay=0.5,
    )  # fmt: skip
    for weight in (*weights.values(), *head.values()):
        weight.grad = torch.ones_like(weight)
    made.clip(None)
    made.step(1.0)
    moved = [round(float(1 - w.detach()[0, 0]), 5) for w in (*weights.values(), *head.values())]
    assert moved == [0.0025, 0.005, 0.01, 0.01, 0.01, 0.01]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_of_the_weights(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.zeros(2, 2, dtype=dtype))
    made = MasterAdamW(
        Frozen([], {"connector": {"w": weight}}, {"connector": 0.5}), betas=(0.9, 0.95), weight_decay=0.0, ema=0.25
    )
    wanted = torch.zeros(2, 2)
    for step in range(4):
        weight.grad = torch.ones_like(weight)
        made.clip(None)
        made.step(1.0)
        keep = min(0.25, (1 + step) / (10 + step))
        wanted = keep * wanted + (1 - keep) * made.master_tensors()["w"]
        before = weight.detach().clone()
        with made.averaged():
            assert torch.equal(weight, wanted.to(dtype))
        assert torch.equal(weight, before)
    made.finish()
    assert torch.equal(weight, wanted.to(dtype))


def test_a_stage_ends_with_the_average(
    make_recipe: Callable[..., Any], train: Callable[..., Any], tmp_path: Path
) -> None:
    plain, _ = train(make_recipe(), "plain")
    made, _ = train(make_recipe(ema=0.5), "averaged")
    names = [n for n, _ in made.model.named_parameters() if ".connector." in n]
    assert not any(torch.equal(made.model.get_parameter(n), plain.model.get_parameter(n)) for n in names)
    folder = stage_folder(tmp_path, "averaged")
    asked = Answerer(made.model, made.processor).inputs([ask("what is it?", tiny.picture(1))])
    with torch.no_grad():
        loaded = OpticNerveForConditionalGeneration.from_pretrained(folder)
        assert torch.equal(loaded(**asked).logits, made.model(**asked).logits)


def test_warm_up_stable_decay() -> None:
    factors = [schedule(i, 20, warmup=0.1, kind="wsd", cooldown=0.25) for i in range(20)]
    assert factors[:2] == [0.5, 1.0]
    assert factors[2:16] == [1.0] * 14
    assert factors[15:] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_what_is_refused(make_recipe: Callable[..., Any]) -> None:
    with refused("recipe", "adamw_8bit", "muon", "adafactor", error=RecipeError):
        make_recipe(optimizer="adam")
    with refused("recipe", "cooldown", error=RecipeError):
        make_recipe(cooldown=0.1)
    with refused("recipe", "betas", error=RecipeError):
        make_recipe(optimizer="adafactor", betas=[0.9, 0.99])
    assert recipes.load(make_recipe(optimizer="muon").model_dump(mode="json", exclude_none=True)).stages[0].optimizer
