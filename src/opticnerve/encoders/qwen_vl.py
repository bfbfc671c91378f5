"""The vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: pictures in their own shape, all of them in one row.

The wrapped model is transformers' own, untouched. It takes the patches of several pictures behind one another and
attends within each (NaViT's packing), so there is no padding in it either.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.utils.generic import is_flash_attention_requested
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from opticnerve.common import hub
from opticnerve.common.cache import weight_files
from opticnerve.common.hub import read_config
from opticnerve.encoders.base import Encoder, config_from_dict, load_part, model_class, plain_config
from opticnerve.encoders.native import Grid, NativeLayout, collect, of_pictures
from opticnerve.encoders.preparation import preparation
from opticnerve.types import Features, OpticNerveError

FAMILIES = ("qwen2_vl_vision", "qwen2_5_vl_vision", "qwen3_vl_vision")
# Where whole models keep it, by its old name and its new one.
_TOWER = {r"^(model\.)?visual\.": ""}


class QwenVLEncoder(Encoder):
    """A vision tower of Qwen-VL.

    Sources: Wang et al. 2024, Qwen2-VL, section 2.1; Bai et al. 2025, Qwen2.5-VL, section 2.1.1 (attention in windows);
    Qwen3-VL, and Meng et al. 2024, DeepStack, for the features of several layers.

    Args:
        architecture: the tower's configuration as a dict with `model_type`, one of `FAMILIES`.
        merge: whether its own pretrained merger makes one token of 2 × 2 patches, at the width of the language model
            that it comes from. Without it comes what the last block gives, patch by patch: merging is then up to the
            connector (`pixel_shuffle`).
        deepstack: Qwen3-VL's merged features of earlier layers behind those of the last, joined along the width. (Its
            own language model adds them to the hidden states of its first layers; here they go through the connector.)
        fit: native, as pictures are; there is no other way.
        min_patches, max_patches: the budget; see `NativeLayout`. The checkpoint's own by default.
        mean, std, resample: picture preparation, the checkpoint's own by default.
    """

    def __init__(
        self, *, architecture: dict[str, Any], merge: bool = True, deepstack: bool = False, fit: str = "native",
        min_patches: int | None = None, max_patches: int | None = None, mean: list[float] | None = None,
        std: list[float] | None = None, resample: int = 3, _model: PreTrainedModel | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        config = config_from_dict(architecture, "qwen_vl", "qwen2_5_vl_vision")
        if config.model_type not in FAMILIES:
            raise OpticNerveError(f"{config.model_type} is none of {', '.join(FAMILIES)}", kind="unsupported")
        if fit != "native":
            raise OpticNerveError(f"qwen_vl shows pictures in their own shape: fit: native, not {fit}", kind="conflict")
        if deepstack and (not merge or not getattr(config, "deepstack_visual_indexes", None)):
            raise OpticNerveError(
                f"deepstack: for Qwen3-VL's tower with merge: true, not for {config.model_type} with merge: {merge}",
                kind="conflict",
            )
        self.merge, self.deepstack = merge, deepstack
        self.patch_size, self.side = int(config.patch_size), int(config.spatial_merge_size)
        usual = NativeLayout(
            self.patch_size,
            16,
            1024,
            multiple=self.side,
            rounding="nearest",
            pool=(self.side, self.side) if merge else (1, 1),
        )
        self.take_pictures(32 * self.patch_size, fit, mean, std, resample)
        budget = self.take_budget(fit, min_patches, max_patches, usual)
        assert self.native is not None
        self.model: Any = _model if _model is not None else _class(config)(config)
        self.num_tokens = self.native.max_tokens
        self.hidden_size = _widths(config)[merge] * (
            1 + deepstack * len(getattr(config, "deepstack_visual_indexes", ()))
        )
        self.options = {
            "architecture": plain_config(config), "merge": merge, "deepstack": deepstack, "fit": fit, "mean": self.mean,
            "std": self.std, "resample": resample, **budget,
        }  # fmt: skip

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> QwenVLEncoder:
        """`name`: hub name or local folder of a Qwen-VL, whose vision tower is taken, or of the tower alone.

        Raises:
            OpticNerveError: there is no such tower in it, or weights of it are missing.
        """
        folder, config = hub.fetch(name), _vision_config(name)
        with hub.quiet():  # of all that is not the tower
            model = load_part(_class(config), folder, name, "vision tower", config=config, key_mapping=_TOWER)
        encoder = cls(architecture=config.to_dict(), _model=model, **_prepared(name, config, options))
        encoder.files = weight_files(Path(folder))
        return encoder

    @classmethod
    def planned(cls, name: str, **options: Any) -> QwenVLEncoder:
        """The same shapes and picture preparation from the configurations alone."""
        with torch.device("cpu"):
            config = _vision_config(name)
            options = _prepared(name, config, options)
        return cls(architecture=config.to_dict(), **options)

    def forward(self, pixel_values: Tensor, grids: Sequence[Grid] = ()) -> Features:
        m, p = self.side, self.patch_size
        rows = []
        for patches_NE, (height, width) in zip(of_pictures(pixel_values, grids), grids, strict=True):
            # Squares of patches, one behind another; within a patch the channels first, each as many frames as the
            # tower sees at a time.
            cut = patches_NE.view(height // m, m, width // m, m, p, p, -1).permute(0, 2, 1, 3, 6, 4, 5)
            frames = cut.unsqueeze(5).expand(*cut.shape[:5], self.model.config.temporal_patch_size, p, p)
            rows.append(frames.flatten(4).flatten(0, 3))
        with torch.device("cpu"):
            shapes_B3 = torch.tensor([(1, *grid) for grid in grids])
            tables = self._tables(shapes_B3)
        # Lengths are read as numbers by all attention but FlashAttention's.
        read = () if is_flash_attention_requested(self.model.config) else ("cu_seqlens", "cu_window_seqlens")
        there = {k: t if k in read else t.to(pixel_values.device) for k, t in tables.items()}
        out = self.model(torch.cat(rows), grid_thw=shapes_B3, **there)
        if self.merge:
            seen = torch.cat([out.pooler_output, *(out.deepstack_features if self.deepstack else ())], dim=-1)
            shapes = [(height // m, width // m) for height, width in grids]
            return collect(of_pictures(seen, shapes), shapes)
        tokens_PD = out.last_hidden_state
        if (order := tables.get("window_index")) is not None:
            tokens_PD = tokens_PD.unflatten(0, (-1, m * m))[order.argsort().to(tokens_PD.device)].flatten(0, 1)
        squares = zip(of_pictures(tokens_PD, grids), grids, strict=True)
        return collect([t.view(h // m, w // m, m, m, -1).transpose(1, 2).flatten(0, 3) for t, (h, w) in squares], grids)

    def _tables(self, shapes_B3: Tensor) -> dict[str, Tensor]:
        """What the model would work out from the pictures' shapes, number by number: here on the CPU, where nothing
        waits for it (and where there are numbers, when shapes alone are counted)."""
        config = self.model.config
        tables = {
            "position_ids": get_vision_position_ids(shapes_B3, self.side),
            "cu_seqlens": get_vision_cu_seqlens(shapes_B3),
        }
        if config.model_type == "qwen2_5_vl_vision":
            window = get_vision_window_index(shapes_B3, self.side, config.window_size, self.patch_size)
            tables |= dict(zip(("window_index", "cu_window_seqlens"), window, strict=True))
        if config.model_type == "qwen3_vl_vision":
            found = get_vision_interpolation_indices_and_weights(
                shapes_B3, self.model.num_grid_per_side, mode=self.model.interpolation_mode,
                align_corners=self.model.interpolation_align_corners, spatial_merge_size=self.side,
            )  # fmt: skip
            tables |= dict(zip(("interp_indices", "interp_weights"), found, strict=True))
        return tables

    def blocks(self) -> list[nn.Module]:
        return list(self.model.blocks)


def _class(config: PreTrainedConfig) -> Any:
    # (Qwen2-VL's tower is not among what transformers lists by its configuration.)
    return Qwen2VisionTransformerPretrainedModel if config.model_type == FAMILIES[0] else model_class(config, {})


def _vision_config(name: str) -> PreTrainedConfig:
    whole = read_config(name)
    config: PreTrainedConfig = getattr(whole, "vision_config", whole)
    if config.model_type not in FAMILIES:
        raise OpticNerveError(
            f"{name!r} ({whole.model_type}) has no vision tower of Qwen-VL ({', '.join(FAMILIES)}); for others: type: "
            "hf_vision",
            kind="unsupported",
        )
    return config


def _prepared(name: str, config: PreTrainedConfig, given: dict[str, Any]) -> dict[str, Any]:
    return {**preparation(name, config.model_type, {**given, "fit": "native"}), **given}


def _widths(config: PreTrainedConfig) -> tuple[int, int]:
    """Width of a patch behind the last block, and of a merged token."""
    if config.model_type == FAMILIES[0]:
        return int(config.embed_dim), int(config.hidden_size)
    return int(config.hidden_size), int(config.out_hidden_size)
