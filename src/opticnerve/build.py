"""dock(): an eye, a nerve and a brain make one model with its processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from opticnerve import registry
from opticnerve.language.chat_template import read_template
from opticnerve.language.load import Language, load_language
from opticnerve.models.delta import describe_bases
from opticnerve.models.modeling import OpticNerveForConditionalGeneration
from opticnerve.models.processing import OpticNerveProcessor
from opticnerve.models.tower import check_options, join
from opticnerve.recipe import LanguageSpec, ModelSpec, PartSpec, Recipe, TowerSpec
from opticnerve.types import OpticNerveError

Spec = str | dict[str, Any]


@dataclass
class Dock:
    """A docked model, its processor, and the references to the bases it was made of."""

    model: OpticNerveForConditionalGeneration
    processor: OpticNerveProcessor
    bases: dict[str, Any]
    lora: dict[str, Any] | None = None

    def __iter__(self) -> Any:
        """So that `model, processor = dock(…)` reads as one expects."""
        return iter((self.model, self.processor))


def dock(
    vision: Spec,
    connector: Spec = "mlp",
    language: str | dict[str, Any] = "starter/smollm2-135m-instruct",
    *,
    fusion: Spec = "splice",
    dtype: torch.dtype = torch.float32,
    seed: int | None = 0,
) -> Dock:
    """Dock a vision encoder onto a language model through a fresh connector.

    Args:
        vision: a name (`starter/efficientnet-lite0`, `timm/…`, a hub name or folder of a transformers vision model),
            or a mapping such as `{"type": "timm", "name": "resnet50", "layer": -1}`.
        connector, fusion: a registered name or `{"type": …, options}`.
        language: hub name, local folder, GGUF file or starter name; or a mapping with `name`, `gguf_file` and
            `chat_template`.
        dtype: of the weights in memory.
        seed: for the connector's first weights; None leaves torch's generator alone.

    Returns:
        A `Dock`; unpacks as `model, processor = dock(…)`.
    """
    tower = TowerSpec(encoder=_vision_spec(vision), connector=_part(connector), fusion=_part(fusion))
    spec = LanguageSpec(name=language) if isinstance(language, str) else LanguageSpec(**language)
    return dock_spec(ModelSpec(language=spec, image=tower), dtype=dtype, seed=seed)


def dock_recipe(recipe: Recipe) -> Dock:
    """The model that a recipe describes, in the recipe's precision."""
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    return dock_spec(recipe.model, dtype=dtype, seed=recipe.seed)


def dock_spec(spec: ModelSpec, *, dtype: torch.dtype, seed: int | None) -> Dock:
    """The model that a validated specification describes."""
    brain = load_language(spec.language.name, dtype=dtype, gguf_file=spec.language.gguf_file)
    if spec.language.chat_template:
        brain.tokenizer.chat_template = read_template(spec.language.chat_template)
    if seed is not None:
        torch.manual_seed(seed)
    cls = registry.encoders.get(spec.image.encoder.type)
    options = dict(spec.image.encoder.options)
    name = options.pop("name", None)
    if name is None:
        raise OpticNerveError("model.image.encoder needs a name: a hub name, a local folder, or starter/…")
    check_options("encoder", spec.image.encoder.type, cls, {k: v for k, v in options.items() if k != "architecture"})
    eye = cls.from_pretrained(name, **options)
    width = int(brain.model.get_input_embeddings().embedding_dim)  # type: ignore[arg-type]
    image = join(eye, spec.image.connector.model_dump(), spec.image.fusion.model_dump(), width).to(dtype)
    bases = describe_bases(brain.name, brain.files, {"image": (name, eye)}, gguf_file=spec.language.gguf_file)
    return assemble(brain, image, bases)


def assemble(brain: Language, image: Any, bases: dict[str, Any]) -> Dock:
    """Model and processor from loaded parts."""
    processor = OpticNerveProcessor(
        image_processor=image.encoder.image_processor(),
        tokenizer=brain.tokenizer,
        num_image_tokens=image.num_tokens,
    )
    model = OpticNerveForConditionalGeneration.from_parts(
        brain.model,
        image=image,
        image_token_id=int(processor.image_token_id),  # type: ignore[arg-type]
    )
    return Dock(model, processor, bases)


def _vision_spec(vision: Spec) -> PartSpec:
    if isinstance(vision, dict):
        if "type" not in vision:
            raise OpticNerveError(f"vision wants a type; known: {', '.join(registry.encoders.names())}")
        return PartSpec(**vision)
    if vision.startswith("timm/"):
        return PartSpec(type="timm", name=vision.removeprefix("timm/"))  # type: ignore[call-arg]
    if vision.startswith("starter/"):
        return PartSpec(type="timm", name=vision)  # type: ignore[call-arg]
    return PartSpec(type="hf_vision", name=vision)  # type: ignore[call-arg]


def _part(spec: Spec) -> PartSpec:
    return PartSpec(type=spec) if isinstance(spec, str) else PartSpec(**spec)
