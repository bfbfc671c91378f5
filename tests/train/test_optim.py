"""AdamW over float32 masters: small steps are not lost, rates are per part, the state continues exactly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from opticnerve.models.freeze import Frozen
from opticnerve.train.optim import MasterAdamW, schedule


def optimizer(groups: dict[str, dict[str, nn.Parameter]], rates: dict[str, float], decay: float = 0.0) -> MasterAdamW:
    return MasterAdamW(Frozen([], groups, rates), betas=(0.9, 0.95), weight_decay=decay)


def test_bf16_weights_feel_steps_below_their_resolution() -> None:
    weight = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    adam = optimizer({"connector": {"w": weight}}, {"connector": 1e-4})
    for _ in range(60):  # 60 steps of 1e-4: far more than a bf16 step near 1 (2**-8) in all, far less in each
        weight.grad = torch.ones_like(weight)
        adam.clip(None)
        adam.step(1.0)
    assert float(weight.detach()[0, 0]) == pytest.approx(1 - 60e-4, abs=2**-8)
    assert float(weight.detach()[0, 0]) < 1
    assert float(adam.master_tensors()["w"][0, 0]) == pytest.approx(1 - 60e-4, abs=1e-5)
    assert adam.master_tensors()["w"].dtype == torch.float32


def test_float32_is_torchs_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 4), nn.Linear(3, 4)
    theirs.load_state_dict(ours.state_dict())
    adam = optimizer({"connector": dict(ours.named_parameters())}, {"connector": 1e-2}, decay=0.1)
    torchs = torch.optim.AdamW(
        [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95),
    )  # fmt: skip
    for i in range(5):
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(i))
        for layer in (ours, theirs):
            layer(x).square().sum().backward()
        norm = adam.clip(1.0)
        adam.step(1.0)
        assert float(norm) == pytest.approx(float(nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)), rel=1e-6)
        torchs.step()
        torchs.zero_grad()
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-6, atol=1e-7)


def test_each_part_has_its_rate() -> None:
    a, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    adam = optimizer({"a": {"a": a}, "b": {"b": b}}, {"a": 1e-1, "b": 1e-3})
    for p in (a, b):
        p.grad = torch.ones_like(p)
    adam.clip(None)
    adam.step(0.5)
    assert float(1 - a.detach()[0, 0]) == pytest.approx(0.05, rel=1e-4)
    assert float(1 - b.detach()[0, 0]) == pytest.approx(0.0005, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_continues_exactly(dtype: torch.dtype) -> None:
    def steps(adam: MasterAdamW, weight: Any, seeds: range) -> None:
        for i in seeds:
            weight.grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(i)).to(dtype)
            adam.clip(1.0)
            adam.step(1.0)

    start = torch.randn(4, 4).to(dtype)
    whole = nn.Parameter(start.clone())
    steps(optimizer({"p": {"w": whole}}, {"p": 1e-3}), whole, range(6))
    first = nn.Parameter(start.clone())
    adam = optimizer({"p": {"w": first}}, {"p": 1e-3})
    steps(adam, first, range(3))
    again = nn.Parameter(start.clone())
    second = optimizer({"p": {"w": again}}, {"p": 1e-3})
    second.load_state_dict(adam.state_dict())
    assert torch.equal(again, first)
    steps(second, again, range(3, 6))
    assert torch.equal(again, whole)


def test_parameters_without_a_gradient_stay() -> None:
    used, unused = (
        nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16)),
        nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16)),
    )
    adam = optimizer({"p": {"used": used, "unused": unused}}, {"p": 1e-1}, decay=0.1)
    used.grad = torch.ones_like(used)
    adam.clip(1.0)
    adam.step(1.0)
    assert torch.equal(unused.detach(), torch.ones_like(unused))
    assert not torch.equal(used.detach(), torch.ones_like(used))


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_schedule(kind: str) -> None:
    factors = [schedule(i, 100, warmup=0.1, kind=kind) for i in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1.0
    assert all(0 < f <= 1 for f in factors)
    after = factors[10:]
    assert after == sorted(after, reverse=True)
    assert (after[-1] < 0.02) == (kind != "constant")
    if kind == "cosine":
        assert schedule(55, 100, warmup=0.1, kind=kind) == pytest.approx(0.5)
    assert schedule(0, 10, warmup=0.0, kind=kind) == 1.0
    assert math.isfinite(schedule(0, 1, warmup=0.5, kind=kind))
