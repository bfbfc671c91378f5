"""Numbers that the host knows: whole numbers of a batch remember what they were before they went to a device.

To ask an accelerator for a number is to wait until it has done all that it was told before, while it is told nothing
new. What a batch says of itself (where its placeholders are, how large its pictures were) was known on the host when it
was made; whoever needs such a number asks for it there.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NAME = "_opticnerve_on_host"


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on that device, its copy not waited for; whole numbers and truths remember what they were."""
    there = tensor.to(device, non_blocking=True)
    return there if tensor.is_floating_point() else known(there, on_host(tensor))


def known(tensor: Tensor, numbers: Tensor) -> Tensor:
    """The same tensor, which now remembers these numbers: whoever changes it in place changes both."""
    if tensor is not numbers and tensor.device.type != "cpu":
        setattr(tensor, _NAME, numbers)
    return tensor


def on_host(tensor: Tensor) -> Tensor:
    """The tensor's numbers where asking costs nothing: on the CPU, if they are known there; or else the tensor."""
    numbers: Tensor = getattr(tensor, _NAME, tensor)
    return numbers


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A small tensor of the CPU on that device: to CUDA through page-locked memory, so that nobody waits."""
    if torch.device(device).type == "cuda" and type(tensor) is Tensor:  # a tensor without numbers has none to lock
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
