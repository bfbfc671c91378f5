"""opticnerve: dock any pretrained vision encoder onto any pretrained language model.

Importing this package registers its classes with transformers' Auto classes. The command line alone puts that off, so
that `opticnerve --help` answers at once (see `opticnerve_launch`).
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from opticnerve.common import moved
from opticnerve.common.version import __version__

_LAZY = {
    "dock": "opticnerve.models.vlm.build",
    "Dock": "opticnerve.models.vlm.build",
    "Recipe": "opticnerve.recipe",
    "Conversation": "opticnerve.types",
    "ask": "opticnerve.types",
    "Features": "opticnerve.types",
    "OpticNerveError": "opticnerve.types",
    "OpticNerveConfig": "opticnerve.models",
    "OpticNerveProcessor": "opticnerve.models",
    "OpticNerveForConditionalGeneration": "opticnerve.models",
}
__all__ = ["__version__", *_LAZY]

if TYPE_CHECKING:
    from opticnerve.models import OpticNerveConfig, OpticNerveForConditionalGeneration, OpticNerveProcessor
    from opticnerve.models.vlm.build import Dock, dock
    from opticnerve.recipe import Recipe
    from opticnerve.types import Conversation, Features, OpticNerveError, ask


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'opticnerve' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


moved.install()
if "opticnerve_launch" not in sys.modules:
    importlib.import_module("opticnerve.models")
