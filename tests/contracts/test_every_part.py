"""Every registered part × every generic claim; a new name without a row in these tables fails.

By itself, a part keeps the contract of its kind (`opticnerve.testing`: shapes, options, saving, batches, gradients, dtypes,
devices, compilation, masks). Within a model of tiny neighbours it trains and freezes by its name, is saved with the model,
leaves text alone, takes packed rows, is planned for, and each export format writes it or refuses it with a reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from errors import refused
from opticnerve import registry
from opticnerve.data.collators.next_token import Batch, Collator
from opticnerve.data.encode.packing import Row, pack
from opticnerve.data.encode.tokenize import encode
from opticnerve.export.formats import PLAIN, formats
from opticnerve.inference.generate import Answerer
from opticnerve.language.load import load_language
from opticnerve.language.lora import is_lora
from opticnerve.models import OpticNerveForConditionalGeneration
from opticnerve.models.freeze import freeze
from opticnerve.models.vlm.build import Dock, assemble
from opticnerve.models.vlm.tower import join, language_sizes
from opticnerve.objectives.next_token import NextToken
from opticnerve.plan.cost import trace_step
from opticnerve.registry import Registry
from opticnerve.testing import check_connector, check_encoder, check_fusion
from opticnerve.testing.contract import stir
from opticnerve.types import Conversation, OpticNerveError, ask


@dataclass
class Case:
    """A tiny part: the options that build it, and what the check is told of it."""

    options: dict[str, Any] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)


def vision(family: str) -> dict[str, Any]:
    return {"architecture": tiny.vision_config(family).to_dict()}


def native(family: str, **options: Any) -> dict[str, Any]:
    return {"architecture": tiny.native_config(family).to_dict(), "fit": "native", "max_patches": 12, **options}


WHISPER = {
    "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "num_mel_bins": 8,
    "max_source_positions": 100, "vocab_size": 20, "decoder_layers": 1, "decoder_attention_heads": 2,
    "decoder_ffn_dim": 16, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip

ENCODERS: dict[str, dict[str, Case]] = {
    "hf_vision": {
        # LLaVA-1.5's cut: the last of the three layers and the final norm take no part.
        "clip": Case(
            {**vision("clip_vision_model"), "layer": -2},
            {"unused": ("model.encoder.layers.2.", "model.post_layernorm.")},
        ),
        "clip, several layers": Case(
            {**vision("clip_vision_model"), "layer": [-2, -3], "class_token": "keep"},
            {"unused": ("model.encoder.layers.2.", "model.post_layernorm.")},
        ),
        # (SigLIP's attention pooling.)
        "siglip": Case(vision("siglip_vision_model"), {"unused": ("model.head.",)}),
        "siglip, another size": Case({**vision("siglip_vision_model"), "image_size": 48}, {"unused": ("model.head.",)}),
        "dinov2": Case(vision("dinov2"), {"unused": ("model.embeddings.mask_token",)}),
        "dinov2 with registers": Case(vision("dinov2_with_registers"), {"unused": ("model.embeddings.mask_token",)}),
        "vit": Case(vision("vit"), {"unused": ("model.pooler.",)}),
        "siglip 2, native": Case(native("siglip2_vision_model"), {"unused": ("model.head.",), "fullgraph": False}),
        "dinov2, native": Case(native("dinov2"), {"unused": ("model.embeddings.mask_token",)}),
    },
    "timm": {
        "cnn": Case({"name": "test_efficientnet", "image_size": 64}, {"unused": ("model.classifier.",)}),
        "vit": Case({"name": "test_vit", "image_size": 64}, {"unused": ("model.head.",)}),
        "vit, native": Case({"name": "test_vit", "fit": "native", "max_patches": 12}, {"unused": ("model.head.",)}),
    },
    "pair": {
        "channels": Case(
            {
                "first": {"type": "hf_vision", **vision("siglip_vision_model")},
                "second": {"type": "hf_vision", **vision("dinov2"), "mean": [0.4, 0.5, 0.6]},
            },
            {"unused": ("first.model.head.", "second.model.embeddings.mask_token")},
        ),
        "tokens": Case(
            {
                "first": {"type": "hf_vision", **vision("clip_vision_model")},
                "second": {"type": "hf_vision", **vision("dinov2"), "class_token": "keep"},
                "join": "tokens",
            },
            # (CLIP's last norm is its pooler's.)
            {"unused": ("first.model.post_layernorm.", "second.model.embeddings.mask_token")},
        ),
    },
    "dual_encoder": {
        "siglip": Case(
            {"encoder": {"type": "hf_vision", **vision("siglip_vision_model")}}, {"unused": ("inner.model.head.",)}
        ),
    },
    "patches": {
        "small": Case({"image_size": 24, "patch_size": 6}),
        "native": Case({"fit": "native", "patch_size": 6, "max_patches": 12}),
    },
    "qwen_vl": {
        "2, merged": Case(native("qwen2_vl_vision"), {"fullgraph": False}),
        "2.5, unmerged": Case(
            native("qwen2_5_vl_vision", merge=False), {"unused": ("model.merger.",), "fullgraph": False}
        ),
        "3, several layers": Case(native("qwen3_vl_vision", deepstack=True), {"fullgraph": False}),
    },
    "whisper": {
        # (Its positions are sinusoids.)
        "two seconds": Case({"architecture": WHISPER}, {"unused": ("model.embed_positions.",)}),
        "one second, pooled": Case(
            {"architecture": WHISPER, "seconds": 1, "pool": 5}, {"unused": ("model.embed_positions.",)}
        ),
    },
}
CONNECTORS: dict[str, dict[str, Case]] = {
    "linear": {"as it comes": Case(), "without bias": Case({"bias": False})},
    "mlp": {"as it comes": Case(), "deep": Case({"depth": 3, "activation": "silu", "bias": False})},
    "pixel_shuffle": {
        "as it comes": Case(),
        "mlp": Case({"scale": 4, "depth": 2}),
    },
    "qformer": {
        "queries": Case({"num_queries": 4, "hidden_size": 32, "depth": 2, "heads": 2}),
        "instructed": Case(
            {"num_queries": 4, "hidden_size": 32, "depth": 2, "heads": 2, "instruct": True, "vocab_size": 50}
        ),
    },
    "resampler": {
        "small": Case({"num_latents": 5, "depth": 2, "heads": 4, "key_value_heads": 2, "head_dim": 8}),
        "no square": Case({"num_latents": 7, "depth": 1, "heads": 2, "key_value_heads": 2}, {"in_tokens": 11}),
    },
    "abstractor": {
        "as it comes": Case({"depth": 1}),
        "another width": Case({"depth": 2, "hidden_size": 40, "out_tokens": 9}),
    },
    "text_spotter": {
        # (Where characters stand is learned by an objective of its own.)
        "as it comes": Case({"width": 4, "hidden": 8, "threshold": 1e-6}, {"unused": ("middle.",), "chooses": True}),
        "a token a cell": Case(
            {"width": 4, "hidden": 8, "threshold": 1e-6, "pool": [1, 1]}, {"unused": ("middle.",), "chooses": True}
        ),
    },
}
FUSIONS: dict[str, dict[str, Case]] = {
    "splice": {"as it comes": Case()},
    "cross_attention": {
        "as it comes": Case(),
        "in every layer": Case({"every": 1, "heads": 4, "gate": "vector"}),
    },
}
TABLES = [(registry.encoders, ENCODERS), (registry.connectors, CONNECTORS), (registry.fusions, FUSIONS)]


@pytest.mark.parametrize(("parts", "table"), TABLES, ids=lambda p: getattr(p, "kind", ""))
def test_every_registered_name_has_a_case(parts: Registry[Any], table: dict[str, dict[str, Case]]) -> None:
    own = {name for name in parts if parts.get(name).__module__.startswith("opticnerve.")}
    without = sorted(name for name in own if not table.get(name))
    assert not without, f"add tiny {parts.kind}s to tests/contracts/test_every_part.py: {', '.join(without)}"
    assert set(table) <= own


def cases() -> list[Any]:
    return [
        pytest.param((parts, name, case, title), id=f"{parts.kind}-{name}-{title}")
        for parts, table in TABLES
        for name, titles in table.items()
        for title, case in titles.items()
    ]


@pytest.mark.parametrize("named", cases())
def test_contract(named: tuple[Registry[Any], str, Case, str]) -> None:
    parts, name, case, _ = named
    checks: dict[str, Any] = {"encoder": check_encoder, "connector": check_connector, "fusion": check_fusion}
    checks[parts.kind](partial(parts.get(name), **case.options), **case.told)  # type: ignore[misc]


# -- within a model ---------------------------------------------------------------------------------------------------


@dataclass
class Docked:
    """A part in a model of tiny neighbours, and what is said to the model."""

    kind: str
    modality: str
    dock: Dock
    asked: list[Conversation]
    case: tuple[str, str]
    unused: tuple[str, ...]

    @property
    def part(self) -> str:
        """Its name in `train`."""
        return f"{self.modality}.{self.kind}"

    def named(self) -> dict[str, Tensor]:
        tower = getattr(self.dock.model, self.modality)
        return {f"{self.part}.{n}": p for n, p in getattr(tower, self.kind).named_parameters()}

    def rows(self) -> list[Row]:
        return [pack([[encode(c, self.dock.processor)]]) for c in self.asked]

    def batch(self, rows: list[Row]) -> Batch:
        return Collator(self.dock.processor)(rows)

    def learn(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the gradients of what is open."""
        self.dock.model.zero_grad(set_to_none=True)
        loss, _ = NextToken(self.dock.model)(batch)
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in self.dock.model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module", params=cases())
def docked_part(request: pytest.FixtureRequest, language_folder: Callable[..., str], bert_folder: str) -> Docked:
    parts, name, case, title = request.param
    encoder, options = {"type": "patches", "image_size": 24, "patch_size": 6}, case.options
    if options.get("instruct"):  # its questions need a tokenizer
        options = {k: v for k, v in options.items() if k != "vocab_size"} | {"text_tokenizer": bert_folder}
    spec: dict[str, Any] = {"encoder": encoder, "connector": {"type": "linear"}, "fusion": {"type": "splice"}}
    spec[parts.kind] = {"type": name, **options}
    made = registry.encoders.get(spec["encoder"].pop("type"))(**spec["encoder"])
    language = load_language(language_folder())
    torch.manual_seed(0)
    tower = join(made, spec, language_sizes(language.model))
    tower.fusion.start(language.model.get_input_embeddings())
    dock = assemble(language, {made.modality: tower}, {})
    stir(tower)
    media = [tiny.picture(0), tiny.picture(1)] if made.modality == "image" else [
        np.random.default_rng(seed).normal(0, 0.1, 8_000).astype(np.float32) for seed in (0, 1)
    ]  # fmt: skip

    def about(question: str, *pieces: Any, answer: str) -> Conversation:
        if made.modality == "image":
            return ask(question, *pieces, answer=answer)
        return ask(question, audios=pieces, answer=answer)

    asked = [
        about("what is it?", media[0], answer="a red dog"), ask("say it", answer="no"),
        about("and this one?", media[1], answer="yes"), about("compare them", *media, answer="three foxes"),
    ]  # fmt: skip
    return Docked(parts.kind, made.modality, dock, asked, (name, title), case.told.get("unused", ()))


def test_it_alone_trains_when_it_is_named(docked_part: Docked) -> None:
    named = docked_part.named()
    if not named:
        with refused("empty"):
            freeze(docked_part.dock.model, {docked_part.part: 1e-3})
        return
    freeze(docked_part.dock.model, {docked_part.part: 1e-3})
    _, gradients = docked_part.learn(docked_part.batch(docked_part.rows()))
    assert gradients.keys() <= named.keys()
    assert any(g.any() for g in gradients.values())


def test_packed_rows_are_the_samples_apart(docked_part: Docked) -> None:
    docked_part.dock.model.requires_grad_(True).eval()
    loss, found = docked_part.learn(docked_part.batch(docked_part.rows()))
    one = pack([[encode(c, docked_part.dock.processor)] for c in docked_part.asked])
    packed_loss, packed = docked_part.learn(docked_part.batch([one]))
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=1e-5)
    assert packed.keys() == found.keys()
    for name, gradient in found.items():
        bound = 1e-4 * float(gradient.abs().max()) + 1e-6
        torch.testing.assert_close(packed[name], gradient, rtol=1e-3, atol=bound, msg=name)


def test_a_batch_without_media_is_the_language_model_s(docked_part: Docked) -> None:
    dock = docked_part.dock
    batch = Answerer(dock.model, dock.processor).inputs([ask("text alone"), ask("and more of it")])
    with torch.no_grad():
        bare = dock.model.language_model(**batch).logits
        assert torch.equal(*tiny.words_of(dock.model(**batch).logits, bare))
    docked_part.dock.model.requires_grad_(True)
    loss, gradients = docked_part.learn(docked_part.batch(docked_part.rows()[1:2]))
    assert loss.isfinite()
    assert not any(gradients[n].any() for n in docked_part.named().keys() & gradients.keys())


def test_it_is_saved_with_the_model(docked_part: Docked, tmp_path: Path) -> None:
    dock = docked_part.dock
    dock.model.save_pretrained(tmp_path)
    again = OpticNerveForConditionalGeneration.from_pretrained(tmp_path)
    tower = getattr(again, docked_part.modality)
    assert tower.describe() == getattr(dock.model, docked_part.modality).describe()
    batch = Answerer(dock.model, dock.processor).inputs(docked_part.asked)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, dock.model(**batch).logits, rtol=1e-5, atol=1e-5)


def test_it_answers_in_bfloat16(docked_part: Docked) -> None:
    dock = docked_part.dock
    batch = Answerer(dock.model, dock.processor).inputs(docked_part.asked)
    try:
        logits = dock.model.to(torch.bfloat16)(**batch).logits
    finally:
        dock.model.to(torch.float32)
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_a_plan_counts_it(docked_part: Docked) -> None:
    real = docked_part.dock.model
    with torch.device("meta"):
        planned = OpticNerveForConditionalGeneration(real.config)
    assert {n: p.shape for n, p in planned.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    freeze(planned, {"language": 1e-3})
    bare = trace_step(planned, rows=2, length=40, media={}, supervised=4)
    seen = trace_step(planned, rows=2, length=40, media={docked_part.modality: 2}, supervised=4)
    assert seen.flops > bare.flops > 0


def test_an_adapter_on_it(docked_part: Docked, tmp_path: Path) -> None:
    """Beside an encoder's or a fusion's linear layers: it begins as nothing, trains alone, is saved, and is merged."""
    if docked_part.kind == "connector":
        return
    docked_part.dock.model.save_pretrained(tmp_path / "plain")
    model = OpticNerveForConditionalGeneration.from_pretrained(tmp_path / "plain")
    made = replace(docked_part, dock=Dock(model, docked_part.dock.processor, bases={}))
    batch = Answerer(model, made.dock.processor).inputs(made.asked)

    def logits(model: OpticNerveForConditionalGeneration) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(**batch).logits
        return found

    before, part = logits(model), made.part
    try:
        model.give_lora({"rank": 2}, part)
    except OpticNerveError as e:  # without linear layers
        assert e.kind == "unsupported"
        assert docked_part.case in (
            ("timm", "cnn"),
            ("patches", "small"),
            ("patches", "native"),
            ("splice", "as it comes"),
        )
        return
    model.eval()
    torch.testing.assert_close(logits(model), before)
    freeze(model, {f"{part}.lora": 1e-3})
    adapter = model.part_parameters(f"{part}.lora")
    _, gradients = made.learn(made.batch(made.rows()))
    assert gradients.keys() <= adapter.keys()
    unused = {n for n in adapter if "lora_B" in n and n not in gradients}
    assert all(any(f"{part}.{start}" in n for start in docked_part.unused) for n in unused), unused
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapter.items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    changed = logits(model.eval())
    assert not torch.allclose(changed, before, atol=1e-3)
    model.save_pretrained(tmp_path / "adapted")
    again = OpticNerveForConditionalGeneration.from_pretrained(tmp_path / "adapted")
    torch.testing.assert_close(logits(again), changed, rtol=1e-5, atol=1e-5)
    again.merge_adapters()
    assert not any(map(is_lora, again.state_dict()))
    torch.testing.assert_close(logits(again), changed, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", formats.names())
def test_a_format_writes_it_or_says_why_not(docked_part: Docked, name: str, tmp_path: Path) -> None:
    dock, maker = docked_part.dock, formats.get(name)(PLAIN)
    if reasons := maker.refuse(dock.model, dock.processor):
        assert all(reasons)
    else:
        maker.write(dock.model, dock.processor, tmp_path)
        assert any(tmp_path.iterdir())
