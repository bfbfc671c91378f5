"""Structured output: which tokens may come next, so that an answer fits a JSON schema, a pattern, or a list of words.

llguidance computes them: a lexer and an Earley parser over the tokens' bytes, made as they are needed, so that a
grammar costs next to nothing before its first token, however large the vocabulary (docs/serving.md: why this one).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import llguidance
import numpy as np
import torch
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opticnerve.serve.errors import ApiError
from opticnerve.serve.schema import ChatRequest, JsonObjectFormat, JsonSchemaFormat, SampledRequest

MAX_LETTERS = 65_536
# What one grammar may cost: the lexer's states are 1 to 2 kB each; fuel is some 50,000 for a millisecond.
_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000, step_lexer_fuel=200_000, max_lexer_states=20_000, max_grammar_size=100_000,
    verbose_errors=False,
)  # fmt: skip
# Between JSON's parts one space, or a line break and an indent: models write it so, and it is no endless row.
_JSON: dict[str, Any] = {"whitespace_flexible": True, "whitespace_pattern": r"( |\n {0,32})?"}


class Constraint(NamedTuple):
    """What an answer must fit: llguidance's `grammar`, made of the field `param`."""

    grammar: str
    param: str


def constraint_of(asked: SampledRequest) -> Constraint | None:
    """What a request's answer must fit. Raises ApiError: 400: two fields say it, or one is too large."""
    found = [*_guided(asked)]
    if isinstance(asked, ChatRequest):
        match asked.response_format:
            case JsonObjectFormat():
                found.append(json_constraint({"type": "object"}, "response_format"))
            case JsonSchemaFormat(json_schema=described):
                schema = {"type": "object"} if described.schema_ is None else described.schema_
                found.append(json_constraint(schema, "response_format.json_schema.schema"))
    if len(found) > 1:
        first, second = found[:2]
        raise ApiError(400, f"{first.param} and {second.param} exclude each other; give one", param=second.param)
    return found[0] if found else None


def json_constraint(schema: object, param: str) -> Constraint:
    """JSON of a schema. Raises ApiError: 400: it is too large."""
    return Constraint(llguidance.LLMatcher.grammar_from_json_schema(_dumped(schema, param), overrides=_JSON), param)  # type: ignore[arg-type]


def _dumped(schema: object, param: str) -> str:
    try:
        return _bounded(json.dumps(schema, ensure_ascii=False), param)
    except RecursionError:
        raise ApiError(400, f"{param} is nested too deeply; flatten it", param=param) from None


def lark_constraint(lark: str, param: str) -> Constraint:
    """llguidance's dialect of Lark."""
    return Constraint(str(llguidance.LLMatcher.grammar_from_lark(_bounded(lark, param))), param)


def json_rule(schema: dict[str, Any], param: str) -> str:
    """JSON of a schema, within a Lark grammar. Raises ApiError: 400: it is too large."""
    return "%json " + _dumped({**schema, "x-guidance": _JSON}, param)


def lark_text(text: str) -> str:
    """A text as Lark quotes it."""
    return json.dumps(text, ensure_ascii=False)


def _json(wish: dict[str, Any] | str, param: str) -> Constraint:
    if isinstance(wish, str):
        try:
            wish = json.loads(wish)
        except (ValueError, RecursionError) as e:
            raise ApiError(400, f"{param} is no JSON: {e}", param=param) from None
    return json_constraint(wish, param)


def _choice(words: list[str], param: str) -> Constraint:
    return lark_constraint("start: " + " | ".join(map(lark_text, words)), param)


def _grammar(text: str, param: str) -> Constraint:
    try:
        return Constraint(llguidance.grammar_from("grammar", _bounded(text, param)), param)
    except ValueError as e:  # it looked like GBNF
        raise ApiError(400, f"{param}: {e}", param=param, code="invalid_grammar") from None


# What vLLM's fields ask for, in their order: as `guided_json` and so on, and the same within `structured_outputs`.
_KINDS: dict[str, Callable[[Any, str], Constraint]] = {
    "json": _json,
    "json_object": lambda _, param: json_constraint({"type": "object"}, param),
    "regex": lambda wish, param: Constraint(str(llguidance.LLMatcher.grammar_from_regex(_bounded(wish, param))), param),
    "choice": _choice,
    "grammar": _grammar,
}


def _guided(asked: SampledRequest) -> list[Constraint]:
    outputs = {} if asked.structured_outputs is None else asked.structured_outputs.model_dump(by_alias=True)
    wishes = {f"guided_{kind}": getattr(asked, f"guided_{kind}", None) for kind in _KINDS}
    wishes |= {f"structured_outputs.{kind}": outputs.get(kind) for kind in _KINDS}
    makers = zip(wishes.items(), [*_KINDS.values()] * 2, strict=True)
    return [make(wish, param) for (param, wish), make in makers if wish is not None and wish is not False]


def _bounded(text: str, param: str) -> str:
    if len(text) > MAX_LETTERS:
        raise ApiError(
            400, f"{param} has {len(text):,} letters, more than the {MAX_LETTERS:,} allowed; shorten it", param=param
        )
    return text


class AnswerGrammar:
    """Where an answer stands in its grammar. Made by `GrammarCompiler`; `copy` is for one row."""

    def __init__(self, matcher: llguidance.LLMatcher, param: str) -> None:
        self.matcher, self.param = matcher, param

    def copy(self) -> AnswerGrammar:
        """One that goes on by itself."""
        return AnswerGrammar(self.matcher.deep_copy(), self.param)

    def allowed(self, width: int, device: torch.device) -> Tensor:
        """(width,) bool: the tokens that may come next. Raises ApiError: 400: the grammar has become too costly."""
        bits = np.unpackbits(np.frombuffer(self.matcher.compute_bitmask(), np.uint8), bitorder="little")[:width]
        self._check()
        allowed_V = torch.zeros(width, dtype=torch.bool)
        allowed_V[: len(bits)] = torch.from_numpy(bits).bool()
        return allowed_V.to(device)

    def take(self, token: int) -> None:
        """The token that came. Raises ApiError: 400: the grammar has become too costly."""
        self.matcher.consume_token(token)
        self._check()

    @property
    def finished(self) -> bool:
        """Whether nothing more can come."""
        return bool(self.matcher.is_stopped())

    def _check(self) -> None:
        if self.matcher.is_error():
            why = " ".join(self.matcher.get_error().split())[:300]
            raise ApiError(400, f"{self.param}: {why}", param=self.param, code="invalid_grammar")


class GrammarCompiler:
    """Makes grammars for one tokenizer; may be called from several threads.

    Args:
        tokenizer: a fast one. ends: the tokens that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> None:
        self.tokenizer, self.ends = tokenizer, list(ends)
        self._known: llguidance.LLTokenizer | None = None
        self._alone = threading.Lock()

    def compile(self, constraint: Constraint) -> AnswerGrammar:
        """Raises ApiError: 400: it is no grammar, uses what is not known, or is too costly."""
        vocabulary = self._vocabulary(constraint.param)
        matcher = llguidance.LLMatcher(vocabulary, constraint.grammar, log_level=0, limits=_LIMITS)
        made = AnswerGrammar(matcher, constraint.param)
        made._check()
        made.copy().allowed(1, torch.device("cpu"))  # what is too costly at its first token is found here
        return made

    def _vocabulary(self, param: str) -> llguidance.LLTokenizer:
        """The tokens' bytes, read once: that takes a second."""
        with self._alone:
            if self._known is None:
                try:
                    self._known = from_tokenizer(self.tokenizer, eos_token=self.ends or None)  # type: ignore[arg-type]
                except (ValueError, TypeError) as e:  # of a slow one, too
                    raise ApiError(
                        400, f"this model's tokenizer does not tell its tokens' bytes ({e}), so its answers cannot be "
                        f"held to a grammar; leave {param} out", param=param,
                    ) from None  # fmt: skip
        return self._known
