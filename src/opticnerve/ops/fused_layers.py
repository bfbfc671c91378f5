"""The same layers, keeping less for the backward pass and passing over memory less often.

Autograd keeps the input of every elementwise step: of an RMSNorm float32 copies of its input, of a gated MLP the
activation beside its input, of a LoRA layer the scaled and the unscaled adapter's output. Written as one function each,
they keep what they were given and compute the rest again. Forward passes give the same bits, LoRA's sum excepted, which
is rounded once instead of three times. (Liger-Kernel does so in Triton for GPUs: Hsu et al. 2024, section 3.)

A layer is replaced only where its class is one of those listed here, whose `forward` was read and is compared with
these functions by `tests/ops/test_fused_layers.py`, or peft's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from opticnerve.ops import enabled, tell
from opticnerve.types import AutogradContext, OpticNerveError


def _named(ending: str, *families: str) -> frozenset[str]:
    """Dotted names of transformers' classes, of families given as `llama.Llama`."""
    pairs = (family.split(".") for family in families)
    return frozenset(f"transformers.models.{module}.modeling_{module}.{prefix}{ending}" for module, prefix in pairs)


_BOTH = (
    "ernie4_5.Ernie4_5", "granite.Granite", "llama.Llama", "ministral.Ministral", "mistral.Mistral", "qwen2.Qwen2",
    "qwen3.Qwen3", "qwen3_moe.Qwen3Moe", "smollm3.SmolLM3",
)  # fmt: skip
NORMS = _named("RMSNorm", *_BOTH, "glm.Glm", "mixtral.Mixtral", "olmoe.Olmoe", "phi3.Phi3")
"""Classes of root mean square norms that compute what Llama's does."""
GATED_MLPS = _named("MLP", *_BOTH, "gemma.Gemma", "olmo.Olmo", "olmo2.Olmo2", "stablelm.StableLm")
"""Classes of gated perceptrons that compute what Llama's does; only those with a SiLU are replaced."""


@dataclass(frozen=True)
class Functions:
    """What computes a root mean square norm (of input, weight and epsilon) and silu(gate) · up."""

    norm: Callable[[Tensor, Tensor, float], Tensor]
    swiglu: Callable[[Tensor, Tensor], Tensor]


OWN = Functions(lambda x, weight_D, epsilon: _RMSNorm.apply(x, weight_D, epsilon), lambda a, b: _SwiGLU.apply(a, b))
"""Those of this page."""


@contextmanager
def fuse_layers(
    language_model: nn.Module, functions: Functions | None = OWN, *, required: bool = False
) -> Iterator[int]:  # fmt: skip
    """Within it, the language model's norms, gated MLPs and adapters are fused, as far as they are known; yields how
    many layers are. Freeze first: what trains decides which may be.

    Args:
        functions: what computes norms and gated MLPs; None leaves these as they are.
        required: the model must have a place for them.

    Raises:
        OpticNerveError: it has none.
    """
    found: list[tuple[Any, partial[Tensor]]] = []
    if enabled():
        mask = getattr(language_model, "adapter_mask", None)
        forwards = ((m, _fused_forward(m, mask, functions)) for m in language_model.modules())
        found = [(module, forward) for module, forward in forwards if forward is not None]
        if required and not any(f.func in (_norm_forward, _mlp_forward) for _, f in found):
            raise OpticNerveError(
                f"kernels: {type(language_model).__name__} has no norm or gated MLP like Llama's; leave it out",
                kind="unsupported",
            )
        tell(f"{len(found)} norms, gated MLPs and adapters of {type(language_model).__name__} are fused")
    for module, forward in found:
        module.forward = forward
    try:
        yield len(found)
    finally:
        for module, _ in found:
            del module.forward


def _fused_forward(module: nn.Module, mask: Any, functions: Functions | None) -> partial[Tensor] | None:
    if "forward" in vars(module):
        return None  # somebody else's business already
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if isinstance(module, LoraLinear):
        return partial(_lora_forward, module, mask) if _plain_lora(module) else None
    if functions is None:
        return None
    if name in NORMS:
        return partial(_norm_forward, module, functions.norm)
    if name in GATED_MLPS and isinstance(module.act_fn, nn.SiLU | SiLUActivation):
        return partial(_mlp_forward, module, functions.swiglu)
    return None


def _norm_forward(module: Any, norm: Callable[[Tensor, Tensor, float], Tensor], hidden_states: Tensor) -> Tensor:
    return norm(hidden_states, module.weight, module.variance_epsilon)


def _mlp_forward(module: Any, swiglu: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    out: Tensor = module.down_proj(swiglu(module.gate_proj(x), module.up_proj(x)))
    return out


class _RMSNorm(torch.autograd.Function):
    """Root mean square norm (Zhang & Sennrich 2019), the arithmetic float32, as Llama's."""

    @staticmethod
    def forward(
        ctx: AutogradContext, x: Tensor, weight_D: Tensor, epsilon: float, norm: Any = None, back: Any = None
    ) -> Tensor:
        y, scale = (norm or rms_norm)(x, weight_D, epsilon)
        ctx.save_for_backward(x, scale, weight_D)
        ctx.back = back or rms_norm_back
        return y

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight_D = ctx.back(grad, *ctx.saved_tensors, ctx.needs_input_grad[1])
        return grad_x, grad_weight_D, None, None, None


def rms_norm(x: Tensor, weight_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The norm, and by what each position was scaled, in float32."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight_D * (wide * scale).to(x.dtype), scale


def rms_norm_back(
    grad: Tensor, x: Tensor, scale: Tensor, weight_D: Tensor, weight_trains: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the input and, where it trains, of the weight."""
    normed = x * scale  # float32
    grad_weight_D = (grad * normed.to(x.dtype)).flatten(0, -2).sum(0) if weight_trains else None
    inner = (grad * weight_D).float()
    along = torch.linalg.vecdot(inner, normed).div_(-x.shape[-1]).unsqueeze(-1)
    return inner.addcmul_(normed, along).mul_(scale).to(x.dtype), grad_weight_D


class _SwiGLU(torch.autograd.Function):
    """silu(gate) · up (Shazeer 2020, GLU Variants, equation 6)."""

    @staticmethod
    def forward(ctx: AutogradContext, gate: Tensor, up: Tensor, swiglu: Any = None, back: Any = None) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.back = back or gated_silu_back
        return (swiglu or gated_silu)(gate, up)

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.back(grad, *ctx.saved_tensors), None, None


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    return F.silu(gate).mul_(up)


def gated_silu_back(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def computed_by(change: Callable[[Any], Any]) -> Functions:
    """The functions of this page, whatever computes within them put through `change`."""
    norm, norm_back, swiglu, swiglu_back = map(change, (rms_norm, rms_norm_back, gated_silu, gated_silu_back))
    return Functions(
        lambda x, weight_D, epsilon: _RMSNorm.apply(x, weight_D, epsilon, norm, norm_back),
        lambda gate, up: _SwiGLU.apply(gate, up, swiglu, swiglu_back),
    )


def _plain_lora(layer: Any) -> bool:
    """Low-rank and nothing else: one adapter, not merged, on a frozen linear layer; no dropout in use, no variant."""
    if type(layer).forward is not LoraLinear.forward or layer.merged or layer.disable_adapters:
        return False
    if len(layer.active_adapters) != 1:
        return False
    [name] = layer.active_adapters
    base, dropout = layer.base_layer, layer.lora_dropout[name] if name in layer.lora_A else None
    return (
        name in layer.lora_A
        and type(base) is nn.Linear
        and not base.weight.requires_grad
        and not (isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training)
        and not getattr(layer, "lora_variant", {})
        and not layer.lora_bias.get(name, False)
        and layer.lora_A[name].weight.dtype == base.weight.dtype
    )


def _lora_forward(layer: Any, mask: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    [name] = layer.active_adapters
    base = layer.base_layer
    rows_B = None if mask is None or name != mask.adapter else mask.rows_B
    out: Tensor = _LoRA.apply(
        x, base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], rows_B
    )
    return out


class _LoRA(torch.autograd.Function):
    """W x + b + s · B (A x) (Hu et al. 2021, equation 3), the adapter's part for the rows that it works on."""

    @staticmethod
    def forward(
        ctx: AutogradContext, x: Tensor, weight: Tensor, bias: Tensor | None, down_RI: Tensor, up_OR: Tensor,
        scaling: float, rows_B: Tensor | None,
    ) -> Tensor:  # fmt: skip
        low = F.linear(x, down_RI)
        if rows_B is not None:
            low = low * rows_B.to(low.dtype).view(-1, *[1] * (low.ndim - 1))
        out = F.linear(x, weight, bias)
        out.flatten(0, -2).addmm_(low.flatten(0, -2), up_OR.t(), alpha=scaling)
        ctx.save_for_backward(x, weight, down_RI, up_OR, low, rows_B)
        ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down_RI, up_OR, low, rows_B = ctx.saved_tensors
        grad_TO = grad.flatten(0, -2)
        grad_low = (grad @ up_OR).mul_(ctx.scaling)
        if rows_B is not None:
            grad_low *= rows_B.to(grad_low.dtype).view(-1, *[1] * (grad_low.ndim - 1))
        grad_low_TR = grad_low.flatten(0, -2)
        grad_up = (low.flatten(0, -2).t() @ grad_TO).mul_(ctx.scaling).t() if ctx.needs_input_grad[4] else None
        grad_down = grad_low_TR.t() @ x.flatten(0, -2) if ctx.needs_input_grad[3] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            grad_x.flatten(0, -2).addmm_(grad_low_TR, down_RI)
        return grad_x, None, None, grad_down, grad_up, None, None
