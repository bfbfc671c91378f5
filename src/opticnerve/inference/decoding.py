"""One token after another: the prompt is read once, then each step reads the newest token and a cache.

What transformers' `generate` says for the same `generation_config`, greedy or sampled, token for token, with less
around each step: the cache has room, models of Llama's kind decode by their bare arithmetic on a CPU
(`ops.fused_decode`), and rows of a batch that have ended leave it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, CompileConfig, PreTrainedConfig

from opticnerve.common.private_names import CACHE, compile_on_any_device, generation_config, generation_rules
from opticnerve.models.vlm.backbone import settled_rows
from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
from opticnerve.models.vlm.placeholders import barred
from opticnerve.models.vlm.prompt import kept
from opticnerve.ops.fused_decode import FusedDecoder, ReservedLayer, reserve
from opticnerve.types import OpticNerveError


@torch.inference_mode()
def decode(
    model: OpticNerveForConditionalGeneration, inputs: dict[str, Any], *, max_new_tokens: int, cache: Any = None,
    fused: FusedDecoder | None = None, drop_finished: bool = True, room: bool = True, seed: int | None = None,
    **options: Any,
) -> Iterator[Tensor]:  # fmt: skip
    """The next token of each row, (B,), until all rows have ended; a row that has ended goes on with padding.

    Args:
        inputs: as the model's `forward` takes them, padded on the left. cache: keys and values of the first tokens of
            `input_ids`, read earlier; it is written to. fused: the language model's fused form, where it has one.
        drop_finished: rows that have ended leave the batch once half of it has. room: let the cache grow in place.
            (These two are off only to be measured.)
        seed: of the draws, with `do_sample=True`. options: as for transformers' `generate`.

    A `generation_config` that asks for more than a step per token (`plain`) is transformers' business: all tokens come
    at the end of its `generate`.
    """
    config = generation_config(model, max_new_tokens=max_new_tokens, **options)
    if not plain(config):
        out_BL = model.generate(**inputs, **{CACHE: cache}, max_new_tokens=max_new_tokens, **options)
        yield from out_BL[:, inputs["input_ids"].shape[1] :].unbind(1)
        return
    ids_BL, media = inputs["input_ids"], {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    device = ids_BL.device
    ends = None if config.eos_token_id is None else torch.tensor(config.eos_token_id, device=device)
    mask_BL = inputs.get("attention_mask")
    mask_BL = torch.ones_like(ids_BL) if mask_BL is None else mask_BL
    change = generation_rules(model, config, ids_BL)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    state = _State(model, ids_BL, mask_BL, max_new_tokens, fused)
    logits_BV = state.read(cache, media, room)
    rows_B = torch.arange(len(ids_BL), device=device)  # who the rows of the batch are, as ended ones leave
    live_B = torch.ones_like(rows_B, dtype=torch.bool)
    for number in range(max_new_tokens):
        scores_BV = change(state.ids(), logits_BV.float()) if change else logits_BV
        if config.do_sample:
            chance_BV = scores_BV.float().softmax(-1)
            chosen_B = torch.multinomial(chance_BV, 1, generator=generator).squeeze(1)
        else:
            chosen_B = scores_BV.argmax(-1)
        chosen_B = chosen_B.masked_fill(~live_B, config.pad_token_id or 0)
        said_B = chosen_B
        if len(rows_B) < len(ids_BL):
            said_B = chosen_B.new_full((len(ids_BL),), config.pad_token_id or 0).index_copy_(0, rows_B, chosen_B)
        if ends is not None:
            live_B = live_B & ~torch.isin(chosen_B, ends)
        yield said_B
        count = int(live_B.sum())
        if count == 0 or number + 1 == max_new_tokens:
            return
        if drop_finished and 2 * count <= len(rows_B) and state.can_narrow():
            chosen = live_B.nonzero().squeeze(1)
            state.narrow(chosen)
            rows_B, live_B, chosen_B = rows_B[chosen], live_B[chosen], chosen_B[chosen]
        logits_BV = state.step(chosen_B)


def plain(config: PreTrainedConfig) -> bool:
    """Whether this generation_config asks for plain greedy or sampled decoding, one step per token."""
    return (
        (config.num_beams or 1) == 1
        and (config.num_return_sequences or 1) == 1
        and config.guidance_scale in (None, 1, 1.0)
        and not config.prompt_lookup_num_tokens
        and config.cache_implementation is None
        and config.max_time is None
        and config.stop_strings is None
        and not config.watermarking_config
        and config.use_cache is not False
    )


@torch.inference_mode()
def decode_compiled(
    model: OpticNerveForConditionalGeneration,
    inputs: dict[str, Any],
    *,
    max_new_tokens: int,
    cache: None = None,
    fused: Any = None,
    **options: Any,
) -> Iterator[Tensor]:
    """As `decode`, by transformers' compiled step over a static cache, for devices where launching costs more than
    computing; all tokens come at its end. The prompt is read by `model`, the steps are its language model's.

    Raises:
        OpticNerveError: with cross-attention, or an adapter that steps aside on text: the compiled step knows neither.
    """
    language, ids_BL = model.language_model, inputs.pop("input_ids")
    mask_BL = inputs.pop("attention_mask", None)
    prompt = model.read(ids_BL, **inputs)
    if any(seen is not None for seen in prompt.seen.values()) or prompt.rows_B is not None:
        raise OpticNerveError(
            "compile=True knows neither cross-attention nor lora `when: media`; leave it out", kind="conflict"
        )
    # Else transformers compiles on accelerators alone; who asks on a CPU gets it.
    config: Any = CompileConfig(mode="reduce-overhead" if model.device.type == "cuda" else "default")
    compile_on_any_device(config)
    tokens_BT = language.generate(
        inputs_embeds=prompt.embeds_BLD, attention_mask=mask_BL, max_new_tokens=max_new_tokens,
        cache_implementation="static", compile_config=config, suppress_tokens=barred_words(model), **options,
    )  # fmt: skip
    yield from tokens_BT.unbind(1)


def forward_rows(
    model: OpticNerveForConditionalGeneration, media_B: Tensor | None, *, logits_to_keep: int = 1, **inputs: Any
) -> Any:
    """A step of generation: the model's output with its cache.

    Args:
        media_B: which rows hold media (`rows_with_media` of the prompt), which a row's newest token alone does not say.
        logits_to_keep: as for the model's `forward`.
    """
    token = settled_rows.set(media_B)
    try:
        return model(**inputs, use_cache=True, logits_to_keep=logits_to_keep)
    finally:
        settled_rows.reset(token)


def barred_words(model: OpticNerveForConditionalGeneration) -> list[int] | None:
    """The placeholders that the language model itself could say: those that lie in its table."""
    return [i for i in model.placeholder_ids if i < model.config.text_config.vocab_size] or None


class _State:
    """What one decoding carries from step to step."""

    def __init__(
        self,
        model: OpticNerveForConditionalGeneration,
        ids_BL: Tensor,
        mask_BL: Tensor,
        new: int,
        fused: FusedDecoder | None,
    ) -> None:
        self.model, self.fused = model, fused
        self.media_B = model.rows_with_media(ids_BL)
        self.length = ids_BL.shape[1]
        self.padded = not bool(mask_BL.all())
        self.all_ids_BT = torch.cat([ids_BL, ids_BL.new_zeros(len(ids_BL), new)], 1)
        self.all_mask_BT = torch.cat([mask_BL, mask_BL.new_ones(len(ids_BL), new)], 1)
        self.next_B = mask_BL.sum(1)  # the position of the next token
        self.cache: Any = None
        self.tables: tuple[Tensor, Tensor] | None = None
        self.new, self.steps = new, 0

    def ids(self) -> Tensor:
        return self.all_ids_BT[:, : self.length]

    def read(self, cache: Cache | None, media: dict[str, Any], room: bool) -> Tensor:
        """Logits (B, V) behind the prompt."""
        past = 0 if cache is None else cache.get_seq_length()
        mask_BL = self.all_mask_BT[:, : self.length]
        position_BL = (mask_BL.long().cumsum(1) - 1).masked_fill(mask_BL == 0, 0)
        out = forward_rows(
            self.model, self.media_B, input_ids=self.ids()[:, past:], attention_mask=mask_BL if self.padded else None,
            position_ids=position_BL[:, past:], **media, **{CACHE: cache},  # type: ignore[arg-type]
        )  # fmt: skip
        self.cache = out[CACHE]
        reserved = room and reserve(self.cache, self.new)
        self.beside = any(seen is not None for seen in kept(self.cache).values())
        if not reserved or self.beside or self.media_B is not None:
            self.fused = None
        self.reserved = reserved
        if self.fused is not None:
            first_B = self.next_B if self.padded else self.next_B[:1]
            self.tables = self.fused.tables(first_B, self.new)
            self.fused.prepare(len(self.next_B))
            self.sees_BT = self.all_mask_BT.bool()[:, None, None]
        found: Tensor = out.logits[:, -1]
        return found

    def step(self, tokens_B: Tensor) -> Tensor:
        """Logits (B, V) behind one more token of each row."""
        self.all_ids_BT[:, self.length] = tokens_B
        self.length += 1
        if self.fused is not None:
            assert self.tables is not None
            cos_BTd, sin_BTd = self.tables
            logits_BV = self.fused.step(
                tokens_B, cos_BTd[:, self.steps], sin_BTd[:, self.steps], self.cache.layers,
                self.sees_BT[..., : self.length] if self.padded else None,
            )  # fmt: skip
            logits_BV = barred(logits_BV, self.model.placeholder_ids)
        else:
            out = forward_rows(
                self.model, self.media_B, input_ids=tokens_B[:, None], position_ids=self.next_B[:, None],
                attention_mask=self.all_mask_BT[:, : self.length] if self.padded else None, **{CACHE: self.cache},
            )  # fmt: skip
            self.cache, logits_BV = out[CACHE], out.logits[:, -1]
            self.next_B = self.next_B + 1
        self.steps += 1
        return logits_BV

    def can_narrow(self) -> bool:
        """Whether every piece of the state is one that rows can leave."""
        return self.reserved and not self.beside and all(type(x) is ReservedLayer for x in self.cache.layers)

    def narrow(self, chosen: Tensor) -> None:
        """Only these rows go on. `chosen`: (rows,) indices."""
        self.cache.batch_select_indices(chosen)
        self.all_ids_BT, self.all_mask_BT = self.all_ids_BT[chosen], self.all_mask_BT[chosen]
        self.next_B = self.next_B[chosen]
        self.media_B = None if self.media_B is None else self.media_B[chosen]
        if self.tables is not None:
            self.sees_BT = self.sees_BT[chosen]
            if self.padded:
                self.tables = (self.tables[0][chosen], self.tables[1][chosen])
