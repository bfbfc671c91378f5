"""Tools in a record: what may be called, what an assistant calls, and what came of it.

- `tools` of the record: a list of `{"type": "function", "function": {"name", "description", "parameters"}}` (OpenAI,
  transformers), of the inner objects alone (LLaMA-Factory), or either as a JSON text (ms-swift).
- An assistant's message with `tool_calls`: `[{"id", "type": "function", "function": {"name", "arguments"}}]`, the
  arguments as an object or as a JSON text (OpenAI); with `function_call` (OpenAI's older form); or the words of a
  speaker called `tool_call` (ms-swift) or `function_call` (LLaMA-Factory): `{"name", "arguments"}` as a JSON text.
- The results: messages of `tool`, `function`, `tool_response` or `observation`.

What stands in here is a tool's own: fields of it that are called `image` name no picture of the sample.
"""

from __future__ import annotations

import json
from typing import Any

from opticnerve.data.formats.fields import Fields, brief, empty
from opticnerve.types import CalledTool, DataError

_SHOWN = 'write {"type": "function", "function": {"name": …, "arguments": {…}}} under tool_calls'


def tools_of(fields: Fields) -> tuple[dict[str, Any], ...]:
    """What a record says may be called, each with `type` and `function`.

    Raises:
        DataError: it is no list of tools with names (kind `tools`).
    """
    if "tools" not in fields:
        return ()
    found = _raw(fields, "tools")
    if empty(found) or found == []:
        return ()
    listed = _read(found, "tools")
    tools = []
    for tool in listed if isinstance(listed, list) else [listed]:
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
            remedy = (
                'wanted {"type": "function", "function": {"name", "description", "parameters"}}; or ignore: [tools]'
            )
            raise DataError(f"a tool is {brief(tool)}", remedy=remedy, kind="tools")
        tools.append({"type": "function", "function": _without_nulls(inner)})
    return tuple(tools)


def calls_of(message: Fields) -> tuple[CalledTool, ...]:
    """The calls of an assistant's message.

    Raises:
        DataError: something else than calls (kind `tools`).
    """
    if "tool_calls" not in message and "function_call" not in message:
        return ()
    listed, older = _raw(message, "tool_calls"), _raw(message, "function_call")
    return (*called(listed, "tool_calls"), *called(older, "function_call"))


def called(value: object, what: str) -> tuple[CalledTool, ...]:
    """One call or several, as objects or as a JSON text."""
    if empty(value) or value == []:
        return ()
    found = _read(value, what)
    return tuple(_call(item) for item in (found if isinstance(found, list) else [found]))


def _call(value: object) -> CalledTool:
    inner = value.get("function", value) if isinstance(value, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(value, dict) or not isinstance(inner, dict) or not isinstance(name, str) or not name:
        raise DataError(f"a call of a tool is {brief(value)}", remedy=_SHOWN, kind="tools")
    given = inner.get("arguments", inner.get("parameters"))
    arguments = _read(given, f"arguments of {name[:40]}") if not empty(given) else {}
    if not isinstance(arguments, dict):
        raise DataError(f"the arguments of {name[:60]} are {brief(arguments)}", remedy=_SHOWN, kind="tools")
    return CalledTool(name, _without_nulls(arguments), "" if empty(value.get("id")) else str(value["id"]))


def about_result(message: Fields) -> tuple[tuple[str, str], ...]:
    """`name` and `tool_call_id` of a tool's message, as far as they are told."""
    return tuple((key, str(message[key])) for key in ("name", "tool_call_id") if not empty(message.get(key)))


def _raw(fields: Fields, key: str) -> Any:
    """A value as it lies there, noted as read with all that is in it."""
    fields.read.add(key)
    return dict.get(fields, key)


def _read(value: object, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{what} are no JSON: {brief(value)} ({e})", remedy=_SHOWN, kind="tools") from None


def _without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    """Tables fill in null for what one object of a column has and another has not."""
    return {k: _without_nulls(v) if isinstance(v, dict) else v for k, v in value.items() if v is not None}
