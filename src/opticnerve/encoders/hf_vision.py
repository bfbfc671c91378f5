"""CLIP-ViT, SigLIP, SigLIP 2, DINOv2, ViT and their like from transformers as a vision encoder.

The wrapped model is transformers' own, untouched: feature selection follows LLaVA
(`LlavaModel.get_image_features`: a hidden layer, with or without the class token).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from opticnerve.common import hub
from opticnerve.common.cache import weight_files
from opticnerve.common.hub import read_config
from opticnerve.encoders.base import (
    Encoder,
    all_real,
    config_from_dict,
    inputs_of,
    load_part,
    longest_list,
    model_class,
    plain_config,
)
from opticnerve.encoders.native import Grid, NativeLayout, by_shape, collect, cut_patches, of_pictures, real
from opticnerve.encoders.preparation import preparation
from opticnerve.types import Features, OpticNerveError

Layer = int | list[int] | Literal["last"]
ClassToken = Literal["drop", "keep", "drop_first"]

# Vision models that transformers has, but not in its table of AutoModel.
_UNLISTED = {"blip_2_vision_model": "Blip2VisionModel", "instructblip_vision_model": "InstructBlipVisionModel"}

# SigLIP 2 for any shape of picture (NaFlex): it takes rows of patches instead of a picture.
_FLEXIBLE = "siglip2_vision_model"

# Where whole models keep their vision encoder: CLIP and SigLIP, LLaVA (old and new names), BLIP-2, Idefics3 and
# SmolVLM.
_TOWER = {r"^(model\.)?vision_(model|tower)\.(vision_model\.)?": ""}

# These look at the values of a mask of patches to see whether one is needed. The meta device has no values, so there
# they get attention of a kind for which transformers makes no mask: no patch of ours is padding.
_LOOKS_AT_MASK = ("idefics3_vision", "smolvlm_vision")
AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)


class HFVisionEncoder(Encoder):
    """A vision transformer of transformers, cut at a hidden layer.

    Sources: Radford et al. 2021 (CLIP), Zhai et al. 2023 (SigLIP), Tschannen et al. 2025 (SigLIP 2), Oquab et al. 2023
    (DINOv2), Dosovitskiy et al. 2021 (ViT). The flexible (NaFlex) SigLIP 2 is given square pictures, too, cut into its
    patches here; SigLIP 2 of fixed resolution is a SigLIP to transformers.

    Args:
        architecture: the vision model's configuration as a dict with `model_type` (`clip_vision_model`,
            `siglip_vision_model`, `siglip2_vision_model`, `dinov2`, `vit`, `blip_2_vision_model`, …).
        layer: "last" for the model's last hidden state: behind its final norm, which all families have but CLIP, whose
            `post_layernorm` is for the pooled vector alone; a whole number for an entry of `hidden_states` (-2 in
            LLaVA-1.5), of which -1 is what the last block gives, before any final norm; or a list of such numbers,
            joined along the width.
        class_token: "drop" leaves out class and register tokens, "keep" keeps them first; "drop_first" leaves out the
            first token, whatever it is (a SigLIP behind LLaVA's "patch" selection, as TinyLLaVA trains it: what is left
            is no map of the picture).
        image_size: side of the square input; other than the model's own interpolates its position embeddings.
        fit: "native" shows pictures in their own shape, within a budget of patches (`NativeLayout`); class and register
            tokens are left out. SigLIP 2 NaFlex gets rows of patches with a mask; others get the pictures of one shape
            together, their position embeddings interpolated to it.
        min_patches, max_patches: the budget of `fit: native`; the checkpoint's own by default, else at most as many as
            the model was trained on. SigLIP 2's own processor has every picture fill it; with `min_patches: 1` small
            pictures keep their size.
        fit, crop_pct, mean, std, resample: picture preparation (see `make_image_processor`); the checkpoint's own by
            default, as `image_size` is. Where `fit` is given, the whole picture is fitted so: `crop_pct` is 1 then.
    """

    def __init__(
        self, *, architecture: dict[str, Any], layer: Layer = "last", class_token: ClassToken = "drop",
        image_size: int | None = None, fit: str = "squash", mean: list[float] | None = None,
        std: list[float] | None = None, resample: int = 3, crop_pct: float = 1.0, min_patches: int | None = None,
        max_patches: int | None = None, _model: PreTrainedModel | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if class_token not in get_args(ClassToken):
            known = ", ".join(map(repr, get_args(ClassToken)))
            raise OpticNerveError(f"class_token is one of {known}, not {class_token!r}", kind="unknown-name")
        config = config_from_dict(architecture, "hf_vision", "clip_vision_model or dinov2")
        self.layer, self.class_token = layer, class_token
        self.native_size, self.patch_size = _sizes(config)
        self.take_pictures(image_size or self.native_size, fit, mean, std, resample, crop_pct)
        budget = self.take_budget(fit, min_patches, max_patches, _usual_budget(config))
        if self.native is not None and (class_token != "drop" or self.image_size != self.native_size):
            raise OpticNerveError(
                "fit: native gives each picture's map of tokens and no other; leave out class_token and image_size",
                kind="conflict",
            )
        self.model = _model if _model is not None else _build(config)
        if hasattr(self.model, "use_head"):  # SigLIP's pooling, which takes as long as some layers: for `pooling` alone
            self.model.use_head = False
        self.options = {
            "architecture": plain_config(config),
            "layer": layer, "class_token": class_token, "image_size": self.image_size,
            "fit": fit, "mean": self.mean, "std": self.std, "resample": resample, "crop_pct": crop_pct,
            **budget,
        }  # fmt: skip
        self._been_through = False
        self._states = 0  # entries of `hidden_states`; the probe counts them
        tokens, self.hidden_size = self._probe(config)
        grid = (self.image_size // self.patch_size) ** 2 if self.native is None else self.native.max_tokens
        self.prefix_tokens = tokens - grid if self.native is None else 0
        if self.prefix_tokens < 0:
            raise OpticNerveError(
                f"{config.model_type} gives {tokens} tokens for {grid} patches ({self.image_size} px in patches of "
                f"{self.patch_size}): it is no plain vision transformer; try type: timm",
                kind="unsupported",
            )
        self._left_out = {"drop": self.prefix_tokens, "keep": 0, "drop_first": 1}[class_token]
        self.num_tokens = tokens - self._left_out

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> HFVisionEncoder:
        """`name`: hub name or local folder; of a model with more to it (CLIP, LLaVA, BLIP-2) the vision encoder is
        taken.

        Raises:
            OpticNerveError: there is no vision transformer in it, or weights of it are missing.
        """
        folder = hub.fetch(name)
        config = _vision_config(name)
        with hub.quiet():  # of all that is not the vision encoder; what is missing is told below
            model = load_part(
                model_class(config, _UNLISTED), folder, name, "vision tower", config=config, key_mapping=_TOWER
            )
        encoder = cls(architecture=config.to_dict(), _model=model, **{**_preparation(name, config, options), **options})
        encoder.files = weight_files(Path(folder))
        return encoder

    @classmethod
    def planned(cls, name: str, **options: Any) -> HFVisionEncoder:
        """The same shapes and picture preparation from the configurations alone."""
        with torch.device("cpu"):
            config = _vision_config(name)
            options = {**_preparation(name, config, options), **options}
        return cls(architecture=config.to_dict(), **options)

    @classmethod
    def loading_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        # Folders from before `crop_pct` were trained without it.
        return {"crop_pct": 1.0, **super().loading_options(options)}

    def forward(self, pixel_values: Tensor, grids: Sequence[Grid] = ()) -> Features:
        if self.native is not None:
            return self._of_shapes(self.model, pixel_values, grids)
        return all_real(self._tokens(self.model, pixel_values)[:, self._left_out :])

    def states(self, media: Tensor, **asked: bool) -> dict[str, Any]:
        if self.native is not None:
            raise OpticNerveError(
                f"{', '.join(k for k, v in asked.items() if v)}: of pictures in their own shape there is no one tensor",
                kind="unsupported",
            )
        out = self.model(**self._inputs(self.model, media), **asked)
        return {"hidden_states": out.get("hidden_states"), "attentions": out.get("attentions")}

    def _inputs(self, model: Any, pixel_values: Tensor) -> dict[str, Any]:
        if model.config.model_type == _FLEXIBLE:
            side = self.image_size // self.patch_size
            pixel_values = pixel_values[..., : side * self.patch_size, : side * self.patch_size]
            return self._flexible(cut_patches(pixel_values, self.patch_size), [(side, side)] * len(pixel_values))
        larger = (self.native is not None or self.image_size != self.native_size) and _can_be_asked_to_interpolate(
            model
        )
        return {"pixel_values": pixel_values, **({"interpolate_pos_encoding": True} if larger else {})}

    def _of_shapes(self, model: Any, patches_PE: Tensor, grids: Sequence[Grid]) -> Features:
        """Pictures of several shapes, none of which sees another."""
        if model.config.model_type == _FLEXIBLE:
            rows = of_pictures(patches_PE, grids)
            tokens_BND = self._select(model, self._flexible(pad_sequence(rows, batch_first=True), grids))
            return Features(tokens_BND, real([len(r) for r in rows], tokens_BND), tuple(grids))

        def see(pixels_BCHW: Tensor) -> Tensor:
            tokens_BND = self._tokens(model, pixels_BCHW)
            own = pixels_BCHW.shape[2] * pixels_BCHW.shape[3] // self.patch_size**2
            return tokens_BND[:, tokens_BND.shape[1] - own :]

        return collect(by_shape(patches_PE, grids, self.patch_size, see), grids)

    def _tokens(self, model: Any, pixel_values: Tensor) -> Tensor:
        tokens_BND = self._select(model, self._inputs(model, pixel_values))
        if model.config.model_type == "pixtral":  # all pictures in one row
            tokens_BND = tokens_BND.reshape(len(pixel_values), -1, tokens_BND.shape[-1])
        return tokens_BND

    def _select(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self.layer == "last":
            out: Tensor = model(**inputs).last_hidden_state
            return out
        layers = self.layer if isinstance(self.layer, list) else [self.layer]
        blocks = longest_list(model, "encoder")
        # An entry is what a block gets, the last one what comes out behind all. The first pass goes through all blocks,
        # for transformers sets itself up in it; a compiler sees by itself what is not used.
        if self._states == len(blocks) + 1 and self._been_through and not torch.compiler.is_compiling():
            places = [i % self._states for i in layers if isinstance(i, int)]
            if max(places) < len(blocks):
                # No further than what is read: behind LLaVA-1.5's last layer but one stands a twelfth of CLIP-ViT-B.
                wanted = sorted(set(places))
                given = inputs_of([blocks[i] for i in wanted], lambda: model(**inputs))
                found = {i: a[0] if a else k["hidden_states"] for i, (a, k) in zip(wanted, given, strict=True)}
                return torch.cat([found[i] for i in places], dim=-1)
        states = model(**inputs, output_hidden_states=True).hidden_states
        if not all(isinstance(i, int) and -len(states) <= i < len(states) for i in layers):
            raise OpticNerveError(
                f"layer {self.layer!r}: this encoder has hidden states 0 to {len(states) - 1}", kind="out-of-range"
            )
        if not torch.compiler.is_compiling():
            self._states, self._been_through = len(states), model is self.model
        return torch.cat([states[i] for i in layers], dim=-1)

    def _flexible(self, rows_BNE: Tensor, grids: Sequence[Grid]) -> dict[str, Any]:
        """What SigLIP 2 takes: rows of patches as `Siglip2ImageProcessor` cuts them, and the grids' heights and widths.

        Where no patch is padding no mask is needed: to transformers, None is a mask of ones.
        """
        lengths = [rows * columns for rows, columns in grids]
        padded = len(set(lengths)) > 1
        # The shapes are read as numbers, one by one.
        return {
            "pixel_values": rows_BNE, "pixel_attention_mask": real(lengths, rows_BNE) if padded else None,
            "spatial_shapes": torch.tensor(grids, device="cpu"),
        }  # fmt: skip

    def _probe(self, config: PreTrainedConfig) -> tuple[int, int]:
        """Tokens (class and register tokens too) and width, from a pass on the meta device: shapes, no arithmetic."""
        with torch.device("meta"):
            meta_model = _build(copy.deepcopy(config)).eval()
            try:
                if self.native is not None:
                    seen = self._tried(meta_model, self.native)
                    return self.native.max_tokens, int(seen.tokens_BND.shape[2])
                pixels = torch.empty(2, 3, self.image_size, self.image_size)
                shape = self._tokens(meta_model, pixels).shape
            except OpticNerveError:
                raise
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as e:
                # Each family says in its own way that it wants more than pixels, or cannot take this size.
                if self.native is not None:
                    raise OpticNerveError(
                        f"{config.model_type} takes no pictures in their own shape: {str(e).strip()}; leave out fit: "
                        "native, or take an encoder that does (docs/models.md)",
                        kind="unsupported",
                    ) from e
                raise OpticNerveError(
                    f"{config.model_type} takes no batch of square pictures of {self.image_size} px: "
                    f"{str(e).strip()}; its own size is {self.native_size} px",
                    kind="wrong-shape",
                ) from e
        if len(shape) != 3 or shape[0] != 2:
            raise OpticNerveError(
                f"{config.model_type} gives {tuple(shape)} for 2 pictures, not a row of tokens for each; "
                "try type: timm",
                kind="wrong-shape",
            )
        return int(shape[1]), int(shape[2])

    def _tried(self, model: Any, layout: NativeLayout) -> Features:
        """What it gives for an upright picture: one that swaps sides, or takes squares alone, shows it."""
        grid = layout.grid(4 * layout.patch_size * layout.multiple, layout.patch_size * layout.multiple)
        found = self._of_shapes(model, torch.empty(2 * grid[0] * grid[1], 3 * layout.patch_size**2), [grid] * 2)
        if found.tokens_BND.shape[1] != grid[0] * grid[1]:
            raise ValueError(f"{found.tokens_BND.shape[1]} tokens of {grid[0]} × {grid[1]} patches")
        return found

    def blocks(self) -> list[nn.Module]:
        return longest_list(self.model, "encoder")


def _vision_config(name: str) -> PreTrainedConfig:
    whole = read_config(name)
    if type(whole).__module__.startswith("opticnerve."):
        raise OpticNerveError(
            f"{name!r} is a model of opticnerve ({whole.model_type}); name the vision encoder it was made of",
            kind="unsupported",
        )
    config: PreTrainedConfig = getattr(whole, "vision_config", whole)
    if not hasattr(config, "patch_size") or not (hasattr(config, "image_size") or config.model_type == _FLEXIBLE):
        raise OpticNerveError(
            f"{name!r} ({config.model_type}) is no vision transformer; for CNNs use type: timm, for the towers "
            "of Qwen-VL type: qwen_vl",
            kind="unsupported",
        )
    return config


def _preparation(name: str, config: PreTrainedConfig, given: dict[str, Any]) -> dict[str, Any]:
    """How the checkpoint prepares pictures, as this encoder's options."""
    found = preparation(name, config.model_type, given)
    if found.get("image_size") == _sizes(config)[0]:
        found.pop("image_size")
    return found


def _usual_budget(config: PreTrainedConfig) -> NativeLayout:
    """Where a checkpoint says nothing: at most as many patches as the model was trained on."""
    size, patch = _sizes(config)
    most = max(1, (size // patch) ** 2)
    longest = size // patch if config.model_type == "pixtral" else None  # its own processor bounds the longest edge
    return NativeLayout(patch, most if config.model_type == _FLEXIBLE else 1, most, max_side=longest)


def _sizes(config: PreTrainedConfig) -> tuple[int, int]:
    """Side of the pictures that the model was trained on, and of its patches, in pixels."""
    patch = _side(config.patch_size, "patch_size")
    if config.model_type == _FLEXIBLE:  # it says how many patches its table of positions holds
        return isqrt(config.num_patches) * patch, patch
    return _side(config.image_size, "image_size"), patch


def _side(value: Any, key: str) -> int:
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        raise OpticNerveError(
            f"the model's {key} is {value}; only square pictures and patches are taken", kind="unsupported"
        )
    return int(sides.pop())


def _build(config: PreTrainedConfig) -> Any:
    """The model with random weights, on the default device."""
    model = model_class(config, _UNLISTED)(config)
    if config.model_type in _LOOKS_AT_MASK and next(model.parameters()).is_meta:
        model.set_attn_implementation("sdpa_without_mask")
    return model


def _can_be_asked_to_interpolate(model: nn.Module) -> bool:
    """DINO interpolates unasked; CLIP, SigLIP, ViT and BLIP must be asked, and only when the size is not their own."""
    return "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
