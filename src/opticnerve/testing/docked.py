"""A tiny language model with a fusion wired into it, and prompts for the two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from opticnerve.fusion.base import Fusion
from opticnerve.testing.contract import stir
from opticnerve.types import Features

SOFT, WIDTH, LAYERS = 3, 32, 4  # soft tokens of a picture; the language model's width and layers
# Pictures of each row of the batch in hand: one, two, none. Each is followed by a word.
PICTURES = (1, 2, 0)


@dataclass
class Docked:
    """A fusion wired into a language model of its own."""

    part: Any
    language: Any
    unused: tuple[str, ...]
    rebuild: Callable[[], Fusion]

    @property
    def length(self) -> int:
        """Of every row: room for two pictures, and three words behind them."""
        return 4 + 2 * (self.part.placeholders(SOFT) + 1)

    def prompt(self, pictures: Sequence[int] = PICTURES) -> tuple[Tensor, Tensor, Features]:
        """Word ids (B, L), the mask of placeholders (B, L) and soft tokens, one row for each picture."""
        ids_BL = torch.randint(1, 50, (len(pictures), self.length))
        placeholder_BL = torch.zeros(len(pictures), self.length, dtype=torch.bool)
        each = self.part.placeholders(SOFT)
        for row, count in enumerate(pictures):
            for k in range(count):
                start = 1 + k * (each + 1)
                placeholder_BL[row, start : start + each] = True
        shown = sum(pictures)
        features = Features(torch.randn(shown, SOFT, WIDTH), torch.ones(shown, SOFT, dtype=torch.bool))
        return ids_BL, placeholder_BL, features

    def embed(self, ids_BL: Tensor, placeholder_BL: Tensor, features: Features) -> Tensor:
        return self.part.embed(self.language.get_input_embeddings()(ids_BL), placeholder_BL, features)

    def hidden(self, ids_BL: Tensor, placeholder_BL: Tensor, features: Features) -> Tensor:
        """The language model's last hidden states (B, L, D), as the docked model computes them."""
        embeds_BLD = self.embed(ids_BL, placeholder_BL, features)
        with self.part.seeing(self.part.see(placeholder_BL, features)):
            return self.language.model(inputs_embeds=embeds_BLD, use_cache=False).last_hidden_state


def dock(fusion: Fusion, rebuild: Callable[[], Fusion], unused: tuple[str, ...]) -> Docked:
    """The same language model for every fusion, frozen as in training."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = tf.LlamaConfig(
            vocab_size=50, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64,
        )  # fmt: skip
        language = tf.LlamaForCausalLM(config).eval()
        stir(language)
    language.requires_grad_(False)
    fusion.eval().start(language.get_input_embeddings())
    fusion.wire(language)
    return Docked(fusion, language, unused, rebuild)


def elsewhere(d: Docked, to: Any) -> Docked:
    """The same weights elsewhere, wired anew."""
    made = dock(d.rebuild(), d.rebuild, d.unused)
    made.part.load_state_dict(d.part.state_dict())
    made.part.to(to)
    made.language.to(to)
    return made
