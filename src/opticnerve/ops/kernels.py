"""Who computes norms and gated MLPs of a stage that names `kernels`, where `fused_layers` puts its own otherwise.

- `inductor`: torch compiles the functions of `fused_layers`, forward and backward. Eager torch passes over memory once
  for each elementwise step; inductor writes one loop for all of them, in C++ for a CPU and in Triton for a GPU.
- `liger`: Liger-Kernel's, fused in Triton for GPUs (Hsu et al. 2024). Only these two are taken, for Liger's own way of
  patching a model changes transformers' classes for the rest of the process; and its loss is not needed, as the head
  runs at supervised positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from opticnerve.ops.fused_layers import Functions, computed_by
from opticnerve.types import OpticNerveError, to_install


def inductor(device: torch.device) -> Functions:
    """The two functions, compiled for that device: some seconds, fewer when inductor's cache has them.

    Raises:
        OpticNerveError: they cannot be compiled here: on a CPU a C++ compiler is missing, on a GPU Triton.
    """
    found = computed_by(partial(torch.compile, dynamic=True))
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


KERNELS: dict[str, Callable[[torch.device], Functions]] = {"inductor": inductor, "liger": liger}
