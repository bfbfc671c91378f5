"""The Q-Former against transformers' BLIP-2 and InstructBLIP: the same weights, the same soft tokens and scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from transformers.models.bert.modeling_bert import BertModel
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

from opticnerve.connectors.qformer import QFormerConnector
from opticnerve.objectives.qformer_pretraining import QFormerPretraining, similarity
from opticnerve.types import Features

QUERIES, VOCABULARY = 5, 41
SIZES = {
    "num_queries": QUERIES, "hidden_size": 32, "depth": 4, "heads": 4, "intermediate_size": 48,
    "cross_attention_frequency": 2, "calibrate": False,
}  # fmt: skip
CLOSE = {"rtol": 0.0, "atol": 1e-5}


def shaken(model: Any) -> Any:
    """Every weight moved, norms and query tokens included, so that none can be left out unseen."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


def parts(qformer: str, **extra: Any) -> dict[str, Any]:
    """Sub-configurations of a small BLIP-2 (2 × 2 patches and a class token) in whichever of its forms."""
    text = "use_qformer_text_input" in extra
    return {
        "vision_config": {
            "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3,
            "image_size": 16, "patch_size": 8,
        },
        "qformer_config": {
            "model_type": qformer, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
            "intermediate_size": 48, "vocab_size": VOCABULARY, "max_position_embeddings": 20,
            "cross_attention_frequency": 2, "encoder_hidden_size": 24, **(extra if text else {}),
        },
        "text_config": {
            "model_type": "opt", "vocab_size": 60, "hidden_size": 28, "ffn_dim": 40, "num_hidden_layers": 1,
            "num_attention_heads": 2, "word_embed_proj_dim": 28, "max_position_embeddings": 64,
        },
        "num_query_tokens": QUERIES,
    }  # fmt: skip


def pixels(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def token_logits() -> tuple[Tensor, Tensor]:
    """Token ids and their mask, padded on the right."""
    ids = torch.randint(1, VOCABULARY - 1, (3, 7), generator=torch.Generator().manual_seed(4))
    mask = torch.arange(7)[None] < torch.tensor([[7], [4], [2]])
    return ids * mask, mask


def seen_by(theirs: Any) -> Features:
    tokens = theirs.vision_model(pixels()).last_hidden_state
    return Features(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool))


def connector(**options: Any) -> QFormerConnector:
    return QFormerConnector(in_size=24, out_size=28, in_tokens=5, **SIZES, **options).eval()


def fill(ours: QFormerConnector, theirs: Any) -> None:
    with torch.no_grad():
        ours.query_tokens.copy_(theirs.query_tokens)
    if hasattr(theirs, "language_projection"):
        ours.language_projection.load_state_dict(theirs.language_projection.state_dict())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_blip2(attention: str) -> None:
    config = tf.Blip2Config(**parts("blip_2_qformer"))
    theirs = shaken(tf.Blip2ForConditionalGeneration(config))
    ours = connector()
    fill(ours, theirs)
    ours.qformer.load_state_dict(theirs.qformer.state_dict())
    ours.qformer.set_attn_implementation(attention)
    soft = theirs.get_image_features(pixels()).pooler_output
    torch.testing.assert_close(ours(seen_by(theirs)).tokens_BND, soft, **CLOSE)


@torch.no_grad()
def test_padding_among_the_pictures_tokens() -> None:
    ours = connector()
    shaken(ours)
    theirs = Blip2QFormerModel(ours.qformer.config).eval()
    theirs.load_state_dict(ours.qformer.state_dict())
    tokens = torch.randn(3, 5, 24)
    mask = torch.arange(5)[None] < torch.tensor([[5], [3], [1]])
    states = theirs(
        query_embeds=ours.query_tokens.expand(3, -1, -1), encoder_hidden_states=tokens, encoder_attention_mask=mask
    ).last_hidden_state
    torch.testing.assert_close(ours.attend(Features(tokens, mask))[0], states, **CLOSE)
    everything = ours.attend(Features(tokens, torch.ones_like(mask)))[0]
    assert (everything[1:] - states[1:]).abs().max() > 1e-2, "the mask had no effect"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_instructblip(attention: str) -> None:
    config = tf.InstructBlipConfig(**parts("instructblip_qformer"))
    theirs = shaken(tf.InstructBlipForConditionalGeneration(config))
    ours = connector(instruct=True, vocab_size=VOCABULARY, max_positions=20)
    fill(ours, theirs)
    state = theirs.qformer.state_dict()
    table = {n.removeprefix("embeddings."): t for n, t in state.items() if "_embeddings." in n}
    assert ours.text_embeddings is not None
    ours.text_embeddings.load_state_dict(table)
    rest = {n.replace("embeddings.layernorm", "layernorm"): t for n, t in state.items() if "_embeddings." not in n}
    ours.qformer.load_state_dict(rest)
    ours.qformer.set_attn_implementation(attention)
    ids, mask = token_logits()
    soft = theirs.get_image_features(pixels(), qformer_input_ids=ids, qformer_attention_mask=mask.long()).pooler_output
    torch.testing.assert_close(ours(seen_by(theirs), ids, mask).tokens_BND, soft, **CLOSE)
    other = ours(seen_by(theirs), ids.flip(0), mask.flip(0)).tokens_BND
    assert (other[0] - soft[0]).abs().max() > 1e-2, "the question had no effect"


class Docked(torch.nn.Module):
    """As much of a docked model as the first stage looks at."""

    def __init__(self, theirs: Any, connector: QFormerConnector) -> None:
        super().__init__()
        self.image = torch.nn.Module()
        self.image.connector = connector
        self.image.encode = lambda pixel_values: seen_by(theirs)  # type: ignore[assignment]


@pytest.fixture(scope="module")
def retrieval() -> tuple[Any, QFormerPretraining]:
    config = tf.Blip2Config(**parts("blip_2_qformer", use_qformer_text_input=True), image_text_hidden_size=16)
    theirs = shaken(tf.Blip2ForImageTextRetrieval(config))
    ours = connector(text=True, vocab_size=VOCABULARY, max_positions=20, image_text_size=16)
    fill(ours, theirs)
    ours.qformer.load_state_dict(theirs.qformer.state_dict())
    ours.text_embeddings.load_state_dict(theirs.embeddings.state_dict())
    for head in ("vision_projection", "text_projection", "itm_head"):
        getattr(ours.pretraining, head).load_state_dict(getattr(theirs, head).state_dict())
    return theirs, QFormerPretraining(Docked(theirs, ours))


@torch.no_grad()
def test_contrast_is_blip2s(retrieval: tuple[Any, QFormerPretraining]) -> None:
    """transformers' scores are plain cosines: the temperature is left to whoever trains."""
    theirs, ours = retrieval
    ids, mask = token_logits()
    out = theirs(pixel_values=pixels(), input_ids=ids, attention_mask=mask.long(), use_image_text_matching_head=False)
    image, text = ours.contrast(ours.features(pixels()), ids, mask)
    torch.testing.assert_close(image, out.image_embeds, **CLOSE)
    torch.testing.assert_close(text, out.text_embeds, **CLOSE)
    torch.testing.assert_close(similarity(image, text), out.logits_per_image, **CLOSE)


@torch.no_grad()
def test_matching_is_blip2s(retrieval: tuple[Any, QFormerPretraining]) -> None:
    theirs, ours = retrieval
    ids, mask = token_logits()
    out = theirs(pixel_values=pixels(), input_ids=ids, attention_mask=mask.long(), use_image_text_matching_head=True)
    logits = ours.match_logits(ours.features(pixels()), ids, mask)
    torch.testing.assert_close(logits, out.logits_per_image, **CLOSE)


@torch.no_grad()
def test_started_from_a_bert_its_words_are_the_berts(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("bert")
    bert = shaken(
        BertModel(
            tf.BertConfig(
                vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
                max_position_embeddings=20,
            ),
            add_pooling_layer=False,
        )
    )  # fmt: skip
    bert.save_pretrained(folder)
    ours = QFormerConnector(in_size=24, out_size=28, in_tokens=5, bert=str(folder), text=True).eval()
    ids, mask = token_logits()
    features = Features(torch.randn(3, 5, 24), torch.ones(3, 5, dtype=torch.bool))
    pretraining = QFormerPretraining(Docked(None, ours))
    _, states = pretraining._attend("unimodal", features, ids, mask)
    theirs = bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(states[mask], theirs[mask], **CLOSE)
