"""Parts are found by exact name; third parties add theirs by entry point or by dotted path, touching no file of
ours."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from opticnerve.types import OpticNerveError

T = TypeVar("T")


def hint_at(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, if something known is spelt almost so."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


class Registry(Generic[T]):
    """A family of parts under exact names.

    `kind` names one part ("encoder"); `group` is the entry-point group in which installed packages announce theirs
    (`[project.entry-points."opticnerve.encoders"]`). `builtin` maps a name to `"module:Class"`, imported on first use.
    """

    def __init__(self, kind: str, *, group: str, builtin: dict[str, str]) -> None:
        self.kind, self.group = kind, group
        self._targets: dict[str, str | type[T]] = dict(builtin)
        self._entry_points_read = False

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: register a part from a user's own code."""

        def add(cls: type[T]) -> type[T]:
            if name in self.names():
                raise OpticNerveError(
                    f"the {self.kind} {name!r} is registered already; choose another name", kind="exists-already"
                )
            self._targets[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        """Every known name, sorted; entry points of installed packages included."""
        if not self._entry_points_read:
            self._entry_points_read = True
            for ep in entry_points(group=self.group):
                self._targets.setdefault(ep.name, ep.value)
        return sorted(self._targets)

    def get(self, name: str, *, allow_dotted: bool = True) -> type[T]:
        """The class under `name`, or at the dotted path `package.module:Class`.

        Raises:
            OpticNerveError: the name is unknown (the message lists the known ones), or a dotted path is not allowed
            here.
        """
        if name not in self.names():
            if ":" in name and allow_dotted:
                return _import(name, self.kind)
            if ":" in name:
                raise OpticNerveError(
                    f"{self.kind} {name!r} is code from outside opticnerve; pass trust_remote_code=True to run it",
                    kind="remote-code",
                )
            raise OpticNerveError(f"{self.unknown(name)}; or a dotted path 'package.module:Class'", kind="unknown-name")
        target = self._targets[name]
        return _import(target, self.kind) if isinstance(target, str) else target

    def unknown(self, name: str) -> str:
        """That there is no such part, and which there are."""
        return f"unknown {self.kind} {name!r}{hint_at(name, self.names())} Known: {', '.join(self.names())}"

    def points_to(self, name: str, cls: type) -> bool:
        """Whether `name` stands for `cls`; nothing is imported to find out."""
        target = self._targets[name]
        return target is cls or target == f"{cls.__module__}:{cls.__qualname__}"

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())


def _import(path: str, kind: str) -> type[Any]:
    module, _, attribute = path.partition(":")
    try:
        found: type[Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise OpticNerveError(f"cannot import the {kind} {path!r}: {e}", kind="not-installed") from e
    return found


encoders: Registry[Any] = Registry(
    "encoder",
    group="opticnerve.encoders",
    builtin={
        "hf_vision": "opticnerve.encoders.hf_vision:HFVisionEncoder",
        "timm": "opticnerve.encoders.timm:TimmEncoder",
        "pair": "opticnerve.encoders.nested:PairEncoder",
        "patches": "opticnerve.encoders.patches:PatchesEncoder",
        "qwen_vl": "opticnerve.encoders.qwen_vl:QwenVLEncoder",
        "whisper": "opticnerve.encoders.whisper:WhisperEncoder",
        "dual_encoder": "opticnerve.encoders.nested:DualEncoderVision",
    },
)
connectors: Registry[Any] = Registry(
    "connector",
    group="opticnerve.connectors",
    builtin={
        "linear": "opticnerve.connectors.mlp:LinearConnector",
        "mlp": "opticnerve.connectors.mlp:MLPConnector",
        "pixel_shuffle": "opticnerve.connectors.mlp:PixelShuffleConnector",
        "qformer": "opticnerve.connectors.qformer:QFormerConnector",
        "resampler": "opticnerve.connectors.resampler:ResamplerConnector",
        "abstractor": "opticnerve.connectors.abstractor:AbstractorConnector",
        "text_spotter": "opticnerve.connectors.text_spotter:TextSpotterConnector",
    },
)
fusions: Registry[Any] = Registry(
    "fusion",
    group="opticnerve.fusions",
    builtin={
        "splice": "opticnerve.fusion.base:Splice",
        "cross_attention": "opticnerve.fusion.gated_cross_attention:GatedCrossAttention",
    },
)
objectives: Registry[Any] = Registry(
    "objective",
    group="opticnerve.objectives",
    builtin={
        "next_token": "opticnerve.objectives.next_token:NextToken",
        "dpo": "opticnerve.objectives.dpo:DPO",
        "contrastive": "opticnerve.objectives.contrastive:Contrastive",
        "classification": "opticnerve.objectives.next_token:Classification",
        "qformer_pretraining": "opticnerve.objectives.qformer_pretraining:QFormerPretraining",
        "text_spotting": "opticnerve.objectives.text_spotting:TextSpotting",
    },
)
data_formats: Registry[Any] = Registry(
    "data format",
    group="opticnerve.data_formats",
    builtin={
        "captions": "opticnerve.data.formats.questions:Captions",
        "vqa": "opticnerve.data.formats.questions:Questions",
        "llava": "opticnerve.data.formats.dialogs:Llava",
        "chat": "opticnerve.data.formats.dialogs:Chat",
        "texts": "opticnerve.data.formats.dialogs:Texts",
        "instruction": "opticnerve.data.formats.dialogs:Instruction",
        "completion": "opticnerve.data.formats.dialogs:PromptCompletion",
        "preference": "opticnerve.data.formats.preferences:Preference",
    },
)


def known_formats() -> tuple[str, ...]:
    """What `format` of a data entry may say."""
    return ("auto", *data_formats, "hf", "webdataset")
