"""CLIP-ViT, SigLIP, DINOv2, ViT and their like from transformers as an eye.

The wrapped model is transformers' own, untouched: feature selection follows LLaVA
(`LlavaModel.get_image_features`: a hidden layer, with or without the class token).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoImageProcessor, PreTrainedConfig, PreTrainedModel

from opticnerve.encoders.base import Encoder, make_image_processor
from opticnerve.starter.cache import weight_files
from opticnerve.types import Features, OpticNerveError

Layer = int | list[int] | Literal["last"]


class HFVisionEncoder(Encoder):
    """A vision model of transformers, cut at a hidden layer.

    Args:
        architecture: the vision model's configuration as a dict with `model_type` (`clip_vision_model`,
            `siglip_vision_model`, `dinov2`, `vit`, …).
        layer: "last" for the model's last hidden state (after its final norm), a whole number for an entry of
            `hidden_states` (-2 in LLaVA-1.5), or a list of them, joined along the width.
        class_token: "drop" leaves out class and register tokens, "keep" keeps them first.
        image_size: side of the square input; other than the model's own interpolates its position embeddings.
        fit, mean, std: picture preparation where the checkpoint brings none of its own.
    """

    def __init__(
        self,
        *,
        architecture: dict[str, Any],
        layer: Layer = "last",
        class_token: Literal["drop", "keep"] = "drop",
        image_size: int | None = None,
        fit: str = "squash",
        mean: list[float] | None = None,
        std: list[float] | None = None,
        _model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__()
        if class_token not in ("drop", "keep"):
            raise OpticNerveError(f"class_token is 'drop' or 'keep', not {class_token!r}")
        config = _config_from_dict(architecture)
        self.layer, self.class_token, self.fit = layer, class_token, fit
        self.native_size = int(config.image_size)
        self.image_size = image_size or self.native_size
        self.mean, self.std = list(mean or [0.5] * 3), list(std or [0.5] * 3)
        self.model = _model if _model is not None else _model_class(config)(config)
        self.options = {
            "architecture": {k: v for k, v in config.to_dict().items() if k != "_name_or_path"},
            "layer": layer, "class_token": class_token,
            "image_size": self.image_size, "fit": fit, "mean": self.mean, "std": self.std,
        }  # fmt: skip
        grid = (self.image_size // int(config.patch_size)) ** 2
        with torch.device("meta"):
            shadow = _model_class(config)(config).eval()
            shape = self._select(shadow, torch.empty(1, 3, self.image_size, self.image_size)).shape
        self.prefix_tokens = int(shape[1]) - grid
        self.num_tokens = grid if class_token == "drop" else int(shape[1])
        self.hidden_size = int(shape[2])

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> HFVisionEncoder:
        """`name`: hub name or local folder; of a two-tower model (CLIP, SigLIP) the vision tower is taken."""
        config = AutoConfig.from_pretrained(name)
        config = getattr(config, "vision_config", config)
        if not hasattr(config, "patch_size") or not hasattr(config, "image_size"):
            raise OpticNerveError(f"{name!r} ({config.model_type}) is no vision transformer; for CNNs use type: timm")
        loaded: Any = _model_class(config).from_pretrained(name, config=config, output_loading_info=True)
        model, report = loaded
        if report["missing_keys"] or report["mismatched_keys"]:
            raise OpticNerveError(
                f"{name!r} lacks weights of its vision tower: missing {sorted(report['missing_keys'])[:8]}, "
                f"mismatched {sorted(map(str, report['mismatched_keys']))[:8]}"
            )
        try:
            own = AutoImageProcessor.from_pretrained(name)
        except OSError:
            own = None  # a bare folder of weights: the options say how pictures are prepared
        if own is not None:
            options.setdefault("mean", list(own.image_mean))
            options.setdefault("std", list(own.image_std))
            options.setdefault("fit", "crop" if getattr(own, "do_center_crop", False) else "squash")
        encoder = cls(architecture=config.to_dict(), _model=model, **options)
        folder = Path(name)
        if folder.is_dir():
            encoder.files = weight_files(folder)
        return encoder

    def forward(self, pixel_values: Tensor) -> Features:
        tokens_BND = self._select(self.model, pixel_values)
        if self.class_token == "drop":
            tokens_BND = tokens_BND[:, self.prefix_tokens :]
        return Features(tokens_BND, torch.ones(tokens_BND.shape[:2], dtype=torch.bool, device=tokens_BND.device))

    def _select(self, model: Any, pixel_values: Tensor) -> Tensor:
        # DINOv2 always interpolates; the others must be asked, and only when the size is not their own.
        other_size = self.image_size != self.native_size and model.config.model_type not in (
            "dinov2",
            "dinov2_with_registers",
        )
        extra = {"interpolate_pos_encoding": True} if other_size else {}
        if self.layer == "last":
            return model(pixel_values, **extra).last_hidden_state
        states = model(pixel_values, output_hidden_states=True, **extra).hidden_states
        layers = self.layer if isinstance(self.layer, list) else [self.layer]
        if not all(isinstance(i, int) and -len(states) <= i < len(states) for i in layers):
            raise OpticNerveError(f"layer {self.layer!r}: this encoder has hidden states 0 to {len(states) - 1}")
        return torch.cat([states[i] for i in layers], dim=-1)

    def image_processor(self) -> Any:
        return make_image_processor(size=self.image_size, mean=self.mean, std=self.std, fit=self.fit)

    def blocks(self) -> list[nn.Module]:
        """The longest ModuleList: the transformer's layers."""
        lists: list[Any] = [m for m in self.model.modules() if isinstance(m, nn.ModuleList)]
        if not lists:
            raise OpticNerveError(f"{type(self.model).__name__} has no list of layers; train `encoder` whole")
        return list(sorted(lists, key=len)[-1])


def _config_from_dict(architecture: dict[str, Any]) -> PreTrainedConfig:
    architecture = dict(architecture)
    model_type = architecture.pop("model_type", None)
    if model_type is None:
        raise OpticNerveError("hf_vision needs architecture.model_type, such as clip_vision_model or dinov2")
    return AutoConfig.for_model(model_type, **architecture)


def _model_class(config: PreTrainedConfig) -> Any:
    try:
        return MODEL_MAPPING[type(config)]
    except KeyError as e:
        raise OpticNerveError(f"transformers has no model for {type(config).__name__}") from e
