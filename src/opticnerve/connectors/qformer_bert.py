"""A Q-Former that starts from a BERT, as BLIP-2's does (Li et al. 2023, section 3.1): its sizes, then its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import BertModel

from opticnerve.common import hub
from opticnerve.starter.minilm import bert_folder
from opticnerve.types import OpticNerveError

# The two of BERT's settings that the Q-Former has no option for.
FIXED = {"hidden_act": "gelu", "layer_norm_eps": 1e-12}


def bert_sizes(name: str) -> dict[str, int]:
    """The Q-Former's size options as the BERT `name` (hub name, folder, `starter/minilm`) has them; no weight is read.

    Raises:
        OpticNerveError: not a BERT, or one with another activation or epsilon than the Q-Former's.
    """
    config = _config(name)
    if config.model_type != "bert":
        raise OpticNerveError(f"{name!r} is a {config.model_type}; a Q-Former can start from a bert only")
    for key, value in FIXED.items():
        if getattr(config, key) != value:
            raise OpticNerveError(f"{name!r} has {key} {getattr(config, key)!r}; the Q-Former has {value!r}")
    return {
        "hidden_size": config.hidden_size,
        "depth": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "max_positions": config.max_position_embeddings,
    }


class _WithoutPooler(BertModel):
    """So that transformers does not report what is left out on purpose."""

    _keys_to_ignore_on_load_unexpected = [r"^pooler\.", r"^cls\."]  # noqa: RUF012 (transformers' own way of saying it)


def load_bert(connector: Any, name: str) -> None:
    """Copy a BERT's weights into a `QFormerConnector` of its sizes; cross-attention and query tokens keep theirs.

    Self-attention goes to its like; the feed-forward to the queries' and, where there is one, to the words'. Words and
    positions, too; BERT's embedding of "first sentence" is added to the positions', so that words alone come out of the
    Q-Former exactly as out of the BERT. A row for [DEC] keeps its random numbers.
    """
    loaded: Any = _WithoutPooler.from_pretrained(
        hub.fetch(bert_folder(name)), add_pooling_layer=False, dtype=torch.float32, output_loading_info=True
    )
    bert, report = loaded
    if report["missing_keys"] or report["mismatched_keys"]:
        raise OpticNerveError(f"{name!r} lacks weights of its BERT: {sorted(report['missing_keys'])[:8]}")
    state: dict[str, Tensor] = bert.state_dict()
    with torch.no_grad():
        for ours, parameter in connector.qformer.named_parameters():
            if theirs := _bert_name(ours):
                parameter.copy_(state[theirs])
        if connector.text_embeddings is not None:
            words_VD = state["embeddings.word_embeddings.weight"]
            connector.text_embeddings.word_embeddings.weight[: len(words_VD)].copy_(words_VD)
            first_sentence_D = state["embeddings.token_type_embeddings.weight"][0]
            connector.text_embeddings.position_embeddings.weight.copy_(
                state["embeddings.position_embeddings.weight"] + first_sentence_D
            )


def _bert_name(ours: str) -> str | None:
    """BERT's name of a Q-Former's parameter; None for cross-attention, which no BERT has."""
    if ".crossattention." in ours:
        return None
    name = ours.replace("intermediate_query.", "intermediate.").replace("output_query.", "output.")
    return name.replace(".attention.attention.", ".attention.self.").replace("layernorm.", "embeddings.LayerNorm.")


def _config(name: str) -> Any:
    return hub.read_config(bert_folder(name), name)
