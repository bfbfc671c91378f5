"""What all formats of stock transformers have in common: the frame, the language model's place, an answer's end."""

from __future__ import annotations

import copy
from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import transformers as tf
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from opticnerve.common.private_names import forget_where_from
from opticnerve.export import parity
from opticnerve.export.formats import Format, Trial
from opticnerve.export.simplify import adapter_refusals
from opticnerve.inference.generate import Answerer

if TYPE_CHECKING:
    from opticnerve.encoders.base import Encoder
    from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
    from opticnerve.models.vlm.processing import OpticNerveProcessor

# What scales or bends logits behind the head of a causal model: a class with a decoder and a head has nothing of it.
_BENDS = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0}
_NEAREST = "nearest: one of the Llama, Qwen2, Qwen3 or Mistral families"


class HFFormat(Format):
    """A class of stock transformers, `model_class`, whose configuration has the `parts`."""

    program = "stock_transformers"
    model_class: ClassVar[str]
    parts: ClassVar[tuple[str, ...]] = ("text_config", "vision_config")

    @abstractmethod
    def config(self, model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor) -> Any:
        """The class's configuration."""

    @abstractmethod
    def state(self, model: OpticNerveForConditionalGeneration, rows: int) -> dict[str, Tensor]:
        """Every tensor under the class's name; the embedding table `rows` long."""

    @abstractmethod
    def stock_processor(self, model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor) -> Any:
        """A stock processor that writes the tokens that this model was trained on."""

    def notes(self, config: PreTrainedConfig) -> list[str]:
        return []

    def write(
        self, model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor, folder: Path
    ) -> list[str]:
        """Weights, configuration, stock processor and an answer's end, as `from_pretrained` reads them."""
        dtype, config = model.language_model.dtype, self.config(model, processor)
        for part in (config, *(getattr(config, p) for p in self.parts)):
            part.dtype, part.architectures = dtype, None
            forget_where_from(part)
        config.architectures = [self.model_class]
        rows = config.text_config.vocab_size
        state = {
            name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().contiguous()
            for name, tensor in self.state(model, rows).items()
        }
        save_torch_state_dict(state, folder, metadata={"format": "pt"})
        config.save_pretrained(folder)
        self.stock_processor(model, processor).save_pretrained(folder)
        generation(model, processor, rows).save_pretrained(folder)
        return self.notes(config)

    def job(self, folder: Path, trial: Trial) -> dict[str, Any]:
        return {
            "folder": str(folder), "model_class": self.model_class, "samples": [s.messages() for s in trial.samples],
            "last": parity.LAST, "greedy": parity.GREEDY,
        }  # fmt: skip


# -- what is refused --------------------------------------------------------------------------------------------------


def decoder_refusals(model: OpticNerveForConditionalGeneration, holder: str) -> list[str]:
    """Why the language model is no plain decoder with a head, which is all that `holder` has room for."""
    language, reasons = model.language_model, adapter_refusals(model)
    kind = language.config.model_type
    names = {n.partition(".")[0] for n in language.state_dict() if ".lora_" not in n}
    head = language.get_output_embeddings()
    if not names <= {"model", "lm_head"} or head is None or getattr(head, "bias", None) is not None:
        reasons.append(
            f"its language model ({kind}) is no plain decoder with a head without bias, which is what {holder} holds; "
            f"{_NEAREST}"
        )
    for key, plain in _BENDS.items():
        if (value := getattr(language.config, key, plain)) not in (plain, None):
            reasons.append(f"its language model ({kind}) has {key} {value}, which {holder} leaves out; {_NEAREST}")
    return reasons


def layer_refusals(encoder: Encoder, engine: str) -> list[str]:
    """Why the vision encoder is not read behind its final norm."""
    if encoder.layer == "last":
        return []
    return [
        f"its vision encoder is read at layer {encoder.layer}, {engine}'s behind its final norm; nearest: layer: last"
    ]


# -- the language model -----------------------------------------------------------------------------------------------


def text_config(model: Any, processor: Any) -> Any:
    """The language model's configuration, its vocabulary as long as the table must be: transformers looks the
    placeholder up before it puts the picture in its place."""
    made = copy.deepcopy(model.language_model.config)
    made.vocab_size = max(made.vocab_size, len(processor.tokenizer), model.config.image_token_id + 1)
    return made


def language_state(language: PreTrainedModel, rows: int) -> dict[str, Tensor]:
    """A causal model's tensors, tables lengthened to `rows`; a head that is the table itself is left out."""
    state = dict(language.state_dict())
    embedding, head = language.get_input_embeddings(), language.get_output_embeddings()
    paths = {id(module): path for path, module in language.named_modules()}
    for module in (embedding, head):
        for leaf in dict(module.named_parameters()):
            name = f"{paths[id(module)]}.{leaf}"
            state[name] = lengthened(state[name], rows)
    if head.weight is embedding.weight:
        del state[f"{paths[id(head)]}.weight"]
    return state


def lengthened(table: Tensor, rows: int) -> Tensor:
    """The table (V, D), or a bias (V,), with mean rows behind its own: such a row's logit is the mean of all logits,
    so never the largest."""
    more = rows - len(table)
    if more <= 0:
        return table
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(more, *table.shape[1:])])


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}


def generation(model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor, rows: int) -> Any:
    """Settings as the model has them, with the ends of a turn that training taught, and never a placeholder as a
    word."""
    made = copy.deepcopy(model.generation_config)
    stops = Answerer(model, processor).stops()
    made.eos_token_id, made.pad_token_id = stops["eos_token_id"], stops["pad_token_id"]
    own = model.language_model.config.vocab_size
    if rows > own:
        made.suppress_tokens = list(range(own, rows))
    return made


def placeholders(
    processor: OpticNerveProcessor, images: tf.BaseImageProcessor, patch_size: int, additional: int = 0,
    strategy: str = "full",
) -> Any:  # fmt: skip
    """LLaVA's processor, which writes nothing but placeholders: (side / `patch_size`)² + `additional` a picture."""
    return tf.LlavaProcessor(
        images, processor.tokenizer, patch_size=patch_size, vision_feature_select_strategy=strategy,
        chat_template=processor.chat_template, image_token=processor.image_token,
        num_additional_image_tokens=additional,
    )  # fmt: skip
