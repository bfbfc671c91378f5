"""The two towers of a `DualEncoder`: an encoder, one vector of what it gives, and that vector in the common space."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from opticnerve.encoders.base import Encoder
from opticnerve.encoders.pooling import VisionPooling, check_pooling, pool, pooled_size, wake_pooler
from opticnerve.encoders.text import HFTextEncoder
from opticnerve.models.vlm.tower import placed_like
from opticnerve.types import OpticNerveError


class EmbeddingTower(nn.Module):
    """An encoder whose output becomes one vector, and that vector's projection: one matrix or nothing.

    `encode(…)` gives the encoder's vector (B, width), what a cache of a frozen encoder holds; `project` takes it into
    the common space; calling the tower does both.
    """

    def __init__(self, encoder: nn.Module, width: int, out_size: int | None, projection: dict[str, Any] | None) -> None:
        super().__init__()
        if projection is not None and out_size is None:
            raise OpticNerveError("a tower has a projection, but projection_dim is not given", kind="missing-field")
        self.encoder, self.projection, self.embedding_size = encoder, None, width
        if projection is not None:
            assert out_size is not None
            self.projection = nn.Linear(width, out_size, **{"bias": False, **projection})
            # A deviation of width^-½ keeps the vector's length (CLIP's initialisation).
            nn.init.normal_(self.projection.weight, std=width**-0.5)
            self.embedding_size = out_size

    def encode(self, *inputs: Any) -> Tensor:
        raise NotImplementedError

    def project(self, pooled_BD: Tensor) -> Tensor:
        if self.projection is None:
            return pooled_BD
        out: Tensor = self.projection(pooled_BD.to(self.projection.weight.device, self.projection.weight.dtype))
        return out

    def forward(self, *inputs: Any) -> Tensor:
        return self.project(self.encode(*inputs))


class ImageTower(EmbeddingTower):
    """A vision encoder of the registry, pooled as `encoders.pooling` says."""

    encoder: Encoder

    def __init__(
        self, encoder: Encoder, out_size: int | None, projection: dict[str, Any] | None, pooling: VisionPooling
    ) -> None:
        if encoder.modality != "image":
            raise OpticNerveError(
                f"the image encoder of a DualEncoder must see; {type(encoder).__name__} hears", kind="unsupported"
            )
        check_pooling(encoder, pooling)
        if pooling == "pooler":
            wake_pooler(encoder)
        super().__init__(encoder, pooled_size(encoder, pooling), out_size, projection)
        self.pooling = pooling

    def encode(self, pixel_values: Tensor) -> Tensor:
        return pool(self.encoder, pixel_values.to(placed_like(self.encoder, otherwise=pixel_values)), self.pooling)


class TextTower(EmbeddingTower):
    """A text encoder; it pools by itself."""

    def __init__(self, encoder: HFTextEncoder, out_size: int | None, projection: dict[str, Any] | None) -> None:
        super().__init__(encoder, encoder.hidden_size, out_size, projection)

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.encoder(input_ids, attention_mask)
        return out
