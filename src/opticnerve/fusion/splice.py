"""Soft tokens take the places of placeholders in the text: LLaVA's and BLIP-2's way into the language model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from opticnerve.types import Features


class Splice(nn.Module):
    """Writes connected features over the embeddings at the placeholder positions, in order.

    It has no weights of its own, and only checks: the processor alone decides how many placeholders there are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.options: dict[str, Any] = {}

    def forward(self, embeds_BLD: Tensor, placeholder_BL: Tensor, features: Features) -> Tensor:
        """Embeddings (B, L, D), a bool mask of placeholders (B, L), soft tokens → embeddings with the picture in them.

        Raises:
            ValueError: the number of placeholders is not the number of soft tokens; the message has both.
        """
        soft_MD = features.tokens_BND[features.mask_BN].to(embeds_BLD.dtype)
        wanted = int(placeholder_BL.sum())
        if wanted != soft_MD.shape[0]:
            raise ValueError(
                f"{wanted} image placeholders in the text, but {soft_MD.shape[0]} visual tokens from the pictures; "
                f"let the processor write the placeholders, and never truncate after it has"
            )
        return embeds_BLD.masked_scatter(placeholder_BL.unsqueeze(-1), soft_MD)
