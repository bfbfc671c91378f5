"""`OpticNerveConfig`: a docked model, described without its weights."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig


class OpticNerveConfig(PreTrainedConfig):
    """Configuration of a docked model, by transformers' conventions.

    Args:
        text_config: the language model's own configuration (an object or a dict with `model_type`).
        towers: one entry per modality, such as
            `{"image": {"encoder": {"type": …, …}, "connector": {"type": …, …}, "fusion": {"type": …, …}}}`,
            the modalities being `image` and `audio`, an image's perhaps with `tiling`;
            beside `type` (a registered name or a dotted path) stand the plain keywords that build the part.
        image_token_id: the id that the processor writes where a picture stands. It may lie beyond the language model's
            vocabulary: it is replaced before the embedding table is asked.
        audio_token_id: the same for a sound.
        lora: options of the adapter on the language model, as for `add_lora`; None where there is none.
    """

    model_type = "opticnerve"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        towers: dict[str, dict[str, Any]] | None = None,
        image_token_id: int | None = None,
        audio_token_id: int | None = None,
        lora: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = dict(text_config)
            text_config = AutoConfig.for_model(text_config.pop("model_type"), **text_config)
        elif text_config is None:
            text_config = AutoConfig.for_model("llama")
        self.text_config: PreTrainedConfig = text_config
        self.towers: dict[str, dict[str, Any]] = towers or {}
        self.image_token_id = image_token_id
        self.audio_token_id = audio_token_id
        self.lora = lora
        kwargs.setdefault("tie_word_embeddings", bool(getattr(text_config, "tie_word_embeddings", False)))
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(key, getattr(text_config, key, None))
        super().__init__(**kwargs)

    def token_id(self, modality: str) -> int | None:
        """The placeholder's id of a modality; None where the model has no such tower."""
        return getattr(self, f"{modality}_token_id") if modality in self.towers else None
