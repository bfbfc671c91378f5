"""What is trained is what is asked: the contract between training and inference, for one conversation.

For every assistant's turn: the tokens of the prompt that asks for it are, one by one, the first tokens of what training
saw; all behind them up to the token that ends the turn is learned; nothing else is. Written from that sentence alone: it
knows nothing of how labels are made.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from conversations import Sample
from families import Family
from opticnerve.data.encode.tokenize import IGNORE, Encoded, encode
from opticnerve.types import DataError, Message, TextPart


class Broken(Exception):
    """The contract does not hold for a conversation; says where."""


def examine(family: Family, proc: Any, sample: Sample) -> None:
    """The whole contract for every assistant's turn of a conversation; `Broken` where it does not hold."""
    if proc.thinking == "strip":
        sample = without_thoughts(sample)
    messages = sample.conversation.messages
    turns = [i for i, m in enumerate(messages) if m.role == "assistant"]
    prompts: list[list[int]] = []
    for k, i in enumerate(turns):
        cut = replace(sample.conversation, messages=(*messages[:i], replace(messages[i], learn=True)))
        last = k == len(turns) - 1
        expected = expect(family, sample, k, proc.thinking)
        try:
            prompts.append(encode(cut.prompt(), proc, learn=False).input_ids)
        except DataError as e:
            if expected == "refused" and e.kind == "template":
                return  # what cannot be asked is refused in training, too: tested apart
            raise Broken(f"turn {k} cannot be asked: {e}") from e
        try:
            whole = encode(cut, proc)
        except DataError as e:
            if e.kind == "template" and expected in ("refused", "either"):
                continue
            raise Broken(f"turn {k} is refused: {e}") from e
        if expected == "refused":
            raise Broken(f"turn {k} is trained on, and ought to be refused:\n{show(proc, whole.input_ids)}")
        same(proc, f"turn {k}, prompt against training", prompts[-1], whole.input_ids)
        region = learned_region(family, proc, whole.input_ids, len(prompts[-1]), k)
        whole_words(family, proc, whole.input_ids[region.start : region.stop - 1], messages[i].text, k)
        found_words(proc, prompts[-1], messages[:i])
        if not last:
            check_labels(proc, whole, [region], from_=region.start, turn=k)
            continue
        regions = [region]
        for j, prompt in enumerate(prompts[:-1]):
            if whole.input_ids[: len(prompt)] != prompt:
                if family.thinking != "words":
                    # The template writes earlier answers without the think block that the last one has: as history
                    # they stand there, not as they were asked for. The last turn alone is held to the contract.
                    check_labels(proc, whole, [region], from_=region.start, turn=k)
                    return
                same(proc, f"turn {j} of the whole, prompt against training", prompt, whole.input_ids)
            if messages[turns[j]].learn:
                regions.append(learned_region(family, proc, whole.input_ids, len(prompt), j))
        check_labels(proc, whole, regions, from_=0, turn=k)


def expect(family: Family, sample: Sample, turn: int, mode: str | None = None) -> str:
    """What becomes of the conversation that ends with that turn: "trained", "refused", or "either".

    `mode`: the processor's `thinking`, which settles what happens to the blocks of a family that knows them.
    """
    if sample.system is not None and family.system != "kept":
        return "refused"
    thinks, before = turn in sample.thinks, any(t < turn for t in sample.thinks)
    if family.thinking == "words" or mode == "strip":
        return "trained"
    if mode == "keep":
        return "either" if before or (thinks and "dropped" in family.thinking) else "trained"
    if mode == "empty":
        return "either" if thinks or before else "trained"
    match family.thinking:
        case "last":
            # Asked behind an empty block, or behind none: the recipe's `thinking` decides between the two.
            return "either" if thinks or before else "trained"
        case "dropped":
            # An earlier block may stand in a turn that is not learned: history loses it in asking, too.
            return "refused" if thinks else ("either" if before else "trained")
        case "opened":
            # Earlier answers without a block do not continue their prompts, either.
            return "refused" if not thinks else ("either" if turn else "trained")
    return "refused"


def without_thoughts(sample: Sample) -> Sample:
    messages = tuple(
        replace(m, parts=(TextPart(m.text.partition("</think>")[2].lstrip()),)) if "</think>" in m.text else m
        for m in sample.conversation.messages
    )
    return Sample(replace(sample.conversation, messages=messages))


def same(proc: Any, what: str, prompt: list[int], whole: list[int]) -> None:
    """The prompt is a prefix of the whole, token by token."""
    for i, (a, b) in enumerate(zip(prompt, whole, strict=False)):
        if a != b:
            names = proc.tokenizer.convert_ids_to_tokens([a, b])
            raise Broken(
                f"{what}: token {i} of {len(prompt)} differs: asked {names[0]!r}, trained {names[1]!r}\n"
                f"  asked:   {show(proc, prompt[:i])} >>> {show(proc, prompt[i : i + 6])}\n"
                f"  trained: {show(proc, whole[:i])} >>> {show(proc, whole[i : i + 6])}"
            )
    if len(prompt) > len(whole):
        raise Broken(f"{what}: the prompt is longer than what training saw")


def learned_region(family: Family, proc: Any, ids: list[int], start: int, turn: int) -> range:
    """From the prompt's end to the first token behind it that ends a turn, that included."""
    ends = set(proc.tokenizer.convert_tokens_to_ids(list(family.ends)))
    for i in range(start, len(ids)):
        if ids[i] in ends:
            return range(start, i + 1)
    raise Broken(f"turn {turn} has no end of turn: {show(proc, ids[start:])}")


def check_labels(proc: Any, encoded: Encoded, regions: list[range], *, from_: int, turn: int) -> None:
    """Exactly these tokens are learned (of those from a place on), each as itself."""
    learned = {i for region in regions for i in region}
    for i in range(from_, len(encoded.input_ids)):
        wanted = encoded.input_ids[i] if i in learned else IGNORE
        if encoded.labels[i] != wanted:
            token = proc.tokenizer.convert_ids_to_tokens(encoded.input_ids[i])
            what = "is not learned" if i in learned else "is learned"
            if encoded.labels[i] not in (IGNORE, encoded.input_ids[i]):
                what = f"has another token's label, {encoded.labels[i]}"
            raise Broken(
                f"turn {turn}: token {i} {token!r} {what}: {show(proc, encoded.input_ids[max(0, i - 12) : i])} >>> "
                f"{show(proc, encoded.input_ids[i : i + 6])}"
            )


def whole_words(family: Family, proc: Any, ids: list[int], answer: str, turn: int) -> None:
    """The learned tokens say the answer's words, and only what the template opens an answer with before them."""
    found, wanted = letters(decoded(proc, ids)), letters(answer)
    openings = ("", *family.openings)
    if family.thinking != "words":
        # An empty block; or the prompt has opened the block that the answer goes on with, or closes at once.
        openings = (*openings, "<think></think>", "</think>")
        wanted, found = wanted.removeprefix("<think>"), found.removeprefix("<think>") if "<think>" in answer else found
    if found not in [opening + wanted for opening in openings]:
        raise Broken(f"turn {turn}: learned words {found!r} are not the answer's {wanted!r}")


def found_words(proc: Any, ids: list[int], messages: tuple[Message, ...]) -> None:
    """All that system and user say stands in the prompt, in order."""
    text, here = letters(decoded(proc, ids)), 0
    for message in messages:
        for part in message.parts if message.role != "assistant" else ():
            if isinstance(part, TextPart):
                here = text.find(letters(part.text), here)
                if here < 0:
                    raise Broken(f"the words {part.text!r} of a {message.role} turn are not in the prompt: {text!r}")
                here += len(letters(part.text))


def letters(text: str) -> str:
    """Without white space (templates trim), composed (Qwen's tokenizers compose); SentencePiece has `▁` for a space."""
    return unicodedata.normalize("NFC", "".join(text.replace("▁", " ").split()))


def decoded(proc: Any, ids: list[int]) -> str:
    return str(proc.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def show(proc: Any, ids: list[int]) -> str:
    return " ".join(map(repr, proc.tokenizer.convert_ids_to_tokens(ids[-40:])))


def scorer(name: str, tried: Sequence[Sample], check: Callable[[Sample], None]) -> None:
    """Try all; fail with how many broke, and the first few."""
    broken: list[str] = []
    for sample in tried:
        try:
            check(sample)
        except Broken as e:
            chat = [(m.role, m.learn, [p.text if isinstance(p, TextPart) else "<picture>" for p in m.parts])
                    for m in sample.conversation.messages]  # fmt: skip
            broken.append(f"conversation {sample.conversation.id}: {e}\n  {chat}")
    if broken:
        head = f"{name}: {len(broken)} of {len(tried)} conversations broke"
        pytest.fail("\n\n".join([head, *broken[:4]]), pytrace=False)
