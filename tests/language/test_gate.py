"""`lora.when: media`: the adapter works on rows with a picture; text alone meets the untouched language model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from opticnerve.inference.generate import Answerer
from opticnerve.models import OpticNerveForConditionalGeneration
from opticnerve.models.vlm.build import Dock, merge
from opticnerve.ops.fused_layers import fuse_layers
from opticnerve.train.setup import checkpoint_layers
from opticnerve.types import ask

pytestmark = pytest.mark.usefixtures("private_cache")


def gated(docked: Callable[..., Dock], **options: Any) -> Dock:
    dock = docked("llama")
    dock.model.give_lora({"rank": 2, **options})
    with torch.no_grad():
        for name, parameter in dock.model.named_parameters():
            if "lora_B" in name:  # fresh adapters do nothing: make these do much
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return dock


def inputs(dock: Dock, *pictures: Any) -> Any:
    return Answerer(dock.model, dock.processor).inputs([ask("what colour is it?", *p) for p in pictures])


RED = PIL.Image.new("RGB", (40, 40), "red")


def test_text_alone_is_untouched_and_pictures_are_not(docked: Callable[..., Dock]) -> None:
    bare, dock, always = docked("llama"), gated(docked, when="media"), gated(docked)
    with torch.no_grad():
        words, seen = inputs(bare, ()), inputs(bare, (RED,))
        assert torch.equal(dock.model(**words).logits, bare.model(**words).logits)
        assert not torch.allclose(always.model(**words).logits, bare.model(**words).logits)
        assert torch.equal(dock.model(**seen).logits, always.model(**seen).logits)


def test_each_row_of_a_batch_for_itself(docked: Callable[..., Dock]) -> None:
    bare, dock, always = docked("llama"), gated(docked, when="media"), gated(docked)
    with torch.no_grad():
        both = inputs(bare, (), (RED,))
        mixed = dock.model(**both).logits[:, -1]
        assert torch.allclose(mixed[0], bare.model(**both).logits[0, -1], atol=1e-5)
        assert torch.allclose(mixed[1], always.model(**both).logits[1, -1], atol=1e-5)


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_remembers_which_rows_had_pictures(docked: Callable[..., Dock], beams: int) -> None:
    """After the prompt a step sees single tokens, none of them a placeholder."""
    bare, dock, always = docked("llama"), gated(docked, when="media"), gated(docked)
    how = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "eos_token_id": None, "pad_token_id": 0}
    words, seen = inputs(bare, ()), inputs(bare, (RED,))
    assert torch.equal(dock.model.generate(**words, **how), bare.model.generate(**words, **how))
    assert torch.equal(dock.model.generate(**seen, **how), always.model.generate(**seen, **how))
    both = inputs(bare, (RED,), ())
    from_batch = dock.model.generate(**both, **how)[:, -6:]
    assert torch.equal(from_batch[0], always.model.generate(**seen, **how)[0, -6:])
    assert torch.equal(from_batch[1], bare.model.generate(**words, **how)[0, -6:])


def test_saved_whole_it_keeps_its_gate(docked: Callable[..., Dock], tmp_path: Path) -> None:
    dock = gated(docked, when="media")
    dock.model.save_pretrained(tmp_path / "whole")
    dock.processor.save_pretrained(tmp_path / "whole")
    merged = merge(tmp_path / "whole", tmp_path / "merged")
    for folder in (tmp_path / "whole", merged):
        back = OpticNerveForConditionalGeneration.from_pretrained(folder)
        with torch.no_grad():
            for given in (inputs(dock, ()), inputs(dock, (RED,))):
                assert torch.equal(back(**given).logits, dock.model(**given).logits)


@pytest.mark.parametrize("plain", [True, False], ids=["plain layers", "fused layers"])
def test_layers_run_again_mask_the_same_rows(docked: Callable[..., Dock], plain: bool) -> None:
    """Gradient checkpointing computes a layer twice; text alone stays without the adapter the second time, too."""
    given = inputs(docked("llama"), (), (RED,))
    found = []
    for again in (False, True):
        dock = gated(docked, when="media")
        dock.model.requires_grad_(False)
        for name, parameter in dock.model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        if again:
            checkpoint_layers(dock.model)
        dock.model.train()
        with nullcontext() if plain else fuse_layers(dock.model.language_model):
            dock.model(**given).logits.square().sum().backward()
        found.append({n: p.grad for n, p in dock.model.named_parameters() if p.grad is not None})
    once, twice = found
    assert once.keys() == twice.keys()
    for name, gradient in once.items():
        torch.testing.assert_close(twice[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
