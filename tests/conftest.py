"""What all tests share: tiny models on disk, made once a session."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if sys.dont_write_bytecode:
    # Each program that a test starts would compile torch and transformers again, for longer than it then runs.
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(Path(sys.prefix, "bytecode"))
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers have the cores between them, and the models are tiny

import torch

import tiny
from opticnerve.language.chat_template import CHATML
from opticnerve.models.vlm.build import Dock, dock

torch.set_warn_always(True)  # not once a process: which test meets a warning is no matter of their order


@pytest.fixture(scope="session")
def language_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """(family, kind of tokenizer) → folder of a tiny language model that speaks ChatML."""
    made: dict[tuple[str, str], str] = {}

    def make(family: str = "llama", kind: str = "byte-level") -> str:
        if (family, kind) not in made:
            folder = tmp_path_factory.mktemp(f"language-{family.replace(' ', '-')}")
            made[family, kind] = tiny.save_language(folder, family, kind=kind, chat_template=CHATML)
        return made[family, kind]

    return make


@pytest.fixture(scope="session")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Family → folder of a tiny vision transformer."""
    made: dict[str, str] = {}

    def make(family: str = "clip_vision_model") -> str:
        if family not in made:
            made[family] = tiny.save_vision(tmp_path_factory.mktemp(family), family)
        return made[family]

    return make


@pytest.fixture(scope="session")
def timm_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Architecture → `local-dir:…` name of a tiny timm model."""
    made: dict[str, str] = {}

    def make(name: str = "test_efficientnet") -> str:
        if name not in made:
            made[name] = tiny.save_timm(tmp_path_factory.mktemp(name) / "model", name)
        return made[name]

    return make


@pytest.fixture(scope="module")
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """opticnerve's cache in a folder of this test module, not in the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("OPTICNERVE_CACHE", str(folder))
        yield folder


@pytest.fixture
def docked(
    language_folder: Callable[..., str], vision_folder: Callable[..., str], private_cache: Path
) -> Callable[..., Dock]:
    """(language family, vision family or specification) → a fresh dock of tiny parts."""

    def make(family: str = "llama", vision: Any = "clip_vision_model", **options: Any) -> Dock:
        if isinstance(vision, str):
            vision = {"type": "hf_vision", "name": vision_folder(vision)}
        connector = options.pop("connector", "mlp")
        return dock(vision, connector, language_folder(family), **options)

    return make


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny BERT and its tokenizer."""
    return tiny.save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def whisper_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny Whisper."""
    return tiny.save_whisper(tmp_path_factory.mktemp("whisper"))
