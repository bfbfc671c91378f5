"""Tiny docked models on disk, ready to be exported."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from opticnerve.build import dock
from opticnerve.export import probe
from opticnerve.language.chat_template import CHATML


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks run here, without a process of their own: for tests of what is compared, not of where."""

    def run(check: str, job: dict[str, Any], scratch: Path, **_: Any) -> dict[str, Any]:
        spec = importlib.util.spec_from_file_location(f"checks_{check}", probe.CHECKS / f"{check}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if hasattr(module, "Barrier"):
            monkeypatch.setattr(module, "Barrier", lambda: sys.meta_path[0])
        path = list(sys.meta_path)
        module.main(job, scratch / "answer.json")
        sys.meta_path[:] = path
        return probe.read(scratch)

    monkeypatch.setattr(probe, "run", run)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Language family, eye and options → a stage's folder whose connector is calibrated and whose adapter, if any,
    matters."""
    root = tmp_path_factory.mktemp("docks")
    made: dict[str, Path] = {}

    def make(
        family: str = "llama", eye: str = "clip_vision_model", *, connector: Any = "mlp", lora: Any = None,
        dtype: torch.dtype = torch.float32, fusion: Any = "splice", tiling: Any = None, kind: str = "byte-level", **vision: Any,
    ) -> Path:  # fmt: skip
        key = repr((family, eye, connector, lora, dtype, fusion, tiling, kind, vision))
        if key in made:
            return made[key]
        language, seen = root / f"{family}-{kind}", root / eye
        if not language.exists():
            tiny.save_language(language, family, kind=kind, chat_template=CHATML)
        if not seen.exists():
            tiny.save_vision(seen, eye)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OPTICNERVE_CACHE", str(root / "cache"))
            one = dock({"type": "hf_vision", "name": str(seen), **vision}, connector, str(language), fusion=fusion,
                       tiling=tiling, dtype=dtype)  # fmt: skip
            torch.manual_seed(4)
            with torch.no_grad():
                part = one.model.image.connector
                for parameter in part.parameters():
                    parameter.mul_(5)
                part.input_mean.normal_()
                part.input_std.uniform_(0.5, 2)
                part.output_scale.fill_(0.7)
                part.calibrated.fill_(True)
                if lora:
                    one.lora = lora
                    one.model.give_lora(lora)
                    for name, parameter in one.model.named_parameters():
                        if "lora_B" in name:
                            parameter.normal_(std=0.05)
            folder = root / f"run-{len(made)}"
            one.save(folder, [n for n, _ in one.model.named_parameters() if ".lora_" in n])
        made[key] = folder
        return folder

    return make
