"""`DualEncoder`: any vision encoder and any text encoder with one space for both, by transformers' conventions.

CLIP (Radford et al. 2021), SigLIP (Zhai et al. 2023) and locked-image tuning (Zhai et al. 2022, LiT) are this model
with other parts, another loss, and other parts frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from opticnerve import registry
from opticnerve.encoders.base import Encoder
from opticnerve.encoders.pooling import VisionPooling
from opticnerve.encoders.text import HFTextEncoder, text_encoders
from opticnerve.models.dual_encoder.configuration import DualEncoderConfig
from opticnerve.models.dual_encoder.parts import ImageTower, TextTower
from opticnerve.models.two_towers import TwoTowerModel
from opticnerve.models.vlm.tower import described
from opticnerve.recipe import DualSpec
from opticnerve.types import OpticNerveError

if TYPE_CHECKING:
    from opticnerve.data.collators.contrastive import PairBatch


@dataclass
class DualEncoderOutput(ModelOutput):
    """As transformers' `CLIPOutput`: `logits_per_image` (images, texts), `logits_per_text` its transpose, and the
    L2-normalised `image_embeds` (images, D) and `text_embeds` (texts, D), in float32."""

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None


class DualEncoder(TwoTowerModel):
    """A vision encoder (`image`) and a text encoder (`text`), each an `EmbeddingTower`, and the learned temperature.

    `logit_scale` is the logarithm of what cosines are multiplied by; `logit_bias`, SigLIP's alone, is added.
    """

    PARTS = DualSpec.PARTS
    WHOLE_PARTS = ("image.encoder.", "image.projection.", "text.encoder.", "text.projection.", "logit_")
    STARTS = {"temperature": ("logit_scale", "logit_bias")}  # noqa: RUF012

    config_class = DualEncoderConfig
    config: DualEncoderConfig
    _supports_flash_attn = True
    _supports_attention_backend = True

    def _assemble(self, vision_encoder: Encoder | None, reader: HFTextEncoder) -> None:
        """Towers and temperature as the configuration says, around two encoders."""
        if vision_encoder is None:
            raise OpticNerveError(
                "a dual encoder needs an image encoder; its configuration describes none", kind="missing-field"
            )
        config, size = self.config, self.config.projection_dim
        self.image = ImageTower(
            vision_encoder, size, config.image.get("projection"), config.image.get("pooling", "mean")
        )
        self.text = TextTower(reader, size, config.text.get("projection"))
        sizes = self.image.embedding_size, self.text.embedding_size
        if sizes[0] != sizes[1]:
            raise OpticNerveError(
                f"pictures become vectors of width {sizes[0]}, texts of width {sizes[1]}; give both a projection",
                kind="wrong-shape",
            )
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        bias = torch.tensor(float(config.logit_bias_init_value))
        self.logit_bias = nn.Parameter(bias) if config.loss == "siglip" else None

    @classmethod
    def from_parts(
        cls,
        image: Encoder,
        text: HFTextEncoder,
        *,
        pooling: VisionPooling = "mean",
        projection_dim: int | None = 512,
        image_projection: dict[str, Any] | bool = True,
        text_projection: dict[str, Any] | bool = True,
        **options: Any,
    ) -> DualEncoder:
        """A model around encoders that hold their weights already; projections and temperature are fresh.

        Args:
            image: a vision encoder. text: a text encoder, such as `HFTextEncoder`. pooling: of the vision encoder's
            tokens. image_projection, text_projection: `{"bias": …}`; True for a matrix without a bias, False for none.
            options: `loss`, `logit_scale_init_value`, `logit_bias_init_value`.
        """
        seen = {"encoder": described(registry.encoders, image), "projection": _keywords(image_projection)}
        read = {"encoder": described(text_encoders, text), "projection": _keywords(text_projection)}
        config = DualEncoderConfig({**seen, "pooling": pooling}, read, projection_dim, **options)
        made: DualEncoder = cls._around(config, image, text)
        return made

    # -- the flow -------------------------------------------------------------------------------------------------

    def get_image_features(self, pixel_values: Tensor | None = None, image_features: Tensor | None = None) -> Tensor:
        """Pictures in the common space, not normalised: (B, 3, H, W) → (B, D).

        `image_features` (B, width): what `image.encode` gave (a cache of a frozen vision encoder), instead of
        `pixel_values`.
        """
        if (pixel_values is None) == (image_features is None):
            raise ValueError("give exactly one of pixel_values and image_features")
        out: Tensor = self.image(pixel_values) if image_features is None else self.image.project(image_features)
        return out

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Texts in the common space, not normalised: token ids and mask (B, L) → (B, D)."""
        out: Tensor = self.text(input_ids, attention_mask)
        return out

    def embed(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """L2-normalised float32 vectors (B, D) of a batch's pictures and of its captions."""
        image_BD = self.get_image_features(batch.pixel_values, batch.image_features)
        text_BD = self.get_text_features(batch.input_ids, batch.attention_mask)
        return F.normalize(image_BD.float(), dim=1), F.normalize(text_BD.float(), dim=1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_loss: bool | None = None,
        image_features: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> DualEncoderOutput:
        """Logits of all pictures against all texts; with `return_loss` the mean contrastive loss of this batch alone.

        (Training goes by `objectives.contrastive`, which knows of other processes, micro-batches and duplicates.)
        """
        if input_ids is None:
            raise ValueError("give input_ids beside the pictures; for pictures alone there is get_image_features")
        image_BD = F.normalize(self.get_image_features(pixel_values, image_features).float(), dim=1)
        text_TD = F.normalize(self.get_text_features(input_ids, attention_mask).float(), dim=1)
        logits_TB = text_TD @ image_BD.T * self.logit_scale.float().exp()
        if self.logit_bias is not None:
            logits_TB = logits_TB + self.logit_bias.float()
        return DualEncoderOutput(
            loss=self._loss(logits_TB) if return_loss else None,
            logits_per_image=logits_TB.T,
            logits_per_text=logits_TB,
            text_embeds=text_TD,
            image_embeds=image_BD,
        )

    def _loss(self, logits_TB: Tensor) -> Tensor:
        texts, pictures = logits_TB.shape
        if texts != pictures:
            raise OpticNerveError(
                f"the loss wants pairs; got {pictures} pictures and {texts} texts", kind="wrong-shape"
            )
        if self.config.loss == "clip":
            return image_text_contrastive_loss(logits_TB)
        sign_TB = 2 * torch.eye(texts, device=logits_TB.device) - 1
        return -F.logsigmoid(sign_TB * logits_TB).sum(1).mean()


def _keywords(projection: dict[str, Any] | bool) -> dict[str, Any] | None:
    if isinstance(projection, dict):
        return projection
    return {"bias": False} if projection else None
