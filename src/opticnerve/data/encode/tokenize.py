"""From a conversation to tokens and labels: what the model reads, and which tokens it learns.

What is trained is what is asked: the tokens of an answer's prompt are the first tokens of the sample, and every token
behind them is learned, up to the one that ends the assistant's turn. A conversation is tokenised as one text; where its
tokens would not begin with those of a prompt (a line break at the prompt's end and one at the answer's beginning make
one token), it is cut at the prompt's end, in training as in asking.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from opticnerve.data.encode.chat_layout import ChatForm, Layout, form_of
from opticnerve.data.media.audio import open_audio
from opticnerve.data.media.files import errors_at
from opticnerve.data.media.open import image_size
from opticnerve.types import AudioPart, ChatProcessor, Conversation, DataError, ImagePart, OpticNerveError

IGNORE = -100


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample as the model gets it. `labels[i]` is `input_ids[i]` where it is learned, -100 elsewhere
    (unshifted). `questions`: for each picture the words of its turn, where a Q-Former reads them. `control_words`:
    what people wrote that spells a control token."""

    input_ids: list[int]
    labels: list[int]
    images: list[ImagePart]
    id: str = ""
    where: str = ""
    media_end: int = 0
    audios: list[AudioPart] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    control_words: list[str] = field(default_factory=list)

    @property
    def supervised(self) -> int:
        return sum(label != IGNORE for label in self.labels)


def encode(
    conversation: Conversation,
    processor: ChatProcessor,
    *,
    template: str | None = None,
    max_length: int | None = None,
    learn: bool = True,
    sanitize_control_tokens: bool | None = None,
) -> Encoded:
    """Render, tokenise once, label every assistant turn, and expand pictures into placeholders.

    Args:
        processor: an `OpticNerveProcessor` (its tokenizer must be a fast one, for offsets).
        template: a Jinja template instead of the processor's.
        max_length: longest allowed sample, in tokens.
        learn: False for a prompt: nothing is labelled, and the template's generation prompt ends it.
        sanitize_control_tokens: words such as `<|im_end|>` that people wrote stay words; the processor's own choice
            by default.

    Raises:
        DataError: nothing to learn from, too long, placeholders and pictures disagree, or a template that refuses the
            conversation, drops words, or asks otherwise than it trains; names the sample.
        OpticNerveError: the template never ends an assistant's turn, or the tokenizer has no offsets.
    """
    check_fast(processor)
    where = conversation.where or conversation.id
    with errors_at(where):
        _check_placeholders(conversation, processor)
        form = form_of(processor, template)
        layout = form.lay_out(conversation, cue=not learn)
        if learn:
            end_of_turn(processor, template)
        if sanitize_control_tokens is None:
            sanitize_control_tokens = processor.sanitize_control_tokens
        spelled = form.control_words(layout)
        # A cut within its letters keeps a word from being a token.
        cuts = {start + 1 for start, _ in spelled} if sanitize_control_tokens else set()
        ids, labels = _tokenise(layout, cuts, form)
        if not learn:
            labels = [IGNORE] * len(ids)
        ids, labels, media_end = expand(ids, labels, conversation, processor)
        if max_length is not None and len(ids) > max_length:
            raise DataError(
                f"{len(ids)} tokens are more than max_length {max_length}", kind="too-long",
                remedy="raise max_length, use fewer visual tokens, or shorten the text",
            )  # fmt: skip
        if learn and all(label == IGNORE for label in labels):
            raise DataError("nothing to learn from: no token is an assistant's", kind="no-assistant-turn")
        questions = picture_questions(conversation) if processor.reads_questions else []
        control_words = [layout.text[start:stop] for start, stop in spelled]
        return Encoded(
            ids, labels, conversation.images, conversation.id, where, media_end, conversation.audios, questions,
            control_words,
        )  # fmt: skip


def check_fast(processor: ChatProcessor) -> None:
    """Raises OpticNerveError: a slow tokenizer, which gives no offsets."""
    if not processor.tokenizer.is_fast:
        raise OpticNerveError(
            f"{type(processor.tokenizer).__name__} gives no character offsets; use its fast form (tokenizer.json)",
            kind="unsupported",
        )


def media_blocks(conversation: Conversation, processor: ChatProcessor) -> dict[str, list[list[int]]]:
    """By placeholder word, the tokens that stand for each picture (or sound) of the conversation, in order.

    Raises:
        DataError: the model takes no pictures (or no sound).
    """
    where = conversation.where or conversation.id
    blocks: dict[str, list[list[int]]] = {}
    if images := conversation.images:
        if processor.image_token is None:
            raise DataError(
                "a sample with a picture, but the model has no vision encoder", where=where, kind="modality"
            )
        sized = processor.counts_by_size
        sizes = [image_size(i.source, where=where) if sized else (0, 0) for i in images]
        blocks[processor.image_token] = [
            processor.image_ids(*size, image.pool) for image, size in zip(images, sizes, strict=True)
        ]
    if audios := conversation.audios:
        if processor.audio_token is None:
            raise DataError("a sample with sound, but the model has no audio encoder", where=where, kind="modality")
        rate = processor.feature_extractor.sampling_rate
        lengths = [len(open_audio(a.source, where=where, rate=rate)) for a in audios]
        number = processor.audio_token_id or 0
        blocks[processor.audio_token] = [[number] * processor.audio_placeholders(n) for n in lengths]
    return blocks


def picture_questions(conversation: Conversation) -> list[str]:
    """For each picture the words of the turn that shows it: what an instruction-aware Q-Former reads."""
    return [m.text.strip() for m in conversation.messages for p in m.parts if isinstance(p, ImagePart)]


def end_of_turn(processor: ChatProcessor, template: str | None = None) -> str:
    """The special token that a template writes after an assistant's words (`<|im_end|>`, `</s>`, `<end_of_turn>`).

    Raises:
        OpticNerveError: there is none, so that a trained model would never stop.
    """
    form = form_of(processor, template)
    if form.end is None:
        raise OpticNerveError(
            f"the chat template ends an assistant's turn with {form.after_last_answer()[:20]!r}, which starts with no "
            "special token: a model trained so would never stop. Write {{ eos_token }} after the assistant's content",
            kind="unsupported",
        )
    return form.end


def _placeholder_ids(processor: ChatProcessor) -> dict[str, int]:
    pairs = ((processor.image_token, processor.image_token_id), (processor.audio_token, processor.audio_token_id))
    return {token: number for token, number in pairs if token is not None and number is not None}


def _check_placeholders(conversation: Conversation, processor: ChatProcessor) -> None:
    for message in conversation.messages:
        for token in _placeholder_ids(processor):
            if token in message.text:
                kind = "picture" if token == processor.image_token else "sound"
                raise DataError(
                    f"the text of a {message.role} turn holds {token!r} where there is no {kind}",
                    remedy=f"give the {kind} as a part of its own, or change the text",
                    kind="placeholder-without-image",
                )  # fmt: skip


def _tokenise(layout: Layout, cuts: set[int], form: ChatForm) -> tuple[list[int], list[int]]:
    """Token ids of a rendered text, and their labels."""
    text = layout.text
    ids, offsets = tokens_of(text, cuts, form)
    begins: list[int] = []
    for answer in layout.answers:
        # A special token parts a text: what stands before the last one is the same tokens in the prompt.
        known = range(begins[-1] if begins else 0, len(ids))
        parted = [i for i in known if ids[i] in form.parting and offsets[i][1] <= answer.start]
        head = parted[-1] if parted and not cuts else 0
        start = offsets[head][0] if head else 0
        prompt, _ = tokens_of(text[start : answer.start], cuts, form, begins=head == 0)
        if ids[head : head + len(prompt)] != prompt:
            cuts.add(answer.start)
            ids, offsets = tokens_of(text, cuts, form)
            head, (prompt, _) = 0, tokens_of(text[: answer.start], cuts, form)
        begins.append(head + len(prompt))
    labels = [IGNORE] * len(ids)
    for answer, begin in zip(layout.answers, begins, strict=True):
        if not answer.learn:
            continue
        for i in range(begin, len(ids)):
            start, stop = offsets[i]
            # Tokenizers that trim their offsets leave a token of white space without width, at its end.
            if start > answer.stop or (start == answer.stop < stop):
                break
            if outside := text[answer.stop : stop].strip():
                raise DataError(
                    f"the tokenizer joins {outside!r} of the template to the assistant's words in one token",
                    kind="template", remedy="end the template's turns with a special token",
                )  # fmt: skip
            labels[i] = ids[i]
            if start < stop and stop >= answer.stop:
                break
    return ids, labels


def tokens_of(
    text: str, cuts: set[int], form: ChatForm, *, begins: bool = True
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a text (`begins`: and what the tokenizer writes before one), and their offsets; no token crosses a
    cut. The tokenizer is a fast one (`check_fast`)."""
    tokenizer = form.tokenizer
    bos = tokenizer.bos_token
    ids = list(form.beginning) if begins and not (bos is not None and text.startswith(bos)) else []
    offsets = [(0, 0)] * len(ids)
    for start, stop in pairwise([0, *sorted(c for c in cuts if 0 < c < len(text)), len(text)]):
        # Behind a special token a tokenizer goes on within a text: it writes no first space.
        mark = form.separator if start else ""
        out = tokenizer(
            mark + text[start:stop], return_offsets_mapping=True, add_special_tokens=False, verbose=False
        )  # fmt: skip
        skip, shift = bool(mark), start - len(mark)
        ids += out["input_ids"][skip:]
        offsets += [(a + shift, b + shift) for a, b in out["offset_mapping"][skip:]]
    return ids, offsets


def expand(
    ids: list[int], labels: list[int], conversation: Conversation, processor: ChatProcessor
) -> tuple[list[int], list[int], int]:
    """Each placeholder becomes as many of it as its picture takes, with the words among them; and where the last one
    ends.

    Raises:
        DataError: as `media_blocks`; or placeholders and media disagree.
    """
    blocks = media_blocks(conversation, processor)
    wanted = {number: iter(blocks.get(token, ())) for token, number in _placeholder_ids(processor).items()}
    for token, number in _placeholder_ids(processor).items():
        given, written = len(blocks.get(token, ())), ids.count(number)
        if given != written:
            raise DataError(f"{given} {token} in the sample, {written} in the rendered chat template", kind="template")
    if not blocks:
        return ids, labels, 0
    out_ids: list[int] = []
    out_labels: list[int] = []
    media_end = 0
    for number, label in zip(ids, labels, strict=True):
        if number not in wanted:
            out_ids.append(number)
            out_labels.append(label)
            continue
        block = next(wanted[number])
        out_ids += block
        out_labels += [IGNORE] * len(block)
        media_end = len(out_ids)
    return out_ids, out_labels, media_end
