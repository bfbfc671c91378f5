"""Two tiny random models on disk, a page that offers them, and a browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browsing import chromium, page_at

import tiny
from opticnerve.models.vlm.build import dock
from opticnerve.ui.limits import Limits
from opticnerve.ui.models import Models

LIMITS = Limits(upload_bytes=300_000, pixels=90_000, question_characters=200, answer_tokens=60)


@pytest.fixture(scope="session")
def two_models(vision_folder: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Folders of two models with the same vision encoder and different language models."""
    from opticnerve.language.chat_template import CHATML

    folders = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTICNERVE_CACHE", str(tmp_path_factory.mktemp("cache")))
        for seed in (6, 15):  # of those whose answers are several words
            language = tiny.save_language(tmp_path_factory.mktemp("language"), "llama", seed=seed, chat_template=CHATML)
            made = dock({"type": "hf_vision", "name": vision_folder()}, "mlp", language)
            with torch.no_grad():  # so that answers depend on what is seen
                for parameter in made.model.image.connector.parameters():
                    parameter.mul_(5)
            folder = tmp_path_factory.mktemp("model") / f"tiny-{seed}"
            made.model.save_pretrained(folder)
            made.processor.save_pretrained(folder)
            folders.append(str(folder))
    return folders


@pytest.fixture(scope="session")
def ui_url(two_models: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("gradio")
    runs = tmp_path_factory.mktemp("runs")
    with page_at(Models(two_models, runs=runs), runs, LIMITS) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One for each file: while Playwright's is open, no other test of this thread can run an event loop."""
    with chromium() as found:
        yield found


@pytest.fixture(scope="session")
def picture_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    tiny.picture(0, 80).save(path)
    return path
