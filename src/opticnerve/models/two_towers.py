"""What models of a vision encoder and a text encoder share: how they are assembled, loaded, kept, and taken apart by
name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from opticnerve import registry
from opticnerve.common import atomic
from opticnerve.encoders.base import Encoder, last_blocks
from opticnerve.encoders.native import check_one_shape
from opticnerve.encoders.text import HFTextEncoder, text_encoders
from opticnerve.language.adapters import is_adapter
from opticnerve.language.load import load_language, load_language_config, load_tokenizer
from opticnerve.language.lora import take_start_out
from opticnerve.language.quantization import quantized_layers
from opticnerve.models.adapted import AdaptedParts, adapter_of
from opticnerve.models.checkpoint.delta import (
    base_of,
    encoder_name,
    give_adapters,
    now_called,
    quantize_part,
    versions,
)
from opticnerve.models.checkpoint.strict import StrictLoading, restore_buffers, trusts, wrap_errors
from opticnerve.models.vlm.build import Spec, license_of, load_encoder, vision_spec
from opticnerve.models.vlm.tower import Tower, check_options, make, placed_like
from opticnerve.recipe import ReaderSpec, Recipe
from opticnerve.starter import weights
from opticnerve.starter.minilm import bert_folder
from opticnerve.types import Features, OpticNerveError

BASES = "bases.json"


class EncoderTower(nn.Module):
    """An encoder, and nothing behind it."""

    def __init__(self, encoder: Encoder | HFTextEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def encode(self, pixel_values: Tensor) -> Features:
        """Pixels (B, 3, H, W) → a vision encoder's tokens: what a cache of a frozen one holds."""
        features: Features = self.encoder(pixel_values.to(placed_like(self.encoder, otherwise=pixel_values)))
        return features


class TwoTowerModel(StrictLoading, AdaptedParts, PreTrainedModel):
    """`image` and `text`, each with its `encoder`, and whatever makes one model of them.

    A subclass builds all of it in `_assemble(vision encoder, text encoder)` from its configuration, and names its
    parts: `PARTS`, the words that a stage uses; `WHOLE_PARTS`, beginnings of parameters' names that the freeze table
    sums up; `STARTS`, those of a part whose parameters are not called by its name.
    """

    PARTS: ClassVar[tuple[str, ...]]
    WHOLE_PARTS: ClassVar[tuple[str, ...]]
    STARTS: ClassVar[dict[str, tuple[str, ...]]] = {}

    # No language model, and nothing docked onto one: see `models.family.FamilyModel`.
    language_model: Any = None
    towers: ClassVar[dict[str, Tower]] = {}

    image: Any
    text: Any
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # type: ignore[assignment]
    _supports_sdpa = True

    def __init__(self, config: PreTrainedConfig, *, trust_remote_code: bool = False) -> None:
        super().__init__(config)
        trusted = trusts(trust_remote_code)
        vision_encoder = make(registry.encoders, config.image["encoder"], trusted) if config.image else None
        self._assemble(vision_encoder, make(text_encoders, config.text["encoder"], trusted))
        for part, options in config.adapters.items():
            self.give_lora(options, part, fresh=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def _assemble(self, vision_encoder: Encoder | None, text_encoder: HFTextEncoder) -> None:
        raise NotImplementedError

    @classmethod
    def _around(cls, config: PreTrainedConfig, vision_encoder: Encoder | None, text_encoder: HFTextEncoder) -> Any:
        """A model of that configuration around encoders that hold their weights already."""
        model = cls.__new__(cls)
        PreTrainedModel.__init__(model, config)
        model._assemble(vision_encoder, text_encoder)
        # post_init would draw new random weights for parts that have theirs already; only its bookkeeping is wanted.
        model.all_tied_weights_keys = {}
        model.config.dtype = placed_like(model).dtype
        model.config.architectures = [cls.__name__]
        return model.eval()  # type: ignore[no-untyped-call]

    def restore_tables(self) -> None:
        """The vision encoder may be no model of transformers; the text encoder is one always."""
        if self.image is not None:
            encoder = self.image.encoder
            restore_buffers(encoder, lambda: type(encoder)(**encoder.options))

    def _init_weights(self, module: nn.Module) -> None:
        """Each part draws its own first weights when it is built."""

    def adaptable(self) -> list[str]:
        """The parts that may hold an adapter."""
        return [f"{tower}.encoder" for tower in ("image", "text") if getattr(self, tower) is not None]

    def part_module(self, part: str) -> nn.Module:
        """`image.encoder` or `text.encoder`."""
        if part not in self.adaptable():
            raise OpticNerveError(
                f"an adapter stands on {' or '.join(self.adaptable())} here, not on {part}", kind="unsupported"
            )
        return self.get_submodule(part)

    def run_encoder(self, part: str) -> object:
        """Send a black picture, or a text of nothing, through an encoder."""
        encoder: Any = self.part_module(part)
        device = placed_like(encoder).device
        if part == "image.encoder":
            return self.image.encode(torch.zeros(1, *encoder.media_shape, device=device))
        return encoder(torch.zeros(1, 2, dtype=torch.long, device=device))

    def full_name(self, part: str) -> str:
        """The words for parts are clear as they are."""
        return part

    def whole_parts(self) -> list[tuple[str, tuple[str, ...]]]:
        """What the freeze table sums up: each label, and the beginnings of the names under it."""
        return [(start.rstrip("._"), (start,)) for start in self.WHOLE_PARTS]

    def part_parameters(self, part: str) -> dict[str, nn.Parameter]:
        """Full name → parameter of one of `PARTS`.

        Raises:
            OpticNerveError: no such part, or one without parameters in this model.
        """
        named, whole = dict(self.named_parameters()), part.removesuffix(".lora")
        if part != whole and part in self.PARTS:
            return adapter_of(named, (f"{whole}.",), whole)
        named = {n: p for n, p in named.items() if not is_adapter(n)}
        if match := re.fullmatch(r"(image|text)\.encoder\.last\((\d+)\)", part):
            tower = getattr(self, match[1])
            blocks = [] if tower is None else last_blocks(tower.encoder, int(match[2]))
            chosen = {id(p) for block in blocks for p in block.parameters()}
            found = {n: p for n, p in named.items() if id(p) in chosen}
        elif part in self.PARTS:
            found = {n: p for n, p in named.items() if n.startswith(self.STARTS.get(part, (part + ".",)))}
        else:
            raise OpticNerveError(
                f"a {type(self).__name__} has no part {part!r}; its parts: {', '.join(self.PARTS)}", kind="unknown-name"
            )
        if not found:
            raise OpticNerveError(f"{part} has no parameters in this model", kind="empty")
        return found


@dataclass
class TwoTowerDock:
    """A model of a vision encoder and a text encoder, its processor, and the references to the weights it was made
    of. Small enough to be saved whole after each stage. A subclass is a `models.family.Family`."""

    MODEL: ClassVar[Any]

    model: Any
    processor: Any
    bases: dict[str, Any]
    lora: dict[str, Any] | None = None

    def __iter__(self) -> Any:
        """So that `model, processor = dual(…)` reads as one expects."""
        return iter((self.model, self.processor))

    @classmethod
    def described(cls, recipe: Recipe) -> tuple[tuple[Spec | None, Spec], dict[str, Any]]:
        """What a recipe says: of both encoders, and the options of what joins them."""
        raise NotImplementedError

    @classmethod
    def planned(cls, recipe: Recipe) -> TwoTowerModel:
        """The model that a recipe describes, without weights."""
        encoders, options = cls.described(recipe)
        made: TwoTowerModel = cls.MODEL.from_parts(*load_encoders(*encoders, None, planned=True)[:2], **options)
        return made

    @classmethod
    def processor_of(cls, model: TwoTowerModel) -> Any:
        """The processor of a model whose text encoder has its tokenizer."""
        raise NotImplementedError

    @classmethod
    def planned_processor(cls, recipe: Recipe, model: TwoTowerModel) -> Any:
        """The processor of a `planned` model: the tokenizer's files are read, no weight is.

        Raises:
            OpticNerveError: the tokenizer is not at hand.
        """
        spec: Any = recipe.model
        model.text.encoder.take_tokenizer(load_tokenizer(bert_folder(spec.text.encoder.model_dump()["name"])))
        return cls.processor_of(model)

    def save(self, folder: Path, trained: Iterable[str]) -> None:
        """A folder that `from_pretrained` loads, and in bases.json what the model was made of and what trained."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        state = self.model.state_dict()
        names = sorted(now_called(name, state) for name in trained)
        atomic.write_json(folder / BASES, {**versions(), "bases": self.bases, "trained": names})

    def load_stage(self, folder: Path) -> set[str]:
        """Bring the model to where a finished stage left it; returns the names of all parameters trained so far.

        Raises:
            OpticNerveError: the folder is broken, belongs to other parts, or was trained over other quantised weights.
        """
        try:
            trained = set(json.loads((folder / BASES).read_text(encoding="utf-8"))["trained"])
            with wrap_errors("config.json", folder):
                config = type(self.model.config).from_pretrained(folder)
            give_adapters(self.model, config, None)
            state: dict[str, Any] = {}
            for file in sorted(folder.glob("model*.safetensors")):
                state |= load_file(file)
            take_start_out(self.model, without=state)
            self.model.load_state_dict(self._packed(state))
        except (OSError, ValueError, KeyError, RuntimeError) as e:
            raise OpticNerveError(f"{folder} does not hold this model: {e}", kind="mismatch") from e
        return trained

    def _packed(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A folder's tensors with the quantised weights, which did not train, as they were made of the bases: the file
        has them dequantised."""
        own, state = self.model.state_dict(), dict(state)
        for name, layer in quantized_layers(self.model).items():
            held = state[f"{name}.weight"]
            if not torch.equal(layer.dequantized(held.dtype).to(held.device), held):
                raise ValueError(f"{name} holds other weights than those that {layer.kind} makes of the base")
            for leaf in ("weight", "codes", "scales"):
                state[f"{name}.{leaf}"] = own[f"{name}.{leaf}"]
        return state

    @property
    def what(self) -> str:
        """Family and variant in a few words."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """The model's parts, for the card and for results.json."""
        return {
            "kind": self.what,
            "encoder": encoder_name(self.bases.get("image", {}).get("name"), "the pixels"),
            "text": str(self.bases["text"]["name"]),
            "modalities": ["image"],
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "license": license_of(self.bases),
        }

    def headline(self) -> str:
        """One line on what is about to be trained, in rich's markup."""
        d = self.describe()
        return f"[bold]{d['encoder']}[/bold] with [bold]{d['text']}[/bold]: {d['kind']}"


def quantize_encoders(dock: TwoTowerDock) -> None:
    """Keep linear layers of encoders in 4 or 8 bits, in place, where the references to their weights say so."""
    for tower, base in dock.bases.items():
        if kind := base.get("quantize"):
            quantize_part(getattr(dock.model, tower).encoder, tower, {tower: kind})


def load_encoders(
    image: Spec | None, text: Spec, seed: int | None, *, planned: bool = False
) -> tuple[Any, Any, dict[str, Any]]:
    """A vision encoder (None where none is named), a text encoder, and the references to their weights.

    `image`: as for `dock`'s `vision`. `text`: a hub name, local folder or starter name of a BERT, of CLIP's or
    SigLIP's text model, or of a causal language model (GGUF files, too); or a mapping such as
    `{"name": …, "pooling": "mean", "max_length": 32}`. `quantize` in either mapping is noted beside the references, for
    `quantize_encoders`. `seed`: for what is built next; None leaves torch's alone. `planned`: encoders without weights,
    and no references to any.
    """
    seen = None if image is None else vision_spec(image)
    read = ReaderSpec(**{"name": text} if isinstance(text, str) else text)
    vision_name, vision_encoder = (None, None) if seen is None else load_encoder("image", seen, planned=planned)
    if vision_encoder is not None:
        check_one_shape(vision_encoder, "a model of two encoders")
    text_name, text_encoder = _load_text_encoder(read, planned=planned)
    if planned:
        return vision_encoder, text_encoder, {}
    bases = {"text": base_of(text_name, text_encoder)}
    if vision_encoder is not None:
        bases = {"image": base_of(vision_name, vision_encoder), **bases}
    for tower, spec in (("image", seen), ("text", read)):
        if spec is not None and spec.quantize:
            bases[tower]["quantize"] = spec.quantize
    if seed is not None:
        torch.manual_seed(seed)
    return vision_encoder, text_encoder, bases


def _load_text_encoder(spec: ReaderSpec, *, planned: bool = False) -> tuple[str, Any]:
    """The name of the weights and the text encoder that holds them, with its tokenizer; `planned`: one without."""
    options, kind = spec.options, spec.type
    name = options.pop("name", None)
    if name is None:
        raise OpticNerveError(
            "the text encoder needs a name: a hub name, a local folder, or starter/…", kind="missing-field"
        )
    cls = text_encoders.get(kind)
    check_options("text encoder", kind, cls, options)
    language = weights.is_starter(name) and name in weights.LANGUAGES
    if cls is HFTextEncoder and (language or name.endswith(".gguf")):
        if planned:
            return name, cls(architecture=load_language_config(name).to_dict(), **options)
        language_part = load_language(name)
        encoder = cls.from_loaded(language_part.model, language_part.tokenizer, **options)
        encoder.files = list(language_part.files)
        return name, encoder
    return name, (cls.planned if planned else cls.from_pretrained)(name, **options)
