"""The keys of a recipe: types, defaults, and what contradicts what. Validation only: nothing here imports torch."""

from __future__ import annotations

import datetime
import os
import re
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, ValidationInfo, field_validator, model_validator

from opticnerve import registry
from opticnerve.recipe.model import PARTS, AnyModelSpec, ModelSpec, PartSpec, Positive, Strict, check_known
from opticnerve.types import RecipeError


class DataSpec(Strict):
    """One source of conversations.

    `share_prefix`: questions about one picture are trained side by side behind one copy of it, each blind to the
    others; `per_image` of them are drawn at a time.
    """

    path: str
    format: str = "auto"
    media: str | None = None
    columns: dict[str, str | list[str]] = Field({}, description="a format's field: the data's, or a template of them")
    roles: dict[str, Literal["user", "assistant", "system"]] = Field({}, description="a speaker of the data: its role")
    annotations: str | None = Field(None, description="a second file, which has the answers to the first's questions")
    media_cache: str | None = Field(None, description="a folder to fetch media on the web into; without it, none are")
    prompt: str | list[str] | None = None
    limit: Positive | None = None
    repeat: Positive = 1
    group_by_image: bool = False
    share_prefix: bool = False
    per_image: Positive | None = None
    allow_outside_media: bool = False
    repair: list[Literal["fold-system", "picture-first", "drop-leading-assistant", "close-quotes"]] = Field(
        [],
        description="fold-system: the system's words at the head of the first user turn; picture-first: media before "
        "words; drop-leading-assistant; close-quotes: quotes that do not close are taken as they stand",
    )
    ignore: list[str] = Field([], description="fields of the records to pass over, which would else be an error")
    frames: Positive = Field(8, description="pictures taken of a video, at equal distances")
    split: Literal["all", "train", "held_out"] = Field(
        "all", description="one picture in twenty, chosen by the hash of its file name, is held out"
    )
    streaming: bool = Field(
        False, description="read rows as they come, never the whole: of files here, or of a data set on the hub"
    )
    shuffle_window: Positive = Field(1024, description="streaming: rows that are shuffled together; 1: none")
    subset: str | None = Field(None, description="streaming: a configuration of the hub's data set")
    hub_split: str | None = Field(None, description="a split of the hub's data set, or of a folder that holds several")
    revision: str | None = Field(None, description="streaming: a commit, tag or branch of the hub's data set")

    @field_validator("format")
    @classmethod
    def _known_format(cls, format: str) -> str:
        if format not in (known := ("auto", *registry.data_formats, "hf", "webdataset")):
            raise ValueError(f"unknown format{registry.hint_at(format, known)} Known: {', '.join(known)}")
        return format

    @field_validator("path", "media", "annotations", "media_cache")
    @classmethod
    def _variables(cls, path: str | None, info: ValidationInfo) -> str | None:
        """`${NAME}` stands for an environment variable: recipes name no machine's folders."""
        if path is None or "$" not in path or (info.context or {}).get("without_data"):
            return path
        if missing := re.findall(r"\$\{?(\w+)", os.path.expandvars(path)):
            raise ValueError(f"{path}: set the environment variable {missing[0]}, or write the folder")
        # Kept as it was written: a run folder that travels should name no folder of this machine.
        return path

    @model_validator(mode="after")
    def _counts_have_a_use(self) -> DataSpec:
        if self.per_image is not None and not self.share_prefix:
            raise ValueError("per_image says how many questions share a picture's prefix; set share_prefix: true, too")
        own = {"shuffle_window", "subset", "revision"} & self.model_fields_set
        if not self.streaming:
            # (a recipe that was written out names every key)
            given = sorted(k for k in own if getattr(self, k) != type(self).model_fields[k].default)
            if given:
                raise ValueError(f"{', '.join(given)}: for streams; set streaming: true, or leave it out")
            return self
        for key in ("share_prefix", "group_by_image"):
            if getattr(self, key):
                raise ValueError(
                    f"streaming: {key} brings together what may lie anywhere in the data; leave one of the two out"
                )
        if self.split != "all":
            raise ValueError(
                "streaming: split needs to see which pictures there are; choose one of the data set's own splits with "
                "hub_split, or leave streaming out"
            )
        return self


class BadSamples(Strict):
    """Bad samples are left out, up to so many or to a share of all; one more is an error."""

    limit: Annotated[int, Field(ge=0)] | None = None
    share: Annotated[float, Field(ge=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> BadSamples:
        if (self.limit is None) == (self.share is None):
            raise ValueError("bad_samples takes one of limit (how many) and share (of all samples, such as 0.01)")
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


class PackSpec(Strict):
    """Rows packed ahead; see `opticnerve.data.encode.packing`."""

    tokens: Positive = Field(description="a row holds samples of at most so many tokens together")
    window: Positive = Field(1024, description="samples that are arranged at a time")


class CacheSpec(Strict):
    """Where what a frozen image encoder saw is kept; see `opticnerve.features.store`."""

    budget: ByteSize | None = Field(
        None,
        description="disk for all encoders' features, such as 50GB; by default $OPTICNERVE_FEATURE_BUDGET, else 20 GB "
        "or a tenth of the free disk, whichever is less",
    )
    dtype: Literal["bfloat16"] | None = Field(
        None, description="store features so; by default in the encoder's own dtype"
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
        "samples that share a prefix; with `pack: {tokens: …}` a packed row",
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
    bad_samples: Literal["refuse", "skip"] | BadSamples = "refuse"
    save_every: Positive | None = None
    keep_checkpoints: Positive = 2
    on_divergence: Literal["stop", "skip"] = Field(
        "stop", description="what becomes of a step whose loss or gradient is no number: skip leaves its update out"
    )
    workers: Annotated[int, Field(ge=0)] = 0
    gradient_checkpointing: bool = False
    compile: bool = Field(
        False,
        description="torch.compile each layer of the language model: for GPUs; on a CPU it takes minutes and gains "
        "nothing",
    )
    kernels: Literal["liger", "inductor"] | None = Field(None, description="fused norms and gated MLPs, by whom")
    pack: Positive | PackSpec | None = Field(
        None,
        description="stand the samples of a micro-batch side by side in rows of at most so many tokens, each blind to "
        "the others, instead of padding them; the loss stays the same",
    )
    cache_features: bool | CacheSpec = Field(
        False,
        description="see each picture once with the frozen image encoder, and keep what it saw on disk for all epochs, "
        "stages and recipes",
    )

    @field_validator("objective", mode="before")
    @classmethod
    def _objective_by_name(cls, objective: object) -> Any:
        """`objective: next_token` is short for `objective: {type: next_token}`."""
        return {"type": objective} if isinstance(objective, str) else objective

    @field_validator("objective")
    @classmethod
    def _known_objective(cls, objective: PartSpec) -> PartSpec:
        check_known(objective, registry.objectives)
        return objective

    @field_validator("train", "data")
    @classmethod
    def _some(cls, given: object, info: ValidationInfo) -> Any:
        if not given and info.field_name == "train":
            raise ValueError(f"a stage with nothing to train; name at least one part: {', '.join(PARTS)}")
        if not given:
            raise ValueError("no data; add at least one entry such as {path: captions.jsonl}")
        return given

    @model_validator(mode="after")
    def _no_contradictions(self) -> Stage:
        split = [_without_tower(p) for p in self.train]
        parts, unnamed = {inner for _, inner in split}, {inner for tower, inner in split if tower is None}
        lasts = [tower for tower, inner in split if inner.startswith("encoder.last")]
        both = "both change the same weights; keep one of them"
        twice = [p for p, (tower, inner) in zip(self.train, split, strict=True) if tower and inner in unnamed]
        found = {
            f"train: language and language.lora {both}": {"language", "language.lora"} <= parts,
            f"train: language.last(N) and language.lora {both}": (
                "language.lora" in parts and any(p.startswith("language.last") for p in parts)
            ),
            "train: language already holds every part of it; remove the narrower one": (
                "language" in parts and any(p.startswith("language.") for p in parts)
            ),
            "train: encoder already holds its last blocks; remove encoder.last(N)": any(
                inner == "encoder" and any(tower == last or None in (tower, last) for last in lasts)
                for tower, inner in split
            ),
            f"train: {', '.join(twice)} is named twice, with and without its tower; keep one": bool(twice),
            "lora options are given, but train names no language.lora": (
                self.lora is not None and "language.lora" not in parts
            ),
            "give steps or epochs, not both": self.steps is not None and self.epochs is not None,
            f"compile fuses what kernels: {self.kernels} brings; keep one of them": bool(self.compile and self.kernels),
            f"batch_size {self.batch_size} cannot be split into {self.accumulate} equal parts; change accumulate": (
                self.batch_size % self.accumulate != 0
            ),
        }
        if reason := next((reason for reason, wrong in found.items() if wrong), self._cannot_stream()):
            raise ValueError(reason)
        return self

    def _cannot_stream(self) -> str | None:
        """What of the stage does not go with streamed data, if anything is streamed."""
        if not any(spec.streaming for spec in self.data):
            return None
        if (indexed := next((s.path for s in self.data if not s.streaming), None)) is not None:
            return (
                f"data: some entries are streamed, {indexed} is not; write streaming: true for it, too (files here can "
                f"be streamed), or give it a stage of its own"
            )
        known = len(self.data) == 1 and self.data[0].limit is not None
        if self.steps is None and not known:
            return "streaming: the data do not say how long they are; give steps, or one entry with a limit"
        if self.cache_features:
            return "cache_features: a stream's pictures are not known beforehand; leave it or streaming out"
        if isinstance(self.pack, PackSpec):
            return (
                "pack: streamed rows cannot be planned ahead; write pack: N, which packs the samples of a micro-batch, "
                "or leave streaming out"
            )
        if isinstance(self.bad_samples, BadSamples) and self.bad_samples.share is not None and not known:
            return "bad_samples: a share of a stream is not known; give a limit"
        return None


class EvaluateSpec(Strict):
    """Questions with known answers, asked after the last stage (and what is measured along with them)."""

    name: str = "held-out questions"
    metric: Literal["vqa", "yes_no", "ocr", "captions", "choice", "multiple_choice", "retrieval", "zero_shot"] = "vqa"
    data: DataSpec
    sample: Positive | None = Field(None, description="a fixed random sample of this many questions")
    image_dependence: Annotated[int, Field(ge=0)] = Field(
        500, description="questions asked again with blank and shuffled pictures"
    )
    max_new_tokens: Positive = 16
    batch_size: Positive = 32
    templates: str | list[str] = Field(
        "photo", description="zero_shot: sentences around a class's name, {} where it stands, or plain, photo, clip"
    )
    classes: list[str] | None = Field(None, description="zero_shot: the closed set; by default all captions that occur")

    @field_validator("data")
    @classmethod
    def _ends(cls, data: DataSpec) -> DataSpec:
        if data.streaming and data.limit is None:
            raise ValueError("a stream is asked its first so many questions; give it a limit")
        return data


# What each kind of model can be asked.
_METRICS = {
    "docked": ("vqa", "yes_no", "ocr", "captions", "choice", "multiple_choice"),
    "dual": ("retrieval", "zero_shot"),
    "classifier": ("vqa", "yes_no"),
}


class Recipe(Strict):
    """Everything a run needs. See `docs/recipes.md` for each key."""

    name: str = "run"
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["bf16", "fp32"] = "bf16"
    model: AnyModelSpec
    # (pydantic copies defaults)
    stages: list[Stage] = []  # noqa: RUF012
    evaluate: list[EvaluateSpec] = []  # noqa: RUF012
    forgetting: bool = True
    forgetting_tokens: Positive | None = Field(
        20_480, description="tokens of the held-out text that perplexity is measured on"
    )
    trackers: list[str] = []  # noqa: RUF012

    @property
    def docked(self) -> ModelSpec:
        """The model, where it is a docked language model.

        Raises:
            RecipeError: it is of another kind.
        """
        if not isinstance(self.model, ModelSpec):
            raise RecipeError(
                f"recipe {self.name} describes {self.model.WHAT}; this works for a docked language model alone "
                f"(`opticnerve train` takes both)"
            )
        return self.model

    def dated(self, day: datetime.date) -> Recipe:
        """The same recipe with a day for the chat templates that write today's date, unless it names one."""
        if not isinstance(self.model, ModelSpec) or self.model.language.date is not None:
            return self
        language = self.model.language.model_copy(update={"date": day})
        return self.model_copy(update={"model": self.model.model_copy(update={"language": language})})

    @model_validator(mode="after")
    def _parts_exist(self) -> Recipe:
        names = [s.name for s in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages: two stages have the same name; the names are {', '.join(names)}")
        for i, stage in enumerate(self.stages):
            for part in stage.train:
                try:
                    self.model.check_part(part)
                except ValueError as e:
                    raise ValueError(f"stages.{i}.train.{part}: {e}") from None
        return self

    @model_validator(mode="after")
    def _objectives_and_metrics_fit(self) -> Recipe:
        mine = self.model.KIND
        for i, stage in enumerate(self.stages):
            name = stage.objective.type
            # An objective of a third party may be for any kind of model; it says so itself.
            if any(name in o for o in OBJECTIVES.values()) and name not in OBJECTIVES[mine]:
                raise ValueError(
                    f"stages.{i}.objective: {name} does not train {self.model.WHAT}; write "
                    f"objective: {' or '.join(OBJECTIVES[mine])}"
                )
            if stage.pack is not None and name != "next_token":
                raise ValueError(f"stages.{i}.pack: {name} takes samples by themselves; leave it out")
            if stage.cache_features and (reason := self._cannot_cache(stage)):
                raise ValueError(f"stages.{i}.cache_features: {reason}; leave it out")
        for i, spec in enumerate(self.evaluate):
            if spec.metric not in _METRICS[mine]:
                raise ValueError(
                    f"evaluate.{i}.metric: {spec.metric} is not for {self.model.WHAT}; "
                    f"known for it: {', '.join(_METRICS[mine])}"
                )
        return self

    def _cannot_cache(self, stage: Stage) -> str | None:
        """Why this stage's pictures cannot be seen once and for all, if they cannot."""
        vision_encoders = [p for p in stage.train if not p.startswith(("text.", "audio."))]
        if any(_without_tower(p)[1].startswith("encoder") for p in vision_encoders):
            return "the stage trains the image encoder, so what it sees changes"
        if self.model.image is None:
            return "the model has no image tower"
        if isinstance(self.model, ModelSpec) and self.model.image.tiling is not None:
            return "pictures in tiles are not cached"
        return None


OBJECTIVES = {
    "docked": ("next_token", "dpo", "qformer_pretraining"),
    "dual": ("contrastive",),
    "classifier": ("classification",),
}


def _without_tower(part: str) -> tuple[str | None, str]:
    """`"image.encoder"` → `("image", "encoder")`; a part of no tower as it is."""
    tower, dot, inner = part.partition(".")
    return (tower, inner) if dot and tower in ("image", "audio", "text") else (None, part)
