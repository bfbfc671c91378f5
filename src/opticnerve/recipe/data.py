"""The keys of a data entry: where samples come from, and how records become conversations."""

from __future__ import annotations

import os
import re
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from opticnerve import registry
from opticnerve.recipe.model import Positive, Strict


class BoxSpec(Strict):
    """How boxes and points of records are written where their words have `<bbox>` or `<objects>`."""

    style: Literal["plain", "qwen", "internvl"] = "plain"
    frame: Literal["thousandths", "pixels"] = Field(
        "thousandths", description="of the whole picture's sides, or pixels of its file"
    )


class FrameSpec(Strict):
    """Frames of a video in time; see `opticnerve.data.media.video`."""

    fps: Annotated[float, Field(gt=0, le=1000)] = Field(description="frames a second, at equal distances in time")
    max: Annotated[int, Field(gt=0, le=1024)] = Field(32, description="at most so many of a video")
    timestamps: bool = Field(True, description="write before each frame when it is shown: <2.5 seconds>")
    pool: Positive = Field(1, description="side of the squares of a frame's soft tokens that become their mean")


class DataSpec(Strict):
    """One source of conversations.

    `share_prefix`: questions about one picture are trained side by side behind one copy of it, each blind to the
    others; `per_image` of them are drawn at a time.
    """

    path: str
    format: str = "auto"
    media: str | None = None
    columns: dict[str, str | list[str]] = Field({}, description="a format's field: the data's, or a template of them")
    roles: dict[str, Literal["user", "assistant", "system", "tool"]] = Field(
        {}, description="a speaker of the data: its role"
    )
    annotations: str | None = Field(None, description="a second file, which has the answers to the first's questions")
    media_cache: str | None = Field(None, description="a folder to fetch media on the web into; without it, none are")
    allow_private_hosts: bool = Field(False, description="media_cache: fetch from hosts within this network, too")
    where: str | None = Field(None, description="a condition on the data's fields; what does not meet it is left out")
    boxes: BoxSpec | None = Field(None, description="how the `objects` of records are written into their words")
    prompt: str | list[str] | None = None
    limit: Positive | None = None
    repeat: Positive = 1
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="its share of the stage's samples, beside the other entries' weights"
    )
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
    frames: Positive | FrameSpec = Field(8, description="pictures taken of a video, at equal distances; or in time")
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
        if format not in (known := registry.known_formats()):
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
        if self.allow_private_hosts and self.media_cache is None:
            raise ValueError("allow_private_hosts says from where media_cache is filled; name a media_cache, too")
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
