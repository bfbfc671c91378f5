"""Text encoders by name, and references to the weights that models of two towers are made of."""

from __future__ import annotations

from typing import Any

from opticnerve.encoders.text import HFTextEncoder, text_encoders
from opticnerve.language.load import hub_files, load_language
from opticnerve.models.tower import check_options
from opticnerve.starter import weights as starter
from opticnerve.starter.cache import fingerprint
from opticnerve.types import OpticNerveError


def load_text_encoder(spec: dict[str, Any]) -> tuple[str, Any]:
    """The name of the weights and the text encoder that holds them, with its tokenizer."""
    options = dict(spec)
    kind, name = options.pop("type", "hf_text"), options.pop("name", None)
    if name is None:
        raise OpticNerveError("the text encoder needs a name: a hub name, a local folder, or starter/…")
    cls = text_encoders.get(kind)
    check_options("text encoder", kind, cls, options)
    language = starter.is_starter(name) and name in starter.LANGUAGES
    if cls is HFTextEncoder and (language or name.endswith(".gguf")):
        brain = load_language(name)
        encoder = cls.from_loaded(brain.model, brain.tokenizer, **options)
        encoder.files = list(brain.files)
        return name, encoder
    return name, cls.from_pretrained(name, **options)


def base_of(name: Any, encoder: Any) -> dict[str, Any]:
    """How the weights are called, and the hash of their files."""
    files = encoder.weight_files()
    if not files and isinstance(name, str) and not starter.is_starter(name):
        files = hub_files(name.removeprefix("hf-hub:"))
    return {"name": name, "sha256": fingerprint(files) if files else None}
