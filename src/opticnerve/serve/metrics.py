"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """Counters of one server, in a registry of their own, so that two servers in one process do not mix."""

    CONTENT_TYPE = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.requests = Counter("opticnerve_requests", "Answered requests for chat completions", ["status"], registry=r)
        self.seconds = Histogram(
            "opticnerve_request_seconds", "From a request's head to its last byte", buckets=_SECONDS, registry=r
        )
        self.first_token = Histogram(
            "opticnerve_first_token_seconds", "From a request's head to its first token", buckets=_SECONDS, registry=r
        )
        self.prompt_seconds = Histogram(
            "opticnerve_prompt_seconds", "The model reads one prompt", buckets=_SECONDS, registry=r
        )
        self.step = Histogram("opticnerve_step_seconds", "One token for each row", buckets=_SECONDS, registry=r)
        self.prompt_tokens = Counter("opticnerve_prompt_tokens", "Tokens of prompts read", registry=r)
        self.completion_tokens = Counter("opticnerve_completion_tokens", "Tokens of answers sent", registry=r)
        self.running = Gauge("opticnerve_running_answers", "Answers being written", registry=r)
        self.waiting = Gauge("opticnerve_waiting_requests", "Requests that wait for the model", registry=r)
        self.admitted = Gauge("opticnerve_admitted_requests", "Requests from head to last byte", registry=r)

    def page(self) -> bytes:
        return generate_latest(self.registry)
