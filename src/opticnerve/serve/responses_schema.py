"""What `POST /v1/responses` takes (OpenAI's API reference, "Responses"), and the same as a request of chat.

Both are one prompt and one answer: items of `input` become messages, and what chat refuses is refused here by the name
that it has here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from opticnerve.serve import schema
from opticnerve.serve.errors import ApiError, from_validation
from opticnerve.serve.schema import HINT, Asked, FunctionName, Text

LOGPROBS = "message.output_text.logprobs"
MAX_ITEMS = 999  # instructions are a message, too


class InputText(Asked):
    type: Literal["input_text"]
    text: Text


class InputImage(Asked):
    type: Literal["input_image"]
    image_url: Text = Field(min_length=1, description="as of chat's `image_url.url`")
    detail: Literal["auto", "low", "high", "original"] | None = Field(None, description=HINT)
    file_id: None = None


class SaidText(Asked):
    """What an answer said, sent back."""

    type: Literal["output_text"]
    text: Text
    annotations: list[Any] | None = Field(None, description=HINT)
    logprobs: list[Any] | None = Field(None, description=HINT)


UserContent = Annotated[InputText | InputImage | schema.AudioContent, Field(discriminator="type")]


class InputItem(Asked):
    id: Text | None = Field(None, description=HINT)
    status: Literal["in_progress", "completed", "incomplete"] | None = Field(None, description=HINT)


class MessageItem(InputItem):
    type: Literal["message"] | None = None
    phase: Text | None = Field(None, description=HINT)


class UserItem(MessageItem):
    role: Literal["user"]
    content: Text | list[UserContent]


class SystemItem(MessageItem):
    role: Literal["system", "developer"]
    content: Text | list[InputText]


class AssistantItem(MessageItem):
    role: Literal["assistant"]
    content: Text | list[Annotated[SaidText | InputText, Field(discriminator="type")]]


class CallItem(InputItem):
    type: Literal["function_call"]
    call_id: Text
    name: FunctionName
    arguments: Text = Field(description="a JSON object, as text")
    async_: None = None
    caller: None = None
    namespace: None = None


class CallOutputItem(InputItem):
    type: Literal["function_call_output"]
    call_id: Text
    output: Text | list[InputText]


def _kind(item: object) -> str | None:
    """The tag of an item: a message's is its role, and it need not say that it is a message."""
    found = item if isinstance(item, dict) else vars(item) if isinstance(item, Asked) else {}
    kind = found.get("role") if found.get("type") in (None, "message") else found["type"]
    return kind if isinstance(kind, str) else None


AnyItem = Annotated[
    Annotated[UserItem, Tag("user")]
    | Annotated[SystemItem, Tag("system")]
    | Annotated[SystemItem, Tag("developer")]
    | Annotated[AssistantItem, Tag("assistant")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")],
    Discriminator(_kind),
]


class FlatTool(schema.FunctionTool):
    type: Literal["function"]


class FlatToolChoice(schema.FunctionChoice):
    type: Literal["function"]


class FlatSchemaFormat(schema.DescribedSchema):
    type: Literal["json_schema"]


class TextOptions(Asked):
    format: (
        Annotated[schema.TextFormat | schema.JsonObjectFormat | FlatSchemaFormat, Field(discriminator="type")] | None
    ) = None
    verbosity: Literal["medium"] | None = None


class ResponsesRequest(schema.Sampling, schema.Hints):
    """`POST /v1/responses`."""

    input: Text | Annotated[list[AnyItem], Field(min_length=1, max_length=MAX_ITEMS)]
    instructions: Text | None = Field(None, description="a system message before all others")
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextOptions | None = None
    tools: Annotated[list[FlatTool], Field(max_length=schema.MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include: list[Text] | None = Field(None, description=f"{LOGPROBS}; of all else there is nothing to include")
    top_logprobs: int | None = Field(None, ge=0, le=schema.MAX_TOP_LOGPROBS)
    max_tool_calls: int | None = Field(None, description=f"{HINT}: it bounds tools that a server has")
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None
    moderation: None = None
    reasoning: dict[str, None] | None = Field(None, description="nothing that it asks for is done")

    @field_validator("previous_response_id", "conversation", mode="before")
    @classmethod
    def _nothing_is_kept(cls, value: object) -> object:
        if value is not None:
            raise ValueError("no answer is kept here; leave it out, and send the earlier items in input")
        return value

    @model_validator(mode="after")
    def _fits(self) -> ResponsesRequest:
        last = None if isinstance(self.input, str) else self.input[-1]
        if last is not None and not isinstance(last, UserItem | CallOutputItem):
            raise ValueError("the last item of input must be a message of the user, or what a function gave")
        if self.top_logprobs and LOGPROBS not in (self.include or ()):
            raise ValueError(f"top_logprobs wants {LOGPROBS} in include")
        return self

    def chat(self) -> schema.ChatRequest:
        """The same question as chat has it. Raises ApiError: 400: what both together make wrong."""
        body = self.model_dump(by_alias=True, include={*schema.Sampling.model_fields, *schema.Hints.model_fields})
        form = self.text.model_dump(by_alias=True)["format"] if self.text else None
        if form and form["type"] == "json_schema":
            form = {"type": form.pop("type"), "json_schema": form}
        choice = self.tool_choice
        body |= {
            "messages": [message for message, _ in self._messages()], "max_completion_tokens": self.max_output_tokens,
            "response_format": form, "logprobs": LOGPROBS in (self.include or ()), "top_logprobs": self.top_logprobs,
            "tools": [{"type": "function", "function": t.model_dump(exclude={"type"})} for t in self.tools or ()],
            "tool_choice": {"type": "function", "function": {"name": choice.name}}
            if isinstance(choice, FlatToolChoice)
            else choice,
            "parallel_tool_calls": self.parallel_tool_calls,
        }  # fmt: skip
        try:
            return schema.ChatRequest.model_validate(body)
        except ValidationError as e:
            problems = [{**p, "loc": ("body", *p["loc"])} for p in e.errors()]
            raise self.renamed(from_validation(problems)) from None

    def _messages(self) -> list[tuple[dict[str, Any], list[str]]]:
        """The messages, each with the fields here that it stands in: its own, and those of its calls."""
        found: list[tuple[dict[str, Any], list[str]]] = []
        if self.instructions:
            found.append(({"role": "system", "content": self.instructions}, ["instructions"]))
        if isinstance(self.input, str):
            return [*found, ({"role": "user", "content": self.input}, ["input"])]
        for i, item in enumerate(self.input):
            match item:
                case CallItem():
                    # An answer's words and calls are one message, as they were when it was given.
                    if not found or found[-1][0]["role"] != "assistant":
                        found.append(({"role": "assistant"}, [f"input.{i}"]))
                    function = {"name": item.name, "arguments": item.arguments}
                    call = {"id": item.call_id, "type": "function", "function": function}
                    found[-1][0].setdefault("tool_calls", []).append(call)
                    found[-1][1].append(f"input.{i}")
                case CallOutputItem():
                    said = {"role": "tool", "content": _content(item.output), "tool_call_id": item.call_id}
                    found.append((said, [f"input.{i}"]))
                case _:
                    found.append(({"role": item.role, "content": _content(item.content)}, [f"input.{i}"]))
        return found

    def renamed(self, why: ApiError) -> ApiError:
        """A refusal of chat, with its field as it is called here."""
        if why.param is None:
            return why
        param = why.param
        if at := re.match(r"messages\.(\d+)(?:\.tool_calls\.(\d+)\.function)?", param):
            places = self._messages()[int(at[1])][1]
            param = places[0 if at[2] is None else int(at[2]) + 1] + param[at.end() :]
        for pattern, name in _NAMES.items():
            param = re.sub(pattern, name, param)
        message = why.message.replace(why.param, param)
        return ApiError(why.status, message, param=param, code=why.code, retry_after=why.retry_after)


# How chat calls what stands elsewhere here.
_NAMES = {
    r"^messages$": "input", r"^max(_completion)?_tokens$": "max_output_tokens", r"\.image_url\.url$": ".image_url",
    r"^response_format(\.json_schema)?": "text.format", r"^(tools\.\d+)\.function": r"\1",
}  # fmt: skip


def _content(content: str | Sequence[Asked]) -> str | list[dict[str, Any]]:
    """A text, or parts, as chat has them."""
    return content if isinstance(content, str) else [_part(part) for part in content]


def _part(part: Asked) -> dict[str, Any]:
    match part:
        case InputText() | SaidText():
            return {"type": "text", "text": part.text}
        case InputImage():
            return {"type": "image_url", "image_url": {"url": part.image_url, "detail": part.detail}}
    return part.model_dump()
