"""Which checkpoints are language models, and the text model inside those that see or hear already.

Gemma 3, Mistral 3, Qwen2.5-VL, LLaVA, Idefics3, InternVL and their like hold an encoder and a projector of their own
beside a text model. Docked whole, theirs would be in the way: the layers would be looked for in their encoder, and an
adapter put onto it. So the text model alone is taken, with its head; what cannot be taken is refused.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.distributed import DistributedConfig
from transformers.initialization import no_init_weights

from opticnerve.common.hub import UNREADABLE, unreadable
from opticnerve.types import OpticNerveError

# Text models that transformers has no causal class for, and the model that they are as long as positions count in one
# dimension: a text's three rotary axes (M-RoPE) are equal, which is plain RoPE. A dock's positions are a text's always.
_PLAIN = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
# What of a text configuration belongs to its former place.
_FOREIGN = ("model_type", "architectures", "rope_scaling", "rope_parameters", "transformers_version", "_name_or_path")


def causal_config(name: str, config: PreTrainedConfig) -> Any:
    """The configuration of the causal language model in a checkpoint: `config`, or its text model's.

    Raises:
        OpticNerveError: there is none; the message says what the checkpoint is and what to name instead.
    """
    kind = config.model_type
    if kind.startswith("opticnerve"):
        raise OpticNerveError(
            f"{name!r} is a model of opticnerve already ({kind}), not a language model; name the language model that "
            "it was made of",
            kind="unsupported",
        )
    text = text_config_of(config)
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        raise OpticNerveError(
            f"{name!r} ({kind}) is an encoder with a decoder; opticnerve docks onto causal language models, such as "
            "Llama, Qwen or Mistral",
            kind="unsupported",
        )
    if text is config:
        foreign = [k.removesuffix("_config") for k in getattr(config, "sub_configs", {}) if _is_medium(k)]
        if foreign:
            raise OpticNerveError(
                f"{name!r} ({kind}) has {', '.join(foreign)} parts of its own, which its language model cannot be "
                "taken out of; name a language model alone",
                kind="unsupported",
            )
    elif text.model_type in _PLAIN:
        text = _plain(text)
    inside = "" if text is config else f"the text model of {name!r} ({kind}), {text.model_type}, "
    if type(text) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(text, "is_decoder", False):
        raise OpticNerveError(
            f"{inside or f'{name!r} ({kind}) '}reads in both directions and writes nothing; it is a text encoder, for "
            "`kind: dual_encoder` or `kind: classifier`; name a causal language model",
            kind="unsupported",
        )
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        seeing = any(hasattr(config, key) for key in ("patch_size", "vision_config", "num_channels"))
        where = "; its vision encoder goes under `image`" if seeing else ""
        raise OpticNerveError(
            f"{inside or f'{name!r} ({kind}) '}is no causal language model of transformers{where}; name one, such as "
            "Llama, Qwen or Mistral",
            kind="unsupported",
        )
    return text


def _is_medium(key: str) -> bool:
    return any(word in key for word in ("vision", "image", "audio", "speech", "vq", "text"))


def text_config_of(config: PreTrainedConfig) -> Any:
    """Of a composite configuration the text model's, of any other itself."""
    try:
        return config.get_text_config(decoder=True)
    except ValueError:  # several, none of which comes first
        return config


def _plain(text: PreTrainedConfig) -> Any:
    """The same text model under the family whose code it is."""
    kind = _PLAIN[text.model_type]
    known = AutoConfig.for_model(kind).to_dict()
    kept = {k: v for k, v in text.to_dict().items() if k in known and k not in _FOREIGN}
    rope = {
        k: v for k, v in (text.rope_parameters or {}).items() if k not in ("mrope_section", "mrope_interleaved", "type")
    }
    if rope.get("rope_type", "default") == "mrope":
        rope["rope_type"] = "default"
    return AutoConfig.for_model(kind, **kept, rope_parameters=rope)


def text_model(name: str, config: PreTrainedConfig, text_config: PreTrainedConfig, *, dtype: torch.dtype) -> Any:
    """The text model of a composite checkpoint as a causal language model of its own.

    Args:
        config: the checkpoint's. text_config: what `causal_config` made of it.

    Raises:
        OpticNerveError: weights are missing, or the two do not say the same of a text.
    """
    whole = _load_whole(name, config, dtype)
    model: Any = whole.get_decoder()
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)]
    if not isinstance(model, causal):  # BLIP-2 and Llama 4 keep such a one
        model = _with_head(name, whole, copy.deepcopy(text_config), dtype)
        _check_same(name, whole.eval(), model.eval())
    model.generation_config = whole.generation_config
    return model.eval()


def _with_head(name: str, whole: PreTrainedModel, text_config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """The causal language model of a composite's decoder and head; the tensors are theirs."""
    decoder, head = whole.get_decoder(), whole.get_output_embeddings()
    if head is None:
        raise OpticNerveError(
            f"{name!r} ({whole.config.model_type}) has no head for words; name a language model alone",
            kind="unsupported",
        )
    text_config.tie_word_embeddings = head.weight is decoder.get_input_embeddings().weight
    text_config.architectures = None
    with no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(text_config, dtype=dtype)
    state = {f"{model.base_model_prefix}.{n}": t for n, t in decoder.state_dict().items()}
    ours = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    state |= {f"{ours}.{n}": t for n, t in head.state_dict().items()}
    wanted = {n: t.shape for n, t in model.state_dict().items()}
    found = {n: t.shape for n, t in state.items()}
    if odd := sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n)):
        raise OpticNerveError(
            f"the text model of {name!r} ({whole.config.model_type}) has other tensors than {text_config.model_type}: "
            f"{', '.join(odd[:4])}; name a language model alone",
            kind="mismatch",
        )
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model


def _load_whole(name: str, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    written = (config.architectures or [""])[0]
    cls: Any = getattr(transformers, written, None) or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    if cls is None:
        raise OpticNerveError(
            f"transformers has no model {written!r} for {name!r}; name a language model alone", kind="unknown-name"
        )
    return load_weights(cls, name, name, dtype, left_over=True)


def load_weights(
    cls: type[Any], place: str, name: str, dtype: torch.dtype, *, left_over: bool = False,
    shared: DistributedConfig | None = None,
) -> Any:  # fmt: skip
    """transformers' `cls` with its weights. `place`: a folder, or a name that `cls` finds. `left_over`: the files may
    hold more than it has. `shared`: how the weights are shared out over processes, where they are."""
    options = {} if shared is None else {"distributed_config": shared}
    try:
        # Mismatched tensors are listed with the others, and refused.
        loaded: Any = cls.from_pretrained(
            place, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (*UNREADABLE, SafetensorError) as e:
        raise unreadable(f"the weights of {name!r}", e, "give a folder or hub model that holds them whole") from e
    model, report = loaded
    check_complete(name, {k: v for k, v in report.items() if not (left_over and k == "unexpected_keys")})
    return model


def check_complete(name: str, report: dict[str, Any]) -> None:
    """Refuse a language model that transformers would fill up with random weights, or leave some of its weights out.

    Raises:
        OpticNerveError: the message lists the tensors.
    """
    problems = {k: sorted(map(str, v)) for k, v in report.items() if k.endswith("_keys") and v}
    if problems:
        listing = "; ".join(f"{k.removesuffix('_keys')} {', '.join(v[:8])}" for k, v in problems.items())
        raise OpticNerveError(f"the weights of {name!r} are not those of its config.json: {listing}", kind="mismatch")


@torch.no_grad()
def _check_same(name: str, whole: PreTrainedModel, model: PreTrainedModel) -> None:
    """Whatever the composite does around its text model (a mask that looks ahead, another scale) would show here."""
    size = int(model.config.vocab_size)
    ids_BL = (torch.arange(8, device=model.device) * 7 + 3)[None] % size
    try:
        theirs = whole(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL), use_cache=False).logits.float()
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as e:
        raise OpticNerveError(
            f"{name!r} ({whole.config.model_type}) reads no text alone: {str(e)[:200]}", kind="unsupported"
        ) from e
    ours = model(input_ids=ids_BL, use_cache=False).logits.float()
    apart = float((theirs - ours).abs().max()) if theirs.shape == ours.shape else float("inf")
    if not apart <= 0.02 * float(theirs.std()):  # in bf16 the order of sums shows; another scale or mask shows more
        raise OpticNerveError(
            f"the text model of {name!r} ({whole.config.model_type}) does not say by itself what it says inside; name "
            "a language model alone",
            kind="unsupported",
        )
