"""Models that are saved whole after each stage: small enough to need no references to their bases."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from opticnerve.types import OpticNerveError

BASES = "bases.json"


def save_whole(model: Any, processor: Any, folder: Path, bases: dict[str, Any], trained: Iterable[str]) -> None:
    """A folder that `from_pretrained` loads, and in bases.json what the model was made of and what trained."""
    import transformers

    from opticnerve.common.version import __version__

    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    reference = {
        "opticnerve": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "bases": bases, "trained": sorted(trained),
    }  # fmt: skip
    (folder / BASES).write_text(json.dumps(reference, indent=1) + "\n", encoding="utf-8")


def load_whole(model: Any, folder: Path) -> set[str]:
    """Put the weights of such a folder into a model of the same parts; returns the names of what had trained.

    Raises:
        OpticNerveError: the folder is broken, or belongs to other parts.
    """
    try:
        trained = set(json.loads((folder / BASES).read_text(encoding="utf-8"))["trained"])
        state: dict[str, Any] = {}
        for file in sorted(folder.glob("model*.safetensors")):
            state |= load_file(file)
        model.load_state_dict(state)
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        raise OpticNerveError(f"{folder} does not hold this model: {e}") from e
    return trained
