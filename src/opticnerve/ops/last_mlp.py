"""The last layer's MLP where its output is read, and nowhere else.

Behind a language model's last attention nothing passes from one position to another any more: what its last MLP makes
of a position is read by the last norm and the head at that position alone. Where the head runs on the supervised
positions only, so may that MLP: of a caption behind a picture these are one in eight.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from opticnerve.common.private_names import checkpoint_context, is_compiled
from opticnerve.ops.fused_layers import same_code, source_of

# Llama's, Qwen2's, Mistral's…: layer after layer, then the norm, and no more.
_LAYERS_THEN_NORM = re.compile(
    r"for (?:i, )?decoder_layer in (?:enumerate\()?self\.layers\[: self\.config\.num_hidden_layers\]\)?:\n"
    r" +hidden_states = decoder_layer\([^()]*\)\n\s*"
    r"hidden_states = self\.norm\(hidden_states\)\n\s*return "
)


_current: ContextVar[tuple[Tensor, int] | None] = ContextVar("last_mlp_at", default=None)


def current() -> tuple[Tensor, int] | None:
    """`places_M` and `rows` of the forward pass in hand, if `last_mlp_at` is at work in it."""
    return _current.get()


@contextmanager
def last_mlp_at(language_model: nn.Module, places_M: Tensor, rows: int) -> Iterator[bool]:
    """Within it, the last MLP of a forward pass computes the M positions `places_M` among the B · L alone; yields
    whether it does.

    It does where the layer's and the model's code is known to be Llama's. At other positions the hidden states behind
    the last layer lack what its MLP would add: whoever reads these may not be within.

    The backward pass may lie outside, but for gradient checkpointing, which computes forward again: there its
    `context_fn` has to enter `last_mlp_at(language_model, *current())`. Layers without a `context_fn` are left alone.

    Args:
        rows: B.
    """
    mlp = _last_mlp(language_model, rows) if len(places_M) else None
    if mlp is None:
        yield False
        return
    shape: list[Any] = []

    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shape[:] = args[0].shape
        return (args[0].flatten(0, 1).index_select(0, places_M).unsqueeze(0), *args[1:])

    def scatter(_: nn.Module, __: Any, out_1MD: Tensor) -> Tensor:
        out_TD = out_1MD.new_zeros(shape[0] * shape[1], out_1MD.shape[-1])
        return out_TD.index_copy(0, places_M, out_1MD[0]).view(shape)

    token = _current.set((places_M, rows))
    hooks = [mlp.register_forward_pre_hook(gather), mlp.register_forward_hook(scatter)]
    try:
        yield True
    finally:
        _current.reset(token)
        for hook in hooks:
            hook.remove()


def _last_mlp(language_model: Any, rows: int) -> nn.Module | None:
    decoder = language_model.get_decoder() if hasattr(language_model, "get_decoder") else None
    if decoder is None or not _LAYERS_THEN_NORM.search(source_of(type(decoder).forward)):
        return None
    layer = decoder.layers[decoder.config.num_hidden_layers - 1]
    if not same_code(type(layer).forward, LlamaDecoderLayer.forward):
        return None
    if not same_code(type(layer.mlp).forward, LlamaMLP.forward):
        return None
    if layer.gradient_checkpointing and layer.training and checkpoint_context(layer) is None:
        return None  # its second pass, in the backward pass, would find no hooks
    if is_compiled(layer):
        return None  # a graph for all layers, and this one would need its own
    gate = getattr(language_model, "lora_gate", None)
    if gate is not None and gate.rows_B is not None and rows > 1:
        return None  # an adapter asks which row a position is of
    mlp: nn.Module = layer.mlp
    return mlp
