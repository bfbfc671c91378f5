"""A docked model as plain weights, in place: what only opticnerve has is folded into the matrices beside it.

The function stays the same; only rounding to the weights' own dtype may move it, which `parity.check_rounding` bounds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from opticnerve.types import OpticNerveError


@torch.no_grad()
def fold_calibration(connector: Any, first: nn.Linear, last: nn.Linear) -> None:
    """Put the connector's standardising and scaling into its first and last matrix, and set the buffers to nothing.

    (x - mean) / std through W, b is x through W / std, b - (W / std) · mean. A matrix without bias gets one.
    """
    mean_D, std_D = connector.input_mean.double(), connector.input_std.double()
    weight_ED = first.weight.double() / std_D
    _put(first, weight_ED, _bias(first) - weight_ED @ mean_D)
    scale = connector.output_scale.double()
    _put(last, last.weight.double() * scale, None if last.bias is None else last.bias.double() * scale)
    _clear(connector)


@torch.no_grad()
def fold_into_norm(connector: Any, norm: nn.LayerNorm, last: nn.Linear) -> None:
    """As `fold_calibration`, for a first matrix that has no bias: the standardising goes into the layer norm before it.

    ((γ·n + β) - mean) / std is (γ / std)·n + (β - mean) / std. Nothing else may read that norm.
    """
    mean_D, std_D = connector.input_mean.double(), connector.input_std.double()
    _put(norm, norm.weight.double() / std_D, (norm.bias.double() - mean_D) / std_D)
    scale = connector.output_scale.double()
    _put(last, last.weight.double() * scale, None if last.bias is None else last.bias.double() * scale)
    _clear(connector)


def _clear(connector: Any) -> None:
    connector.input_mean.zero_()
    connector.input_std.fill_(1)
    connector.output_scale.fill_(1)


def _bias(layer: nn.Linear) -> Tensor:
    return torch.zeros(layer.out_features, dtype=torch.float64) if layer.bias is None else layer.bias.double()


def _put(layer: Any, weight: Tensor, bias: Tensor | None) -> None:
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(dtype), requires_grad=False)


@torch.no_grad()
def fix_picture_size(encoder: Any) -> None:
    """Write the interpolated table of positions into a vision transformer that is shown pictures of another size."""
    if encoder.image_size == encoder.native_size:
        return
    table: Any = encoder.model.embeddings
    side, patches = encoder.image_size, (encoder.image_size // encoder.patch_size) ** 2
    rows = patches + encoder.prefix_tokens
    if side % encoder.patch_size:
        raise OpticNerveError(
            f"pictures of {side} px do not divide into patches of {encoder.patch_size}; no other engine takes them: "
            f"train with image_size {side // encoder.patch_size * encoder.patch_size}"
        )
    [name] = [n for n in ("position_embedding", "position_embeddings") if hasattr(table, n)]
    held = getattr(table, name)
    values = held.weight if isinstance(held, nn.Embedding) else held
    blank_1ND = values.new_zeros(1, rows, values.shape[-1])
    positions_1ND = table.interpolate_pos_encoding(blank_1ND, side, side).contiguous()
    if isinstance(held, nn.Embedding):
        new: Any = nn.Embedding.from_pretrained(positions_1ND[0], freeze=True)
    else:
        new = nn.Parameter(positions_1ND, requires_grad=False)
    setattr(table, name, new)
    table.position_ids = torch.arange(rows)[None]
    for holder in (table, encoder.model):
        if hasattr(holder, "config"):
            holder.config.image_size = side
    table.image_size = (side, side) if isinstance(getattr(table, "image_size", None), tuple) else side
    table.num_patches, table.num_positions = patches, rows
    encoder.native_size = side
    encoder.options["architecture"]["image_size"] = side
