"""Refusals in the shape that OpenAI's clients read: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.responses import JSONResponse

from opticnerve.types import OpticNerveError

KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 411: "invalid_request_error", 413: "invalid_request_error",
    415: "invalid_request_error", 429: "rate_limit_error", 500: "server_error", 503: "unavailable_error",
    504: "timeout_error",
}  # fmt: skip


class ApiError(OpticNerveError):
    """A request that is refused.

    Args:
        status: the HTTP status. message: for people: what is wrong, both numbers, what to do.
        param: the field that is wrong, `messages.0.content`. code: a word for programs.
        retry_after: seconds after which it is worth trying again.
    """

    kind = "request"

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        retry_after: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        found = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        # What repeats a client's words may hold half a character, which no JSON can carry.
        return {"error": {k: v and v.encode(errors="replace").decode() for k, v in found.items()}}

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def from_validation(problems: Sequence[Any]) -> ApiError:
    """pydantic's list of problems as one refusal that names its field. What was sent is not repeated."""
    if problems[0]["type"] == "json_invalid":
        why = problems[0].get("ctx", {}).get("error", "")
        return ApiError(400, f"the body is not valid JSON: {why}", code="invalid_json")
    # Of content that may be text or parts, the alternative that was got furthest into is the one that was meant, and
    # then the one whose kind is right.
    first = max(problems, key=lambda p: (len(p["loc"]), not p["type"].endswith(("missing", "_type"))))
    param = ".".join(_names(first["loc"][1:])) or None  # without "body"
    if first["type"] in ("extra_forbidden", "none_required"):
        return ApiError(
            400, f"{param} is not supported by this server; leave it out", param=param, code="unsupported_parameter"
        )
    if first["type"] == "missing":
        return ApiError(400, f"{param or 'a body'} is missing", param=param, code="missing_required_parameter")
    message = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{param or 'the body'}: {message}", param=param, code="invalid_value")


def _names(path: Sequence[Any]) -> list[str]:
    """Fields and indices of pydantic's path, without the alternatives of unions that it names between them."""
    found: list[str] = []
    for i, step in enumerate(path):
        # Of messages.0.user.content the "user", and of response_format.json_schema.json_schema.name one json_schema.
        formats = (("response_format",), ("text", "format"))
        union = i > 0 and (isinstance(path[i - 1], int) or tuple(path[:i]) in formats)
        tag = union and i + 1 < len(path)
        last = i + 1 == len(path)
        kind = isinstance(step, str) and (not step.isidentifier() or (step == "str" and last))
        if not tag and not (kind and found):
            found.append(str(step))
    return found
