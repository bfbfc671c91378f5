"""Answers that fit a JSON schema, a pattern, or one of some words: each row of the batch by its own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from served import Live, chat, image
from test_chat import streamed
from transformers import ByT5Tokenizer

import errors
import tiny
from opticnerve.inference.generate import Answerer
from opticnerve.models.vlm.build import Dock
from opticnerve.serve import grammar
from opticnerve.serve.errors import ApiError
from opticnerve.serve.grammar import MAX_LETTERS, GrammarCompiler, constraint_of
from opticnerve.serve.schema import ChatRequest
from opticnerve.types import ask

SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["colour", "count"],
    "properties": {"colour": {"enum": ["red", "blue", "円"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99},
                   "sure": {"type": "boolean"}},
}  # fmt: skip
RANDOM = {"temperature": 1.5, "max_tokens": 300}


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "shape", "schema": schema, "strict": True}}


def fits(text: str) -> bool:
    found = json.loads(text)
    known = {"colour", "count", "sure"}
    return found["colour"] in ("red", "blue", "円") and 0 <= found["count"] <= 99 and {*found} <= known


@pytest.mark.parametrize("wish", [
    {"response_format": schema_format(SCHEMA)}, {"guided_json": SCHEMA}, {"guided_json": json.dumps(SCHEMA)},
    {"structured_outputs": {"json": SCHEMA}},
])  # fmt: skip
def test_a_schema(wish: dict[str, Any], live: Live) -> None:
    """A model with random weights, at a high temperature, in four choices."""
    for seed in range(3):
        body = chat("what?", image(seed)) | RANDOM | {"seed": seed}
        made = live.client().chat.completions.create(**body, n=4, extra_body=wish)
        for choice in made.choices:
            assert choice.finish_reason == "stop"
            assert fits(choice.message.content or ""), choice.message.content
        assert len({c.message.content for c in made.choices}) > 1


@pytest.mark.parametrize(
    ("wish", "pattern"),
    [
        ({"guided_regex": r" (yes|no), [0-9]{2} "}, r" (yes|no), [0-9]{2} "),
        ({"structured_outputs": {"regex": "a{3,5}"}}, "a{3,5}"),
        ({"guided_choice": ["red", 'say "円"', "red wine\n", "<|im_end|>"]}, 'red|say "円"|red wine\n|<\\|im_end\\|>'),
        ({"structured_outputs": {"choice": ["/a/b"]}}, "/a/b"),
        ({"guided_grammar": 'start: "a" (b | c)\nb: "b"\nc: "c" start?'}, "(ac)*a[bc]"),
        ({"guided_grammar": 'root ::= "a" b\nb ::= "b" | "c"'}, "a[bc]"),
        ({"response_format": {"type": "json_object"}, "max_tokens": 400}, r"(?s)\{.*\}"),
        ({"structured_outputs": {"json_object": True}, "max_tokens": 400}, r"(?s)\{.*\}"),
    ],
)  # fmt: skip
def test_patterns(wish: dict[str, Any], pattern: str, live: Live) -> None:
    for seed in range(4):
        made = live.post(**RANDOM | {"seed": seed, "n": 2} | wish)
        assert made.status_code == 200, made.text
        for choice in made.json()["choices"]:
            if choice["finish_reason"] == "stop":
                assert re.fullmatch(pattern, choice["message"]["content"]), choice
                if "json" in str(wish):
                    assert isinstance(json.loads(choice["message"]["content"]), dict)
            else:
                assert "json_object" in str(wish)


def test_rows_with_and_without_stand_side_by_side(live: Live, alone: Callable[..., str]) -> None:
    wishes: list[dict[str, Any]] = [
        {}, {"guided_regex": "[0-9]{12}"}, {"response_format": schema_format(SCHEMA), **RANDOM}, {},
        {"guided_choice": ["red", "blue"], "n": 2},
    ] * 4  # fmt: skip
    with ThreadPoolExecutor(len(wishes)) as pool:
        made = list(pool.map(lambda wish: live.post(**{"max_tokens": 12, **wish}).json()["choices"], wishes))
    for choices, wish in zip(made, wishes, strict=True):
        texts = [c["message"]["content"] for c in choices]
        if not wish:
            assert texts == [alone("q", 12)]
        elif "guided_regex" in wish:
            assert re.fullmatch("[0-9]{12}", texts[0])
        elif "n" in wish:
            assert {*texts} <= {"red", "blue"}
        else:
            assert fits(texts[0])


def test_streaming_says_the_same(live: Live) -> None:
    body = chat("what?", image(3)) | RANDOM | {"seed": 4, "n": 3, "logprobs": True, "top_logprobs": 2}
    body |= {"response_format": schema_format(SCHEMA)}
    whole = live.client().chat.completions.create(**body)
    texts, ends, chunks = streamed(live.client(), **body)
    assert texts == {c.index: c.message.content for c in whole.choices}
    assert set(ends.values()) == {"stop"}
    assert all(map(fits, texts.values()))
    assert len(chunks) > 12, "piece by piece"
    for choice in whole.choices:
        said = b"".join(bytes(t.bytes) for t in choice.logprobs.content)
        assert said.decode() == choice.message.content
        assert all(t.logprob < 0 for t in choice.logprobs.content)


def test_log_probabilities_stay_the_models_own(live: Live) -> None:
    def told(**wish: Any) -> Any:
        return live.post(max_tokens=1, logprobs=True, top_logprobs=4, **wish).json()["choices"][0]["logprobs"]

    assert told(guided_regex="[0-9]+")["content"][0]["top_logprobs"] == told()["content"][0]["top_logprobs"]


def test_what_ends_an_answer_early(live: Live) -> None:
    cut = live.post(guided_regex="[a-z]{40}", max_tokens=3).json()["choices"][0]
    assert cut["finish_reason"] == "length"
    assert re.fullmatch("[a-z]{3,39}", cut["message"]["content"])
    stopped = live.post(guided_choice=["red and blue"], stop=" and", max_tokens=40).json()["choices"][0]
    assert (stopped["message"]["content"], stopped["finish_reason"]) == ("red", "stop")
    # Nothing more can come: no token is spent on saying so.
    whole = live.post(guided_choice=["x"], max_tokens=40).json()
    assert (whole["choices"][0]["finish_reason"], whole["usage"]["completion_tokens"]) == ("stop", 1)


def test_the_likeliest_that_fits(live: Live, both: Dock) -> None:
    """Greedy under a mask is what a mask around the model alone gives."""
    tokenizer = both.processor.tokenizer
    digits = [i for i in range(len(tokenizer)) if re.fullmatch("[0-9]", tokenizer.decode([i]))]
    ids = Answerer(both.model, both.processor).inputs([ask("q")])["input_ids"]
    start = ids.shape[1]
    with torch.inference_mode():
        for _ in range(6):
            logits_V = both.model(input_ids=ids).logits[0, -1]
            best = max(digits, key=lambda i: float(logits_V[i]))
            ids = torch.cat([ids, torch.tensor([[best]])], 1)
    made = live.post(guided_regex="[0-9]{6}", max_tokens=9).json()["choices"][0]["message"]["content"]
    assert made == tokenizer.decode(ids[0, start:])


def test_beside_penalties_and_biases(live: Live) -> None:
    bias = {str(i): 100 for i in range(40, 60)}
    made = live.post(
        guided_regex="[0-9]{8}", logit_bias=bias, frequency_penalty=2, repetition_penalty=1.5, top_k=2, top_p=0.5,
        min_p=0.1, temperature=2, max_tokens=20,
    )  # fmt: skip
    assert re.fullmatch("[0-9]{8}", made.json()["choices"][0]["message"]["content"])


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": schema_format({"type": "nonsense"})}, "response_format.json_schema.schema", "nonsense"),
    ({"response_format": schema_format({"not": {"type": "string"}})}, "response_format.json_schema.schema", "not"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
    ({"response_format": {"type": "xml"}}, "response_format", "xml"),
    ({"guided_regex": "(a"}, "guided_regex", "(a"),
    ({"guided_regex": r"(a+)\1"}, "guided_regex", "backreference"),
    ({"guided_json": "{"}, "guided_json", "no JSON"),
    ({"guided_choice": []}, "guided_choice", "1"),
    ({"guided_grammar": "start: nothing"}, "guided_grammar", "nothing"),
    ({"guided_grammar": "0"}, "guided_grammar", "GBNF"),
    ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "response_format", "guided_regex"),
    ({"guided_regex": "a" * (MAX_LETTERS + 1)}, "guided_regex", f"{MAX_LETTERS:,}"),
    (
        {"guided_json": {"allOf": [{"anyOf": [{"properties": {f"a{i}": {"const": j}}} for j in range(8)]} for i in range(8)]}},
        "guided_json", "too large",
    ),
    ({"guided_json": {"type": "object", "properties": {f"p{i}": {} for i in range(3000)}}}, "guided_json", "2000"),
]  # fmt: skip


@pytest.mark.parametrize(("wish", "param", "fact"), BAD)
def test_what_is_no_grammar(wish: dict[str, Any], param: str, fact: str, live: Live) -> None:
    answer = live.post(**wish)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert fact in error["message"]


def test_a_grammar_that_becomes_too_costly_loses_one_request(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    take, count = grammar.AnswerGrammar.take, []

    def costly(self: Any, token: int) -> None:
        take(self, token)
        count.append(token)
        if len(count) == 3:
            raise ApiError(400, "too costly", param=self.param)

    monkeypatch.setattr(grammar.AnswerGrammar, "take", costly)
    answer = live.post(guided_regex="[0-9]{9}", max_tokens=12)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "guided_regex")
    assert live.post(max_tokens=2).status_code == 200


@pytest.mark.parametrize("kind", list(tiny.TOKENIZERS))
def test_every_kind_of_tokenizer(kind: str) -> None:
    tokenizer = tiny.tokenizer(kind)
    compiler = GrammarCompiler(tokenizer, [tokenizer.eos_token_id])
    constraint = constraint_of(ChatRequest.model_validate(chat("q") | {"guided_choice": ["dog", "円い"]}))
    assert constraint is not None
    made = compiler.compile(constraint)
    for word in ("dog", "円い"):
        row, said = made.copy(), []
        for token in tokenizer("x" + word, add_special_tokens=False)["input_ids"][1:]:
            if not row.allowed(len(tokenizer), torch.device("cpu"))[token]:
                break
            row.take(token)
            said.append(token)
        else:
            assert row.finished
            assert row.allowed(len(tokenizer), torch.device("cpu")).nonzero().flatten().tolist() == compiler.ends
    with errors.refused("request", "guided_choice", error=ApiError):
        made.take(tokenizer.eos_token_id)


def test_a_slow_tokenizer_is_refused_with_the_field() -> None:
    constraint = constraint_of(ChatRequest.model_validate(chat("q") | {"guided_regex": "a"}))
    assert constraint is not None
    with errors.refused("request", "fast", "guided_regex", error=ApiError):
        GrammarCompiler(ByT5Tokenizer(), [1]).compile(constraint)


def test_nothing_is_held_by_a_name_alone() -> None:
    assert constraint_of(ChatRequest.model_validate(chat("q") | {"response_format": {"type": "text"}})) is None
    assert constraint_of(ChatRequest.model_validate(chat("q") | {"structured_outputs": {"json_object": False}})) is None
