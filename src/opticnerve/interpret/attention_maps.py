"""From attention to maps: the weights themselves, rollout, gradient-weighted relevance, gradient × token.

All take a `TeacherForced` answer and give, for each of its T tokens, a weight for each token of the picture. The row
read is that of the position which foretells a token: what it gathers is what the token is chosen by.

Sources: Abnar & Zuidema 2020, Quantifying Attention Flow in Transformers, section 3 (rollout); Chefer, Gur & Wolf 2021,
Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder Transformers, section 3.1,
equations 5 and 6 (relevance); Shrikumar et al. 2016, Not Just a Black Box (gradient × input).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from opticnerve.common.private_names import attention_of
from opticnerve.fusion.gated_cross_attention import CrossAttention
from opticnerve.interpret.teacher_forcing import TeacherForced
from opticnerve.types import OpticNerveError


@contextmanager
def eager_attention(language_model: Any) -> Iterator[None]:
    """Within it the language model computes attention step by step: fused kernels keep the weights to themselves."""
    before = attention_of(language_model.config)
    language_model.set_attn_implementation("eager")
    if attention_of(language_model.config) != "eager":
        raise OpticNerveError(
            f"{type(language_model).__name__} does not let its attention be computed step by step; "
            f"take --method gradient or occlusion",
            kind="unsupported",
        )
    try:
        yield
    finally:
        language_model.set_attn_implementation(before)


# -- arithmetic -------------------------------------------------------------------------------------------------------


def rollout(attention_NHLL: Tensor) -> Tensor:
    """N layers' attention multiplied up, half of each for the residual connection: (L, L), rows sum to 1."""
    mean_NLL = attention_NHLL.mean(1)
    same_LL = torch.eye(mean_NLL.shape[-1], dtype=mean_NLL.dtype, device=mean_NLL.device)
    flow_LL = same_LL
    for layer_LL in mean_NLL:
        mixed_LL = layer_LL / 2 + same_LL / 2
        flow_LL = (mixed_LL / mixed_LL.sum(-1, keepdim=True)) @ flow_LL
    return flow_LL


def relevance_row(attention_NHLL: Tensor, gradient_NHLL: Tensor, position: int) -> Tensor:
    """One row of R, where R = 1 and then R ← R + Ā R layer by layer, Ā the heads' mean of (∇A ⊙ A)⁺: from the last
    layer down, r ← r + r Ā, which is the same and needs no product of matrices."""
    weighted_NLL = (attention_NHLL * gradient_NHLL).clamp_min(0).mean(1)
    row_L = weighted_NLL.new_zeros(weighted_NLL.shape[-1])
    row_L[position] = 1
    for layer_LL in weighted_NLL.flip(0):
        row_L = row_L + row_L @ layer_LL
    return row_L


def pick(weights_NHQK: Tensor, layer: int | None, head: int | None) -> Tensor:
    """One layer and head, or the mean over those that are not named: (Q, K). Raises where there is no such one."""
    for name, number, dim in (("layer", layer, 0), ("head", head, 1)):
        if number is not None and not 0 <= number < weights_NHQK.shape[dim]:
            raise OpticNerveError(
                f"there is no {name} {number}: this model has {weights_NHQK.shape[dim]}, "
                f"0 to {weights_NHQK.shape[dim] - 1}",
                kind="out-of-range",
            )
    chosen_NHQK = weights_NHQK if layer is None else weights_NHQK[layer : layer + 1]
    chosen_NHQK = chosen_NHQK if head is None else chosen_NHQK[:, head : head + 1]
    return chosen_NHQK.mean((0, 1))


# -- methods ----------------------------------------------------------------------------------------------------------


def attention(forced: TeacherForced, layer: int | None = None, head: int | None = None) -> Tensor:
    """The language model's own weights, from each answer token's position to the soft tokens: (T, V)."""
    weights_NHLL, _ = self_attention(forced)
    return pick(weights_NHLL, layer, head)[list(forced.positions)][:, forced.visual_V]


def attention_rollout(forced: TeacherForced) -> Tensor:
    """Rollout from each answer token's position to the soft tokens: (T, V)."""
    weights_NHLL, _ = self_attention(forced)
    return rollout(weights_NHLL)[list(forced.positions)][:, forced.visual_V]


def relevance(forced: TeacherForced) -> Tensor:
    """Gradient-weighted relevance of the soft tokens for each answer token's log-probability: (T, V)."""
    with eager_attention(forced.model.language_model), forced.traced() as trace:
        log_p_T, out = trace.run(output_attentions=True)
        layers = given(out, forced)
        weights_NHLL = torch.cat(layers).detach()
        rows = []
        for t, position in enumerate(forced.positions):
            gradients = torch.autograd.grad(log_p_T[t], layers, retain_graph=t + 1 < len(log_p_T))
            rows.append(relevance_row(weights_NHLL.float(), torch.cat(gradients).float(), position))
    return torch.stack(rows)[:, forced.visual_V]


def gradient(forced: TeacherForced) -> Tensor:
    """|gradient · token| on the encoder's tokens, for each answer token's log-probability: (T, N). They have a place in
    the picture whatever the connector makes of them."""
    with forced.traced() as trace:
        log_p_T, _ = trace.run()
        rows = []
        for t in range(len(log_p_T)):
            (slope_1ND,) = torch.autograd.grad(log_p_T[t], [trace.tokens_1ND], retain_graph=t + 1 < len(log_p_T))
            rows.append((slope_1ND * trace.tokens_1ND).sum(-1).abs()[0].detach())
    return torch.stack(rows)


def cross_attention(forced: TeacherForced, layer: int | None = None, head: int | None = None) -> Tensor:
    """The weights of the layers between the language model's own, from each answer token's position: (T, V)."""
    return pick(cross_weights(forced), layer, head)[list(forced.positions)]


def self_attention(forced: TeacherForced) -> tuple[Tensor, Tensor]:
    """The language model's attention weights (layers, heads, L, L), and the answer's log-probabilities (T,)."""
    with eager_attention(forced.model.language_model), forced.traced() as trace, torch.no_grad():
        log_p_T, out = trace.run(output_attentions=True)
    return torch.cat(given(out, forced)).float(), log_p_T


def cross_weights(forced: TeacherForced) -> Tensor:
    """The cross-attention's weights (layers, heads, L, V): computed beside each layer from what goes into it."""
    caught: list[Tensor] = []

    def catch(module: CrossAttention, args: tuple[Any, ...], _: object) -> None:
        caught.append(weights_of(module, *args)[0])

    with ExitStack() as hooks:
        for layer in forced.tower.fusion.layers:
            hooks.callback(layer.cross_attn.register_forward_hook(catch).remove)
        with forced.traced() as trace, torch.no_grad():
            trace.run()
    return torch.stack(caught)


def weights_of(
    module: CrossAttention, hidden_BLD: Tensor, keys_values: tuple[Tensor, Tensor], allowed_BLK: Tensor
) -> Tensor:
    """What `CrossAttention.forward` computes within its fused kernel, written out: (B, heads, L, K)."""
    query_BHLd, key_BHKd = module._split(module.q_proj(hidden_BLD)).float(), keys_values[0].float()
    score_BHLK = query_BHLd @ key_BHKd.transpose(2, 3) / query_BHLd.shape[-1] ** 0.5
    out: Tensor = score_BHLK.masked_fill(~allowed_BLK[:, None], float("-inf")).softmax(-1)
    return out


def given(out: Mapping[str, Any], forced: TeacherForced) -> list[Tensor]:
    """The attention weights among a language model's outputs, one (1, H, L, L) for each layer."""
    layers = [a for a in (out.get("attentions") or ()) if a is not None]
    length = forced.ids_1L.shape[1]
    if not layers or any(a.ndim != 4 or a.shape[-2:] != (length, length) for a in layers):
        raise OpticNerveError(
            f"{type(forced.model.language_model).__name__} gives no attention weights, one for each pair of tokens and "
            "layer; try --method gradient or occlusion, which need none",
            kind="unsupported",
        )
    return layers
