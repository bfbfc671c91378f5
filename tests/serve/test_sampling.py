"""Penalties, biases and cuts of the distribution: transformers' where it has them, OpenAI's formula where it has not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from served import NAME, Live, chat, image

import tiny
from opticnerve.inference.generate import Answerer
from opticnerve.models.vlm.build import Dock
from opticnerve.serve.sampling import TokenSampler
from opticnerve.serve.schema import ChatRequest
from opticnerve.types import Conversation, ask


def asked(**wish: Any) -> ChatRequest:
    return ChatRequest.model_validate(chat("q") | wish)


def chosen(made: Dock, conversation: Conversation, new: int, number: int = 0, **wish: Any) -> list[int]:
    """What a sampler chooses token by token, the whole text read anew for each."""
    inputs = dict(Answerer(made.model, made.processor).inputs([conversation]))
    inputs.pop("attention_mask")
    ids_1L = inputs.pop("input_ids")
    sampler = TokenSampler(made.model, asked(**wish), ids_1L[0].tolist(), number)
    with torch.inference_mode():
        for _ in range(new):
            said = torch.tensor([sampler.ids[ids_1L.shape[1] :]], dtype=torch.long)
            sampler.choose(made.model(input_ids=torch.cat([ids_1L, said], 1), **inputs).logits[0, -1])
    return sampler.ids[ids_1L.shape[1] :]


@pytest.mark.parametrize(
    ("wish", "options"),
    [
        ({"temperature": 1.4, "top_k": 7}, {"do_sample": True, "temperature": 1.4, "top_k": 7}),
        ({"top_k": 3}, {"do_sample": True, "top_k": 3}),
        ({"temperature": 1.2, "min_p": 0.3, "top_k": 0}, {"do_sample": True, "temperature": 1.2, "min_p": 0.3, "top_k": 0}),
        ({"repetition_penalty": 1.7}, {"do_sample": False, "repetition_penalty": 1.7}),
        ({"repetition_penalty": 0.5}, {"do_sample": False, "repetition_penalty": 0.5}),
        ({"logit_bias": {"40": 30, "41": 29.9}}, {"do_sample": False, "sequence_bias": {(40,): 30.0, (41,): 29.9}}),
        (
            {"temperature": 0.9, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.3, "logit_bias": {"7": -2}},
            {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.3,
             "sequence_bias": {(7,): -2.0}},
        ),
    ],
)  # fmt: skip
def test_as_generate_has_it(wish: dict[str, Any], options: dict[str, Any], live: Live, both: Dock) -> None:
    """Over HTTP, and with three others in the batch, the tokens are those of transformers' `generate`."""
    answerer = Answerer(both.model, both.processor)
    inputs = dict(answerer.inputs([ask("a dog?")]))
    # On a CPU a generator of its own and the global one give the same numbers for a seed.
    torch.manual_seed(5)
    out = both.model.generate(**inputs, max_new_tokens=12, **{"top_k": 0, "pad_token_id": 0} | options, eos_token_id=answerer.stops()["eos_token_id"])  # fmt: skip
    said = both.processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    made = live.client().chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "a dog?"}], max_tokens=12, seed=5, n=4, extra_body=wish
    )
    assert made.choices[0].message.content == said
    plain = live.client().chat.completions.create(**chat("a dog?"), max_tokens=12).choices[0].message.content
    assert said != plain


def test_rules_know_no_placeholders(both: Dock, live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """They lie beyond the vocabulary, where no score is: a rule that bars what stood behind a word must not look there."""
    tokens = chosen(both, ask("what?", tiny.picture(1)), 10, repetition_penalty=100)
    assert len({*tokens}) == 10
    assert live.post(**chat("what?", image(1)), max_tokens=10, repetition_penalty=100).status_code == 200
    # So small a one makes every score infinite.
    assert live.post(**chat("what?", image(1)), max_tokens=10, repetition_penalty=5e-324).status_code == 400
    monkeypatch.setattr(both.model.generation_config, "no_repeat_ngram_size", 2)
    placeholder = both.processor.image_token_id
    assert placeholder is not None
    sampler = TokenSampler(both.model, asked(), [5, placeholder, placeholder, 5], 0)
    assert sampler.choose(torch.arange(placeholder, 0, -1).float()) == 0


class TestPenaltiesOfTheAnswer:
    def test_the_formula(self, both: Dock) -> None:
        sampler = TokenSampler(both.model, asked(frequency_penalty=0.5, presence_penalty=1.25), [5, 5, 6], 0)
        size = 50
        scores = torch.zeros(size)
        scores[6], scores[5], scores[7] = 3.0, 2.9, -1.0
        before = scores.clone()
        # 6 falls by 1.75 at once, then by 0.5 each; what the prompt says counts for nothing.
        assert [sampler.choose(scores) for _ in range(5)] == [6, 5, 6, 5, 6]
        assert torch.equal(scores, before), "the logits are others', too"
        lonely = TokenSampler(both.model, asked(presence_penalty=1.25), [5], 0)
        assert [lonely.choose(scores) for _ in range(4)] == [6, 5, 6, 6], "presence counts once"

    def test_over_http(self, live: Live) -> None:
        def said(**wish: Any) -> list[str]:
            made = live.client().chat.completions.create(**chat("how many?"), max_tokens=16, logprobs=True, **wish)
            return [t.token for t in made.choices[0].logprobs.content]

        bias = {"logit_bias": {"40": 10}}
        tokens = said(**bias)
        assert tokens == [tokens[0]] * 16
        counts = [
            said(**bias, **wish).count(tokens[0]) for wish in ({"frequency_penalty": 1}, {"frequency_penalty": 2})
        ]
        assert 16 > counts[0] > counts[1] > 1
        assert said(**bias, presence_penalty=2) == tokens, "it falls once"
        assert said(**bias, presence_penalty=-2, frequency_penalty=-2) == tokens

    def test_logprobs_stay_the_models_own(self, live: Live) -> None:
        def told(**wish: Any) -> Any:
            made = live.client().chat.completions.create(
                **chat("how many?"), max_tokens=1, logprobs=True, top_logprobs=5, extra_body=wish
            )
            return made.choices[0].logprobs.content[0]

        plain, biased = told(), told(logit_bias={"40": 100}, top_k=5, repetition_penalty=2)
        assert biased.top_logprobs == plain.top_logprobs
        assert biased.logprob < plain.logprob


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        ({"logit_bias": {"500000": 1}}, "logit_bias"), ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"), ({"top_k": -2}, "top_k"), ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"), ({"frequency_penalty": 2.1}, "frequency_penalty"),
    ],
)  # fmt: skip
def test_what_is_no_number_for_it(wish: dict[str, Any], param: str, live: Live) -> None:
    answer = live.post(**wish)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].partition(".")[0] == param
    if wish == {"logit_bias": {"500000": 1}}:
        assert f"{live.service.model.language_model.config.vocab_size:,}" in answer.json()["error"]["message"]


class TestContinuing:
    WORDS = "the circle"

    def post(self, live: Live, **wish: Any) -> Any:
        turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": self.WORDS}]
        return live.post(messages=turns, **wish)

    @pytest.mark.parametrize("wish", [{"continue_final_message": True, "add_generation_prompt": False},
                                      {"continue_final_message": True}, {"add_generation_prompt": False}])  # fmt: skip
    def test_what_follows_is_what_training_would_read(self, wish: dict[str, Any], live: Live, both: Dock) -> None:
        made = self.post(live, **wish, max_tokens=8).json()
        prompt = live.service.reader.read(
            ChatRequest.model_validate(
                chat("q")
                | {"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": self.WORDS}]}
                | wish
            )
        )
        asked_ids = Answerer(both.model, both.processor).inputs([ask("what?")])["input_ids"][0].tolist()
        said = both.processor.tokenizer(self.WORDS, add_special_tokens=False)["input_ids"]
        assert prompt.ids == asked_ids + said
        out = both.model.generate(input_ids=prompt.inputs["input_ids"], max_new_tokens=8, do_sample=False,
                                  pad_token_id=0)  # fmt: skip
        text = both.processor.tokenizer.decode(out[0, len(prompt.ids) :], skip_special_tokens=True)
        assert made["choices"][0]["message"]["content"] == text, "to its last space"

    def test_only_an_assistants_message(self, live: Live) -> None:
        assert "continue_final_message" in self.post(live).json()["error"]["message"]
        for wish in ({"continue_final_message": True}, {"add_generation_prompt": False}):
            error = live.post(**wish).json()["error"]
            assert error["param"] == "messages.0.role"
        both = self.post(live, continue_final_message=True, add_generation_prompt=True)
        assert both.status_code == 400
