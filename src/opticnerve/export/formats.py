"""What every format promises, and the formats by their exact names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from opticnerve.export.parity import Reference
from opticnerve.export.samples import Sample
from opticnerve.registry import Registry


@dataclass(frozen=True)
class Options:
    """What the user may choose: `dtype` of the weights on disk ("auto": as the model has them), the interpreter that
    has the engine, whether to do without a check, and whether parts by dotted path may run."""

    dtype: str = "auto"
    check_python: str | None = None
    unchecked: bool = False
    trust_remote_code: bool = False


PLAIN = Options()


@dataclass
class Proof:
    """What the engine's answer was worth: its largest distance from ours, what is allowed, and in what unit."""

    engine: str
    difference: float
    allowed: float
    unit: str
    samples: int
    notes: list[str] = field(default_factory=list)


class Format(ABC):
    """One format of another engine (or our own folder).

    `dtypes` are those that weights can be written in beside "auto". `needs` says what to install where the engine does
    not come with opticnerve; None where it does.
    """

    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")
    needs: ClassVar[str | None] = None

    def __init__(self, options: Options) -> None:
        self.options = options

    @abstractmethod
    def refuse(self, model: Any, processor: Any) -> list[str]:
        """What of this model the format cannot express: each reason with the nearest recipe that it can."""

    @abstractmethod
    def simplify(self, model: Any, processor: Any) -> None:
        """Fold what the format has no place for into plain weights, in place (see `export.simplify`)."""

    @abstractmethod
    def write(self, model: Any, processor: Any, folder: Path) -> list[str]:
        """Write the format's files; returns what the user should know."""

    @abstractmethod
    def check(
        self, folder: Path, model: Any, processor: Any, samples: Sequence[Sample], wanted: Sequence[Reference],
        scratch: Path,
    ) -> Proof:  # fmt: skip
        """The engine's answers to the samples, in a process of its own, against ours.

        Raises:
            OpticNerveError: it does not run, or differs.
        """

    def picture_sizes(self, model: Any) -> list[tuple[int, int]]:
        """Widths and heights of the samples' pictures."""
        return [(320, 240), (97, 333), (224, 224)]

    def choose(self, samples: Sequence[Sample]) -> list[Sample]:
        """Those of the samples that the engine can answer."""
        return list(samples)


formats: Registry[Format] = Registry(
    "format",
    group="opticnerve.formats",
    builtin={
        "hf-llava": "opticnerve.export.hf.llava:HFLlava",
        "hf-idefics3": "opticnerve.export.hf.idefics3:HFIdefics3",
        "hf-blip2": "opticnerve.export.hf.blip2:HFBlip2",
        "merged": "opticnerve.export.merged:Merged",
        "gguf": "opticnerve.export.gguf.format:Gguf",
    },
)
