"""dock(): a vision encoder, a nerve and a language model make one model with its processor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from opticnerve import registry
from opticnerve.common.cache import new_folder
from opticnerve.language.chat_template import set_template
from opticnerve.language.load import Language, load_language
from opticnerve.language.lora import take_start_out
from opticnerve.language.quantization import distance
from opticnerve.models.checkpoint import delta
from opticnerve.models.checkpoint.delta import describe_bases, encoder_name, quantize_part
from opticnerve.models.checkpoint.strict import wrap_errors
from opticnerve.models.vlm.configuration import OpticNerveConfig
from opticnerve.models.vlm.continued import continue_from, take_connector
from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
from opticnerve.models.vlm.processing import OpticNerveProcessor, stops
from opticnerve.models.vlm.tower import Tower, check_options, join, language_sizes
from opticnerve.recipe import (
    ContinuedSpec,
    EncoderSpec,
    LanguageSpec,
    ModelSpec,
    PartSpec,
    Recipe,
    TilingSpec,
    TowerSpec,
)
from opticnerve.starter import weights
from opticnerve.types import OpticNerveError

Spec = str | dict[str, Any]


@dataclass
class Dock:
    """A docked model, its processor, and the references to the bases it was made of: a `models.family.Family`."""

    SPEC: ClassVar = ModelSpec
    MODEL: ClassVar = OpticNerveForConditionalGeneration
    PROCESSOR: ClassVar = OpticNerveProcessor
    USE: ClassVar[str] = "`opticnerve ask`, `serve` and `eval` take it"
    BASELINE: ClassVar[bool] = False

    model: OpticNerveForConditionalGeneration
    processor: OpticNerveProcessor
    bases: dict[str, Any]
    lora: dict[str, Any] | None = None
    # Of one that goes on from another: names of parameters that were trained there; what it, or a connector, came from.
    inherited: set[str] = field(default_factory=set)
    origins: dict[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Any:
        """So that `model, processor = dock(…)` reads as one expects."""
        return iter((self.model, self.processor))

    @classmethod
    def build(cls, recipe: Recipe) -> Dock:
        """The model that a recipe describes, or goes on from, in the recipe's precision."""
        if isinstance(recipe.model, ContinuedSpec):
            made = cls(**vars(continue_from(recipe.model, recipe.stages, dtype=dtype_of(recipe))))
        else:
            made = dock_spec(recipe.docked, dtype=dtype_of(recipe), seed=recipe.seed)
        shown = (data.model_dump()["frames"] for stage in recipe.stages[::-1] for data in stage.data)
        made.processor.frames = next((frames for frames in shown if frames != 8), made.processor.frames)
        return made

    def save(self, folder: Path, trained: Iterable[str]) -> None:
        """What was trained, with references to what was not, and the processor."""
        trained = {*self.inherited, *trained}
        delta.save(self.model, folder, bases=self.bases, lora=self.lora, trained=trained, origins=self.origins)
        self.processor.save_pretrained(folder)

    def load_stage(self, folder: Path) -> set[str]:
        """Bring the model to where a finished stage left it; returns the names of all parameters trained so far."""
        reference = delta.read(folder)
        self.lora = self.lora or reference["lora"]
        with wrap_errors("config.json", folder):
            config = OpticNerveConfig.from_pretrained(folder)
        delta.give_adapters(self.model, config, reference["lora"])
        with torch.no_grad():
            delta.put(self.model, folder, reference["tensors"], sha256=reference.get("sha256"))
        take_start_out(self.model, without=reference["tensors"])
        return {n for n in reference["tensors"] if n in dict(self.model.named_parameters())}

    def describe(self) -> dict[str, Any]:
        """The model's parts, for the card and for results.json."""
        modality, tower = next(iter(self.model.towers.items()))
        parts, whole = self.model.config.towers[modality], self.bases.get(delta.WHOLE)
        kinds = (parts["encoder"]["type"], self.model.config.text_config.model_type)
        if whole is not None:
            named = [f"{kind} of {whole['name']}" for kind in kinds]
        else:
            named = [encoder_name(self.bases[modality]["name"], kinds[0]), self.bases["language"]["name"]]
        native = tower.encoder.native
        shape = {}
        if native is not None:
            shape["picture"] = f"its own shape, {native.min_patches} to {native.max_patches} patches"
        return shape | {
            "encoder": named[0],
            "connector": parts["connector"]["type"],
            "fusion": parts["fusion"]["type"],
            "modalities": list(self.model.towers),
            "language": named[1],
            "visual_tokens": tower.num_tokens,
            "encoder_width": tower.encoder.hidden_size,
            "encoder_tokens": tower.encoder.num_tokens,
            "image_size": getattr(tower.encoder, "image_size", None),
            "width": tower.connector.out_size,
            "license": license_of(self.bases),
            **({"from": self.origins} if self.origins else {}),
        }

    def headline(self) -> str:
        """One line on what is about to be trained, in rich's markup."""
        d = self.describe()
        goes_on = "".join(f"; {part} from {origin['name']}" for part, origin in self.origins.items())
        return (
            f"[bold]{d['encoder']}[/bold] ({d['encoder_tokens']} × {d['encoder_width']}) → {d['connector']} → "
            f"{d['visual_tokens']} tokens × {d['width']} → [bold]{d['language']}[/bold]{goes_on}"
        )


def license_of(bases: dict[str, Any]) -> str:
    """The starter kit's parts are Apache-2.0 all; of other parts we do not know."""
    return "apache-2.0" if all(weights.is_starter(str(b["name"])) for b in bases.values()) else "other"


def dock(
    vision: Spec | None = None,
    connector: Spec = "mlp",
    language: str | dict[str, Any] = "starter/smollm2-135m-instruct",
    *,
    fusion: Spec = "splice",
    tiling: dict[str, Any] | None = None,
    audio: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int | None = 0,
) -> Dock:
    """Dock a vision encoder, an audio encoder or both onto a language model through fresh connectors.

    Args:
        vision: a name (`starter/efficientnet-lite0`, `timm/…`, a hub name or folder of a transformers vision model),
            or a mapping such as `{"type": "timm", "name": "resnet50", "layer": -1}`.
        connector, fusion: of the vision encoder: a registered name or `{"type": …, options}`.
        tiling: `{"type": "anyres", options}` to show the vision encoder pictures in tiles.
        audio: the audio encoder: `{"encoder": {"type": "whisper", "name": …}, "connector": …, "fusion": …}`, the last
            two as above and by default as for the vision encoder.
        language: hub name, local folder, GGUF file or starter name; or a mapping with `name`, `gguf_file` and
            `chat_template`.
        dtype: of the weights in memory.
        seed: for the connector's first weights; None leaves torch's generator alone.

    Returns:
        A `Dock`; unpacks as `model, processor = dock(…)`.
    """
    towers: dict[str, Any] = {}
    if vision is not None:
        towers["image"] = TowerSpec(
            encoder=vision_spec(vision), connector=_part(connector), fusion=_part(fusion),
            tiling=None if tiling is None else TilingSpec(**tiling),
        )  # fmt: skip
    if audio is not None:
        spoken = {"connector": connector, "fusion": fusion, **audio}
        towers["audio"] = TowerSpec(**{part: _part(option) for part, option in spoken.items()})
    if not towers:
        raise OpticNerveError("nothing is docked: give vision, audio or both", kind="missing-field")
    spec = LanguageSpec(name=language) if isinstance(language, str) else LanguageSpec(**language)
    return dock_spec(ModelSpec(language=spec, **towers), dtype=dtype, seed=seed)


dock_recipe = Dock.build


def dtype_of(recipe: Recipe) -> torch.dtype:
    """Of the weights in memory, by the recipe's precision."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[recipe.precision]


def dock_spec(spec: ModelSpec, *, dtype: torch.dtype, seed: int | None) -> Dock:
    """The model that a validated specification describes."""
    language_part = load_language(spec.language.name, dtype=dtype, gguf_file=spec.language.gguf_file)
    quantize_part(language_part.model, "language", spec.quantized)
    if spec.language.chat_template:
        set_template(language_part.tokenizer, spec.language.chat_template)
    if seed is not None:
        torch.manual_seed(seed)
    encoders = {m: load_encoder(m, tower.encoder) for m, tower in spec.towers.items()}
    sizes = language_sizes(language_part.model)
    towers: dict[str, Tower] = {}
    origins: dict[str, Any] = {}
    for modality, tower in spec.towers.items():
        trained, parts = take_connector(modality, tower.connector), tower.parts()
        if trained is not None:
            parts["connector"], origins[f"{modality}.connector"] = trained.spec, trained.origin
        towers[modality] = join(encoders[modality][1], parts, sizes)
        if trained is not None:
            trained.put(towers[modality].connector, towers[modality].describe()["encoder"])
        else:
            towers[modality].connector.start(language_part.model.get_input_embeddings(), language_part.tokenizer)
        towers[modality].fusion.start(language_part.model.get_input_embeddings())
        towers[modality].to(dtype)
        quantize_part(towers[modality].encoder, modality, spec.quantized)
    bases = describe_bases(
        language_part.name, language_part.files, encoders, gguf_file=spec.language.gguf_file, quantized=spec.quantized
    )
    made = assemble(language_part, towers, bases, **spec.language.processor_keys())
    made.origins = origins
    return made


def load_encoder(modality: str, spec: PartSpec, *, planned: bool = False) -> tuple[Any, Any]:
    """The name of the weights (or names, or None) and the encoder that holds them; `planned`: one without them."""
    cls = registry.encoders.get(spec.type)
    if cls.modality != modality:
        raise OpticNerveError(
            f"model.{modality}.encoder: {spec.type!r} is for {cls.modality}, not for {modality}", kind="unsupported"
        )
    name, options = cls.take_name(spec.options)
    foreseen = {k: v for k, v in options.items() if k != "architecture"}
    check_options("encoder", spec.type, cls, foreseen)
    return name, cls.planned(name, **foreseen) if planned else cls.from_pretrained(name, **options)


def assemble(language_part: Language, towers: dict[str, Tower], bases: dict[str, Any], **words: Any) -> Dock:
    """Model and processor from loaded parts; `words`: of the processor, what becomes of words."""
    processor = OpticNerveProcessor.from_tower(towers, language_part.tokenizer, **words)
    model = OpticNerveForConditionalGeneration.from_parts(
        language_part.model, towers, image_token_id=processor.image_token_id, audio_token_id=processor.audio_token_id
    )
    # So that `generate` of the model alone stops where training taught it to; it goes into every folder.
    model.generation_config.update(**stops(model.generation_config, processor))
    return Dock(model, processor, bases)


def vision_spec(vision: Spec) -> EncoderSpec:
    if isinstance(vision, dict):
        if "type" not in vision:
            raise OpticNerveError(
                f"vision wants a type; known: {', '.join(registry.encoders.names())}", kind="missing-field"
            )
        return EncoderSpec(**vision)
    if vision.startswith("timm/"):
        return EncoderSpec(type="timm", name=vision.removeprefix("timm/"))
    if vision.startswith("starter/"):
        return EncoderSpec(type="timm", name=vision)
    return EncoderSpec(type="hf_vision", name=vision)


def _part(spec: Spec) -> PartSpec:
    return PartSpec(type=spec) if isinstance(spec, str) else PartSpec(**spec)


def merge(source: Path, out: Path, *, trust_remote_code: bool = False) -> Path:
    """Load `source`, add LoRA into the weights, and save everything under `out`: weights, configuration, processor.

    Raises:
        OpticNerveError: `out` exists already, or the bases are not those that `source` was trained on.
    """
    if out.exists():
        raise OpticNerveError(f"{out} exists already; choose another folder", kind="exists-already")
    model = OpticNerveForConditionalGeneration.from_pretrained(
        source, dtype="auto", trust_remote_code=trust_remote_code
    )
    model.merge_adapters()
    with new_folder(out) as new:
        model.save_pretrained(new)
        OpticNerveProcessor.from_pretrained(source).save_pretrained(new)
    return out


def quantization(model: OpticNerveForConditionalGeneration) -> dict[str, Any]:
    """Of each part that is quantised: how, and how far its weights are from those that it was made of."""
    encoders = {modality: tower.encoder for modality, tower in model.towers.items()}
    found = {part: distance(module) for part, module in {"language": model.language_model, **encoders}.items()}
    return {part: entry for part, entry in found.items() if entry}


def is_gated(model: OpticNerveForConditionalGeneration) -> bool:
    """Whether the adapter steps aside for text alone (`lora.when: media`): no sum of weights can do that."""
    differs: bool = (model.config.lora or {}).get("when", "always") != "always"
    return differs
