"""Frozen linear layers in 4 or 8 bits, by bitsandbytes: what does not train need not be there in all its digits.

`nf4` is QLoRA's NormalFloat in blocks of 64, whose scales are quantised again in blocks of 256 (Dettmers et al. 2023,
section 3); `int8` has a scale for each row, its absolute maximum (Dettmers et al. 2022, LLM.int8(), section 2). Both
are of the weights alone: a product is that of its input with the dequantised weight, forward and backward, so that an
adapter learns what it would learn beside those dequantised weights. (LLM.int8() rounds inputs, too, by their batch.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opticnerve.recipe import Quantize
from opticnerve.types import AutogradContext, OpticNerveError, to_install

BLOCK, OUTER = 64, 256  # QLoRA's, and bitsandbytes' own


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight is kept in 4 or 8 bits. It never trains.

    `weight`: the codes, for nf4 two in a byte, blocks in rows (in rows of other lengths bitsandbytes' kernel for CPUs
    finds the wrong scales), the last filled up; `codes`: the 8-bit scales of nf4's blocks; `scales`: those in float32,
    seen as int32, for `model.to(dtype)` must leave them their digits. All are plain tensors, which move and copy as
    others do.

    Attributes:
        kind: `nf4` or `int8`. distance: ‖dequantised − original‖² and ‖original‖².
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear, kind: Quantize) -> None:
        bnb, weight = bitsandbytes(), linear.weight.detach()
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = linear.in_features, linear.out_features, kind
        self.bias = linear.bias
        if kind == "int8":
            packed, scales, _ = bnb.int8_vectorwise_quant(weight.half())
            codes = packed.new_empty(0)
        else:
            blocks = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
            packed, state = bnb.quantize_4bit(blocks, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
            codes, scales = state.absmax, torch.cat([state.offset.view(1), state.state2.absmax])
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales.float().view(torch.int32))
        off = self.dequantized(torch.float32) - weight.float()
        self.distance = (float(off.square().sum()), float(weight.float().square().sum()))

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) that the codes stand for."""
        bnb, scales = bitsandbytes(), self.scales.view(torch.float32)
        if self.kind == "int8":
            rows: Tensor = bnb.int8_vectorwise_dequant(self.weight, scales)
            return rows.to(dtype)
        size = (self.in_features * self.out_features + BLOCK - 1) // BLOCK
        inner = bnb.QuantState(scales[1:], blocksize=OUTER, code=_map(self.weight.device), dtype=torch.float32)
        state = bnb.QuantState(
            self.codes, shape=torch.Size((size, BLOCK)), blocksize=BLOCK, quant_type="nf4", dtype=dtype,
            code=None, offset=scales[0], state2=inner,
        )  # fmt: skip
        flat: Tensor = bnb.dequantize_4bit(self.weight, state).flatten()
        return flat[: self.in_features * self.out_features].view(self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = _DequantizedProduct.apply(input, self)
        return out

    def plain(self, dtype: torch.dtype) -> nn.Linear:
        """The layer that this one stands for."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(self.dequantized(dtype), requires_grad=False)
        layer.bias = self.bias
        return layer.train(self.training)


class _DequantizedProduct(torch.autograd.Function):
    """W x + b, W dequantised in both directions and kept in neither."""

    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantized(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dequantized(grad.dtype), None


def bitsandbytes() -> Any:
    """bitsandbytes' functions.

    Raises:
        OpticNerveError: it is not installed.
    """
    try:
        from bitsandbytes import functional
    except ImportError as e:
        raise OpticNerveError(
            f"quantize: bitsandbytes cannot be imported ({e}); {to_install('opticnerve[quantised]')}, or leave it out",
            kind="not-installed",
        ) from e
    return functional


_maps: dict[torch.device, Tensor] = {}


def _map(device: torch.device) -> Tensor:
    """The values of the 8-bit scales' codes."""
    if device not in _maps:
        _maps[device] = bitsandbytes().create_dynamic_map().to(device)
    return _maps[device]


def quantizable(module: nn.Module, within: str = "") -> Iterator[tuple[str, nn.Linear]]:
    """Names and layers that `quantize` takes: plain linear layers. (Others are read past their `forward`: those of
    torch's attention, for one.)"""
    for name, layer in module.named_modules():
        if name.startswith(within) and type(layer) is nn.Linear:
            yield name, layer


def quantize(module: nn.Module, kind: Quantize, what: str, within: str = "") -> None:
    """Put a `QuantizedLinear` in the place of each linear layer, one after the other, in place.

    Args:
        what: the part's name, for messages. within: the beginning of the names of layers that are meant.

    Raises:
        OpticNerveError: there is none, or bitsandbytes is not installed.
    """
    bitsandbytes()
    layers = dict(quantizable(module, within))
    if not layers:
        raise OpticNerveError(
            f"quantize: {what} has no linear layers that could be quantised; leave it out", kind="unsupported"
        )
    for name in list(layers):
        _put(module, name, QuantizedLinear(layers.pop(name), kind))


def quantized_layers(module: nn.Module) -> dict[str, QuantizedLinear]:
    """Names and layers that are quantised."""
    return {name: m for name, m in module.named_modules() if isinstance(m, QuantizedLinear)}


def dequantize(module: nn.Module, dtype: torch.dtype) -> None:
    """Put the plain layers in the place of all quantised ones again, in place."""
    for name, layer in quantized_layers(module).items():
        _put(module, name, layer.plain(dtype))


def dequantized_state(
    state: dict[str, Tensor], layers: dict[str, QuantizedLinear], dtype: torch.dtype
) -> dict[str, Tensor]:
    """A model's tensors as if none of these layers of its were quantised."""
    state = dict(state)
    for name, layer in layers.items():
        # Without others' adapters the layer that they wrap has its own name again.
        name = name if f"{name}.codes" in state else name.removesuffix(".base_layer")
        del state[f"{name}.codes"], state[f"{name}.scales"]
        state[f"{name}.weight"] = layer.dequantized(dtype)
    return state


def distance(module: nn.Module) -> dict[str, Any] | None:
    """What quantising cost: ‖dequantised − original‖ over ‖original‖, of all quantised weights together."""
    layers = list(quantized_layers(module).values())
    if not layers:
        return None
    off, whole = (math.fsum(layer.distance[i] for layer in layers) for i in (0, 1))
    return {"quantize": layers[0].kind, "layers": len(layers), "distance": math.sqrt(off / whole) if whole else 0.0}


def planned_bytes(kind: Quantize, layer: nn.Linear) -> int:
    """What the weight of a layer will take, scales and all."""
    if kind == "int8":
        return layer.weight.numel() + 4 * layer.out_features
    blocks = math.ceil(layer.weight.numel() / BLOCK)
    return blocks * (BLOCK // 2 + 1) + 4 * (math.ceil(blocks / OUTER) + 1)


def _put(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, layer)
