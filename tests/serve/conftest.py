"""One live server for the session: a tiny random model with a vision encoder and an audio encoder, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from served import Live, serving

from opticnerve.inference.generate import Answerer
from opticnerve.models.vlm.build import Dock, dock
from opticnerve.types import Conversation, ask


@pytest.fixture(scope="session")
def make_dock(
    language_folder: Callable[..., str], vision_folder: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Dock]]:
    """A dock whose answers depend on what it sees and hears."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTICNERVE_CACHE", str(tmp_path_factory.mktemp("cache")))

        def make(family: str = "llama", **options: Any) -> Dock:
            vision = {"type": "hf_vision", "name": vision_folder("clip_vision_model")}
            made = dock(vision, "mlp", language_folder(family), **options)
            with torch.no_grad():
                for tower in made.model.towers.values():
                    for parameter in tower.connector.parameters():
                        parameter.mul_(5)
            made.model.eval()
            return made

        yield make


@pytest.fixture(scope="session")
def both(make_dock: Callable[..., Dock], whisper_folder: str) -> Dock:
    audio_encoder = {"encoder": {"type": "whisper", "name": whisper_folder, "seconds": 1, "pool": 5}}
    return make_dock(audio=audio_encoder)


@pytest.fixture(scope="session")
def live(both: Dock) -> Iterator[Live]:
    with serving(both.model, both.processor) as server:
        yield server


@pytest.fixture(scope="session")
def alone(both: Dock) -> Callable[..., str]:
    """What the same model says on its own, by the package's own way of answering."""
    answerer = Answerer(both.model, both.processor)

    def emit(conversation: Conversation | str, new: int = 16) -> str:
        asked = ask(conversation) if isinstance(conversation, str) else conversation
        return "".join(answerer.stream(asked, max_new_tokens=new))

    return emit
