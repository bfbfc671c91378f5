"""The decoding step of Llama's kind of decoder, with nothing in it but its arithmetic; and a cache with room to grow.

One new token asks little of the processor: each weight is read once, and the time that takes is the floor. In a small
model more time than that goes into calling modules, into three products where one would do, and into reading keys once
for each head. Here the same operations, in the same order and rounding, are called with no module around them, so that
the logits are the model's own, in bf16 bit for bit (in float32 a wider product may sum in another order):

- q, k and v are one product, gate and up are one product: their weights are laid beside each other in memory once, and
  the model's parameters become views of them, so no weight is held twice;
- for batches, bf16 weights are copied once per call into the blocks that oneDNN computes with, which halves the time of
  a product, where that takes no more than `PACK_UP_TO` bytes;
- the half-turned copy of the rotary embedding (Su et al. 2021, RoFormer) is made for queries and keys at once, with the
  sign in the sine.

Which models: exactly the classes in `CLASSES`, whose forward passes were read; plain linear layers, nothing hooked onto
them, SDPA attention without sliding windows, on a CPU. For all others `FusedDecoder.of` says None, and decoding calls
the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from opticnerve.common.private_names import attention_of, can_reorder, has_hooks, reorder_weight, reordered_linear
from opticnerve.ops import enabled, tell

CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
PACK_FROM = 4  # rows; below, plain products are as fast, and some round differently from packed ones
PACK_UP_TO = 2**30  # bytes
# These two change their frequencies as the text grows, so no table of them can be made ahead.
_GROWING_ROPE = ("dynamic", "longrope")


class FusedDecoder:
    """A language model as a function from the newest tokens to logits; built by `of`.

    Args:
        language_model: one of `CLASSES`.
        pack: for batches, products over packed copies of the weights.
    """

    def __init__(self, language_model: PreTrainedModel, *, pack: bool = True) -> None:
        inner, config = language_model.model, language_model.config
        self.pack = pack
        self.embedding, self.rotary, self.norm = inner.embed_tokens, inner.rotary_emb, inner.norm
        self.layers = [_Layer(layer, config) for layer in inner.layers[: config.num_hidden_layers]]
        self.head = _Product([language_model.lm_head])

    @classmethod
    def of(cls, language_model: PreTrainedModel, **options: bool) -> FusedDecoder | None:
        """The fused form of this model; None where its class, or something hooked onto it, is not known to fit."""
        if _fits(language_model):
            return cls(language_model, **options)
        tell(f"{type(language_model).__name__} decodes by its own forward pass")
        return None

    def still_fits(self, language_model: PreTrainedModel) -> bool:
        """Whether the model is as it was: hooks, adapters, moving and casting change it."""
        return _fits(language_model) and all(product.in_place() for product in self.products())

    def products(self) -> Iterator[_Product]:
        for layer in self.layers:
            yield from (layer.qkv, layer.out, layer.gate_up, layer.down)
        yield self.head

    def prepare(self, rows: int) -> None:
        """Called before the steps of a batch of so many rows."""
        size = sum(p.weight.nbytes for p in self.products())
        if self.pack and rows >= PACK_FROM and size <= PACK_UP_TO and can_reorder(self.head.weight.dtype):
            for product in self.products():
                product.pack()

    def release(self) -> None:
        """Give back the packed copies: weights may be trained before they are next asked for."""
        for product in self.products():
            product.packed = None

    def tables(self, first_B: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines (B, count, head size) of the positions from `first_B` on."""
        positions_BT = first_B[:, None] + torch.arange(count, device=first_B.device)
        cos_BTd, sin_BTd = self.rotary(self.embedding.weight[:1, None], positions_BT)
        half = sin_BTd.shape[-1] // 2
        return cos_BTd, torch.cat((-sin_BTd[..., :half], sin_BTd[..., half:]), -1)

    def step(
        self, tokens_B: Tensor, cos_Bd: Tensor, sin_Bd: Tensor, caches: list[ReservedLayer], mask_B11T: Tensor | None
    ) -> Tensor:
        """Logits (B, V) behind one more token of each row, whose keys and values go into `caches`.

        `cos_Bd`, `sin_Bd`: of this position, from `tables`. `mask_B11T`: bool, over all keys; None without padding.
        """
        hidden_BD = F.embedding(tokens_B, self.embedding.weight)
        turn = cos_Bd[:, None], sin_Bd[:, None]
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden_BD = layer(hidden_BD, turn, cache, mask_B11T)
        return self.head(_rms_norm(hidden_BD, self.norm))


class _Layer:
    """One decoder layer; see transformers' `LlamaDecoderLayer`, whose operations these are."""

    def __init__(self, layer: Any, config: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.queries, self.keys = config.num_attention_heads, config.num_key_value_heads
        self.size, self.scale = attention.head_dim, attention.scaling
        self.qkv = _Product([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = _Product([attention.o_proj])
        self.gate_up, self.down = _Product([mlp.gate_proj, mlp.up_proj]), _Product([mlp.down_proj])
        self.activation = mlp.act_fn
        self.before, self.between = layer.input_layernorm, layer.post_attention_layernorm
        self.head_norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None

    def __call__(
        self, hidden_BD: Tensor, turn: tuple[Tensor, Tensor], cache: ReservedLayer, mask: Tensor | None
    ) -> Tensor:
        rows, queries, keys = len(hidden_BD), self.queries, self.keys
        heads_BHd = self.qkv(_rms_norm(hidden_BD, self.before)).view(rows, -1, self.size)
        turned_BHd, value_BHd = heads_BHd[:, : queries + keys], heads_BHd[:, queries + keys :]
        if self.head_norms is not None:
            parts = zip(turned_BHd.split([queries, keys], 1), self.head_norms, strict=True)
            turned_BHd = torch.cat([_rms_norm(part, norm) for part, norm in parts], 1)
        cos_B1d, sin_B1d = turn
        turned_BHd = (turned_BHd * cos_B1d).add_(turned_BHd.roll(self.size // 2, -1).mul_(sin_B1d))
        keys_BHTd, values_BHTd = cache.update(turned_BHd[:, queries:, None], value_BHd[:, :, None])
        query_BHd = turned_BHd[:, :queries]
        if mask is not None:  # query heads that share keys read them together, as transformers does with padding alone
            query_BHGd = query_BHd.reshape(rows, keys, -1, self.size)
            read = F.scaled_dot_product_attention(query_BHGd, keys_BHTd, values_BHTd, mask, scale=self.scale)
        else:
            read = F.scaled_dot_product_attention(
                query_BHd[:, :, None], keys_BHTd, values_BHTd, scale=self.scale, enable_gqa=keys < queries
            )
        hidden_BD = hidden_BD + self.out(read.reshape(rows, -1))
        gate_BF, up_BF = self.gate_up(_rms_norm(hidden_BD, self.between)).chunk(2, -1)
        return hidden_BD.add_(self.down(self.activation(gate_BF).mul_(up_BF)))


class _Product:
    """Linear layers of one input as one product. Of several, the parameters become views of its weight."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        self.layers = layers
        self.weight: Tensor
        self.bias: Tensor | None
        self.packed: Tensor | None = None
        # Parameters that were made in inference mode could never train again.
        with torch.inference_mode(False), torch.no_grad():
            self.weight = _join([layer.weight for layer in layers])
            self.bias = None if layers[0].bias is None else _join([layer.bias for layer in layers])
        self.places = self._places()

    def in_place(self) -> bool:
        """Whether the layers' parameters still are what is computed with."""
        return self._places() == self.places

    def _places(self) -> list[tuple[int, torch.Size, torch.dtype]]:
        parameters = [p for layer in self.layers for p in (layer.weight, layer.bias) if p is not None]
        return [(p.data_ptr(), p.shape, p.dtype) for p in parameters]

    def pack(self) -> None:
        if self.packed is None:
            self.packed = reorder_weight(self.weight, PACK_FROM)

    def __call__(self, x_BD: Tensor) -> Tensor:
        if self.packed is not None and len(x_BD) >= PACK_FROM:
            return reordered_linear(x_BD, self.packed, self.bias)
        return F.linear(x_BD, self.weight, self.bias)


def _join(parameters: list[Any]) -> Tensor:
    if len(parameters) == 1:
        out: Tensor = parameters[0].detach()
        return out
    joined = torch.cat([p.detach() for p in parameters])
    for parameter, part in zip(parameters, joined.split([len(p) for p in parameters]), strict=True):
        parameter.data = part
    return joined


def _rms_norm(x: Tensor, norm: Any) -> Tensor:
    # Without its weight: Llama rounds to the model's precision before it multiplies with that, and torch after.
    return F.rms_norm(x, x.shape[-1:], None, norm.variance_epsilon).mul_(norm.weight)


def _fits(language_model: PreTrainedModel) -> bool:
    import transformers as tf

    known = type(language_model) in {getattr(tf, name) for name in CLASSES}
    if not enabled() or not known or language_model.training:
        return False
    config = language_model.config
    kinds = getattr(config, "layer_types", None)
    windows = set(kinds) != {"full_attention"} if kinds else getattr(config, "sliding_window", None) is not None
    linears = [language_model.lm_head]
    for layer in language_model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        linears += [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    parameters = list(language_model.parameters())
    return (
        not windows
        and attention_of(config) == "sdpa"
        and config.rope_parameters["rope_type"] not in _GROWING_ROPE
        and all(type(m) is nn.Linear for m in linears)
        and not any(has_hooks(m) or "forward" in vars(m) for m in language_model.modules())
        and {type(p) for p in parameters} == {nn.Parameter}
        and {p.device.type for p in parameters} == {"cpu"}
        and len({p.dtype for p in parameters}) == 1
    )


# -- the cache --------------------------------------------------------------------------------------------------------


class ReservedLayer(DynamicLayer):
    """transformers' `DynamicLayer` with `room` for so many more tokens; the cache of one layer of a decoder that has
    read a prompt.

    `keys` and `values`, (B, H, L, d), are views of buffers that reach further, so that a new token writes one row;
    `torch.cat`, which transformers' own layer uses, copies the whole past for each. Whoever replaces them (`crop`,
    `batch_select_indices`, …) is noticed, and the next token makes new buffers.
    """

    def __init__(self, layer: DynamicLayer, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.__dict__.update(vars(layer))
        self.room = room
        self._buffers: list[Tensor] = []
        self._shown: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        length, new = self.get_seq_length(), key_states.shape[2]
        assert self.keys is not None
        assert self.values is not None
        if not self._buffers or self._shown is not self.keys or self._buffers[0].shape[2] < length + new:
            known = (self.keys, self.values)
            self._buffers = [x.new_empty(*x.shape[:2], length + new + self.room, x.shape[3]) for x in known]
            for old, buffer in zip(known, self._buffers, strict=True):
                buffer.narrow(2, 0, length).copy_(old)
        for states, buffer in zip((key_states, value_states), self._buffers, strict=True):
            buffer.narrow(2, length, new).copy_(states)
        self.keys, self.values = (buffer.narrow(2, 0, length + new) for buffer in self._buffers)
        self._shown = self.keys
        return self.keys, self.values


def reserve(cache: Cache, room: int) -> bool:
    """Let each plain layer of a `DynamicCache` hold so many more tokens; True if that was all of its layers.

    Layers of other kinds (sliding windows, linear attention) know best how to keep themselves and stay.
    """
    if type(cache) is not DynamicCache or not enabled():
        return False
    cache.layers = [ReservedLayer(x, room) if type(x) is DynamicLayer and x.is_initialized else x for x in cache.layers]
    return all(type(layer) is ReservedLayer for layer in cache.layers)
