"""Who computes norms and gated MLPs of a stage that names `kernels`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from opticnerve.ops.fused_layers import Functions
from opticnerve.ops.inductor import inductor
from opticnerve.ops.liger import liger

KERNELS: dict[str, Callable[[torch.device], Functions]] = {"inductor": inductor, "liger": liger}
