"""Soft tokens take the places of placeholders in the text: LLaVA's and BLIP-2's way into the language model."""

from __future__ import annotations

from torch import Tensor

from opticnerve.fusion.base import Fusion, check_count
from opticnerve.types import Features


class Splice(Fusion):
    """Soft tokens in the text: written over the embeddings at the placeholder positions, in order.

    It has no weights of its own, and only checks: the processor alone decides how many placeholders there are.
    Source: Liu et al. 2023, Visual Instruction Tuning, section 4.1.

    Args: language_size, language_layers: see `Fusion`.
    """

    def placeholders(self, num_tokens: int) -> int:
        return num_tokens

    def embed(self, embeds_BLD: Tensor, placeholder_BL: Tensor, features: Features) -> Tensor:
        soft_MD = features.tokens_BND[features.mask_BN].to(embeds_BLD.dtype)
        check_count(int(placeholder_BL.sum()), soft_MD.shape[0])
        return embeds_BLD.masked_scatter(placeholder_BL.unsqueeze(-1), soft_MD)
