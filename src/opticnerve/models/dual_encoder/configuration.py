"""`DualEncoderConfig`: a vision encoder and a text encoder with one space for both, described without their weights."""

from __future__ import annotations

from typing import Any, Literal, get_args

from transformers import PreTrainedConfig

from opticnerve.models.adapted import AdaptedTowers
from opticnerve.types import OpticNerveError

Loss = Literal["clip", "siglip"]

# Where the temperature starts: CLIP's 1 / 0.07 (Radford et al. 2021, section 2.5), SigLIP's 10 and bias -10 (Zhai et
# al. 2023, section 3.2), as logarithms of the factor.
STARTS: dict[str, tuple[float, float]] = {"clip": (2.6592600769, 0.0), "siglip": (2.302585093, -10.0)}


class DualEncoderConfig(AdaptedTowers, PreTrainedConfig):
    """Configuration of a `DualEncoder`, by transformers' conventions.

    Args:
        image: `{"encoder": {"type": …, …}, "pooling": "mean" | "class_token" | "pooler", "projection": …}`; beside
            `type` (a registered encoder or a dotted path) stand the plain keywords that build it.
        text: `{"encoder": {"type": …, …}, "projection": …}`. A `projection` is one matrix, `{"bias": false}`, or None
            where the tower's own vector is the embedding. `lora` in either: `{"encoder": options of its adapter}`.
        projection_dim: width of the common space; None where no tower has a projection.
        loss: "clip" (softmax over the batch) or "siglip" (sigmoid of each pair).
        logit_scale_init_value, logit_bias_init_value: where the temperature starts; the loss's own by default.
    """

    model_type = "opticnerve_dual_encoder"

    def __init__(
        self,
        image: dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
        projection_dim: int | None = 512,
        loss: Loss = "clip",
        logit_scale_init_value: float | None = None,
        logit_bias_init_value: float | None = None,
        **kwargs: Any,
    ) -> None:
        if loss not in get_args(Loss):
            raise OpticNerveError(f"loss is one of {', '.join(get_args(Loss))}, not {loss!r}", kind="unknown-name")
        self.image, self.text, self.projection_dim, self.loss = image or {}, text or {}, projection_dim, loss
        scale, bias = STARTS[loss]
        self.logit_scale_init_value = scale if logit_scale_init_value is None else logit_scale_init_value
        self.logit_bias_init_value = bias if logit_bias_init_value is None else logit_bias_init_value
        super().__init__(**kwargs)
