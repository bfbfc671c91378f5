"""BLIP-2 (Li et al. 2023) and InstructBLIP (Dai et al. 2023) of transformers: ViT × qformer × splice.

Both put the picture's soft tokens before everything, the language model's begin token included. A tokenizer that
begins every text with that token cannot write such a prompt, so it is told not to, and the chat template writes the
token behind the picture.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import LlavaProcessor, PreTrainedConfig, PreTrainedTokenizerBase

from opticnerve.connectors.qformer import QFormerConnector
from opticnerve.encoders.hf_vision import HFVisionEncoder
from opticnerve.fusion.base import Splice
from opticnerve.models.import_hf.source import Source, adopt, make_encoder, make_processor, prefixed
from opticnerve.models.vlm.processing import OpticNerveProcessor
from opticnerve.models.vlm.tower import Tower, language_sizes
from opticnerve.types import OpticNerveError

# Pictures first, then the begin token, then the words: BLIP-2's form of questions (Li et al. 2023, section 4.2), and
# InstructBLIP's instructions as they are. transformers has no template for these models.
_WORDS = (
    "{%- macro words(content) -%}{%- if content is string -%}{{ content }}{%- else -%}"
    "{{ content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join }}"
    "{%- endif -%}{%- endmacro -%}"
)
_PICTURES = (
    "{%- for message in messages -%}{%- if message['content'] is not string -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}{{ '<image>' }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endfor -%}"
)
_TURNS = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ USER }}"
    "{%- elif message['role'] == 'assistant' -%}{{ ' ' + words(message['content']) + eos_token + '\n' }}"
    "{%- else -%}{{ words(message['content']) + '\n' }}{%- endif -%}"
    "{%- endfor -%}"
)
_USER = {
    "blip-2": "'Question: ' + words(message['content']) + ' Answer:'",
    "instructblip": "words(message['content'])",
}
# What of a Q-Former's configuration our connector decides by itself.
_FIXED = {"hidden_act": "gelu", "layer_norm_eps": 1e-12}


def refuse(config: PreTrainedConfig) -> list[str]:
    """What of a BLIP-2 or InstructBLIP cannot be imported, by its configuration."""
    reasons, vision = [], config.vision_config
    if not isinstance(vision.image_size, int) or not isinstance(vision.patch_size, int):
        reasons.append(f"its vision model takes oblong pictures ({vision.image_size}) or patches ({vision.patch_size})")
    for key, value in _FIXED.items():
        if (theirs := getattr(config.qformer_config, key)) != value:
            reasons.append(f"its Q-Former has {key} {theirs}; the qformer connector knows {value} alone")
    if getattr(config.qformer_config, "use_qformer_text_input", False):
        reasons.append("its Q-Former has the words' branch of the first stage, which generation never uses")
    if config.image_token_id is None:
        reasons.append(
            "config.json names no image_token_index, as versions of transformers before 4.46 wrote it; save the model "
            "again with its tokens (huggingface.co/docs/transformers/model_doc/blip-2)"
        )
    return reasons


def convert(source: Source) -> tuple[Any, Tower, OpticNerveProcessor]:
    """Language model, tower and processor."""
    language = source.model.language_model
    encoder = make_encoder(source, source.model.vision_model, layer="last", class_token="keep")
    sizes = language_sizes(language)
    tower = Tower(encoder, _connector(source, encoder, sizes["language_size"]), Splice(**sizes))
    tokenizer = copy.deepcopy(source.processor.tokenizer)
    begins = _begins_itself(tokenizer) and not _as_exported(source)
    if begins:
        _stop_beginning(tokenizer)
        source.notes.append(
            f"the tokenizer no longer begins every text with {tokenizer.bos_token}: the chat template writes it behind "
            f"the picture; without the template, write {source.image_token}{tokenizer.bos_token} before your words"
        )
    extra: dict[str, Any] = {}
    if tower.wants_text:
        words = copy.deepcopy(source.processor.qformer_tokenizer)
        extra = {"qformer_tokenizer": words, "qformer_words": "questions"}
    made = make_processor(
        source, tower, tokenizer, chat_template=_template(source, begins),
        image_processor=copy.deepcopy(source.processor.image_processor), **extra,
    )  # fmt: skip
    return language, tower, made


def _connector(source: Source, encoder: HFVisionEncoder, width: int) -> QFormerConnector:
    """Their queries, Q-Former and projection as a connector."""
    theirs, config = source.model, source.config
    former, instruct = config.qformer_config, config.model_type == "instructblip"
    words = {"vocab_size": former.vocab_size, "max_positions": former.max_position_embeddings} if instruct else {}
    connector = QFormerConnector(
        in_size=encoder.hidden_size, in_tokens=encoder.num_tokens, out_size=width,
        num_queries=config.num_query_tokens, hidden_size=former.hidden_size, depth=former.num_hidden_layers,
        heads=former.num_attention_heads, intermediate_size=former.intermediate_size,
        cross_attention_frequency=former.cross_attention_frequency, dropout=former.hidden_dropout_prob,
        instruct=instruct, calibrate=False, **words,
    )  # fmt: skip
    tensors = {"query_tokens": theirs.query_tokens, **prefixed(theirs.qformer, "qformer")}
    tensors |= prefixed(theirs.language_projection, "language_projection")
    if instruct:
        # InstructBLIP keeps tables and norm in one module; BLIP-2's Q-Former keeps the norm itself.
        for table in ("word_embeddings.weight", "position_embeddings.weight"):
            tensors[f"text_embeddings.{table}"] = tensors.pop(f"qformer.embeddings.{table}")
        for norm in ("layernorm.weight", "layernorm.bias"):
            tensors[f"qformer.{norm}"] = tensors.pop(f"qformer.embeddings.{norm}")
    adopt(connector, tensors)
    return connector


def _template(source: Source, begins: bool) -> str:
    """Their chat template; where there is none, one that writes the picture first."""
    theirs: str | None = source.processor.chat_template
    if theirs is not None:
        return theirs
    source.notes.append("the checkpoint has no chat template; a plain one, the picture first, was put in")
    pictures = _PICTURES.replace("<image>", source.image_token)
    turns = _TURNS.replace("USER", _USER[source.config.model_type])
    return _WORDS + pictures + ("{{ bos_token }}" if begins else "") + turns


def prompts(source: Source, processor: OpticNerveProcessor, question: str, pictures: int) -> tuple[str, str]:
    """One question in their form and in ours: their processor puts the picture before the text by itself."""
    text = f"Question: {question} Answer:"
    if _as_exported(source):
        return (source.image_token * pictures + text,) * 2
    begin = processor.tokenizer.bos_token if _begins_itself(source.processor.tokenizer) else ""
    return text, source.image_token * pictures + begin + text


def ready(source: Source) -> None:
    """Old processors do not know how many placeholders a picture takes."""
    if not _as_exported(source) and source.processor.num_query_tokens is None:
        source.processor.num_query_tokens = source.config.num_query_tokens


def _as_exported(source: Source) -> bool:
    """Whether the folder is one of `opticnerve export --to hf-blip2`, whose processor is LLaVA's: what it writes stands
    in the prompt, and its tokenizer and template are a dock's already."""
    return isinstance(source.processor, LlavaProcessor)


def _begins_itself(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _stop_beginning(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_bos_token = False
    if _begins_itself(tokenizer):
        raise OpticNerveError(
            f"{type(tokenizer).__name__} puts {tokenizer.bos_token} before every text and cannot be told not to; "
            "BLIP-2 wants the picture before it",
            kind="unsupported",
        )
