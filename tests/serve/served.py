"""A live server behind a real socket, and what to send it."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import soundfile

import tiny
from opticnerve.models.vlm.build import Dock
from opticnerve.serve.limits import ServerLimits
from opticnerve.serve.server import Server, Service
from opticnerve.web.listen import listen

NAME = "tiny"
LIMITS = ServerLimits(
    slots=4, queue=200, body_bytes=200_000, pixels=40_000, media=3, audio_seconds=3.0, answer_tokens=16
)


@dataclass
class Live:
    """A server that answers at `url`; `asked` is what the model says to a conversation when nobody else asks."""

    service: Service
    server: Server
    url: str

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, **options})

    def post(self, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/chat/completions", json=chat("q") | body, timeout=60)

    def metric(self, name: str, **labels: str) -> float:
        return self.service.metrics.registry.get_sample_value(f"opticnerve_{name}", labels) or 0.0


@contextmanager
def serving(model: Any, processor: Any, *, limits: ServerLimits = LIMITS, **options: Any) -> Iterator[Live]:
    """A server in a thread; it is stopped and has stopped at the end."""
    service = Service(model=model, processor=processor, name=NAME, limits=limits, **options)
    with served_by(service) as live:
        yield live
    assert not service.scheduler.alive


@contextmanager
def served_by(service: Any) -> Iterator[Live]:
    """The same of any service."""
    socket = listen("127.0.0.1", 0)
    server = Server(service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{socket.getsockname()[1]}"
    httpx.get(f"{url}/health", timeout=30)
    yield Live(service, server, url)
    server.stop()
    thread.join(timeout=30)
    assert not thread.is_alive()


def chat(question: str, *media: dict[str, Any]) -> dict[str, Any]:
    """The body of a request."""
    parts = [*media, {"type": "text", "text": question}]
    return {"model": NAME, "messages": [{"role": "user", "content": parts if media else question}]}


def image_url(seed: int = 0, size: int = 40) -> str:
    data = io.BytesIO()
    tiny.picture(seed, size).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def image(seed: int = 0, size: int = 40) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": image_url(seed, size)}}


def sound(seed: int = 0, seconds: float = 1.0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(int(16_000 * seconds))).astype(np.float32)


def audio(seed: int = 0, seconds: float = 1.0) -> dict[str, Any]:
    data = io.BytesIO()
    soundfile.write(data, sound(seed, seconds), 16_000, format="WAV", subtype="FLOAT")
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data.getvalue()).decode(), "format": "wav"}}


def until(true: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def folder_of(made: Dock, path: Path) -> Path:
    made.model.save_pretrained(path)
    made.processor.save_pretrained(path)
    return path
