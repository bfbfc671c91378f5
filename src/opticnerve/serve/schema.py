"""What comes in, in OpenAI's words (API reference, "Chat" and "Completions"): validation, and its OpenAPI document.

A hint that changes no answer is taken; a field that would change one is acted on, or refused by its name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

MAX_STOPS, MAX_TOP_LOGPROBS, MAX_CHOICES, MAX_BIASES, MAX_TOOLS = 4, 20, 16, 1024, 128
MAX_PROMPTS, MAX_INPUTS = 64, 256
HINT = "taken, and without effect"


def _whole_characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"letter {e.start} is half a character (a surrogate without its pair)") from None
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]
StopWord = Annotated[Text, StringConstraints(min_length=1, max_length=256)]
TokenId = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
InputText = Annotated[Text, StringConstraints(min_length=1)]
PromptId = Annotated[int, Field(ge=0, lt=2**31)]
FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
Biases = Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)]


class Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextContent(Asked):
    type: Literal["text"]
    text: Text


class ImageUrl(Asked):
    url: Text = Field(min_length=1, description="`data:image/…;base64,…`; https and file: only where they are allowed")
    detail: Literal["auto", "low", "high", "original"] | None = Field(None, description=HINT)


class ImageContent(Asked):
    type: Literal["image_url"]
    image_url: ImageUrl


class VideoUrl(Asked):
    url: Text = Field(min_length=1, description="`data:video/…;base64,…`; https and file: only where they are allowed")


class VideoContent(Asked):
    type: Literal["video_url"]
    video_url: VideoUrl


class InputAudio(Asked):
    data: Text = Field(min_length=1, description="base64")
    format: Literal["wav", "mp3", "flac", "ogg"]


class AudioContent(Asked):
    type: Literal["input_audio"]
    input_audio: InputAudio


AnyContent = TextContent | ImageContent | VideoContent | AudioContent


class SystemMessage(Asked):
    role: Literal["system", "developer"]
    content: Text | list[TextContent]
    name: Text | None = Field(None, description=HINT)


class UserMessage(Asked):
    role: Literal["user"]
    content: Text | list[Annotated[AnyContent, Field(discriminator="type")]]
    name: Text | None = Field(None, description=HINT)


class CalledFunction(Asked):
    name: FunctionName
    arguments: Text = Field(description="a JSON object, as text")


class ToolCall(Asked):
    id: Text
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Asked):
    """What a client got, sent back: with all fields that `message.model_dump()` writes."""

    role: Literal["assistant"]
    content: Text | list[TextContent] | None = None
    name: Text | None = Field(None, description=HINT)
    refusal: None = None
    annotations: list[dict[str, Any]] | None = Field(None, description=HINT)
    audio: None = None
    function_call: None = None
    tool_calls: list[ToolCall] | None = None


class ToolMessage(Asked):
    role: Literal["tool"]
    content: Text | list[TextContent]
    tool_call_id: Text
    name: Text | None = None


AnyMessage = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class FunctionTool(Asked):
    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON Schema")
    strict: bool | None = Field(None, description="true: only where tool_choice makes the answer a call")


class Tool(Asked):
    type: Literal["function"]
    function: FunctionTool


class FunctionChoice(Asked):
    name: FunctionName


class NamedTool(Asked):
    type: Literal["function"]
    function: FunctionChoice


class StreamOptions(Asked):
    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description=HINT)


class TextFormat(Asked):
    type: Literal["text"]


class JsonObjectFormat(Asked):
    type: Literal["json_object"]


class DescribedSchema(Asked):
    name: Text = Field(min_length=1, max_length=64, description=HINT)
    description: Text | None = Field(None, description=HINT)
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="JSON Schema")
    strict: bool | None = Field(None, description=f"{HINT}: answers always fit")


class JsonSchemaFormat(Asked):
    type: Literal["json_schema"]
    json_schema: DescribedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]
JsonSchema = dict[str, Any] | Text
Choices = Annotated[list[Annotated[Text, StringConstraints(min_length=1)]], Field(min_length=1, max_length=1000)]


class StructuredOutputs(Asked):
    """vLLM's newer words for `guided_json` and so on."""

    json_: JsonSchema | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None


class Sampling(Asked):
    """What all requests for an answer have in common: how tokens are chosen."""

    model: Text
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, description="0: always the likeliest word")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="0 and -1: all tokens")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, description="of transformers; 1 asks for nothing")
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Biases | None = Field(None, description="by token id")
    guided_json: JsonSchema | None = Field(None, description="a JSON schema that the answer fits")
    guided_regex: Text | None = Field(None, description="a regular expression that the whole answer fits")
    guided_choice: Choices | None = Field(None, description="the answer is one of these")
    guided_grammar: Text | None = Field(None, description="Lark or GBNF")
    structured_outputs: StructuredOutputs | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    user: Text | None = Field(None, description=HINT)


class Hints(Asked):
    """What changes no answer."""

    metadata: dict[str, Any] | None = Field(None, description=HINT)
    prompt_cache_key: Text | None = Field(None, description=HINT)
    prompt_cache_options: dict[str, Any] | None = Field(None, description=HINT)
    prompt_cache_retention: Text | None = Field(None, description=HINT)
    safety_identifier: Text | None = Field(None, description=HINT)
    service_tier: Text | None = Field(None, description=HINT)
    store: bool | None = Field(None, description=f"{HINT}: nothing is kept")


class SampledRequest(Sampling):
    """What chat and plain completions have in common: `Sampling`, and how answers end."""

    max_tokens: int | None = Field(None, ge=1)
    stop: StopWord | list[StopWord] | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)

    @model_validator(mode="after")
    def _options_fit(self) -> SampledRequest:
        if self.stream_options is not None and self.stream_options.include_usage and not self.stream:
            raise ValueError("stream_options.include_usage wants stream: true")
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
        """The longest answer; None: the server decides."""
        return self.max_tokens

    @property
    def tells_end(self) -> bool:
        """Whether the token that ends an answer is among its log-probabilities."""
        return False

    @property
    def likeliest(self) -> int | None:
        """How many likeliest tokens are told beside each; None: no log-probabilities at all."""
        raise NotImplementedError


class ChatRequest(SampledRequest, Hints):
    """`POST /v1/chat/completions`."""

    messages: list[AnyMessage] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=1, description="the newer word for max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    continue_final_message: bool | None = Field(
        None, description="the last message is the assistant's, to be continued"
    )
    add_generation_prompt: bool | None = Field(None, description="false: the same, in other words")
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="empty only: see tools")
    function_call: Literal["none", "auto"] | None = Field(None, description="see tool_choice")
    modalities: list[Literal["text"]] | None = Field(None, description="text only")
    audio: None = None
    moderation: None = None
    reasoning_effort: None = None
    verbosity: Literal["medium"] | None = None
    web_search_options: None = None
    prediction: dict[str, Any] | None = Field(None, description=HINT)

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError(
                f"max_tokens is {self.max_tokens} and max_completion_tokens {self.max_completion_tokens}; give one"
            )
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs wants logprobs: true")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other; leave one out")
        if self.must_call and not self.tools:
            raise ValueError("tool_choice asks for a call, and there are no tools; give some")
        if not self.must_call and any(t.function.strict for t in self.open_tools):
            raise ValueError("a tool with strict: true wants tool_choice required, or its name; or leave strict out")
        return self

    @property
    def answer_tokens(self) -> int | None:
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens

    @property
    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def open_tools(self) -> list[Tool]:
        """The tools that the answer may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def must_call(self) -> bool:
        """Whether the answer is calls and nothing else."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def many_calls(self) -> bool:
        """Whether it may hold several calls."""
        return self.parallel_tool_calls is not False and not isinstance(self.tool_choice, NamedTool)

    @property
    def with_tools(self) -> bool:
        """Whether tools may be called, or were."""
        return bool(self.open_tools) or any(
            isinstance(m, ToolMessage) or (isinstance(m, AssistantMessage) and m.tool_calls) for m in self.messages
        )

    @property
    def continued(self) -> bool:
        """Whether the last message is the beginning of the answer."""
        return bool(self.continue_final_message) or self.add_generation_prompt is False


class CompletionRequest(SampledRequest):
    """`POST /v1/completions`: a text that goes on, with no chat template around it."""

    prompt: Text | list[Text] | list[PromptId] | list[list[PromptId]] = Field(
        description="a text or token ids, or several; special tokens are what they are to the model"
    )
    max_tokens: int | None = Field(None, ge=0, description="0: with echo alone")
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = Field(None, description="the prompt stands before its continuation")
    best_of: int | None = Field(None, ge=1, description="as many as n, or nothing")
    suffix: Annotated[str, StringConstraints(max_length=0)] | None = Field(None, description="empty only")

    @model_validator(mode="after")
    def _fits_together(self) -> CompletionRequest:
        if self.best_of not in (None, self.choices):
            raise ValueError(
                f"best_of is {self.best_of} and n {self.choices}; answers are not chosen among: leave it out"
            )
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0, which asks for nothing without echo: true")
        if len(self.prompts) > MAX_PROMPTS:
            raise ValueError(f"prompt holds {len(self.prompts)} prompts, more than the {MAX_PROMPTS} allowed")
        if not self.prompts or any(len(p) == 0 for p in self.prompts):
            raise ValueError("prompt is empty; give at least one word or token")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        several = [p for p in self.prompt if not isinstance(p, int)]
        return list(several) or ([[p for p in self.prompt if isinstance(p, int)]] if self.prompt else [])

    @property
    def likeliest(self) -> int | None:
        return self.logprobs

    @property
    def tells_end(self) -> bool:
        return True


class EmbeddingRequest(Asked):
    """`POST /v1/embeddings`, of a dual encoder."""

    model: Text
    input: InputText | Annotated[list[InputText], Field(min_length=1, max_length=MAX_INPUTS)] = Field(
        description="texts; beyond OpenAI's API also pictures, as `data:image/…;base64,…`"
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, description="that of the model's vectors, or nothing")
    user: Text | None = Field(None, description=HINT)
