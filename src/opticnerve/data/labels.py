"""From a conversation to tokens and labels: what the model reads, and which tokens it learns.

Labels are character spans of the rendered template, mapped to tokens by the tokenizer's offsets. Nothing is tokenised
in pieces, so no template, merge rule or special token can shift a label (the bug of re-tokenising and adding lengths).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from opticnerve.data.audio import open_audio
from opticnerve.data.images import image_size
from opticnerve.types import AudioPart, Conversation, DataError, ImagePart, OpticNerveError, TextPart

IGNORE = -100
# Characters of Unicode's private use area: no template, no tokenizer and no text means anything by them.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample as the model gets it. `labels[i]` is `input_ids[i]` where it is learned, -100 elsewhere
    (unshifted). `questions`: for each picture the words of its turn, where a Q-Former reads them."""

    input_ids: list[int]
    labels: list[int]
    images: list[ImagePart]
    id: str = ""
    where: str = ""
    media_end: int = 0
    audios: list[AudioPart] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)

    @property
    def supervised(self) -> int:
        return sum(label != IGNORE for label in self.labels)


def encode(
    conversation: Conversation,
    processor: Any,
    *,
    template: str | None = None,
    max_length: int | None = None,
    learn: bool = True,
) -> Encoded:
    """Render, expand pictures into placeholders, tokenise once, and label every assistant turn.

    Args:
        processor: an `OpticNerveProcessor` (its tokenizer must be a fast one, for offsets).
        template: a Jinja template instead of the processor's.
        max_length: longest allowed sample, in tokens.
        learn: False for a prompt: nothing is labelled, and the template's generation prompt ends it.

    Raises:
        DataError: nothing to learn from, too long, placeholders and pictures disagree, or a template that rewrites the
            assistant's words; names the sample.
        OpticNerveError: the template never ends an assistant's turn, or the tokenizer has no offsets.
    """
    tokenizer = processor.tokenizer
    if not tokenizer.is_fast:
        raise OpticNerveError(
            f"{type(tokenizer).__name__} gives no character offsets; use its fast form (tokenizer.json)"
        )
    template = template or processor.chat_template
    where = conversation.where or conversation.id
    _check_placeholders(conversation, processor, where)
    text = render(conversation, processor, template, generation_prompt=not learn)
    spans = _answer_spans(conversation, text, processor, template, where) if learn else []
    blocks = media_blocks(conversation, processor)
    text, spans = _expand(text, spans, blocks, where)
    starts_itself = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    out = tokenizer(text, return_offsets_mapping=True, add_special_tokens=not starts_itself, verbose=False)
    ids, offsets = out["input_ids"], out["offset_mapping"]
    labels = _label(ids, offsets, spans, text, where)
    if max_length is not None and len(ids) > max_length:
        raise DataError(
            f"{len(ids)} tokens are more than max_length {max_length}", where=where, kind="too-long",
            remedy="raise max_length, use fewer visual tokens, or shorten the text",
        )  # fmt: skip
    if learn and all(label == IGNORE for label in labels):
        raise DataError("nothing to learn from: no token is an assistant's", where=where, kind="no-assistant-turn")
    media_end = 0
    for token, number in _placeholder_ids(processor).items():
        wanted, found = sum(blocks.get(token, ())), ids.count(number)
        if wanted != found:
            raise DataError(
                f"{len(blocks.get(token, ()))} {token} make {wanted} placeholders, the tokens hold {found}",
                where=where, kind="placeholder-without-image",
            )  # fmt: skip
        media_end = max(media_end, len(ids) - ids[::-1].index(number) if found else 0)
    questions = picture_questions(conversation) if processor.reads_questions else []
    return Encoded(ids, labels, conversation.images, conversation.id, where, media_end, conversation.audios, questions)


def media_blocks(conversation: Conversation, processor: Any) -> dict[str, list[int]]:
    """By placeholder word, how many of it each picture (or sound) of the conversation takes, in order.

    Raises:
        DataError: the model takes no pictures (or no sound).
    """
    where = conversation.where or conversation.id
    blocks: dict[str, list[int]] = {}
    if images := conversation.images:
        if processor.image_token is None:
            raise DataError("a sample with a picture, but the model has no eye", where=where, kind="modality")
        sized = processor.counts_by_size
        sizes = [image_size(i.source, where=where) if sized else (0, 0) for i in images]
        blocks[processor.image_token] = [processor.image_placeholders(*s) for s in sizes]
    if audios := conversation.audios:
        if processor.audio_token is None:
            raise DataError("a sample with sound, but the model has no ear", where=where, kind="modality")
        rate = processor.feature_extractor.sampling_rate
        blocks[processor.audio_token] = [
            processor.audio_placeholders(len(open_audio(a.source, where=where, rate=rate))) for a in audios
        ]
    return blocks


def picture_questions(conversation: Conversation) -> list[str]:
    """For each picture the words of the turn that shows it: what an instruction-aware Q-Former reads."""
    return [m.text.strip() for m in conversation.messages for p in m.parts if isinstance(p, ImagePart)]


def _placeholder_ids(processor: Any) -> dict[str, int]:
    pairs = ((processor.image_token, processor.image_token_id), (processor.audio_token, processor.audio_token_id))
    return {token: number for token, number in pairs if token is not None}


def render(conversation: Conversation, processor: Any, template: str, *, generation_prompt: bool = False) -> str:
    """A conversation as the template writes it, a placeholder word where a picture stands."""
    chat = [
        {"role": m["role"], "content": [p if p["type"] == "text" else {"type": p["type"]} for p in m["content"]]}
        for m in conversation.to_chat()
    ]
    return str(processor.apply_chat_template(chat, chat_template=template, add_generation_prompt=generation_prompt))


def _check_placeholders(conversation: Conversation, processor: Any, where: str) -> None:
    for message in conversation.messages:
        for token in _placeholder_ids(processor):
            if token in message.text:
                kind = "picture" if token == processor.image_token else "sound"
                raise DataError(
                    f"the text of a {message.role} turn holds {token!r} where there is no {kind}",
                    remedy=f"give the {kind} as a part of its own, or change the text",
                    where=where, kind="placeholder-without-image",
                )  # fmt: skip


def _answer_spans(
    conversation: Conversation, text: str, processor: Any, template: str, where: str
) -> list[tuple[int, int]]:
    """Character spans of each assistant's words with the end-of-turn token behind them, in the rendered text."""
    turns = [m for m in conversation.messages if m.role == "assistant"]
    answers = [m.text for m in turns]
    end = end_of_turn(processor, template)
    marked = render(_mark(conversation), processor, template)
    pieces = _split_at_marks(marked, len(answers))
    if pieces is None:
        raise DataError("the chat template drops an assistant turn", where=where, kind="template")
    spans, here = [], len(pieces[0])
    if not text.startswith(pieces[0]):
        raise DataError(
            "the chat template writes other words around this assistant's turn", where=where, kind="template"
        )
    for turn, answer, after in zip(turns, answers, pieces[1:], strict=True):
        # Many templates trim what the assistant says; no other change of its words can be learned from.
        for said in dict.fromkeys((answer, answer.strip(), answer.lstrip(), answer.rstrip())):
            if text.startswith(said + after, here):
                break
        else:
            raise DataError(
                "the chat template rewrites the assistant's words", where=where, kind="template",
                remedy="give model.language.chat_template one that keeps them",
            )  # fmt: skip
        stop = here + len(said)
        tail = after[: after.find(end) + len(end)] if after.lstrip().startswith(end) else ""
        if turn.learn and (said or tail):
            spans.append((here, stop + len(tail)))
        here = stop + len(after)
    return spans


def _mark(conversation: Conversation) -> Conversation:
    """The same conversation with a mark in place of each assistant's words."""
    messages, count = [], 0
    for message in conversation.messages:
        if message.role == "assistant":
            message = type(message)("assistant", (TextPart(f"{_OPEN}{count}{_CLOSE}"),))
            count += 1
        messages.append(message)
    return Conversation(tuple(messages), conversation.id, conversation.where)


def _split_at_marks(marked: str, count: int) -> list[str] | None:
    pieces = []
    for k in range(count):
        before, found, marked = marked.partition(f"{_OPEN}{k}{_CLOSE}")
        if not found:
            return None
        pieces.append(before)
    return [*pieces, marked]


def end_of_turn(processor: Any, template: str) -> str:
    """The special token that a template writes after an assistant's words (`<|im_end|>`, `</s>`, `<end_of_turn>`).

    Raises:
        OpticNerveError: there is none, so that a trained model would never stop.
    """
    # The last turn alone: in between, the first special token might belong to the next speaker.
    from opticnerve.types import ask

    probe = render(_mark(ask("q", answer="a")), processor, template)
    after = probe.partition(_CLOSE)[2].lstrip()
    tokenizer = processor.tokenizer
    special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special} | set(tokenizer.all_special_tokens)
    found = [s for s in special if after.startswith(s)]
    if not found:
        raise OpticNerveError(
            f"the chat template ends an assistant's turn with {after[:20]!r}, which starts with no special token: "
            f"a model trained so would never stop. Write {{{{ eos_token }}}} after the assistant's content"
        )
    return max(found, key=len)


def _expand(
    text: str, spans: list[tuple[int, int]], blocks: dict[str, list[int]], where: str
) -> tuple[str, list[tuple[int, int]]]:
    """Each placeholder word becomes as many of it as its picture takes; spans behind it move along."""
    for token, counts in blocks.items():
        pieces = text.split(token)
        if len(pieces) != len(counts) + 1:
            raise DataError(
                f"{len(counts)} {token} in the sample, {len(pieces) - 1} in the rendered chat template", where=where,
                kind="template",
            )  # fmt: skip
        starts, at = [], 0
        for piece in pieces[:-1]:
            starts.append(at + len(piece))
            at = starts[-1] + len(token)
        grows = [(start, (count - 1) * len(token)) for start, count in zip(starts, counts, strict=True)]
        spans = [tuple(x + sum(g for s, g in grows if s < x) for x in span) for span in spans]  # type: ignore[misc]
        text = "".join(p + token * n for p, n in zip(pieces, [*counts, 0], strict=True))
    return text, spans


def _label(
    ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]], text: str, where: str
) -> list[int]:
    labels = [IGNORE] * len(ids)
    k = 0
    for i, (start, stop) in enumerate(offsets):
        while k < len(spans) and (spans[k][1] < start or spans[k][1] == start < stop):
            k += 1
        if k == len(spans):
            break
        a, b = spans[k]
        if start == stop:
            # Tokenizers that trim their offsets leave a token of white space without width, at its end.
            labels[i] = ids[i] if a < start else IGNORE
            continue
        inside, outside = text[max(a, start) : min(b, stop)], text[start:a] + text[b:stop]
        # Some special tokens take the white space behind them along: what is left of the words begins after it.
        if stop <= a or (outside.strip() and not inside.strip()):
            continue
        if outside.strip():
            raise DataError(
                f"the tokenizer joins {outside!r} of the template to the assistant's words in one token", where=where,
                kind="template",
            )  # fmt: skip
        labels[i] = ids[i]
    return labels
