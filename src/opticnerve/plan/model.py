"""The model that a recipe describes, without its weights: configurations are read, modules built on the meta device."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from opticnerve.language.chat_template import set_template
from opticnerve.language.experts import active_parameters
from opticnerve.language.layers import decoder_layers
from opticnerve.language.load import load_language_config, load_tokenizer
from opticnerve.language.lora import is_lora
from opticnerve.language.quantization import planned_bytes, quantizable
from opticnerve.models.checkpoint import delta
from opticnerve.models.checkpoint.source import ModelSource
from opticnerve.models.family import Family, family_for
from opticnerve.models.two_towers import TwoTowerModel
from opticnerve.models.vlm.build import dtype_of, load_encoder
from opticnerve.models.vlm.continued import check_stages, load_processor, planned, take_connector
from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
from opticnerve.models.vlm.processing import OpticNerveProcessor
from opticnerve.models.vlm.tower import join, language_sizes
from opticnerve.recipe import ContinuedSpec, Recipe
from opticnerve.types import OpticNerveError

if TYPE_CHECKING:
    from opticnerve.encoders.base import Encoder


@dataclass(frozen=True)
class Shape:
    """One stop on the way of a picture to the language model. `active`: the parameters that one token meets, fewer
    than all in a mixture of experts."""

    part: str
    kind: str
    output: str
    parameters: int
    active: int


def meta_model(recipe: Recipe) -> OpticNerveForConditionalGeneration:
    """The docked model on the meta device: every shape, no memory.

    Raises:
        OpticNerveError: a configuration cannot be read, or the parts do not fit each other.
    """
    dtype = dtype_of(recipe)
    if isinstance(recipe.model, ContinuedSpec):
        source, found = planned(recipe.model, dtype=dtype)
        check_stages(source, recipe.stages)
        return found
    language = recipe.docked.language
    config = load_language_config(language.name, gguf_file=language.gguf_file)
    with torch.device("meta"):
        language_part = AutoModelForCausalLM.from_config(config, dtype=dtype)
        sizes = language_sizes(language_part)
        towers = {}
        for modality, tower in recipe.docked.towers.items():
            trained, parts = take_connector(modality, tower.connector, weights=False), tower.parts()
            if trained is not None:
                parts["connector"] = trained.spec
            encoder = load_encoder(modality, tower.encoder, planned=True)[1]
            towers[modality] = join(encoder, parts, sizes).to(dtype)
    # The real ids are the tokenizer's business; shapes do not depend on them.
    size = int(config.get_text_config().vocab_size)
    model: OpticNerveForConditionalGeneration = OpticNerveForConditionalGeneration.from_parts(
        language_part, towers, image_token_id=size, audio_token_id=size + 1
    )
    return model


def meta_towers(recipe: Recipe) -> Family:
    """The dual encoder or the classifier that a recipe describes, on the meta device; its processor is None where the
    tokenizer is not at hand."""
    family: Any = family_for(recipe)
    with torch.device("meta"):
        made = family.planned(recipe).to(dtype_of(recipe))
    processor = None
    with suppress(OpticNerveError):  # a batch will not be traced then, which the plan says
        processor = family.planned_processor(recipe, made)
    found: Family = family(made, processor, {})
    return found


def packed_bytes(recipe: Recipe, model: OpticNerveForConditionalGeneration | TwoTowerModel) -> dict[int, int]:
    """What the weights that the recipe quantises will take, by the id of those of its `meta_model`."""
    language: Any = model.language_model
    found: dict[int, int] = {}
    if isinstance(recipe.model, ContinuedSpec):
        folder = delta.find(ModelSource.find(recipe.model.source, weights=False).folder)
        bases = delta.read(folder)["bases"] if folder is not None else {}
        quantized = {part: base["quantize"] for part, base in bases.items() if base.get("quantize")}
    else:
        quantized = recipe.model.quantized
    for part, kind in quantized.items():
        module, within = (language, f"{decoder_layers(language)[0]}.") if part == "language" else (
            getattr(model, part).encoder, ""
        )  # fmt: skip
        found |= {
            id(layer.weight): planned_bytes(kind, layer)
            for name, layer in quantizable(module, within) if not is_lora(f"{name}.weight")
        }  # fmt: skip
    return found


def processor_for(recipe: Recipe, model: OpticNerveForConditionalGeneration | None = None) -> OpticNerveProcessor:
    """The processor that training would use; the tokenizer's files are read, no weight is. `model`: the recipe's
    `meta_model`, if it is there already.

    Raises:
        OpticNerveError: the tokenizer is not at hand.
    """
    if isinstance(recipe.model, ContinuedSpec):
        return load_processor(ModelSource.find(recipe.model.source, weights=False))
    language = recipe.docked.language
    tokenizer = load_tokenizer(language.name, gguf_file=language.gguf_file)
    if language.chat_template:
        set_template(tokenizer, language.chat_template)
    return OpticNerveProcessor.from_tower((model or meta_model(recipe)).towers, tokenizer, **language.processor_keys())


def shapes(recipe: Recipe, model: OpticNerveForConditionalGeneration) -> list[Shape]:
    """The picture's way through every part."""
    width = model.get_input_embeddings().embedding_dim
    found, parts = [], model.config.towers
    whole = recipe.model.source if isinstance(recipe.model, ContinuedSpec) else None
    for name, tower in model.towers.items():
        encoder, count = tower.encoder, tower.num_placeholders
        called = f"of {whole}" if whole else recipe.docked.towers[name].encoder.options.get("name", "")
        kind = f"{parts[name]['encoder']['type']} {called}".strip()
        tiles = f", up to {tower.tiling.spec.max_tokens} in tiles" if tower.tiling is not None else ""
        seen = ("picture", _pixels(encoder)) if name == "image" else ("sound", "a window of sound")
        most = "" if encoder.native is None else "up to "
        stops = (
            ("encoder", kind, f"{most}{encoder.num_tokens} × {encoder.hidden_size}"),
            ("connector", parts[name]["connector"]["type"], f"{most}{tower.num_tokens} × {width}{tiles}"),
            ("fusion", parts[name]["fusion"]["type"], f"{most}{count} placeholder{'s' if count > 1 else ''}"),
        )
        found.append(Shape(*seen, " × ".join(map(str, encoder.media_shape)), 0, 0))
        for part, what, out in stops:
            count = sum(p.numel() for p in getattr(tower, part).parameters())
            found.append(Shape(f"{name}.{part}", what, out, count, count))
    language = model.language_model
    called = f"of {whole}" if whole else recipe.docked.language.name
    kind = f"{language.config.model_type} {called}, {len(decoder_layers(language)[1])} layers"
    counts = sum(p.numel() for p in language.parameters()), active_parameters(language)
    return [*found, Shape("language", kind, f"tokens × {width}", *counts)]


def tower_shapes(recipe: Recipe, model: TwoTowerModel) -> list[Shape]:
    """The parts of a dual encoder or a classifier."""
    found, named = [], dict(model.named_parameters())
    for part, starts in model.whole_parts():
        count, tower = sum(p.numel() for n, p in named.items() if n.startswith(starts)), part.partition(".")[0]
        kind = gives = ""
        if part.endswith(".encoder") and count:
            encoder, spec = getattr(model, tower).encoder, getattr(recipe.model, tower).encoder
            kind = f"{spec.type} {spec.options.get('name', '')}".strip()
            gives = f"{encoder.num_tokens} × {encoder.hidden_size}" if tower == "image" else str(encoder.hidden_size)
        if count:
            found.append(Shape(part, kind, gives, count, count))
    return found


def _pixels(encoder: Encoder) -> str:
    """What a vision encoder is shown."""
    if (native := encoder.native) is not None:
        return (
            f"{native.min_patches} to {native.max_patches} patches of {native.patch_size} × {native.patch_size} pixels"
        )
    return f"{encoder.image_size} × {encoder.image_size} pixels"


def native_size(vision_encoder: Encoder) -> int | None:
    """The input size that a vision encoder was pretrained with, if it says so."""
    if isinstance(size := getattr(vision_encoder, "native_size", None), int):
        return size
    settings = getattr(getattr(vision_encoder, "model", None), "pretrained_cfg", None) or {}
    return int(settings["input_size"][-1]) if settings.get("input_size") else None
