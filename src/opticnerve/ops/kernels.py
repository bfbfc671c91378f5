"""Who computes norms and gated MLPs of a stage: who its `kernels` names; else on a CUDA device the first of these that
can, transformers' own code where neither can, and elsewhere the functions of `fused_layers`, which eager torch passes
over memory for many times: a CPU's caches forgive that, a GPU does not.

- `inductor`: torch compiles the functions of `fused_layers`, forward and backward. Eager torch passes over memory once
  for each elementwise step; inductor writes one loop for all of them, in C++ for a CPU and in Triton for a GPU.
- `liger`: Liger-Kernel's, fused in Triton for GPUs (Hsu et al. 2024). Only these two are taken, for Liger's own way of
  patching a model changes transformers' classes for the rest of the process; and its loss is not needed, as the head
  runs at supervised positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opticnerve.ops import enabled, tell
from opticnerve.ops.fused_layers import OWN, Functions, computed_by
from opticnerve.types import OpticNerveError, to_install


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One program for all lengths."""
    return torch.compile(function, dynamic=True)


def inductor(device: torch.device) -> Functions:
    """The two functions, compiled for that device: some seconds, fewer when inductor's cache has them.

    Raises:
        OpticNerveError: they cannot be compiled here: on a CPU a C++ compiler is missing, on a GPU Triton.
    """
    found = computed_by(compiled)
    try:  # now: a message before the first step, not after it
        x = torch.ones(4, 16, device=device, dtype=torch.bfloat16, requires_grad=True)
        found.swiglu(found.norm(x, torch.ones_like(x[0]).detach(), 1e-5), x).sum().backward()
    except Exception as e:  # inductor raises whatever the tools that it calls do
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise OpticNerveError(
            f"kernels: inductor: torch cannot compile for {device.type} here ({reason}); install a C++ compiler (g++ "
            "or clang), on a GPU Triton, or leave kernels out",
            kind="not-installed",
        ) from e
    return found


def liger(device: torch.device) -> Functions:
    """The two functions of the package `liger-kernel`.

    Raises:
        OpticNerveError: it is not installed, or the model is not on a GPU.
    """
    if device.type != "cuda":
        raise OpticNerveError(
            f"kernels: liger is written for GPUs, and the model is on {device.type}; leave it out", kind="unsupported"
        )
    try:
        from liger_kernel.ops import LigerRMSNormFunction, LigerSiLUMulFunction
    except ImportError as e:
        raise OpticNerveError(
            f"kernels: liger cannot be imported ({e}): {to_install('opticnerve[liger]')}", kind="not-installed"
        ) from e

    def norm(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        # offset 0; arithmetic in float32 as Llama's; gradients in memory of their own
        out: Tensor = LigerRMSNormFunction.apply(x, weight_D, epsilon, 0.0, "llama", False)
        return out

    return Functions(norm, LigerSiLUMulFunction.apply)


KERNELS: dict[str, Callable[[torch.device], Functions]] = {"liger": liger, "inductor": inductor}
"""By the words of a recipe; the faster one first."""


def functions_for(
    device: torch.device, wanted: str | None = None, *, layers_compiled: bool = False
) -> tuple[Functions | None, str]:
    """Who computes norms and gated MLPs on a device, and how that is called; None: transformers' own code.

    Args:
        wanted: one of `KERNELS`, which must do; None leaves the choice to this.
        layers_compiled: whether torch compiles the layers whole, these within them.

    Raises:
        OpticNerveError: the wanted one cannot run here.
    """
    if wanted is not None:
        return KERNELS[wanted](device), wanted
    if device.type != "cuda" or not enabled():
        return OWN, "opticnerve"
    if layers_compiled:
        return None, "torch.compile, with the layers"
    for name, make in KERNELS.items():
        try:
            return make(device), name
        except OpticNerveError as e:
            tell(f"norms and gated MLPs: not by {name}: {e}")
    return None, "transformers"
