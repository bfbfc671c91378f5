"""Direct preference optimisation: the paper's loss, against the model as it was, on pairs that share their picture."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tiny
from errors import refused
from opticnerve.data.collators.next_token import Collator
from opticnerve.data.collators.preference import PreferenceCollator
from opticnerve.data.dataset.read import read
from opticnerve.data.encode.packing import pack
from opticnerve.data.encode.tokenize import IGNORE, encode
from opticnerve.models.freeze import freeze
from opticnerve.models.vlm.build import Dock
from opticnerve.objectives.dpo import DPO, log_likelihoods
from opticnerve.objectives.next_token import batch_logits
from opticnerve.recipe import load
from opticnerve.train.loop import run_stage
from opticnerve.types import Conversation, DataError, ask

pytestmark = pytest.mark.usefixtures("private_cache")
PAIRS = [("a red circle", "no"), ("yes", "yes, it's a dog"), ("the blue square and a fox", "42")]


def pairs(count: int = 3) -> list[Conversation]:
    made = [ask("what is it?", tiny.picture(i), answer=PAIRS[i % 3][0], rejected=PAIRS[i % 3][1]) for i in range(count)]
    return [Conversation(c.messages, f"pair {i}", f"pairs.jsonl:{i + 1}", c.meta) for i, c in enumerate(made)]


def answer_alone(dock: Dock, model: Any, conversation: Conversation, answer: str) -> torch.Tensor:
    """The log-probability of an answer in a batch of its own."""
    said = ask(conversation.messages[0].text, *(i.source for i in conversation.images), answer=answer)
    batch = Collator(dock.processor)([pack([[encode(said, dock.processor)]])])
    targets_M = batch.targets.flatten()[batch.learned_M]
    return -F.cross_entropy(batch_logits(model, batch).float(), targets_M, reduction="sum")


@pytest.mark.parametrize("fusion", ["splice", "cross_attention"])
def test_loss_and_gradients_are_the_papers(docked: Callable[..., Dock], fusion: str) -> None:
    dock = docked("llama", fusion=fusion)
    reference = copy.deepcopy(dock.model)
    freeze(dock.model, {"connector": 1e-3, "language": 1e-3})
    objective = DPO(dock.model, beta=0.2)
    with torch.no_grad():  # as if some steps had been taken
        for p in dock.model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn_like(p))
    moved = {n: p.detach().clone() for n, p in dock.model.named_parameters()}
    batch = PreferenceCollator(dock.processor)([[c] for c in pairs()])
    assert batch.supervised == batch.samples == 3
    loss, count = objective(batch)
    assert count == 3
    (loss / count).backward()
    found = {n: p.grad.clone() for n, p in dock.model.named_parameters() if p.grad is not None}
    assert all(torch.equal(p, moved[n]) for n, p in dock.model.named_parameters())
    dock.model.zero_grad()

    expected = torch.zeros(())
    for c in pairs():
        policy = [answer_alone(dock, dock.model, c, a) for a in (c.answer or "", c.meta["rejected"])]
        with torch.no_grad():
            before = [answer_alone(dock, reference, c, a) for a in (c.answer or "", c.meta["rejected"])]
        expected = expected - F.logsigmoid(0.2 * ((policy[0] - before[0]) - (policy[1] - before[1])))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (expected / 3).backward()
    for name, gradient in found.items():
        other = dict(dock.model.named_parameters())[name].grad
        assert other is not None
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=2e-5 * float(other.abs().max()) + 1e-7, msg=name)


def test_before_the_first_step_nothing_is_preferred(docked: Callable[..., Dock]) -> None:
    dock = docked("llama")
    freeze(dock.model, {"connector": 1e-3})
    objective = DPO(dock.model)
    loss, _ = objective(PreferenceCollator(dock.processor)([[c] for c in pairs()]))
    assert loss.item() == pytest.approx(3 * torch.log(torch.tensor(2.0)).item(), rel=1e-6)
    assert objective.metrics["margin"] == 0.0
    ipo, _ = DPO(dock.model, loss="ipo", beta=0.5)(PreferenceCollator(dock.processor)([[c] for c in pairs()]))
    assert ipo.item() == pytest.approx(3.0)
    with_sft, _ = DPO(dock.model, sft=1.0)(PreferenceCollator(dock.processor)([[c] for c in pairs()]))
    sums, tokens = log_likelihoods(dock.model, PreferenceCollator(dock.processor)([[c] for c in pairs()]))
    assert (with_sft - loss).item() == pytest.approx(-(sums[:, 0] / tokens[:, 0]).sum().item(), rel=1e-5)


def test_only_the_last_turn_is_compared(docked: Callable[..., Dock]) -> None:
    dock = docked("llama")
    first = ask("what is it?", tiny.picture(0), answer="a dog")
    chat_state = Conversation(
        (*first.messages, *ask("sure?", answer="yes").messages), "t", "t", {"rejected": "no, a fox"}
    )
    chosen, rejected = PreferenceCollator(dock.processor).pair(chat_state)
    decode = dock.processor.tokenizer.decode
    assert decode([i for i in chosen.labels if i != IGNORE]).startswith("yes")
    assert decode([i for i in rejected.labels if i != IGNORE]).startswith("no, a fox")
    batch = PreferenceCollator(dock.processor)([[chat_state], [pairs()[0]]])
    assert sorted(batch.slots_BL[batch.targets != IGNORE].unique().tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("lora", [False, True])
def test_a_stage_learns_to_prefer(docked: Callable[..., Dock], tmp_path: Path, lora: bool) -> None:
    dock = docked("llama")
    for i in range(6):
        tiny.picture(i).save(tmp_path / f"{i}.png")
    rows = [
        {"image": f"{i}.png", "question": "what is it?", "chosen": PAIRS[i % 3][0], "rejected": PAIRS[i % 3][1]}
        for i in range(6)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for name, some in (("a.jsonl", rows[:2]), ("b.jsonl", rows[2:])):
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in some))
    train = {"connector": 1e-2} | ({"language.lora": 1e-2} if lora else {})
    recipe = load({
        "precision": "fp32",
        "model": {"language": {"name": "made"}, "image": {"encoder": {"type": "hf_vision", "name": "made"}}},
        "stages": [{
            "name": "prefer", "objective": {"type": "dpo", "beta": 0.5}, "train": train, "batch_size": 6, "steps": 25,
            "schedule": "constant", "cache_features": lora,
            "data": [{"path": str(tmp_path / name)} for name in ("a.jsonl", "b.jsonl")],
            "validate": {"data": {"path": str(tmp_path / "pairs.jsonl")}, "every": 10},
            **({"lora": {"rank": 4, "dropout": 0.1}} if lora else {}),
        }],
    })  # fmt: skip
    folder = tmp_path / "run" / "stages" / "0-prefer"
    run_stage(dock, recipe, recipe.stages[0], folder, trained_before=set())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3 if not lora else 0.05)
    assert lines[-1]["metrics"]["accuracy"] == 1.0
    assert lines[-1]["loss"] < 0.3
    for line in lines:
        parts = line["by_source"]
        assert {name: p["samples"] for name, p in parts.items()} == {"a.jsonl": 2, "b.jsonl": 4}
        assert sum(p["loss"] * p["samples"] for p in parts.values()) == pytest.approx(6 * line["loss"])
    looks = [line["validation"]["loss"] for line in lines if "validation" in line]
    assert len(looks) == 3
    assert looks[-1] < looks[0] < 0.6931


def messages(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def test_both_forms_of_data_say_the_same(tmp_path: Path) -> None:
    tiny.picture(0).save(tmp_path / "0.png")
    plain = {"image": "0.png", "question": "what?", "chosen": "a dog", "rejected": "a fox"}
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    chat = {"images": ["0.png"], "prompt": prompt, "chosen": messages("a dog"), "rejected": messages("a fox")}
    (tmp_path / "d.jsonl").write_text(json.dumps(plain) + "\n" + json.dumps(chat) + "\n")
    one, other = read(tmp_path / "d.jsonl")
    assert one.messages == other.messages
    assert one.meta == other.meta == {"rejected": "a fox"}


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"question": "q", "chosen": "a", "rejected": "a "}, "same-answers"),
        ({"question": "q", "chosen": "a", "rejected": " "}, "empty-answer"),
        ({"question": "q", "chosen": messages("a") * 2, "rejected": "b"}, "wrong-type"),
        ({"question": "q", "chosen": [{"role": "user", "content": "a"}], "rejected": "b"}, "wrong-type"),
        ({"question": "q", "chosen": {"text": "a"}, "rejected": "b"}, "missing-field"),  # one message, and no speaker
    ],
)
def test_bad_pairs_are_named(row: dict[str, Any], kind: str, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError) as found:
        list(read(tmp_path / "d.jsonl", format="preference"))
    assert found.value.kind == kind
    assert "d.jsonl:1" in found.value.where


def test_data_without_a_rejected_answer_are_refused(docked: Callable[..., Dock]) -> None:
    with refused("no-rejected", "chosen, rejected", error=DataError):
        PreferenceCollator(docked("llama").processor)([[ask("q", tiny.picture(0), answer="a")]])


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"beta": 0}, "out-of-range"),
        ({"loss": "hinge"}, "unknown-name"),
        ({"label_smoothing": 0.5}, "out-of-range"),
        ({"sft": -1}, "out-of-range"),
    ],
)
def test_options_are_checked(docked: Callable[..., Dock], options: dict[str, Any], kind: str) -> None:
    with refused(kind, *options, *options.values()):
        DPO(docked("llama").model, **options)
