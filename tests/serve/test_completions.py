"""`/v1/completions`: a text goes on, several at a time, with the prompt's own log-probabilities where they are wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch
from served import NAME, Live, serving

from opticnerve.models.vlm.build import Dock
from opticnerve.serve import prompts as prompts_module

TEXT = "the quick brown fox"


def post(live: Live, prompt: Any = TEXT, **wish: Any) -> httpx.Response:
    body = {"model": NAME, "prompt": prompt, **wish}
    return httpx.post(f"{live.url}/v1/completions", json=body, timeout=60)


@pytest.fixture(scope="module")
def goes_on(both: Dock) -> Callable[..., str]:
    """How transformers' `generate` continues a text, to the last space."""

    def continued(ids: list[int], new: int) -> str:
        out = both.model.generate(input_ids=torch.tensor([ids]), max_new_tokens=new, do_sample=False, pad_token_id=0)
        return str(both.processor.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))

    return continued


def test_a_text_goes_on(live: Live, both: Dock, goes_on: Callable[..., str]) -> None:
    made = live.client().completions.create(model=NAME, prompt=TEXT, max_tokens=12)
    ids = both.processor.tokenizer(TEXT)["input_ids"]
    assert made.choices[0].text == goes_on(ids, 12)
    assert made.object == "text_completion"
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (len(ids), 12)
    assert made.choices[0].logprobs is None
    as_ids = live.client().completions.create(model=NAME, prompt=ids, max_tokens=12)
    assert as_ids.choices[0].text == made.choices[0].text


def test_special_tokens_are_what_they_are(live: Live, both: Dock) -> None:
    ids = both.processor.tokenizer("<|im_start|>user\nq<|im_end|>\n")["input_ids"]
    assert post(live, "<|im_start|>user\nq<|im_end|>\n", max_tokens=1).json()["usage"]["prompt_tokens"] == len(ids) < 10


@pytest.mark.parametrize("as_ids", [False, True])
def test_several_prompts(as_ids: bool, live: Live, both: Dock, goes_on: Callable[..., str]) -> None:
    texts = [TEXT, "is there a", "how"]
    ids = [both.processor.tokenizer(t)["input_ids"] for t in texts]
    made = post(live, ids if as_ids else texts, max_tokens=8, n=2, temperature=0).json()
    assert [c["index"] for c in made["choices"]] == list(range(6))
    assert [c["text"] for c in made["choices"]] == [goes_on(i, 8) for i in ids for _ in range(2)]
    assert made["usage"]["prompt_tokens"] == sum(map(len, ids))


@pytest.mark.parametrize("echo", [False, True])
def test_streaming_says_the_same(echo: bool, live: Live) -> None:
    wish: dict[str, Any] = {"max_tokens": 10, "n": 2, "seed": 3, "temperature": 1.2, "logprobs": 2, "echo": echo}
    whole = live.client().completions.create(model=NAME, prompt=[TEXT, "a"], **wish)
    texts: dict[int, str] = {}
    offsets: dict[int, list[int]] = {}
    for chunk in live.client().completions.create(model=NAME, prompt=[TEXT, "a"], stream=True, **wish):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            offsets.setdefault(choice.index, []).extend(choice.logprobs.text_offset if choice.logprobs else [])
    assert texts == {c.index: c.text for c in whole.choices}
    assert offsets == {c.index: c.logprobs.text_offset for c in whole.choices if c.logprobs}


@pytest.mark.parametrize("new", [0, 1, 5])
def test_an_echo_tells_the_prompts_log_probabilities(new: int, live: Live, both: Dock) -> None:
    """As lm-eval asks for the likelihood of a text."""
    made = post(live, echo=True, logprobs=3, max_tokens=new, temperature=0).json()
    [choice] = made["choices"]
    assert choice["text"].startswith(TEXT)
    assert choice["finish_reason"] == "length"
    ids = both.processor.tokenizer(TEXT)["input_ids"]
    with torch.inference_mode():
        log_p_TV = both.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    told = choice["logprobs"]
    assert len(told["tokens"]) == len(ids) + new == len(told["token_logprobs"]) == len(told["text_offset"])
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    for i, token in enumerate(ids[1:], 1):
        assert told["token_logprobs"][i] == pytest.approx(float(log_p_TV[i - 1, token]), abs=1e-4)
        assert max(told["top_logprobs"][i].values()) == pytest.approx(float(log_p_TV[i - 1].max()), abs=1e-4)
    assert "".join(told["tokens"][: len(ids)]) == TEXT
    assert told["text_offset"][1] == len(told["tokens"][0])
    assert post(live, echo=True, max_tokens=new or 1, temperature=0).json()["choices"][0]["text"].startswith(TEXT)


def test_the_token_that_ends_an_answer_has_its_logprob(live: Live, both: Dock) -> None:
    end = both.processor.tokenizer.eos_token_id
    made = post(live, logit_bias={str(end): 100}, logprobs=1, max_tokens=5).json()
    assert made["choices"][0]["text"] == ""
    assert made["choices"][0]["finish_reason"] == "stop"
    assert made["choices"][0]["logprobs"]["tokens"] == ["<|im_end|>"]


def test_grammars_and_stop_words(live: Live) -> None:
    assert post(live, guided_regex=" [0-9]{3}", max_tokens=9).json()["choices"][0]["text"][0] == " "
    stopped = post(live, guided_choice=["red and blue"], stop=[" and"], max_tokens=30).json()["choices"][0]
    assert (stopped["text"], stopped["finish_reason"]) == ("red", "stop")


@pytest.mark.parametrize(
    ("prompt", "wish", "param", "fact"),
    [
        ("", {}, None, "empty"), ([], {}, None, "empty"), ([[]], {}, None, "empty"), (["a"] * 65, {}, None, "65"),
        (TEXT, {"max_tokens": 0}, None, "echo"), (TEXT, {"best_of": 3}, None, "best_of"),
        (TEXT, {"suffix": "x"}, "suffix", "0"), ([10**6], {}, "prompt", "1,000,000"),
        ("a <image> b", {}, "prompt", "picture"), ([[5], [10**6]], {}, "prompt.1", "1,000,000"),
        (TEXT, {"n": 5}, "n", "4"), (TEXT, {"max_tokens": 600}, "max_tokens", "512"),
        ("dog " * 700, {}, "prompt", "512"), (TEXT, {"guided_regex": "("}, "guided_regex", "regex"),
        (TEXT, {"messages": []}, "messages", "messages"), (TEXT, {"model": "x"}, "model", "no model"),
    ],
)  # fmt: skip
def test_what_is_refused(prompt: Any, wish: dict[str, Any], param: str | None, fact: str, live: Live) -> None:
    answer = post(live, prompt, **wish)
    assert answer.status_code == (404 if "model" in wish else 400), answer.text
    assert answer.json()["error"]["param"] == param
    assert fact in answer.json()["error"]["message"]


def test_an_echo_that_would_fill_the_memory(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts_module, "MAX_ECHOED", 3 * live.service.reader.vocabulary)
    answer = post(live, echo=True, logprobs=1, max_tokens=1)
    assert answer.status_code == 400
    assert "more than the 3 " in answer.json()["error"]["message"]
    assert post(live, echo=True, max_tokens=1).status_code == 200


def test_models_answered_one_by_one(make_dock: Callable[..., Dock]) -> None:
    made = make_dock("llama", fusion="cross_attention")
    with serving(made.model, made.processor) as alone:
        whole = post(alone, [TEXT, "a"], n=2, echo=True, logprobs=1, max_tokens=4, temperature=0).json()
        assert [c["index"] for c in whole["choices"]] == [0, 1, 2, 3]
        assert whole["choices"][0] == {**whole["choices"][1], "index": 0}
