"""`OpticNerveForConditionalGeneration`: vision encoders and audio encoders docked onto a causal language model, by
transformers' conventions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from opticnerve.common.private_names import (
    CACHE,
    attention_of,
    layers_not_to_split,
    set_attention,
    set_layers_not_to_split,
)
from opticnerve.language.lora import add_lora, mask_of
from opticnerve.models.checkpoint import delta
from opticnerve.models.checkpoint.strict import StrictLoading, restore_buffers, trusts
from opticnerve.models.vlm.configuration import OpticNerveConfig
from opticnerve.models.vlm.parts import DockedParts
from opticnerve.models.vlm.prompt import MEDIA_KEYS, Prompt, keep, kept, multimodal_context, repeat_media
from opticnerve.models.vlm.tower import MEDIA_INPUT, Tower, build_tower, language_sizes
from opticnerve.ops import varlen
from opticnerve.types import Features

# While `generate` runs, a step sees its newest token only: whether a row holds a picture was settled by the prompt.
settled_rows: ContextVar[Tensor | None] = ContextVar("rows_with_media", default=None)


@dataclass
class OpticNerveOutput(CausalLMOutputWithPast):
    """As transformers' `LlavaCausalLMOutputWithPast`: what a causal language model gives, and `image_hidden_states`
    (images, N, D), `audio_hidden_states` (windows, N, D): the soft tokens."""

    image_hidden_states: Tensor | None = None
    audio_hidden_states: Tensor | None = None


class OpticNerveForConditionalGeneration(StrictLoading, DockedParts, PreTrainedModel, GenerationMixin):
    """A language model with a vision encoder, an audio encoder, or both.

    `language_model` is any `AutoModelForCausalLM`, untouched; `image` and `audio` are `Tower`s (encoder, connector,
    fusion). A prompt without media goes to the language model as it came, so its logits are the bare model's, bit for
    bit.
    """

    config_class = OpticNerveConfig
    config: OpticNerveConfig
    image: Tower
    audio: Tower
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "audio", "text")  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False
    accepts_loss_kwargs = True

    def __init__(self, config: OpticNerveConfig, *, trust_remote_code: bool = False) -> None:
        super().__init__(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        sizes = language_sizes(self.language_model)
        trusted = trusts(trust_remote_code)
        for modality, spec in config.towers.items():
            setattr(self, modality, build_tower(spec, sizes, trust_remote_code=trusted))
        if config.lora:
            add_lora(self.language_model, config.lora)
        set_layers_not_to_split(self, layers_not_to_split(self.language_model))
        self._wire()
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_parts(
        cls, language_model: PreTrainedModel, towers: dict[str, Tower], *, image_token_id: int | None = None,
        audio_token_id: int | None = None,
    ) -> Any:  # fmt: skip
        """Dock modules that already hold their weights; nothing is copied. `towers`: by modality."""
        # The configuration's constructor resets its sub-configurations: remember which attention was loaded.
        attention = attention_of(language_model.config)
        config = OpticNerveConfig(
            text_config=language_model.config, towers={m: t.describe() for m, t in towers.items()},
            image_token_id=image_token_id, audio_token_id=audio_token_id,
        )  # fmt: skip
        set_attention(config, attention)
        model = cls.__new__(cls)
        PreTrainedModel.__init__(model, config)
        set_attention(language_model.config, attention)
        model.language_model = language_model
        for modality, tower in towers.items():
            setattr(model, modality, tower)
        set_layers_not_to_split(model, layers_not_to_split(language_model))
        # post_init would draw new random weights for parts that have theirs already; only its bookkeeping is wanted.
        model.all_tied_weights_keys = {
            f"language_model.{k}": f"language_model.{v}"
            for k, v in (getattr(language_model, "all_tied_weights_keys", None) or {}).items()
        }
        model.config.dtype = language_model.dtype
        model.config.architectures = [cls.__name__]
        if language_model.can_generate():
            model.generation_config = language_model.generation_config
        model._wire()
        return model.eval()  # type: ignore[no-untyped-call]

    @property
    def towers(self) -> dict[str, Tower]:
        """By modality: `image`, `audio`, as far as the model has them."""
        return {m: getattr(self, m) for m in MEDIA_INPUT if m in self.config.towers}

    def _wire(self) -> None:
        for tower in self.towers.values():
            tower.fusion.wire(self.language_model)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[Any] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a self-contained folder, or a run's folder that holds what was trained and names its bases.

        Every tensor is accounted for: missing, unexpected and mismatched ones are an error that lists them. Parts under
        dotted paths (code from outside opticnerve) are run with `trust_remote_code=True` only.
        """
        trusted = bool(kwargs.get("trust_remote_code", False))
        folder = delta.find(str(pretrained_model_name_or_path))
        if folder is None:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        dtype, device = kwargs.get("dtype", kwargs.get("torch_dtype")), kwargs.get("device_map")
        model = delta.load(cls, folder, dtype=dtype, trust_remote_code=trusted)
        if isinstance(device, str | int | torch.device) and device not in ("auto", "balanced", "sequential"):
            model.to(device)
        return model

    def restore_tables(self) -> None:
        """Encoders, connectors and fusions may be no models of transformers."""
        sizes = language_sizes(self.language_model)
        for modality, tower in self.towers.items():
            spec = self.config.towers[modality]
            restore_buffers(tower, partial(build_tower, spec, sizes, trust_remote_code=True))

    # -- what transformers asks for -------------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        module: nn.Module = self.language_model.get_input_embeddings()
        return module

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        module: nn.Module | None = self.language_model.get_output_embeddings()
        return module

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        module: nn.Module = self.language_model.get_decoder()
        return module

    def _init_weights(self, module: nn.Module) -> None:
        """Random weights of a fresh model; encoders and language models draw their own when they are built."""
        connectors = [t.connector for t in self.towers.values()]
        if isinstance(module, nn.Linear) and any(module is m for c in connectors for m in c.modules()):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def give_lora(self, options: dict[str, Any]) -> None:
        """Put an adapter on the language model; the configuration remembers it. (`options`: as for `add_lora`.)"""
        add_lora(self.language_model, options)
        self.config.lora = options

    # -- the flow -------------------------------------------------------------------------------------------------

    def get_image_features(self, pixel_values: Tensor, image_sizes: Tensor | None = None, *question: Tensor) -> Tensor:
        """Soft tokens of pictures: (images, 3, H, W) → (images, num_tokens, language width)."""
        out: Tensor = self.image(pixel_values, image_sizes, question or None).tokens_BND
        return out

    def get_audio_features(self, input_features: Tensor) -> Tensor:
        """Soft tokens of sound: (windows, mels, frames) → (windows, num_tokens, language width)."""
        out: Tensor = self.audio(input_features).tokens_BND
        return out

    def read(self, input_ids: Tensor, *, group: Tensor | None = None, **media: Any) -> Prompt:
        """Text and media as the language model takes them.

        Args:
            input_ids: (B, L) with placeholders. group: (B, L), which sample of a packed row each position belongs to.
            media: `pixel_values`, `image_sizes`, `qformer_input_ids`, `qformer_attention_mask`, `input_features`, as
                `forward` takes them, or `image_features`, `audio_features`: what a tower's `encode` gave (a cache of
                frozen features).

        Raises:
            ValueError: the number of placeholders is not that of the soft tokens; the message has both.
        """
        places: dict[str, Any] = {m: input_ids == self.config.token_id(m) for m in self.towers}
        known_BL = input_ids
        for place_BL in places.values():
            # A placeholder's id may lie beyond the embedding table; its own embedding is overwritten anyway.
            known_BL = known_BL.masked_fill(place_BL, 0)
        prompt = Prompt(self.get_input_embeddings()(known_BL), rows_B=self.rows_with_media(input_ids))
        for modality, tower in self.towers.items():
            place_BL, fusion = places[modality], tower.fusion
            soft = self._soft(modality, tower, media)
            if soft is not None:
                prompt.embeds_BLD = fusion.embed(prompt.embeds_BLD, place_BL, soft)  # type: ignore[arg-type]
                prompt.seen[modality] = fusion.see(place_BL, soft, group)
                prompt.soft[modality] = soft.tokens_BND
            elif bool(place_BL.any()):
                raise ValueError(
                    f"{int(place_BL.sum())} {modality} placeholders in the text, but 0 visual tokens: "
                    f"no {MEDIA_INPUT[modality]} given"
                )
            elif _must_take_part(tower):
                prompt.embeds_BLD = fusion.dummy_pass(prompt.embeds_BLD, tower.dummy_features())  # type: ignore[arg-type]
        return prompt

    def _soft(self, modality: str, tower: Tower, media: dict[str, Any]) -> Features | None:
        features, given = media.get(f"{modality}_features"), media.get(MEDIA_INPUT[modality])
        if features is None:
            if given is None:
                return None
            features = tower.encode(given)
        sizes = media.get("image_sizes") if modality == "image" else None
        ids, mask = media.get("qformer_input_ids"), media.get("qformer_attention_mask")
        text = None if ids is None else (ids, torch.ones_like(ids) if mask is None else mask)
        return tower.connect(features, sizes, text)

    def multimodal_context(self, prompt: Prompt) -> AbstractContextManager[None]:
        """Within it, a forward pass of `language_model` sees the prompt's media."""
        return multimodal_context(self.language_model, {m: t.fusion for m, t in self.towers.items()}, prompt)

    def recompute(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """`context_fn` for gradient checkpointing: a layer that is run again sees what it saw the first time."""
        seen, attended = {m: t.fusion.seen for m, t in self.towers.items()}, varlen.current()
        mask = mask_of(self.language_model)
        prompt = Prompt(seen=seen, rows_B=None if mask is None else mask.rows_B)

        @contextmanager
        def again() -> Iterator[None]:
            with self.multimodal_context(prompt), varlen.within(self.language_model, attended):
                yield

        return nullcontext(), again()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        image_features: Features | None = None,
        audio_features: Features | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> OpticNerveOutput:
        """One forward pass.

        Args:
            input_ids: (B, L) with placeholders as the processor wrote them.
            pixel_values: (images, 3, H, W), the pictures of the whole batch in the order of their placeholders; with
                tiling the tiles of all of them, and image_sizes (images, 2) their heights and widths.
            input_features: (windows, mels, frames), the sound of the whole batch in the order of its placeholders.
            labels: (B, L), -100 where there is nothing to learn.
            qformer_input_ids, qformer_attention_mask: (images, T), the questions, where the connector reads them.
            cache, past_key_values: two names of one thing; transformers knows the first from 5.24 on.
            The rest as for any causal language model of transformers.

        Raises:
            ValueError: the number of placeholders is not the number of soft tokens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if cache is not None and past_key_values is not None:
            raise ValueError("give one of cache and past_key_values")
        cache = past_key_values if cache is None else cache
        media: dict[str, Any] = {
            "pixel_values": pixel_values, "image_sizes": image_sizes, "input_features": input_features,
            "qformer_input_ids": qformer_input_ids, "qformer_attention_mask": qformer_attention_mask,
            "image_features": image_features, "audio_features": audio_features,
        }  # fmt: skip
        if input_ids is not None and (
            any(v is not None for v in media.values()) or bool(self._placeholders(input_ids).any())
        ):
            prompt = self.read(input_ids, **media)
            input_ids, inputs_embeds = None, prompt.embeds_BLD
        else:
            length = (input_ids if input_ids is not None else inputs_embeds).shape[1]  # type: ignore[union-attr]
            seen = {m: getattr(self, m).fusion.later(s, length) for m, s in kept(cache).items()}
            prompt = Prompt(seen=seen, rows_B=None if input_ids is None else self.rows_with_media(input_ids))
        prompt.rows_B = self._adapter_rows(prompt.rows_B, inputs_embeds if input_ids is None else input_ids)
        with self.multimodal_context(prompt):
            out = self.language_model(
                input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask,
                position_ids=position_ids, use_cache=use_cache, logits_to_keep=logits_to_keep, return_dict=True,
                **{CACHE: cache},
                **{k: v for k, v in kwargs.items() if k not in ("return_dict", "num_items_in_batch")},
            )  # fmt: skip
        cache = out.get(CACHE)
        keep(cache, prompt.seen)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=out.logits, labels=labels, vocab_size=out.logits.shape[-1],
                **{k: v for k, v in kwargs.items() if k == "num_items_in_batch"},
            )  # fmt: skip
        return OpticNerveOutput(
            loss=loss, logits=out.logits, **{CACHE: cache}, hidden_states=out.get("hidden_states"),
            attentions=out.get("attentions"), image_hidden_states=prompt.soft.get("image"),
            audio_hidden_states=prompt.soft.get("audio"),
        )  # fmt: skip

    def rows_with_media(self, input_ids: Tensor) -> Tensor | None:
        """(B,) bool: the rows that hold media; None where the adapter does not ask (no mask on it)."""
        if mask_of(self.language_model) is None:
            return None
        return self._placeholders(input_ids).any(1)

    def _placeholders(self, input_ids: Tensor) -> Tensor:
        found_BL = torch.zeros_like(input_ids, dtype=torch.bool)
        for modality in self.towers:
            found_BL |= input_ids == self.config.token_id(modality)
        return found_BL

    def _adapter_rows(self, rows_B: Tensor | None, given: Tensor | None) -> Tensor | None:
        """The rows that the adapter works on in this forward pass."""
        settled_B = settled_rows.get()
        if settled_B is None:
            return rows_B
        assert given is not None
        # Beams and several answers stand beside each other, each prompt's together.
        return settled_B.repeat_interleave(given.shape[0] // settled_B.shape[0])

    def generate(self: Any, inputs: Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As for any model of transformers. Which rows hold a picture is settled by the prompt, once, for all steps."""
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        rows_B = self.rows_with_media(input_ids) if isinstance(input_ids, Tensor) and input_ids.ndim == 2 else None
        token = settled_rows.set(rows_B)
        try:
            return GenerationMixin.generate(self, inputs, **kwargs)
        finally:
            settled_rows.reset(token)

    def _expand_inputs_for_generation(
        self: Any, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Beams and several answers repeat each row; the media of a row are repeated as one block, in their order."""
        media = {k: model_kwargs.pop(k) for k in MEDIA_KEYS if model_kwargs.get(k) is not None}
        if media and expand_size > 1 and input_ids is not None:
            places = {m: (input_ids == self.config.token_id(m)).sum(1).tolist() for m in self.towers}
            media = repeat_media(media, places, self.towers, expand_size)
        input_ids, model_kwargs = GenerationMixin._expand_inputs_for_generation(
            self, expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **media}


def _must_take_part(tower: Tower) -> bool:
    """Whether trained weights of a tower that has nothing to do must still get a gradient: other processes wait."""
    return (
        torch.is_grad_enabled()
        and torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
        and any(p.requires_grad for p in tower.parameters())
    )
