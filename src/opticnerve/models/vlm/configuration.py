"""`OpticNerveConfig`: a docked model, described without its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from opticnerve.models.adapted import adapters_of, with_adapter
from opticnerve.recipe import MODALITIES
from opticnerve.types import OpticNerveError

MAX_LAYERS = 10_000
# Of what opticnerve writes. It rises when an older opticnerve would load it wrong: one that knows no quantised bases
# would put what was trained beside the plain ones.
FORMAT, QUANTIZED_FORMAT = 1, 2


_wide: ContextVar[bool] = ContextVar("wide_vocabulary", default=False)


@contextmanager
def wide_vocabulary() -> Iterator[None]:
    """Within it, whoever asks a docked model's text configuration how wide logits are is told of placeholders, too:
    transformers' generation asks there. Else that number is the rows of the table, which others look for."""
    token = _wide.set(True)
    try:
        yield
    finally:
        _wide.reset(token)


class OpticNerveConfig(PreTrainedConfig):
    """Configuration of a docked model, by transformers' conventions.

    Args:
        text_config: the language model's own configuration (an object or a dict with `model_type`).
        towers: one entry per modality, such as
            `{"image": {"encoder": {"type": …, …}, "connector": {"type": …, …}, "fusion": {"type": …, …}}}`,
            the modalities being `image` and `audio`, an image's perhaps with `tiling`;
            beside `type` (a registered name or a dotted path) stand the plain keywords that build the part. `lora`
            beside them: options of the adapters on `encoder` and `fusion`, as for `add_lora`.
        image_token_id: the id that the processor writes where a picture stands. It may lie beyond the language model's
            vocabulary: it is replaced before the embedding table is asked.
        audio_token_id: the same for a sound.
        lora: options of the adapter on the language model, as for `add_lora`; None where there is none.
        dock_format: the format that the folder was written in.

    Raises:
        OpticNerveError: a value of the wrong kind, or a format newer than this opticnerve knows.
    """

    model_type = "opticnerve"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}
    # Not saved. TRL looks here for the Auto class (of its reference model), as `transformers` has no such class.
    auto_map: ClassVar[dict[str, str]] = {"AutoModelForImageTextToText": "opticnerve.models"}

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        towers: dict[str, dict[str, Any]] | None = None,
        image_token_id: int | None = None,
        audio_token_id: int | None = None,
        lora: dict[str, Any] | None = None,
        dock_format: int = FORMAT,
        **kwargs: Any,
    ) -> None:
        check_format(dock_format, "config.json")
        self.dock_format = dock_format
        if isinstance(text_config, dict):
            _check_layers(text_config)
            text_config = dict(text_config)
            kind = text_config.pop("model_type", None)
            if not isinstance(kind, str):
                raise OpticNerveError(
                    f"config.json: text_config.model_type names no language model but {kind!r}", kind="unknown-name"
                )
            text_config = AutoConfig.for_model(kind, **text_config)
        elif text_config is None:
            text_config = AutoConfig.for_model("llama")
        self.text_config: PreTrainedConfig = text_config
        self.towers: dict[str, dict[str, Any]] = {} if towers is None else towers
        _check(self.towers, image_token_id, audio_token_id, lora)
        self.image_token_id = image_token_id
        self.audio_token_id = audio_token_id
        self.lora = lora
        kwargs.setdefault("tie_word_embeddings", bool(getattr(text_config, "tie_word_embeddings", False)))
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(key, getattr(text_config, key, None))
        super().__init__(**kwargs)

    @property
    def adapters(self) -> dict[str, dict[str, Any]]:
        """Options of our adapters, by the part that they stand in: `language`, `image.encoder`, `image.fusion`, …"""
        found = adapters_of(self.towers)
        return found if self.lora is None else {"language": self.lora, **found}

    def note_adapter(self, part: str, options: dict[str, Any] | None) -> None:
        """Remember an adapter of a part, or, with None, that there is none."""
        modality, _, half = part.partition(".")
        if not half:
            self.lora = options
            return
        self.towers = {**self.towers, modality: with_adapter(self.towers[modality], half, options)}

    def token_id(self, modality: str) -> int | None:
        """The placeholder's id of a modality; None where the model has no such tower."""
        return getattr(self, f"{modality}_token_id") if modality in self.towers else None

    @property
    def vocab_size(self) -> int:
        """How wide the logits are: the language model's vocabulary, and the placeholders beyond it."""
        ids = [i for m in self.towers if (i := self.token_id(m)) is not None]
        return max([int(self.text_config.vocab_size), *(i + 1 for i in ids)])

    @vocab_size.setter
    def vocab_size(self, rows: int) -> None:
        self.text_config.vocab_size = rows

    @property
    def vision_config(self) -> PreTrainedConfig:
        """Of the vision encoder, where it is a model of transformers: a copy, which others read its sizes from."""
        return self._encoder_config("image")

    @property
    def audio_config(self) -> PreTrainedConfig:
        """The same of the audio encoder."""
        return self._encoder_config("audio")

    def _encoder_config(self, modality: str) -> PreTrainedConfig:
        architecture = self.towers.get(modality, {}).get("encoder", {}).get("architecture")
        if not isinstance(architecture, dict) or "model_type" not in architecture:
            raise AttributeError(f"no {modality} encoder that is a model of transformers")
        options = {k: v for k, v in architecture.items() if k != "model_type"}
        return AutoConfig.for_model(architecture["model_type"], **options)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """The language model's configuration; within `wide_vocabulary` a copy whose vocabulary is `vocab_size`."""
        found = super().get_text_config(decoder, encoder)
        if _wide.get() and found is self.text_config and found.vocab_size != self.vocab_size:
            found = copy.copy(found)
            found.vocab_size = self.vocab_size
        return found

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds. The format is always there: what is left out would be read as the reader's own."""
        return {**super().to_diff_dict(), "dock_format": self.dock_format}


def check_format(found: object, where: str) -> None:
    """Refuse what a later opticnerve wrote.

    Raises:
        OpticNerveError: the format is newer, or no number.
    """
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise OpticNerveError(
            f"{where}: the format is a whole number from 1, not {str(found)[:80]!r}", kind="wrong-type"
        )
    if found > QUANTIZED_FORMAT:
        raise OpticNerveError(
            f"{where} is of format {found}, written by a newer opticnerve; this one reads formats up to "
            f"{QUANTIZED_FORMAT}: pip install -U opticnerve",
            kind="mismatch",
        )


def _check_layers(text_config: dict[str, Any]) -> None:
    """Some configurations of transformers write a list as long as the model is deep, before anything else is known."""
    for key, value in text_config.items():
        if isinstance(value, int) and "layer" in str(key) and value > MAX_LAYERS:
            raise OpticNerveError(
                f"config.json: text_config.{key} is {value:,}, more than {MAX_LAYERS:,}", kind="too-large"
            )


def _check(towers: object, image_token_id: object, audio_token_id: object, lora: object) -> None:
    if not isinstance(towers, dict) or set(towers) - set(MODALITIES):
        raise OpticNerveError(
            f"config.json: towers is a mapping of {' and '.join(MODALITIES)}, not {str(towers)[:80]}", kind="wrong-type"
        )
    for modality, spec in towers.items():
        for part in ("encoder", "connector", "fusion"):
            found = spec.get(part) if isinstance(spec, dict) else None
            if not isinstance(found, dict) or not isinstance(found.get("type"), str):
                raise OpticNerveError(
                    f"config.json: towers.{modality}.{part} is no mapping with a type", kind="wrong-type"
                )
        held = spec.get("lora") or {}
        if not isinstance(held, dict) or any(
            half not in ("encoder", "fusion") or not isinstance(o, dict) for half, o in held.items()
        ):
            raise OpticNerveError(
                f"config.json: towers.{modality}.lora is a mapping of encoder and fusion to options", kind="wrong-type"
            )
        if not isinstance(spec.get("tiling"), dict | None):
            raise OpticNerveError(f"config.json: towers.{modality}.tiling is no mapping", kind="wrong-type")
    for key, value in (("image_token_id", image_token_id), ("audio_token_id", audio_token_id)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise OpticNerveError(f"config.json: {key} is a whole number, not {str(value)[:80]!r}", kind="wrong-type")
    if not isinstance(lora, dict | None):
        raise OpticNerveError(f"config.json: lora is a mapping, not {str(lora)[:80]!r}", kind="wrong-type")
