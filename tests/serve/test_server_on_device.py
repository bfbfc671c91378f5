"""The server on a pretended CUDA device: its threads mix no devices, and it says the CPU's words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from served import chat, image, serving

from opticnerve.inference.generate import Answerer
from opticnerve.models.vlm.build import Dock
from opticnerve.types import ask
from pretend_device import pretended


def test_the_server(make_dock: Callable[..., Dock]) -> None:
    dock = make_dock()
    alone = "".join(Answerer(dock.model, dock.processor).stream(ask("words"), max_new_tokens=6))
    with pretended():
        dock.model.to("cuda")
        with serving(dock.model, dock.processor) as live:
            client = live.client()
            made = client.chat.completions.create(**chat("words"), max_tokens=6)
            assert made.choices[0].message.content == alone
            body: dict[str, Any] = chat("what?", image())
            said = client.chat.completions.create(**body, max_tokens=6, n=2, temperature=1.0, seed=1, logprobs=True)
            assert len(said.choices) == 2
            assert [
                c.choices[0].delta.content for c in client.chat.completions.create(**body, max_tokens=6, stream=True)
            ]
        dock.model.to("cpu")
