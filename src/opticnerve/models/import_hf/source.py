"""A checkpoint of transformers: its configuration, model and processor, and the reasons to refuse it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from huggingface_hub.errors import StrictDataclassError

from opticnerve.common import hub
from opticnerve.language.load import no_bars
from opticnerve.types import OpticNerveError


@dataclass
class Source:
    """What was read: `name` as the user wrote it, transformers' model and processor, and `notes` for the user."""

    name: str
    model: Any
    processor: Any
    notes: list[str]

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def image_token(self) -> str:
        """The word that stands for a picture in their prompts."""
        return str(self.processor.image_token)


def read_config(name: str, known: list[str]) -> Any:
    """The configuration alone.

    Raises:
        OpticNerveError: nothing there, or a kind of model that is not `known`; the message lists those that are.
    """
    folder = hub.fetch(name, weights=False)
    try:
        config = tf.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as e:
        raise OpticNerveError(f"{name} has no configuration that transformers can read: {hub.brief(e)}") from e
    if config.model_type == "opticnerve":
        raise OpticNerveError(f"{name} is a model of opticnerve already; nothing to import")
    if config.model_type not in known:
        raise OpticNerveError(f"{name} is a {config.model_type}; what can be imported: {', '.join(known)}")
    return config


def common_refusals(config: Any, model_class: str) -> list[str]:
    """Reasons that do not depend on the family."""
    reasons = []
    written = [a for a in (config.architectures or []) if a != model_class]
    if written:
        reasons.append(
            f"its weights are for {', '.join(written)}, not for transformers' {model_class} (the original LLaVA's "
            "format is another one; take the same model's transformers form, such as llava-hf/…)"
        )
    for part in (config, config.vision_config, config.text_config):
        if getattr(part, "quantization_config", None):
            reasons.append(f"the weights of {part.model_type} are quantised; import the unquantised checkpoint")
    if config.text_config.is_encoder_decoder:
        reasons.append(
            f"its language model is {config.text_config.model_type}, an encoder-decoder; opticnerve docks onto causal "
            "language models only"
        )
    return reasons


def read(name: str, model_class: str) -> Source:
    """Weights, in float32 so that no digit is lost, and processor.

    Raises:
        OpticNerveError: tensors are missing, unexpected or of another shape, or there is no processor.
    """
    cls, folder = getattr(tf, model_class), hub.fetch(name)
    with no_bars():
        loaded: Any = cls.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
        model, report = loaded
        problems = {k: sorted(map(str, v)) for k, v in report.items() if k.endswith("_keys") and v}
        if problems:
            listing = "; ".join(f"{k.replace('_', ' ')}: {', '.join(v[:12])}" for k, v in problems.items())
            raise OpticNerveError(f"the weights of {name} are not those of its config.json: {listing}")
        try:
            processor = tf.AutoProcessor.from_pretrained(folder)
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise OpticNerveError(f"{name} has no processor that transformers can read: {hub.brief(e)}") from e
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise OpticNerveError(
            f"{name} has no processor, only a {type(processor).__name__}; save the tokenizer and the image processor "
            "beside the weights"
        )
    return Source(name, model.eval(), processor, [])


def check_image_token(source: Source) -> int:
    """The placeholder's id, on which configuration and tokenizer must agree."""
    wanted = source.config.image_token_id
    found = source.processor.tokenizer.convert_tokens_to_ids(source.image_token)
    if wanted is None or wanted != found:
        raise OpticNerveError(
            f"{source.name}: config.json says that token {wanted} stands for a picture, the tokenizer's "
            f"{source.image_token} is {found}; save it again with a version of transformers that writes both alike"
        )
    return int(wanted)
