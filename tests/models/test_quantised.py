"""Quantised and offloaded docks against the plain one: what a user loads with less memory answers the same.

Bounds are on the cosine between the logits at each position of the text: what docs/models.md states. Packages that are
not in the lock are tried where somebody has installed them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

import tiny
from errors import refused
from opticnerve.inference.generate import Answerer
from opticnerve.language.chat_template import CHATML
from opticnerve.language.lora import is_lora
from opticnerve.models import OpticNerveForConditionalGeneration
from opticnerve.models.checkpoint.options import spared
from opticnerve.models.vlm.build import Dock, dock
from opticnerve.models.vlm.placeholders import sayable
from opticnerve.models.vlm.tower import placed_like
from opticnerve.types import ask

pytestmark = pytest.mark.usefixtures("private_cache")
KINDS: dict[str, dict[str, Any]] = {"plain": {}, "lora": {}, "cross_attention": {"fusion": "cross_attention"}}


def bitsandbytes(**options: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    return tf.BitsAndBytesConfig(**options)


def torchao() -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    return tf.TorchAoConfig(quantization.Int8WeightOnlyConfig())


def quanto() -> Any:
    pytest.importorskip("optimum.quanto")
    return tf.QuantoConfig(weights="int8")


# The configuration; how small the least cosine may be, and the share of positions with the same greedy word.
METHODS: dict[str, tuple[Callable[[], Any], float, float]] = {
    "bitsandbytes int8": (lambda: bitsandbytes(load_in_8bit=True), 0.99, 0.9),
    "bitsandbytes nf4": (lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 0.9, 0.5),
    "torchao int8": (torchao, 0.99, 0.9),
    "quanto int8": (quanto, 0.99, 0.9),
}


@pytest.fixture(scope="module")
def docks(tmp_path_factory: pytest.TempPathFactory, private_cache: Path) -> Callable[[str], tuple[Dock, Path]]:
    """A dock of one of `KINDS` that does something, and its self-contained folder; wide enough for kernels of 4 bit."""
    words, base = tiny.tokenizer(chat_template=CHATML), tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    language = tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            initializer_range=0.1,
        )
    )  # fmt: skip
    language.save_pretrained(base / "language")
    words.save_pretrained(base / "language")
    vision, made = tiny.save_vision(base / "vision"), {}

    def make(kind: str) -> tuple[Dock, Path]:
        if kind not in made:
            one = dock(vision, "mlp", str(base / "language"), **KINDS[kind])
            if kind == "lora":
                one.model.give_lora({"rank": 4})
            with torch.no_grad():
                for name, parameter in one.model.named_parameters():
                    if is_lora(name) or ".fusion." in name:
                        parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
            one.model.save_pretrained(base / kind)
            made[kind] = one, base / kind
        return made[kind]

    return make


def inputs(made: Dock) -> Any:
    return Answerer(made.model, made.processor).inputs([ask("what is it?", tiny.picture(1)), ask("q", tiny.picture(2))])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_quantised(docks: Callable[[str], tuple[Dock, Path]], method: str, kind: str) -> None:
    config, bound, alike = METHODS[method]
    made, folder = docks(kind)
    given, plain = inputs(made), {n: type(p) for n, p in made.model.named_parameters()}
    model = OpticNerveForConditionalGeneration.from_pretrained(
        folder, quantization_config=config(), dtype=torch.float32
    )
    changed = {n for n, p in model.named_parameters() if not p.is_floating_point() or type(p) is not plain[n]}
    changed |= {n for n in plain if n not in dict(model.named_parameters())}
    assert changed
    assert all(n.startswith("language_model.model.layers.") and "lora_" not in n for n in changed)
    with torch.no_grad():
        found, wanted = model(**given).logits.float(), made.model(**given).logits
    text, words = given["attention_mask"].bool(), sayable(wanted)
    found, wanted = found[..., words], wanted[..., words]
    cosines = nn.functional.cosine_similarity(found[text], wanted[text], dim=-1)
    same = (found[text].argmax(-1) == wanted[text].argmax(-1)).float().mean()
    assert cosines.min() > bound
    assert same > alike
    assert model.generate(**given, max_new_tokens=3).shape[0] == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device_map", ["auto", "cpu", "dict", "half on disk", "nearly all on disk"])
def test_placed(docks: Callable[[str], tuple[Dock, Path]], device_map: str, kind: str, tmp_path: Path) -> None:
    """Weights that lie elsewhere come when they are needed: the same logits, bit for bit."""
    made, folder = docks(kind)
    maps: dict[str, Any] = {
        "dict": {"image": "cpu", "language_model": "cpu"},
        "half on disk": {"image": "cpu", "language_model.model": "disk", "language_model.lm_head": "cpu"},
        "nearly all on disk": {"image": "disk", "language_model.model": "disk", "language_model.lm_head": "cpu"},
    }
    model = OpticNerveForConditionalGeneration.from_pretrained(
        folder, device_map=maps.get(device_map, device_map), offload_folder=tmp_path
    )
    assert any(p.is_meta for p in model.parameters()) == ("disk" in device_map)
    assert model.device.type == "cpu"
    given = inputs(made)
    with torch.no_grad():
        assert torch.equal(model(**given).logits, made.model(**given).logits)
        assert model.generate(**given, max_new_tokens=3).shape[0] == 2


def test_a_list_of_the_user_s(docks: Callable[[str], tuple[Dock, Path]]) -> None:
    """What docking added is spared in any case; encoders where the user named nothing."""
    config = docks("plain")[0].model.config
    assert {"image", "language_model.lm_head"} <= set(spared(config, encoders=True))
    named = spared(config, encoders=False)
    assert {"image.connector", "image.fusion", "language_model.lm_head"} <= set(named)
    assert "image" not in named


def test_placed_like_what_computes() -> None:
    eight, half, given = nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.bfloat16), torch.ones(1)
    eight.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    del eight.bias
    assert placed_like(eight, half).dtype == torch.bfloat16
    assert placed_like(nn.ReLU(), otherwise=given) is given
    assert placed_like(nn.ReLU(), otherwise=given.to("meta")).is_meta
    like = placed_like(half.to("meta"), otherwise=given)
    assert (like.dtype, like.device) == (torch.bfloat16, given.device)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_in_use(docks: Callable[[str], tuple[Dock, Path]], bits: int, tmp_path: Path) -> None:
    """Saved and loaded again it is the same; another adapter trains beside ours; a list of the user's is kept to."""
    (made, folder), how = docks("lora"), {f"load_in_{bits}bit": True}
    given, load = inputs(made), OpticNerveForConditionalGeneration.from_pretrained
    model = load(folder, quantization_config=bitsandbytes(**how), dtype=torch.float32)
    wanted = model(**given).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)(**given).logits, wanted)
    theirs = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "gate_proj"]))
    assert torch.equal(theirs(**given).logits, wanted)
    theirs(**given).logits.square().sum().backward()
    assert {n.split(".")[-2] for n, p in theirs.named_parameters() if p.grad is not None} == {"default"}
    with refused("unsupported", "quantised"):
        theirs.merge_and_unload()
    listed = bitsandbytes(**how, llm_int8_skip_modules=["language_model.model.layers.0"])
    named = load(folder, quantization_config=listed).named_parameters()
    whole = {n for n, p in named if p.is_floating_point() and p.ndim > 1}
    assert "language_model.model.layers.0.mlp.up_proj.base_layer.weight" in whole
    assert "language_model.model.layers.1.mlp.up_proj.base_layer.weight" not in whole
    assert not any(n.startswith("image.encoder") and ".fc" in n for n in whole)
    assert any(n.startswith("image.connector") for n in whole)
    assert listed.llm_int8_skip_modules == ["language_model.model.layers.0"]
