"""How much of everything a server lets one request ask for, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from opticnerve.data.media.audio import MAX_SECONDS
from opticnerve.data.media.images import MAX_PIXELS
from opticnerve.types import OpticNerveError

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Bounds of a server.

    Attributes:
        slots: answers written at a time. queue: requests that wait beside them.
        body_bytes: of a request, and of each picture or sound that is fetched or read from a folder.
        media: pictures, videos and sounds of a request. pixels: of all its pictures together. video_pixels: in all
            frames of a video, which may have to be decoded. audio_seconds: of each sound.
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
    video_pixels: int = 10_000_000_000  # five minutes of 1280 × 720 at 30 frames a second are 8.3
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
            value, may_be_0 = getattr(self, field.name), field.name in ("queue", "media", "grace_seconds")
            if value is not None and (value < 0 or (value == 0 and not may_be_0)):
                least = "0 or more" if may_be_0 else "more than 0"
                raise OpticNerveError(
                    f"{field.name.replace('_', ' ')} is {value}; it must be {least}", kind="out-of-range"
                )

    @property
    def admitted(self) -> int:
        """Requests in the house at a time, those whose bodies are still arriving among them."""
        return self.slots + self.queue


class Metrics:
    """Counters of one server, in a registry of their own, so that two servers in one process do not mix."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        seconds = partial(Histogram, buckets=_SECONDS, registry=r)
        self.requests = Counter("opticnerve_requests", "Requests for answers and vectors", ["status"], registry=r)
        self.seconds = seconds("opticnerve_request_seconds", "From a request's head to its last byte")
        self.first_token = seconds("opticnerve_first_token_seconds", "From a request's head to its first token")
        self.prompt_seconds = seconds("opticnerve_prompt_seconds", "The model reads one prompt")
        self.step = seconds("opticnerve_step_seconds", "One token for each row")
        self.prompt_tokens = Counter("opticnerve_prompt_tokens", "Tokens of prompts read", registry=r)
        self.completion_tokens = Counter("opticnerve_completion_tokens", "Tokens of answers sent", registry=r)
        self.running = Gauge("opticnerve_running_answers", "Answers being written", registry=r)
        self.waiting = Gauge("opticnerve_waiting_requests", "Requests that wait for the model", registry=r)
        self.admitted = Gauge("opticnerve_admitted_requests", "Requests from head to last byte", registry=r)
