"""The Querying Transformer: a fixed number of learned queries ask the picture, and may be told the question first.

BLIP-2 (Li et al. 2023, section 3.1) and InstructBLIP (Dai et al. 2023, section 2.3). The transformer is transformers'
own `Blip2QFormerModel` with its `Blip2TextEmbeddings`; InstructBLIP's Q-Former is the same computation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, BertModel, Blip2QFormerConfig
from transformers.models.bert.modeling_bert import BertPredictionHeadTransform
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2TextEmbeddings

from opticnerve.common import hub
from opticnerve.connectors.base import Connector, check_counts
from opticnerve.starter.minilm import bert_folder
from opticnerve.types import Features, OpticNerveError

STD = 0.02  # of fresh weights, as BERT's and BLIP-2's


class QFormerConnector(Connector):
    """Query tokens read the picture's tokens by cross-attention; what they become is projected to the language model.

    Args:
        in_size, out_size, in_tokens, calibrate: see `Connector`.
        num_queries: query tokens, and so soft tokens per image.
        hidden_size, depth, heads, intermediate_size: the transformer's. Left out: those of `bert`; without one 256, 4
            layers, heads of 64, four times the width. (BLIP-2: bert-base's 768, 12, 12, 3072.)
        cross_attention_frequency: every how many layers, from the first, queries look at the picture.
        dropout: of hidden states and attention (BLIP-2: 0.1).
        instruct: the question's words go through the Q-Former beside the queries (InstructBLIP).
        text: carry what BLIP-2's first stage trains: the words' branch, with a last row of the vocabulary for [DEC],
            and the heads under `pretraining`. In use they are idle, unless `instruct` is on as well.
        vocab_size: rows of the word table. Left out: the `bert`'s or the `text_tokenizer`'s, one more with `text`.
        max_positions: longest text in tokens. Left out: the `bert`'s, or 512.
        image_text_size: width in which pictures and captions are compared in the first stage.
        text_tokenizer: the BERT whose tokenizer reads the words (hub name, folder, `starter/minilm`). Left out: `bert`.
        bert: a BERT (likewise named) that gives sizes and first weights to all but cross-attention and queries. It is
            read when the connector is docked. `options` records the sizes in its place, so a trained connector loads
            without it; under `torch.device("meta")` its configuration alone is read.
    """

    any_shape = True
    keeps_grid = False  # a query gathers from everywhere

    def __init__(
        self, *, in_size: int, out_size: int, in_tokens: int, num_queries: int = 32, hidden_size: int | None = None,
        depth: int | None = None, heads: int | None = None, intermediate_size: int | None = None,
        cross_attention_frequency: int = 2, dropout: float = 0.0, instruct: bool = False, text: bool = False,
        vocab_size: int | None = None, max_positions: int | None = None, image_text_size: int = 256,
        text_tokenizer: str | None = None, bert: str | None = None, calibrate: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(in_size=in_size, out_size=out_size, in_tokens=in_tokens, calibrate=calibrate)
        sizes: dict[str, Any] = {
            "hidden_size": hidden_size, "depth": depth, "heads": heads, "intermediate_size": intermediate_size,
            "vocab_size": vocab_size, "max_positions": max_positions,
        }  # fmt: skip
        worded = instruct or text
        word_options = {"vocab_size": vocab_size, "max_positions": max_positions, "text_tokenizer": text_tokenizer}
        if not worded and (idle := next((key for key, value in word_options.items() if value is not None), None)):
            raise OpticNerveError(f"{idle} does nothing in a qformer without instruct or text", kind="conflict")
        tokenizer_name = text_tokenizer or (bert if worded else None)
        sizes = _resolve(sizes, bert, tokenizer_name, worded=worded, decoder_token=text)
        counts = {"num_queries": num_queries, "cross_attention_frequency": cross_attention_frequency, **sizes}
        check_counts("qformer", **{key: value for key, value in counts.items() if value is not None})
        if sizes["hidden_size"] % sizes["heads"]:
            raise OpticNerveError(
                f"hidden_size {sizes['hidden_size']} does not split into {sizes['heads']} heads", kind="wrong-shape"
            )
        self.wants_text, self.reads_words = instruct, worded
        self.tokenizer_name, self.vocab_size = tokenizer_name, sizes["vocab_size"]
        self.options |= {
            "num_queries": num_queries, **sizes, "cross_attention_frequency": cross_attention_frequency,
            "dropout": dropout, "instruct": instruct, "text": text, "image_text_size": image_text_size,
            "text_tokenizer": tokenizer_name,
        }  # fmt: skip
        config = Blip2QFormerConfig(
            hidden_size=sizes["hidden_size"], num_hidden_layers=sizes["depth"], num_attention_heads=sizes["heads"],
            intermediate_size=sizes["intermediate_size"], cross_attention_frequency=cross_attention_frequency,
            hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, encoder_hidden_size=in_size,
            use_qformer_text_input=worded, vocab_size=sizes["vocab_size"] or 1,
            max_position_embeddings=sizes["max_positions"] or 1, initializer_range=STD,
        )  # fmt: skip
        self.query_tokens = nn.Parameter(torch.randn(1, num_queries, config.hidden_size) * STD)
        self.qformer = Blip2QFormerModel(config)
        self.text_embeddings = _text_embeddings(config) if worded else None
        self.pretraining = PretrainingHeads(config, image_text_size) if text else None
        self.language_projection = nn.Linear(config.hidden_size, out_size)
        if bert is not None and not self.query_tokens.is_meta:
            load_bert(self, bert)

    @property
    def num_tokens(self) -> int:
        return int(self.query_tokens.shape[1])

    @property
    def decoder_token_id(self) -> int:
        """[DEC], which begins a caption that is to be generated: the last row of the word table (with `text`)."""
        assert self.pretraining is not None
        assert self.vocab_size is not None
        count: int = self.vocab_size - 1
        return count

    def text_tokenizer(self) -> Any:
        """The transformers tokenizer for the question and for the first stage's captions, read by its recorded name.

        Raises:
            OpticNerveError: the connector reads no words, names no tokenizer, or the word table is too small for it.
        """
        if self.vocab_size is None or self.tokenizer_name is None:
            raise OpticNerveError(
                "this qformer has no tokenizer: set instruct or text, and text_tokenizer or bert", kind="missing-field"
            )
        tokenizer = AutoTokenizer.from_pretrained(hub.fetch(bert_folder(self.tokenizer_name), weights=False))
        rows = len(tokenizer) + (self.pretraining is not None)
        if rows > self.vocab_size:
            raise OpticNerveError(
                f"the tokenizer of {self.tokenizer_name!r} needs {rows} rows of the word table"
                f"{', [DEC] included' if self.pretraining is not None else ''}; vocab_size is {self.vocab_size}",
                kind="out-of-range",
            )
        return tokenizer

    def project(self, features: Features, text_ids: Tensor | None = None, text_mask: Tensor | None = None) -> Features:
        """(B, in_tokens, in_size) → (B, num_queries, out_size); with `instruct`, the question's ids and mask (B, L)."""
        if self.wants_text and text_ids is None:
            raise ValueError("a qformer with instruct reads the question: text_ids (qformer_input_ids) are missing")
        if not self.wants_text and text_ids is not None:
            raise ValueError("this qformer reads no question; build it with instruct: true")
        queries_BQD, _ = self.attend(features, text_ids, text_mask)
        soft_BQE = self.language_projection(queries_BQD)
        return Features(soft_BQE, torch.ones(soft_BQE.shape[:2], dtype=torch.bool, device=soft_BQE.device))

    def attend(
        self, features: Features, text_ids: Tensor | None = None, text_mask: Tensor | None = None,
        sees_BTT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Queries, and words if there are any, through the transformer: states (B, Q, D) and (B, L, D).

        Args:
            features: of width `in_size`; queries look at real tokens only. Words never look at the picture itself.
            text_ids, text_mask: (B, L), the mask true at real tokens (all, where it is left out).
            sees_BTT: (B, Q + L, Q + L) bool, whether row i attends to column j; without it, all see all real tokens.
        """
        count, queries = features.tokens_BND.shape[0], self.num_tokens
        rows_BTD = self.query_tokens.expand(count, -1, -1)
        if text_ids is not None:
            text_mask = torch.ones_like(text_ids) if text_mask is None else text_mask
            rows_BTD = self._with_words(rows_BTD, text_ids, text_mask)
            if sees_BTT is None:
                sees_BTT = F.pad(text_mask.bool(), (queries, 0), value=True)[:, None]
        states_BTD = self.qformer(
            query_embeds=rows_BTD,
            query_length=queries,
            attention_mask=None if sees_BTT is None else _additive(sees_BTT[:, None], rows_BTD.dtype),
            encoder_hidden_states=features.tokens_BND,
            # Four dimensions from the start: transformers' own expansion forgets that words do not cross-attend.
            encoder_attention_mask=_additive(features.mask_BN[:, None, None], rows_BTD.dtype),
        ).last_hidden_state
        return states_BTD[:, :queries], states_BTD[:, queries:]

    def _with_words(self, queries_BQD: Tensor, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        if self.text_embeddings is None:
            raise ValueError("this qformer reads no words; build it with instruct: true or text: true")
        if text_ids.shape[0] != queries_BQD.shape[0] or text_mask.shape != text_ids.shape:
            raise ValueError(
                f"{queries_BQD.shape[0]} pieces of media want as many rows of text, with a mask of the same shape; got "
                f"text_ids {tuple(text_ids.shape)} and text_mask {tuple(text_mask.shape)}"
            )
        longest = self.text_embeddings.position_embeddings.num_embeddings
        if text_ids.shape[1] > longest:
            raise OpticNerveError(
                f"a text of {text_ids.shape[1]} tokens; the qformer reads up to {longest}", kind="too-long"
            )
        # Given, not taken from the module's buffer: a buffer outside the checkpoint is empty after `from_pretrained`.
        positions_1L = torch.arange(text_ids.shape[1], device=text_ids.device)[None]
        embedded: Tensor = self.text_embeddings(text_ids, position_ids=positions_1L, query_embeds=queries_BQD)
        return embedded


class PretrainingHeads(nn.Module):
    """What only BLIP-2's first stage uses: projections for contrast, the matching head and the words' LM head.

    The LM head is BERT's (dense, GELU, norm, then the word table itself and a bias); the table is given when it is
    called, so that it is held, and saved, once.
    """

    def __init__(self, config: Blip2QFormerConfig, image_text_size: int) -> None:
        super().__init__()
        self.vision_projection = nn.Linear(config.hidden_size, image_text_size)
        self.text_projection = nn.Linear(config.hidden_size, image_text_size)
        self.itm_head = nn.Linear(config.hidden_size, 2)
        self.lm_transform = BertPredictionHeadTransform(config)
        self.lm_bias = nn.Parameter(torch.zeros(config.vocab_size))
        # ln(1 / temperature), as CLIP keeps it: no step can bring the temperature to zero or below.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=STD)
                nn.init.zeros_(module.bias)

    def token_logits(self, states_MD: Tensor, word_table_VD: Tensor) -> Tensor:
        """Logits (…, V) of the next word."""
        return F.linear(self.lm_transform(states_MD), word_table_VD, self.lm_bias)


def _text_embeddings(config: Blip2QFormerConfig) -> Blip2TextEmbeddings:
    """transformers' word and position tables at BERT's deviation (outside a model of theirs they start at 1)."""
    embeddings = Blip2TextEmbeddings(config)
    for table in (embeddings.word_embeddings, embeddings.position_embeddings):
        nn.init.normal_(table.weight, std=STD)
    return embeddings


def _additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where seen, the least number elsewhere: the one form that every attention implementation takes."""
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, torch.finfo(dtype).min)


def _resolve(
    given: dict[str, int | None], bert: str | None, tokenizer: str | None, *, worded: bool, decoder_token: bool
) -> dict[str, Any]:
    """Every size: as given, else as the BERT has it, else the default. A contradiction is an error."""
    sizes: dict[str, Any] = dict(given)
    if bert is not None:
        theirs = bert_sizes(bert)
        theirs["vocab_size"] += decoder_token
        for key, value in theirs.items():
            mine = sizes[key]
            # A BERT's first layers alone are a good start, too.
            if mine is not None and (mine > value if key == "depth" else mine != value):
                raise OpticNerveError(
                    f"{key} is {mine}, but the bert {bert!r} has {value}; leave {key} out", kind="conflict"
                )
            sizes[key] = value if mine is None else mine
    width = 256 if sizes["hidden_size"] is None else sizes["hidden_size"]
    defaults = {"hidden_size": width, "depth": 4, "heads": max(1, width // 64), "intermediate_size": 4 * width,
                "max_positions": 512}  # fmt: skip
    sizes |= {key: value for key, value in defaults.items() if sizes[key] is None}
    if not worded:
        return sizes | {"vocab_size": None, "max_positions": None}
    if sizes["vocab_size"] is None:
        if tokenizer is None:
            raise OpticNerveError(
                "a qformer that reads words wants one of bert, text_tokenizer and vocab_size", kind="missing-field"
            )
        folder = hub.fetch(bert_folder(tokenizer), weights=False)
        sizes["vocab_size"] = len(AutoTokenizer.from_pretrained(folder)) + decoder_token
    return sizes


# -- a start from a BERT, as BLIP-2's (Li et al. 2023, section 3.1) --------------------------------------------------

# The two of BERT's settings that the Q-Former has no option for.
FIXED = {"hidden_act": "gelu", "layer_norm_eps": 1e-12}


def bert_sizes(name: str) -> dict[str, int]:
    """The Q-Former's size options as the BERT `name` (hub name, folder, `starter/minilm`) has them; no weight is read.

    Raises:
        OpticNerveError: not a BERT, or one with another activation or epsilon than the Q-Former's.
    """
    config = hub.read_config(bert_folder(name), name)
    if config.model_type != "bert":
        raise OpticNerveError(
            f"{name!r} is a {config.model_type}; a Q-Former can start from a bert only", kind="unsupported"
        )
    for key, value in FIXED.items():
        if getattr(config, key) != value:
            raise OpticNerveError(
                f"{name!r} has {key} {getattr(config, key)!r}; the Q-Former has {value!r}", kind="unsupported"
            )
    return {
        "hidden_size": config.hidden_size, "depth": config.num_hidden_layers, "heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size, "vocab_size": config.vocab_size,
        "max_positions": config.max_position_embeddings,
    }  # fmt: skip


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
        raise OpticNerveError(
            f"{name!r} lacks weights of its BERT: {sorted(report['missing_keys'])[:8]}", kind="mismatch"
        )
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
