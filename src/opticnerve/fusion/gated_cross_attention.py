"""Text attends to places in the picture: gated layers between the language model's own, as in Flamingo.

Source: Alayrac et al. 2022, Flamingo, section 2.2 and appendix A.1; the layer itself is transformers'
`IdeficsGatedCrossAttentionLayer` (Laurençon et al. 2023), weight for weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.idefics.modeling_idefics import IdeficsRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP

from opticnerve.common.on_host import on_host
from opticnerve.fusion.base import Fusion, check_count, onloaded, words_of
from opticnerve.language.layers import decoder_layers
from opticnerve.types import Features, OpticNerveError


class CrossAttention(nn.Module):
    """Multi-head attention of text (queries) to soft tokens (keys and values), without positions and biases."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(size, size, bias=False) for _ in range(4))

    def keys_values(self, media_BKD: Tensor) -> tuple[Tensor, Tensor]:
        """Computed once per prompt: the soft tokens do not change while an answer is written."""
        return self._split(self.k_proj(media_BKD)), self._split(self.v_proj(media_BKD))

    def forward(self, hidden_BLD: Tensor, keys_values: tuple[Tensor, Tensor], allowed_BLK: Tensor) -> Tensor:
        query_BHLd = self._split(self.q_proj(hidden_BLD))
        out_BHLd = F.scaled_dot_product_attention(query_BHLd, *keys_values, attn_mask=allowed_BLK[:, None])
        out: Tensor = self.o_proj(out_BHLd.transpose(1, 2).flatten(2))
        return out

    def _split(self, x_BLD: Tensor) -> Tensor:
        out: Tensor = x_BLD.unflatten(2, (self.heads, -1)).transpose(1, 2)
        return out


class GatedCrossAttentionLayer(nn.Module):
    """`hidden + tanh(α) · attention(hidden, pictures)`, then `hidden + tanh(β) · mlp(hidden)`; α = β = 0 at the start.

    Names of weights are those of transformers' Idefics.
    """

    def __init__(self, *, size: int, heads: int, inner: int, activation: str, gate: str, eps: float = 1e-6) -> None:
        super().__init__()
        self.cross_attn = CrossAttention(size, heads)
        self.mlp = LlamaMLP(LlamaConfig(hidden_size=size, intermediate_size=inner, hidden_act=activation))
        self.input_layernorm, self.post_attention_layernorm = IdeficsRMSNorm(size, eps), IdeficsRMSNorm(size, eps)
        shape = (1,) if gate == "scalar" else (1, 1, size)
        self.alpha_cross_attn, self.alpha_dense = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))

    def forward(
        self, hidden_BLD: Tensor, keys_values: tuple[Tensor, Tensor], allowed_BLK: Tensor, sees_BL: Tensor
    ) -> Tensor:
        """`allowed_BLK`: bool, which soft tokens each position may look at; `sees_BL`: whether there are any."""
        # Attention without a single key is not a number: such positions look at all, and the result is dropped.
        allowed_BLK = allowed_BLK | ~sees_BL[:, :, None]
        looked_BLD = self.cross_attn(self.input_layernorm(hidden_BLD), keys_values, allowed_BLK)
        looked_BLD = looked_BLD.masked_fill(~sees_BL[:, :, None], 0.0)
        hidden_BLD = hidden_BLD + self.alpha_cross_attn.tanh() * looked_BLD
        out: Tensor = hidden_BLD + self.alpha_dense.tanh() * self.mlp(self.post_attention_layernorm(hidden_BLD))
        return out


@dataclass
class CrossAttentionStates:
    """The pictures of a batch as the layers see them.

    `media_BKD`: soft tokens by row, K = pictures × tokens; `owner_BK`: which of the row's pictures a token belongs to,
    -1 for padding; `latest_BL`: which picture precedes each position, -1 for none. `known`: keys and values by layer.
    """

    media_BKD: Tensor
    owner_BK: Tensor
    latest_BL: Tensor
    known: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def allowed_BLK(self) -> Tensor:
        return (self.latest_BL[:, :, None] == self.owner_BK[:, None, :]) & (self.latest_BL[:, :, None] >= 0)


class GatedCrossAttention(Fusion):
    """Gated cross-attention between frozen layers: text looks at the latest picture before it.

    One placeholder stands for a picture, with a learned embedding that starts as the mean of all words. The gates are
    zero at the start, so a fresh dock computes exactly what the bare language model does. A position that no picture
    precedes is left as it is, for good: text alone always meets the untouched language model, whatever is trained and
    whatever shares its batch. (Flamingo runs such positions through the dense half of each layer.)

    Args:
        language_size, language_layers: see `Fusion`.
        every: a layer before every so many of the language model's, from its first on.
        heads: of the attention; one for each 64 of the width by default.
        mlp_ratio: inner width of the perceptron over the language model's width.
        activation: a name from transformers' `ACT2FN`.
        gate: one number for each layer ("scalar", Flamingo) or one for each channel ("vector").
    """

    def __init__(
        self, *, language_size: int, language_layers: int, every: int = 4, heads: int | None = None,
        mlp_ratio: float = 4.0, activation: str = "silu", gate: Literal["scalar", "vector"] = "scalar",
    ) -> None:  # fmt: skip
        super().__init__(language_size=language_size, language_layers=language_layers)
        heads = heads or max(1, language_size // 64)
        if language_size % heads:
            raise OpticNerveError(
                f"{heads} heads do not divide the language model's width {language_size}; give `heads` a divisor of it",
                kind="wrong-shape",
            )
        if every < 1:
            raise OpticNerveError(
                f"every is 1 or more, not {every}; 1 puts a layer before each of the model's own", kind="out-of-range"
            )
        if gate not in ("scalar", "vector"):
            raise OpticNerveError(f"gate is 'scalar' or 'vector', not {gate!r}", kind="unknown-name")
        if activation not in ACT2FN:
            raise OpticNerveError(
                f"unknown activation {activation!r}; known: {', '.join(sorted(ACT2FN))}", kind="unknown-name"
            )
        self.every = every
        inner = int(mlp_ratio * language_size)
        self.layers = nn.ModuleList(
            GatedCrossAttentionLayer(size=language_size, heads=heads, inner=inner, activation=activation, gate=gate)
            for _ in range(0, language_layers, every)
        )
        self.marker = nn.Parameter(torch.zeros(language_size))
        self.options = {
            "every": every, "heads": heads, "mlp_ratio": mlp_ratio, "activation": activation, "gate": gate,
        }  # fmt: skip

    def placeholders(self, num_tokens: int) -> int:
        return 1

    @torch.no_grad()
    def start(self, embeddings: nn.Module) -> None:
        self.marker.copy_(words_of(embeddings)[0])

    def wire(self, language_model: nn.Module) -> None:
        for number, layer in enumerate(decoder_layers(language_model)[1]):
            if number % self.every == 0:
                layer.register_forward_pre_hook(partial(self._before, number // self.every), with_kwargs=True)

    def embed(self, embeds_BLD: Tensor, placeholder_BL: Tensor, features: Features) -> Tensor:
        check_count(
            on_host(placeholder_BL).sum(), features.tokens_BND.shape[0],
            "{wanted} placeholders in the text, but {found} pictures: with cross_attention one placeholder stands for "
            "one picture; let the processor write them",
        )  # fmt: skip
        with onloaded(self):
            return torch.where(placeholder_BL[:, :, None], self.marker.to(embeds_BLD), embeds_BLD)

    def see(self, placeholder_BL: Tensor, features: Features, group_BL: Tensor | None = None) -> CrossAttentionStates:
        counts_B = placeholder_BL.sum(1)
        media_BMND, mask_BMN = _scatter_rows(features, counts_B, on_host(placeholder_BL).sum(1))
        number_BL = placeholder_BL.cumsum(1) - 1
        if group_BL is not None:
            # A sample of a packed row sees its own pictures alone.
            first_BL = torch.where(group_BL[:, :, None] == group_BL[:, None, :], 1, 0).argmax(2)
            before_BL = F.pad(placeholder_BL.cumsum(1), (1, 0))[:, :-1].gather(1, first_BL)
            number_BL = torch.where(number_BL >= before_BL, number_BL, -1)
        owner_BMN = torch.arange(mask_BMN.shape[1], device=mask_BMN.device)[None, :, None].where(mask_BMN, -1)
        return CrossAttentionStates(media_BMND.flatten(1, 2), owner_BMN.flatten(1), number_BL)

    def imagine(self, rows: int, length: int, features: Features) -> CrossAttentionStates:
        tokens_IND = features.tokens_BND
        each = -(-tokens_IND.shape[0] // rows)
        # Every row shows `each` pictures; where they do not divide, the first stand in for the missing ones.
        media_BKD = torch.cat([tokens_IND] * (-(-rows * each // tokens_IND.shape[0])))[: rows * each]
        media_BKD = media_BKD.unflatten(0, (rows, each)).flatten(1, 2)
        numbers = torch.empty(rows, media_BKD.shape[1], dtype=torch.long, device=media_BKD.device)
        return CrossAttentionStates(
            media_BKD, numbers, torch.empty(rows, length, dtype=torch.long, device=media_BKD.device)
        )

    def later(self, seen: CrossAttentionStates, length: int) -> CrossAttentionStates:
        return replace(seen, latest_BL=seen.latest_BL[:, -1:].expand(-1, length))

    def beside(self, parts: Sequence[tuple[CrossAttentionStates | None, Tensor]]) -> CrossAttentionStates:
        shown = [seen for seen, _ in parts if seen is not None]
        most = max(seen.media_BKD.shape[1] for seen in shown)

        def together(of: Callable[[CrossAttentionStates], Tensor], nothing: int, *, soft: bool = True) -> Tensor:
            """One tensor of all; `soft`: its second dimension from the end, or the last of two, counts soft tokens."""
            found = []
            for seen, index_B in parts:
                some = seen or shown[0]
                missing = most - some.media_BKD.shape[1] if soft else 0
                x = F.pad(of(some), (*(0, 0) * (of(some).ndim > 2), 0, missing), value=nothing)
                found.append(x.new_full((len(index_B), *x.shape[1:]), nothing) if seen is None else x[index_B])
            return torch.cat(found)

        def of_layer(number: int, which: int) -> Tensor:
            return together(lambda seen: seen.known[number][which], 0)

        layers = set[int].intersection(*(set(seen.known) for seen in shown))
        return CrossAttentionStates(
            together(lambda seen: seen.media_BKD, 0), together(lambda seen: seen.owner_BK, -1),
            together(lambda seen: seen.latest_BL[:, -1:], -1, soft=False),
            {n: (of_layer(n, 0), of_layer(n, 1)) for n in layers},
        )  # fmt: skip

    def _before(self, number: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The hook on a layer of the language model."""
        if self.seen is None:
            return None
        if args:
            return (self.attend(number, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.attend(number, kwargs["hidden_states"])}

    def attend(self, number: int, hidden_BLD: Tensor) -> Tensor:
        """The hidden states before the language model's layer `number × every`."""
        seen: CrossAttentionStates | None = self.seen
        if seen is None:
            return hidden_BLD
        layer: Any = self.layers[number]
        keys_values = seen.known.get(number)
        if keys_values is None:
            # Not the dtype of the projections' weights: they may be quantised.
            keys_values = layer.cross_attn.keys_values(seen.media_BKD.to(layer.alpha_cross_attn.dtype))
            if not torch.is_grad_enabled():
                seen.known[number] = keys_values
        sees_BL = seen.latest_BL >= 0
        out_BLD = layer(hidden_BLD, keys_values, seen.allowed_BLK, sees_BL)
        return torch.where(sees_BL[:, :, None], out_BLD, hidden_BLD)


def _scatter_rows(features: Features, counts_B: Tensor, known_B: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures of a batch, laid out by the rows that show them.

    `features`: (images, N, D) in reading order; `counts_B`: how many each row shows; `known_B`: the same, on the host
    if that knows them. Returns tokens (B, M, N, D), zero where a row shows fewer than M, and the mask (B, M, N).
    """
    tokens_IND, mask_IN = features.tokens_BND, features.mask_BN
    # A graph's shapes cannot depend on what the text holds: there, any row may show all pictures.
    most = len(tokens_IND) if torch.compiler.is_compiling() else max(1, int(known_B.max()))
    slot_M = torch.arange(most, device=counts_B.device)
    index_BM = (counts_B.cumsum(0) - counts_B)[:, None] + slot_M
    index_BM = index_BM.where(slot_M < counts_B[:, None], len(tokens_IND))  # a row of zeros behind the last picture
    return F.pad(tokens_IND, (0, 0, 0, 0, 0, 1))[index_BM], F.pad(mask_IN, (0, 0, 0, 1))[index_BM]
