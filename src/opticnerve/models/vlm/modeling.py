"""`OpticNerveForConditionalGeneration`: vision encoders and audio encoders docked onto a causal language model, by
transformers' conventions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from opticnerve.common.private_names import CACHE
from opticnerve.models.vlm.backbone import OpticNerveModel, prompt_length, settled_rows
from opticnerve.models.vlm.configuration import wide_vocabulary
from opticnerve.models.vlm.placeholders import barred
from opticnerve.models.vlm.prompt import MEDIA_KEYS, one_cache, repeat_media, repeat_pooled, seen_of
from opticnerve.types import Features

IGNORE = -100


@dataclass
class OpticNerveOutput(CausalLMOutputWithPast):
    """As transformers' `LlavaCausalLMOutputWithPast`: what a causal language model gives, and `image_hidden_states`
    (images, N, D), `audio_hidden_states` (windows, N, D): the soft tokens."""

    image_hidden_states: Tensor | None = None
    audio_hidden_states: Tensor | None = None


class OpticNerveForConditionalGeneration(OpticNerveModel, GenerationMixin):
    """`OpticNerveModel` with its language model's head, which may be more than a product (scales, soft caps).

    `model` is the backbone that others ask for hidden states.
    """

    accepts_loss_kwargs = True

    @property
    def model(self) -> OpticNerveModel:
        """The backbone: a view of the same modules, so that names in files have nothing before them."""
        view = self.__dict__.get("_backbone")
        if view is None or view.config is not self.config:
            view = OpticNerveModel.__new__(OpticNerveModel)
            PreTrainedModel.__init__(view, self.config)
            own = vars(self)
            view.__dict__["_embedding"] = own.setdefault("_embedding", {})
            view._modules, view._parameters, view._buffers = own["_modules"], own["_parameters"], own["_buffers"]
            self.__dict__["_backbone"] = view
        found: OpticNerveModel = view
        return found

    def get_output_embeddings(self) -> nn.Module | None:
        module: nn.Module | None = self.language_model.get_output_embeddings()
        return module

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    @property
    def lm_head(self) -> nn.Module | None:
        """The language model's, by the name that transformers' models have it under."""
        return self.get_output_embeddings()

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
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        image_features: Features | None = None,
        audio_features: Features | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> OpticNerveOutput:
        """One forward pass.

        Args:
            input_ids: (B, L) with placeholders as the processor wrote them; or inputs_embeds (B, L, D), what
                `get_input_embeddings` makes of them.
            pixel_values: (images, 3, H, W), the pictures of the whole batch in the order of their placeholders; with
                tiling the tiles of all of them, and image_sizes (images, 2) their heights and widths.
            image_pools: (images,), for frames of videos: side of the squares of soft tokens that become their mean.
            input_features: (windows, mels, frames), the sound of the whole batch in the order of its placeholders.
            mm_encoder_outputs: what `get_image_features` gave, as `{"image": …}`, in place of pixel_values.
            labels: (B, L), -100 where there is nothing to learn; a placeholder is never learned.
            qformer_input_ids, qformer_attention_mask: (images, T), the questions, where the connector reads them.
            cache, past_key_values: two names of one thing; transformers knows the first from 5.24 on.
            The rest as for any causal language model of transformers.

        Raises:
            ValueError: the number of placeholders is not the number of soft tokens.
        """
        loss_options = {k: kwargs.pop(k) for k in ("num_items_in_batch", "shift_labels") if k in kwargs}
        own = {"position_ids": position_ids, "use_cache": use_cache, "logits_to_keep": logits_to_keep}
        out, prompt = self.run(
            self.language_model, input_ids, inputs_embeds, one_cache(cache, past_key_values),
            {"attention_mask": attention_mask, **own, **kwargs},
            pixel_values=pixel_values, image_sizes=image_sizes, image_pools=image_pools, input_features=input_features,
            qformer_input_ids=qformer_input_ids, qformer_attention_mask=qformer_attention_mask,
            image_features=image_features, audio_features=audio_features, mm_encoder_outputs=mm_encoder_outputs,
        )  # fmt: skip
        loss = None
        if labels is not None or loss_options.get("shift_labels") is not None:
            loss_options = {k: self._learned(v) if k == "shift_labels" else v for k, v in loss_options.items()}
            loss = self.loss_function(
                logits=out.logits, labels=self._learned(labels), vocab_size=out.logits.shape[-1], **loss_options
            )
        logits = barred(out.logits, self.placeholder_ids)
        return OpticNerveOutput(loss=loss, logits=logits, **seen_of(out, prompt))

    def _learned(self, labels: Tensor | None) -> Tensor | None:
        """Labels without placeholders."""
        if labels is None:
            return None
        for number in self.placeholder_ids:
            labels = labels.masked_fill(labels == number, IGNORE)
        return labels

    # -- generation -----------------------------------------------------------------------------------------------

    def generate(self: Any, inputs: Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As for any model of transformers. Which rows hold a picture is settled by the prompt, once, for all steps."""
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        embeds: Tensor | None = kwargs.get("inputs_embeds")
        if embeds is not None or not (isinstance(input_ids, Tensor) and input_ids.ndim == 2):
            input_ids = None
        given, rows_B, length = input_ids if embeds is None else embeds, None, None
        if given is not None:
            self._check_media(input_ids, kwargs)
            rows_B, length = self.rows_with_media(input_ids, embeds), int(given.shape[1])
        tokens = settled_rows.set(rows_B), prompt_length.set(length)
        try:
            with wide_vocabulary():
                return GenerationMixin.generate(self, inputs, **kwargs)
        finally:
            settled_rows.reset(tokens[0])
            prompt_length.reset(tokens[1])

    def compute_transition_scores(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As for any model of transformers."""
        with wide_vocabulary():
            return GenerationMixin.compute_transition_scores(self, *args, **kwargs)

    def _check_media(self, input_ids: Tensor | None, kwargs: dict[str, Any]) -> None:
        """A prompt's placeholders have their media. An assistant is given none, and one that goes on has seen them."""
        goes_on = kwargs.get(CACHE, kwargs.get("past_key_values")) is not None
        helps = getattr(kwargs.get("generation_config"), "is_assistant", False)
        given = any(kwargs.get(k) is not None for k in (*MEDIA_KEYS, "mm_encoder_outputs"))
        if input_ids is not None and not (goes_on or helps or given) and bool(self._placeholders(input_ids).any()):
            self.read(input_ids)  # it says what is missing

    def _expand_inputs_for_generation(
        self: Any, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Beams and several answers repeat each row; the media of a row are repeated as one block, in their order."""
        media = {k: model_kwargs.pop(k) for k in MEDIA_KEYS if model_kwargs.get(k) is not None}
        known = model_kwargs.pop("mm_encoder_outputs", None)
        if expand_size > 1 and (media or known):
            embeds = model_kwargs.get("inputs_embeds")
            ids = None if embeds is not None else input_ids
            places = {m: self._places(m, ids, embeds).sum(1).tolist() for m in self.towers}
            media = repeat_media(media, places, self.towers, expand_size)
            known = known and repeat_pooled(known, places, self.towers, expand_size)
        if known is not None:
            media["mm_encoder_outputs"] = known
        input_ids, model_kwargs = GenerationMixin._expand_inputs_for_generation(
            self, expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **media}
