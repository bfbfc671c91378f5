"""Any causal language model of transformers, unchanged: text alone gives the bare model's logits, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from opticnerve.inference.generate import Answerer
from opticnerve.models.vlm.build import dock
from opticnerve.types import ask

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.mark.parametrize("fusion", ["splice", "cross_attention"])
@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.MORE_FAMILIES])
def test_bare_on_text_and_sees_pictures(
    family: str, fusion: str, language_folder: Callable[..., str], vision_folder: Callable[..., str]
) -> None:
    folder = language_folder(family)
    bare = AutoModelForCausalLM.from_pretrained(folder).eval()
    made = dock({"type": "hf_vision", "name": vision_folder("clip_vision_model")}, "mlp", folder, fusion=fusion)
    answerer = Answerer(made.model, made.processor)
    text = answerer.inputs([ask("what colour is the circle?"), ask("the quick brown fox jumps over the lazy dog")])
    with torch.no_grad():
        assert torch.equal(*tiny.words_of(made.model(**text).logits, bare(**text).logits))
        mine, theirs = (
            m.generate(**text, max_new_tokens=5, do_sample=False, pad_token_id=0) for m in (made.model, bare)
        )
        assert mine.tolist() == theirs.tolist()
        for parameter in made.model.image.connector.parameters():
            parameter.mul_(5)
        for layer in getattr(made.model.image.fusion, "layers", ()):
            layer.alpha_cross_attn.fill_(1.0)
            layer.alpha_dense.fill_(1.0)
            layer.cross_attn.o_proj.weight.mul_(20)
        one, other = (made.model(**answerer.inputs([ask("what?", tiny.picture(i))])).logits[0, -1] for i in (0, 1))
    assert not torch.equal(one, other), "the picture makes no difference"
