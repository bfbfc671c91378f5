"""What only opticnerve has, on the way to another engine: refused with the nearest way out, or folded into the matrices
beside it.

Folding is done in place and leaves the function the same; only rounding to the weights' own dtype may move it, which
`parity.check_rounding` bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from opticnerve.models.vlm.build import is_gated
from opticnerve.types import OpticNerveError

if TYPE_CHECKING:
    from opticnerve.connectors.base import Connector
    from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration

VISION_ENCODERS = ("clip_vision_model", "siglip_vision_model")


def encoder_refusals(
    model: OpticNerveForConditionalGeneration, engine: str, vision_encoders: Sequence[str] = VISION_ENCODERS,
    *, native: str = "", tiles: bool = False,
) -> list[str]:  # fmt: skip
    """Why the towers and their fusion are no vision encoder of the given families with soft tokens in the text; empty
    if they are. `native`: the one among them that is shown pictures in their own shape. `tiles`: whether the
    engine shows them in tiles."""
    reasons, towers = [], model.config.towers
    if "image" not in towers:
        return [f"it has no vision encoder, and {engine} is one with a vision encoder"]
    if others := sorted(set(towers) - {"image"}):
        reasons.append(
            f"it has an {others[0]} tower, and {engine} has a vision encoder alone; nearest: model.image alone"
        )
    spec = towers["image"]
    if (fusion := spec["fusion"]["type"]) != "splice":
        reasons.append(
            f"its fusion is {fusion}, {engine} has soft tokens in the text; nearest: fusion {{type: splice}}"
        )
    if tiles and "tiling" not in spec:
        reasons.append(f"it shows pictures whole, {engine} cuts them into tiles; nearest: tiling {{type: anyres}}")
    elif not tiles and "tiling" in spec:
        reasons.append(f"it cuts pictures into tiles, {engine} shows each whole; nearest: leave out tiling")
    kind, family = spec["encoder"]["type"], spec["encoder"].get("architecture", {}).get("model_type")
    if (fit := spec["encoder"].get("fit")) == "native" and family != native:
        reasons.append(
            f"it shows pictures in their own shape (fit: native), {engine} makes each square"
            f"{f' but of a {native}' * bool(native)}; nearest: train with another fit"
        )
    elif family == native and fit != "native":
        reasons.append(
            f"it shows a {native} pictures with fit: {fit}, {engine} in their own shape; nearest: fit: native"
        )
    if kind != "hf_vision":
        reasons.append(f"its encoder is {kind}; nearest: encoder {{type: hf_vision}} with a {vision_encoders[-1]}")
    elif family not in vision_encoders:
        reasons.append(
            f"its vision encoder is a {family}, {engine} is served with {' or '.join(vision_encoders)}; nearest: one "
            "of these"
        )
    return reasons


def adapter_refusals(
    model: OpticNerveForConditionalGeneration, nearest: str = "lora {when: always}, or the format merged"
) -> list[str]:
    """Why the adapter cannot be added into weights; empty if it can."""
    if not is_gated(model):
        return []
    return [
        "its adapter works beside pictures alone (lora.when: media), and such a gate cannot be added into weights; "
        f"nearest: {nearest}"
    ]


def connector_matrices(connector: Connector) -> tuple[nn.Linear, nn.Linear]:
    """The first and the last matrix of a linear or mlp connector, or of a pixel shuffle."""
    layers = [m for m in connector.modules() if isinstance(m, nn.Linear)]
    return layers[0], layers[-1]


@torch.no_grad()
def fold_calibration(connector: Connector, first: nn.Linear, last: nn.Linear) -> None:
    """Put the connector's standardising and scaling into its first and last matrix, and set the buffers to nothing.

    (x - mean) / std through W, b is x through W / std, b - (W / std) · mean. A matrix without bias gets one.
    """
    weight_ED = first.weight.double() / connector.input_std.double()
    bias_E = torch.zeros(first.out_features) if first.bias is None else first.bias
    _put(first, weight_ED, bias_E.double() - weight_ED @ connector.input_mean.double())
    _fold_scale(connector, last)


@torch.no_grad()
def fold_into_norm(connector: Connector, norm: nn.LayerNorm, last: nn.Linear) -> None:
    """As `fold_calibration`, for a first matrix that has no bias: the standardising goes into the layer norm before it.

    ((γ·n + β) - mean) / std is (γ / std)·n + (β - mean) / std. Nothing else may read that norm.
    """
    mean_D, std_D = connector.input_mean.double(), connector.input_std.double()
    _put(norm, norm.weight.double() / std_D, (norm.bias.double() - mean_D) / std_D)
    _fold_scale(connector, last)


def _fold_scale(connector: Connector, last: nn.Linear) -> None:
    scale = connector.output_scale.double()
    _put(last, last.weight.double() * scale, None if last.bias is None else last.bias.double() * scale)
    connector.input_mean.zero_()
    connector.input_std.fill_(1)
    connector.output_scale.fill_(1)


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
            f"train with image_size {side // encoder.patch_size * encoder.patch_size}",
            kind="unsupported",
        )
    [name] = [n for n in ("position_embedding", "position_embeddings") if hasattr(table, n)]
    held = getattr(table, name)
    values = held.weight if isinstance(held, nn.Embedding) else held
    positions_1ND = table.interpolate_pos_encoding(values.new_zeros(1, rows, values.shape[-1]), side, side).contiguous()
    new = nn.Parameter(positions_1ND, requires_grad=False)
    setattr(table, name, nn.Embedding.from_pretrained(new[0]) if isinstance(held, nn.Embedding) else new)
    table.position_ids = torch.arange(rows)[None]
    for holder in (table, encoder.model):
        if hasattr(holder, "config"):
            holder.config.image_size = side
    table.image_size = (side, side) if isinstance(getattr(table, "image_size", None), tuple) else side
    table.num_patches, table.num_positions = patches, rows
    encoder.native_size = side
    encoder.options["architecture"]["image_size"] = side
