"""From the turns of a record to a conversation: every format ends here, so that media, tags and flags mean the same in
all of them.

A turn is words, or a list of parts. Media stand where a part names them, where a part names none (`{"type": "image"}`)
or a tag in the words (`<image>`, `<|image_1|>`, `<video>`) keeps a place for the record's own (`image`, `images`,
`videos`, …, in order), or, where the turns keep no place at all, before the first user's words.

An assistant's turn with `weight: 0` (OpenAI), `loss: false` (ms-swift, xtuner), `train: false` (axolotl) or
`loss_mask: 0` is read and not learned; the record may say the same of all turns, or list it for each. What lies
between, or speaks of parts of a turn, is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from opticnerve.data.formats.boxes import BoxOptions, Located, Placer, objects_of
from opticnerve.data.formats.fields import Fields, brief, empty, find, missing, objects, text
from opticnerve.data.formats.media import Context, Example
from opticnerve.data.formats.names import Tag, kind_by_name, split
from opticnerve.data.formats.tools import about_result, called, calls_of, tools_of
from opticnerve.data.media.files import KINDS, Kind
from opticnerve.types import CalledTool, Conversation, DataError, ImagePart, Message, Part, Role, TextPart

ROLES: dict[str, Role] = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "system": "system", "developer": "system", "tool": "tool", "function": "tool", "tool_response": "tool",
    "observation": "tool", "tool_call": "assistant", "function_call": "assistant",
}  # fmt: skip
CALLS = ("tool_call", "function_call")
"""Speakers whose words are a call as JSON (ms-swift, LLaMA-Factory)."""
ROLE, CONTENT = ("role", "from"), ("content", "value")
WEIGHTS = ("weight", "loss", "loss_weight", "loss_scale", "loss_mask", "train", "training", "trainable", "learn",
           "masked")  # fmt: skip
"""0 or false: not learned; of `masked` (torchtune) the reverse."""
_READER_WEIGHTS = {"weight", "loss_weight", "loss_scale", "masked"}  # of a user's turn they say nothing
REFUSED = ("train_detail", "training_detail", "mask", "assistant_masks", "completion_mask", "token_weights",
           "reasoning_content", "reasoning", "thinking")  # fmt: skip
"""What changes what is learned of a turn, and is not honoured."""
_TEXT = ("text", "input_text", "output_text")
_KIND_OF_TYPE: dict[str, Kind] = {f"{before}{kind}{after}": kind for kind in KINDS for before in ("", "input_")
                                  for after in ("", "_url")}  # fmt: skip


@dataclass
class Turn:
    """What one says, and calls. A `Tag` among the pieces is a place for the record's media."""

    role: Role
    pieces: list[Part | Tag]
    learn: bool = True
    calls: tuple[CalledTool, ...] = ()
    about: tuple[tuple[str, str], ...] = ()


def said(role: Role, words: str, *, tags: bool = True) -> Turn:
    """A turn of words; without `tags` they are taken as they stand."""
    pieces = split(words) if tags else [words] if words else []
    return Turn(role, [TextPart(p) if isinstance(p, str) else p for p in pieces])


def turns_of(value: object, what: str, context: Context) -> list[Turn]:
    """A list of messages, `{"role", "content"}` or `{"from", "value"}`."""
    turns: list[Turn] = []
    for message in objects(value, what):
        turn = _turn(message, context)
        if turn.calls and turns and turns[-1].role == "assistant" and find(message, ROLE) in CALLS:
            turns[-1].calls += turn.calls  # several calls of one turn, or behind its words
        else:
            turns.append(turn)
    return turns


def conversation(
    fields: Fields, turns: Sequence[Turn], context: Context, where: str, id: str, meta: dict[str, Any]
) -> Conversation:
    """The conversation of a record, its media put in their places.

    Raises:
        DataError: other numbers of media than of places for them, or flags that cannot be honoured.
    """
    if (system := find(fields, ("system", "system_prompt"))) is not None and system != "":
        turns = [said("system", text(system, "system")), *turns]
    media = context.media_of(fields)
    _check_record_flags(fields, turns)
    tags = [p for t in turns for p in t.pieces if isinstance(p, Tag) and p.path is None]
    if media.get("video") and not media.get("image") and not any(t.kind == "video" for t in tags):
        # LLaVA-NeXT's data say <image> where a video goes.
        tags = [Tag("video", t.text, t.number) if t.kind == "image" else t for t in tags]
        shown_as: dict[Kind, Kind] = {"image": "video"}
    else:
        shown_as = {}
    queues: dict[Kind, list[Example]] = {}
    first: Example = []
    for kind in KINDS:
        own, examples = [t for t in tags if t.kind == kind], media.get(kind, [])
        if examples and not own:
            first += [part for example in examples for part in example]
            queues[kind] = []
        else:
            queues[kind] = _in_order(examples, own, kind)
    messages = []
    for turn in turns:
        parts: list[Part] = []
        if first and turn.role == "user":
            parts, first = first, []
        for piece in turn.pieces:
            if not isinstance(piece, Tag):
                parts.append(piece)
            elif piece.path is not None:
                parts += context.example(piece.kind, piece.path)
            else:
                parts += queues[shown_as.get(piece.kind, piece.kind)].pop(0)
        messages.append(Message(turn.role, tuple(parts), turn.learn, turn.calls, turn.about))
    if context.boxes is not None:
        before = [m.text for m in messages]
        messages = _with_boxes(messages, objects_of(fields), context.boxes)
        if meta.get("answers"):  # what an evaluation holds an answer against is what training would learn
            placed = dict(zip(before, (m.text for m in messages), strict=True))
            meta = {**meta, "answers": [placed.get(answer, answer) for answer in meta["answers"]]}
    return Conversation(tuple(messages), id, where, meta, tools_of(fields))


def _with_boxes(messages: list[Message], objects: list[Located], options: BoxOptions) -> list[Message]:
    placer = Placer(objects, [p.source for m in messages for p in m.parts if isinstance(p, ImagePart)], options)
    made = [
        replace(m, parts=tuple(TextPart(placer.placed(p.text)) if isinstance(p, TextPart) else p for p in m.parts))
        for m in messages
    ]
    placer.check_all_used()
    return made


def _in_order(examples: list[Example], tags: list[Tag], kind: str) -> list[Example]:
    """The media in the order of their places; numbered places name theirs."""
    if len(examples) != len(tags):
        shown = f" ({tags[0].text[:60]})" if tags else ""
        raise DataError(
            f"{len(examples)} {kind}(s) in the record, but {len(tags)} place(s) for one in its turns{shown}",
            remedy=f"name as many under {kind}s as there are places, or take the places out of the words",
            kind="placeholder-without-image" if len(tags) > len(examples) else "image-without-placeholder",
        )
    numbers = [t.number for t in tags]
    if not any(n is not None for n in numbers):
        return list(examples)
    base = min((n for n in numbers if n is not None), default=0)
    if base > 1 or sorted(n if n is not None else -1 for n in numbers) != list(range(base, base + len(examples))):
        raise DataError(
            f"the {kind}s are {len(examples)}, their places {', '.join(t.text[:40] for t in tags[:8])}",
            remedy="number each once, from 1 on, or leave the numbers out", kind="placeholder-without-image",
        )  # fmt: skip
    return [examples[cast(int, n) - base] for n in numbers]


# -- one message ------------------------------------------------------------------------------------------------------


def _turn(message: Fields, context: Context) -> Turn:
    name, calls, raw = find(message, ROLE), calls_of(message), None
    tools = isinstance(name, str) and (name in CALLS or ROLES.get(name) == "tool")
    if tools:
        raw = next((value for n in CONTENT if (value := dict.get(message, n)) is not None), None)
    if tools and (name in CALLS or isinstance(raw, dict)):
        message.read.update(CONTENT)  # an object of the tool's own
        if name in CALLS:
            return Turn("assistant", [], _learned(message, "assistant"), (*calls, *called(raw, name)))
        content: Any = json.dumps(raw, ensure_ascii=False)
    else:
        content = find(message, CONTENT)
    if content is None and calls:
        content = ""
    if name is None or content is None:
        raise missing(message, ("role and content", "from and value"), "speaker and words in a message")
    if not isinstance(name, str) or name not in ROLES:
        raise DataError(
            f"unknown role {brief(name) if not isinstance(name, str) else repr(name[:60])}",
            remedy=f"wanted one of {', '.join(ROLES)}; who else speaks is named with roles: {{{str(name)[:40]}: user}}",
            kind="unknown-role",
        )  # fmt: skip
    role = ROLES[name]
    if calls and role != "assistant":
        raise DataError(f"a {role}'s turn calls tools, and an assistant's alone may", kind="tools")
    if isinstance(content, list) and all(isinstance(p, str) for p in content):
        pieces = [p for words in content for p in said(role, words).pieces]
    elif isinstance(content, list):
        pieces = [made for part in objects(content, "content") for made in _part(part, context)]
    elif isinstance(content, dict):
        pieces = _part(Fields(content) if not isinstance(content, Fields) else content, context)
    else:
        pieces = said(role, text(content, "content")).pieces
    return Turn(role, pieces, _learned(message, role), calls, about_result(message) if role == "tool" else ())


def _part(part: Fields, context: Context) -> list[Part | Tag]:
    """One part, or as many as a video has frames. What says no type is what it names."""
    given = part.get("type")
    if given is None:
        named = [k for k, v in part.raw() if not empty(v) and (k == "text" or kind_by_name(k) in KINDS)]
        given = "text" if named == ["text"] else kind_by_name(named[0]) if len(named) == 1 else None
    if given in _TEXT:
        words = part.get("text")
        if words is None:
            raise missing(part, ("text",), "text in a part of type text")
        return said("user", text(words, "text")).pieces
    kind = _KIND_OF_TYPE.get(given) if isinstance(given, str) else None
    if kind is None:
        raise DataError(
            f"unknown part type {brief(given) if not isinstance(given, str) else repr(given[:60])}",
            remedy="wanted text, image, video or audio", kind="unknown-part",
        )  # fmt: skip
    names = dict.fromkeys((given, kind, f"{kind}_url", f"input_{kind}", "source", "path", "url", "data", "bytes"))
    source = next((part[n] for n in names if not empty(dict(part.raw()).get(n))), None)
    if source is None:
        return [Tag(kind, f"a part of type {given}")]
    if kind == "image" and isinstance(source, list):
        raise DataError("an image part names one picture, not a list", kind="wrong-type")
    return list(context.example(kind, _located(source, kind)))


def _located(source: object, kind: Kind) -> Any:
    """Of `{"url": …}` (OpenAI), `{"type": "base64", "media_type", "data"}` (Anthropic) and `{"data", "format"}`
    (OpenAI's sound) what names the medium."""
    if not isinstance(source, Fields):
        return source
    data = source.get("data")
    if isinstance(data, str) and not data.startswith("data:"):
        form = source.get("media_type") or f"{kind}/{source.get('format') or 'unknown'}"
        return f"data:{form};base64,{data}"
    return source


# -- what is learned --------------------------------------------------------------------------------------------------


def _learned(message: Fields, role: Role) -> bool:
    for name in REFUSED:
        if not empty(message.get(name)):
            raise DataError(
                f"{name} of a turn is not honoured",
                remedy="take it out, or write what is to be learned as turns of their own", kind="weight",
            )  # fmt: skip
    found = True
    for name in WEIGHTS:
        if (value := message.get(name)) is None or empty(value):
            continue
        found = _flag(name, value, role, f"take {name} out of it") and found
    return found


def _check_record_flags(fields: Fields, turns: Sequence[Turn]) -> None:
    """Flags of the whole record, or a list with one for each turn (or each of the assistant's)."""
    for name in WEIGHTS:
        if empty(value := fields.get(name)):
            continue
        answers = [t for t in turns if t.role == "assistant"]
        if not isinstance(value, list):
            listed, over = [value] * len(answers), answers
        elif len(value) in (len(turns), len(answers)):
            listed, over = value, list(turns) if len(value) == len(turns) else answers
        else:
            raise DataError(
                f"{name} lists {len(value)} for {len(turns)} turns",
                remedy="one for each turn, or for each of the assistant's", kind="weight",
            )  # fmt: skip
        for turn, item in zip(over, listed, strict=True):
            turn.learn = _flag(name, item, turn.role, "write 0 in its place") and turn.learn


def _flag(name: str, value: object, role: Role, remedy: str) -> bool:
    """Whether a turn is learned, by a flag of this name: 0 or 1, true or false. An assistant's alone may be."""
    known = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}
    found = known.get(str(value).strip().lower()) if isinstance(value, bool | int | float | str) else None
    if found is None:
        raise DataError(
            f"{name} is {brief(value)}: a turn is learned or not",
            remedy=f"write 0 or 1, or take it out; where it means something else: ignore: [{name}]", kind="weight",
        )  # fmt: skip
    learn = found != (name == "masked")
    if learn and role != "assistant" and name not in _READER_WEIGHTS:
        problem = f"{name} asks for a {role}'s turn to be learned, and an assistant's alone is"
        raise DataError(problem, remedy=remedy, kind="weight")
    return learn
