"""A text encoder of transformers: words in, one vector for each text out. The reader beside the vision encoder in a
`DualEncoder`.

Three families, told apart by how the vector is taken (`pooling`): BERT and its like by the mean of their tokens
(Reimers & Gurevych 2019, Sentence-BERT, section 3) or the first one; the text models of CLIP and SigLIP by their own
pooling (Radford et al. 2021, section 2.4; Zhai et al. 2023); causal language models by the hidden state of their last
token, which alone has seen the whole text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from opticnerve.common import hub
from opticnerve.common.cache import weight_files
from opticnerve.common.hub import read_config
from opticnerve.common.on_host import on_host
from opticnerve.encoders.base import config_from_dict, load_part, longest_list, model_class
from opticnerve.registry import Registry
from opticnerve.starter.minilm import bert_folder
from opticnerve.types import Features, OpticNerveError

Pooling = Literal["mean", "first", "last", "pooler"]

# transformers' AutoModel knows these two as parts of their whole only.
_MODELS = {"siglip_text_model": "SiglipTextModel", "siglip2_text_model": "Siglip2TextModel"}

text_encoders: Registry[Any] = Registry(
    "text encoder",
    group="opticnerve.text_encoders",
    builtin={"hf_text": "opticnerve.encoders.text:HFTextEncoder"},
)


class HFTextEncoder(nn.Module):
    """A text model of transformers and its pooling.

    Args:
        architecture: the model's configuration as a dict with `model_type` (`bert`, `clip_text_model`, `llama`, …).
        pooling: "mean" of the real tokens, the "first" token (BERT's [CLS]), the "last" real token, or the model's own
            "pooler". By default what the family was trained with: see `default_pooling`.
        max_length: tokens of a text that are read; the processor cuts longer ones. The model's positions by default, at
            most 512.
        padding: "longest" pads to the batch's longest text, "max_length" to `max_length` always, as SigLIP was trained.

    Sets `hidden_size` (width D of a text's vector), `state_size` (width of its tokens' states, which differs where a
    pooler projects) and `options` (the keywords that build the module again).
    """

    hidden_size: int
    state_size: int
    options: dict[str, Any]
    files: list[str]
    tokenizer: Any = None

    def __init__(
        self, *, architecture: dict[str, Any], pooling: Pooling | None = None, max_length: int | None = None,
        padding: Literal["longest", "max_length"] | None = None, _model: PreTrainedModel | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        config = config_from_dict(architecture, "hf_text", "bert, clip_text_model or llama")
        self.pooling: Pooling = pooling or default_pooling(config)
        if self.pooling not in get_args(Pooling):
            raise OpticNerveError(
                f"pooling is one of {', '.join(get_args(Pooling))}, not {self.pooling!r}", kind="unknown-name"
            )
        positions = int(getattr(config, "max_position_embeddings", None) or 512)
        self.max_length = max_length or min(positions, 512)
        if self.max_length > positions:
            raise OpticNerveError(
                f"max_length is {self.max_length}, but {config.model_type} has {positions} positions", kind="too-long"
            )
        self.padding = padding or ("max_length" if config.model_type.startswith("siglip") else "longest")
        self.model: Any = _model if _model is not None else _model_class(config)(config)
        if self.pooling != "pooler" and isinstance(getattr(self.model, "pooler", None), nn.Module):
            self.model.pooler = None  # BERT's [CLS] head: it would be weights that nothing reads
        self.hidden_size, self.state_size = _width(config, self.pooling), int(config.hidden_size)
        self.options = {
            "architecture": {k: v for k, v in config.to_dict().items() if k != "_name_or_path"},
            "pooling": self.pooling, "max_length": self.max_length, "padding": self.padding,
        }  # fmt: skip
        self.files = []

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> HFTextEncoder:
        """`name`: hub name, local folder, or `starter/minilm`; of a two-tower model (CLIP, SigLIP) the text tower.

        The tokenizer comes along as `tokenizer`.

        Raises:
            OpticNerveError: no text encoder, or weights are missing.
        """
        folder = hub.fetch(bert_folder(name))
        config = read_config(folder, name)
        config = getattr(config, "text_config", config)
        wanted = options.get("pooling") or default_pooling(config)
        unread = () if wanted == "pooler" else ("pooler.",)
        model = load_part(_model_class(config), folder, name, "text encoder", optional=unread, config=config)
        encoder = cls.from_loaded(model, AutoTokenizer.from_pretrained(folder), **options)
        encoder.files = weight_files(Path(folder))
        return encoder

    @classmethod
    def planned(cls, name: str, **options: Any) -> HFTextEncoder:
        """The same shapes from the configuration alone."""
        config = read_config(bert_folder(name), name)
        return cls(architecture=getattr(config, "text_config", config).to_dict(), **options)

    @classmethod
    def from_loaded(cls, model: Any, tokenizer: PreTrainedTokenizerBase, **options: Any) -> HFTextEncoder:
        """Around a model that is in memory already; of a causal language model, all but its LM head."""
        model = model.base_model
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token is None:
                raise OpticNerveError(
                    f"the tokenizer of {model.config.model_type} has neither padding nor end token", kind="unsupported"
                )
            tokenizer.pad_token = tokenizer.eos_token
        encoder = cls(architecture=model.config.to_dict(), _model=model, **options)
        encoder.take_tokenizer(tokenizer)
        return encoder.eval()

    def take_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Have texts read by it. A text by itself has one type of tokens; pipelines pass on whatever the tokenizer
        names."""
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        self.tokenizer = tokenizer

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids (B, L) and their mask (B, L; 1 where a token is real) → one vector a text, (B, hidden_size).

        Padding may stand on either side.
        """
        return self.states_and_vector(input_ids, attention_mask)[1]

    def states_and_vector(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Features, Tensor]:
        """The states of the tokens, real ones first (`Features` of (B, L, width)), and the vector that `forward` gives.

        Raises:
            OpticNerveError: a text without a single token.
        """
        mask_BL = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self.pooling == "pooler":
            out = self.model(input_ids=input_ids, attention_mask=attention_mask)
            return Features(out.last_hidden_state, mask_BL.bool()), out.pooler_output
        if not bool(on_host(mask_BL).any(1).all()):
            raise OpticNerveError(
                "a text without a single token cannot be encoded; remove it from the batch", kind="empty"
            )
        # Real tokens first: positions start at 0, and no causal token sees padding, wherever the padding stood.
        order_BL = mask_BL.argsort(dim=1, descending=True, stable=True)
        input_ids, mask_BL = input_ids.gather(1, order_BL), mask_BL.gather(1, order_BL)
        states_BLD = self.model(input_ids=input_ids, attention_mask=mask_BL).last_hidden_state
        return Features(states_BLD, mask_BL.bool()), self._pooled(states_BLD, mask_BL)

    def _pooled(self, states_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        if self.pooling == "first":
            return states_BLD[:, 0]
        if self.pooling == "last":
            last_B = mask_BL.sum(1) - 1
            return states_BLD[torch.arange(len(last_B), device=last_B.device), last_B]
        weight_BL1 = mask_BL.unsqueeze(2).to(states_BLD.dtype)
        return (states_BLD * weight_BL1).sum(1) / weight_BL1.sum(1)

    def blocks(self) -> list[nn.Module]:
        """The transformer's layers: what `text.encoder.last(N)` counts."""
        return longest_list(self.model, "text.encoder")

    def weight_files(self) -> list[str]:
        """The files that the weights came from, for the content hash; empty when there are none."""
        return list(self.files)


def default_pooling(config: PreTrainedConfig) -> Pooling:
    """ "pooler" for the text models of CLIP and SigLIP, "mean" for masked language models, "last" for causal ones."""
    if config.model_type == "clip_text_model" or config.model_type in _MODELS:
        return "pooler"
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        return "mean"
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "last"
    raise OpticNerveError(
        f"how {config.model_type} pools is not known; give pooling: {', '.join(get_args(Pooling))}",
        kind="missing-field",
    )


def _width(config: PreTrainedConfig, pooling: Pooling) -> int:
    """SigLIP's head brings the pooled vector to a width of its own; all others keep the hidden size."""
    own = getattr(config, "projection_size", None) if pooling == "pooler" else None
    return int(own or config.hidden_size)


def _model_class(config: PreTrainedConfig) -> Any:
    if getattr(config, "is_encoder_decoder", False):
        raise OpticNerveError(
            f"{config.model_type} is an encoder with a decoder; name an encoder or a causal LM", kind="unsupported"
        )
    return model_class(config, _MODELS)
