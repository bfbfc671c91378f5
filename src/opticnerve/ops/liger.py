"""Liger-Kernel's norm and gated MLP, fused in Triton for GPUs (Hsu et al. 2024), where `lean` puts its own otherwise.

Only these two are taken, and only for as long as a stage trains: Liger's own way of patching a model changes the
classes of transformers for the rest of the process. Its loss is not needed: the head runs at supervised positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opticnerve.ops.fused_layers import Functions
from opticnerve.types import OpticNerveError, to_install


def liger(device: torch.device) -> Functions:
    """The two functions of the package `liger-kernel`.

    Raises:
        OpticNerveError: it is not installed, or the model is not on a GPU.
    """
    if device.type != "cuda":
        raise OpticNerveError(f"kernels: liger is written for GPUs, and the model is on {device.type}; leave it out")
    try:
        from liger_kernel.ops import LigerRMSNormFunction, LigerSiLUMulFunction
    except ImportError as e:
        raise OpticNerveError(f"kernels: liger cannot be imported ({e}): {to_install('opticnerve[liger]')}") from e

    def norm(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        # offset 0; arithmetic in float32 as Llama's; gradients in memory of their own
        out: Tensor = LigerRMSNormFunction.apply(x, weight_D, epsilon, 0.0, "llama", False)
        return out

    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        out: Tensor = LigerSiLUMulFunction.apply(gate, up)
        return out

    return Functions(norm, swiglu)
