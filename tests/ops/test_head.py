"""The loss in pieces is the loss: value and gradients, frozen head or not, with or without something behind the head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

from opticnerve.ops import enabled, head

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


def language_model(kind: str) -> Any:
    torch.manual_seed(0)
    made: Any = {
        "tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, tie_word_embeddings=True)),
        "untied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)),
        "soft caps": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**SIZES, final_logit_softcapping=2.0)),
        "scaled": lambda: tf.GraniteForCausalLM(
            tf.GraniteConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logits_scaling=3.0)
        ),
    }[kind]()
    return made.eval()


def everything(model: Any, ids: Tensor, keep: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(input_ids=ids, use_cache=False).logits[keep].float(), targets, reduction="sum")


@pytest.mark.parametrize("trains", ["nothing of the head", "the head"])
@pytest.mark.parametrize("kind", ["tied", "untied", "soft caps", "scaled"])
def test_pieces_add_up(kind: str, trains: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "PIECE", 4 * 50)
    monkeypatch.setattr(head, "_LEAST", 1)
    model = language_model(kind)
    if trains == "nothing of the head":
        for p in model.get_output_embeddings().parameters():
            p.requires_grad_(False)
    ids = torch.randint(0, 50, (3, 8))
    keep = torch.rand(3, 8) < 0.6
    targets = torch.randint(0, 50, (int(keep.sum()),))
    assert len(targets) > 8

    def run(loss: Tensor) -> tuple[float, dict[str, Tensor]]:
        model.zero_grad(set_to_none=True)
        (loss / 7).backward()
        return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    widest = 0
    own = model.get_output_embeddings().forward

    def watched(hidden: Tensor) -> Tensor:
        nonlocal widest
        widest = max(widest, hidden.shape[:-1].numel())
        return own(hidden)

    wanted = run(everything(model, ids, keep, targets))
    monkeypatch.setattr(model.get_output_embeddings(), "forward", watched)
    for _ in range(2):  # the second time it is known whether something stands behind the head
        widest = 0
        found = run(head.supervised_loss(model, keep.flatten().nonzero().squeeze(1), targets, input_ids=ids).sum())
        assert found[0] == pytest.approx(wanted[0], rel=1e-5)
        assert found[1].keys() == wanted[1].keys()
        for name, grad in wanted[1].items():
            assert float((found[1][name] - grad).norm()) < 1e-4 * float(grad.norm()) + 1e-7, name
    assert not enabled() or widest == (len(targets) if kind in ("soft caps", "scaled") else 4)


def test_without_gradients_the_loss_alone() -> None:
    layer = nn.Linear(8, 20, bias=False)
    hidden, targets = torch.randn(600, 8), torch.randint(0, 20, (600,))
    with torch.no_grad():
        loss = head.loss_in_pieces(layer, hidden, targets)
    assert not loss.requires_grad
    assert float(loss.sum()) == pytest.approx(
        float(F.cross_entropy(layer(hidden), targets, reduction="sum").detach()), rel=1e-5
    )
