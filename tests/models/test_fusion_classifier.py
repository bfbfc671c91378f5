"""The three timings: what each depends on, what it can learn, and that it comes back as it was saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from errors import refused
from opticnerve.data.collators.classification import answer_set
from opticnerve.encoders.text import HFTextEncoder
from opticnerve.models.classifier.build import ClassifierDock, classifier
from opticnerve.models.classifier.modeling import FusionClassifier
from opticnerve.models.classifier.parts import EarlyHead, IntermediateHead, LateHead, Read, TextMemory
from opticnerve.types import Features, ask

pytestmark = pytest.mark.usefixtures("private_cache")
ANSWERS = ["no", "red", "yes"]
TIMINGS = ["early", "intermediate", "late"]
SMALL: dict[str, dict[str, Any]] = {
    "early": {"width": 16, "pixels": 8},
    "intermediate": {"width": 16, "depth": 1, "heads": 2},
    "late": {"width": 16},
}


@pytest.fixture
def made(bert_folder: str, vision_folder: Callable[..., str]) -> Callable[..., ClassifierDock]:
    def make(timing: Any, **options: Any) -> ClassifierDock:
        vision_encoder = (
            None if timing == "early" else {"type": "hf_vision", "name": vision_folder("siglip_vision_model")}
        )
        return classifier(vision_encoder, bert_folder, timing=timing, answers=ANSWERS, **{**SMALL[timing], **options})

    return make


def inputs(dock: ClassifierDock, texts: list[str], seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    side = 8 if dock.model.image is None else dock.model.image.encoder.image_size
    words = dock.processor(text=texts, return_tensors="pt")
    pixels = torch.randn(len(texts), 3, side, side)
    return {"input_ids": words["input_ids"], "attention_mask": words["attention_mask"], "pixel_values": pixels}


@pytest.mark.parametrize("timing", TIMINGS)
def test_saved_and_loaded_it_says_the_same(timing: str, made: Callable[..., ClassifierDock], tmp_path: Path) -> None:
    dock = made(timing)
    dock.model.save_pretrained(tmp_path)
    dock.processor.save_pretrained(tmp_path)
    given = inputs(dock, ["what colour is it?", "is it red?"])
    again = FusionClassifier.from_pretrained(tmp_path)
    assert torch.equal(again(**given).logits, dock.model(**given).logits)
    assert again.config.answers == type(dock.processor).from_pretrained(tmp_path).answers == ANSWERS


@pytest.mark.parametrize("timing", TIMINGS)
def test_padding_changes_nothing(timing: str, made: Callable[..., ClassifierDock]) -> None:
    dock = made(timing)
    long, short = "what colour is the big circle on the left?", "red?"
    both = inputs(dock, [short, long])
    alone = {**inputs(dock, [short]), "pixel_values": both["pixel_values"][:1]}
    torch.testing.assert_close(dock.model(**both).logits[:1], dock.model(**alone).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("timing", TIMINGS)
def test_questions_that_are_remembered_say_the_same(timing: str, made: Callable[..., ClassifierDock]) -> None:
    dock = made(timing)
    given = inputs(dock, ["is it red?", "what is it?", "is it red?"])
    for parameter in dock.model.text.parameters():
        parameter.requires_grad_(True)
    live = dock.model(**given).logits
    for parameter in dock.model.text.parameters():
        parameter.requires_grad_(False)
    first, again = dock.model(**given).logits, dock.model(**given).logits
    assert torch.equal(first, again)
    torch.testing.assert_close(first, live, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        state = {n: t + 0.1 for n, t in dock.model.state_dict().items()}
    dock.model.load_state_dict(state)
    fresh = made(timing)
    fresh.model.load_state_dict(state)
    assert torch.equal(dock.model(**given).logits, fresh.model(**given).logits), "it answered from old weights"


def test_the_company_a_text_was_read_in_leaves_no_trace(made: Callable[..., ClassifierDock]) -> None:
    """A run that was stopped reads texts anew, beside others than before; so does one that is looked at in between."""
    dock = made("intermediate")
    texts = [" ".join(["is it red?", "blue", "or what?"][i % 3] for i in range(n)) for n in range(1, 25)]
    whole = inputs(dock, texts)
    memories = [TextMemory(dock.model.text.encoder) for _ in range(2)]
    dock.model.text.requires_grad_(False)
    for row in range(0, 24, 5):
        part = inputs(dock, texts[row : row + 5][::-1])
        memories[0].read(part["input_ids"], part["attention_mask"])
    one, other = (m.read(whole["input_ids"], whole["attention_mask"]) for m in memories)
    assert torch.equal(one.states.tokens_BND, other.states.tokens_BND)
    assert torch.equal(one.vector_BD, other.vector_BD)


def test_nothing_is_remembered_while_dropout_is_at_work(made: Callable[..., ClassifierDock]) -> None:
    dock = made("late", combine="text", dropout=0.0)
    given = inputs(dock, ["what is it?"])
    for parameter in dock.model.text.parameters():
        parameter.requires_grad_(False)
    calm = dock.model(**given).logits
    dock.model.train()
    assert not torch.equal(dock.model(**given).logits, dock.model(**given).logits)
    assert torch.equal(dock.model.eval()(**given).logits, calm)


def test_what_is_remembered_follows_weights_and_precision(made: Callable[..., ClassifierDock]) -> None:
    dock, fresh = made("late", combine="text"), made("late", combine="text")
    given = inputs(dock, ["what is it?"])
    before = dock.model(**given).logits
    for model in (dock.model, fresh.model):
        with torch.no_grad():
            model.text.encoder.model.embeddings.word_embeddings.weight.mul_(3)
    after = dock.model(**given).logits
    assert not torch.allclose(after, before)
    assert torch.equal(after, fresh.model(**given).logits)
    dock.model.to(torch.bfloat16)
    made_anew = FusionClassifier.from_parts(
        dock.model.image.encoder, dock.model.text.encoder, timing="late", answers=ANSWERS, combine="text", width=16
    ).to(torch.bfloat16)
    made_anew.load_state_dict(dock.model.state_dict())
    assert torch.equal(dock.model(**given).logits, made_anew(**given).logits)


def test_training_goes_on_from_what_was_remembered_without_gradients(made: Callable[..., ClassifierDock]) -> None:
    dock = made("intermediate")
    given = inputs(dock, ["is it red?"])
    for parameter in dock.model.text.parameters():
        parameter.requires_grad_(False)
    with torch.inference_mode():
        dock.model(**given)
    dock.model(**given, labels=torch.tensor([1])).loss.backward()
    assert dock.model.classifier.read[1].weight.grad.any()


def test_memory_is_bounded(made: Callable[..., ClassifierDock], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opticnerve.models.classifier.parts.MOST", 2)
    dock = made("late")
    for word in ("red", "blue", "green", "dog"):
        with torch.no_grad():
            dock.model(**inputs(dock, [f"is it {word}?"]))
    assert len(dock.model._memory._known) == 2


@pytest.mark.parametrize("timing", ["intermediate", "late"])
@pytest.mark.parametrize("family", ["clip_text_model", "siglip_text_model", "llama"])
def test_any_text_encoder_reads(family: str, timing: Any, made: Callable[..., ClassifierDock]) -> None:
    own: dict[str, Any] = {
        "clip_text_model": {"eos_token_id": 49, "bos_token_id": 48, "pad_token_id": 0},
        "siglip_text_model": {"projection_size": 24, "max_position_embeddings": 8},
        "llama": {"eos_token_id": 49, "bos_token_id": 48, "pad_token_id": 0},
    }[family]
    shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    torch.manual_seed(0)
    reader = HFTextEncoder(architecture={"model_type": family, **shape, "num_attention_heads": 2, **own})
    vision_encoder = made("late").model.image.encoder
    model = FusionClassifier.from_parts(vision_encoder, reader, timing=timing, answers=ANSWERS, **SMALL[timing])
    ids = torch.tensor([[48, 5, 6, 49, 0, 0], [48, 5, 6, 7, 8, 49]])
    given = {"attention_mask": (ids != 0).long(), "pixel_values": torch.randn(2, 3, 32, 32)}
    end = 6 if family == "siglip_text_model" else 4  # SigLIP pools the last place and is always padded to it
    mask_1L, pixels = given["attention_mask"][:1, :end], given["pixel_values"][:1]
    alone = model(ids[:1, :end], attention_mask=mask_1L, pixel_values=pixels).logits
    logits = model(ids, **given).logits
    assert logits.shape == (2, 3)
    torch.testing.assert_close(logits[:1], alone, rtol=1e-4, atol=1e-5)


def test_late_branches_see_or_read_and_never_both(made: Callable[..., ClassifierDock]) -> None:
    dock = made("late")
    a, b = inputs(dock, ["is it red?", "what is it?"]), inputs(dock, ["how many?", "is it blue?"], seed=1)
    for alone, own, other in (("image", "pixel_values", "input_ids"), ("text", "input_ids", "pixel_values")):
        dock.model.combine = alone
        mine = dock.model(**a).logits
        keys = ("input_ids", "attention_mask") if other == "input_ids" else (other,)
        assert torch.equal(dock.model(**{**a, **{k: b[k] for k in keys}}).logits, mine)
        keys = ("input_ids", "attention_mask") if own == "input_ids" else (own,)
        assert not torch.equal(dock.model(**{**a, **{k: b[k] for k in keys}}).logits, mine)


@pytest.mark.parametrize("timing", ["early", "intermediate"])
def test_fused_ones_depend_on_both(timing: str, made: Callable[..., ClassifierDock]) -> None:
    dock = made(timing)
    a, b = inputs(dock, ["is it red?"]), inputs(dock, ["how many?"], seed=1)
    mine = dock.model(**a).logits
    assert not torch.allclose(dock.model(**{**a, "pixel_values": b["pixel_values"]}).logits, mine)
    assert not torch.allclose(dock.model(**{**b, "pixel_values": a["pixel_values"]}).logits, mine)


def test_places_count_for_intermediate_fusion(made: Callable[..., ClassifierDock]) -> None:
    dock = made("intermediate")
    given = inputs(dock, ["where is it?"])
    seen = dock.model.image.encode(given.pop("pixel_values"))
    turned = Features(seen.tokens_BND.flip(1), seen.mask_BN)
    assert not torch.allclose(
        dock.model(**given, image_features=seen).logits, dock.model(**given, image_features=turned).logits
    )


def exclusive_or(head: Any, see: Callable[[torch.Tensor], Any], *, steps: int) -> float:
    """Train a head on answers that are the exclusive or of a bit in the picture and one in the text."""
    torch.manual_seed(0)
    eye_64, read_64 = torch.randint(0, 2, (64,)), torch.randint(0, 2, (64,))
    targets_64 = eye_64 ^ read_64
    codes = torch.randn(2, 6)
    text = Features(codes[read_64][:, None].repeat(1, 3, 1), torch.ones(64, 3, dtype=torch.bool))
    read = Read(text, codes[read_64])
    optimizer = torch.optim.AdamW(head.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        head(see(eye_64), read).loss(targets_64).backward()
        optimizer.step()
    head.eval()
    return float((head(see(eye_64), read).logits_BA.argmax(1) == targets_64).float().mean())


def test_what_needs_both_is_learned_by_fusing_before_the_decision_and_never_after() -> None:
    codes = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))

    def tokens(bits: torch.Tensor) -> Features:
        return Features(codes[bits][:, None].repeat(1, 4, 1), torch.ones(len(bits), 4, dtype=torch.bool))

    def pixels(bits: torch.Tensor) -> torch.Tensor:
        return (bits[:, None, None, None] * 2.0 - 1).expand(-1, 3, 4, 4)

    torch.manual_seed(0)
    intermediate = IntermediateHead(5, 4, 6, 2, width=16, heads=2, depth=1, dropout=0.0)
    assert exclusive_or(intermediate, tokens, steps=150) == 1.0
    assert exclusive_or(EarlyHead(6, 2, pixels=4, width=32, dropout=0.0), pixels, steps=150) == 1.0
    for rule in ("mean", "vote", "product", "learned"):
        late = LateHead(5, 6, 2, combine=rule, width=16, dropout=0.0)
        assert exclusive_or(late, tokens, steps=150) < 0.8, "two blind predictors cannot know an exclusive or"


def test_one_combination_after_another(made: Callable[..., ClassifierDock], tmp_path: Path) -> None:
    dock = made("late")
    given = inputs(dock, ["is it red?", "what is it?"])
    dock.model.combine = "product"
    logits = dock.model(**given).logits
    dock.model.save_pretrained(tmp_path)
    again = FusionClassifier.from_pretrained(tmp_path)
    assert again.combine == "product"
    assert torch.equal(again(**given).logits, logits)
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(2))
    with refused("conflict", "combine", "'sum'", "late"):
        dock.model.combine = "sum"
    with refused("conflict", "combine", "'mean'", "intermediate"):
        made("intermediate").model.combine = "mean"


def test_bad_input(made: Callable[..., ClassifierDock], bert_folder: str) -> None:
    early, late = made("early"), made("late")
    given = inputs(late, ["is it red?"])
    with pytest.raises(ValueError, match="exactly one of pixel_values and image_features"):
        late.model(given["input_ids"])
    with pytest.raises(ValueError, match="1 pictures for 2 questions"):
        late.model(given["input_ids"].repeat(2, 1), pixel_values=given["pixel_values"])
    with refused("wrong-shape", "3 × 8 × 8", "(3, 9, 9)"):
        early.model(given["input_ids"], pixel_values=torch.zeros(1, 3, 9, 9))
    with pytest.raises(ValueError, match="early fusion reads pixels, not features"):
        early.model(given["input_ids"], image_features=late.model.image.encode(given["pixel_values"]))
    for answers, refusal in (
        ([], ("empty",)),
        (["yes"], ("empty", "'yes'")),
        (["a", "a"], ("conflict", "'a'")),
        (["yes", "no", "Yes "], ("conflict", "'yes', 'Yes '")),
        (["yes", " "], ("empty", "2 of 2")),
    ):
        with refused(*refusal):
            classifier(None, bert_folder, timing="early", answers=answers)
    with refused("conflict", "late", "image encoder"):
        classifier(None, bert_folder, timing="late", answers=ANSWERS)
    with refused("unknown-key", "early", "'hights'"):
        classifier(None, bert_folder, timing="early", answers=ANSWERS, hights=3)
    for options, refusal in (
        ({"pixels": 0}, ("out-of-range", "pixels", 1, 0)),
        ({"depth": 1.5}, ("out-of-range", "depth", 1, 1.5)),
        ({"combine": "vote"}, ("conflict", "combine", "'vote'")),
    ):
        with refused(*refusal):
            classifier(None, bert_folder, timing="early", answers=ANSWERS, **options)
    with refused("wrong-shape", 10, 4):
        made("intermediate", width=10, heads=4)
    with refused("unknown-name", "'connector'", "image.encoder"):
        late.model.part_parameters("connector")


def test_the_closed_set_of_data() -> None:
    questions = [ask("q", answer=a) for a in ("Yes", "no ", "yes", "red")]
    assert answer_set(questions) == ANSWERS
    with refused("empty", "'yes'"):
        answer_set(questions[:1])
    with refused("empty", "no answers"):
        answer_set([])
    with refused("too-large", 3, 2):
        answer_set(questions, most=2)
