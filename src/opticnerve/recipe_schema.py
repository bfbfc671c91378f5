"""The keys of a recipe: types, defaults, and what contradicts what. Validation only: nothing here imports torch."""

from __future__ import annotations

import difflib
import os
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from opticnerve import registry

Positive = Annotated[int, Field(gt=0)]
PARTS = (
    "connector",
    "encoder",
    "encoder.last(N)",
    "fusion",
    "language",
    "language.last(N)",
    "language.lora",
    "language.embeddings",
)
MODALITIES = ("image", "audio")


class Strict(BaseModel):
    """Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PartSpec(BaseModel):
    """A part by exact name (or dotted path), with that part's own options beside it."""

    model_config = ConfigDict(extra="allow", frozen=True)
    type: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def _check_known(spec: PartSpec, parts: registry.Registry[Any]) -> None:
    if spec.type not in parts.names() and ":" not in spec.type:
        near = difflib.get_close_matches(spec.type, parts.names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown {parts.kind} {spec.type!r}{hint} Known: {', '.join(parts.names())}")


class LanguageSpec(Strict):
    """A causal language model: hub name, local folder, `.gguf` file, or `starter/…`."""

    name: str
    gguf_file: str | None = None
    chat_template: str | None = Field(
        None, description="instead of the model's own: chatml, vicuna, a Jinja template, or a file"
    )


class TilingSpec(Strict):
    """An image cut into tiles, with the whole of it as a thumbnail; see `opticnerve.models.tiling`."""

    type: Literal["anyres"] = "anyres"
    pinpoints: list[tuple[Positive, Positive]] | None = Field(
        None, description="canvases as [height, width], in pixels: multiples of the encoder's image size"
    )
    unpad: bool | None = None
    newline: bool | None = None
    thumbnail: bool = True


class TowerSpec(Strict):
    """An eye or an ear with its connector and its way into the language model."""

    encoder: PartSpec
    connector: PartSpec = PartSpec(type="mlp")
    fusion: PartSpec = PartSpec(type="splice")
    tiling: TilingSpec | None = None

    def parts(self) -> dict[str, Any]:
        """What `opticnerve.models.tower.join` takes."""
        made = {"connector": self.connector.model_dump(), "fusion": self.fusion.model_dump()}
        return made if self.tiling is None else {**made, "tiling": self.tiling.model_dump(exclude_none=True)}

    @model_validator(mode="after")
    def _known_parts(self) -> TowerSpec:
        for spec, parts in (
            (self.encoder, registry.encoders),
            (self.connector, registry.connectors),
            (self.fusion, registry.fusions),
        ):
            _check_known(spec, parts)
        return self


class ModelSpec(Strict):
    """What is docked onto what."""

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


class DataSpec(Strict):
    """One source of conversations.

    `share_prefix`: questions about one picture are trained side by side behind one copy of it, each blind to the
    others; `per_image` of them are drawn at a time.
    """

    path: str
    format: Literal["auto", "captions", "vqa", "llava", "chat", "hf"] = "auto"
    media: str | None = None
    prompt: str | list[str] | None = None
    limit: Positive | None = None
    repeat: Positive = 1
    group_by_image: bool = False
    share_prefix: bool = False
    per_image: Positive | None = None
    allow_outside_media: bool = False
    frames: Positive = Field(8, description="pictures taken of a video, at equal distances")
    split: Literal["all", "train", "held_out"] = Field(
        "all", description="one picture in twenty, chosen by the hash of its file name, is held out"
    )

    @field_validator("path", "media")
    @classmethod
    def _variables(cls, path: str | None) -> str | None:
        """`${NAME}` stands for an environment variable: recipes name no machine's folders."""
        if path is None or "$" not in path:
            return path
        if missing := re.findall(r"\$\{?(\w+)", os.path.expandvars(path)):
            raise ValueError(f"{path}: set the environment variable {missing[0]}, or write the folder")
        # Kept as it was written: a run folder that travels should name no folder of this machine.
        return path

    @model_validator(mode="after")
    def _counts_have_a_use(self) -> DataSpec:
        if self.per_image is not None and not self.share_prefix:
            raise ValueError("per_image says how many questions share a picture's prefix; set share_prefix: true, too")
        return self


class LoraSpec(Strict):
    """Low-rank adapters; see `opticnerve.language.lora.add_lora`."""

    rank: Positive = 16
    alpha: float | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["all-linear"] | list[str] = "all-linear"
    when: Literal["always", "media"] = Field(
        "always",
        description="media: the adapter works on prompts with a picture alone; text alone meets the bare model",
    )


class Stage(Strict):
    """An objective, its data, and what trains. Every part that `train` does not name is frozen and in `eval()`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    objective: PartSpec = PartSpec(type="next_token")
    train: dict[str, Annotated[float, Field(gt=0, lt=10)]]
    data: list[DataSpec]
    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    batch_size: Positive = Field(
        8,
        description="rows per optimizer step, over all processes and micro-batches; a row is one sample, or the "
        "samples that share a prefix",
    )
    accumulate: Positive = 1
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    max_length: Positive | None = None
    template: Literal["chat", "caption"] = "chat"
    lora: LoraSpec | None = None
    bad_samples: Literal["refuse", "skip"] = "refuse"
    save_every: Positive | None = None
    workers: Annotated[int, Field(ge=0)] = 0
    gradient_checkpointing: bool = False

    @field_validator("objective", mode="before")
    @classmethod
    def _objective_by_name(cls, objective: Any) -> Any:
        """`objective: next_token` is short for `objective: {type: next_token}`."""
        return {"type": objective} if isinstance(objective, str) else objective

    @field_validator("objective")
    @classmethod
    def _known_objective(cls, objective: PartSpec) -> PartSpec:
        _check_known(objective, registry.objectives)
        return objective

    @field_validator("train")
    @classmethod
    def _something_trains(cls, train: dict[str, float]) -> dict[str, float]:
        if not train:
            raise ValueError(f"a stage with nothing to train; name at least one part: {', '.join(PARTS)}")
        for part in train:
            split_part(part)
        return train

    @field_validator("data")
    @classmethod
    def _some_data(cls, data: list[DataSpec]) -> list[DataSpec]:
        if not data:
            raise ValueError("no data; add at least one entry such as {path: captions.jsonl}")
        return data

    @model_validator(mode="after")
    def _no_contradictions(self) -> Stage:
        parts = {split_part(p)[1] for p in self.train}
        if "language.lora" in parts and "language" in parts:
            raise ValueError("train: language and language.lora both change the same weights; keep one of them")
        if "language.lora" in parts and any(p.startswith("language.last") for p in parts):
            raise ValueError("train: language.last(N) and language.lora both change the same weights; keep one of them")
        if "language" in parts and any(p.startswith("language.") and p != "language.lora" for p in parts):
            raise ValueError("train: language already holds every part of it; remove the narrower one")
        if "encoder" in parts and any(p.startswith("encoder.last") for p in parts):
            raise ValueError("train: encoder already holds its last blocks; remove encoder.last(N)")
        unnamed = [inner for m, inner in map(split_part, self.train) if m is None]
        twice = [p for p in self.train if split_part(p)[0] and split_part(p)[1] in unnamed]
        if twice:
            raise ValueError(f"train: {', '.join(twice)} is named twice, with and without its tower; keep one")
        if self.lora is not None and "language.lora" not in parts:
            raise ValueError("lora options are given, but train names no language.lora")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be split into {self.accumulate} equal parts; change accumulate"
            )
        return self


class EvaluateSpec(Strict):
    """Questions with known answers, asked after the last stage (and what is measured along with them)."""

    name: str = "held-out questions"
    metric: Literal["vqa", "captions", "choice"] = "vqa"
    data: DataSpec
    sample: Positive | None = Field(None, description="a fixed random sample of this many questions")
    image_dependence: Annotated[int, Field(ge=0)] = Field(
        500, description="questions asked again with blank and shuffled pictures"
    )
    max_new_tokens: Positive = 16
    batch_size: Positive = 32


class Recipe(Strict):
    """Everything a run needs. See `docs/recipes.md` for each key."""

    name: str = "run"
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["bf16", "fp32"] = "bf16"
    model: ModelSpec
    stages: list[Stage] = []
    evaluate: list[EvaluateSpec] = []
    forgetting: bool = True
    trackers: list[str] = []

    @model_validator(mode="after")
    def _parts_exist(self) -> Recipe:
        names = [s.name for s in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages: two stages have the same name; the names are {', '.join(names)}")
        towers = self.model.towers
        for i, stage in enumerate(self.stages):
            for part in stage.train:
                modality, inner = split_part(part)
                if inner.startswith("language"):
                    continue
                if modality is None and len(towers) != 1:
                    have = ", ".join(f"{m}.{inner}" for m in towers) or "none: the model has no tower"
                    raise ValueError(f"stages.{i}.train.{part}: which one? The model's are {have}")
                if modality is not None and modality not in towers:
                    raise ValueError(
                        f"stages.{i}.train.{part}: the model has no {modality} tower; "
                        f"it has {', '.join(towers) or 'none'}"
                    )
        return self


def split_part(part: str) -> tuple[str | None, str]:
    """`"image.connector"` → `("image", "connector")`, `"language.lora"` → `(None, "language.lora")`.

    Raises:
        ValueError: no such part; the message lists them.
    """
    modality, inner = None, part
    for m in MODALITIES:
        if part.startswith(m + "."):
            modality, inner = m, part[len(m) + 1 :]
    tower_part = r"connector|fusion|encoder(\.last\(\d+\))?"
    language_part = r"language(\.lora|\.embeddings|\.last\(\d+\))?"
    if not re.fullmatch(f"{tower_part}|{language_part}", inner) or (modality and inner.startswith("language")):
        near = difflib.get_close_matches(inner, PARTS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"there is no part {part!r}{hint} Parts: {', '.join(PARTS)}, with image. or audio. before the first four"
        )
    return modality, inner
