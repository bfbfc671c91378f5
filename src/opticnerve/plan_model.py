"""The model that a recipe describes, without its weights: configurations are read, modules built on the meta device."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from opticnerve import registry
from opticnerve.language.chat_template import read_template
from opticnerve.language.load import load_language_config, resolve
from opticnerve.models.modeling import OpticNerveForConditionalGeneration
from opticnerve.models.parts import TOWERS, full_name, part_parameters
from opticnerve.models.processing import OpticNerveProcessor
from opticnerve.models.tower import check_options, join
from opticnerve.recipe import LanguageSpec, PartSpec, Recipe
from opticnerve.starter import weights as starter
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


def dtype_of(recipe: Recipe) -> torch.dtype:
    return torch.bfloat16 if recipe.precision == "bf16" else torch.float32


def shadow(recipe: Recipe) -> Any:
    """The docked model on the meta device: every shape, no memory.

    Raises:
        OpticNerveError: a configuration cannot be read, or the parts do not fit each other.
    """
    dtype = dtype_of(recipe)
    config = language_config(recipe.model.language)
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(config, dtype=dtype)
        image = None
        if recipe.model.image is not None:
            tower = recipe.model.image
            width = language.get_input_embeddings().embedding_dim
            image = join(encoder(tower.encoder), tower.connector.model_dump(), tower.fusion.model_dump(), width).to(
                dtype
            )
    # The real id is the tokenizer's business; shapes do not depend on it.
    return OpticNerveForConditionalGeneration.from_parts(language, image=image, image_token_id=int(config.vocab_size))


def language_config(spec: LanguageSpec) -> Any:
    """The language model's configuration, alone."""
    try:
        return load_language_config(spec.name, gguf_file=spec.gguf_file)
    except OSError as e:
        raise _unreachable("model.language", spec.name, e) from e


def encoder(spec: PartSpec) -> Any:
    """The encoder with its architecture's shapes. Call under `torch.device("meta")`."""
    options = dict(spec.options)
    name = options.pop("name", None)
    if name is None:
        raise OpticNerveError("model.image.encoder needs a name: a hub name, a local folder, or starter/…")
    cls = registry.encoders.get(spec.type)
    check_options("encoder", spec.type, cls, {k: v for k, v in options.items() if k != "architecture"})
    if starter.is_starter(name):
        eye = starter.eye(name)
        return cls(name=eye.architecture, **{**eye.options, **options})
    known = inspect.signature(cls.__init__).parameters
    if "architecture" in known:
        with torch.device("cpu"):
            try:
                config = AutoConfig.from_pretrained(name)
            except OSError as e:
                raise _unreachable("model.image.encoder", name, e) from e
        config = getattr(config, "vision_config", config)
        return cls(architecture=config.to_dict(), **{k: v for k, v in options.items() if k != "architecture"})
    if "name" in known:
        return cls(name=name, **options)
    raise OpticNerveError(
        f"plan cannot foresee the encoder {spec.type!r}: its constructor takes neither `name` nor `architecture`"
    )


def processor_for(recipe: Recipe) -> OpticNerveProcessor:
    """The processor that training would use; the tokenizer's files are read, no weight is.

    Raises:
        OpticNerveError: the tokenizer is not at hand.
    """
    language = recipe.model.language
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(language.name, gguf_file=language.gguf_file)[0])
    except OSError as e:
        raise _unreachable("model.language", language.name, e) from e
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if language.chat_template:
        tokenizer.chat_template = read_template(language.chat_template)
    model = shadow(recipe)
    image = getattr(model, "image", None)
    return OpticNerveProcessor(
        image_processor=image.encoder.image_processor() if image is not None else None,
        tokenizer=tokenizer,
        num_image_tokens=image.num_tokens if image is not None else 1,
    )


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
    for name in TOWERS:
        tower = getattr(model, name, None)
        spec = recipe.model.towers.get(name)
        if tower is None or spec is None:
            continue
        eye = tower.encoder
        side = int(eye.image_size)
        kind = f"{spec.encoder.type} {spec.encoder.options.get('name', '')}".strip()
        found += [
            Shape("picture", f"{side} × {side} pixels", f"3 × {side} × {side}", 0),
            Shape(f"{name}.encoder", kind, f"{eye.num_tokens} × {eye.hidden_size}", _count(eye.parameters())),
            Shape(
                f"{name}.connector",
                spec.connector.type,
                f"{tower.num_tokens} × {width}",
                _count(tower.connector.parameters()),
            ),
            Shape(
                f"{name}.fusion",
                spec.fusion.type,
                f"{tower.num_tokens} placeholders",
                _count(tower.fusion.parameters()),
            ),
        ]
    language = model.language_model
    name = recipe.model.language.name
    layers = _layers(language)
    kind = f"{language.config.model_type} {name}, {layers} layers"
    return [*found, Shape("language", kind, f"tokens × {width}", _count(language.parameters()))]


def open_parts(model: Any, train: dict[str, float]) -> list[Share]:
    """Let the named parts, and them alone, have gradients; returns who trains and who does not."""
    shares, taken = [], set()
    for part, rate in train.items():
        mine = [p for p in part_parameters(model, part).values() if id(p) not in taken]
        taken |= {id(p) for p in mine}
        shares.append(Share(full_name(model, part), _count(mine), True, rate))
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in taken)
    wholes = [(f"{m}.{half}", getattr(getattr(model, m), half)) for m in TOWERS if hasattr(model, m)
              for half in ("encoder", "connector")]  # fmt: skip
    for name, module in [*wholes, ("language", model.language_model)]:
        rest = [p for p in module.parameters() if id(p) not in taken]
        if rest:
            whole = len(rest) == len(list(module.parameters()))
            shares.append(Share(name if whole else f"{name} (rest)", _count(rest), False, None))
    return shares


def native_size(model: Any) -> int | None:
    """The input size that the encoder was pretrained with, if it says so."""
    eye = model.image.encoder
    if isinstance(size := getattr(eye, "native_size", None), int):
        return size
    settings = getattr(getattr(eye, "model", None), "pretrained_cfg", None) or {}
    found = settings.get("input_size")
    return int(found[-1]) if found else None


def _layers(language: nn.Module) -> int:
    return max((len(m) for m in language.modules() if isinstance(m, nn.ModuleList)), default=0)


def _count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


def _unreachable(key: str, name: str, error: OSError) -> OpticNerveError:
    first = str(error).strip().splitlines()[0]
    return OpticNerveError(
        f"{key}: cannot read the configuration of {name!r}: {first}; give a local folder or a hub name in reach"
    )
