"""How much of everything one request may ask for."""

from __future__ import annotations

from dataclasses import dataclass, fields

from opticnerve.data.media.audio import MAX_SECONDS
from opticnerve.data.media.images import MAX_PIXELS
from opticnerve.types import OpticNerveError


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of a server.

    Attributes:
        slots: answers written at a time. queue: requests that wait beside them.
        body_bytes: of a request, and of each picture or sound that is fetched or read from a folder.
        media: pictures and sounds of a request. pixels: of all its pictures together. audio_seconds: of each sound.
        context: tokens of prompt and answer together; None: as many as the model knows positions.
        answer_tokens: the longest answer where a request does not say.
        request_seconds: from a request's head to its last token. head_seconds: for a request's head to arrive.
        body_seconds: for its body. fetch_seconds: for a picture from another host.
        grace_seconds: for running answers, once the server is told to stop.
    """

    slots: int = 8
    queue: int = 64
    body_bytes: int = 20_000_000
    media: int = 8
    pixels: int = MAX_PIXELS
    audio_seconds: float = MAX_SECONDS
    context: int | None = None
    answer_tokens: int = 512
    request_seconds: float = 300.0
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    fetch_seconds: float = 10.0
    grace_seconds: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("queue", "media", "grace_seconds") else None
            if value is not None and (value <= 0 if least is None else value < least):
                raise OpticNerveError(f"{field.name.replace('_', ' ')} is {value}; it must be more than {least or 0}")

    @property
    def admitted(self) -> int:
        """Requests in the house at a time, those whose bodies are still arriving among them."""
        return self.slots + self.queue
