"""`merged`: opticnerve's own folder, self-contained: all weights, configuration and processor in one place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opticnerve.export import parity, probe
from opticnerve.export.formats import Format, Proof
from opticnerve.export.parity import Reference
from opticnerve.export.samples import Sample
from opticnerve.models.vlm.build import is_gated, merge_adapter


class Merged(Format):
    """Everything opticnerve has can stand in it: nothing is refused."""

    def refuse(self, model: Any, processor: Any) -> list[str]:
        return []

    def simplify(self, model: Any, processor: Any) -> None:
        merge_adapter(model)

    def write(self, model: Any, processor: Any, folder: Path) -> list[str]:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        gated = "the adapter works beside pictures alone (lora.when: media); it goes along as it is, not added in"
        return [gated] if is_gated(model) else []

    def check(
        self, folder: Path, model: Any, processor: Any, samples: Sequence[Sample], wanted: Sequence[Reference],
        scratch: Path,
    ) -> Proof:  # fmt: skip
        job = {
            "folder": str(folder), "pictures": str(scratch), "trust_remote_code": self.options.trust_remote_code,
            "picture_sizes": self.picture_sizes(None),
        }  # fmt: skip
        said = probe.run("own_folder", job, scratch)
        difference = parity.compare_logits(wanted, probe.samples_of(said), said["engine"])
        return Proof(said["engine"], difference, parity.TOLERANCE, "of the largest logit", len(samples))
