"""Where a language model's decoder layers are, how much it reads, and whether it takes embeddings for words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from opticnerve.encoders.base import inputs_of
from opticnerve.types import OpticNerveError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decoder_layers(language_model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The layers from input to output, and the name of their list within the model; ("", []) where there is none.

    Of the lists of modules that lie in no other list (experts, heads), the one with as many entries as the
    configuration counts layers, else the longest.
    """
    found: dict[str, list[nn.Module]] = {}
    for name, module in language_model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = list(module)
    count = getattr(getattr(language_model, "config", None), "num_hidden_layers", None)
    fitting = {n: layers for n, layers in found.items() if len(layers) == count} or found
    return max(fitting.items(), key=lambda item: len(item[1]), default=("", []))


def context_length(config: Any) -> int | None:
    """How many tokens a language model takes, if its configuration says so."""
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    for key in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length"):
        if isinstance(found := getattr(config, key, None), int) and found > 0:
            return found
    return None


@torch.no_grad()
def check_takes_embeddings(language_model: PreTrainedModel, name: str) -> None:
    """Refuse a language model whose layers get something else from words' embeddings than from the words.

    Falcon-H1 multiplies what it looked up itself, Gemma 3n looks every word up once more for each layer: beside a
    picture, where words come as embeddings, all of them would be others than in a text. Costs two look-ups.

    Raises:
        OpticNerveError: as above, or the model takes no embeddings at all.
    """
    ids_BL = torch.arange(4, device=language_model.device)[None]
    family = language_model.config.model_type
    try:
        by_ids = _entering(language_model, input_ids=ids_BL)
        embeds_BLD = language_model.get_input_embeddings()(ids_BL)
        given = _entering(language_model, inputs_embeds=embeds_BLD)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as e:
        raise OpticNerveError(
            f"{name!r} ({family}) takes no embeddings in place of words: {str(e)[:200] or type(e).__name__}; choose "
            "another language model",
            kind="unsupported",
        ) from e
    if len(by_ids) != len(given) or any(not torch.equal(a, b) for a, b in zip(by_ids, given, strict=True)):
        raise OpticNerveError(
            f"{name!r} ({family}) makes something else of its words' embeddings than of the words themselves, so that "
            "text beside a picture would be misread; choose another language model",
            kind="unsupported",
        )


def _entering(language_model: PreTrainedModel, **inputs: Tensor) -> list[Tensor]:
    """The numbers that the first layer is given; all that the model gives where there is no list of layers."""
    found: list[Any] = []
    first = decoder_layers(language_model)[1][:1]
    given = inputs_of(first, lambda: found.append(language_model(**inputs, use_cache=False).logits))
    return list(_floats([given, found]))


def _floats(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _floats(inner)
