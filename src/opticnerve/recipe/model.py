"""The keys of a recipe under `model:`: a docked language model, a dual encoder, or a fusion classifier.

Validation only: nothing here imports torch.
"""

from __future__ import annotations

import datetime
import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from opticnerve import registry
from opticnerve.types import Thinking

Positive = Annotated[int, Field(gt=0)]
PARTS = (
    "connector", "encoder", "encoder.last(N)", "encoder.lora", "fusion", "fusion.lora", "language", "language.last(N)",
    "language.lora", "language.embeddings",
)  # fmt: skip
MODALITIES = ("image", "audio")
FROM = "from"  # what a model, or a connector, goes on from
Quantize = Literal["nf4", "int8"]


class Strict(BaseModel):
    """Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def pinned(given: object) -> Any:
    """`name` with `revision` beside it as the one name `NAME@REVISION`, by which weights are found and kept."""
    if not isinstance(given, dict) or given.get("revision") is None:
        return given
    rest = {k: v for k, v in given.items() if k != "revision"}
    if not isinstance(rest.get("name"), str) or "@" in rest["name"]:
        raise ValueError("revision belongs to a name of the hub that does not hold one (NAME@REVISION) already")
    return {**rest, "name": f"{rest['name']}@{given['revision']}"}


class PartSpec(BaseModel):
    """A part by exact name (or dotted path), with that part's own options beside it; `revision` of its weights."""

    model_config = ConfigDict(extra="allow", frozen=True)
    type: str

    _pinned = model_validator(mode="before")(pinned)

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class EncoderSpec(PartSpec):
    """An encoder, as a part of a model."""

    quantize: Quantize | None = Field(None, description="keep its linear layers in 4 or 8 bits, where it stays frozen")


def check_known(spec: PartSpec, parts: registry.Registry[Any]) -> None:
    if spec.type == FROM and parts is registry.connectors:
        if not isinstance(spec.options.get(FROM), str):
            raise ValueError("connector: from names a run, a folder of a model, or a file mm_projector.safetensors")
        return
    if spec.type not in parts.names() and ":" not in spec.type:
        raise ValueError(parts.unknown(spec.type))


class LanguageSpec(Strict):
    """A causal language model: hub name (`revision` or NAME@REVISION pins it), local folder, `.gguf` file, or
    `starter/…`."""

    name: str
    gguf_file: str | None = None
    chat_template: str | None = Field(
        None, description="instead of the model's own: chatml, vicuna, a Jinja template, or a file"
    )
    thinking: Thinking | None = Field(
        None,
        description="think blocks of answers: strip them, keep (and learn) them, or ask with an empty one; by default "
        "an answer is learned as the chat template writes it",
    )
    sanitize_control_tokens: bool = Field(
        False, description="words of the data that spell a special token (<|im_end|>) are encoded as words"
    )
    date: datetime.date | None = Field(
        None, description="the day that a chat template with today's date writes; by default the day of the run's start"
    )

    quantize: Quantize | None = Field(
        None,
        description="keep the linear layers of its decoder in 4 (NormalFloat) or 8 bits; they stay frozen, adapters, "
        "embeddings and head are left in the run's precision",
    )

    def processor_keys(self) -> dict[str, Any]:
        """What the processor is told of words."""
        date = self.date.isoformat() if self.date else None
        return {"thinking": self.thinking, "sanitize_control_tokens": self.sanitize_control_tokens, "date": date}

    _pinned = model_validator(mode="before")(pinned)


class TilingSpec(Strict):
    """An image cut into tiles, with the whole of it as a thumbnail; see `opticnerve.models.vlm.tiling`."""

    type: Literal["anyres"] = "anyres"
    pinpoints: list[tuple[Positive, Positive]] | None = Field(
        None, description="canvases as [height, width], in pixels: multiples of the encoder's image size"
    )
    unpad: bool | None = None
    newline: bool | None = None
    thumbnail: bool = True
    max_tiles: Positive | None = Field(
        None, description="a canvas with more tokens than so many tiles have is interpolated down to them"
    )


class PictureSpec(Strict):
    """An encoder of pictures (or sounds), and what stands behind it."""

    encoder: EncoderSpec

    @field_validator("encoder", mode="before")
    @classmethod
    def _docked(cls, encoder: object) -> Any:
        return encoder.model_dump() if isinstance(encoder, PartSpec) else encoder

    @model_validator(mode="after")
    def _known_parts(self) -> Self:
        for kind in ("encoder", "connector", "fusion"):
            if (spec := getattr(self, kind, None)) is not None:
                check_known(spec, getattr(registry, f"{kind}s"))
        return self


class TowerSpec(PictureSpec):
    """A vision encoder or an audio encoder with its connector and its way into the language model."""

    connector: PartSpec = PartSpec(type="mlp")
    fusion: PartSpec = PartSpec(type="splice")
    tiling: TilingSpec | None = None

    @field_validator("connector", mode="before")
    @classmethod
    def _connector_of_another(cls, connector: object) -> object:
        """`{from: RUN}` is a connector of the type that the run's has."""
        return {"type": FROM, **connector} if isinstance(connector, dict) and FROM in connector else connector

    def parts(self) -> dict[str, Any]:
        """What `opticnerve.models.vlm.tower.join` takes."""
        made = {"connector": self.connector.model_dump(), "fusion": self.fusion.model_dump()}
        return made if self.tiling is None else {**made, "tiling": self.tiling.model_dump(exclude_none=True)}


class ModelSpec(Strict):
    """What is docked onto what."""

    KIND: ClassVar[str] = "docked"
    WHAT: ClassVar[str] = "a docked language model"

    language: LanguageSpec
    image: TowerSpec | None = None
    audio: TowerSpec | None = None

    @model_validator(mode="after")
    def _something_is_docked(self) -> ModelSpec:
        if not self.towers:
            raise ValueError("nothing is docked onto the language model; give image: or audio: an encoder")
        if self.audio is not None and self.audio.tiling is not None:
            raise ValueError("audio.tiling: tiling is for pictures; remove it")
        return self

    @property
    def towers(self) -> dict[str, TowerSpec]:
        return {m: t for m in MODALITIES if (t := getattr(self, m, None)) is not None}

    @property
    def quantized(self) -> dict[str, Quantize]:
        """How the parts are quantised that are: `language`, and encoders by their modality."""
        encoders = {m: tower.encoder.quantize for m, tower in self.towers.items()}
        return {part: kind for part, kind in {"language": self.language.quantize, **encoders}.items() if kind}

    def check_part(self, part: str) -> None:
        """Raise a ValueError unless the docked model has this part, it is clear of which tower, and it can train."""
        check_tower(part, list(self.towers))
        modality, inner = split_part(part)
        where = "language" if inner.startswith("language") else modality or next(iter(self.towers))
        check_trains(self.quantized.get(where), "language" if where == "language" else f"{where}.encoder", inner)

    def cannot_cache(self) -> str | None:
        """Why pictures cannot be seen once and for all, if they cannot."""
        return no_cache(self.image is not None, self.image is not None and self.image.tiling is not None)


def check_trains(kind: Quantize | None, whole: str, inner: str) -> None:
    """Raise a ValueError if `inner` (`encoder`, `language.last(2)`) is weights of a part that is quantised so."""
    if kind and re.match(r"(encoder|language)(\.last|$)", inner):
        raise ValueError(f"quantised weights ({kind}) do not train; leave quantize out, or train {whole}.lora")


def check_tower(part: str, towers: list[str]) -> None:
    """Raise a ValueError unless a docked model with these towers has a part, and it is clear of which tower."""
    modality, inner = split_part(part)
    if inner.startswith("language"):
        return
    if modality is None and len(towers) != 1:
        raise ValueError(f"which one? The model's are {', '.join(f'{m}.{inner}' for m in towers)}")
    if modality is not None and modality not in towers:
        raise ValueError(f"the model has no {modality} tower; it has {', '.join(towers)}")


def no_cache(image: bool, tiled: bool) -> str | None:
    """Why a model with or without an image tower, in tiles or not, has no features to keep."""
    return "pictures in tiles are not cached" if tiled else None if image else "the model has no image tower"


class ContinuedSpec(Strict):
    """A docked model that exists, as it is: a run, a folder of `save_pretrained`, peft's adapter on one, a hub name.

    Which parts it has, its folder says: nothing of it is described here.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)
    KIND: ClassVar[str] = "docked"
    WHAT: ClassVar[str] = "a model that goes on from another"

    source: str = Field(alias=FROM)
    sha256: str | None = Field(None, description="of its weights and configuration; filled in when a run begins")

    @model_validator(mode="before")
    @classmethod
    def _nothing_beside_it(cls, given: object) -> object:
        known = ("language", "image", "audio", "text", "timing", "loss", "projection_dim", "answers", "options")
        if isinstance(given, dict) and (others := [f"{k}: {given[k]!r}" for k in known if given.get(k) is not None]):
            raise ValueError(
                f"from: {given[FROM]!r} is a whole model, and {'; '.join(others)} describes another one; keep one of "
                "the two (connector: {from: …} takes a connector alone)"
            )
        return given

    def check_part(self, part: str) -> None:
        """Raise a ValueError unless any docked model could have this part."""
        split_part(part)

    def cannot_cache(self) -> str | None:
        """Its folder tells, when it is read."""
        return None


class ReaderSpec(EncoderSpec):
    """A text encoder: `{name: starter/minilm}`, or a type of `opticnerve.encoders.text.text_encoders` beside it."""

    type: str = "hf_text"


class QuestionSpec(Strict):
    """A text encoder."""

    encoder: ReaderSpec


class VisionSpec(PictureSpec):
    """The image tower of a dual encoder; see `opticnerve.models.dual_encoder.modeling`."""

    pooling: Literal["mean", "class_token", "pooler"] = "mean"
    projection: bool | dict[str, Any] = True


class TextSpec(QuestionSpec):
    """The text tower of a dual encoder."""

    projection: bool | dict[str, Any] = True


class TwoTowerSpec(Strict):
    """A model of a vision encoder and a text encoder. `PARTS`: what of it a stage may train."""

    PARTS: ClassVar[tuple[str, ...]]
    WHAT: ClassVar[str]

    def cannot_cache(self) -> str | None:
        """Why pictures cannot be seen once and for all, if they cannot."""
        return no_cache(getattr(self, "image", None) is not None, False)

    @property
    def quantized(self) -> dict[str, Quantize]:
        """How the encoders are quantised that are, by tower."""
        towers = {tower: getattr(self, tower, None) for tower in ("image", "text")}
        return {tower: kind for tower, spec in towers.items() if spec and (kind := spec.encoder.quantize)}

    def check_part(self, part: str) -> None:
        """Raise a ValueError unless the model has this part, and it can train; `last(N)` stands for any number."""
        if re.sub(r"\(\d+\)$", "(N)", part) not in self.PARTS or part.endswith("(N)"):
            hint = registry.hint_at(part, self.PARTS)
            raise ValueError(f"{self.WHAT} has no part {part!r}{hint} Parts: {', '.join(self.PARTS)}")
        tower, _, inner = part.partition(".")
        check_trains(self.quantized.get(tower), f"{tower}.encoder", inner)


class DualSpec(TwoTowerSpec):
    """A vision encoder and a text encoder with one space for both: CLIP, SigLIP, LiT."""

    PARTS: ClassVar[tuple[str, ...]] = (
        "image.encoder", "image.encoder.last(N)", "image.encoder.lora", "image.projection", "text.encoder",
        "text.encoder.last(N)", "text.encoder.lora", "text.projection", "temperature",
    )  # fmt: skip
    KIND: ClassVar[str] = "dual"
    WHAT: ClassVar[str] = "a dual encoder"

    image: VisionSpec
    text: TextSpec
    projection_dim: Positive | None = 512
    loss: Literal["clip", "siglip"] = "clip"


class ClassifierSpec(TwoTowerSpec):
    """A vision encoder and a text encoder that choose from a closed set of answers; see `models.classifier`."""

    PARTS: ClassVar[tuple[str, ...]] = (
        "image.encoder", "image.encoder.last(N)", "image.encoder.lora", "text.encoder", "text.encoder.last(N)",
        "text.encoder.lora", "classifier",
    )  # fmt: skip
    KIND: ClassVar[str] = "classifier"
    WHAT: ClassVar[str] = "a fusion classifier"

    timing: Literal["early", "intermediate", "late"]
    image: PictureSpec | None = None
    text: QuestionSpec
    answers: list[str] | None = Field(None, description="the closed set; by default all answers in the stages' data")
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _an_encoder_where_one_is_used(self) -> ClassifierSpec:
        if (self.image is None) != (self.timing == "early"):
            raise ValueError(
                "early fusion reads the pixels themselves; leave image out"
                if self.timing == "early"
                else f"{self.timing} fusion needs a vision encoder; give image: an encoder"
            )
        return self


def _kind(model: object) -> str:
    given = model if isinstance(model, dict) else {"timing": 0} if isinstance(model, ClassifierSpec) else {}
    if FROM in given or isinstance(model, ContinuedSpec):
        return FROM
    if "timing" in given:
        return "classifier"
    return "dual" if "text" in given or isinstance(model, DualSpec) else "docked"


# The tags stand in the locations of pydantic's errors; `recipe` leaves them out again.
AnyModelSpec = Annotated[
    Annotated[ModelSpec, Tag("docked")]
    | Annotated[DualSpec, Tag("dual")]
    | Annotated[ClassifierSpec, Tag("classifier")]
    | Annotated[ContinuedSpec, Tag(FROM)],
    Discriminator(_kind),
]


def split_part(part: str) -> tuple[str | None, str]:
    """`"image.connector"` → `("image", "connector")`, `"language.lora"` → `(None, "language.lora")`.

    Raises:
        ValueError: no such part; the message lists them.
    """
    start, dot, rest = part.partition(".")
    modality, inner = (start, rest) if dot and start in MODALITIES else (None, part)
    tower_part = r"connector|fusion(\.lora)?|encoder(\.lora|\.last\(\d+\))?"
    language_part = r"language(\.lora|\.embeddings|\.last\(\d+\))?"
    if not re.fullmatch(f"{tower_part}|{language_part}", inner) or (modality and inner.startswith("language")):
        raise ValueError(
            f"there is no part {part!r}{registry.hint_at(inner, PARTS)} Parts: {', '.join(PARTS)}, with image. or "
            "audio. before those of connector, encoder and fusion"
        )
    return modality, inner
