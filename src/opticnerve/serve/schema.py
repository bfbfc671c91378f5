"""What comes in and what goes out, in OpenAI's words (API reference, "Chat"): validation, and the OpenAPI document.

A field that this server does not act on is refused, unless it has the value that asks for nothing.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

MAX_STOPS, MAX_TOP_LOGPROBS, MAX_CHOICES = 4, 20, 16


def _whole_characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"letter {e.start} is half a character (a surrogate without its pair)") from None
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]
Zero = Annotated[float, Field(ge=0, le=0)]
StopWord = Annotated[Text, StringConstraints(min_length=1, max_length=256)]


class Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextContent(Asked):
    type: Literal["text"]
    text: Text


class ImageUrl(Asked):
    url: Text = Field(min_length=1, description="`data:image/…;base64,…`; https and file: only where they are allowed")
    detail: Literal["auto"] | None = None


class ImageContent(Asked):
    type: Literal["image_url"]
    image_url: ImageUrl


class InputAudio(Asked):
    data: Text = Field(min_length=1, description="base64")
    format: Literal["wav", "mp3", "flac", "ogg"]


class AudioContent(Asked):
    type: Literal["input_audio"]
    input_audio: InputAudio


AnyContent = TextContent | ImageContent | AudioContent


class SystemMessage(Asked):
    role: Literal["system", "developer"]
    content: Text | list[TextContent]


class UserMessage(Asked):
    role: Literal["user"]
    content: Text | list[Annotated[AnyContent, Field(discriminator="type")]]


class AssistantMessage(Asked):
    role: Literal["assistant"]
    content: Text | list[TextContent]
    refusal: None = None


AnyMessage = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(Asked):
    include_usage: bool = False


class TextFormat(Asked):
    type: Literal["text"]


class ChatRequest(Asked):
    """`POST /v1/chat/completions`."""

    model: Text
    messages: list[AnyMessage] = Field(min_length=1, max_length=1000)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, description="0: always the likeliest word")
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="the newer word for max_tokens")
    stop: StopWord | list[StopWord] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    user: Text | None = Field(None, description="taken, and without effect")
    frequency_penalty: Zero | None = Field(None, description="0 only")
    presence_penalty: Zero | None = Field(None, description="0 only")
    response_format: TextFormat | None = Field(None, description="text only")
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = Field(None, description="empty only")
    store: Literal[False] | None = Field(None, description="false only: nothing is kept")

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError(
                f"max_tokens is {self.max_tokens} and max_completion_tokens {self.max_completion_tokens}; give one"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs wants logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options wants stream: true")
        if isinstance(self.stop, list) and len(self.stop) > MAX_STOPS:
            raise ValueError(f"stop holds {len(self.stop)} words, more than the {MAX_STOPS} allowed")
        return self

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def answer_tokens(self) -> int | None:
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens


# -- what goes out ----------------------------------------------------------------------------------------------------


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


Finish = Literal["stop", "length"]


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: Finish


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: Logprobs | None
    finish_reason: Finish | None


class ChatCompletionChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["opticnerve"] = "opticnerve"
    max_model_len: int = Field(description="tokens of prompt and answer together")
    modalities: list[Literal["text", "image", "audio"]]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok", "stopping", "failed"]
    waiting: int
    running: int


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorBody
