"""What a prompt becomes before the language model reads it: embeddings, and what its layers shall see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from opticnerve.language.lora import adapter_on


@dataclass
class Prompt:
    """`embeds_BLD`: text and soft tokens as one row; `seen`: by modality, what `Fusion.see` gave; `soft`: by modality,
    the soft tokens (images, N, D); `rows_B`: the rows that hold media, None where nobody asks."""

    embeds_BLD: Tensor | None = None
    seen: dict[str, Any] = field(default_factory=dict)
    soft: dict[str, Tensor] = field(default_factory=dict)
    rows_B: Tensor | None = None


@contextmanager
def multimodal_context(language_model: nn.Module, fusions: dict[str, Any], prompt: Prompt) -> Iterator[None]:
    """Within it, a forward pass of the language model sees the prompt's pictures and hears its sounds."""
    with ExitStack() as stack:
        for modality, fusion in fusions.items():
            stack.enter_context(fusion.seeing(prompt.seen.get(modality)))
        stack.enter_context(adapter_on(language_model, prompt.rows_B))
        yield


# A cache of keys and values carries along what later tokens must still see.
_ON_CACHE = "_opticnerve_seen"


def keep(cache: Any, seen: dict[str, Any]) -> None:
    """Write down what the tokens behind this prompt will see."""
    if cache is not None and any(s is not None for s in seen.values()):
        setattr(cache, _ON_CACHE, seen)


def kept(cache: Any) -> dict[str, Any]:
    """What an earlier forward pass with this cache wrote down."""
    return dict(getattr(cache, _ON_CACHE, None) or {})
