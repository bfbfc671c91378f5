"""A frozen vision encoder whose features come from the cache has nothing to do: on a CPU its weights make room.

They are written to a file once and mapped from there: the same numbers, which the system reads again should anybody
look, and which count as nobody's memory while nobody does. The mapping is private: whoever trains them later changes a
copy.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from opticnerve.common import atomic
from opticnerve.ops import enabled, tell

if TYPE_CHECKING:
    from rich.console import Console


def offload_encoder(vision_encoder: nn.Module, folder: Path, console: Console | None = None) -> None:
    """Offload a vision encoder that the stage does not need; where the disk has no room it stays, and the console says
    so."""
    try:
        offload([vision_encoder], folder)
    except OSError as e:
        if console is not None:
            console.print(f"the vision encoder's weights stay in memory: {e.strerror or e}", style="dim", markup=False)


def offload(modules: Sequence[nn.Module], folder: Path) -> int:
    """Map the frozen weights of modules from a file in `folder`, which has no name any more when this returns.

    Weights that train, and weights elsewhere than in this machine's memory, stay where they are.

    Returns:
        Bytes that were offloaded; 0 also where files cannot be mapped and removed (Windows).

    Raises:
        OSError: the disk is full, or the folder cannot be written. Then all weights are where they were.
    """
    weights = [p for m in modules for p in m.parameters() if not p.requires_grad and _is_here(p)]
    if not enabled() or not weights:
        return 0
    if os.name != "posix":
        tell(f"nothing is offloaded on {os.name}")
        return 0
    path = atomic.partial_of(folder / "offloaded")
    try:
        with path.open("wb") as file:
            torch.save([p.detach() for p in weights], file)  # tied weights stay tied
        mapped = torch.load(path, mmap=True, weights_only=True)
    finally:
        path.unlink(missing_ok=True)
    for weight, tensor in zip(weights, mapped, strict=True):
        weight.data = tensor
    gc.collect()  # torch 2.9's writer holds what it wrote in a circle
    return sum({t.data_ptr(): t.nbytes for t in mapped}.values())


def _is_here(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and type(weight.data) is Tensor and weight.is_contiguous() and weight.numel() > 0
