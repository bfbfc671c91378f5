"""A forward pass of a dock as one graph: `torch.compile(fullgraph=True)` and `torch.export` give what eager gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import tiny
from opticnerve.inference.generate import Answerer
from opticnerve.models.vlm.build import Dock
from opticnerve.types import ask

pytestmark = [pytest.mark.usefixtures("private_cache"), pytest.mark.filterwarnings("ignore")]  # torch's own
CROSS = {"type": "cross_attention", "every": 1, "heads": 4}
QFORMER = {"type": "qformer", "num_queries": 4, "hidden_size": 16, "depth": 2, "heads": 2}
RESAMPLER = {"type": "resampler", "num_latents": 4, "depth": 1, "heads": 2, "key_value_heads": 1, "head_dim": 8}
DOCKS: dict[str, tuple[str, str, Any, Any]] = {
    "clip-mlp-llama": ("llama", "clip_vision_model", "mlp", "splice"),
    "siglip-pixel_shuffle-qwen2": ("qwen2", "siglip_vision_model", "pixel_shuffle", "splice"),
    "vit-qformer-llama": ("llama", "vit", QFORMER, "splice"),
    "clip-resampler-cross_attention-llama": ("llama", "clip_vision_model", RESAMPLER, CROSS),
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()  # type: ignore[no-untyped-call]
    yield
    torch._dynamo.reset()  # type: ignore[no-untyped-call]


def make(docked: Callable[..., Dock], name: str) -> Dock:
    language, vision, connector, fusion = DOCKS[name]
    made = docked(language, vision, connector=connector, fusion=fusion)
    if language == "qwen2":  # whose placeholder lies within the table
        made.model.resize_token_embeddings(made.processor.image_token_id + 8)
    with torch.no_grad():
        for key, parameter in made.model.image.fusion.named_parameters():
            if "alpha" in key:  # as after training: gates away from zero
                parameter.fill_(0.7)
    return made


def batch_of(made: Dock, *words: str) -> dict[str, Any]:
    """Rows of no, one and two pictures, the last with `words`."""
    first, second, last = words or ("text alone", "what is it?", "and these two, please")
    asked = ask(first), ask(second, tiny.picture(1)), ask(last, tiny.picture(2), tiny.picture(3))
    return {**Answerer(made.model, made.processor).inputs(asked), "use_cache": False}


def text_of(made: Dock, *words: str) -> dict[str, Any]:
    return {**made.processor(text=list(words), return_tensors="pt", padding=True), "use_cache": False}


@pytest.mark.parametrize("name", DOCKS)
def test_compiled_whole(docked: Callable[..., Dock], name: str) -> None:
    """Logits and gradients."""
    made = make(docked, name)
    batch, found = batch_of(made), []
    compiled: Any = torch.compile(made.model, fullgraph=True, backend="eager")
    for model in (made.model, compiled):
        made.model.zero_grad()
        out = model(**batch, labels=batch["input_ids"])
        out.loss.backward()
        found.append((out.logits, {n: p.grad for n, p in made.model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    if name.startswith("clip"):
        text = text_of(made, "what colour?", "a longer question, is it?")
        assert torch.equal(compiled(**text).logits, made.model(**text).logits)


@pytest.mark.parametrize("name", DOCKS)
@torch.no_grad()
def test_exported(docked: Callable[..., Dock], name: str) -> None:
    """As a module that holds for texts of other lengths, too."""
    made = make(docked, name)
    batch, other = (
        batch_of(made),
        batch_of(made, "other words alone", "and what may that be?", "longer words about two"),
    )
    assert batch["input_ids"].shape != other["input_ids"].shape
    auto = {1: torch.export.Dim.AUTO}
    shapes = {k: auto if k in ("input_ids", "attention_mask") else None for k in batch}
    module = torch.export.export(made.model, (), kwargs=batch, dynamic_shapes=shapes).module()
    for given in (batch, other):
        torch.testing.assert_close(module(**given).logits, made.model(**given).logits, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_exported_for_text(docked: Callable[..., Dock]) -> None:
    made = make(docked, "clip-mlp-llama")
    text = text_of(made, "what colour?", "a longer question")
    module = torch.export.export(made.model, (), kwargs=text).module()
    assert torch.equal(module(**text).logits, made.model(**text).logits)


@torch.no_grad()
def test_backbone_embeddings_and_features_computed_before(docked: Callable[..., Dock]) -> None:
    """The other ways in. Tiles are laid out by their pictures' sizes, which a graph cannot look at: it takes the soft
    tokens."""
    made = docked("llama", tiling={"type": "anyres", "pinpoints": [[32, 64], [64, 32]]})
    batch = batch_of(made)
    seen = made.model.get_image_features(batch.pop("pixel_values"), batch.pop("image_sizes"))
    computed = {**batch, "mm_encoder_outputs": {"image": seen}}
    embeds = made.model.get_input_embeddings()(batch["input_ids"])
    embedded = {k: v for k, v in computed.items() if k != "input_ids"} | {"inputs_embeds": embeds}
    backbone = made.model.base_model
    for given in (computed, embedded):
        compiled: Any = torch.compile(backbone, fullgraph=True, backend="eager")
        assert torch.equal(compiled(**given).last_hidden_state, backbone(**given).last_hidden_state)


@torch.no_grad()
def test_a_graph_checks_placeholders(docked: Callable[..., Dock]) -> None:
    """Without the numbers, which it cannot print, but never in silence."""
    made = make(docked, "clip-mlp-llama")
    number = made.processor.image_token_id
    for batch, place in ((batch_of(made), 5), (text_of(made, "what colour?"), number)):
        compiled = torch.compile(made.model, fullgraph=True, backend="eager")
        compiled(**batch)
        wrong = batch["input_ids"].clone()
        at = (wrong == number).nonzero()[0] if place == 5 else torch.tensor([0, 1])
        wrong[at[0], at[1]] = place
        with pytest.raises(RuntimeError, match="assertion failed"):
            compiled(**{**batch, "input_ids": wrong})


@torch.no_grad()
def test_compiled_models_answer(docked: Callable[..., Dock]) -> None:
    made = make(docked, "clip-mlp-llama")
    batch, options = {**batch_of(made), "use_cache": True}, {"max_new_tokens": 2, "do_sample": False}
    wanted = made.model.generate(**batch, **options)
    made.model.forward = torch.compile(made.model.forward, backend="eager")
    assert made.model.generate(**batch, **options).tolist() == wanted.tolist()
