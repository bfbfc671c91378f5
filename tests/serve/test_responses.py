"""`/v1/responses` with the real `openai` client: the same question as in chat, answered in items and events."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from served import NAME, Live, audio, chat, image, image_url, serving, sound
from test_structured import SCHEMA, fits
from test_tools import LIMITS_LONG, QWEN, SAID, TOOLS, spoken

import tiny
from opticnerve.language.chat_template import with_parts
from opticnerve.models.vlm.build import Dock
from opticnerve.serve.errors import ApiError
from opticnerve.serve.grammar import AnswerGrammar
from opticnerve.serve.responses_schema import ResponsesRequest
from opticnerve.serve.schema import ChatRequest
from opticnerve.types import AudioPart, Conversation, ImagePart, Message, TextPart, ask

PICTURE = [{"role": "user", "content": [
    {"type": "input_image", "image_url": image_url(1), "detail": "auto"}, {"type": "input_text", "text": "what?"},
]}]  # fmt: skip
FLAT = [{"type": "function", **t["function"]} for t in TOOLS]
LOGPROBS = ["message.output_text.logprobs"]
# The client builds its objects without a look at them; these look.
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def create(live: Live, **body: Any) -> Any:
    return live.client().responses.create(**{"model": NAME, "input": "how many?", "max_output_tokens": 8, **body})


def events_of(live: Live, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream, each as OpenAI's own types have it."""
    whole = {"model": NAME, "input": "how many?", "max_output_tokens": 8, "stream": True, **body}
    lines = httpx.post(f"{live.url}/v1/responses", json=whole, timeout=60).text.strip().split("\n\n")
    found = []
    for number, (name, data) in enumerate(line.split("\n") for line in lines):
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        EVENT.validate_python(event)
        found.append(event)
    return found


@pytest.fixture(scope="module")
def tooled(make_dock: Callable[..., Dock]) -> Any:
    made = make_dock("bloom")
    made.processor.chat_template = with_parts(QWEN)
    with serving(made.model, made.processor, limits=LIMITS_LONG) as live:
        yield live


def test_words_alone(live: Live, alone: Callable[..., str]) -> None:
    made = create(live)
    assert made.output_text == alone("how many?", 8)
    assert (made.model, made.object, made.id[:5]) == (NAME, "response", "resp_")
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens
    cut = made.usage.output_tokens == 8
    assert made.status == ("incomplete" if cut else "completed")
    assert made.output[0].status == made.status
    assert (made.incomplete_details is not None) == cut
    Response.model_validate(made.to_dict())


def test_a_picture_and_a_sound(live: Live, alone: Callable[..., str]) -> None:
    assert create(live, input=PICTURE).output_text == alone(ask("what?", tiny.picture(1)), 8)
    parts = [PICTURE[0]["content"][0], audio(2), {"type": "input_text", "text": "both?"}]  # type: ignore[index]
    said = Conversation((Message("user", (ImagePart(tiny.picture(1)), AudioPart(sound(2)), TextPart("both?"))),))
    assert create(live, input=[{"role": "user", "content": parts}]).output_text == alone(said, 8)


def test_a_conversation_whose_answer_goes_back(live: Live, alone: Callable[..., str]) -> None:
    first = create(live, instructions="You are a helpful assistant.")
    user = {"role": "user", "content": "how many?"}
    more = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "why?"}]}
    turns = [("system", "You are a helpful assistant."), ("user", "how many?"), ("assistant", first.output_text),
             ("user", "why?")]  # fmt: skip
    expected = alone(Conversation(tuple(Message(r, (TextPart(c),)) for r, c in turns)), 8)  # type: ignore[arg-type]
    for item in (first.output[0].model_dump(), first.output[0], {"role": "assistant", "content": first.output_text}):
        again = create(live, instructions="You are a helpful assistant.", input=[user, item, more])
        assert again.output_text == expected


def test_streaming_says_the_same(live: Live) -> None:
    for body in ({}, {"input": PICTURE, "temperature": 1.3, "top_p": 0.9, "seed": 3}):
        extra = {"seed": body.pop("seed")} if "seed" in body else {}
        whole = create(live, **body, extra_body=extra)
        events = list(create(live, **body, extra_body=extra, stream=True))
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
        assert [e.type for e in events[:2]] == ["response.created", "response.in_progress"]
        last = events[-1]
        assert last.type == f"response.{whole.status}"
        assert last.response.output_text == whole.output_text
        assert last.response.usage == whole.usage
        assert len([e for e in events if e.type == "response.output_text.delta"]) > 1


def test_events_are_openais(live: Live) -> None:
    events = events_of(live, include=LOGPROBS, top_logprobs=2)
    kinds = [e["type"].removeprefix("response.") for e in events]
    assert kinds[2:4] == ["output_item.added", "content_part.added"]
    assert kinds[-4:-1] == ["output_text.done", "content_part.done", "output_item.done"]
    told = [t for e in events for t in e.get("logprobs", ()) if e["type"].endswith("delta")]
    item = events[-1]["response"]["output"][0]
    assert told == item["content"][0]["logprobs"]
    chosen = create(live, include=LOGPROBS, top_logprobs=2).to_dict()["output"][0]["content"][0]["logprobs"]
    assert chosen == told
    assert all(len(t["top_logprobs"]) == 2 for t in told)


def test_a_schema(live: Live) -> None:
    form = {"type": "json_schema", "name": "shape", "schema": SCHEMA, "strict": True}
    for seed in range(2):
        made = create(live, input=PICTURE, text={"format": form}, temperature=1.5, max_output_tokens=300,
                      extra_body={"seed": seed})  # fmt: skip
        assert fits(made.output_text)
        assert made.text.format.schema_ == SCHEMA
    words = create(live, max_output_tokens=200, text={"format": {"type": "json_object"}, "verbosity": "medium"})
    assert words.output_text.startswith("{")


def test_tools(tooled: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    spoken(monkeypatch, tooled, SAID["qwen"])
    body: dict[str, Any] = {"tools": FLAT, "max_output_tokens": 200}
    made = create(tooled, **body)
    said, *calls = made.output
    assert (said.type, made.output_text, made.status) == ("message", "I look.", "completed")
    assert [(c.name, json.loads(c.arguments)) for c in calls] == [
        ("get_weather", {"city": "東京"}),
        ("count", {"upto": 3}),
    ]
    Response.model_validate(made.to_dict())
    # What came goes back with what the functions gave, and is the prompt that chat makes of it.
    outputs = [{"type": "function_call_output", "call_id": c.call_id, "output": f"result {c.name}"} for c in calls]
    user = {"role": "user", "content": "how many?"}
    history = [user, *(i.model_dump(exclude_none=True) for i in made.output), *outputs]
    assert create(tooled, **body, input=history).output_text == "I look."
    called = [
        {"id": c.call_id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in calls
    ]
    messages = [user, {"role": "assistant", "content": "I look.", "tool_calls": called},
                *({"role": "tool", "tool_call_id": o["call_id"], "content": o["output"]} for o in outputs)]  # fmt: skip
    same = ChatRequest.model_validate({"model": NAME, "messages": messages, "tools": TOOLS})
    mine = ResponsesRequest.model_validate({"model": NAME, "input": history, "tools": FLAT}).chat()
    assert tooled.service.reader.read(mine).ids == tooled.service.reader.read(same).ids

    events = events_of(tooled, **body)
    done = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]
    assert [i["type"] for i in done] == ["message", "function_call", "function_call"]
    arguments = [
        "".join(e["delta"] for e in events if "arguments.delta" in e["type"] and e["output_index"] == i) for i in (1, 2)
    ]
    assert arguments == [c.arguments for c in calls]


def test_a_call_that_must_be(tooled: Live) -> None:
    made = create(
        tooled, tools=FLAT, tool_choice={"type": "function", "name": "count"}, max_output_tokens=300, temperature=1.5
    )
    [call] = made.output
    assert 0 <= json.loads(call.arguments)["upto"] <= 9
    assert made.output_text == ""


@pytest.mark.parametrize("hint", [
    {"store": True}, {"store": False}, {"metadata": {"run": "7"}}, {"user": "me"}, {"service_tier": "flex"},
    {"truncation": "disabled"}, {"background": False}, {"include": ["reasoning.encrypted_content"]}, {"tools": []},
    {"previous_response_id": None}, {"reasoning": {"effort": None}}, {"max_tool_calls": 3}, {"prompt_cache_key": "x"},
    {"parallel_tool_calls": False}, {"text": {"format": {"type": "text"}}},
])  # fmt: skip
def test_what_changes_no_answer(hint: dict[str, Any], live: Live, alone: Callable[..., str]) -> None:
    assert create(live, **hint).output_text == alone("how many?", 8)


CALL = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{"}
USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(("wish", "param", "fact"), [
    ({"previous_response_id": "resp_1"}, "previous_response_id", "earlier items in input"),
    ({"conversation": "c"}, "conversation", "earlier items in input"),
    ({"reasoning": {"effort": "low"}}, "reasoning.effort", "not supported"),
    ({"truncation": "auto"}, "truncation", "disabled"), ({"background": True}, "background", "False"),
    ({"context_management": []}, "context_management", "not supported"), ({"n": 2}, "n", "not supported"),
    ({"max_tokens": 3}, "max_tokens", "not supported"), ({"max_output_tokens": 512}, "max_output_tokens", "512"),
    ({"top_logprobs": 2}, None, "include"), ({"input": []}, "input", "1"),
    ({"input": [{"type": "item_reference", "id": "a"}]}, "input.0", "item_reference"),
    ({"input": ["q"]}, "input.0", ""),
    ({"input": [USER, {"role": "assistant", "content": "x"}]}, None, "last item"),
    ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "a"}]}]}, "input.0.content.0", "input_file"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "no"}]}]}, "input.0.content.0.image_url", "data URL"),
    ({"input": [USER, CALL, USER]}, "input.1.arguments", "no JSON"),
    ({"input": [{"role": "user", "content": "dog " * 600}]}, "input", "512"),
    ({"input": "<image>"}, "input.content", "stands for a picture"),
    ({"tool_choice": "required"}, None, "no tools"), ({"tools": FLAT}, "tools", "no tools"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type", "function"),
    ({"text": {"format": {"type": "json_schema", "name": "s", "schema": {"type": "nonsense"}}}}, "text.format.schema", "nonsense"),
    ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name", "missing"),
    ({"text": {"verbosity": "low"}}, "text.verbosity", "medium"), ({"model": "other"}, "model", "tiny"),
])  # fmt: skip
def test_what_is_refused(wish: dict[str, Any], param: str | None, fact: str, live: Live) -> None:
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as refusal:
        create(live, extra_body=wish)
    error: Any = refusal.value.body
    assert error["param"] == param
    assert fact in error["message"]
    assert "messages" not in error["message"].replace("shorten the messages", "")


def test_what_breaks_after_the_first_token_is_an_event(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    take, count = AnswerGrammar.take, []

    def costly(self: Any, token: int) -> None:
        take(self, token)
        count.append(token)
        if len(count) == 6:
            raise ApiError(400, f"{self.param}: too costly", param=self.param)

    monkeypatch.setattr(AnswerGrammar, "take", costly)
    form = {
        "type": "json_schema",
        "name": "s",
        "schema": {"type": "array", "items": {"type": "integer"}, "minItems": 9},
    }
    last = events_of(live, text={"format": form}, max_output_tokens=40)[-1]
    assert (last["type"], last["param"]) == ("error", "text.format.schema")
    assert last["message"] == "text.format.schema: too costly"
    assert live.post(**chat("q", image()), max_tokens=2).status_code == 200
