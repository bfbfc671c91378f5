"""`OpticNerveModel`: a docked model without its head, by transformers' conventions: it gives hidden states.

The model with the head, which answers, is `modeling.OpticNerveForConditionalGeneration`.
"""

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
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from opticnerve.common.on_host import known, on_host
from opticnerve.common.private_names import (
    CACHE,
    attention_of,
    cache_name,
    experts_of,
    is_without_positions,
    layers_not_to_split,
    set_attention,
    set_experts,
    set_layers_not_to_split,
)
from opticnerve.connectors.base import Connector
from opticnerve.language.lora import mask_of
from opticnerve.models.checkpoint import delta
from opticnerve.models.checkpoint.strict import StrictLoading, restore_buffers, trusts
from opticnerve.models.vlm.configuration import OpticNerveConfig
from opticnerve.models.vlm.features import MediaFeatures
from opticnerve.models.vlm.parts import DockedParts
from opticnerve.models.vlm.placeholders import embedding_of, looks_like, shown
from opticnerve.models.vlm.prompt import Prompt, keep, kept, multimodal_context, one_cache, seen_of
from opticnerve.models.vlm.tower import MEDIA_INPUT, Tower, build_tower, language_sizes
from opticnerve.ops import varlen
from opticnerve.types import Features, OpticNerveError

# While `generate` runs, a step sees its newest token only: whether a row holds a picture was settled by the prompt.
settled_rows: ContextVar[Tensor | None] = ContextVar("rows_with_media", default=None)
# While `generate` runs, the length of its prompt: a placeholder behind it is a guess (looked up in the prompt, or an
# assistant's) that has no media, and that will be refused.
prompt_length: ContextVar[int | None] = ContextVar("prompt_length", default=None)


@dataclass
class OpticNerveModelOutput(BaseModelOutputWithPast):
    """As transformers' `LlavaModelOutputWithPast`: what a decoder gives, and the soft tokens, `image_hidden_states`
    (images, N, D) and `audio_hidden_states` (windows, N, D)."""

    image_hidden_states: Tensor | None = None
    audio_hidden_states: Tensor | None = None


class OpticNerveModel(StrictLoading, DockedParts, MediaFeatures, PreTrainedModel):
    """A language model with a vision encoder, an audio encoder, or both; its `forward` gives hidden states.

    `language_model` is any `AutoModelForCausalLM`, untouched; `image` and `audio` are `Tower`s. A prompt without media
    goes to the language model as it came, so its logits are the bare model's, bit for bit.
    """

    config_class = OpticNerveConfig
    config: OpticNerveConfig
    image: Tower
    audio: Tower
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "audio", "text")  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: OpticNerveConfig, *, trust_remote_code: bool = False) -> None:
        attention = attention_of(config)  # None where nobody asked for one
        super().__init__(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        sizes = language_sizes(self.language_model)
        trusted = trusts(trust_remote_code)
        for modality, spec in config.towers.items():
            setattr(self, modality, build_tower(spec, sizes, trust_remote_code=trusted))
        for part, options in config.adapters.items():
            self.give_lora(options, part, fresh=False)
        set_layers_not_to_split(self, layers_not_to_split(self.language_model))
        self._wire()
        self.post_init()  # type: ignore[no-untyped-call]
        if attention is not None:
            self.set_attn_implementation(attention)  # the encoders', too

    @classmethod
    def from_parts(
        cls, language_model: PreTrainedModel, towers: dict[str, Tower], *, image_token_id: int | None = None,
        audio_token_id: int | None = None,
    ) -> Any:  # fmt: skip
        """Dock modules that already hold their weights; nothing is copied. `towers`: by modality."""
        # The configuration's constructor resets its sub-configurations: remember how attention and experts compute.
        attention, experts = attention_of(language_model.config), experts_of(language_model.config)
        config = OpticNerveConfig(
            text_config=language_model.config, towers={m: t.describe() for m, t in towers.items()},
            image_token_id=image_token_id, audio_token_id=audio_token_id,
        )  # fmt: skip
        set_attention(config, attention)
        model = cls.__new__(cls)
        PreTrainedModel.__init__(model, config)
        set_attention(language_model.config, attention)
        set_experts(language_model.config, experts)
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
        if cls.can_generate() and language_model.can_generate():
            model.generation_config = language_model.generation_config
        model._wire()
        return model.eval()  # type: ignore[no-untyped-call]

    @property
    def towers(self) -> dict[str, Tower]:
        """By modality: `image`, `audio`, as far as the model has them."""
        return {m: getattr(self, m) for m in MEDIA_INPUT if m in self.config.towers}

    def _wire(self) -> None:
        self.get_input_embeddings()  # made now: not while a graph is
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
        folder = delta.find(str(pretrained_model_name_or_path))
        if folder is None:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if args:
            raise OpticNerveError(
                f"{folder} is a run's folder, whose model is built by its own config.json: it takes keywords alone",
                kind="unsupported",
            )
        return delta.load(cls, folder, **kwargs)

    def restore_tables(self) -> None:
        """Encoders, connectors and fusions may be no models of transformers."""
        sizes = language_sizes(self.language_model)
        for modality, tower in self.towers.items():
            spec = self.config.towers[modality]
            restore_buffers(tower, partial(build_tower, spec, sizes, trust_remote_code=True))

    # -- what transformers asks for -------------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        """The language model's table; where placeholders lie beyond it, a view of it that knows them."""
        table, ids = self.language_model.get_input_embeddings(), self.placeholder_ids
        known = self.__dict__.setdefault("_embedding", {})  # the backbone's, too
        if known.get("table") is not table or known["ids"] != ids:
            known |= {"table": table, "ids": ids, "view": embedding_of(table, ids)}
        module: nn.Module = known["view"]
        return module

    def set_input_embeddings(self, value: nn.Module) -> None:
        table = vars(value).get("table", value)  # of a view: it came from `get_input_embeddings`, resized
        table.num_embeddings = table.weight.shape[0]
        self.language_model.set_input_embeddings(table)
        self.__dict__.get("_embedding", {}).clear()

    def get_decoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        module: nn.Module = self.language_model.get_decoder()
        return module

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """The encoder of `image` or `audio`; the model itself where there is none, as transformers has it."""
        tower = self.towers.get(modality or "")
        module: nn.Module = super().get_encoder(modality) if tower is None else tower.encoder
        return module

    def _init_weights(self, module: nn.Module) -> None:
        """Random weights of a fresh model; encoders and language models draw their own when they are built."""
        if isinstance(module, Connector):
            module.reset_calibration()
        connectors = [t.connector for t in self.towers.values()]
        if isinstance(module, nn.Linear) and any(module is m for c in connectors for m in c.modules()):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def _activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:  # fmt: skip
        """transformers' hook: what layers saw is seen again when they are computed again."""
        options = {"context_fn": self.recompute, "use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if options["use_reentrant"]:
            raise OpticNerveError(
                "a docked model's layers are computed again with what they saw the first time, which torch's reentrant "
                "form cannot do; give use_reentrant=False",
                kind="unsupported",
            )
        super()._activation_checkpointing_enable(options, every_n_layers, offload)

    # -- the flow -------------------------------------------------------------------------------------------------

    def read(
        self, input_ids: Tensor | None, *, inputs_embeds: Tensor | None = None, group: Tensor | None = None,
        **media: Any,
    ) -> Prompt:  # fmt: skip
        """Text and media as the language model takes them.

        Args:
            input_ids: (B, L) with placeholders; or inputs_embeds (B, L, D), in which these are looked for.
            group: (B, L), which sample of a packed row each position belongs to.
            media: `pixel_values`, `image_sizes`, `image_pools`, `qformer_input_ids`, `qformer_attention_mask`,
                `input_features`, `mm_encoder_outputs`, as `forward` takes them, or `image_features`, `audio_features`:
                what a tower's `encode` gave (a cache of frozen features).

        Raises:
            ValueError: the number of placeholders is not that of the soft tokens; the message has both.
        """
        places: dict[str, Any] = {m: self._places(m, input_ids, inputs_embeds) for m in self.towers}
        if (length := prompt_length.get()) is not None:
            for place_BL in places.values():
                for numbers in {place_BL, on_host(place_BL)}:
                    numbers[:, length:] = False
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        prompt = Prompt(inputs_embeds, rows_B=self.rows_with_media(input_ids, inputs_embeds))
        for modality, tower in self.towers.items():
            place_BL, fusion = places[modality], tower.fusion
            soft = self._soft(modality, tower, media)
            if soft is not None:
                prompt.embeds_BLD = fusion.embed(prompt.embeds_BLD, place_BL, soft)  # type: ignore[arg-type]
                prompt.seen[modality] = fusion.see(place_BL, soft, group)
                prompt.soft[modality] = soft.tokens_BND
            elif prompt_length.get() is None and shown(place_BL):
                raise ValueError(
                    f"{int(place_BL.sum())} {modality} placeholders in the text, but 0 visual tokens: "
                    f"no {MEDIA_INPUT[modality]} given"
                )
            elif tower.must_take_part():
                prompt.embeds_BLD = fusion.dummy_pass(prompt.embeds_BLD, tower.dummy_features())  # type: ignore[arg-type]
        return prompt

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

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        image_pools: Tensor | None = None,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        image_features: Features | None = None,
        audio_features: Features | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> OpticNerveModelOutput:
        """Hidden states (B, L, D) behind the language model's last norm, which its head would read.

        The arguments: as for `OpticNerveForConditionalGeneration.forward`, but for those of the head.
        """
        out, prompt = self.run(
            self.language_model.get_decoder(), input_ids, inputs_embeds, one_cache(cache, past_key_values),
            {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache, **kwargs},
            pixel_values=pixel_values, image_sizes=image_sizes, image_pools=image_pools, input_features=input_features,
            qformer_input_ids=qformer_input_ids, qformer_attention_mask=qformer_attention_mask,
            image_features=image_features, audio_features=audio_features, mm_encoder_outputs=mm_encoder_outputs,
        )  # fmt: skip
        return OpticNerveModelOutput(last_hidden_state=out.last_hidden_state, **seen_of(out, prompt))

    def run(
        self, module: nn.Module, input_ids: Tensor | None, inputs_embeds: Tensor | None, cache: Cache | None,
        options: dict[str, Any], **media: Any,
    ) -> tuple[Any, Prompt]:  # fmt: skip
        """A forward pass of the language model, or of its decoder, that sees the media, and the prompt that it read.

        Media are read where there are any; where not, the words go in as they came. `options`: the module's own.

        Raises:
            ValueError: not exactly one of ids and embeddings, media beside what was computed from them, or placeholders
                that are not as many as the soft tokens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        computed = media.get("mm_encoder_outputs") or {}
        if media.get("pixel_values") is not None and computed.get("image") is not None:
            raise ValueError("give one of pixel_values and mm_encoder_outputs")
        given = any(v is not None for v in ({**media, "mm_encoder_outputs": None} | computed).values())
        # Asking costs a wait for the device: not where media are there to be read.
        there = not given and input_ids is not None and shown(self._placeholders(input_ids))
        if given or (there and prompt_length.get() is None):
            prompt = self.read(input_ids, inputs_embeds=inputs_embeds, **media)
            input_ids, inputs_embeds = None, prompt.embeds_BLD
        else:
            length = (input_ids if input_ids is not None else inputs_embeds).shape[1]  # type: ignore[union-attr]
            seen = {m: getattr(self, m).fusion.later(s, length) for m, s in kept(cache).items()}
            prompt = Prompt(seen=seen, rows_B=self.rows_with_media(input_ids, inputs_embeds))
            if there:  # a guess that will be refused; the language model's own table may not know it
                input_ids, inputs_embeds = None, self.get_input_embeddings()(input_ids)
        prompt.rows_B = self._adapter_rows(prompt.rows_B, inputs_embeds if input_ids is None else input_ids)
        name = cache_name(module)
        mask = options.get("attention_mask")
        if mask is not None and is_without_positions(module):
            # Of what comes now alone: a state holds no positions.
            length = (input_ids if input_ids is not None else inputs_embeds).shape[1]  # type: ignore[union-attr]
            options = {**options, "attention_mask": mask[:, -length:]}
        with self.multimodal_context(prompt):
            out = module(input_ids=input_ids, inputs_embeds=inputs_embeds, return_dict=True, **{name: cache}, **options)
        if name != CACHE:
            out[CACHE] = out.get(name)
        keep(out.get(CACHE), prompt.seen)
        return out, prompt

    def rows_with_media(self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor | None:
        """(B,) bool: the rows that hold media; None where the adapter does not ask (no mask on it)."""
        if mask_of(self.language_model) is None:
            return None
        return self._placeholders(input_ids, inputs_embeds).any(1)

    @property
    def placeholder_ids(self) -> list[int]:
        """The placeholders' ids."""
        ids = [self.config.token_id(m) for m in self.towers]
        return [i for i in ids if i is not None]

    def _places(self, modality: str, input_ids: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
        """(B, L) bool: the placeholders of a modality."""
        number = self.config.token_id(modality)
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        if number is None:
            return torch.zeros(given.shape[:2], dtype=torch.bool, device=given.device)
        if input_ids is None:
            return looks_like(number, self.get_input_embeddings(), given)
        return known(input_ids == number, on_host(input_ids) == number)

    def _placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        found_BL = torch.zeros(given.shape[:2], dtype=torch.bool, device=given.device)
        for modality in self.towers:
            found_BL |= self._places(modality, input_ids, inputs_embeds)
        return found_BL

    def _adapter_rows(self, rows_B: Tensor | None, given: Tensor | None) -> Tensor | None:
        """The rows that the adapter works on in this forward pass."""
        settled_B = settled_rows.get()
        if settled_B is None:
            return rows_B
        assert given is not None
        # Beams and several answers stand beside each other, each prompt's together.
        return settled_B.repeat_interleave(given.shape[0] // settled_B.shape[0])
