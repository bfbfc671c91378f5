"""The starter's BERT: a name for a folder, and, where its package is installed, the real thing."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from errors import refused
from opticnerve.starter.minilm import NAME, WEIGHTS, bert_folder


def installed() -> bool:
    try:
        importlib.metadata.distribution(WEIGHTS.package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


real = pytest.mark.skipif(not installed(), reason=f"the package {WEIGHTS.package} is not installed")


def test_other_names_stay_as_they_are() -> None:
    assert bert_folder("google-bert/bert-base-uncased") == "google-bert/bert-base-uncased"
    with refused("unknown-name", "'starter/maxilm'", "starter/minilm"):
        bert_folder("starter/maxilm")


@real
def test_sentences_that_mean_the_same_lie_close() -> None:
    folder = bert_folder(NAME)
    assert (Path(folder) / "config.json").is_file()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    words = tokenizer(["a dog runs on the beach", "a puppy by the sea", "the bank raised rates"], padding=True,
                      return_tensors="pt")  # fmt: skip
    with torch.no_grad():
        states = model(**words).last_hidden_state
    mask = words["attention_mask"].unsqueeze(-1)
    mean = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    assert float(mean[0] @ mean[1]) > 0.4 > float(mean[0] @ mean[2]) + 0.2


@real
@torch.no_grad()
def test_a_qformer_starts_from_it() -> None:
    from opticnerve.connectors.qformer import QFormerConnector

    connector = QFormerConnector(in_size=6, out_size=10, in_tokens=4, bert=NAME, text=True).eval()
    assert connector.options | {
        "hidden_size": 384, "depth": 6, "heads": 12, "vocab_size": 30_523, "text_tokenizer": NAME,
    } == connector.options  # fmt: skip
    words = connector.text_tokenizer()("a red circle", return_tensors="pt")["input_ids"]
    assert connector.text_embeddings is not None
    states = connector.qformer(connector.text_embeddings(words), query_length=0).last_hidden_state
    bert = AutoModel.from_pretrained(bert_folder(NAME))
    torch.testing.assert_close(states, bert(words).last_hidden_state, rtol=0, atol=1e-5)
