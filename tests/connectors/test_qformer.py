"""The Q-Former's options, its start from a BERT, and what it refuses. (Its numbers: tests/parity.)"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from errors import refused
from opticnerve.connectors.qformer import QFormerConnector
from opticnerve.models.vlm.build import Dock
from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
from opticnerve.types import Features

SIZES: dict[str, Any] = {"in_size": 6, "out_size": 10, "in_tokens": 4}
SMALL: dict[str, Any] = {"num_queries": 3, "hidden_size": 16, "depth": 2, "heads": 2}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "square", "what", "is", "it"]


def save_bert(folder: Path, *, rows: int | None = None, **changes: Any) -> str:
    """A small BERT with its tokenizer; returns the folder's path."""
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tf.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=20, **special).save_pretrained(folder)
    torch.manual_seed(5)
    config = tf.BertConfig(
        vocab_size=rows or len(WORDS), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=20, **changes,
    )  # fmt: skip
    bert = tf.BertModel(config, add_pooling_layer=False)
    with torch.no_grad():
        for parameter in bert.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    bert.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def bert(tmp_path: Path) -> str:
    return save_bert(tmp_path / "bert")


def features(count: int = 3) -> Features:
    tokens = torch.randn(count, 4, 6, generator=torch.Generator().manual_seed(0))
    return Features(tokens, torch.ones(count, 4, dtype=torch.bool))


def make(**options: Any) -> QFormerConnector:
    torch.manual_seed(0)
    return QFormerConnector(**SIZES, **options).eval()


class TestSizes:
    def test_queries_are_the_tokens_that_come_out(self) -> None:
        for count in (1, 7):
            connector = make(**SMALL | {"num_queries": count})
            assert connector.num_tokens == count
            assert connector(features()).tokens_BND.shape == (3, count, 10)

    def test_where_the_queries_look(self) -> None:
        layers = make(**SMALL | {"depth": 5}, cross_attention_frequency=2).qformer.encoder.layer
        assert [layer.has_cross_attention for layer in layers] == [True, False, True, False, True]

    def test_defaults_fit_each_other(self) -> None:
        assert make(hidden_size=48).options["heads"] == 1
        assert make(hidden_size=128).options | {"heads": 2, "intermediate_size": 512} == make(hidden_size=128).options

    def test_dropout_is_on_in_training_only(self) -> None:
        connector = make(**SMALL, dropout=0.5)
        assert torch.equal(connector(features()).tokens_BND, connector(features()).tokens_BND)
        connector.train()
        assert not torch.equal(connector(features()).tokens_BND, connector(features()).tokens_BND)

    def test_fresh_queries_differ(self) -> None:
        """Equal ones (transformers' empty zeros) would stay equal for ever: nothing would tell them apart."""
        soft = make(**SMALL)(features()).tokens_BND
        assert (soft[:, 0] - soft[:, 1]).abs().max() > 1e-3

    def test_no_words_no_tables(self) -> None:
        names = set(make(**SMALL).state_dict())
        assert not [n for n in names if "text" in n or "pretraining" in n or ".intermediate." in n]


class TestWords:
    def test_the_question_decides_what_is_seen(self) -> None:
        connector = make(**SMALL, instruct=True, vocab_size=20)
        assert connector.wants_text
        ids = torch.tensor([[2, 5, 3], [2, 6, 3], [2, 5, 3]])
        same = Features(features(1).tokens_BND.expand(3, -1, -1), torch.ones(3, 4, dtype=torch.bool))
        soft = connector(same, ids, torch.ones_like(ids)).tokens_BND
        torch.testing.assert_close(soft[0], soft[2])
        assert (soft[0] - soft[1]).abs().max() > 1e-4

    def test_padding_of_the_question_is_not_read(self) -> None:
        connector = make(**SMALL, instruct=True, vocab_size=20)
        short = torch.tensor([[2, 5, 3]])
        long, mask = torch.tensor([[2, 5, 3, 9, 9]]), torch.tensor([[1, 1, 1, 0, 0]])
        torch.testing.assert_close(
            connector(features(1), long, mask).tokens_BND, connector(features(1), short, None).tokens_BND
        )

    def test_words_and_padding_among_the_pictures_tokens(self) -> None:
        connector, seen = make(**SMALL, instruct=True, vocab_size=20), features()
        ids = torch.tensor([[2, 5, 3]]).expand(3, -1)
        mask = seen.mask_BN.clone()
        mask[:, 2:] = False
        spoiled = seen.tokens_BND.clone()
        spoiled[:, 2:] = 1e4
        one, other = (connector(Features(t, mask), ids, None).tokens_BND for t in (seen.tokens_BND, spoiled))
        assert torch.equal(one, other)

    def test_calibration_with_a_question(self) -> None:
        connector, ids = make(**SMALL, instruct=True, vocab_size=20), torch.tensor([[2, 5, 3]]).expand(16, -1)
        connector.calibrate(features(16), 0.3, ids, torch.ones_like(ids))
        soft = connector(features(16), ids, torch.ones_like(ids)).tokens_BND
        assert float(soft.detach().std()) == pytest.approx(0.3, rel=1e-3)

    def test_in_use_the_first_stages_branch_changes_nothing(self) -> None:
        plain, more = make(**SMALL), make(**SMALL, text=True, vocab_size=20)
        assert not more.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
        torch.testing.assert_close(plain(features()).tokens_BND, more(features()).tokens_BND)

    def test_the_last_row_is_dec(self, bert: str) -> None:
        connector = make(bert=bert, text=True)
        assert connector.vocab_size == len(WORDS) + 1
        assert connector.decoder_token_id == len(WORDS) == len(connector.text_tokenizer())


class TestBert:
    def test_what_it_gives(self, bert: str) -> None:
        connector, theirs = make(bert=bert, instruct=True), tf.BertModel.from_pretrained(bert).state_dict()
        for i, layer in enumerate(connector.qformer.encoder.layer):
            old = f"encoder.layer.{i}."
            assert torch.equal(layer.attention.attention.key.weight, theirs[old + "attention.self.key.weight"])
            assert torch.equal(layer.attention.output.dense.bias, theirs[old + "attention.output.dense.bias"])
            for ours in (layer.intermediate, layer.intermediate_query):
                assert torch.equal(ours.dense.weight, theirs[old + "intermediate.dense.weight"])
            for ours in (layer.output, layer.output_query):
                assert torch.equal(ours.LayerNorm.weight, theirs[old + "output.LayerNorm.weight"])
        assert torch.equal(connector.qformer.layernorm.bias, theirs["embeddings.LayerNorm.bias"])
        assert connector.text_embeddings is not None
        token_logits = connector.text_embeddings.word_embeddings.weight
        assert torch.equal(token_logits, theirs["embeddings.word_embeddings.weight"])

    def test_without_words_only_what_the_queries_use(self, bert: str) -> None:
        connector, theirs = make(bert=bert), tf.BertModel.from_pretrained(bert).state_dict()
        dense = connector.qformer.encoder.layer[2].output_query.dense.weight
        assert torch.equal(dense, theirs["encoder.layer.2.output.dense.weight"])
        assert connector.text_embeddings is None

    def test_its_first_layers(self, bert: str) -> None:
        assert len(make(bert=bert, depth=2).qformer.encoder.layer) == 2

    def test_the_options_do_not_need_it(self, bert: str) -> None:
        connector = make(bert=bert, text=True)
        assert "bert" not in connector.options
        shutil.rmtree(bert)
        again = QFormerConnector(**SIZES, **json.loads(json.dumps(connector.options))).eval()
        again.load_state_dict(connector.state_dict())
        assert torch.equal(again(features()).tokens_BND, connector(features()).tokens_BND)

    def test_a_plan_reads_its_configuration_alone(self, bert: str) -> None:
        for file in Path(bert).glob("*.safetensors"):
            file.unlink()
        with torch.device("meta"):
            assert QFormerConnector(**SIZES, bert=bert).options["hidden_size"] == 16

    def test_a_docked_model_comes_back_without_it(self, docked: Callable[..., Dock], bert: str, tmp_path: Path) -> None:
        made = docked(connector={"type": "qformer", "num_queries": 3, "bert": bert, "text": True})
        made.model.save_pretrained(tmp_path / "whole")
        shutil.rmtree(bert)
        again = OpticNerveForConditionalGeneration.from_pretrained(tmp_path / "whole")
        for (name, ours), (_, theirs) in zip(made.model.state_dict().items(), again.state_dict().items(), strict=True):
            assert torch.equal(ours, theirs), name
        pixels = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(made.model.image(pixels).tokens_BND, again.image(pixels).tokens_BND)


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"hidden_size": 16, "heads": 3}, ("wrong-shape", "hidden_size", 16, 3)),
        ({"num_queries": 0}, ("out-of-range", "num_queries", 1, 0)),
        ({"depth": 0}, ("out-of-range", "depth", 1, 0)),
        ({"hidden_size": 0}, ("out-of-range", "hidden_size", 1, 0)),
        ({"vocab_size": 9}, ("conflict", "vocab_size")),
        ({"text_tokenizer": "x"}, ("conflict", "text_tokenizer")),
        ({"instruct": True}, ("missing-field", "bert", "text_tokenizer", "vocab_size")),
    ],
)
def test_refusals(options: dict[str, Any], refusal: tuple[Any, ...]) -> None:
    with refused(*refusal):
        make(**options)


def test_refusals_of_a_bert(bert: str, tmp_path: Path) -> None:
    with refused("conflict", "hidden_size", 32, 16):
        make(bert=bert, hidden_size=32)
    with refused("conflict", "depth", 4, 3):
        make(bert=bert, depth=4)
    with refused("unsupported", "hidden_act", "'relu'", "Q-Former", "'gelu'"):
        make(bert=save_bert(tmp_path / "relu", hidden_act="relu"))
    tf.LlamaConfig().save_pretrained(tmp_path / "llama")
    with refused("unsupported", "llama", "bert"):
        make(bert=str(tmp_path / "llama"))
    with refused("name", "nowhere"):
        make(bert=str(tmp_path / "nowhere"))
    with refused("out-of-range", 14, "[DEC]", "vocab_size", 13):
        make(**SMALL, text=True, text_tokenizer=bert, vocab_size=13).text_tokenizer()
    with refused("missing-field", "tokenizer", "instruct"):
        make(**SMALL).text_tokenizer()


def test_refusals_in_use() -> None:
    plain, asking = make(**SMALL), make(**SMALL, instruct=True, vocab_size=20, max_positions=4)
    ids = torch.ones(3, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="text_ids .* are missing"):
        asking(features())
    with pytest.raises(ValueError, match="reads no question"):
        plain(features(), ids, ids)
    with pytest.raises(ValueError, match=r"reads no words"):
        plain.attend(features(), ids)
    with pytest.raises(ValueError, match=r"3 pieces of media want as many rows of text.*text_ids \(2, 3\)"):
        asking(features(), ids[:2], ids[:2])
    with refused("too-long", 5, 4):
        asking(features(), torch.ones(3, 5, dtype=torch.long))
