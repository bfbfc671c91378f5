"""Norm and gated MLP compiled by torch's inductor, where `lean` puts its own otherwise.

Eager torch passes over memory once for each elementwise step; inductor writes one loop for all of them, in C++ for a
CPU and in Triton for a GPU. The same functions as in `lean`, forward and backward, so that as little is kept; the
layers around them stay as they are (what compiling whole layers does on a CPU: see docs/performance.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opticnerve.language.lean import Functions
from opticnerve.types import OpticNerveError


def inductor(device: torch.device) -> Functions:
    """The two functions, compiled for that device: some seconds, fewer when inductor's cache has them.

    Raises:
        OpticNerveError: they cannot be compiled here: on a CPU a C++ compiler is missing, on a GPU Triton.
    """
    norm: Any = torch.compile(_norm, dynamic=True)
    norm_back: Any = torch.compile(_norm_back, dynamic=True)
    swiglu: Any = torch.compile(_swiglu, dynamic=True)
    swiglu_back: Any = torch.compile(_swiglu_back, dynamic=True)

    class Norm(torch.autograd.Function):
        """Root mean square norm, the arithmetic float32; keeps its input and a scale for each position."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:  # type: ignore[override]
            y, scale = norm(x, weight_D, epsilon)
            ctx.save_for_backward(x, scale, weight_D)
            return y  # type: ignore[no-any-return]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
            x, scale, weight_D = ctx.saved_tensors
            grad_weight = None
            if ctx.needs_input_grad[1]:
                grad_weight = (grad * (x * scale).to(x.dtype)).flatten(0, -2).sum(0)
            return norm_back(grad, x, scale, weight_D), grad_weight, None

    class SwiGLU(torch.autograd.Function):
        """silu(gate) · up; keeps the two."""

        @staticmethod
        def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
            ctx.save_for_backward(gate, up)
            return swiglu(gate, up)  # type: ignore[no-any-return]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return swiglu_back(grad, *ctx.saved_tensors)  # type: ignore[no-any-return]

    found = Functions(Norm.apply, SwiGLU.apply)
    _try(found, device)
    return found


def _try(functions: Functions, device: torch.device) -> None:
    """Compile them now: a message before the first step, not after it."""
    try:
        x = torch.ones(4, 16, device=device, dtype=torch.bfloat16, requires_grad=True)
        functions.swiglu(functions.norm(x, torch.ones_like(x[0]).detach(), 1e-5), x).sum().backward()
    except Exception as e:  # inductor raises whatever the tools that it calls do
        raise OpticNerveError(
            f"kernels: inductor: torch cannot compile for {device.type} here ({_first_line(e)}); install a C++ "
            f"compiler (g++ or clang), on a GPU Triton, or leave kernels out"
        ) from e


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _norm(x: Tensor, weight_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight_D * (wide * scale).to(x.dtype), scale


def _norm_back(grad: Tensor, x: Tensor, scale: Tensor, weight_D: Tensor) -> Tensor:
    normed = x.float() * scale
    inner = (grad * weight_D).float()
    along = (inner * normed).mean(-1, keepdim=True)
    return ((inner - normed * along) * scale).to(x.dtype)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _swiglu_back(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    wide, g = gate.float(), grad.float()
    open_ = torch.sigmoid(wide)
    return (g * up.float() * open_ * (1 + wide * (1 - open_))).to(gate.dtype), (g * wide * open_).to(gate.dtype)
