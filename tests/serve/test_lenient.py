"""What asks for nothing, and hints that change no answer, are taken: clients send them unasked."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import pytest
from served import NAME, Live, audio, chat, image, image_url, sound

import tiny
from opticnerve.types import AudioPart, Conversation, ImagePart, Message, TextPart, ask

NOTHING: dict[str, list[Any]] = {
    "tools": [[], None], "tool_choice": ["none", "auto", None], "parallel_tool_calls": [False, True, None],
    "functions": [[], None], "function_call": ["none", None],
    "response_format": [{"type": "text"}, None], "modalities": [["text"], None], "audio": [None],
    "logprobs": [False, None], "top_logprobs": [None, 0], "n": [1, None], "stop": [None, []], "seed": [None],
    "frequency_penalty": [0, 0.0, None], "presence_penalty": [0, None], "repetition_penalty": [1, 1.0, None],
    "top_k": [0, -1, None], "min_p": [0, None], "logit_bias": [{}, None], "stream": [False, None],
    "stream_options": [None, {"include_usage": False}], "reasoning_effort": [None], "verbosity": ["medium", None],
    "web_search_options": [None], "moderation": [None], "add_generation_prompt": [True, None],
    "continue_final_message": [False, None],
}  # fmt: skip
HINTS: dict[str, list[Any]] = {
    "user": ["me"], "metadata": [{"run": "7"}, {}], "service_tier": ["auto", "default", "flex"], "store": [True, False],
    "safety_identifier": ["x"], "prompt_cache_key": ["x"], "prompt_cache_retention": ["24h"],
    "prompt_cache_options": [{"mode": "implicit"}], "prediction": [{"type": "content", "content": "a"}],
}  # fmt: skip


@pytest.mark.parametrize("field", [*NOTHING, *HINTS])
def test_it_changes_no_answer(field: str, live: Live, alone: Callable[..., str]) -> None:
    for value in [*NOTHING.get(field, ()), *HINTS.get(field, ()), None]:
        answer = live.post(max_tokens=6, **{field: value})
        assert answer.status_code == 200, (value, answer.text)
        assert answer.json()["choices"][0]["message"]["content"] == alone("q", 6)


def test_an_answer_goes_back_as_the_client_dumps_it(live: Live, alone: Callable[..., str]) -> None:
    client = live.client()
    first = client.chat.completions.create(**chat("how many?"), max_tokens=6).choices[0].message
    history = [{"role": "user", "content": "how many?"}, first.model_dump(), {"role": "user", "content": "why?"}]
    assert {"annotations", "audio", "function_call", "tool_calls", "refusal"} <= set(history[1])
    second = client.chat.completions.create(model=NAME, messages=history, max_tokens=8)  # type: ignore[arg-type]
    turns = [("user", "how many?"), ("assistant", first.content or ""), ("user", "why?")]
    assert second.choices[0].message.content == alone(
        Conversation(tuple(Message(r, (TextPart(c),)) for r, c in turns)),  # type: ignore[arg-type]
        8,
    )


@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {"content": []}, {}])
def test_an_assistant_that_said_nothing(content: dict[str, Any], live: Live, alone: Callable[..., str]) -> None:
    empty = {"role": "assistant", "annotations": [], "name": "it", **content}
    user = {"role": "user", "content": "q", "name": "me"}
    answer = live.post(messages=[{"role": "system", "content": "hi", "name": "s"}, user, empty, user], max_tokens=6)
    assert answer.status_code == 200, answer.text
    turns = [("system", "hi"), ("user", "q"), ("assistant", ""), ("user", "q")]
    said = alone(Conversation(tuple(Message(r, (TextPart(c),)) for r, c in turns)), 6)  # type: ignore[arg-type]
    assert answer.json()["choices"][0]["message"]["content"] == said


@pytest.mark.parametrize("detail", ["low", "high", "auto", "original", None])
def test_detail(detail: str | None, live: Live, alone: Callable[..., str]) -> None:
    part = image(1)
    part["image_url"]["detail"] = detail
    answer = live.post(**chat("what?", part), max_tokens=6)
    assert answer.json()["choices"][0]["message"]["content"] == alone(ask("what?", tiny.picture(1)), 6)


def spellings(plain: str) -> dict[str, str]:
    lines = "\r\n".join(plain[i : i + 76] for i in range(0, len(plain), 76))
    safe = base64.urlsafe_b64encode(base64.b64decode(plain)).decode()
    return {"lines": lines + "\n", "url-safe": safe, "unpadded": plain.rstrip("="), "both": safe.rstrip("=")}


@pytest.mark.parametrize("spelling", ["lines", "url-safe", "unpadded", "both"])
def test_base64_as_clients_write_it(spelling: str, live: Live, alone: Callable[..., str]) -> None:
    seed = next(s for s in range(50) if "+" in (u := image_url(s, 41)) and u.endswith("="))
    head, _, body = image_url(seed, 41).partition(",")
    picture = {"type": "image_url", "image_url": {"url": f"{head},{spellings(body)[spelling]}"}}
    heard = audio(4)
    heard["input_audio"]["data"] = spellings(heard["input_audio"]["data"])[spelling]
    answer = live.post(**chat("what?", picture, heard), max_tokens=6)
    assert answer.status_code == 200, answer.text
    parts = (ImagePart(tiny.picture(seed, 41)), AudioPart(sound(4)), TextPart("what?"))
    assert answer.json()["choices"][0]["message"]["content"] == alone(Conversation((Message("user", parts),)), 6)
