"""Mixtures of experts: packed = unpacked, their routers' loss is transformers', and what is an expert's is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from errors import refused
from opticnerve.data.collators.next_token import Batch, Collator
from opticnerve.data.encode.packing import pack
from opticnerve.data.encode.tokenize import encode
from opticnerve.inference.generate import Answerer
from opticnerve.language.adapters import our_layers
from opticnerve.language.experts import active_parameters, is_expert
from opticnerve.language.lora import linear_layers, merge_lora
from opticnerve.models import OpticNerveForConditionalGeneration
from opticnerve.models.freeze import freeze
from opticnerve.models.vlm.build import Dock
from opticnerve.objectives.next_token import NextToken
from opticnerve.train.setup import checkpoint_layers
from opticnerve.types import Conversation, ask

pytestmark = pytest.mark.usefixtures("private_cache")
TALK = [
    [ask("what is it?", tiny.picture(0), answer="a red circle"), ask("how many?", tiny.picture(0), answer="three")],
    [ask("is there a fox?", answer="no, it's a dog")],
    [ask("what colour is the square?", tiny.picture(1), answer="blue")],
]


def batch_of(dock: Dock, rows: list[list[list[Conversation]]]) -> Batch:
    made: Batch = Collator(dock.processor)([pack([[encode(c, dock.processor) for c in g] for g in r]) for r in rows])
    return made


def gradients(dock: Dock, *batches: Batch) -> tuple[float, dict[str, Tensor]]:
    dock.model.zero_grad()
    total = 0.0
    for batch in batches:
        loss, _ = NextToken(dock.model)(batch)
        if loss.requires_grad:  # words alone move no connector
            loss.backward()
        total += float(loss.detach())
    return total, {n: p.grad.clone() for n, p in dock.model.named_parameters() if p.grad is not None}


def assert_same(one: tuple[float, dict[str, Tensor]], other: tuple[float, dict[str, Tensor]]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", tiny.MIXTURES)
def test_rows_and_packs_equal_each_alone(docked: Callable[..., Dock], family: str) -> None:
    dock = docked(family)
    freeze(dock.model, {"connector": 1e-3})
    separate = gradients(dock, *(batch_of(dock, [[[c]]]) for g in TALK for c in g))
    assert_same(gradients(dock, batch_of(dock, [[g] for g in TALK])), separate)
    assert_same(gradients(dock, batch_of(dock, [TALK])), separate)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", tiny.MIXTURES)
def test_the_routers_loss_is_transformers(docked: Callable[..., Dock], family: str, checkpointing: bool) -> None:
    dock = docked(family)
    language: Any = dock.model.language_model
    language.router_aux_loss_coef = 0.3  # beside a loss of 6
    freeze(dock.model, {"language": 1e-3})
    batch = batch_of(dock, [[[TALK[1][0]]], [[ask("what?", answer="a much longer answer than that one")]]])
    real = batch.group >= 0
    assert not bool(real.all())
    labels = torch.full_like(batch.input_ids, -100)
    labels[:, 1:] = batch.targets[:, :-1]
    theirs = language(input_ids=batch.input_ids, attention_mask=real.long(), labels=labels, output_router_logits=True)
    theirs.loss.backward()
    wanted = {n: p.grad.clone() for n, p in dock.model.named_parameters() if p.grad is not None}
    if checkpointing:
        checkpoint_layers(dock.model)
    objective = NextToken(dock.model)
    dock.model.zero_grad()
    loss, count = objective(batch)
    (loss / count).backward()
    assert float((loss / count).detach()) == pytest.approx(float(theirs.loss.detach()), rel=1e-5)
    assert float(objective.metrics["router_loss"]) == pytest.approx(float(theirs.aux_loss.detach()), rel=1e-5)
    for name, parameter in dock.model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("train", [{"connector": 1e-3}, {"connector": 1e-3, "language.lora": 1e-3}])
def test_frozen_experts_are_not_balanced(docked: Callable[..., Dock], train: dict[str, float]) -> None:
    dock = docked("qwen3_moe")
    if "language.lora" in train:
        dock.model.give_lora({"rank": 2})
    freeze(dock.model, train)
    batch = batch_of(dock, [TALK])
    objective = NextToken(dock.model)
    before = float(objective(batch)[0].detach())
    assert "router_loss" not in objective.metrics
    dock.model.language_model.router_aux_loss_coef = 1e3
    assert float(objective(batch)[0].detach()) == before
    freeze(dock.model, {"language.last(1)": 1e-3})
    assert float(objective(batch)[0].detach()) > before + 100
    with torch.no_grad():  # what is held out is told without it
        assert float(objective(batch)[0]) == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("family", tiny.MIXTURES)
def test_what_is_an_expert_s(docked: Callable[..., Dock], family: str) -> None:
    language = docked(family).model.language_model
    mine = {n: p.numel() for n, p in language.named_parameters() if is_expert(n)}
    assert {n.rsplit(".", 1)[-1] for n in mine} == {"gate_up_proj", "down_proj"}
    total = sum(p.numel() for p in language.parameters())
    assert active_parameters(language) == total - sum(mine.values()) // 2  # 2 of 4
    assert {n.rsplit(".", 1)[-1] for n in linear_layers(language)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    dense = docked("llama").model.language_model
    assert active_parameters(dense) == sum(p.numel() for p in dense.parameters())


@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "experts.lora"])
@pytest.mark.parametrize("family", tiny.MIXTURES)
def test_answers_in_a_batch_are_those_alone(docked: Callable[..., Dock], family: str, adapted: bool) -> None:
    """A router chooses for each token by itself, and no expert is ever full: padding and company change nothing."""
    dock = docked(family)
    with torch.no_grad():
        if adapted:
            dock.model.give_lora({"rank": 2, "targets": ["q_proj", "experts.down_proj"]})
        for name, parameter in dock.model.named_parameters():
            if ".connector." in name:
                parameter.mul_(5)
            elif "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    asked = [
        ask("a rather long question about the picture, is it not?", tiny.picture(1)), ask("q", tiny.picture(2)),
        ask("what is it?", tiny.picture(1)), ask("text alone"), ask("is it?", tiny.picture(2), tiny.picture(4)),
        ask("what colour is the circle in the picture?", tiny.picture(5)),
    ]  # fmt: skip
    answerer = Answerer(dock.model, dock.processor)
    alone = [answerer.answer([c], max_new_tokens=8)[0] for c in asked]
    assert len(set(alone)) > 3
    for size in (2, 3, 6):
        assert answerer.answer(asked, max_new_tokens=8, batch_size=size) == alone
    with torch.no_grad():
        together = answerer.inputs(asked)
        last_BV = dock.model(**together).logits[:, -1]  # padded on the left
        assert not together["attention_mask"].all()
        for row, one in zip(last_BV, asked, strict=True):
            last_V = dock.model(**answerer.inputs([one])).logits[0, -1]
            torch.testing.assert_close(row, last_V, rtol=1e-5, atol=1e-4 * float(last_V.abs().max()))


def logits(dock: Dock, model: Any) -> Tensor:
    asked = Answerer(dock.model, dock.processor).inputs([ask("what is it?", tiny.picture(1))])
    with torch.no_grad():
        found: Tensor = model(**asked).logits
    return found


def test_how_experts_compute_is_kept(docked: Callable[..., Dock]) -> None:
    """Docking makes a configuration around the language model's, whose constructor forgets it."""
    assert docked("qwen3_moe").model.language_model.config._experts_implementation == "grouped_mm"


def test_an_adapter_on_named_experts(docked: Callable[..., Dock], tmp_path: Path) -> None:
    dock = docked("qwen3_moe")
    language: Any = dock.model.language_model
    dock.model.give_lora({"rank": 2})
    assert not any(is_expert(n) for n, _ in our_layers(language))
    dock = docked("qwen3_moe")
    language = dock.model.language_model
    before = logits(dock, dock.model)
    dock.model.give_lora({"rank": 2, "targets": ["q_proj", "gate_up_proj", "experts.down_proj"]})
    torch.testing.assert_close(logits(dock, dock.model), before)
    frozen = freeze(dock.model, {"language.lora": 1e-3})
    trained = [n for group in frozen.groups.values() for n in group]
    assert len(trained) == 2 * 2 * 3  # layers × halves × tensors
    assert sum(is_expert(n) for n in trained) == 2 * 2 * 2
    for name, parameter in dock.model.named_parameters():
        if name in trained:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    wanted = logits(dock, dock.model)
    assert not torch.allclose(wanted, before, atol=1e-3)
    _, found = gradients(dock, batch_of(dock, [TALK]))
    assert found.keys() == set(trained)
    dock.model.save_pretrained(tmp_path / "saved")
    load = OpticNerveForConditionalGeneration.from_pretrained
    assert torch.equal(logits(dock, load(tmp_path / "saved")), wanted)
    names = {n for n, _ in docked("qwen3_moe").model.named_parameters()}
    merge_lora(language)
    assert {n for n, _ in dock.model.named_parameters()} == names
    torch.testing.assert_close(logits(dock, dock.model), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("also", [{"dora": True}, {"init": "pissa"}, {"dropout": 0.1}, {"when": "media"}])
def test_what_an_adapter_on_experts_does_not_do(docked: Callable[..., Dock], also: dict[str, Any]) -> None:
    with refused("conflict", "experts"):
        docked("qwen3_moe").model.give_lora({"targets": ["experts.down_proj"], **also})
