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
from opticnerve.language.load import load_language
from opticnerve.models.checkpoint.delta import base_of, encoder_name, versions
from opticnerve.models.checkpoint.strict import StrictLoading, restore_buffers, trusts
from opticnerve.models.vlm.build import Spec, license_of, load_encoder, vision_spec
from opticnerve.models.vlm.tower import Tower, check_options, make, placed_like
from opticnerve.starter import weights
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


class TwoTowerModel(StrictLoading, PreTrainedModel):
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
    adapters: ClassVar[dict[str, dict[str, Any]]] = {}

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

    def give_lora(self, options: dict[str, Any], part: str = "language", *, fresh: bool = True) -> None:
        raise OpticNerveError(
            "there is no language model to adapt here; train encoders' last blocks instead", kind="unsupported"
        )

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
        named = dict(self.named_parameters())
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

    model: Any
    processor: Any
    bases: dict[str, Any]
    lora: dict[str, Any] | None = None

    def __iter__(self) -> Any:
        """So that `model, processor = dual(…)` reads as one expects."""
        return iter((self.model, self.processor))

    def save(self, folder: Path, trained: Iterable[str]) -> None:
        """A folder that `from_pretrained` loads, and in bases.json what the model was made of and what trained."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        atomic.write_json(folder / BASES, {**versions(), "bases": self.bases, "trained": sorted(trained)})

    def load_stage(self, folder: Path) -> set[str]:
        """Bring the model to where a finished stage left it; returns the names of all parameters trained so far.

        Raises:
            OpticNerveError: the folder is broken, or belongs to other parts.
        """
        try:
            trained = set(json.loads((folder / BASES).read_text(encoding="utf-8"))["trained"])
            state: dict[str, Any] = {}
            for file in sorted(folder.glob("model*.safetensors")):
                state |= load_file(file)
            self.model.load_state_dict(state)
        except (OSError, ValueError, KeyError, RuntimeError) as e:
            raise OpticNerveError(f"{folder} does not hold this model: {e}", kind="mismatch") from e
        return trained

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


def load_encoders(image: Spec | None, text: Spec, seed: int | None) -> tuple[Any, Any, dict[str, Any]]:
    """A vision encoder (None where none is named), a text encoder, and the references to their weights.

    `image`: as for `dock`'s `vision`. `text`: a hub name, local folder or starter name of a BERT, of CLIP's or
    SigLIP's text model, or of a causal language model (GGUF files, too); or a mapping such as
    `{"name": …, "pooling": "mean", "max_length": 32}`. `seed`: for what is built next; None leaves torch's alone.
    """
    vision_name, vision_encoder = (None, None) if image is None else load_encoder("image", vision_spec(image))
    if vision_encoder is not None:
        check_one_shape(vision_encoder, "a model of two encoders")
    text_name, text_encoder = _load_text_encoder({"name": text} if isinstance(text, str) else text)
    bases = {} if vision_encoder is None else {"image": base_of(vision_name, vision_encoder)}
    if seed is not None:
        torch.manual_seed(seed)
    return vision_encoder, text_encoder, bases | {"text": base_of(text_name, text_encoder)}


def _load_text_encoder(spec: dict[str, Any]) -> tuple[str, Any]:
    """The name of the weights and the text encoder that holds them, with its tokenizer."""
    options = dict(spec)
    kind, name = options.pop("type", "hf_text"), options.pop("name", None)
    if name is None:
        raise OpticNerveError(
            "the text encoder needs a name: a hub name, a local folder, or starter/…", kind="missing-field"
        )
    cls = text_encoders.get(kind)
    check_options("text encoder", kind, cls, options)
    language = weights.is_starter(name) and name in weights.LANGUAGES
    if cls is HFTextEncoder and (language or name.endswith(".gguf")):
        language_part = load_language(name)
        encoder = cls.from_loaded(language_part.model, language_part.tokenizer, **options)
        encoder.files = list(language_part.files)
        return name, encoder
    return name, cls.from_pretrained(name, **options)
