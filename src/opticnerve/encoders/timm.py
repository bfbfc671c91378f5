"""Any timm model as a vision encoder: the feature map of a CNN or the tokens of a ViT.

Source: timm's feature API, `forward_features` and `forward_intermediates`
(https://huggingface.co/docs/timm/feature_extraction).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opticnerve.common import hub
from opticnerve.common.cache import weight_files
from opticnerve.common.private_names import read_timm_config
from opticnerve.encoders.base import Encoder, all_real
from opticnerve.encoders.native import Grid, NativeLayout, by_shape, collect
from opticnerve.starter import weights as starter
from opticnerve.types import Features, OpticNerveError

Layer = int | Literal["last"] | list[int]


class TimmEncoder(Encoder):
    """A timm model, cut at a feature layer, its map or tokens laid out as a row of vectors.

    Args:
        name: timm's architecture name, such as `tf_efficientnet_lite0` or `vit_base_patch16_siglip_224`.
        layer: "last" takes `forward_features` (what the classifier would see); a whole number takes that intermediate
            map by `forward_intermediates`' indexing (-1 is the last stage or block); several are joined, channel behind
            channel, each cell of the coarsest with all that finer ones hold in its place.
        image_size: side of the square input in pixels; the model's own by default. With `fit: native`: of the squares
            that the model is built for; a picture has at most as many patches by default.
        class_token: "drop" leaves out class and register tokens, "keep" puts them first. CNNs have none.
        fit, crop_pct, mean, std, resample: picture preparation (see `make_image_processor`); by default what timm's
            `pretrained_cfg` says. Where `fit` is given, the whole picture is fitted so: `crop_pct` is 1 then.
        min_patches, max_patches: the budget of `fit: native` (see `NativeLayout`), for models that take any shape:
            CNNs, whose patches are the places of the map at `layer`, and ViTs with `dynamic_img_size` or NaFlex.
        model_args: further keywords for `timm.create_model` (they must be plain JSON values).
    """

    def __init__(
        self, *, name: str, layer: Layer = "last", image_size: int | None = None,
        class_token: Literal["drop", "keep"] = "drop", fit: str = "squash", mean: list[float] | None = None,
        std: list[float] | None = None, resample: int = 3, crop_pct: float = 1.0, min_patches: int | None = None,
        max_patches: int | None = None, model_args: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        model_args = dict(model_args or {})
        layers = layer if isinstance(layer, list) else [] if layer == "last" else [layer]
        if layer != "last" and not (layers and all(isinstance(n, int) for n in layers)):
            raise OpticNerveError(
                f"timm layer is 'last', a whole number or a list of them, not {layer!r}", kind="wrong-type"
            )
        if class_token not in ("drop", "keep"):
            raise OpticNerveError(f"class_token is 'drop' or 'keep', not {class_token!r}", kind="unknown-name")
        if class_token == "keep" and len(layers) > 1:
            raise OpticNerveError(f"class_token: keep goes with one layer, not with {layer}", kind="conflict")
        self.layer, self.layers, self.class_token = layer, layers, class_token
        self.model = _create(name, image_size, model_args, any_size=fit == "native")
        data = timm.data.resolve_model_data_config(self.model)
        size = image_size or int(data["input_size"][-1])
        self.take_pictures(size, fit, mean or data["mean"], std or data["std"], resample, crop_pct)
        self.options = {
            "name": name, "layer": layer, "image_size": self.image_size, "class_token": class_token, "fit": fit,
            "mean": self.mean, "std": self.std, "resample": resample, "crop_pct": crop_pct, "model_args": model_args,
        }  # fmt: skip
        self.num_tokens, self.hidden_size = self._probe(name, image_size, model_args)
        side = isqrt(self.num_tokens)
        self.options |= self.take_budget(fit, min_patches, max_patches, NativeLayout(size // side, 1, side**2))
        if self.native is not None:
            self._try_shapes(name, image_size, model_args)
            self.num_tokens = self.native.max_tokens

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> TimmEncoder:
        """`name`: a timm architecture (weights from the hub), `hf-hub:…`, `local-dir:…`, or a starter name."""
        encoder = cls.planned(name, **options)
        if starter.is_starter(name):
            vision_encoder = starter.vision_encoder(name)
            vision_encoder.load_into(encoder.model)
            encoder.files = [str(vision_encoder.file())]
            return encoder
        size = _size_args(encoder.model, encoder.options["image_size"])
        try:
            options = {**size, **encoder.options["model_args"]}
            options |= _any_size_args(encoder.model) if encoder.native is not None else {}
            with hub.errors(name):
                pretrained = timm.create_model(_local(name), pretrained=True, **options)
            encoder.model.load_state_dict(pretrained.state_dict())
        except RuntimeError as e:  # timm and torch list the missing, unexpected and mismatched tensors
            raise OpticNerveError(
                f"the weights of {name!r} are not those of its configuration: {e}", kind="mismatch"
            ) from e
        if ":" in name:
            encoder.files = weight_files(Path(_local(name).removeprefix("local-dir:")))
        else:
            encoder.files = _hub_files(pretrained)
        return encoder

    @classmethod
    def planned(cls, name: str, **options: Any) -> TimmEncoder:
        """The same module with random weights; of `hf-hub:…` and `local-dir:…` the configuration is read."""
        if starter.is_starter(name):
            vision_encoder = starter.vision_encoder(name)
            return cls(name=vision_encoder.architecture, **{**vision_encoder.options, **options})
        architecture, defaults = _look_up(name, options)
        model_args = {**defaults.pop("model_args", {}), **(options.pop("model_args", None) or {})}
        return cls(name=architecture, model_args=model_args, **{**defaults, **options})

    @classmethod
    def loading_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        # Folders from before these two were trained without them.
        return {"resample": 3, "crop_pct": 1.0, **super().loading_options(options)}

    def forward(self, pixel_values: Tensor, grids: Sequence[Grid] = ()) -> Features:
        if self.native is not None:
            return self._of_shapes(self.model, pixel_values, grids)
        # Convolutions are a quarter to a half faster on pixels that lie with their channels together.
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        return all_real(self._tokens(self.model, pixel_values))

    def _of_shapes(self, model: Any, patches_PE: Tensor, grids: Sequence[Grid]) -> Features:
        """Pictures of one shape go together."""
        assert self.native is not None
        rows = by_shape(patches_PE, grids, self.native.patch_size, lambda pixels: self._tokens(model, pixels))
        return collect(rows, grids)

    def _try_shapes(self, name: str, image_size: int | None, model_args: dict[str, Any]) -> None:
        """Refuse a model that gives no token for each patch of an upright picture, on the meta device."""
        layout = self.native
        assert layout is not None
        grid = (4, 2)
        with torch.device("meta"):
            meta_model = _create(name, image_size, model_args, any_size=True).eval()
            try:
                seen = self._of_shapes(meta_model, torch.empty(8, 3 * layout.patch_size**2), [grid])
                why = f"{seen.tokens_BND.shape[1]} tokens of 4 × 2 patches" if seen.tokens_BND.shape[1] != 8 else ""
            except (AttributeError, AssertionError, IndexError, NotImplementedError, RuntimeError, TypeError) as e:
                why = str(e).strip() or type(e).__name__
        if why or self.class_token == "keep" or layout.patch_size * isqrt(self.num_tokens) != self.image_size:
            raise OpticNerveError(
                f"timm model {name!r} (layer {self.layer!r}, class_token: {self.class_token}) takes no pictures in "
                f"their own shape: {why or 'its tokens are no map of patches'}; leave out fit: native",
                kind="unsupported",
            )

    def _tokens(self, model: Any, pixel_values: Tensor) -> Tensor:
        prefix = int(getattr(model, "num_prefix_tokens", 0) or 0)
        if self.layer == "last":
            out = model.forward_features(pixel_values)
            if not isinstance(out, Tensor):
                raise OpticNerveError(
                    f"its forward_features gives several maps ({type(out).__name__}); use layer: -1", kind="unsupported"
                )
            if out.ndim == 4:
                # timm's Swin-like models give (B, H, W, C), all others (B, C, H, W).
                channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
                return out.flatten(1, 2) if channels_last else _in_raster_order(out)
            if (
                self.native is None
                and not hasattr(model, "num_prefix_tokens")
                and isqrt(out.shape[1]) ** 2 != out.shape[1]
            ):
                raise OpticNerveError(
                    f"its forward_features gives {out.shape[1]} tokens, no square map, and timm does not say which of "
                    "them are class tokens; use layer: -1",
                    kind="unsupported",
                )
            return out[:, prefix:] if self.class_token == "drop" else out
        keep = bool(prefix) and self.class_token == "keep"
        extra = {"return_prefix_tokens": True} if keep else {}
        found = model.forward_intermediates(
            pixel_values, indices=self.layers, intermediates_only=True, stop_early=True, output_fmt="NCHW", **extra
        )
        if keep:
            ((map_BCHW, prefix_BPD),) = found
            return torch.cat([prefix_BPD, _in_raster_order(map_BCHW)], dim=1)
        return _in_raster_order(_joined(found))

    def _ran(self, attribute: str) -> int | None:
        """How many of a convolutional network's blocks run for the map of a `layer`; None: all."""
        stages = getattr(self.model, "feature_info", None)
        if not self.layers or not isinstance(stages, list):
            return None
        named = [re.fullmatch(attribute + r"\.(\d+)", str(stages[n].get("module"))) for n in self.layers]
        return max(int(found[1]) for found in named if found) + 1 if all(named) else None

    def _probe(self, name: str, image_size: int | None, model_args: dict[str, Any]) -> tuple[int, int]:
        """Tokens and width, from a forward pass on the meta device: shapes without arithmetic."""
        with torch.device("meta"):
            meta_model = _create(name, image_size, model_args).eval()
            try:
                shape = self._tokens(meta_model, torch.empty(1, 3, self.image_size, self.image_size)).shape
            except OpticNerveError as e:
                raise e.under(f"timm model {name!r}") from e
            except (AttributeError, AssertionError, IndexError, NotImplementedError, RuntimeError, TypeError) as e:
                # timm's models say in as many ways that they have no such layer, or do not take such a picture.
                other = "another layer" if self.layer == "last" else "layer: last"
                raise OpticNerveError(
                    f"timm model {name!r} gives no features at layer {self.layer!r} for {self.image_size} px: "
                    f"{str(e).strip() or type(e).__name__}; try {other}, or another image_size",
                    kind="unsupported",
                ) from e
        return shape[1], shape[2]

    def blocks(self) -> list[nn.Module]:
        for attribute in ("blocks", "stages", "layers"):
            found = getattr(self.model, attribute, None)
            if isinstance(found, (nn.Sequential, nn.ModuleList)):
                return list(found)[: self._ran(attribute)]
        for word in ("layer", "s", "level"):  # ResNets, RegNets, DLA: layer1, layer2, …
            named = [getattr(self.model, f"{word}{i}") for i in range(6) if hasattr(self.model, f"{word}{i}")]
            if len(named) > 2:
                return named
        raise OpticNerveError(
            f"{type(self.model).__name__} has no blocks that opticnerve knows; train `encoder` whole",
            kind="unsupported",
        )


def _in_raster_order(map_BCHW: Tensor) -> Tensor:
    """(B, C, H, W) → (B, H · W, C).

    Not by `flatten(2).transpose(1, 2)`, whose gradient has strides at which torch's batch norm (2.9 to 2.15, on a CPU)
    computes a wrong one for a single picture.
    """
    return map_BCHW.permute(0, 2, 3, 1).flatten(1, 2)


def _joined(maps_BCHW: Sequence[Tensor]) -> Tensor:
    """Maps of several strides as one of the coarsest: (B, C, H, W) each. One is as it was."""
    if len(maps_BCHW) == 1:
        return maps_BCHW[0]
    columns = min(m.shape[-1] for m in maps_BCHW)
    return torch.cat([F.pixel_unshuffle(m, m.shape[-1] // columns) for m in maps_BCHW], dim=1)


def _look_up(name: str, given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The architecture behind `hf-hub:…` or `local-dir:…`, and what its config.json says beside it.

    So that a configuration names the architecture alone, and builds where neither hub nor folder is at hand.
    """
    if ":" not in name:
        return name, _preparation(name, _registered(name), given)
    place = _local(name, weights=False).removeprefix("local-dir:")
    found, architecture, model_args = read_timm_config(place)
    defaults: dict[str, Any] = {k: list(found[k]) for k in ("mean", "std") if k in found}
    if "input_size" in found:
        defaults["image_size"] = int(found["input_size"][-1])
    classes = {"num_classes": found["num_classes"]} if "num_classes" in found else {}
    # What a folder leaves out is as in timm's own registry.
    defaults |= _preparation(name, {**_registered(architecture), **found}, given)
    return architecture, {**defaults, "model_args": {**classes, **(model_args or {})}}


def _registered(name: str) -> dict[str, Any]:
    """timm's own settings of an architecture; none of one that it does not know, which is told when it is built."""
    try:
        known = timm.get_pretrained_cfg(name)
    except RuntimeError:
        return {}
    return {} if known is None else dict(known.to_dict())


_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def _preparation(name: str, settings: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`fit`, `crop_pct` and `resample` as timm's own evaluation prepares pictures (`timm.data.create_transform`).

    Raises:
        OpticNerveError: a way that cannot be honoured, and `given` does not settle it.
    """
    resample = _RESAMPLE.get(settings.get("interpolation") or "bicubic")
    fit = {"center": "crop", "squash": "squash"}.get(settings.get("crop_mode") or "center")
    refused = [f"interpolation: {settings['interpolation']}"] if resample is None and "resample" not in given else []
    refused += [f"crop_mode: {settings['crop_mode']}"] if fit is None and "fit" not in given else []
    if refused:
        raise OpticNerveError(
            f"timm model {name!r} prepares pictures as an encoder here cannot ({', '.join(refused)}); give the encoder "
            "`fit` and `resample` yourself",
            kind="unsupported",
        )
    found: dict[str, Any] = {} if resample is None else {"resample": resample}
    if "fit" not in given:
        found |= {"fit": fit, "crop_pct": float(settings.get("crop_pct") or timm.data.DEFAULT_CROP_PCT)}
    return found


def _local(name: str, *, weights: bool = True) -> str:
    """`hf-hub:…` as `local-dir:…`; other names as they are."""
    source, _, place = name.partition(":")
    return f"local-dir:{hub.fetch(place, weights=weights)}" if source in ("hf-hub", "hf_hub") else name


def _hub_files(model: Any) -> list[str]:
    """The file in the hub's local cache that timm has just read a model's weights from; empty where it is not known."""
    from huggingface_hub import try_to_load_from_cache

    place = str(model.pretrained_cfg.get("hf_hub_id") or "")
    names = (model.pretrained_cfg.get("hf_hub_filename"), "model.safetensors", "pytorch_model.bin")
    found = (try_to_load_from_cache(place, name) for name in names if name and place.count("/") == 1)
    return next(([file] for file in found if isinstance(file, str)), [])


def _size_args(model: nn.Module, image_size: int | None) -> dict[str, Any]:
    """Models with tables of positions are built for one input size; convolutional networks take any."""
    constructors: list[Any] = [c for c in type(model).__mro__ if issubclass(c, nn.Module)]
    takes_size = any("img_size" in inspect.signature(c).parameters for c in constructors)
    return {"img_size": image_size} if image_size and takes_size else {}


def _any_size_args(model: nn.Module) -> dict[str, Any]:
    """Vision transformers interpolate their positions to a picture's shape where they are told to."""
    constructors: list[Any] = [c for c in type(model).__mro__ if issubclass(c, nn.Module)]
    takes = any("dynamic_img_size" in inspect.signature(c).parameters for c in constructors)
    return {"dynamic_img_size": True} if takes else {}


def _create(
    name: str, image_size: int | None, model_args: dict[str, Any], *, any_size: bool = False
) -> nn.Module:  # fmt: skip
    try:
        with torch.device("meta"):
            plain = timm.create_model(name, pretrained=False, **model_args)
    except RuntimeError as e:
        near = timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:5]
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise OpticNerveError(
            f"timm knows no model {name!r}{hint}; `timm.list_models('*…*')` searches", kind="unknown-name"
        ) from e
    except TypeError as e:
        raise OpticNerveError(
            f"timm model {name!r} cannot be built with model_args {model_args}: {e}", kind="unknown-key"
        ) from e
    shapes = {**_size_args(plain, image_size), **(_any_size_args(plain) if any_size else {})}
    return timm.create_model(name, pretrained=False, **{**model_args, **shapes})
