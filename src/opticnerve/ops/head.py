"""The LM head where there is something to learn, and nowhere else; in pieces where that is much.

Logits are the largest tensor of a step by far: a vocabulary wide for every position. Here they are computed for the
supervised positions alone, and of these so many at a time that the whole matrix never exists: a frozen head's gradient
with respect to a piece is computed at once and the piece's logits are dropped (as in Liger-Kernel's fused linear
cross-entropy: Hsu et al. 2024, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opticnerve.ops import enabled, tell
from opticnerve.types import AutogradContext

PIECE = 1 << 22
"""Logits that exist at a time: of so many positions as come to it, of 64 at least."""
_LEAST = 64  # products of fewer rows read the head's weights for too little
# Whether a language model's logits are its head's output, or something is done to them afterwards (scales, soft caps).
_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def supervised_logits(language_model: nn.Module, places_M: Tensor, **inputs: Any) -> Tensor:
    """Logits (M, V) at M of the B·L positions."""
    if not enabled():
        whole: Tensor = language_model(**inputs, use_cache=False).logits
        return whole.flatten(0, 1)[places_M]
    with _head_given(language_model, places_M, lambda hidden_MD: hidden_MD):
        logits: Tensor = language_model(**inputs, use_cache=False).logits
    return logits.squeeze(0)


def supervised_loss(language_model: nn.Module, places_M: Tensor, targets_M: Tensor, **inputs: Any) -> Tensor:
    """The float32 cross-entropies (M,) at M of the B·L positions."""
    head: nn.Module = language_model.get_output_embeddings()  # type: ignore[operator]
    if not enabled() or len(targets_M) <= _at_a_time(head) or _plain.get(language_model) is False:
        logits_MV = supervised_logits(language_model, places_M, **inputs)
        return F.cross_entropy(logits_MV.float(), targets_M, reduction="none")
    gathered: list[Tensor] = []

    def first_alone(hidden_MD: Tensor) -> Tensor:
        gathered.append(hidden_MD)
        return hidden_MD[:1]

    with _head_given(language_model, places_M, first_alone):
        first_V = language_model(**inputs, use_cache=False).logits.detach().flatten()
    [hidden_MD] = gathered
    if language_model not in _plain:
        with torch.no_grad():
            _plain[language_model] = torch.equal(head(hidden_MD[:1].unsqueeze(0)).flatten(), first_V)
        if not _plain[language_model]:
            tell(f"{type(language_model).__name__} changes its head's logits: they are computed in one piece")
            return supervised_loss(language_model, places_M, targets_M, **inputs)
    return loss_in_pieces(head, hidden_MD, targets_M)


def loss_in_pieces(head: nn.Module, hidden_MD: Tensor, targets_M: Tensor) -> Tensor:
    """Cross-entropies (M,) of `head(hidden_MD)`, some positions at a time."""
    many = _at_a_time(head)
    if torch.is_grad_enabled() and any(p.requires_grad for p in head.parameters()):
        pieces = zip(hidden_MD.split(many), targets_M.split(many), strict=True)
        return torch.cat([checkpoint(_loss, head, *piece, use_reentrant=False) for piece in pieces])
    out: Tensor = _InPieces.apply(hidden_MD, targets_M, head)
    return out


def _at_a_time(head: nn.Module) -> int:
    weight: Any = head.weight
    count: int = max(_LEAST, PIECE // weight.shape[0])
    return count


def _loss(head: nn.Module, hidden_MD: Tensor, targets_M: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden_MD).float(), targets_M, reduction="none")


class _InPieces(torch.autograd.Function):
    """The loss under a frozen head; the gradient of what goes in is made on the way."""

    @staticmethod
    def forward(ctx: AutogradContext, hidden_MD: Tensor, targets_M: Tensor, head: nn.Module) -> Tensor:
        losses, grads = [], []
        many = _at_a_time(head)
        for hidden, targets in zip(hidden_MD.split(many), targets_M.split(many), strict=True):
            piece = hidden.detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.set_grad_enabled(piece.requires_grad):
                loss = _loss(head, piece, targets)
            if piece.requires_grad:
                grads += torch.autograd.grad(loss, piece, torch.ones_like(loss))
            losses.append(loss.detach())
        if grads:
            ctx.save_for_backward(torch.cat(grads))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: AutogradContext, grad_M: Tensor) -> tuple[Tensor, None, None]:
        [grad_MD] = ctx.saved_tensors  # of a position's own loss alone
        return (grad_MD * grad_M[:, None]).to(grad_MD.dtype), None, None


@contextmanager
def _head_given(language_model: nn.Module, places_M: Tensor, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it, the head gets `change(hidden_MD)` of the positions to keep. A hook gathers them, so that whatever a
    language model does to its logits afterwards still happens."""
    seen = 0

    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal seen
        seen += 1
        return (change(args[0].flatten(0, 1).index_select(0, places_M)).unsqueeze(0), *args[1:])

    head = language_model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()
    assert seen == 1, "the language model ran its LM head more or less than once"
