"""Gated cross-attention: transformers' Idefics layer, the bare language model at first, and each text its own picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf

import tiny
from errors import refused
from opticnerve.data.collators.next_token import Collator
from opticnerve.data.encode.packing import pack
from opticnerve.data.encode.tokenize import encode
from opticnerve.fusion.gated_cross_attention import GatedCrossAttention, GatedCrossAttentionLayer
from opticnerve.inference.generate import Answerer
from opticnerve.models.vlm.build import Dock
from opticnerve.objectives.next_token import NextToken
from opticnerve.types import Conversation, ImagePart, Message, TextPart, ask

pytestmark = pytest.mark.usefixtures("private_cache")
P = [tiny.picture(i) for i in range(6)]
FUSION = {"type": "cross_attention", "every": 1, "heads": 4}


def open_gates(model: Any) -> None:
    """As after training: gates away from zero, so that pictures matter."""
    torch.manual_seed(7)
    with torch.no_grad():
        for layer in model.image.fusion.layers:
            layer.alpha_cross_attn.fill_(0.9)
            layer.alpha_dense.fill_(0.7)
            for parameter in layer.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(6)


@pytest.fixture
def flamingo(docked: Callable[..., Dock]) -> Dock:
    return docked("llama", fusion=FUSION)


@pytest.fixture
def opened(flamingo: Dock) -> Dock:
    open_gates(flamingo.model)
    return flamingo


def inputs(dock: Dock, *conversations: Any) -> Any:
    return Answerer(dock.model, dock.processor).inputs(conversations)


@torch.no_grad()
def last(dock: Dock, conversation: Any) -> torch.Tensor:
    return dock.model(**inputs(dock, conversation)).logits[0, -1]


def turns(*parts: Any) -> Conversation:
    return Conversation(
        (Message("user", tuple(ImagePart(p) if not isinstance(p, str) else TextPart(p) for p in parts)),)
    )


class TestIdeficsLayer:
    """Same weights, same numbers as `IdeficsGatedCrossAttentionLayer`."""

    @pytest.mark.parametrize("gate", ["scalar", "vector"])
    def test_parity(self, gate: str) -> None:
        from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

        config = tf.IdeficsConfig(  # type: ignore[call-arg]
            hidden_size=32, intermediate_size=64, num_attention_heads=4, alpha_type={"scalar": "float"}.get(gate, gate),
            alpha_initializer="ones", vision_config={"embed_dim": 32}, dropout=0.0, attn_implementation="eager",
        )  # fmt: skip
        torch.manual_seed(0)
        theirs = IdeficsGatedCrossAttentionLayer(config, layer_idx=0).eval()
        ours = GatedCrossAttentionLayer(size=32, heads=4, inner=64, activation="silu", gate=gate)
        state = {k: v for k, v in theirs.state_dict().items() if "rotary" not in k}
        ours.load_state_dict(state)
        hidden, media = torch.randn(2, 5, 32), torch.randn(2, 6, 32)
        allowed = torch.rand(2, 5, 6) < 0.5
        sees = torch.tensor([[True] * 5, [False, False, True, True, True]])
        allowed[:, :, 0] |= True
        mask = torch.zeros(2, 1, 5, 6).masked_fill(~(allowed & sees[:, :, None])[:, None], torch.finfo().min)
        with torch.no_grad():
            wanted = theirs(
                hidden, image_hidden_states=media, image_attention_mask=mask, cross_attention_gate=sees.float()
            )
            found = ours(hidden, ours.cross_attn.keys_values(media), allowed & sees[:, :, None], sees)
        assert float((wanted - found).abs().max()) <= 1e-5
        assert float((wanted - hidden).abs().max()) > 0.1


class TestFreshDock:
    def test_bit_identical_to_the_bare_language_model(self, flamingo: Dock) -> None:
        batch = inputs(flamingo, ask("what?", P[0]), ask("and text alone"))
        prompt = flamingo.model.read(batch["input_ids"], pixel_values=batch["pixel_values"])
        with torch.no_grad():
            ours = flamingo.model(**batch).logits
            bare = flamingo.model.language_model(
                inputs_embeds=prompt.embeds_BLD, attention_mask=batch["attention_mask"]
            ).logits
        assert torch.equal(*tiny.words_of(ours, bare))

    def test_one_placeholder_a_picture(self, flamingo: Dock) -> None:
        batch = inputs(flamingo, ask("compare", P[0], P[1]))
        assert int((batch["input_ids"] == flamingo.processor.image_token_id).sum()) == 2
        assert flamingo.processor.num_image_tokens == 1
        assert flamingo.model.image.num_tokens == 16

    def test_the_marker_starts_as_the_mean_word(self, flamingo: Dock) -> None:
        words = flamingo.model.get_input_embeddings().weight.mean(0)
        torch.testing.assert_close(flamingo.model.image.fusion.marker, words)


class TestWhoSeesWhat:
    def test_the_picture_matters(self, opened: Dock) -> None:
        assert not torch.equal(last(opened, ask("what?", P[0])), last(opened, ask("what?", P[1])))

    def test_text_alone_meets_the_bare_model_for_good(self, opened: Dock) -> None:
        alone = inputs(opened, ask("text alone"))
        bare = opened.model.language_model(**alone).logits
        assert torch.equal(*tiny.words_of(opened.model(**alone).logits, bare))
        beside = inputs(opened, ask("text alone"), ask("text alone", P[0]))
        row = opened.model(**beside).logits[0][-alone["input_ids"].shape[1] :]
        torch.testing.assert_close(*tiny.words_of(row, bare[0]), rtol=1e-4, atol=1e-5)

    def test_the_latest_picture_before_it(self, opened: Dock) -> None:
        """Of two pictures a word sees the second; words between them see the first."""
        both = inputs(opened, turns(P[0], "one two", P[1], "three"))
        swapped = inputs(opened, turns(P[2], "one two", P[1], "three"))
        place = int((both["input_ids"][0] == opened.processor.image_token_id).nonzero()[1])
        model = opened.model
        with torch.no_grad():
            deep = model.image.fusion
            seen = [
                deep.see(b["input_ids"] == opened.processor.image_token_id, model.image(b["pixel_values"]))
                for b in (both, swapped)
            ]
            assert seen[0].latest_BL[0, place - 1] == 0
            assert seen[0].latest_BL[0, place] == 1
            assert (seen[0].latest_BL[0, :1] == -1).all()
            a, b = (model(**x).logits[0] for x in (both, swapped))
        assert not torch.equal(a[place - 1], b[place - 1])

    def test_changing_an_unseen_picture_changes_nothing_in_one_layer(self, docked: Callable[..., Dock]) -> None:
        """With a single cross-attention layer before the first, later text cannot know of the earlier picture but
        through words between."""
        dock = docked("llama", fusion={"type": "cross_attention", "every": 2, "heads": 4})
        open_gates(dock.model)
        first, other = (last(dock, turns(p, P[1], "three")) for p in (P[0], P[2]))
        place = inputs(dock, turns(P[0], P[1], "three"))["input_ids"][0]
        assert int((place == dock.processor.image_token_id).sum()) == 2
        # The first marker itself looks at its picture: the change is small, and comes through it alone.
        assert float((first - other).abs().max()) < float((first - last(dock, turns(P[0], P[2], "three"))).abs().max())

    def test_batch_is_single(self, opened: Dock) -> None:
        asked = [ask("q", P[0]), ask("a longer one?", P[1], P[2]), ask("text alone")]
        batch = inputs(opened, *asked)
        with torch.no_grad():
            together = opened.model(**batch).logits[:, -1]
        for row, conversation in zip(together, asked, strict=True):
            torch.testing.assert_close(row, last(opened, conversation), rtol=1e-4, atol=1e-4)


class TestGeneration:
    def test_cached_equals_uncached(self, opened: Dock) -> None:
        batch = inputs(opened, ask("what is this?", P[0]), ask("compare them", P[1], P[2]), ask("text alone"))
        how = {"max_new_tokens": 8, "do_sample": False}
        cached = opened.model.generate(**batch, **how)
        ids, n = batch["input_ids"], batch["input_ids"].shape[1]
        mask = batch["attention_mask"]
        for _ in range(8):
            with torch.no_grad():
                logits = opened.model(
                    input_ids=ids, attention_mask=mask, pixel_values=batch["pixel_values"],
                    position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                ).logits  # fmt: skip
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        assert cached[:, n:].tolist() == ids[:, n:].tolist()

    def test_the_picture_is_projected_once(self, opened: Dock, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []
        attention = opened.model.image.fusion.layers[0].cross_attn
        whole = attention.keys_values
        monkeypatch.setattr(attention, "keys_values", lambda x: calls.append(1) or whole(x))
        opened.model.generate(**inputs(opened, ask("what?", P[0])), max_new_tokens=6, do_sample=False)
        assert len(calls) == 1

    def test_beams(self, opened: Dock) -> None:
        batch = inputs(opened, ask("one and two", P[0], P[1]), ask("text alone"))
        out = opened.model.generate(**batch, max_new_tokens=5, num_beams=3, do_sample=False)
        single = [
            opened.model.generate(**inputs(opened, c), max_new_tokens=5, num_beams=3, do_sample=False)[0, -5:].tolist()
            for c in (ask("one and two", P[0], P[1]), ask("text alone"))
        ]
        assert out[:, -5:].tolist() == single


def loss_of(dock: Dock, rows: list[Any]) -> tuple[float, dict[str, torch.Tensor]]:
    dock.model.zero_grad()
    total, count = 0.0, 0
    for groups in rows:
        row = pack([[encode(c, dock.processor) for c in group] for group in groups])
        loss, n = NextToken(dock.model)(Collator(dock.processor)([row]))
        loss.backward()
        total, count = total + float(loss.detach()), count + int(n)
    found = {n: p.grad.clone() for n, p in dock.model.named_parameters() if p.grad is not None}
    return total / count, found


class TestTraining:
    SAMPLES = (
        ask("is it red?", P[0], answer="yes"),
        ask("no picture here", answer="a word"),
        ask("and this one?", P[1], answer="three foxes"),
        ask("compare", P[2], P[3], answer="no"),
    )

    def test_shared_prefix(self, opened: Dock) -> None:
        questions = [ask("is it red?", P[0], answer="yes"), ask("what is it?", P[0], answer="a dog")]
        separate, one_by_one = loss_of(opened, [[[q]] for q in questions])
        shared, together = loss_of(opened, [[questions]])
        assert shared == pytest.approx(separate, rel=1e-5)
        for name, gradient in one_by_one.items():
            torch.testing.assert_close(together[name], gradient, rtol=1e-3, atol=2e-5, msg=name)

    def test_gradient_checkpointing_gives_the_same_gradients(self, opened: Dock) -> None:
        from opticnerve.train.setup import checkpoint_layers

        plain = loss_of(opened, [[[c]] for c in self.SAMPLES])
        checkpoint_layers(opened.model)
        again = loss_of(opened, [[[c]] for c in self.SAMPLES])
        assert again[0] == pytest.approx(plain[0], rel=1e-6)
        assert again[1].keys() == plain[1].keys()
        for name, gradient in plain[1].items():
            torch.testing.assert_close(again[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)

    def test_gradients_reach_connector_gates_and_marker(self, opened: Dock) -> None:
        _, found = loss_of(opened, [[[self.SAMPLES[0]]]])
        for name, parameter in opened.model.image.named_parameters(prefix="image"):
            if "encoder" not in name:
                assert name in found, name
                assert bool((found[name] != 0).any()), name
            assert parameter.requires_grad


def test_every_language_family_takes_it(docked: Callable[..., Dock]) -> None:
    for family in tiny.FAMILIES:
        dock = docked(family, fusion={"type": "cross_attention", "every": 2, "heads": 4})
        batch = inputs(dock, ask("what?", P[0]))
        prompt = dock.model.read(batch["input_ids"], pixel_values=batch["pixel_values"])
        with torch.no_grad():
            fresh = dock.model(**batch).logits
            bare = dock.model.language_model(
                inputs_embeds=prompt.embeds_BLD, attention_mask=batch["attention_mask"]
            ).logits
            assert torch.equal(*tiny.words_of(fresh, bare)), family
            open_gates(dock.model)
            assert not torch.equal(*tiny.words_of(dock.model(**batch).logits, bare)), family


def test_refusals() -> None:
    with refused("wrong-shape", "heads", 5, 32):
        GatedCrossAttention(language_size=32, language_layers=2, heads=5)
    with refused("out-of-range", "every", 1, 0):
        GatedCrossAttention(language_size=32, language_layers=2, every=0)
    with refused("unknown-name", "'scalar'", "'vector'", "'tensor'"):
        GatedCrossAttention(language_size=32, language_layers=2, gate="tensor")


def test_wrong_number_of_pictures(flamingo: Dock) -> None:
    batch = inputs(flamingo, ask("one", P[0]))
    with pytest.raises(ValueError, match="1 placeholders in the text, but 2 pictures"):
        flamingo.model(**{**batch, "pixel_values": batch["pixel_values"].repeat(2, 1, 1, 1)})
