"""Moving tensors from transformers' modules into ours: nothing is copied, nothing is computed."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from opticnerve.encoders.hf_vision import HFVisionEncoder
from opticnerve.encoders.preparation import as_options
from opticnerve.language.chat_template import IMAGE_TOKEN, with_parts
from opticnerve.models.import_hf.source import Source
from opticnerve.models.vlm.processing import OpticNerveProcessor
from opticnerve.models.vlm.tower import Tower
from opticnerve.types import OpticNerveError


def adopt(module: nn.Module, tensors: dict[str, nn.Parameter]) -> None:
    """Put parameters into `module` under the given names, in place of those that stand there.

    Raises:
        OpticNerveError: there is no such place, or one of another shape.
    """
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        try:
            there = module.get_parameter(name)
        except AttributeError as e:
            raise OpticNerveError(f"{type(module).__name__} has no place for the tensor {name}") from e
        if there.shape != tensor.shape:
            raise OpticNerveError(
                f"{name} is {tuple(tensor.shape)}, {type(module).__name__} wants {tuple(there.shape)}"
            )
        setattr(module.get_submodule(path), leaf, tensor)


def prefixed(tensors: Any, prefix: str) -> dict[str, nn.Parameter]:
    """A module's parameters under `prefix`."""
    return {f"{prefix}.{n}": p for n, p in tensors.named_parameters()}


def language_model(base: nn.Module, head: nn.Module, config: Any, *, tied: bool) -> Any:
    """A causal language model of a decoder without head and a head, as LLaVA keeps them.

    Raises:
        OpticNerveError: transformers' causal model of this family has other tensors than these.
    """
    config = copy.deepcopy(config)
    config.tie_word_embeddings = tied
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = {n: t.shape for n, t in model.state_dict().items()}
    setattr(model, model.base_model_prefix, base)
    model.set_output_embeddings(head)
    found = {n: t.shape for n, t in model.state_dict().items()}
    if odd := sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n)):
        raise OpticNerveError(
            f"{type(model).__name__} has other tensors than this checkpoint's language model: {', '.join(odd[:12])}"
        )
    # Rotary tables and the like belong to the base; whatever else the head's class computes would be empty.
    if empty := [n for n, t in model.named_buffers() if t.is_meta]:
        raise OpticNerveError(f"{type(model).__name__} computes tables that this import does not know: {empty}")
    return model.eval()


def vision_encoder(source: Source, model: Any, *, layer: Any, class_token: Any) -> HFVisionEncoder:
    """Their vision model as an encoder, with what their image processor says of pictures."""
    options = as_options(source.processor.image_processor, source.name)
    if options.get("image_size") == model.config.image_size:
        options.pop("image_size")
    return HFVisionEncoder(
        architecture=model.config.to_dict(), layer=layer, class_token=class_token, **options, _model=model
    )


def processor(
    source: Source, tower: Tower, tokenizer: Any, *, image_processor: Any, chat_template: str | None, **options: Any
) -> OpticNerveProcessor:
    """Their tokenizer and picture preparation, our counting.

    `chat_template`: theirs; None for one made of the tokenizer's own, or a plain one.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise OpticNerveError(f"the tokenizer of {source.name} has neither padding nor end token; set one first")
        tokenizer.pad_token = tokenizer.eos_token
        source.notes.append(f"the tokenizer has no padding token; {tokenizer.eos_token} serves as one")
    if chat_template is None and source.image_token != IMAGE_TOKEN:
        chat_template = with_parts(tokenizer.chat_template).replace(IMAGE_TOKEN, source.image_token)
    return OpticNerveProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        num_image_tokens=tower.num_placeholders,
        image_token=source.image_token,
        tiling=None if tower.tiling is None else asdict(tower.tiling.spec),
        chat_template=chat_template,
        **options,
    )
