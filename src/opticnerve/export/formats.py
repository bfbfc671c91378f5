"""What every format promises, the formats by their exact names, and opticnerve's own folder (`merged`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from opticnerve.export import parity
from opticnerve.export.parity import Reference
from opticnerve.export.samples import ExportSample
from opticnerve.models.vlm.build import is_gated
from opticnerve.registry import Registry

if TYPE_CHECKING:
    from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
    from opticnerve.models.vlm.processing import OpticNerveProcessor


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


@dataclass(frozen=True)
class Trial:
    """What an engine is held to: the model, the samples, what the model says to them, and a folder for the job."""

    model: Any
    processor: Any
    samples: Sequence[ExportSample]
    wanted: Sequence[Reference]
    scratch: Path


class Format(ABC):
    """One format of another engine (or our own folder).

    `dtypes` are those that weights can be written in beside "auto". `needs` says what to install where the engine does
    not come with opticnerve; None where it does. `program`: the one of `checks/` that runs the engine.
    """

    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")
    needs: ClassVar[str | None] = None
    program: ClassVar[str]

    def __init__(self, options: Options) -> None:
        self.options = options

    @abstractmethod
    def refuse(self, model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor) -> list[str]:
        """What of this model the format cannot express: each reason with the nearest recipe that it can."""

    def simplify(self, model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor) -> None:
        """Fold what the format has no place for into plain weights, in place (see `export.simplify`)."""
        model.merge_adapters()

    @abstractmethod
    def write(
        self, model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor, folder: Path
    ) -> list[str]:
        """Write the format's files; returns what the user should know."""

    @abstractmethod
    def job(self, folder: Path, trial: Trial) -> dict[str, Any]:
        """What `program` is told; plain JSON."""

    def check(self, folder: Path, trial: Trial) -> Proof:
        """The engine's answers to the samples, in a process of its own, against ours; an error where it does not run,
        or differs."""
        said = parity.run(self.program, self.job(folder, trial), trial.scratch)
        parity.check_loaded(said)
        found = parity.samples_of(said)
        for sample in found:
            if sample["pixels"] is not None:
                sample["pixels"] = self.pixels(sample["pixels"], sample["sizes"])
        difference = parity.compare_logits(trial.wanted, found, said["engine"])
        return Proof(said["engine"], difference, parity.TOLERANCE, "of the largest logit", len(trial.samples))

    def pixels(self, theirs: Tensor, sizes: Tensor | None) -> Tensor:
        """The engine's pixels in our shape. `sizes` (images, 2): height and width of each within them, where it says
        so."""
        return theirs

    def picture_sizes(self, model: OpticNerveForConditionalGeneration | None) -> list[tuple[int, int]]:
        """Widths and heights of the samples' pictures."""
        return [(320, 240), (97, 333), (224, 224)]

    def choose(self, samples: Sequence[ExportSample]) -> list[ExportSample]:
        """Those of the samples that the engine can answer."""
        return list(samples)


class Merged(Format):
    """All weights, configuration and processor in one folder of opticnerve's own: nothing is refused."""

    program = "own_folder"

    def refuse(self, model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor) -> list[str]:
        return []

    def write(
        self, model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor, folder: Path
    ) -> list[str]:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        gated = "the adapter works beside pictures alone (lora.when: media); it goes along as it is, not added in"
        return [gated] if is_gated(model) else []

    def job(self, folder: Path, trial: Trial) -> dict[str, Any]:
        return {
            "folder": str(folder), "pictures": str(trial.scratch), "picture_sizes": self.picture_sizes(None),
            "trust_remote_code": self.options.trust_remote_code,
        }  # fmt: skip


formats: Registry[Format] = Registry(
    "format",
    group="opticnerve.formats",
    builtin={
        "hf-llava": "opticnerve.export.hf.llava:HFLlava",
        "hf-llava-next": "opticnerve.export.hf.llava_next:HFLlavaNext",
        "hf-idefics3": "opticnerve.export.hf.idefics3:HFIdefics3",
        "hf-blip2": "opticnerve.export.hf.blip2:HFBlip2",
        "merged": "opticnerve.export.formats:Merged",
        "peft": "opticnerve.export.adapter:PeftAdapter",
        "gguf": "opticnerve.export.gguf.format:Gguf",
    },
)
