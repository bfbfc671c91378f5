"""A frozen vision encoder whose features come from the cache has nothing to do: on a CPU its weights make room.

They are written to a file once and mapped from there: the same numbers at the same places, which the system reads again
should anybody look, and which count as nobody's memory while nobody does. The mapping is private: whoever trains them
later changes a copy.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opticnerve.common import atomic
from opticnerve.ops import enabled

_ALIGNED = 64


def offload_encoder(vision_encoder: nn.Module, folder: Path, console: Any = None) -> None:
    """Park a vision encoder that the stage does not need; where the disk has no room it stays, and the console says
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
        Bytes that were parked; 0 also where files cannot be mapped and removed (Windows).

    Raises:
        OSError: the disk is full, or the folder cannot be written. Then all weights are where they were.
    """
    if os.name != "posix" or not enabled():
        return 0
    weights = [p for m in modules for p in m.parameters() if not p.requires_grad and _is_here(p)]
    places: dict[tuple[int, int], int] = {}  # address and size → place in the file: tied weights stay tied
    path = atomic.partial_of(folder / "parked")
    try:
        with path.open("wb") as file:
            for weight in weights:
                if (weight.data_ptr(), weight.nbytes) not in places:
                    places[weight.data_ptr(), weight.nbytes] = file.seek(-(-file.tell() // _ALIGNED) * _ALIGNED)
                    file.write(weight.detach().view(-1).view(torch.uint8).numpy().data)
            size = file.tell()
        if not size:
            return 0
        mapped: Any = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    finally:
        path.unlink(missing_ok=True)
    for weight in weights:
        at = places[weight.data_ptr(), weight.nbytes] // weight.element_size()
        weight.data = torch.empty(0, dtype=weight.dtype).set_(mapped, at, weight.shape, weight.stride())
    return size


def _is_here(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and type(weight.data) is Tensor and weight.is_contiguous() and weight.numel() > 0
