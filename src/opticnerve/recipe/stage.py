"""The keys of a stage: what is minimised, what trains, on which data, and for how long."""

from __future__ import annotations

import warnings
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, ValidationInfo, field_validator, model_validator

from opticnerve import registry
from opticnerve.recipe.data import BadSamples, DataSpec
from opticnerve.recipe.model import PARTS, PartSpec, Positive, Strict, check_known

Budget = Annotated[str, Field(pattern=r"^\d+(\.\d+)? ?([KMGT]i?)?B$")]
"""Bytes, with their unit."""


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
    dora: bool = Field(False, description="learn the length of each column of the weight beside its direction")
    rank_stabilised: bool = Field(False, description="scale by alpha over the square root of the rank")
    init: Literal["gaussian", "orthogonal", "pissa"] | None = Field(
        None, description="how the adapter begins; pissa: with the weight's first singular vectors, taken out of it"
    )

    @model_validator(mode="after")
    def _goes_together(self) -> LoraSpec:
        if self.when == "media" and (self.dora or self.init == "pissa"):
            raise ValueError(
                "when: media leaves the language model to text as it was, and dora and init: pissa change what is left "
                "of it without the adapter; keep one of the two"
            )
        return self

    def options(self, part: str = "language") -> dict[str, Any]:
        """What `add_lora` takes, and folders say; what came later is left out where it is not used. `when` is the
        language model's alone."""
        later: dict[str, Any] = {"dora": False, "rank_stabilised": False, "init": None}
        if part != "language":
            later["when"] = self.when
        return {k: v for k, v in self.model_dump().items() if k not in later or v != later[k]}


class PackSpec(Strict):
    """Rows packed ahead; see `opticnerve.data.encode.packing`."""

    tokens: Positive = Field(description="a row holds samples of at most so many tokens together")
    window: Positive = Field(1024, description="samples that are arranged at a time")


class MixingSpec(Strict):
    """How often the sources of a stage come up; see `opticnerve.data.dataset.mixture`."""

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        description="shares go with size^(1/temperature): 1 is by size, larger is more even"
    )


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


class ValidateSpec(Strict):
    """A held-out curve beside the training's; see `opticnerve.train.validation`."""

    data: list[DataSpec] | None = Field(None, description="what is held out: one entry, or several")
    split: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="a share of the stage's own data to hold out, by the hash of each picture's file name"
    )
    every: Positive = Field(description="steps from one look to the next; the last step is always looked at")
    metric: str = Field("loss", description="what best and patience go by: loss, or the name of an entry of `evaluate`")
    keep: Literal["last", "best"] = Field("last", description="best: the stage leaves the weights of its best look")
    patience: Positive | None = Field(None, description="stop when so many looks in a row were no better than the best")

    @field_validator("data", mode="before")
    @classmethod
    def _one_or_several(cls, data: object) -> Any:
        return [data] if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _something_is_held_out(self) -> ValidateSpec:
        if self.data is not None and self.split is not None:
            raise ValueError("validate: data and split both say what is held out; keep one of them")
        if self.data is None and self.split is None and self.metric == "loss":
            raise ValueError("validate: name held-out data, or a split such as 0.02 of the stage's own")
        for spec in self.data or ():
            if spec.weight is not None or spec.repeat != 1:
                raise ValueError(f"validate: {spec.path} is looked at once each time; leave out weight and repeat")
            if spec.streaming:
                raise ValueError(f"validate: {spec.path} is read again at each look; leave out streaming")
        return self


with warnings.catch_warnings():
    # pydantic's `BaseModel.validate` is of its first version, and nothing here calls it.
    warnings.filterwarnings("ignore", 'Field name "validate"', UserWarning)

    class _WithValidation(Strict):
        validate: ValidateSpec | None = None  # type: ignore[assignment]


class Stage(_WithValidation):
    """An objective, its data, and what trains. Every part that `train` does not name is frozen and in `eval()`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    objective: PartSpec = PartSpec(type="next_token")
    train: dict[str, Annotated[float, Field(gt=0, lt=10)]]
    data: list[DataSpec]
    mixing: MixingSpec | None = None
    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    batch_size: Positive = Field(
        8,
        description="rows per optimizer step, over all processes and micro-batches; a row is one sample, or the "
        "samples that share a prefix; with `pack: {tokens: …}` a packed row",
    )
    accumulate: Positive = 1
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    cooldown: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="schedule wsd: the share of the steps, at the end, in which the rate falls; by default 0.1"
    )
    optimizer: Literal["adamw", "adamw_8bit", "adamw_bf16", "muon", "adafactor"] = "adamw"
    layer_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="of encoders and language models, each layer's rate is this part of that of the layer above"
    )
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="keep a running average of what trains, and look at, save and go on with that"
    )
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
    gradient_checkpointing: bool | Positive | Annotated[float, Field(gt=0, lt=1)] | Budget = Field(
        False,
        description="compute activations again instead of keeping them: of all layers, of so many, of a share; or of "
        "as few as keep a step within so many bytes, such as 40GiB",
    )
    compile: bool = Field(
        False,
        description="torch.compile each layer of the language model: for GPUs; on a CPU it takes minutes and gains "
        "nothing",
    )
    kernels: Literal["liger", "inductor"] | None = Field(None, description="fused norms and gated MLPs, by whom")
    attention: Literal["flash", "varlen", "flex", "buckets"] | None = Field(
        None,
        description="who computes attention within the segments of packed rows; by default the fastest that is there",
    )
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
        split = [without_tower(p) for p in self.train]
        parts, unnamed = {inner for _, inner in split}, {inner for tower, inner in split if tower is None}
        lasts = [tower for tower, inner in split if inner.startswith("encoder.last")]
        both = "both change the same weights; keep one of them"
        adapted = {(tower, inner.removesuffix(".lora")) for tower, inner in split if inner.endswith(".lora")}
        beside = next(
            (f"{p} and {half}.lora" for p, (tower, inner) in zip(self.train, split, strict=True)
             for other, half in adapted
             if half != "language" and (inner == half or inner.startswith(f"{half}.last"))
             and (tower == other or None in (tower, other))), None
        )  # fmt: skip
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
            f"train: {beside} {both}": beside is not None,
            "lora options are given, but train names no language.lora (or encoder.lora, fusion.lora)": (
                self.lora is not None and not adapted
            ),
            "lora: when: media is for language.lora, which train does not name; leave it out": (
                self.lora is not None and self.lora.when == "media" and (None, "language") not in adapted
            ),
            "cooldown is for schedule: wsd; leave it out": self.cooldown is not None and self.schedule != "wsd",
            "betas are AdamW's, and adafactor has none; leave them out": (
                self.optimizer == "adafactor" and self.betas != type(self).model_fields["betas"].default
            ),
            "give steps or epochs, not both": self.steps is not None and self.epochs is not None,
            f"compile fuses what kernels: {self.kernels} brings; keep one of them": bool(self.compile and self.kernels),
            f"batch_size {self.batch_size} cannot be split into {self.accumulate} equal parts; change accumulate": (
                self.batch_size % self.accumulate != 0
            ),
        }
        if reason := next(
            (reason for reason, wrong in found.items() if wrong), self._cannot_mix() or self._cannot_stream()
        ):
            raise ValueError(reason)
        return self

    def _cannot_mix(self) -> str | None:
        """Why the stage's sources cannot be mixed as it says, if they cannot."""
        weighted = [spec.weight is not None for spec in self.data]
        if not any(weighted) and self.mixing is None:
            return None
        if len(self.data) == 1:
            return "data: weight and mixing are for several entries; here is one, leave them out"
        if any(weighted) and self.mixing is not None:
            return "mixing: the entries have weights, which say their shares already; leave one of the two out"
        if any(weighted) and not all(weighted):
            return (
                f"data: {self.data[weighted.index(False)].path} has no weight, {self.data[weighted.index(True)].path} "
                f"has one; give each entry a weight, or none"
            )
        if (repeated := next((s.path for s in self.data if s.repeat != 1), None)) is not None:
            return f"data: {repeated} has a repeat, and weight or mixing says how often it comes up; leave one out"
        if self.mixing is not None and any(spec.streaming for spec in self.data):
            return "mixing: how large streamed data are is not known; give each entry a weight"
        return None

    def _cannot_stream(self) -> str | None:
        """What of the stage does not go with streamed data, if anything is streamed."""
        if not any(spec.streaming for spec in self.data):
            return None
        if (indexed := next((s.path for s in self.data if not s.streaming), None)) is not None:
            return (
                f"data: some entries are streamed, {indexed} is not; write streaming: true for it, too (files here can "
                f"be streamed), or give it a stage of its own"
            )
        if self.validate is not None and self.validate.split is not None:
            return "validate: a stream's pictures are not known beforehand; name held-out data instead of a split"
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


def without_tower(part: str) -> tuple[str | None, str]:
    """`"image.encoder"` → `("image", "encoder")`; a part of no tower as it is."""
    tower, dot, inner = part.partition(".")
    return (tower, inner) if dot and tower in ("image", "audio", "text") else (None, part)
