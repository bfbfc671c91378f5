"""`OpticNerveForConditionalGeneration`: eyes docked onto a causal language model, by transformers' conventions."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from opticnerve.encoders.base import Encoder
from opticnerve.language.lora import adapter_on, add_lora
from opticnerve.models.configuration import OpticNerveConfig
from opticnerve.models.tower import Tower, build_tower
from opticnerve.types import Features, OpticNerveError

# `PreTrainedModel.from_pretrained` keeps `trust_remote_code` to itself; the constructor needs it for dotted paths.
_trusted: ContextVar[bool] = ContextVar("trust_remote_code", default=False)


# While `generate` runs, a step sees its newest token only: whether a row holds a picture was settled by the prompt.
_rows: ContextVar[Tensor | None] = ContextVar("rows_with_media", default=None)


@dataclass
class OpticNerveOutput(ModelOutput):
    """As transformers' `LlavaCausalLMOutputWithPast`: `logits` (B, L, V), and `image_hidden_states` (images, N, D)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


class OpticNerveForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A language model with an eye.

    `language_model` is any `AutoModelForCausalLM`, untouched; `image` is a `Tower` (encoder, connector, fusion). A
    prompt without pictures goes to the language model as it came, so its logits are the bare model's, bit for bit.
    """

    config_class = OpticNerveConfig
    config: OpticNerveConfig
    image: Tower
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # type: ignore[assignment]
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
        width = self.language_model.get_input_embeddings().embedding_dim
        if "image" in config.towers:
            trusted = trust_remote_code or _trusted.get()
            self.image = build_tower(config.towers["image"], language_width=width, trust_remote_code=trusted)
        if config.lora:
            add_lora(self.language_model, config.lora)
        self._no_split_modules = list(getattr(self.language_model, "_no_split_modules", None) or [])
        self.post_init()

    @classmethod
    def from_parts(cls, language_model: Any, *, image: Tower | None, image_token_id: int) -> Any:
        """Dock modules that already hold their weights; nothing is copied."""
        towers = {"image": image.describe()} if image is not None else {}
        # The configuration's constructor resets its sub-configurations: remember which attention was loaded.
        attention = language_model.config._attn_implementation
        config = OpticNerveConfig(text_config=language_model.config, towers=towers, image_token_id=image_token_id)
        config._attn_implementation = attention
        model = cls.__new__(cls)
        PreTrainedModel.__init__(model, config)
        language_model.config._attn_implementation = attention
        model.language_model = language_model
        if image is not None:
            model.image = image
        model._no_split_modules = list(getattr(language_model, "_no_split_modules", None) or [])
        # post_init would draw new random weights for parts that have theirs already; only its bookkeeping is wanted.
        model.all_tied_weights_keys = {
            f"language_model.{k}": f"language_model.{v}"
            for k, v in (getattr(language_model, "all_tied_weights_keys", None) or {}).items()
        }
        model.config.dtype = language_model.dtype
        model.config.architectures = [cls.__name__]
        if language_model.can_generate():
            model.generation_config = language_model.generation_config
        return model.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a self-contained folder, or a run's folder that holds what was trained and names its bases.

        Every tensor is accounted for: missing, unexpected and mismatched ones are an error that lists them. Parts under
        dotted paths (code from outside opticnerve) are run with `trust_remote_code=True` only.
        """
        from opticnerve.models import delta

        trusted = bool(kwargs.get("trust_remote_code", False))
        folder = delta.find(pretrained_model_name_or_path)
        if folder is not None:
            dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
            model: Any = delta.load(folder, dtype=dtype, trust_remote_code=trusted)
            device_map = kwargs.get("device_map")
            if isinstance(device_map, str | int | torch.device) and device_map not in (
                "auto",
                "balanced",
                "sequential",
            ):
                model.to(device_map)
            return model
        wants_report = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # so that they are listed below with the others, and refused
        token = _trusted.set(trusted)
        try:
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        finally:
            _trusted.reset(token)
        model, report = loaded
        problems = {k: sorted(map(str, v)) for k, v in report.items() if k.endswith("_keys") and v}
        if problems:
            listing = "; ".join(f"{k.replace('_', ' ')}: {', '.join(v[:12])}" for k, v in problems.items())
            raise OpticNerveError(
                f"the weights in {pretrained_model_name_or_path} do not fit its config.json: {listing}"
            )
        if hasattr(model, "image"):
            restore_buffers(model.image.encoder)
        return (model, report) if wants_report else model

    # -- what transformers asks for -------------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.language_model.get_decoder()

    def _init_weights(self, module: nn.Module) -> None:
        """Random weights of a fresh model; encoders and language models draw their own when they are built."""
        if isinstance(module, nn.Linear) and any(module is m for m in self.image.connector.modules()):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def give_lora(self, options: dict[str, Any]) -> None:
        """Put an adapter on the language model; the configuration remembers it. (`options`: as for `add_lora`.)"""
        add_lora(self.language_model, options)
        self.config.lora = options

    # -- the flow -------------------------------------------------------------------------------------------------

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Soft tokens of pictures: (images, 3, H, W) → (images, num_tokens, language width)."""
        return self.image(pixel_values).tokens_BND

    def embed(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, image_features: Features | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Text and picture as one row of embeddings (B, L, D), and the soft tokens.

        `image_features`: what `image.encode` gave (a cache of frozen features), instead of `pixel_values`.
        """
        if self.config.image_token_id is None:
            return self.get_input_embeddings()(input_ids), None
        placeholder_BL = input_ids == self.config.image_token_id
        # The placeholder's id may lie beyond the embedding table; its own embedding is overwritten anyway.
        embeds_BLD = self.get_input_embeddings()(input_ids.masked_fill(placeholder_BL, 0))
        if pixel_values is None and image_features is None:
            if bool(placeholder_BL.any()):
                raise ValueError(
                    f"{int(placeholder_BL.sum())} image placeholders in the text, but 0 visual tokens: "
                    "no pixel_values given"
                )
            return embeds_BLD, None
        soft = self.image(pixel_values) if image_features is None else self.image.connect(image_features)
        return self.image.fusion(embeds_BLD, placeholder_BL, soft), soft.tokens_BND

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        image_features: Features | None = None,
        **kwargs: Any,
    ) -> OpticNerveOutput:
        """One forward pass.

        Args:
            input_ids: (B, L) with placeholders as the processor wrote them. pixel_values: (images, 3, H, W), the
            pictures
                of the whole batch in the order of their placeholders. labels: (B, L), -100 where there is nothing to
                learn. The rest as for any causal language model of transformers.

        Raises:
            ValueError: the number of placeholders is not the number of visual tokens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        soft = None
        rows_B = self._adapter_rows(input_ids, inputs_embeds)
        if inputs_embeds is None and (
            pixel_values is not None or image_features is not None or self._has_placeholder(input_ids)
        ):
            inputs_embeds, soft = self.embed(input_ids, pixel_values, image_features)  # type: ignore[arg-type]
            input_ids = None
        with adapter_on(self.language_model, rows_B):
            out = self.language_model(
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **{k: v for k, v in kwargs.items() if k not in ("return_dict", "num_items_in_batch")},
                return_dict=True,
            )
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=out.logits, labels=labels, vocab_size=out.logits.shape[-1],
                **{k: v for k, v in kwargs.items() if k == "num_items_in_batch"},
            )  # fmt: skip
        return OpticNerveOutput(
            loss=loss,
            logits=out.logits,
            past_key_values=out.get("past_key_values"),
            hidden_states=out.get("hidden_states"),
            attentions=out.get("attentions"),
            image_hidden_states=soft,
        )

    def rows_with_media(self, input_ids: Tensor) -> Tensor | None:
        """(B,) bool: the rows that hold a picture; None where the adapter does not ask (no gate on it)."""
        if getattr(self.language_model, "lora_gate", None) is None:
            return None
        return input_ids.eq(self.config.image_token_id or -1).any(1)

    def _adapter_rows(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor | None:
        """The rows that the adapter works on in this forward pass."""
        rows_B = _rows.get()
        if rows_B is None:
            return None if input_ids is None else self.rows_with_media(input_ids)
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        # Beams and several answers stand beside each other, each prompt's together.
        return rows_B.repeat_interleave(given.shape[0] // rows_B.shape[0])

    def generate(self: Any, inputs: Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As for any model of transformers. Which rows hold a picture is settled by the prompt, once, for all steps."""
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        rows_B = self.rows_with_media(input_ids) if isinstance(input_ids, Tensor) and input_ids.ndim == 2 else None
        token = _rows.set(rows_B)
        try:
            return GenerationMixin.generate(self, inputs, **kwargs)
        finally:
            _rows.reset(token)

    def _has_placeholder(self, input_ids: Tensor | None) -> bool:
        token = self.config.image_token_id
        return token is not None and input_ids is not None and bool((input_ids == token).any())

    def _expand_inputs_for_generation(  # type: ignore[override]
        self: Any, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Beams and several answers repeat each row; the pictures of a row are repeated as one block, in their
        order."""
        pixels = model_kwargs.pop("pixel_values", None)
        if pixels is not None and expand_size > 1 and input_ids is not None:
            counts = (input_ids == self.config.image_token_id).sum(1) // self.image.num_tokens
            rows = torch.split(pixels, counts.tolist())
            pixels = torch.cat([row for row in rows for _ in range(expand_size)])
        input_ids, model_kwargs = GenerationMixin._expand_inputs_for_generation(
            self, expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if pixels is not None:
            model_kwargs["pixel_values"] = pixels
        return input_ids, model_kwargs


def restore_buffers(encoder: Encoder) -> None:
    """Compute again what a checkpoint does not carry: non-persistent buffers of encoders that are not transformers'
    own.

    `from_pretrained` builds the model without memory and fills in what the file holds; tables that a constructor
    computes (timm's rotary embeddings, relative positions) would stay empty.
    """
    persistent = set(encoder.state_dict())
    missing = [name for name, _ in encoder.named_buffers() if name not in persistent]
    if not missing:
        return
    fresh = dict(type(encoder)(**encoder.options).named_buffers())
    for name in missing:
        place = encoder.get_buffer(name)
        owner = encoder.get_submodule(name.rpartition(".")[0])
        owner._buffers[name.rpartition(".")[2]] = fresh[name].to(device=place.device, dtype=place.dtype)
