"""Decoding says what transformers' `generate` says, token for token, and Llama's kind bit for bit in its logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import tiny
from errors import refused
from opticnerve.common.private_names import CACHE
from opticnerve.inference.decoding import decode
from opticnerve.inference.generate import Answerer
from opticnerve.models.vlm.build import Dock
from opticnerve.ops import enabled
from opticnerve.ops.fused_decode import FusedDecoder, ReservedLayer, reserve
from opticnerve.types import ask

pytestmark = pytest.mark.usefixtures("private_cache")
ASKED = [
    ask("a rather long question about the picture, is it not?", tiny.picture(1)),
    ask("q", tiny.picture(2), tiny.picture(3)),
    ask("text alone"),
    ask("what colour is the circle in the picture", tiny.picture(5)),
]
FUSED = ("llama", "llama tied", "qwen2", "qwen3", "mistral")


def lively(made: Dock) -> Dock:
    """A dock whose answers depend on the picture."""
    with torch.no_grad():
        for parameter in made.model.image.connector.parameters():
            parameter.mul_(5)
    return made


def generated(model: Any, inputs: Any, new: int, **options: Any) -> torch.Tensor:
    """transformers' tokens, (B, T)."""
    out = model.generate(**inputs, max_new_tokens=new, **options)
    return out[:, inputs["input_ids"].shape[1] :]


def decoded(model: Any, inputs: Any, new: int, **options: Any) -> torch.Tensor:
    """Ours."""
    return torch.stack(list(decode(model, dict(inputs), max_new_tokens=new, **options)), 1)


def middle(tokens_BT: torch.Tensor) -> list[int]:
    """Tokens that end each row somewhere else, two of them early."""
    return sorted({int(tokens_BT[0, 2]), int(tokens_BT[1, 5]), int(tokens_BT[2, 9])})


@pytest.mark.parametrize("family", [*FUSED, "gemma2", "gemma3_text", "gpt2", "bloom", "falcon"])
class TestAgainstTransformers:
    def test_a_batch_with_padding_and_ends_in_the_middle(self, family: str, docked: Callable[..., Dock]) -> None:
        made = lively(docked(family))
        inputs = Answerer(made.model, made.processor).inputs(ASKED)
        assert int((inputs["attention_mask"] == 0).sum()) > 0
        free = generated(made.model, inputs, 14, do_sample=False, pad_token_id=0, eos_token_id=None)
        fused = FusedDecoder.of(made.model.language_model)
        assert (fused is not None) == (family in FUSED and enabled())
        for ends in (None, middle(free)):
            options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": ends}
            theirs = generated(made.model, inputs, 14, **options)
            for how in ({"fused": fused}, {"fused": None}, {"drop_finished": False}, {"room": False, "fused": fused}):
                assert decoded(made.model, inputs, 14, **options, **how).tolist() == theirs.tolist(), how

    def test_one_row_and_one_token(self, family: str, docked: Callable[..., Dock]) -> None:
        made = lively(docked(family))
        inputs = Answerer(made.model, made.processor).inputs(ASKED[:1])
        fused = FusedDecoder.of(made.model.language_model)
        for new in (1, 12):
            theirs = generated(made.model, inputs, new, do_sample=False, pad_token_id=0)
            assert decoded(made.model, inputs, new, do_sample=False, pad_token_id=0, fused=fused).equal(theirs)


def test_a_window_that_slides_over_the_conversation(docked: Callable[..., Dock]) -> None:
    made = lively(docked("mistral"))
    inputs = Answerer(made.model, made.processor).inputs(ASKED)
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wide = generated(made.model, inputs, 14, **options)
    made.model.language_model.config.sliding_window = 8
    assert FusedDecoder.of(made.model.language_model) is None
    narrow = generated(made.model, inputs, 14, **options)
    assert not narrow.equal(wide)
    options["eos_token_id"] = middle(narrow)
    assert decoded(made.model, inputs, 14, **options).equal(generated(made.model, inputs, 14, **options))


def test_sampling_draws_what_transformers_draws(docked: Callable[..., Dock]) -> None:
    made = lively(docked())
    inputs = Answerer(made.model, made.processor).inputs(ASKED[:1])
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "pad_token_id": 0}
    torch.manual_seed(3)
    theirs = generated(made.model, inputs, 10, **options)
    for fused in (None, FusedDecoder.of(made.model.language_model)):
        assert decoded(made.model, inputs, 10, seed=3, fused=fused, **options).equal(theirs)


@pytest.mark.parametrize("wish", [{"repetition_penalty": 1.7}, {"num_beams": 2}])
def test_what_the_generation_config_asks_for_is_done(wish: dict[str, Any], docked: Callable[..., Dock]) -> None:
    made = lively(docked())
    inputs = Answerer(made.model, made.processor).inputs(ASKED[:1])
    plain = decoded(made.model, inputs, 12, do_sample=False, pad_token_id=0)
    for name, value in wish.items():
        setattr(made.model.generation_config, name, value)
    theirs = generated(made.model, inputs, 12, do_sample=False, pad_token_id=0)
    assert not theirs.equal(plain)
    assert decoded(made.model, inputs, 12, do_sample=False, pad_token_id=0).equal(theirs)


@pytest.mark.parametrize("fusion", ["splice", "cross_attention"])
def test_an_adapter_that_steps_aside_and_layers_that_look(fusion: str, docked: Callable[..., Dock]) -> None:
    made = lively(docked(fusion=fusion))
    made.model.give_lora({"rank": 4, "when": "media"})
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    for layer in getattr(made.model.image.fusion, "layers", ()):
        with torch.no_grad():
            layer.alpha_cross_attn.fill_(1.0)
    inputs = Answerer(made.model, made.processor).inputs(ASKED)
    assert FusedDecoder.of(made.model.language_model) is None
    free = generated(made.model, inputs, 12, do_sample=False, pad_token_id=0, eos_token_id=None)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": middle(free)}
    assert decoded(made.model, inputs, 12, **options).equal(generated(made.model, inputs, 12, **options))


@pytest.mark.skipif(not enabled(), reason="OPTICNERVE_PLAIN switches it off")
class TestFused:
    @pytest.mark.parametrize("family", FUSED)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("rows", [1, 4])
    def test_the_logits_are_the_models(
        self, family: str, dtype: torch.dtype, rows: int, language_folder: Callable[..., str]
    ) -> None:
        import transformers as tf

        model = tf.AutoModelForCausalLM.from_pretrained(language_folder(family), dtype=dtype).eval()
        ids_BL = torch.randint(8, 300, (rows, 9), generator=torch.Generator().manual_seed(1))
        fused = FusedDecoder.of(model)
        assert fused is not None
        with torch.inference_mode():
            theirs, ours = (model(ids_BL, use_cache=True)[CACHE] for _ in range(2))
            assert reserve(ours, 3)
            cos_BTd, sin_BTd = fused.tables(torch.tensor([9]), 5)
            fused.prepare(rows)
            for i in range(5):
                token_B = torch.full((rows,), 20 + i)
                wanted = model(token_B[:, None], **{CACHE: theirs}).logits[:, -1]
                logits_BV = fused.step(token_B, cos_BTd[:, i], sin_BTd[:, i], ours.layers, None)
                if dtype is torch.bfloat16:
                    assert logits_BV.equal(wanted)
                else:
                    torch.testing.assert_close(logits_BV, wanted)

    def test_the_model_stays_itself(self, docked: Callable[..., Dock], tmp_path: Path) -> None:
        """Joined weights are the parameters: the model trains, saves and loads as before."""
        from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration

        made = docked()
        before = {k: v.clone() for k, v in made.model.state_dict().items()}
        answerer = Answerer(made.model, made.processor)
        first = answerer.answer(ASKED, max_new_tokens=6)
        assert all(v.equal(before[k]) for k, v in made.model.state_dict().items())
        made.model.save_pretrained(tmp_path / "m")
        again = OpticNerveForConditionalGeneration.from_pretrained(tmp_path / "m")
        assert all(v.equal(before[k]) for k, v in again.state_dict().items())
        made.model(**answerer.inputs(ASKED)).logits.sum().backward()
        with torch.no_grad():
            for parameter in made.model.language_model.model.layers.parameters():
                parameter.sub_(5 * parameter.grad.sign())
        changed = answerer.answer(ASKED, max_new_tokens=6)
        assert changed != first
        assert changed == Answerer(again_with(again, made.model), made.processor).answer(ASKED, max_new_tokens=6)

    def test_who_does_not_fit(self, docked: Callable[..., Dock]) -> None:
        language = docked().model.language_model
        fused = FusedDecoder.of(language)
        assert fused is not None
        assert fused.still_fits(language)
        handle = language.model.layers[1].mlp.register_forward_hook(lambda *_: None)
        assert FusedDecoder.of(language) is None
        assert not fused.still_fits(language)
        handle.remove()
        assert fused.still_fits(language)
        language.model.layers[0].self_attn.k_proj.weight.data = torch.zeros(1)
        assert not fused.still_fits(language)


def again_with(model: Any, other: Any) -> Any:
    """`model` with the weights of `other`, nothing joined."""
    model.load_state_dict(other.state_dict())
    return model.eval()


@pytest.mark.skipif(not enabled(), reason="OPTICNERVE_PLAIN switches it off")
def test_a_cache_with_room_grows_past_it_and_notices_whoever_replaces_its_tensors() -> None:
    plain, roomy = DynamicCache(), DynamicCache()
    draw = torch.Generator().manual_seed(0)

    def more(new: int, rows: int) -> None:
        keys, values = torch.randn(2, rows, 2, new, 4, generator=draw)
        for cache in (plain, roomy):
            cache.update(keys, values, 0)

    more(3, 2)
    assert reserve(roomy, 2)
    assert type(roomy.layers[0]) is ReservedLayer
    for new in (1, 1, 1, 4):
        more(new, 2)
    for cache in (plain, roomy):
        cache.crop(-2)
    more(1, 2)
    for cache in (plain, roomy):
        cache.batch_select_indices(torch.tensor([1]))
    more(1, 1)
    for mine, theirs in (
        (roomy.layers[0].keys, plain.layers[0].keys),
        (roomy.layers[0].values, plain.layers[0].values),
    ):
        assert mine is not None
        assert theirs is not None
        assert mine.equal(theirs)


class TestCompiled:
    def test_refuses_what_it_does_not_know(self, docked: Callable[..., Dock]) -> None:
        made = docked(fusion="cross_attention")
        with refused("conflict", "compile=True", "cross-attention"):
            Answerer(made.model, made.processor, compile=True).answer(ASKED[:1], max_new_tokens=2)

    def test_says_the_same(self, docked: Callable[..., Dock], monkeypatch: pytest.MonkeyPatch) -> None:
        """The static cache and the way there; the compiler itself is torch's."""
        made = lively(docked())
        monkeypatch.setattr(torch, "compile", lambda module, **_: module)
        plain = Answerer(made.model, made.processor).answer(ASKED, max_new_tokens=8)
        assert Answerer(made.model, made.processor, compile=True).answer(ASKED, max_new_tokens=8) == plain


def test_a_recurrent_model_answers_from_its_state(docked: Callable[..., Dock]) -> None:
    """Mamba, whose cache has a name of its own and no positions: each token as from the whole sequence, padded or not."""
    made = lively(docked("mamba"))
    inputs = Answerer(made.model, made.processor).inputs(ASKED)
    assert int((inputs["attention_mask"] == 0).sum()) > 0
    empty = {CACHE: DynamicCache(config=made.model.language_model.config)}
    assert torch.allclose(made.model(**inputs, **empty).logits[:, -1], made.model(**inputs).logits[:, -1], atol=1e-5)
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    said_BT = decoded(made.model, inputs, 6, **options)
    for row, one in enumerate(ASKED):
        alone = Answerer(made.model, made.processor).inputs([one])
        for count in range(6):
            ids = torch.cat([alone["input_ids"], said_BT[row : row + 1, :count]], 1)
            whole = {**alone, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            assert made.model(**whole).logits[0, -1].argmax() == said_BT[row, count]
