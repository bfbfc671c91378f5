"""What stands beside a checkpoint's weights: its config.json and other small files, from a folder or the hub.

What cannot be read is an `OpticNerveError` in one sentence, wherever it is asked for: `plan`, `dock`, `train`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from opticnerve import hub
from opticnerve.types import OpticNerveError

# In as many ways do transformers and its parts say that a file is missing, damaged, or of a kind they do not know.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, StrictDataclassError)
REMEDY = "give a local folder or a hub name in reach"


def read_config(name: str) -> Any:
    """transformers' configuration of a folder or hub model.

    Raises:
        OpticNerveError: nothing there, the hub is not reached, or no configuration that transformers knows.
    """
    try:
        # Configurations hold tensors here and there, and are read even where `plan` builds on the meta device.
        with torch.device("cpu"), hub.quiet():
            folder = hub.fetch(name, weights=False)
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)  # an error, not a question
    except OpticNerveError:
        raise
    except UNREADABLE as e:
        raise unreadable(f"the configuration of {name!r}", e, REMEDY) from e


def find_file(name: str, file: str) -> Path | None:
    """A small file of a folder or hub model; None where the model has none of that name.

    Raises:
        OpticNerveError: whether it has one cannot be told: the hub is not reached, or refuses.
    """
    path = Path(hub.fetch(name, weights=False)) / file
    return path if path.is_file() else None


def says_how(name: str, part: str) -> bool:
    """Whether a checkpoint says how media are prepared: in a file of its own, or as `part` ("image_processor",
    "feature_extractor") of a processor that was written as one file."""
    if find_file(name, "preprocessor_config.json"):
        return True
    file = find_file(name, "processor_config.json")
    return file is not None and f'"{part}"' in file.read_text(encoding="utf-8", errors="replace")


def unreadable(what: str, error: BaseException, remedy: str) -> OpticNerveError:
    """One sentence about a file that could not be read: what the library says, cut short, and what to do."""
    said = " ".join(str(error).split()) or type(error).__name__
    said = said if len(said) <= 240 else f"{said[:240]}…"
    return OpticNerveError(f"cannot read {what}: {said.rstrip('.')}; {remedy}")
