"""Clients other than OpenAI's own, where they are installed (pip install langchain-openai litellm 'lm-eval[api]').

They are no dependencies of the tests, for they bring some sixty packages along.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field
from served import LIMITS, NAME, Live, image, serving
from test_tools import QWEN

import tiny
from opticnerve.language.chat_template import with_parts
from opticnerve.models.vlm.build import Dock
from opticnerve.types import ask

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # theirs are theirs
]


class TestLangchain:
    @pytest.fixture
    def model(self, live: Live) -> Any:
        langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
        return langchain.ChatOpenAI(
            base_url=f"{live.url}/v1", api_key="none", model=NAME, max_retries=0, max_tokens=300
        )

    def test_a_question(self, model: Any, alone: Callable[..., str]) -> None:
        bound = model.bind(max_tokens=8)
        assert bound.invoke("how many?").content == alone("how many?", 8)
        assert "".join(c.content for c in bound.stream("how many?")) == alone("how many?", 8)

    def test_a_picture(self, model: Any, alone: Callable[..., str]) -> None:
        messages = pytest.importorskip("langchain_core.messages")
        said = model.bind(max_tokens=8).invoke([messages.HumanMessage([image(1), {"type": "text", "text": "what?"}])])
        assert said.content == alone(ask("what?", tiny.picture(1)), 8)

    @pytest.mark.parametrize("method", ["json_schema", "json_mode"])
    def test_structured_output(self, method: str, model: Any) -> None:
        class Shape(BaseModel):
            """A shape in a picture."""

            model_config = ConfigDict(extra="forbid")
            sides: Annotated[int, Field(ge=0, le=9)]
            round: bool

        if method == "json_schema":
            found = model.with_structured_output(Shape, method=method).invoke("what?")
            assert isinstance(found, Shape)
        else:
            raw = model.with_structured_output(Shape, method=method, include_raw=True).invoke("what, as JSON?")["raw"]
            assert raw.content.startswith("{")

    def test_tools(self, make_dock: Callable[..., Dock]) -> None:
        langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
        tools = pytest.importorskip("langchain_core.tools")

        def counted(upto: Annotated[int, Field(ge=0, le=9)]) -> str:
            """Count up to a number."""
            return " ".join(map(str, range(upto)))

        count = tools.tool("count")(counted)

        class Answer(BaseModel):
            """The answer."""

            model_config = ConfigDict(extra="forbid")
            yes: bool

        made = make_dock("bloom")
        made.processor.chat_template = with_parts(QWEN)
        with serving(made.model, made.processor, limits=replace(LIMITS, context=4096)) as live:
            model = langchain.ChatOpenAI(
                base_url=f"{live.url}/v1", api_key="none", model=NAME, max_retries=0, max_tokens=300
            )
            called = model.bind_tools([count], tool_choice="count", parallel_tool_calls=False).invoke("count!")
            [call] = called.tool_calls
            assert call["name"] == "count"
            assert isinstance(call["args"]["upto"], int)
            result = count.invoke(call)
            assert isinstance(model.bind_tools([count]).invoke([("user", "count!"), called, result]).content, str)
            assert isinstance(model.with_structured_output(Answer, method="function_calling").invoke("?"), Answer)
            streamed = None
            for chunk in model.bind_tools([count], tool_choice="count").stream("count!"):
                streamed = chunk if streamed is None else streamed + chunk
            assert streamed is not None
            assert [c["name"] for c in streamed.tool_calls] == ["count"]


class TestLitellm:
    def test_chat_and_text(self, live: Live, alone: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the web when it is imported
        litellm = pytest.importorskip("litellm", reason="litellm is not installed")
        options = {"api_base": f"{live.url}/v1", "api_key": "none"}
        messages = [{"role": "user", "content": "how many?"}]
        made = litellm.completion(
            f"openai/{NAME}", messages=messages, max_tokens=8, user="me", metadata={"a": "b"}, **options
        )
        assert made.choices[0].message.content == alone("how many?", 8)
        history = [*messages, made.choices[0].message.model_dump(), *messages]
        assert (
            litellm.completion(f"openai/{NAME}", messages=history, max_tokens=4, **options).usage.completion_tokens <= 4
        )
        pieces = litellm.completion(
            f"openai/{NAME}",
            messages=messages,
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
            **options,
        )
        assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == alone("how many?", 8)
        schema = {
            "type": "object",
            "properties": {"a": {"type": "boolean"}},
            "required": ["a"],
            "additionalProperties": False,
        }
        held = litellm.completion(
            f"openai/{NAME}", messages=messages, max_tokens=200,
            response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}, **options,
        )  # fmt: skip
        assert "".join(held.choices[0].message.content.split()) in ('{"a":true}', '{"a":false}')
        text = litellm.text_completion(
            model=f"text-completion-openai/{NAME}", prompt="the quick", max_tokens=4, **options
        )  # fmt: skip
        assert text.choices[0].text


class TestLmEval:
    def test_likelihoods_and_answers(self, live: Live, both: Dock, tmp_path: Any, alone: Callable[..., str]) -> None:
        """What the harness asks of an API model, answered from the model itself."""
        pytest.importorskip("lm_eval", reason="lm-eval is not installed")
        api, models = (pytest.importorskip(f"lm_eval.{m}") for m in ("api.instance", "models.openai_completions"))
        both.processor.tokenizer.save_pretrained(tmp_path)

        def instances(kind: str, *arguments: Any) -> list[Any]:
            return [api.Instance(kind, {}, a, i) for i, a in enumerate(arguments)]

        for size in (1, 2):
            text = models.LocalCompletionsAPI(
                base_url=f"{live.url}/v1/completions", model=NAME, tokenizer=str(tmp_path), tokenizer_backend="huggingface",
                batch_size=size, num_concurrent=1,
            )  # fmt: skip
            pairs = [("the quick brown", " fox"), ("is there a", " dog"), ("how", " many?")]
            found = text.loglikelihood(instances("loglikelihood", *pairs))
            for (context, rest), (likelihood, greedy) in zip(pairs, found, strict=True):
                tokenizer = both.processor.tokenizer
                ids = tokenizer(context + rest)["input_ids"]
                first = len(tokenizer(context)["input_ids"])
                with torch.inference_mode():
                    log_p_TV = both.model(input_ids=torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
                own = sum(float(log_p_TV[i - 1, ids[i]]) for i in range(first, len(ids)))
                assert likelihood == pytest.approx(own, abs=1e-3)
                assert greedy == all(int(log_p_TV[i - 1].argmax()) == ids[i] for i in range(first, len(ids)))
            until = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False, "temperature": 0}
            assert all(
                isinstance(a, str)
                for a in text.generate_until(instances("generate_until", ("the quick", until), ("a", until)))
            )
        chat = models.LocalChatCompletion(base_url=f"{live.url}/v1/chat/completions", model=NAME, num_concurrent=1)
        rendered = chat.apply_chat_template([{"role": "user", "content": "how many?"}])
        [said] = chat.generate_until(instances("generate_until", (rendered, until)))
        assert alone("how many?", 6).startswith(said)
