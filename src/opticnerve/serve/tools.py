"""Tool calls: the chat template is given the tools, and an answer in its family's form of a call is parsed.

Three forms are read, told apart by the template: `<tool_call>{"name", "arguments"}</tool_call>` (Hermes, Qwen 2.5 and
3), a text that is JSON with "name" and "parameters" (Llama 3), and what follows `[TOOL_CALLS]` (Mistral).
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from opticnerve.serve.errors import ApiError
from opticnerve.serve.grammar import Constraint, json_rule, lark_constraint, lark_text
from opticnerve.serve.replies import AnswerToolCall, FunctionCall
from opticnerve.serve.schema import ChatRequest, NamedTool, Tool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DECODER = json.JSONDecoder()


class ToolForm:
    """How a template's family writes calls.

    Args:
        tokenizer: to find the tokens of the form's own words.
    """

    arguments = "arguments"  # the key that the arguments stand under

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def held_from(self, text: str) -> int:
        """How much of an answer's beginning is certainly no part of a call."""
        raise NotImplementedError

    def parse(self, text: str, names: Sequence[str]) -> list[tuple[str, dict[str, Any]]] | None:
        """Names and arguments of the calls in what was held; None where it is none, or broken."""
        raise NotImplementedError

    def lark(self, tools: Sequence[Tool], many: bool) -> str:
        """A grammar of nothing but calls."""
        raise NotImplementedError

    def _rules(self, tools: Sequence[Tool]) -> str:
        """`object`: one call as JSON. Arguments are a grammar each, so that references within their schemas hold."""
        lines = ["object: " + " | ".join(f"object_{i}" for i in range(len(tools)))]
        for i, tool in enumerate(tools):
            before = lark_text(f'{{"name": {json.dumps(tool.function.name)}, "{self.arguments}": ')
            schema = json_rule(tool.function.parameters or {"type": "object"}, f"tools.{i}.function.parameters")
            lines += [f'object_{i}: {before} arguments_{i} "}}"', f"arguments_{i}: {schema}"]
        return "\n".join(lines)

    def _called(self, found: object) -> tuple[str, dict[str, Any]] | None:
        if not isinstance(found, dict) or not isinstance(found.get("name"), str):
            return None
        arguments = found.get(self.arguments, {})
        return (found["name"], arguments) if isinstance(arguments, dict) else None

    def _one_word(self, word: str) -> str:
        """A word of the form in a grammar: by its number where it is a special token, which no text spells."""
        number = self.tokenizer.get_vocab().get(word)
        return lark_text(word) if number is None else f"<[{number}]>"


class HermesForm(ToolForm):
    """`<tool_call>` and `</tool_call>` around JSON; words may stand before."""

    OPEN, CLOSE = "<tool_call>", "</tool_call>"

    def held_from(self, text: str) -> int:
        at = text.find(self.OPEN)
        if at < 0:
            at = len(text) - next((n for n in range(len(self.OPEN), 0, -1) if text.endswith(self.OPEN[:n])), 0)
        return len(text[:at].rstrip())

    def parse(self, text: str, names: Sequence[str]) -> list[tuple[str, dict[str, Any]]] | None:
        first, *parts = text.split(self.OPEN)
        found = []
        for part in parts:
            try:
                value, end = _DECODER.raw_decode(part.lstrip())
            except ValueError:
                break
            called = self._called(value)
            if called is None or part.lstrip()[end:].strip() not in ("", self.CLOSE):
                break
            found.append(called)
        return found if found and len(found) == len(parts) and not first.strip() else None

    def lark(self, tools: Sequence[Tool], many: bool) -> str:
        more = r' ("\n" call)*' if many else ""
        before, behind = lark_text(self.OPEN + "\n"), lark_text("\n" + self.CLOSE)
        return f"start: call{more}\ncall: {before} object {behind}\n{self._rules(tools)}"


class LlamaForm(ToolForm):
    """The whole answer is JSON, several calls parted by semicolons."""

    arguments = "parameters"

    def held_from(self, text: str) -> int:
        return 0 if text.lstrip()[:1] in ("", "{") else len(text)

    def parse(self, text: str, names: Sequence[str]) -> list[tuple[str, dict[str, Any]]] | None:
        found, rest = [], text.strip()
        while rest:
            try:
                value, end = _DECODER.raw_decode(rest)
            except ValueError:
                return None
            called = self._called(value)
            if called is None or called[0] not in names:
                return None
            found.append(called)
            rest = rest[end:].lstrip("; \n")
        return found or None

    def lark(self, tools: Sequence[Tool], many: bool) -> str:
        more = ' ("; " object)*' if many else ""
        return f"start: object{more}\n{self._rules(tools)}"


class MistralForm(ToolForm):
    """`[TOOL_CALLS]` and a list of calls. It is a special token, which an answer's text does not show."""

    OPEN = "[TOOL_CALLS]"

    def held_from(self, text: str) -> int:
        begun = text.lstrip()
        return 0 if self.OPEN.startswith(begun) or begun.startswith(("[{", "[ {", "[\n", self.OPEN)) else len(text)

    def parse(self, text: str, names: Sequence[str]) -> list[tuple[str, dict[str, Any]]] | None:
        try:
            values = json.loads(text.strip().removeprefix(self.OPEN))
        except ValueError:
            return None
        found = [self._called(value) for value in values] if isinstance(values, list) else []
        called = [c for c in found if c is not None and c[0] in names]
        return called if called and len(called) == len(found) else None

    def lark(self, tools: Sequence[Tool], many: bool) -> str:
        more = ' (", " object)*' if many else ""
        return f'start: {self._one_word(self.OPEN)} "[" object{more} "]"\n{self._rules(tools)}'


def form_of_tools(template: str, tokenizer: PreTrainedTokenizerBase) -> ToolForm | None:
    """The form in which a chat template writes calls; None where it is none of those read here."""
    if HermesForm.OPEN in template and "<function=" not in template:
        return HermesForm(tokenizer)
    if MistralForm.OPEN in template and "[ARGS]" not in template:
        return MistralForm(tokenizer)
    if '"parameters"' in template and ("ipython" in template or "<|python_tag|>" in template):
        return LlamaForm(tokenizer)
    return None


class ToolAnswer:
    """The text of an answer that may hold calls: pieces go in, what is certain to be words comes out.

    Args:
        form: of the calls. names: of the tools. many: whether several calls may come; else the first alone counts.
    """

    def __init__(self, form: ToolForm, names: Sequence[str], *, many: bool) -> None:
        self.form, self.names, self.many = form, list(names), many
        self._text, self._given = "", 0

    def put(self, piece: str) -> str:
        """One more piece; the words that are now certain."""
        self._text += piece
        until = max(self._given, self.form.held_from(self._text))
        words, self._given = self._text[self._given : until], until
        return words

    def end(self) -> tuple[str, list[AnswerToolCall]]:
        """What was held, when no piece comes any more: calls, or words that are none."""
        held = self._text[self._given :]
        found = self.form.parse(held, self.names) if held.strip() else None
        if found is None:
            return held.rstrip(), []
        called = found if self.many else found[:1]
        return "", [
            AnswerToolCall(id=_new_id(), function=FunctionCall(name=name, arguments=_as_json(given)))
            for name, given in called
        ]


def tool_constraint(asked: ChatRequest, form: ToolForm) -> Constraint | None:
    """The grammar of an answer that must be calls. Raises ApiError: 400: a named tool that is none."""
    if not asked.must_call:
        return None
    tools, choice = asked.open_tools, asked.tool_choice
    if isinstance(choice, NamedTool):
        wanted = choice.function.name
        tools = [t for t in tools if t.function.name == wanted]
        if not tools:
            names = ", ".join(t.function.name for t in asked.open_tools)
            raise ApiError(400, f"tool_choice names {wanted!r}; the tools are {names}", param="tool_choice")
    return lark_constraint(form.lark(tools, asked.many_calls), "tools")


def _as_json(arguments: dict[str, Any]) -> str:
    return json.dumps(arguments, ensure_ascii=False)


_LETTERS = string.ascii_letters + string.digits


def _new_id() -> str:
    """Mistral's templates want nine letters or digits; nobody wants anything else."""
    return "".join(secrets.choice(_LETTERS) for _ in range(9))
