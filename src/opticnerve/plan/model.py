"""The model that a recipe describes, without its weights: configurations are read, modules built on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from opticnerve import registry
from opticnerve.language.chat_template import set_template
from opticnerve.language.layers import decoder_layers
from opticnerve.language.load import load_language_config, load_tokenizer
from opticnerve.models.text_encoder import dtype_of
from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
from opticnerve.models.vlm.processing import OpticNerveProcessor
from opticnerve.models.vlm.tower import check_options, join, language_sizes
from opticnerve.recipe import PartSpec, Recipe
from opticnerve.types import OpticNerveError


@dataclass(frozen=True)
class Shape:
    """One stop on the way of a picture to the language model."""

    part: str
    kind: str
    output: str
    parameters: int


@dataclass(frozen=True)
class Share:
    """One line of what trains and what does not."""

    part: str
    parameters: int
    trained: bool
    learning_rate: float | None


def meta_model(recipe: Recipe) -> Any:
    """The docked model on the meta device: every shape, no memory.

    Raises:
        OpticNerveError: a configuration cannot be read, or the parts do not fit each other.
    """
    dtype = dtype_of(recipe)
    language = recipe.docked.language
    config = load_language_config(language.name, gguf_file=language.gguf_file)
    with torch.device("meta"):
        language_part = AutoModelForCausalLM.from_config(config, dtype=dtype)
        sizes = language_sizes(language_part)
        towers = {
            m: join(encoder(m, tower.encoder), tower.parts(), sizes).to(dtype)
            for m, tower in recipe.docked.towers.items()
        }
    # The real ids are the tokenizer's business; shapes do not depend on them.
    size = int(config.get_text_config().vocab_size)
    return OpticNerveForConditionalGeneration.from_parts(
        language_part, towers, image_token_id=size, audio_token_id=size + 1
    )


def encoder(modality: str, spec: PartSpec) -> Any:
    """The encoder with its architecture's shapes. Call under `torch.device("meta")`."""
    cls = registry.encoders.get(spec.type)
    if cls.modality != modality:
        raise OpticNerveError(f"model.{modality}.encoder: {spec.type!r} is for {cls.modality}, not for {modality}")
    name, options = cls.take_name(spec.options)
    options.pop("architecture", None)
    check_options("encoder", spec.type, cls, options)
    try:
        return cls.planned(name, **options)
    except OSError as e:
        raise _unreachable(f"model.{modality}.encoder", name, e) from e


def processor_for(recipe: Recipe) -> OpticNerveProcessor:
    """The processor that training would use; the tokenizer's files are read, no weight is.

    Raises:
        OpticNerveError: the tokenizer is not at hand.
    """
    language = recipe.docked.language
    tokenizer = load_tokenizer(language.name, gguf_file=language.gguf_file)
    if language.chat_template:
        set_template(tokenizer, language.chat_template)
    return OpticNerveProcessor.from_tower(meta_model(recipe).towers, tokenizer, **language.words())


def context_of(config: Any) -> int | None:
    """How many tokens the language model takes, if its configuration says so."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for key in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        if isinstance(found := getattr(config, key, None), int) and found > 0:
            return found
    return None


def shapes(recipe: Recipe, model: Any) -> list[Shape]:
    """The picture's way through every part."""
    width = model.get_input_embeddings().embedding_dim
    found = []
    for name, tower in model.towers.items():
        spec = recipe.docked.towers.get(name)
        if spec is None:
            continue
        vision_encoder = tower.encoder
        shape = " × ".join(map(str, vision_encoder.media_shape))
        what = (
            f"{vision_encoder.image_size} × {vision_encoder.image_size} pixels"
            if name == "image"
            else "a window of sound"
        )
        tiles = f", up to {tower.tiling.spec.max_tokens} in tiles" if tower.tiling is not None else ""
        kind = f"{spec.encoder.type} {spec.encoder.options.get('name', '')}".strip()
        found += [
            Shape("picture" if name == "image" else "sound", what, shape, 0),
            Shape(
                f"{name}.encoder",
                kind,
                f"{vision_encoder.num_tokens} × {vision_encoder.hidden_size}",
                _count(vision_encoder.parameters()),
            ),
            Shape(
                f"{name}.connector",
                spec.connector.type,
                f"{tower.num_tokens} × {width}{tiles}",
                _count(tower.connector.parameters()),
            ),
            Shape(
                f"{name}.fusion",
                spec.fusion.type,
                f"{tower.num_placeholders} placeholder{'s' if tower.num_placeholders > 1 else ''}",
                _count(tower.fusion.parameters()),
            ),
        ]
    language = model.language_model
    name = recipe.docked.language.name
    layers = len(decoder_layers(language)[1])
    kind = f"{language.config.model_type} {name}, {layers} layers"
    return [*found, Shape("language", kind, f"tokens × {width}", _count(language.parameters()))]


def open_parts(model: Any, train: dict[str, float]) -> list[Share]:
    """Let the named parts, and them alone, have gradients; returns who trains and who does not."""
    shares, taken = [], set()
    for part, rate in train.items():
        mine = [p for p in model.part_parameters(part).values() if id(p) not in taken]
        taken |= {id(p) for p in mine}
        shares.append(Share(model.full_name(part), _count(mine), True, rate))
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in taken)
    for name, start in model.whole_parts():
        mine = [p for n, p in model.named_parameters() if n.startswith(start)]
        rest = [p for p in mine if id(p) not in taken]
        if rest:
            whole = len(rest) == len(mine)
            shares.append(Share(name if whole else f"{name} (rest)", _count(rest), False, None))
    return shares


def native_size(vision_encoder: Any) -> int | None:
    """The input size that a vision encoder was pretrained with, if it says so."""
    if isinstance(size := getattr(vision_encoder, "native_size", None), int):
        return size
    settings = getattr(getattr(vision_encoder, "model", None), "pretrained_cfg", None) or {}
    found = settings.get("input_size")
    return int(found[-1]) if found else None


def _count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


def _unreachable(key: str, name: str, error: OSError) -> OpticNerveError:
    first = str(error).strip().splitlines()[0]
    return OpticNerveError(
        f"{key}: cannot read the configuration of {name!r}: {first}; give a local folder or a hub name in reach"
    )
