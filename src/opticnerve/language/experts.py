"""Mixtures of experts: which weights are the experts', how many of them a token goes through, and the loss that keeps
their routers from sending all tokens to a few (Fedus et al. 2021, Switch Transformers, equations 4 to 6).

transformers holds the experts of a layer as tensors of (experts, out, in); the router, which chooses some for each
token, stands beside them. The loss is that of transformers' `load_balancing_loss_func`, over the positions that hold a
token, of all processes together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opticnerve.language.adapters import is_adapter
from opticnerve.types import OpticNerveError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_expert(name: str) -> bool:
    """Whether a parameter's name, or a module's, is that of one of several experts. One that all tokens go through
    (`shared_experts`) is none."""
    return ".experts." in f"{name}."


def expert_tensors(language_model: nn.Module) -> list[str]:
    """Names of the tensors that hold a layer's experts side by side, (experts, …): no linear layers."""
    return [n for n, p in language_model.named_parameters() if is_expert(n) and p.ndim == 3 and not is_adapter(n)]


def active_parameters(language_model: nn.Module) -> int:
    """How many of a language model's parameters one token meets: all, but of each layer's experts only as many as its
    router chooses."""
    config: Any = getattr(language_model, "config", None)
    chosen, experts = 0, 0
    for name, parameter in language_model.named_parameters():
        if is_expert(name) and not is_adapter(name):
            experts += parameter.numel()
    if experts:
        config = config.get_text_config()
        chosen = experts * top_k(language_model) // _count_of(config)
    return sum(p.numel() for p in language_model.parameters()) - experts + chosen


def _count_of(config: Any) -> int:
    """How many experts a layer has. Configurations have no one word for it."""
    for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        if isinstance(found := getattr(config, name, None), int) and found > 0:
            return found
    raise OpticNerveError(
        f"{config.model_type} has experts, and its configuration does not say how many; take another language model",
        kind="unsupported",
    )


def top_k(language_model: Any) -> int:
    """How many experts a router chooses for a token."""
    found: int | None = getattr(language_model, "num_experts_per_tok", None)
    if found is None:
        config = language_model.config.get_text_config()
        names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k")
        found = next((v for n in names if isinstance(v := getattr(config, n, None), int)), None)
    if found is None:
        raise OpticNerveError(
            f"{language_model.config.model_type} has experts, and its configuration does not say how many a token goes "
            "through; take another language model",
            kind="unsupported",
        )
    return found


class RouterLogits:
    """What the routers of a language model said in its last forward pass within `watched`: of each layer that has one
    (B·L, experts)."""

    layers: Sequence[Tensor] = ()


def balanced(language_model: nn.Module) -> float:
    """By how much the routers' loss counts: the configuration's `router_aux_loss_coef` where experts train, else 0.

    Beside frozen experts, with an adapter or without, there is nothing to balance.
    """
    coefficient = getattr(language_model, "router_aux_loss_coef", None) or 0.0
    trained = (p for n, p in language_model.named_parameters() if is_expert(n) and not is_adapter(n))
    return float(coefficient) if any(p.requires_grad for p in trained) else 0.0


@contextmanager
def watched(language_model: PreTrainedModel) -> Iterator[RouterLogits]:
    """Within it, the language model's decoder gives its routers' logits as well."""
    found, decoder = RouterLogits(), language_model.get_decoder()

    def ask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "output_router_logits": True}

    def take(_: nn.Module, args: tuple[Any, ...], out: dict[str, Any]) -> None:
        found.layers = out.get("router_logits") or ()

    handles = [
        decoder.register_forward_pre_hook(ask, with_kwargs=True),
        decoder.register_forward_hook(take),
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def balance_loss(
    language_model: PreTrainedModel, logits: RouterLogits, real_BL: Tensor, supervised: Tensor
) -> tuple[Tensor, Tensor]:
    """This process's share of the routers' loss × the supervised tokens of all processes, so that, summed over
    processes and divided by these, it is the loss of the micro-batch; and that loss, for the log.

    A share of each expert's tokens times its mean probability is no sum over tokens: that of all processes together is
    one over their sums.

    Args:
        real_BL: bool, the positions that hold a token. supervised: how many this process learns, a scalar.

    Raises:
        OpticNerveError: the routers said nothing.
    """
    if not logits.layers:
        raise OpticNerveError(
            f"{type(language_model).__name__} has a router_aux_loss_coef, and its routers' logits cannot be had: their "
            "loss would be left out; train an adapter (language.lora) instead of the experts",
            kind="unsupported",
        )
    real_T = real_BL.flatten()
    counts_E = sums_E = logits.layers[0].new_zeros(logits.layers[0].shape[-1], dtype=torch.float32)
    for logits_TE in logits.layers:
        weights_TE = logits_TE[real_T].softmax(-1)
        chosen_TK = weights_TE.topk(top_k(language_model), dim=-1).indices
        counts_E = counts_E + torch.zeros_like(weights_TE).scatter_(1, chosen_TK, 1.0).float().sum(0)
        sums_E = sums_E + weights_TE.float().sum(0)
    rows = real_T.sum() * len(logits.layers)
    shared = torch.cat([counts_E, rows.to(counts_E).view(1), supervised.to(counts_E).view(1)])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(shared)
    counts_E, rows, everywhere = shared[:-2], shared[-2], shared[-1]
    share = len(counts_E) * (counts_E / rows * (sums_E / rows)).sum()
    mean = share.detach().clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(mean)
    return everywhere * share, mean
