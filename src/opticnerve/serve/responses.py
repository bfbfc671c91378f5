"""An answer as `/v1/responses` says it: items of one output, and a stream of events that says how each comes about."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from opticnerve.serve.answers import Answer, Body
from opticnerve.serve.errors import ApiError
from opticnerve.serve.replies import AnswerToolCall, ResponseObject
from opticnerve.serve.responses_schema import ResponsesRequest
from opticnerve.serve.schema import ChatRequest
from opticnerve.serve.sequence import AnswerPiece, PromptInputs


class ResponsesAnswer(Answer):
    """One answer to a `ResponsesRequest`.

    Args:
        wish: what was asked. asked: the same as a request of chat. where: the rest of `Answer`'s arguments.
    """

    prefix = "resp_"

    def __init__(self, wish: ResponsesRequest, asked: ChatRequest, prompt: PromptInputs, *where: Any) -> None:
        super().__init__(asked, [prompt], *where)
        self.wish, self.output, self.sent = wish, list[Body](), 0

    def _hear(self, first: int, event: AnswerPiece | ApiError) -> None:
        super()._hear(first, self.wish.renamed(event) if isinstance(event, ApiError) else event)

    def _body(self, said: list[AnswerPiece]) -> BaseModel:
        for piece in said:
            list(self.streamed(piece))
        return ResponseObject.model_validate(self._response())

    def opened(self) -> Iterator[Body]:
        yield self._event("created", response=self._response())
        yield self._event("in_progress", response=self._response())

    def streamed(self, piece: AnswerPiece) -> Iterator[Body]:
        logprobs = [token.model_dump() for token in piece.logprobs]
        if piece.text or logprobs or (piece.finish and not piece.calls and not self.output):
            if not self.output:
                yield from self._begun()
            at, part = self._at(), self.output[0]["content"][0]
            part["text"] += piece.text
            part["logprobs"] += logprobs
            yield self._event("output_text.delta", **at, content_index=0, delta=piece.text, logprobs=logprobs)
        if piece.finish is not None:
            if self.output:
                yield from self._ended("incomplete" if piece.finish == "length" else "completed")
            for call in piece.calls:
                yield from self._called(call)

    def closed(self) -> Iterator[Body]:
        made = self._response()
        yield self._event(made["status"], response=made)

    def failed(self, why: ApiError) -> Body:
        error = why.body["error"]
        return self._event("error", **{key: error[key] for key in ("code", "message", "param")})

    # -- items --------------------------------------------------------------------------------------------------------

    def _begun(self) -> Iterator[Body]:
        part: Body = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        name = str(self.head["id"]).replace(self.prefix, "msg_", 1)
        item: Body = {"id": name, "type": "message", "role": "assistant", "status": "in_progress", "content": []}
        self.output.append(item)
        yield self._event("output_item.added", output_index=0, item={**item})
        item["content"] = [part]
        yield self._event("content_part.added", **self._at(), content_index=0, part={**part})

    def _ended(self, status: str) -> Iterator[Body]:
        item = self.output[0]
        item["status"], [part] = status, item["content"]
        at = {**self._at(), "content_index": 0}
        yield self._event("output_text.done", **at, text=part["text"], logprobs=part["logprobs"])
        yield self._event("content_part.done", **at, part=part)
        yield self._event("output_item.done", output_index=0, item=item)

    def _called(self, call: AnswerToolCall) -> Iterator[Body]:
        item: Body = {
            "id": f"fc_{call.id}", "type": "function_call", "status": "completed", "call_id": call.id,
            "name": call.function.name, "arguments": call.function.arguments,
        }  # fmt: skip
        self.output.append(item)
        at = self._at()
        begun = {**item, "status": "in_progress", "arguments": ""}
        yield self._event("output_item.added", output_index=at["output_index"], item=begun)
        yield self._event("function_call_arguments.delta", **at, delta=item["arguments"])
        yield self._event("function_call_arguments.done", **at, name=item["name"], arguments=item["arguments"])
        yield self._event("output_item.done", output_index=at["output_index"], item=item)

    def _at(self) -> Body:
        """Which item an event is of: the newest."""
        return {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}

    def _event(self, kind: str, /, **what: object) -> Body:
        self.sent += 1
        return {"type": kind if kind == "error" else f"response.{kind}", "sequence_number": self.sent - 1, **what}

    def _response(self) -> Body:
        """The response as far as it has come."""
        wish, usage = self.wish, self.usage()
        finish = self.finished.get(0)
        status = "in_progress" if finish is None else "incomplete" if finish == "length" else "completed"
        counts = {
            "input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens, "output_tokens_details": {"reasoning_tokens": 0},
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        }  # fmt: skip
        echoed = wish.model_dump(
            by_alias=True, include={"instructions", "max_output_tokens", "metadata", "temperature", "top_p", "user"}
        )
        return {
            "id": self.head["id"], "object": "response", "created_at": self.head["created"], "status": status,
            "error": None, "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            **echoed, "model": self.head["model"], "output": [*self.output],
            "parallel_tool_calls": wish.parallel_tool_calls is not False, "previous_response_id": None, "store": False,
            "text": wish.text.model_dump(by_alias=True) if wish.text else {"format": {"type": "text"}},
            "tool_choice": wish.model_dump(include={"tool_choice"})["tool_choice"] or "auto",
            "tools": [tool.model_dump() for tool in wish.tools or ()], "truncation": "disabled",
            "usage": None if finish is None else counts,
        }  # fmt: skip
