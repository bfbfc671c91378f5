"""The server keeps to its own OpenAPI document, whatever is sent."""

from __future__ import annotations

import contextlib
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import CHECKS, load_all_checks
from served import NAME, Live, until

load_all_checks()
# What may be sent and is still refused (a model's other name, too many tokens) and what a header may hold are beyond a
# schema.
NOT_OURS = {"positive_data_acceptance", "missing_required_header", "ignored_auth", "max_response_time"}


@pytest.fixture(scope="module")
def document(live: Live) -> Any:
    made = httpx.get(f"{live.url}/openapi.json").json()
    # Let the requests come through to the model: its name, and answers of a few tokens.
    for name in ("ChatRequest", "CompletionRequest", "ResponsesRequest"):
        asked = made["components"]["schemas"][name]["properties"]
        asked["model"] = {"type": "string", "enum": [NAME, "another"]}
        for field in {"max_tokens", "max_completion_tokens", "max_output_tokens"} & {*asked}:
            asked[field] = {"type": "integer", "minimum": 1, "maximum": 4}
        if "n" in asked:
            asked["n"] = {"type": "integer", "minimum": 1, "maximum": 4}
    return made


def test_the_document_names_what_there_is(document: dict[str, Any]) -> None:
    assert set(document["paths"]) == {
        "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/v1/models/{model}", "/health", "/metrics"
    }  # fmt: skip
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
        responses = document["paths"][path]["post"]["responses"]
        assert "text/event-stream" in responses["200"]["content"]
        assert "422" not in responses


def test_whatever_is_sent(document: dict[str, Any], live: Live) -> None:
    schema = schemathesis.openapi.from_dict(document)
    checks = [check for check in CHECKS.get_all() if check.__name__ not in NOT_OURS]
    seen: set[int] = set()

    for result in schema.get_all_operations():
        operation = result.ok()
        count = 60 if operation.method == "post" else 5

        for mode in schemathesis.GenerationMode:

            @settings(
                max_examples=count, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(case=operation.as_strategy(generation_mode=mode))
            def send(case: Any) -> None:
                response = case.call(base_url=live.url)
                case.validate_response(response, checks=checks)
                seen.add(response.status_code)
                if response.status_code >= 400:
                    assert response.status_code < 500
                    assert set(response.json()["error"]) == {"message", "type", "param", "code"}

            with contextlib.suppress(Unsatisfiable):  # nothing can be wrong where nothing is asked
                send()
    assert {200, 400} <= seen
    assert until(lambda: live.service.middleware.admitted == 0)
    assert live.service.scheduler.alive
