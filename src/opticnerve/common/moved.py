"""Modules under the paths that they had before 0.2, for one version: the import works, and says where they are now."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Those that the documents named, and those that others' code is likeliest to import; where a module came apart, the
# modules that its names are in now.
MOVED = {
    f"opticnerve.{old}": [f"opticnerve.{n}" for n in new.split()]
    for old, new in {
        "build": "models.vlm.build",
        "build_classifier": "models.classifier.build",
        "build_dual": "models.dual_encoder.build",
        "data.audio": "data.media.audio",
        "data.images": "data.media.open data.media.images data.media.files types",
        "data.labels": "data.encode.tokenize",
        "data.packing": "data.encode.packing",
        "data.readers": "data.dataset.read",
        "data.readers.read": "data.dataset.read",
        "data.source": "data.dataset.load",
        "data.transform": "data.media.transform",
        "data.video": "data.media.video",
        "durable": "common.atomic",
        "encoders.dual_eye": "encoders.nested",
        "encoders.pair": "encoders.nested",
        "fusion.splice": "fusion.base",
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
        package = any(old.startswith(f"{name}.") for old in MOVED)
        return ModuleSpec(name, self, is_package=package) if name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old, new = module.__name__, MOVED[module.__name__]
        warnings.warn(f"{old} is {' and '.join(new)} now; import it from there", DeprecationWarning, stacklevel=2)
        found = [importlib.import_module(name) for name in new]
        if len(found) == 1 and not hasattr(module, "__path__"):
            sys.modules[old] = found[0]
            return
        for part in reversed(found):
            vars(module).update({k: v for k, v in vars(part).items() if not k.startswith("_")})


def install() -> None:
    """Let the old paths be found, once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
