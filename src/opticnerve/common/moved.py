"""Modules under the paths that they had before 0.2, for one version: the import works, and says where they are now."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Those that the documents named, and those of classes that others import.
MOVED = {
    f"opticnerve.{old}": f"opticnerve.{new}"
    for old, new in {
        "build": "models.vlm.build",
        "build_classifier": "models.classifier.build",
        "build_dual": "models.dual_encoder.build",
        "data.labels": "data.encode.tokenize",
        "data.packing": "data.encode.packing",
        "data.readers.read": "data.dataset.read",
        "durable": "common.atomic",
        "encoders.dual_eye": "encoders.nested",
        "hub": "common.hub",
        "models.configuration": "models.vlm.configuration",
        "models.delta": "models.checkpoint.delta",
        "models.fusion_classifier": "models.classifier.modeling",
        "models.late_fusion": "inference.predictors",
        "models.modeling": "models.vlm.modeling",
        "models.processing": "models.vlm.processing",
        "models.prompt": "models.vlm.prompt",
        "models.tower": "models.vlm.tower",
        "private_names": "common.private_names",
        "recipe_schema": "recipe.schema",
        "train.freeze": "models.freeze",
        "train.visits": "train.sampler",
    }.items()
}


class _Finder(MetaPathFinder, Loader):
    """Asked last, after every folder that Python looks into."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # `opticnerve.data.readers` is there only to be passed through.
        package = any(old.startswith(f"{name}.") for old in MOVED)
        return ModuleSpec(name, self, is_package=package) if package or name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        if (new := MOVED.get(module.__name__)) is not None:
            warnings.warn(f"{module.__name__} is {new} now; import it from there", DeprecationWarning, stacklevel=2)
            sys.modules[module.__name__] = importlib.import_module(new)


def install() -> None:
    """Let the old paths be found, once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
