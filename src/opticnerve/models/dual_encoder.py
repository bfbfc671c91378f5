"""`DualEncoder`: any eye and any text encoder with one space for both, by transformers' conventions.

CLIP (Radford et al. 2021), SigLIP (Zhai et al. 2023) and locked-image tuning (Zhai et al. 2022, LiT) are this model
with other parts, another loss, and other parts frozen.
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from opticnerve import registry
from opticnerve.encoders.base import Encoder, last_blocks
from opticnerve.encoders.pooling import EyePooling
from opticnerve.encoders.text import text_encoders
from opticnerve.models.dual_configuration import DualEncoderConfig
from opticnerve.models.dual_towers import ImageTower, TextTower
from opticnerve.models.tower import make, type_name
from opticnerve.models.whole import restore_tables
from opticnerve.types import OpticNerveError

PARTS = (
    "image.encoder", "image.encoder.last(N)", "image.projection", "text.encoder", "text.encoder.last(N)",
    "text.projection", "temperature",
)  # fmt: skip

# `PreTrainedModel.from_pretrained` keeps `trust_remote_code` to itself; the constructor needs it for dotted paths.
_trusted: ContextVar[bool] = ContextVar("trust_remote_code", default=False)


@dataclass
class DualEncoderOutput(ModelOutput):
    """As transformers' `CLIPOutput`: `logits_per_image` (images, texts), `logits_per_text` its transpose, and the
    L2-normalised `image_embeds` (images, D) and `text_embeds` (texts, D), in float32."""

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None


class DualEncoder(PreTrainedModel):
    """An eye (`image`) and a text encoder (`text`), each an `EmbeddingTower`, and the learned temperature.

    `logit_scale` is the logarithm of what cosines are multiplied by; `logit_bias`, SigLIP's alone, is added.
    """

    WHOLES = ("image.encoder.", "image.projection.", "text.encoder.", "text.projection.", "logit_")

    config_class = DualEncoderConfig
    config: DualEncoderConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # type: ignore[assignment]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: DualEncoderConfig, *, trust_remote_code: bool = False) -> None:
        super().__init__(config)
        trusted = trust_remote_code or _trusted.get()
        self._assemble(
            make(registry.encoders, config.image["encoder"], trusted),
            make(text_encoders, config.text["encoder"], trusted),
        )
        self.post_init()

    def _assemble(self, eye: Encoder, reader: Any) -> None:
        """Towers and temperature as the configuration says, around two encoders."""
        config, size = self.config, self.config.projection_dim
        self.image = ImageTower(eye, size, config.image.get("projection"), config.image.get("pooling", "mean"))
        self.text = TextTower(reader, size, config.text.get("projection"))
        sizes = self.image.embedding_size, self.text.embedding_size
        if sizes[0] != sizes[1]:
            raise OpticNerveError(
                f"pictures become vectors of width {sizes[0]}, texts of width {sizes[1]}; give both a projection"
            )
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.logit_bias = (
            nn.Parameter(torch.tensor(float(config.logit_bias_init_value))) if config.loss == "siglip" else None
        )

    @classmethod
    def from_parts(
        cls,
        image: Encoder,
        text: Any,
        *,
        pooling: EyePooling = "mean",
        projection_dim: int | None = 512,
        image_projection: dict[str, Any] | bool = True,
        text_projection: dict[str, Any] | bool = True,
        **options: Any,
    ) -> DualEncoder:
        """A model around encoders that hold their weights already; projections and temperature are fresh.

        Args:
            image: an eye. text: a text encoder, such as `HFTextEncoder`. pooling: of the eye's tokens.
            image_projection, text_projection: `{"bias": …}`; True for a matrix without a bias, False for none.
            options: `loss`, `logit_scale_init_value`, `logit_bias_init_value`.
        """
        config = DualEncoderConfig(
            image={
                "encoder": {"type": type_name(registry.encoders, image), **image.options},
                "pooling": pooling, "projection": _keywords(image_projection),
            },
            text={
                "encoder": {"type": type_name(text_encoders, text), **text.options},
                "projection": _keywords(text_projection),
            },
            projection_dim=projection_dim, **options,
        )  # fmt: skip
        model = cls.__new__(cls)
        PreTrainedModel.__init__(model, config)
        model._assemble(image, text)
        # post_init would draw new random weights for parts that have theirs already; only its bookkeeping is wanted.
        model.all_tied_weights_keys = {}
        model.config.dtype = next(model.parameters()).dtype
        model.config.architectures = [cls.__name__]
        return model.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a folder of `save_pretrained` or a hub name.

        Every tensor is accounted for: missing, unexpected and mismatched ones are an error that lists them. Parts under
        dotted paths (code from outside opticnerve) are run with `trust_remote_code=True` only.
        """
        wants_report = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # so that they are listed below with the others, and refused
        token = _trusted.set(bool(kwargs.get("trust_remote_code", False)))
        try:
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        finally:
            _trusted.reset(token)
        model, report = loaded
        problems = {k: sorted(map(str, v)) for k, v in report.items() if k.endswith("_keys") and v}
        if problems:
            listing = "; ".join(f"{k.replace('_', ' ')}: {', '.join(v[:12])}" for k, v in problems.items())
            raise OpticNerveError(
                f"the weights in {pretrained_model_name_or_path} do not fit its config.json: {listing}"
            )
        restore_tables(model.image.encoder)
        return (model, report) if wants_report else model

    def _init_weights(self, module: nn.Module) -> None:
        """Each part draws its own first weights when it is built."""

    # -- the flow -------------------------------------------------------------------------------------------------

    def get_image_features(self, pixel_values: Tensor | None = None, image_features: Tensor | None = None) -> Tensor:
        """Pictures in the common space, not normalised: (B, 3, H, W) → (B, D).

        `image_features` (B, width): what `image.encode` gave (a cache of a frozen eye), instead of `pixel_values`.
        """
        if (pixel_values is None) == (image_features is None):
            raise ValueError("give exactly one of pixel_values and image_features")
        return self.image(pixel_values) if image_features is None else self.image.project(image_features)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Texts in the common space, not normalised: token ids and mask (B, L) → (B, D)."""
        return self.text(input_ids, attention_mask)

    def embed(self, batch: Any) -> tuple[Tensor, Tensor]:
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
            raise OpticNerveError(f"the loss wants pairs; got {pictures} pictures and {texts} texts")
        if self.config.loss == "clip":
            return image_text_contrastive_loss(logits_TB)
        sign_TB = 2 * torch.eye(texts, device=logits_TB.device) - 1
        return -F.logsigmoid(sign_TB * logits_TB).sum(1).mean()

    # -- training -------------------------------------------------------------------------------------------------

    def part_parameters(self, part: str) -> dict[str, nn.Parameter]:
        """Full name → parameter of one of `PARTS`, the words that a stage uses.

        Raises:
            OpticNerveError: no such part, or one without parameters in this model.
        """
        found: dict[str, nn.Parameter] = {}
        if match := re.fullmatch(r"(image|text)\.encoder\.last\((\d+)\)", part):
            blocks = last_blocks(getattr(self, match[1]).encoder, int(match[2]))
            chosen = {id(p) for block in blocks for p in block.parameters()}
            found = {n: p for n, p in self.named_parameters() if id(p) in chosen}
        elif part == "temperature":
            found = {n: p for n, p in self.named_parameters() if n in ("logit_scale", "logit_bias")}
        elif part in PARTS:
            found = {n: p for n, p in self.named_parameters() if n.startswith(part + ".")}
        else:
            raise OpticNerveError(f"a DualEncoder has no part {part!r}; its parts: {', '.join(PARTS)}")
        if not found:
            raise OpticNerveError(f"{part} has no parameters in this model")
        return found


def _keywords(projection: dict[str, Any] | bool) -> dict[str, Any] | None:
    if isinstance(projection, dict):
        return projection
    return {"bias": False} if projection else None
