"""Where a model is, by whatever name it goes: a run, a stage of it, a self-contained folder, peft's adapter on one, a
hub name, "starter"; and what a recipe needs to go on from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from opticnerve.common import hub
from opticnerve.common.cache import fingerprint, weight_files
from opticnerve.models.checkpoint.strict import wrap_errors
from opticnerve.models.vlm.configuration import OpticNerveConfig
from opticnerve.starter.demo import SHIPPED, shipped_model
from opticnerve.types import OpticNerveError

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SMALL = ("config.json", "dock.json")  # beside the weights, what makes a model another one


def resolve(name: str, *, weights: bool = True) -> str:
    """The folder that a model's name stands for; one of a hub is fetched first, its weights where they are wanted."""
    if name in SHIPPED:
        return str(shipped_model(name))
    path = Path(name)
    if path.is_dir():
        if (path / "config.json").is_file():
            return name
        stages = sorted(p.parent for p in path.glob("stages/*/dock.json"))
        if stages:
            return str(stages[-1])
        if (path / ADAPTER).is_file():
            raise OpticNerveError(
                f"{name} is an adapter of peft without its model ({ADAPTER}, no config.json). On a dock, train on with "
                f"it by a recipe's `model: {{from: {name}}}`, or merge it by peft's merge_and_unload(); on a language "
                "model alone, merge it so, save that, and name the folder as the recipe's language",
                kind="unsupported",
            )
        raise OpticNerveError(
            f"{name} holds no model (no config.json); a run has one once its first stage has ended", kind="missing-file"
        )
    return hub.fetch(name, weights=weights)


@dataclass(frozen=True)
class ModelSource:
    """A docked model to go on from: `name` as it was written, its folder, and peft's adapter on it, if there is one."""

    name: str
    folder: str
    adapter: str | None = None

    @classmethod
    def find(cls, name: str, *, weights: bool = True) -> ModelSource:
        """`weights`: bring a hub's, too.

        Raises:
            OpticNerveError: there is no such model, or it is no docked language model.
        """
        folder, adapter = name, None
        if name not in SHIPPED:
            here = Path(name) if Path(name).is_dir() else Path(hub.fetch(name, weights=False))
            if (here / ADAPTER).is_file() and not (here / "config.json").is_file():
                adapter = str(here)
                folder = _base_of(name, here)
                if weights:
                    hub.fetch_file(name, ADAPTER_WEIGHTS)
        try:
            folder = resolve(folder, weights=weights)
        except OpticNerveError as e:
            raise e if adapter is None else e.under(f"{name} is peft's adapter on {folder!r}") from e
        with wrap_errors("config.json", folder):
            kind = str(OpticNerveConfig.get_config_dict(folder)[0].get("model_type"))
        if kind != OpticNerveConfig.model_type:
            on = f" is peft's adapter on {folder}, which" if adapter else ""
            raise OpticNerveError(
                f"from: {name}{on} holds a {kind[:80]}, no docked language model; `opticnerve import` makes one of a "
                "LLaVA's or BLIP-2's kind, and `language:` takes a language model to dock onto",
                kind="unsupported",
            )
        return cls(name, folder, adapter)

    @property
    def config(self) -> OpticNerveConfig:
        """The configuration in its folder."""
        with wrap_errors("config.json", self.folder):
            found: OpticNerveConfig = OpticNerveConfig.from_pretrained(self.folder)
        return found

    def sha256(self, pinned: str | None = None) -> str:
        """Of the files that make the model what it is: weights, configuration, references to bases, the adapter.

        Raises:
            OpticNerveError: it is not the `pinned` one.
        """
        here = Path(self.folder)
        files = [*weight_files(here), *(str(here / f) for f in _SMALL if (here / f).is_file())]
        if self.adapter is not None:
            files += [str(Path(self.adapter) / f) for f in (ADAPTER, ADAPTER_WEIGHTS)]
        return check_pinned(self.name, fingerprint(files), pinned)

    def load(self, cls: Any, *, dtype: torch.dtype | str, trust_remote_code: bool = False) -> Any:
        """The model of class `cls`, with peft's adapter added into its weights.

        Raises:
            OpticNerveError: the folder is broken, or its adapter is of a kind that cannot be added.
        """
        model = cls.from_pretrained(self.folder, dtype=dtype, trust_remote_code=trust_remote_code)
        if self.adapter is None:
            return model
        with wrap_errors("the adapter", self.adapter):
            on_it: Any = PeftModel.from_pretrained(model, self.adapter)
            if not hasattr(on_it.base_model, "merge_and_unload"):
                raise OpticNerveError(
                    f"{self.name} is an adapter of kind {on_it.peft_config['default'].peft_type}, which cannot be "
                    "added into the weights of its model; go on with it in peft",
                    kind="unsupported",
                )
            merged = on_it.base_model.merge_and_unload(safe_merge=True, adapter_names=["default"])
        return merged.eval()


def check_pinned(name: str, found: str, pinned: str | None) -> str:
    """`found` again.

    Raises:
        OpticNerveError: something else was pinned.
    """
    if pinned is not None and found != pinned:
        raise OpticNerveError(
            f"from: {name} is not what the run began with: its SHA-256 was {pinned[:16]}…, found is {found[:16]}…; "
            "bring it back as it was, or begin another run",
            kind="mismatch",
        )
    return found


def _base_of(name: str, adapter: Path) -> str:
    """What peft's adapter says it stands on."""
    try:
        base = json.loads((adapter / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as e:
        raise OpticNerveError(f"{adapter / ADAPTER} is damaged: {e}", kind="damaged") from e
    if not isinstance(base, str) or not base:
        raise OpticNerveError(
            f"{name}: {ADAPTER} names no model that the adapter stands on; write its folder there, as "
            "base_model_name_or_path",
            kind="missing-field",
        )
    return base
