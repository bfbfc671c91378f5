from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from errors import refused
from opticnerve.evaluation import forgetting
from opticnerve.types import Conversation


class Bytes:
    """A tokenizer of bytes."""

    def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": list(text.encode())}

    def __len__(self) -> int:
        return 256


class Bigram(nn.Module):
    """Predicts from the last token alone, so that windows cannot matter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 256)

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        assert not torch.is_grad_enabled() and not self.training
        return SimpleNamespace(logits=self.table(input_ids))


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_every_token_counts_once_whatever_the_windows() -> None:
    torch.manual_seed(1)
    model = Bigram()
    text = forgetting.held_out_text()[:1000]
    ids = torch.tensor(list(text.encode()))
    log_p = model.table.weight.double().log_softmax(-1)
    expected = -log_p[ids[:-1], ids[1:]].mean().item()
    for window, batch in ((1024, 4), (7, 3), (100, 2), (999, 1), (1, 50)):
        got = forgetting.perplexity(model, Bytes(), text=text, tokens=None, window=window, batch_size=batch)
        assert got["nll"] == pytest.approx(expected, rel=1e-6) and got["tokens"] == 999
        assert got["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert forgetting.perplexity(model, Bytes(), text=text, tokens=500, window=64)["tokens"] == 500


def test_a_causal_model_agrees_with_transformers_own_loss(llama: LlamaForCausalLM) -> None:
    text = forgetting.held_out_text()[:65]
    ids = torch.tensor([list(text.encode())])
    loss = llama.eval()(input_ids=ids[:, :64], labels=ids[:, :64]).loss.item()
    assert forgetting.perplexity(llama, Bytes(), text=text[:64], tokens=None, window=64)["nll"] == pytest.approx(
        loss, rel=1e-5
    )


def test_windows_are_cut_to_the_models_positions(llama: LlamaForCausalLM) -> None:
    got = forgetting.perplexity(llama, Bytes(), text=forgetting.held_out_text()[:300], window=1024)
    assert got["window"] == 64 and got["tokens"] == 299


def test_nothing_is_left_changed(llama: LlamaForCausalLM) -> None:
    llama.train()
    llama.model.layers[0].eval()
    modes = [m.training for m in llama.modules()]
    forgetting.perplexity(llama, Bytes(), text=forgetting.held_out_text()[:100])
    forgetting.text_probe(llama, Bytes())
    assert [m.training for m in llama.modules()] == modes
    llama(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()


def test_the_probe_sees_the_smallest_change(llama: LlamaForCausalLM) -> None:
    before = forgetting.text_probe(llama, Bytes())
    assert forgetting.text_probe(llama, Bytes()) == before
    with torch.no_grad():
        weight = llama.lm_head.weight
        weight[5, 3] = torch.nextafter(weight[5, 3], torch.tensor(9.0)) * (1 + 1e-5)
    assert forgetting.text_probe(llama, Bytes()) != before


def test_broken_weights_and_empty_texts_are_named(llama: LlamaForCausalLM) -> None:
    with refused("out-of-range", "two tokens"):
        forgetting.perplexity(llama, Bytes(), text="a")
    with torch.no_grad():
        llama.lm_head.weight.fill_(math.nan)
    with refused("not-finite", "logits"):
        forgetting.perplexity(llama, Bytes(), text="a few words")


def test_the_batch_shrinks_so_that_logits_stay_small() -> None:
    assert (
        forgetting._fitting(4, 1024, 49_152) == 2
        and forgetting._fitting(4, 1024, 300_000) == 1
        and forgetting._fitting(4, 64, 256) == 4
    )


def test_the_fixed_text_and_questions() -> None:
    text = forgetting.held_out_text()
    paragraphs = [p for p in text.split("\n\n") if len(p) > 80]
    assert len(text.split()) > 15_500 and len(set(paragraphs)) == len(paragraphs)
    asked = forgetting.questions()
    assert len(asked) == len({q["question"] for q in asked}) == 24 and all(q["expected"] for q in asked)


@pytest.mark.parametrize(
    ("answer", "holds"), [("It is 5.", True), ("15", False), ("FIVE!", True), ("fivefold", False), ("", False)]
)
def test_expected_words_stand_alone(answer: str, holds: bool) -> None:
    assert forgetting.holds_expected(answer, ["5", "five"]) is holds


def test_an_entry_tells_whether_the_logits_are_the_same(llama: LlamaForCausalLM) -> None:
    def says_paris(prompts: list[Conversation]) -> list[str]:
        assert not any(c.images for c in prompts)
        return ["Paris."] * len(prompts)

    untouched = forgetting.forgetting_entry("untouched", llama, Bytes(), says_paris, tokens=500)
    assert untouched["logits_identical"] is None and untouched["answers_hold"] == 1 and len(untouched["answers"]) == 24
    assert forgetting.forgetting_entry("align", llama, Bytes(), says_paris, untouched=untouched, tokens=500)[
        "logits_identical"
    ]
    reused = forgetting.forgetting_entry("align", llama, Bytes(), says_paris, untouched=untouched, reuse_identical=True)
    assert reused["same_as"] == "untouched" and reused["perplexity"] == untouched["perplexity"]
    with torch.no_grad():
        llama.lm_head.weight.mul_(1.01)
    later = forgetting.forgetting_entry(
        "instruct", llama, Bytes(), says_paris, untouched=untouched, reuse_identical=True, tokens=500
    )
    assert "same_as" not in later
    assert later["logits_identical"] is False and later["perplexity"] != untouched["perplexity"]
    with refused("wrong-shape", "1 answers to 24"):
        forgetting.text_answers(lambda prompts: ["one"])
