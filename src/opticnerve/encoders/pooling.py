"""From a vision encoder's tokens to one vector a picture: what contrastive learning compares.

`mean` of the tokens (as CNNs and SigLIP's predecessors in big_vision do), the `class_token` (Dosovitskiy et al. 2021,
ViT, section 3.1), or the wrapped model's own `pooler`: CLIP's class token behind its last norm, SigLIP's attention head
(Zhai et al. 2023; Lee et al. 2019, Set Transformer, section 3.2), timm's `forward_head`.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor
from transformers import PreTrainedModel

from opticnerve.encoders.base import Encoder
from opticnerve.types import Features, OpticNerveError

VisionPooling = Literal["mean", "class_token", "pooler"]


def pool(encoder: Encoder, pixel_values: Tensor, how: VisionPooling) -> Tensor:
    """Pixels (B, 3, H, W) → one vector a picture, (B, D).

    Raises:
        OpticNerveError: the encoder has no class token, or the wrapped model no pooler.
    """
    if how == "pooler":
        return _own_pooler(encoder, pixel_values)
    features: Features = encoder(pixel_values)
    if how == "class_token":
        return features.tokens_BND[:, 0]
    weight_BN1 = features.mask_BN.unsqueeze(2).to(features.tokens_BND.dtype)
    return (features.tokens_BND * weight_BN1).sum(1) / weight_BN1.sum(1)


def check_pooling(encoder: Encoder, how: str) -> None:
    """Raise an `OpticNerveError` where this encoder cannot be pooled like that; the message names the remedy."""
    if how not in get_args(VisionPooling):
        raise OpticNerveError(
            f"image pooling is one of {', '.join(get_args(VisionPooling))}, not {how!r}", kind="unknown-name"
        )
    model = getattr(encoder, "model", None)
    if how == "class_token":
        prefix = getattr(encoder, "prefix_tokens", None) or getattr(model, "num_prefix_tokens", 0)
        if not prefix or encoder.options.get("class_token") != "keep":
            why = "has none" if not prefix else "leaves it out: add class_token: keep to it"
            raise OpticNerveError(
                f"pooling: class_token needs an encoder with a class token; {_name(encoder)} {why}", kind="unsupported"
            )
    if how == "pooler":
        if not hasattr(model, "forward_head") and not isinstance(model, PreTrainedModel):
            raise OpticNerveError(f"{_name(encoder)} has no pooler of its own; use pooling: mean", kind="unsupported")
        if encoder.options.get("layer", "last") != "last":
            raise OpticNerveError(
                f"pooling: pooler works on the last layer, but the encoder is cut at layer "
                f"{encoder.options['layer']!r}; leave layer out, or use pooling: mean",
                kind="conflict",
            )


def wake_pooler(encoder: Encoder) -> None:
    """From now on the wrapped model pools, whose encoder, if it is `hf_vision`, has SigLIP's attention head off."""
    model: Any = encoder.model
    if hasattr(model, "use_head"):
        model.use_head = hasattr(model, "head")


def pooled_size(encoder: Encoder, how: VisionPooling) -> int:
    """Width of the pooled vector; some of timm's heads change it (MobileNetV3 widens it behind its pooling)."""
    model: Any = getattr(encoder, "model", None)
    return int(model.head_hidden_size) if how == "pooler" and hasattr(model, "forward_head") else encoder.hidden_size


def _own_pooler(encoder: Encoder, pixel_values: Tensor) -> Tensor:
    model: Any = encoder.model
    if hasattr(model, "forward_head"):
        pooled_BD: Tensor = model.forward_head(model.forward_features(pixel_values), pre_logits=True)
        return pooled_BD
    # The encoder alone knows what inputs its model wants: run it, and catch what the model says on the way.
    said: list[Any] = []
    handle = model.register_forward_hook(lambda _module, _inputs, out: said.append(out))
    try:
        encoder(pixel_values)
    finally:
        handle.remove()
    (out,) = said
    if getattr(out, "pooler_output", None) is None:
        raise OpticNerveError(f"{_name(encoder)} has no pooler of its own; use pooling: mean", kind="unsupported")
    pooler_output: Tensor = out.pooler_output
    return pooler_output


def _name(encoder: Encoder) -> str:
    return type(getattr(encoder, "model", encoder)).__name__
