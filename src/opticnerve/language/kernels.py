"""Who computes norms and gated MLPs of a stage that names `kernels`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from opticnerve.language.inductor import inductor
from opticnerve.language.lean import Functions
from opticnerve.language.liger import liger

KERNELS: dict[str, Callable[[torch.device], Functions]] = {"inductor": inductor, "liger": liger}
