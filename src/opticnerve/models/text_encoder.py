"""What all builders need: a recipe's precision; and for models of two towers, text encoders by name and the dock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from opticnerve.encoders.text import HFTextEncoder, text_encoders
from opticnerve.language.load import load_language
from opticnerve.models.checkpoint.delta import encoder_name
from opticnerve.models.checkpoint.full import load_whole, save_whole
from opticnerve.models.vlm.tower import check_options
from opticnerve.recipe import Recipe
from opticnerve.starter import weights
from opticnerve.types import OpticNerveError


@dataclass
class TwoTowerDock:
    """A model of a vision encoder and a text encoder, its processor, and the references to the weights it was made
    of. A subclass is a `models.family.Family`."""

    SPEC: ClassVar[Any]
    MODEL: ClassVar[Any]
    PROCESSOR: ClassVar[Any]
    USE: ClassVar[str]
    BASELINE: ClassVar[bool]

    model: Any
    processor: Any
    bases: dict[str, Any]
    lora: dict[str, Any] | None = None

    def __iter__(self) -> Any:
        """So that `model, processor = dual(…)` reads as one expects."""
        return iter((self.model, self.processor))

    def save(self, folder: Path, trained: Iterable[str]) -> None:
        """A folder of its own, which the model's `from_pretrained` loads, and what it was made of."""
        save_whole(self.model, self.processor, folder, self.bases, trained)

    def load_stage(self, folder: Path) -> set[str]:
        """Bring the model to where a finished stage left it; returns the names of all parameters trained so far."""
        return load_whole(self.model, folder)

    @property
    def what(self) -> str:
        """Family and variant in a few words."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """The model's parts, for the card and for results.json."""
        free = all(weights.is_starter(str(b["name"])) for b in self.bases.values() if b)
        return {
            "kind": self.what,
            "encoder": encoder_name((self.bases.get("image") or {}).get("name"), "the pixels"),
            "text": str(self.bases["text"]["name"]),
            "modalities": ["image"],
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "license": "apache-2.0" if free else "other",
        }

    def headline(self) -> str:
        """One line on what is about to be trained, in rich's markup."""
        d = self.describe()
        return f"[bold]{d['encoder']}[/bold] with [bold]{d['text']}[/bold]: {d['kind']}"


def dtype_of(recipe: Recipe) -> torch.dtype:
    """Of the weights in memory, by the recipe's precision."""
    return torch.bfloat16 if recipe.precision == "bf16" else torch.float32


def load_text_encoder(spec: dict[str, Any]) -> tuple[str, Any]:
    """The name of the weights and the text encoder that holds them, with its tokenizer."""
    options = dict(spec)
    kind, name = options.pop("type", "hf_text"), options.pop("name", None)
    if name is None:
        raise OpticNerveError("the text encoder needs a name: a hub name, a local folder, or starter/…")
    cls = text_encoders.get(kind)
    check_options("text encoder", kind, cls, options)
    language = weights.is_starter(name) and name in weights.LANGUAGES
    if cls is HFTextEncoder and (language or name.endswith(".gguf")):
        language_part = load_language(name)
        encoder = cls.from_loaded(language_part.model, language_part.tokenizer, **options)
        encoder.files = list(language_part.files)
        return name, encoder
    return name, cls.from_pretrained(name, **options)
