"""The docked model by transformers' conventions: generation, batching, errors. Parity with LLaVA stands beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tiny
from errors import refused
from opticnerve.inference.generate import Answerer
from opticnerve.language.load import load_language
from opticnerve.models import OpticNerveConfig, OpticNerveForConditionalGeneration
from opticnerve.models.vlm.build import Dock, dock
from opticnerve.types import ask

pytestmark = pytest.mark.usefixtures("private_cache")
P = [tiny.picture(i) for i in range(4)]


def louder(made: Dock) -> Dock:
    """A connector whose output weighs as much as words do, so that pictures change answers."""
    with torch.no_grad():
        for parameter in made.model.image.connector.parameters():
            parameter.mul_(5)
    return made


def inputs(made: Dock, *asked: Any) -> Any:
    return Answerer(made.model, made.processor).inputs(list(asked))


@pytest.fixture(scope="module")
def llama(language_folder: Callable[..., str], vision_folder: Callable[..., str], private_cache: Any) -> Dock:
    return louder(dock(vision_folder(), "mlp", language_folder("llama")))


@pytest.mark.parametrize("family", tiny.FAMILIES)
class TestEveryFamily:
    def test_text_alone_is_the_bare_language_model_bit_for_bit(
        self, docked: Callable[..., Dock], language_folder: Callable[..., str], family: str
    ) -> None:
        made, bare = docked(family), load_language(language_folder(family)).model.eval()
        batch = made.processor(text=["what colour?", "a longer question, is it?"], return_tensors="pt")
        assert torch.equal(*tiny.words_of(made.model(**batch).logits, bare(**batch).logits))
        new = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(made.model.generate(**batch, **new), bare.generate(**batch, **new))

    def test_cache_makes_no_difference(self, docked: Callable[..., Dock], family: str) -> None:
        made = louder(docked(family))
        batch = inputs(made, ask("q", P[0]), ask("and a longer one", P[1], P[2]), ask("text alone"))
        answers = [made.model.generate(**batch, max_new_tokens=8, do_sample=False, use_cache=c) for c in (True, False)]
        assert torch.equal(*answers)
        assert answers[0].shape[1] > batch["input_ids"].shape[1]

    def test_a_batch_answers_like_each_alone(self, docked: Callable[..., Dock], family: str) -> None:
        """Several pictures, one, none, padded on the left: the same logits and the same greedy words."""
        made = louder(docked(family))
        asked = [ask("compare them please, will you", P[0], P[1]), ask("q", P[2]), ask("text alone")]
        batch = inputs(made, *asked)
        assert (batch["attention_mask"][:, 0] == 0).any()
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        logits = made.model(**batch, position_ids=positions).logits
        together = made.model.generate(**batch, max_new_tokens=8, do_sample=False)
        for i, one in enumerate(asked):
            alone = inputs(made, one)
            torch.testing.assert_close(logits[i, -1], made.model(**alone).logits[0, -1], rtol=1e-4, atol=2e-5)
            words = made.model.generate(**alone, max_new_tokens=8, do_sample=False)
            assert (
                words[0, alone["input_ids"].shape[1] :].tolist() == together[i, batch["input_ids"].shape[1] :].tolist()
            )

    def test_the_picture_matters(self, docked: Callable[..., Dock], family: str) -> None:
        made = louder(docked(family))
        one, other = (made.model(**inputs(made, ask("q", p))).logits[0, -1] for p in P[:2])
        assert not torch.allclose(one, other, atol=1e-3)


def test_pictures_go_to_their_own_places(llama: Dock) -> None:
    """Swapping two pictures within a prompt, or between prompts, is seen."""
    there = llama.model(**inputs(llama, ask("q", P[0], P[1]), ask("q", P[2]))).logits
    swapped = llama.model(**inputs(llama, ask("q", P[1], P[0]), ask("q", P[2]))).logits
    crossed = llama.model(**inputs(llama, ask("q", P[0], P[2]), ask("q", P[1]))).logits
    assert not torch.allclose(there[0, -1], swapped[0, -1], atol=1e-3)
    torch.testing.assert_close(there[1], swapped[1])
    assert not torch.allclose(there[1, -1], crossed[1, -1], atol=1e-3)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams_look_at_their_own_pictures(llama: Dock, how: dict[str, int]) -> None:
    """As the language model's own beams over embeddings that hold the pictures already."""
    batch = inputs(llama, ask("one and two", P[0], P[1]), ask("q", P[2]), ask("text alone"))
    options = {"max_new_tokens": 6, "do_sample": False, **how}
    ours = llama.model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    embeds = llama.model.read(batch["input_ids"], pixel_values=batch["pixel_values"]).embeds_BLD
    theirs = llama.model.language_model.generate(
        inputs_embeds=embeds, attention_mask=batch["attention_mask"], pad_token_id=0, **options
    )
    assert len(ours) == 3 * how.get("num_return_sequences", 1)
    assert ours.tolist() == theirs.tolist()


def test_several_samples_of_several_pictures(llama: Dock) -> None:
    batch = inputs(llama, ask("one and two", P[0], P[1]), ask("q", P[2]))
    torch.manual_seed(0)
    out = llama.model.generate(**batch, max_new_tokens=4, do_sample=True, num_return_sequences=3)
    assert len(out) == 6


class TestMismatch:
    def test_too_few_features(self, llama: Dock) -> None:
        batch = inputs(llama, ask("q", P[0], P[1]))
        with pytest.raises(ValueError, match=r"32 image placeholders .* 16 visual tokens"):
            llama.model(**{**batch, "pixel_values": batch["pixel_values"][:1]})

    def test_too_many_features(self, llama: Dock) -> None:
        batch = inputs(llama, ask("q", P[0]))
        with pytest.raises(ValueError, match=r"16 image placeholders .* 48 visual tokens"):
            llama.model(**{**batch, "pixel_values": batch["pixel_values"].repeat(3, 1, 1, 1)})

    def test_no_pictures_at_all(self, llama: Dock) -> None:
        batch = inputs(llama, ask("q", P[0]))
        with pytest.raises(ValueError, match="16 image placeholders in the text, but 0 visual tokens"):
            llama.model(input_ids=batch["input_ids"])

    def test_pictures_without_placeholders(self, llama: Dock) -> None:
        batch = inputs(llama, ask("q", P[0]))
        with pytest.raises(ValueError, match=r"0 image placeholders .* 16 visual tokens"):
            llama.model(input_ids=torch.ones(1, 4, dtype=torch.long), pixel_values=batch["pixel_values"])

    def test_both_ids_and_embeddings(self, llama: Dock) -> None:
        with pytest.raises(ValueError, match="exactly one"):
            llama.model(input_ids=torch.ones(1, 2, dtype=torch.long), inputs_embeds=torch.ones(1, 2, 32))


def test_cached_features_equal_the_live_encoder(llama: Dock) -> None:
    batch = inputs(llama, ask("q", P[0], P[1]))
    pixels = batch.pop("pixel_values")
    cached = llama.model(**batch, image_features=llama.model.image.encode(pixels)).logits
    assert torch.equal(cached, llama.model(**batch, pixel_values=pixels).logits)


def test_labels_give_a_loss_and_connector_gradients(llama: Dock) -> None:
    batch = inputs(llama, ask("q", P[0]))
    llama.model(**batch, labels=batch["input_ids"].clone().fill_(5)).loss.backward()
    assert all(p.grad is not None for p in llama.model.image.connector.parameters())
    llama.model.zero_grad()


def test_neighbours_that_do_not_fit_are_refused_when_built(llama: Dock) -> None:
    from opticnerve.connectors.mlp import LinearConnector
    from opticnerve.models.vlm.tower import Tower

    tower = llama.model.image
    with refused("wrong-shape", 16, 24, 9, 7):
        Tower(tower.encoder, LinearConnector(in_size=7, out_size=32, in_tokens=9), tower.fusion)


def test_a_dotted_path_needs_trust(llama: Dock) -> None:
    config = OpticNerveConfig.from_dict(llama.model.config.to_dict())
    config.towers["image"]["connector"]["type"] = "opticnerve.connectors.mlp:MLPConnector"
    with refused("remote-code", "trust_remote_code"):
        OpticNerveForConditionalGeneration(config)
    trusted = OpticNerveForConditionalGeneration(config, trust_remote_code=True)
    assert type(trusted.image.connector).__name__ == "MLPConnector"


def test_wrong_options_list_the_right_ones(docked: Callable[..., Dock]) -> None:
    with refused("unknown-key", "'mlp'", "depht", "depth"):
        docked(connector={"type": "mlp", "depht": 3})


def test_the_same_seed_draws_the_same_connector(docked: Callable[..., Dock]) -> None:
    one, same, other = (docked(seed=s).model.image.connector.state_dict() for s in (0, 0, 1))
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)


def test_docking_keeps_every_weight(
    docked: Callable[..., Dock], language_folder: Callable[..., str], vision_folder: Callable[..., str]
) -> None:
    from opticnerve.encoders.hf_vision import HFVisionEncoder

    made = docked("gpt2")
    bare = load_language(language_folder("gpt2")).model.state_dict()
    vision_encoder = HFVisionEncoder.from_pretrained(vision_folder()).state_dict()
    assert all(torch.equal(t, bare[n]) for n, t in made.model.language_model.state_dict().items())
    assert all(torch.equal(t, vision_encoder[n]) for n, t in made.model.image.encoder.state_dict().items())
