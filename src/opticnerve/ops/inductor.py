"""Norm and gated MLP compiled by torch's inductor, where `lean` puts its own otherwise.

Eager torch passes over memory once for each elementwise step; inductor writes one loop for all of them, in C++ for a
CPU and in Triton for a GPU. The same functions as in `lean`, forward and backward, so that as little is kept; the
layers around them stay as they are (what compiling whole layers does on a CPU: see docs/performance.md).
"""

from __future__ import annotations

from functools import partial

import torch

from opticnerve.ops.fused_layers import Functions, computed_by
from opticnerve.types import OpticNerveError


def inductor(device: torch.device) -> Functions:
    """The two functions, compiled for that device: some seconds, fewer when inductor's cache has them.

    Raises:
        OpticNerveError: they cannot be compiled here: on a CPU a C++ compiler is missing, on a GPU Triton.
    """
    found = computed_by(partial(torch.compile, dynamic=True))
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
