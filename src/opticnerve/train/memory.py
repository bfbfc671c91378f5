"""What a stage's memory holds: which layers' activations, and how the allocators keep it."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from opticnerve.common import private_names
from opticnerve.language.layers import decoder_layers
from opticnerve.types import OpticNerveError

_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Where torch looks for settings of its allocator; the second name since 2.9."""


def recomputed_layers(model: Any, wanted: bool | int | float | str) -> int:
    """Of how many layers a stage's `gradient_checkpointing` computes the activations again: all, so many, or a share.

    Raises:
        OpticNerveError: there is no language model, or it has fewer layers; or a budget was given, and nobody asked the
            plan how many layers keep it (`plan.within_budgets`).
    """
    if wanted is False:
        return 0
    if model.language_model is None:
        raise OpticNerveError("gradient_checkpointing is for docked language models; leave it out", kind="unsupported")
    count = len(decoder_layers(model.language_model)[1])
    if wanted is True:
        return count
    if isinstance(wanted, str):
        raise OpticNerveError(
            f"gradient_checkpointing: {wanted} is settled by a run of the whole recipe; write a number of layers "
            f"(at most {count}) for a stage by itself",
            kind="unsupported",
        )
    if isinstance(wanted, float):
        return math.ceil(wanted * count)
    if wanted > count:
        raise OpticNerveError(
            f"gradient_checkpointing: {wanted} layers, but the language model has {count}; write true for all of them",
            kind="conflict",
        )
    return wanted


def checkpoint_layers(model: Any, count: int | None = None) -> None:
    """Compute activations again instead of keeping them, in frozen layers, too: of the first `count` layers, which the
    backward pass comes to last, when the others' are gone; None for all.

    transformers' layers do so in `train()` only. The layer itself is set so, not what is in it: its dropouts and norms
    stay as `freeze` left them.
    """
    private_names.checkpoint_layers(model.language_model, model.recompute)
    layers = [m for m in model.language_model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for number, layer in enumerate(layers):
        if count is None or number < count:
            layer.training = True
        else:
            layer.gradient_checkpointing = False


def give_memory_back() -> None:
    """Hand what was freed to the system, where the C library can (glibc).

    What loading, checking and caching have let go of would stand beside a stage's activations otherwise.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def expandable_segments() -> None:
    """Have CUDA's allocator grow its segments instead of taking new ones: batches of many lengths leave holes in those.

    Before the first tensor lies there, and where nobody has set the allocator otherwise.
    """
    untouched = not any(name in os.environ for name in _ALLOCATOR)
    if sys.platform == "linux" and untouched and torch.cuda.is_available() and not torch.cuda.is_initialized():
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"
