"""Invariant 3: packed = unpacked, accumulated = one batch; logits at supervised positions are the model's own."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from errors import refused
from opticnerve.data.collators.next_token import Batch, Collator
from opticnerve.data.encode.packing import pack
from opticnerve.data.encode.tokenize import encode
from opticnerve.models.vlm.build import Dock
from opticnerve.objectives.next_token import NextToken
from opticnerve.ops import enabled
from opticnerve.ops.head import supervised_logits
from opticnerve.types import Conversation, ask

pytestmark = pytest.mark.usefixtures("private_cache")
PACKABLE = ("llama", "llama tied", "qwen2", "mistral", "phi", "gemma2", "gpt2", "opt")
WORDS = ["a red circle", "yes", "no, it's a dog", "the blue square and a fox", "42"]


def chat_state(rng: random.Random, picture: Any) -> Conversation:
    pictures = [] if picture is None else [picture]
    return ask(" ".join(rng.choices(WORDS, k=rng.randint(1, 3))), *pictures, answer=rng.choice(WORDS))


def batch_of(dock: Dock, rows: Sequence[Sequence[Sequence[Conversation]]]) -> Batch:
    """Rows of groups of samples."""
    return Collator(dock.processor)([pack([[encode(c, dock.processor) for c in g] for g in row]) for row in rows])


def loss_and_gradients(dock: Dock, batches: Sequence[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Sums over batches, each gone through by itself."""
    dock.model.zero_grad()
    total, count = 0.0, 0
    for batch in batches:
        loss, supervised = NextToken(dock.model)(batch)
        assert int(supervised) == batch.supervised
        loss.backward()
        total, count = total + float(loss.detach()), count + int(supervised)
    assert count
    # The vision encoder's class-token output and last layer norm go unused: no gradient at all.
    gradients = {n: p.grad.clone() for n, p in dock.model.named_parameters() if p.grad is not None}
    assert any("image.encoder" in n for n in gradients) or not any(b.media for b in batches)
    return total, gradients


def assert_same(one: tuple[float, dict[str, torch.Tensor]], other: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert one[1].keys() == other[1].keys()
    largest = max(float(g.abs().max()) for g in other[1].values())
    for name, gradient in one[1].items():
        # Some gradients are zero but for rounding (a key's bias shifts all scores alike): hence the part of the largest.
        tolerance = 2e-5 * float(other[1][name].abs().max()) + 1e-6 * largest
        assert float((gradient - other[1][name]).abs().max()) < tolerance, name


@pytest.mark.parametrize("family", PACKABLE)
class TestEveryFamily:
    def test_packed_and_shared_equal_separate(self, docked: Callable[..., Dock], family: str) -> None:
        dock, rng = docked(family), random.Random(0)
        groups = [[chat_state(rng, p) for p in [tiny.picture(i)] * (i + 1)] for i in range(3)]
        groups.append([chat_state(rng, None)])
        apart = [batch_of(dock, [[[c]]]) for g in groups for c in g]
        assert all(b.plain for b in apart)
        separate = loss_and_gradients(dock, apart)
        packed = batch_of(dock, [groups[:2], groups[2:]])
        assert not packed.plain
        assert packed.tokens < sum(b.tokens for b in apart)
        assert_same(loss_and_gradients(dock, [packed]), separate)

    def test_supervised_logits_are_the_models_own(self, docked: Callable[..., Dock], family: str) -> None:
        dock = docked(family)
        ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
        keep = torch.rand(2, 12, generator=torch.Generator().manual_seed(1)) < 0.4
        whole = dock.model.language_model(input_ids=ids).logits
        some = supervised_logits(dock.model.language_model, keep.flatten().nonzero().squeeze(1), input_ids=ids)
        torch.testing.assert_close(some, whole[keep], rtol=1e-5, atol=1e-6)
        # The hook is gone again.
        assert torch.equal(dock.model.language_model(input_ids=ids).logits, whole)


def test_the_soft_cap_is_applied(docked: Callable[..., Dock]) -> None:
    """Gemma 2 caps its logits behind the head: a head called by hand would miss it."""
    language = docked("gemma2").model.language_model
    with torch.no_grad():
        language.get_output_embeddings().weight.mul_(100)
    ids = torch.arange(10)[None]
    logits = supervised_logits(language, torch.arange(10), input_ids=ids)
    assert 1.5 < float(logits.detach().abs().max()) <= 2.0


@pytest.fixture(scope="module")
def llama(language_folder: Callable[..., str], vision_folder: Callable[..., str], private_cache: Any) -> Dock:
    from opticnerve.models.vlm.build import dock

    return dock(vision_folder(), "mlp", language_folder("llama"))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4), split=st.integers(1, 3), seed=st.integers(0, 99))
def test_any_grouping_gives_the_same_loss_and_gradients(llama: Dock, sizes: list[int], split: int, seed: int) -> None:
    rng = random.Random(seed)
    pictures = [tiny.picture(seed + i) if rng.random() < 0.8 else None for i in range(len(sizes))]
    groups = [
        [chat_state(rng, p) for _ in range(n if p is not None else 1)] for n, p in zip(sizes, pictures, strict=True)
    ]
    separate = loss_and_gradients(llama, [batch_of(llama, [[[c]]]) for g in groups for c in g])
    rows = [groups[i : i + split] for i in range(0, len(groups), split)]
    assert_same(loss_and_gradients(llama, [batch_of(llama, rows)]), separate)


def test_accumulated_equals_one_batch(llama: Dock) -> None:
    """Samples with very different numbers of supervised tokens: means of means would differ."""
    rng = random.Random(3)
    rows = [[[chat_state(rng, tiny.picture(i))]] for i in range(3)] + [
        [[ask("q", tiny.picture(9), answer="word " * 20)]]
    ]
    whole = loss_and_gradients(llama, [batch_of(llama, rows)])
    parts = loss_and_gradients(llama, [batch_of(llama, rows[:1]), batch_of(llama, rows[1:])])
    assert_same(parts, whole)


def test_the_picture_gets_a_gradient_from_every_branch(llama: Dock) -> None:
    picture = tiny.picture(5)
    both = batch_of(llama, [[[ask("q one", picture, answer="yes"), ask("q two", picture, answer="no")]]])
    pixels = both.media["pixel_values"].requires_grad_()
    NextToken(llama.model)(both)[0].backward()
    assert pixels.grad is not None
    assert bool((pixels.grad != 0).any())


def test_the_loss_is_transformers_own(llama: Dock) -> None:
    """On one sample: the sum over tokens is the mean that `labels=` gives, times their number."""
    encoded = encode(ask("q", tiny.picture(), answer="a red circle"), llama.processor)
    batch = Collator(llama.processor)([pack([[encoded]])])
    loss, count = NextToken(llama.model)(batch)
    out = llama.model(
        input_ids=torch.tensor([encoded.input_ids]),
        labels=torch.tensor([encoded.labels]),
        **batch.media,
    )
    assert float(out.loss.detach()) == pytest.approx(float(loss.detach()) / int(count), rel=1e-5)


def test_a_packed_row_longer_than_a_sliding_window_is_refused(docked: Callable[..., Dock]) -> None:
    """Our mask would replace the language model's own, window and all."""
    dock = docked("mistral")
    questions = [ask("is it red?", answer="yes"), ask("is it blue?", answer="no")]
    batch = batch_of(dock, [[questions]])
    dock.model.language_model.config.sliding_window = batch.input_ids.shape[1]
    NextToken(dock.model)(batch)
    dock.model.language_model.config.sliding_window = 4
    if enabled():
        NextToken(dock.model)(batch)  # by segments every layer knows its window
    dock.model.language_model.set_attn_implementation("eager")  # a mask of ours replaces the window
    with refused("too-long", 4):
        NextToken(dock.model)(batch)
