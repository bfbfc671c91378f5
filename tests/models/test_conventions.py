"""A docked model in other people's hands: what transformers, TRL and peft ask of a LLaVA, asked of a dock."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import tiny
from errors import refused
from opticnerve.inference.generate import Answerer
from opticnerve.models import OpticNerveForConditionalGeneration, OpticNerveModel
from opticnerve.models.vlm.build import Dock
from opticnerve.types import ask

pytestmark = pytest.mark.usefixtures("private_cache")
NEW = {"max_new_tokens": 6, "do_sample": False}
IGNORE = -100


def docked_with(docked: Callable[..., Dock], where: str, family: str = "llama", **options: Any) -> Dock:
    """A dock whose placeholder lies in the language model's table (`where` "within") or behind it ("beyond")."""
    made = docked(family, **options)
    with torch.no_grad():
        for parameter in made.model.image.connector.parameters():
            parameter.mul_(5)
    rows = made.model.config.text_config.vocab_size
    if where == "within":
        language = made.model.language_model
        language.resize_token_embeddings(made.processor.image_token_id + 8)
        with torch.no_grad():
            language.get_output_embeddings().weight[rows:] = 3.0  # it would be said often
    assert (made.processor.image_token_id < language_rows(made)) == (where == "within")
    return made


def language_rows(made: Dock) -> int:
    return int(made.model.language_model.get_input_embeddings().weight.shape[0])


def batch_of(made: Dock, *asked: Any) -> dict[str, Any]:
    asked = asked or (
        ask("what is it?", tiny.picture(1)),
        ask("and these two, please", tiny.picture(2), tiny.picture(3)),
    )
    return dict(Answerer(made.model, made.processor).inputs(list(asked)))


@pytest.fixture(params=["within", "beyond"])
def made(request: pytest.FixtureRequest, docked: Callable[..., Dock]) -> Dock:
    return docked_with(docked, request.param)


# -- the backbone -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("fusion", ["splice", "cross_attention"])
def test_hidden_states_times_head_are_the_logits(docked: Callable[..., Dock], family: str, fusion: str) -> None:
    made = docked_with(docked, "beyond", family, fusion=fusion)
    batch = batch_of(made)
    whole, base = made.model(**batch), made.model.base_model
    assert type(base) is OpticNerveModel
    out = base(**batch)
    head = made.model.get_output_embeddings()
    assert head is not None
    torch.testing.assert_close(head(out.last_hidden_state), whole.logits[..., : language_rows(made)])
    assert torch.equal(out.image_hidden_states, whole.image_hidden_states)


def test_the_backbone_is_a_view(made: Dock) -> None:
    """No weight is listed twice, what is put into the model is in the backbone, and a copy has a backbone of its own."""
    names = [n for n, _ in made.model.named_parameters(remove_duplicate=False)]
    assert not [n for n in names if n.startswith("model.")]
    twin = copy.deepcopy(made.model)
    assert twin.base_model is not made.model.base_model
    twin.language_model.set_input_embeddings(torch.nn.Embedding(5, 32))
    assert twin.base_model.language_model.get_input_embeddings().weight.shape[0] == 5
    assert language_rows(made) > 5


def test_auto_classes_find_both(made: Dock, tmp_path: Path) -> None:
    made.model.save_pretrained(tmp_path)
    batch = batch_of(made)
    for auto in (tf.AutoModelForImageTextToText, tf.AutoModelForMultimodalLM):
        assert torch.equal(auto.from_pretrained(tmp_path)(**batch).logits, made.model(**batch).logits)
    base = tf.AutoModel.from_pretrained(tmp_path)
    assert type(base) is OpticNerveModel
    assert torch.equal(base(**batch).last_hidden_state, made.model.base_model(**batch).last_hidden_state)


# -- placeholders -----------------------------------------------------------------------------------------------------


def test_a_placeholder_is_an_id_like_others(made: Dock) -> None:
    number, model, batch = made.processor.image_token_id, made.model, batch_of(made)
    assert model.config.vocab_size > number
    embeds = model.get_input_embeddings()(batch["input_ids"])
    assert embeds.shape == (*batch["input_ids"].shape, 32)
    logits = model(**batch).logits
    assert logits.shape[-1] > number
    assert bool((logits[..., number] == torch.finfo(logits.dtype).min).all())


def test_words_keep_their_logits_bit_for_bit(made: Dock) -> None:
    text = made.processor(text=["what colour?", "a longer question, is it?"], return_tensors="pt")
    ours, bare = made.model(**text).logits, made.model.language_model(**text).logits
    number = made.processor.image_token_id
    words = [i for i in range(bare.shape[-1]) if i != number]
    assert torch.equal(ours[..., words], bare[..., words])


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 5.0, "top_k": 0},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"encoder_repetition_penalty": 1.3},
        {"repetition_penalty": 1.3},
        {"encoder_no_repeat_ngram_size": 2},
        {"bad_words_ids": [[3], [4, 5]]},
    ],
    ids=lambda o: next(iter(o)),
)
def test_generation_never_says_it(made: Dock, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    batch = batch_of(made, ask("what is it?", tiny.picture(1)))
    said = made.model.generate(**batch, **{**NEW, "max_new_tokens": 12, **options})
    assert made.processor.image_token_id not in said[0, batch["input_ids"].shape[1] :].tolist()


def test_scores_of_what_was_said(made: Dock) -> None:
    batch = batch_of(made)
    out = made.model.generate(**batch, **NEW, return_dict_in_generate=True, output_scores=True)
    scores = made.model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    assert bool((scores.exp().sum(-1) > 0).all())


def test_our_own_decoding_never_says_it(made: Dock) -> None:
    answerer = Answerer(made.model, made.processor)
    assert "<image>" not in "".join(answerer.stream(ask("what is it?", tiny.picture(1)), max_new_tokens=12))
    batch = batch_of(made)
    from opticnerve.inference.decoding import decode

    with torch.inference_mode():
        ours = torch.stack(list(decode(made.model, dict(batch), fused=answerer.fused(), **NEW)), 1)
    theirs = made.model.generate(**batch, **NEW)[:, batch["input_ids"].shape[1] :]
    assert ours[:, : theirs.shape[1]].tolist() == theirs.tolist()


def test_labels_that_are_the_ids_learn_the_words_alone(made: Dock) -> None:
    batch = batch_of(made, ask("what is it?", tiny.picture(1)))
    labels = batch["input_ids"]
    words = labels.masked_fill(labels == made.processor.image_token_id, IGNORE)
    whole = made.model(**batch, labels=labels)
    assert torch.equal(whole.loss, made.model(**batch, labels=words).loss)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=IGNORE)[:, 1:]
    assert torch.equal(made.model(**batch, shift_labels=shifted).loss, whole.loss)


def test_resized_tables(made: Dock) -> None:
    batch, rows = batch_of(made), language_rows(made)
    before = made.model(**batch).logits
    made.model.resize_token_embeddings(rows + 24)
    assert language_rows(made) == rows + 24
    after = made.model(**batch).logits
    words = [i for i in range(rows) if i != made.processor.image_token_id]
    torch.testing.assert_close(after[..., words], before[..., words])
    assert after.shape[-1] == made.model.config.vocab_size


def test_prompt_tuning_of_peft(made: Dock) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = peft.get_peft_model(made.model, config)
    text = made.processor(text="what colour?", return_tensors="pt")
    assert tuned(**text).logits.shape[1] == text["input_ids"].shape[1] + 3


# -- calls ------------------------------------------------------------------------------------------------------------


def test_outputs_come_as_tuples_when_asked(made: Dock) -> None:
    batch = batch_of(made)
    out = made.model(**batch, return_dict=False)
    assert isinstance(out, tuple)
    assert torch.equal(out[0], made.model(**batch).logits)


@pytest.mark.parametrize("fusion", ["splice", "cross_attention"])
@pytest.mark.parametrize("where", ["within", "beyond"])
def test_embeddings_with_pictures_are_ids_with_pictures(docked: Callable[..., Dock], fusion: str, where: str) -> None:
    made = docked_with(docked, where, fusion=fusion)
    batch = batch_of(made)
    given = {**batch, "inputs_embeds": made.model.get_input_embeddings()(batch["input_ids"])}
    ids = given.pop("input_ids")
    assert torch.equal(made.model(**given).logits, made.model(**batch).logits)
    said = made.model.generate(**given, **NEW)
    assert said.tolist() == made.model.generate(**batch, **NEW)[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("fusion", ["splice", "cross_attention"])
def test_features_computed_before(docked: Callable[..., Dock], fusion: str) -> None:
    made = docked_with(docked, "beyond", fusion=fusion)
    batch = batch_of(made)
    seen: Any = made.model.get_image_features(batch["pixel_values"])
    assert issubclass(type(seen), tf.modeling_outputs.BaseModelOutputWithPooling)
    with pytest.warns(DeprecationWarning, match="pooler_output"):
        assert seen.shape == seen.pooler_output.shape  # as it was, for one version
    assert not hasattr(seen, "deepstack_features")
    given = {k: v for k, v in batch.items() if k != "pixel_values"} | {"mm_encoder_outputs": {"image": seen}}
    assert torch.equal(made.model(**given).logits, made.model(**batch).logits)
    with pytest.raises(ValueError, match="mm_encoder_outputs"):
        made.model(**batch, mm_encoder_outputs={"image": seen})
    with refused("unknown-key", "vision_feature_layer"):
        made.model.get_image_features(batch["pixel_values"], vision_feature_layer=-2)


@pytest.mark.parametrize("fusion", ["splice", "cross_attention"])
def test_assistants_and_continuing(docked: Callable[..., Dock], fusion: str) -> None:
    """Assisted by itself, by another dock, or from a cache: the same words."""
    made = docked_with(docked, "beyond", fusion=fusion)
    batch = batch_of(made, ask("what is it?", tiny.picture(1)))
    plain = made.model.generate(**batch, **NEW, return_dict_in_generate=True)
    assert made.model.generate(**batch, **NEW, assistant_model=copy.deepcopy(made.model)).tolist() == (
        plain.sequences.tolist()
    )
    more = {"attention_mask": torch.ones_like(plain.sequences), "past_key_values": plain.past_key_values}
    going_on = made.model.generate(plain.sequences, **more, **NEW)
    again = {**batch, "input_ids": plain.sequences, "attention_mask": torch.ones_like(plain.sequences)}
    assert going_on.tolist() == made.model.generate(**again, **NEW).tolist()


def test_prompts_in_chunks(made: Dock) -> None:
    batch = batch_of(made)
    whole = made.model.generate(**batch, **NEW)
    assert made.model.generate(**batch, **NEW, prefill_chunk_size=5).tolist() == whole.tolist()


def test_layers_that_see_pictures_whole_refuse_chunks(docked: Callable[..., Dock]) -> None:
    made = docked_with(docked, "beyond", fusion="cross_attention")
    with refused("wrong-shape", "prefill_chunk_size"):
        made.model.generate(**batch_of(made), **NEW, prefill_chunk_size=5)


def test_encoders_and_pickles(made: Dock) -> None:
    assert made.model.get_encoder("image") is made.model.image.encoder
    assert made.model.get_encoder() is made.model
    batch = batch_of(made)
    there = made.model(**batch).logits
    assert torch.equal(pickle.loads(pickle.dumps(made.model))(**batch).logits, there)
    assert torch.equal(copy.deepcopy(made.model)(**batch).logits, there)


@pytest.mark.parametrize("tiling", [None, {"type": "anyres", "pinpoints": [[32, 64], [64, 32]]}])
def test_engines_know_how_many_tokens_a_picture_has(docked: Callable[..., Dock], tiling: Any) -> None:
    made = docked("llama", tiling=tiling)
    sizes = [(40, 90), (90, 40), (64, 64)]
    counts = made.processor._get_num_multimodal_tokens(image_sizes=sizes)
    for (height, width), tokens, rows in zip(
        sizes, counts["num_image_tokens"], counts["num_image_patches"], strict=True
    ):
        seen = made.processor(images=[tiny.picture(0).resize((width, height))], text="<image>", return_tensors="pt")
        assert int((seen["input_ids"] == made.processor.image_token_id).sum()) == tokens
        assert len(seen["pixel_values"]) == rows


def test_attention_reaches_the_encoder(made: Dock, tmp_path: Path) -> None:
    made.model.save_pretrained(tmp_path)
    eager = OpticNerveForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
    inner: Any = eager.image.encoder.model
    assert inner.config._attn_implementation == "eager"
    eager.set_attn_implementation("sdpa")
    assert inner.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("how", ["splice", "cross_attention", "gated adapter"])
def test_layers_computed_again_see_the_same(docked: Callable[..., Dock], how: str) -> None:
    """`gradient_checkpointing_enable`, which Trainer and TRL call: the gradients are those without it."""
    made = docked_with(docked, "beyond", fusion="cross_attention" if how == "cross_attention" else "splice")
    if how == "gated adapter":
        made.model.give_lora({"rank": 4, "when": "media"})
        for name, parameter in made.model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter)
    batch = batch_of(made, ask("what is it?", tiny.picture(1)), ask("text alone"))
    if how == "cross_attention":
        for name, parameter in made.model.image.fusion.named_parameters():
            if parameter.numel() == 1 or "gate" in name:
                torch.nn.init.constant_(parameter, 0.5)
    made.model.requires_grad_(True).train()
    found = []
    for again in (False, True):
        if again:
            made.model.activation_checkpointing_enable()
        made.model.zero_grad()
        made.model(**batch, labels=batch["input_ids"]).loss.backward()
        found.append({n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None})
    plain, again_too = found
    assert plain.keys() == again_too.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again_too[name], gradient, msg=name)
