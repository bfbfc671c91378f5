"""An instruction-aware Q-Former on a docked model: the question reaches it, in training and in use alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf

import tiny
from errors import refused
from opticnerve.data.collators.next_token import Collator
from opticnerve.data.encode.packing import pack
from opticnerve.data.encode.tokenize import encode
from opticnerve.inference.generate import Answerer
from opticnerve.models.vlm.build import Dock
from opticnerve.objectives.next_token import NextToken
from opticnerve.types import DataError, ask

pytestmark = pytest.mark.usefixtures("private_cache")
P = [tiny.picture(i) for i in range(3)]


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bert")
    words = tiny.tokenizer()
    words.pad_token = "<|endoftext|>"
    words.save_pretrained(folder)
    tf.BertModel(
        tf.BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
        )
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def curious(docked: Callable[..., Dock], bert_folder: str) -> Dock:
    made = docked("llama", connector={"type": "qformer", "num_queries": 4, "instruct": True, "bert": bert_folder})
    with torch.no_grad():
        made.model.image.connector.language_projection.weight.mul_(20)
        for name, parameter in made.model.image.connector.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(3 if "embeddings" not in name else 10)
    return made


def test_the_question_changes_the_soft_tokens(curious: Dock) -> None:
    answerer = Answerer(curious.model, curious.processor)
    one, other = answerer.inputs([ask("what colour?", P[0])]), answerer.inputs([ask("how many dogs?", P[0])])
    with torch.no_grad():
        first, second = (curious.model(**b).image_hidden_states for b in (one, other))
    assert first.shape == (1, 4, 32)
    assert not torch.allclose(first, second, atol=1e-3)


def test_batch_is_single_and_each_picture_has_its_own_question(curious: Dock) -> None:
    answerer = Answerer(curious.model, curious.processor)
    asked = [ask("what colour?", P[0], P[1]), ask("how many dogs are on the beach?", P[2]), ask("text")]
    batch = answerer.inputs(asked)
    assert batch["qformer_input_ids"].shape[0] == 3
    with torch.no_grad():
        together = curious.model(**batch).logits[:, -1]
        for row, c in zip(together, asked, strict=True):
            torch.testing.assert_close(row, curious.model(**answerer.inputs([c])).logits[0, -1], rtol=1e-4, atol=1e-4)
    assert answerer.answer(asked, max_new_tokens=3) == [answerer.answer([c], max_new_tokens=3)[0] for c in asked]


def test_training_reads_what_use_reads(curious: Dock) -> None:
    conversation = ask("what colour?", P[0], answer="red")
    batch = Collator(curious.processor)([pack([[encode(conversation, curious.processor)]])])
    used = Answerer(curious.model, curious.processor).inputs([conversation])
    assert torch.equal(batch.media["qformer_input_ids"], used["qformer_input_ids"])
    loss, _ = NextToken(curious.model)(batch)
    loss.backward()
    assert bool((curious.model.image.connector.text_embeddings.word_embeddings.weight.grad != 0).any())


def test_transformers_own_chat_reads_the_same(curious: Dock) -> None:
    chat = [{"role": "user", "content": [{"type": "image", "image": P[0]}, {"type": "text", "text": "what colour?"}]}]
    out = curious.processor.apply_chat_template(
        chat, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    ours = Answerer(curious.model, curious.processor).inputs([ask("what colour?", P[0])])
    assert torch.equal(out["qformer_input_ids"], ours["qformer_input_ids"])


def test_other_questions_cannot_share_a_picture(curious: Dock) -> None:
    questions = [ask("what colour?", P[0], answer="red"), ask("how many?", P[0], answer="three")]
    with refused("conflict", "Q-Former", error=DataError):
        pack([[encode(q, curious.processor) for q in questions]])


def test_save_and_load(curious: Dock, tmp_path: Path) -> None:
    curious.model.save_pretrained(tmp_path)
    curious.processor.save_pretrained(tmp_path)
    model, processor = (
        tf.AutoModelForImageTextToText.from_pretrained(tmp_path),
        tf.AutoProcessor.from_pretrained(tmp_path),
    )
    assert processor.reads_questions
    before = Answerer(curious.model, curious.processor).inputs([ask("what colour?", P[0])])
    after = Answerer(model, processor).inputs([ask("what colour?", P[0])])
    assert all(torch.equal(before[k], after[k]) for k in before)
    with torch.no_grad():
        assert torch.equal(model(**after).logits, curious.model(**before).logits)


def test_captions_alone_ask_nothing(docked: Callable[..., Dock], bert_folder: str) -> None:
    """With the branch of BLIP-2's first stage and no `instruct`, several questions share a picture."""
    made = docked("llama", connector={"type": "qformer", "num_queries": 4, "text": True, "bert": bert_folder})
    assert made.processor.qformer_tokenizer is not None
    assert not made.processor.reads_questions
    pack([[encode(ask(q, P[0], answer="red"), made.processor) for q in ("what colour?", "how many?")]])
