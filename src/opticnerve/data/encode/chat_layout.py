"""A conversation as its chat template writes it, and where in that text every turn stands.

A template is rendered once for each shape of conversation (roles, pictures, how many turns) with marks in place of the
words. That skeleton says what the template writes around the words, where the generation prompt of each assistant's
turn ends, and whether that prompt is the beginning of what training reads. A conversation's own text is then the
skeleton with its words in the places of the marks, or it is refused: no word is dropped, moved or rewritten unnoticed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

from jinja2 import TemplateError

from opticnerve.data.encode.chat_skeleton import MARK, Skeleton, SkeletonTurn, mark, marked, plain, text_part, trimmed
from opticnerve.language import thinking
from opticnerve.language.chat_template import CAPTION_ONLY
from opticnerve.types import ChatProcessor, Conversation, DataError, Message, TextPart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_SHAPES = 1024
# What Jinja raises, and what Python raises from within a template's expressions.
_RENDERING = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)

OTHER_TEMPLATE = "give model.language.chat_template one that keeps them"
FOLD = "write `repair: [fold-system]` beside the data's path, or give model.language.chat_template one that takes them"
NO_TOOLS = (
    "take tools and their turns out of the data, or give model.language.chat_template one that knows them (those of "
    "Qwen2.5, Qwen3 and Llama 3.1 do)"
)
THINKING = "set model.language.thinking to strip, keep or empty, or give model.language.chat_template another template"


@dataclass(frozen=True, slots=True)
class AnswerSpan:
    """An assistant's turn in a rendered text: `start` is where its generation prompt ends, `stop` where its end of
    turn ends."""

    start: int
    stop: int
    learn: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """A rendered conversation. `words`: the spans of what people said, as opposed to the template, and who said it."""

    text: str
    answers: list[AnswerSpan]
    words: list[tuple[int, int, str]]


class ChatForm:
    """What a chat template makes of conversations. Get one with `form_of`.

    Args:
        processor: of a docked model. template: Jinja.
    """

    def __init__(self, processor: Any, template: str) -> None:
        # The processor owns its forms.
        self._processor, self.template = ref(processor), template
        self.thinking = getattr(processor, "thinking", None)
        self.captions = CAPTION_ONLY in template
        self.tokenizer = processor.tokenizer
        added = [t for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        special = {*map(str, added), *self.tokenizer.all_special_tokens}
        self.special = sorted(special, key=len, reverse=True)
        media = [re.escape(t) for t in (processor.image_token, processor.audio_token) if t]
        self._media = re.compile("(?:" + "|".join([r"\s", *media]) + ")*")
        # As `sanitize_control_tokens` of transformers: white space that templates write is ordinary text.
        others = (str(t) for t in self.tokenizer.added_tokens_decoder.values() if str(t) in template)
        self._special = _spelling(self.special)
        self._control = _spelling([*self.special, *(t for t in others if not t.isspace())])
        # A special token that takes nothing of the text beside it along, to cut texts with.
        plain = [t for t in added if not (t.lstrip or t.rstrip or t.single_word or t.normalized)]
        self.separator = str(plain[0]) if plain else ""
        self.parting = set(self.tokenizer.convert_tokens_to_ids([str(t) for t in plain]))
        self.beginning = _beginning(self.tokenizer)
        self._skeletons: dict[tuple[tuple[SkeletonTurn, ...], str, bool], Skeleton | DataError] = {}

    def lay_out(self, conversation: Conversation, *, cue: bool) -> Layout:
        """Render a conversation (`cue`: with the generation prompt behind it) and find every turn in it.

        Raises:
            DataError: of kind "template": the template refuses the conversation, or drops, moves or rewrites words, or
                asks for an answer by another prompt than the one that stands before it in training.
        """
        where = conversation.where or conversation.id
        messages = tuple(m.written_out() for m in conversation.messages)
        if self.thinking == "strip":
            messages = tuple(_without_thinking(m) for m in messages)
        tools = json.dumps(conversation.tools, ensure_ascii=False) if conversation.tools else ""
        turns, words = marked(messages)
        try:
            try:
                return self._fit(self._skeleton(turns, tools, cue), turns, words, messages, tools, cue)
            except DataError as e:
                # A template may look into the words (`{% if 'x' in content %}`): the assistants' alone are marks then.
                turns, words = marked(messages, ("assistant",))
                if len(words) == len(messages) or e.remedy == NO_TOOLS:
                    raise
                return self._fit(self._new_skeleton(turns, tools, cue), turns, words, messages, tools, cue)
        except DataError as e:
            raise DataError(e.problem, where=where, remedy=e.remedy, kind="template") from None

    # -- skeletons ------------------------------------------------------------------------------------------------

    def _skeleton(self, turns: Sequence[SkeletonTurn], tools: str, cue: bool) -> Skeleton:
        key = (tuple(turns), tools, cue)
        if key not in self._skeletons:
            if len(self._skeletons) >= _MOST_SHAPES:
                self._skeletons.clear()
            try:
                self._skeletons[key] = self._new_skeleton(turns, tools, cue)
            except DataError as e:
                self._skeletons[key] = e
        found = self._skeletons[key]
        if isinstance(found, DataError):
            raise found
        return found

    def _new_skeleton(self, turns: Sequence[SkeletonTurn], tools: str, cue: bool) -> Skeleton:
        whole = self._whole([t.chat() for t in turns], tools, cue, turns[-1].said if turns else "")
        self._check_tools(tools, whole)
        pieces, order, at = [], [], 0
        starts: dict[int, int] = {}
        for match in MARK.finditer(whole):
            pieces.append(whole[at : match.start()])
            order.append(int(match[1]))
            starts.setdefault(int(match[1]), match.start())
            at = match.end()
        made = Skeleton(pieces, order, whole[at:])
        for turn in turns:
            self._check_marks(turn, order, cue)
        users = (m for t in turns if t.role == "user" for m in t.marks[-1:] if m in order)
        closing = {self._special_at(made.behind(m), behind_media=True) for m in users}
        closing |= {self.end, self.tokenizer.eos_token}
        for k, turn in enumerate(turns):
            if turn.role != "assistant" or any(m not in order for m in turn.marks):
                continue
            asked = self._render([t.chat() for t in turns[:k]], tools, True)
            if k < len(turns) - 1 and self.thinking in ("keep", "empty") and not whole.startswith(asked):
                # The template shows earlier answers without the block that an answer is asked with.
                asked = thinking.without_block(asked)
            if not whole.startswith(asked):
                if cue or not turn.learn:
                    continue  # no more than history
                remedy = NO_TOOLS if turn.calls else FOLD if any(t.role == "system" for t in turns) else OTHER_TEMPLATE
                raise _other_prompt(asked, whole, remedy)
            made.gaps[k] = whole[len(asked) : starts[turn.marks[0]]]
            after = made.behind(turn.marks[-1])
            if turn.calls:
                made.ends[k] = self._end_of_calls(after, turns[: k + 1], tools, k == len(turns) - 1, closing)
                continue
            end = self._special_at(after)
            # In between, a special token might begin the next speaker's turn: one that ends users' turns does not.
            ends = end is not None and (k == len(turns) - 1 or end in closing)
            made.ends[k] = after.index(end) + len(end) if end is not None and ends else 0
        return made

    def _end_of_calls(
        self, after: str, turns: Sequence[SkeletonTurn], tools: str, last: bool, closing: set[str | None]
    ) -> int:
        """How many letters behind the last text of a call are learned: the rest of it, and what ends its turn. That may
        be another special token than behind words (gpt-oss's `<|call|>`), but it is what ends the turn as the last."""
        found = list(self._special.finditer(after))
        if not found:
            return 0
        if last:
            return found[-1].end(1)
        alone = list(self._special.finditer(self._render([t.chat() for t in turns], tools, False)))
        return next((m.end(1) for m in found if m[1] in {*closing, alone[-1][1]}), 0)

    def _check_tools(self, tools: str, whole: str) -> None:
        """Refuse a template that does not write every tool there is: an answer would call what nobody told of."""
        for tool in json.loads(tools) if tools else ():
            if (name := str(tool["function"]["name"])) not in whole:
                raise DataError(f"the chat template writes no tools, {name[:60]} among them", remedy=NO_TOOLS)

    def _whole(self, chat: list[dict[str, Any]], tools: str, cue: bool, said: str) -> str:
        """The rendered conversation. Where the generation prompt opens or closes a think block that the template never
        writes before an answer, the last answer stands behind that prompt, if `thinking` asks for it."""
        whole = self._render(chat, tools, cue)
        if cue or not chat or chat[-1]["role"] != "assistant" or self.thinking not in ("keep", "empty"):
            return whole
        asked = self._render(chat[:-1], tools, True)
        behind = thinking.behind_cue(said, asked, self.thinking)
        if whole.startswith(asked) or behind is None:
            return whole
        last = mark(10**9)
        ended = self._render([*chat[:-1], {**chat[-1], "content": [text_part(last)]}], tools, False)
        return asked + behind + ended.partition(last)[2]

    def _check_marks(self, turn: SkeletonTurn, order: Sequence[int], cue: bool) -> None:
        missing = [m for m in turn.marks if m not in order]
        words = turn.marks[: len(turn.marks) - turn.calls]  # a call's name may stand beside its result, too
        if any(m in missing for m in turn.marks[len(words) :]):
            raise DataError("the chat template drops the assistant's calls of tools", remedy=NO_TOOLS)
        if turn.role == "assistant":
            if cue or not turn.learn:
                return  # templates that shorten their history know what they do
            if missing and len(missing) < len(turn.marks):
                raise DataError("the chat template drops what an assistant thinks", remedy=THINKING, kind="template")
            if missing:
                raise DataError("the chat template drops an assistant turn", remedy=OTHER_TEMPLATE, kind="template")
            if any(order.count(m) > 1 for m in words):
                raise DataError(
                    "the chat template writes an assistant turn twice", remedy=OTHER_TEMPLATE, kind="template"
                )
        elif missing and not self.captions:
            raise _drops(turn)

    def _special_at(self, text: str, *, behind_media: bool = False) -> str | None:
        """The special token that a text begins with, behind white space."""
        text = self._media.sub("", text, count=1) if behind_media else text.lstrip()
        return next((s for s in self.special if text.startswith(s)), None)

    def after_last_answer(self) -> str:
        """What the template writes behind the last words of an assistant."""
        chat = [SkeletonTurn("user", (("text", "q"),), ()), SkeletonTurn("assistant", (("text", mark(0)),), (0,))]
        return self._render([t.chat() for t in chat], "", False).partition(mark(0))[2]

    @cached_property
    def end(self) -> str | None:
        """The special token that ends a conversation's last turn (`<|im_end|>`, `</s>`); None where there is none."""
        return self._special_at(self.after_last_answer())

    def ends_of_turns(self) -> set[str]:
        """All special tokens that end an assistant's turn, last or not: gpt-oss has two."""
        turns, _ = marked([Message(role, (TextPart("x"),)) for role in ("user", "assistant", "user", "assistant")])
        for some in (turns, turns[:2]):  # there are templates without a second turn
            try:
                made = self._skeleton(some, "", False)
            except DataError:
                continue
            found = [self._special_at(made.behind(some[k].marks[-1])) for k, length in made.ends.items() if length]
            return {end for end in found if end is not None}
        with suppress(DataError):  # one that refuses everything still answers, up to the longest answer
            return {end for end in (self.end,) if end is not None}
        return set()

    def control_words(self, layout: Layout) -> list[tuple[int, int]]:
        """Where people's words spell a control token: a special token of the tokenizer (`<|im_end|>`), or in what is no
        answer any other token of its own that the template writes (`<think>`)."""
        found = []
        for start, stop, role in layout.words:
            spelled = self._special if role == "assistant" else self._control
            found += [m.span(1) for m in spelled.finditer(layout.text, start, stop) if m.end(1) <= stop]
        return found

    def part(self, text: str, mark: str) -> str:
        """A text with a mark behind the first letter of every control token that it spells."""
        cuts = [m.start() + 1 for m in self._control.finditer(text)]
        return mark.join(text[a:b] for a, b in pairwise([0, *cuts, len(text)]))

    # -- texts ----------------------------------------------------------------------------------------------------

    def _fit(
        self,
        skeleton: Skeleton,
        turns: Sequence[SkeletonTurn],
        words: Sequence[str],
        messages: Sequence[Message],
        tools: str,
        cue: bool,
    ) -> Layout:  # fmt: skip
        """The words of a conversation in the places of a skeleton's marks."""
        text = self._whole([plain(m) for m in messages], tools, cue, messages[-1].text if messages else "")
        first, *following = [*skeleton.pieces, skeleton.tail]
        other = DataError("the chat template writes other words around a turn", remedy=OTHER_TEMPLATE, kind="template")
        if not text.startswith(first):
            raise other
        at, spans = len(first), []
        places: dict[int, tuple[int, int]] = {}
        speaker = {m: t.role for t in turns for m in t.marks}
        for number, after in zip(skeleton.order, following, strict=True):
            form = next((f for f in trimmed(words[number]) if text.startswith(f + after, at)), None)
            if form is None:
                raise DataError(
                    f"the chat template rewrites the {speaker[number]}'s words", remedy=OTHER_TEMPLATE, kind="template"
                )
            places.setdefault(number, (at, at + len(form)))
            spans.append((at, at + len(form), speaker[number]))
            at += len(form) + len(after)
        if at != len(text):
            raise other
        for message, turn in zip(messages, turns, strict=True):
            said = (p.text.strip() for p in message.parts if isinstance(p, TextPart))
            if not turn.marks and not self.captions and any(words not in text for words in said):
                raise _drops(turn)
        answers = [
            AnswerSpan(
                places[turns[k].marks[0]][0] - len(gap),
                places[turns[k].marks[-1]][1] + skeleton.ends[k],
                messages[k].learn,
            )
            for k, gap in skeleton.gaps.items()
        ]
        return Layout(text, answers, spans)

    def _render(self, chat: list[dict[str, Any]], tools: str, cue: bool) -> str:
        processor = self._processor()
        assert processor is not None, "a form lives as long as its processor"
        given = {"tools": json.loads(tools)} if tools else {}
        try:
            return str(
                processor.apply_chat_template(chat, chat_template=self.template, add_generation_prompt=cue, **given)
            )
        except _RENDERING as e:
            system, called = any(m["role"] == "system" for m in chat), any("tool_calls" in m for m in chat)
            raise DataError(
                f"the chat template refuses this conversation: {' '.join(str(e).split()) or type(e).__name__}",
                remedy=NO_TOOLS if called or tools else FOLD if system else OTHER_TEMPLATE, kind="template",
            ) from None  # fmt: skip


def _drops(turn: SkeletonTurn) -> DataError:
    remedy = FOLD if turn.role == "system" else OTHER_TEMPLATE
    return DataError(f"the chat template drops the words of a {turn.role} turn", remedy=remedy, kind="template")


_FORMS: WeakKeyDictionary[Any, dict[tuple[str, str | None], ChatForm]] = WeakKeyDictionary()


def form_of(processor: ChatProcessor, template: str | None = None) -> ChatForm:
    """The form of a processor's own template, or of another; made once for each."""
    template = template or processor.chat_template
    forms = _FORMS.setdefault(processor, {})
    key = (template, processor.thinking)
    if key not in forms:
        forms[key] = ChatForm(processor, template)
    return forms[key]


def _spelling(words: Iterable[str]) -> re.Pattern[str]:
    """Finds every place where one of the words begins, overlapping ones too; the longest of each."""
    longest_first = sorted({w for w in words if w}, key=len, reverse=True)
    return re.compile("(?=(" + "|".join(map(re.escape, longest_first)) + "))" if longest_first else "(?!)()")


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a tokenizer writes before a text."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return list(whole[:at])


def _without_thinking(message: Message) -> Message:
    if message.role != "assistant":
        return message
    parts = tuple(TextPart(thinking.without(p.text)) if isinstance(p, TextPart) else p for p in message.parts)
    return replace(message, parts=parts)


def _other_prompt(asked: str, whole: str, remedy: str) -> DataError:
    common = next((i for i, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), len(whole))
    start = max(0, common - 20)
    said, written = (MARK.sub("…", t[start : common + 30]) for t in (asked, whole))
    thinks = thinking.OPEN in asked[start:] or thinking.OPEN in whole[start : common + 30]
    return DataError(
        f"the chat template asks for an answer with {said!r}, and in training {written!r} stands there: what is "
        "trained would not be what is asked",
        remedy=THINKING if thinks else remedy, kind="template",
    )  # fmt: skip
