"""What is trained is what is asked, for real tokenizers and real chat templates.

For every assistant's turn: the tokens of the prompt that asks for it are, one by one, the first tokens of what training
saw; all behind them up to the token that ends the turn is learned; nothing else is.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import conversations
import families
import real_tokenizers
from conversations import Sample
from families import FAMILIES, Family
from opticnerve.data.collate import Collator
from opticnerve.data.labels import IGNORE, Encoded, encode
from opticnerve.data.packing import pack
from opticnerve.inference.generate import Answerer
from opticnerve.language.chat_template import CAPTION_ONLY, NAMED, with_parts
from opticnerve.models import OpticNerveProcessor
from opticnerve.types import Conversation, DataError, Message, OpticNerveError, TextPart, ask

pytestmark = pytest.mark.slow
COUNT = 400
TRAINABLE = [name for name, family in FAMILIES.items() if not family.refused]


@pytest.fixture(scope="module")
def made() -> Iterator[Callable[[str], Any]]:
    """Family → its processor; the last few are kept, for a real tokenizer is large."""
    kept: dict[str, Any] = {}

    def make(name: str) -> Any:
        if name not in kept:
            while len(kept) > 1:
                kept.pop(next(iter(kept)))
            kept[name] = families.processor(FAMILIES[name])
        return kept[name]

    yield make
    kept.clear()


# -- the contract -------------------------------------------------------------------------------------------------


class Broken(Exception):
    """The contract does not hold for a conversation; says where."""


def examine(family: Family, proc: Any, sample: Sample) -> None:
    """The whole contract for every assistant's turn of a conversation; `Broken` where it does not hold."""
    messages = sample.conversation.messages
    turns = [i for i, m in enumerate(messages) if m.role == "assistant"]
    prompts: list[list[int]] = []
    for k, i in enumerate(turns):
        cut = replace(sample.conversation, messages=(*messages[:i], replace(messages[i], learn=True)))
        last = k == len(turns) - 1
        expected = expect(family, sample, k)
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
                if family.thinking == "opened" or (family.thinking != "words" and any(t <= j for t in sample.thinks)):
                    return  # the template rewrites its history: earlier turns stand there as nobody asks for them
                same(proc, f"turn {j} of the whole, prompt against training", prompt, whole.input_ids)
            if messages[turns[j]].learn:
                regions.append(learned_region(family, proc, whole.input_ids, len(prompt), j))
        check_labels(proc, whole, regions, from_=0, turn=k)


def expect(family: Family, sample: Sample, turn: int) -> str:
    """What becomes of the conversation that ends with that turn: "trained", "refused", or "either"."""
    if sample.system is not None and family.system != "kept":
        return "refused"
    thinks, before = turn in sample.thinks, any(t < turn for t in sample.thinks)
    match family.thinking:
        case "last":
            return "either" if before else "trained"
        case "dropped":
            return "refused" if thinks or before else "trained"
        case "opened":
            return "refused" if not thinks else ("either" if before else "trained")
        case "opened, dropped":
            return "refused"
    return "trained"


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
    allowed = [opening + wanted for opening in family.openings]
    if family.thinking == "opened":
        found = "<think>" + found
    if found not in allowed:
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


def judge(name: str, tried: list[Sample], check: Callable[[Sample], None]) -> None:
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


# -- every family ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINABLE)
def test_prompt_is_a_prefix_and_all_behind_it_is_learned(name: str, made: Callable[[str], Any]) -> None:
    family, proc = FAMILIES[name], made(name)
    judge(name, conversations.samples(COUNT), lambda sample: examine(family, proc, sample))


@pytest.mark.parametrize("name", TRAINABLE)
def test_sequences_begin_with_the_begin_token_once(name: str, made: Callable[[str], Any]) -> None:
    family, proc = FAMILIES[name], made(name)
    ids = encode(ask("Which?", answer="<think>\nhm\n</think>\n\nruby").prompt(), proc, learn=False).input_ids
    begin = proc.tokenizer.bos_token_id
    if family.bos is None:
        return
    assert ids[0] == proc.tokenizer.convert_tokens_to_ids(family.bos) == begin
    assert ids[1] != begin


@pytest.mark.parametrize("name", TRAINABLE)
def test_the_public_path_sends_the_same_prompt(name: str, made: Callable[[str], Any]) -> None:
    """`apply_chat_template(tokenize=True)`, and what `ask`, `chat` and the server send."""
    family, proc = FAMILIES[name], made(name)
    answerer = Answerer(_Somewhere(), proc)

    def check(sample: Sample) -> None:
        if sample.system is not None and family.system != "kept":
            return
        prompt = sample.conversation.prompt()
        ids = encode(prompt, proc, learn=False).input_ids
        chat = prompt.to_chat()
        public = proc.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
        row = public["input_ids"]
        equal(proc, "apply_chat_template", ids, row[0] if isinstance(row[0], list) else row)
        equal(proc, "Answerer", ids, answerer.inputs([sample.conversation])["input_ids"][0].tolist())

    judge(name, conversations.samples(40, seed=1), check)


class _Somewhere:
    """All that an `Answerer` asks of a model before it answers."""

    device = torch.device("cpu")


def equal(proc: Any, what: str, one: list[int], other: list[int]) -> None:
    same(proc, what, one, other)
    same(proc, what, other, one)


@pytest.mark.parametrize("name", TRAINABLE)
def test_batched_is_single(name: str, made: Callable[[str], Any]) -> None:
    """In the collator, in the processor, and in a batch of prompts of different lengths."""
    family, proc = FAMILIES[name], made(name)
    trained, prompts = [], []
    for sample in conversations.samples(24, seed=2):
        if expect(family, sample, sum(m.role == "assistant" for m in sample.conversation.messages) - 1) == "trained":
            trained.append(encode(sample.conversation, proc))
        if sample.system is None or family.system == "kept":
            prompts.append(sample.conversation.prompt())
    if trained:
        rows = [pack([[e]]) for e in trained]
        batch = Collator(proc)(rows)
        for i, e in enumerate(trained):
            assert batch.input_ids[i, : len(e.input_ids)].tolist() == e.input_ids
            assert batch.targets[i, : len(e.input_ids)].tolist() == [*e.labels[1:], IGNORE]
    inputs = Answerer(_Somewhere(), proc).inputs(prompts)
    for i, prompt in enumerate(prompts):
        alone = encode(prompt, proc, learn=False).input_ids
        assert inputs["input_ids"][i][inputs["attention_mask"][i].bool()].tolist() == alone


@pytest.mark.parametrize("name", TRAINABLE)
def test_saved_and_loaded_gives_the_same_tokens(name: str, tmp_path: Path) -> None:
    """Or says that it cannot, before anything is trained with it."""
    family = FAMILIES[name]
    proc = families.processor(family)
    try:
        proc.save_pretrained(tmp_path)
    except OpticNerveError:
        return
    again = OpticNerveProcessor.from_pretrained(tmp_path)
    for sample in conversations.samples(40, seed=3):
        if sample.system is not None and family.system != "kept":
            continue
        for learn in (False, True):
            talk = sample.conversation if learn else sample.conversation.prompt()
            one, other = (outcome(talk, p, learn=learn) for p in (proc, again))
            assert one == other, f"{name}, conversation {sample.conversation.id}"


def outcome(talk: Conversation, proc: Any, *, learn: bool) -> Any:
    try:
        made = encode(talk, proc, learn=learn)
    except DataError as e:
        return e.kind
    return made.input_ids, made.labels


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.refused])
def test_a_template_that_ends_no_turn_is_refused(name: str, made: Callable[[str], Any]) -> None:
    with pytest.raises(OpticNerveError):
        encode(ask("Which?", answer="ruby"), made(name))


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.system != "kept"])
def test_system_words_that_the_template_refuses_or_drops_are_told(name: str, made: Callable[[str], Any]) -> None:
    family, proc = FAMILIES[name], made(name)
    for turns in (1, 2):
        asked = (Message("user", (TextPart("Which?"),)), Message("assistant", (TextPart("ruby"),))) * turns
        talk = Conversation((Message("system", (TextPart("Be brief."),)), *asked), where="chat.jsonl:7")
        with pytest.raises(DataError) as e:
            encode(talk, proc)
        assert e.value.kind == "template"
        assert e.value.where == "chat.jsonl:7"
        assert e.value.remedy
        if family.system == "refused":
            with pytest.raises(DataError) as e:
                encode(talk.prompt(), proc, learn=False)
            assert e.value.kind == "template"


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.thinking.startswith("opened")])
def test_a_cue_that_opens_a_think_block_is_told_with_the_remedy(name: str, made: Callable[[str], Any]) -> None:
    with pytest.raises(DataError) as e:
        encode(replace(ask("Which?", answer="ruby"), where="chat.jsonl:7"), made(name))
    assert e.value.kind == "template"
    assert "thinking" in e.value.remedy
    assert str(e.value).startswith("chat.jsonl:7")


# -- templates by name ----------------------------------------------------------------------------------------------

# Whether a sequence begins with the begin token: where the tokenizer writes one by itself, or the model's own template
# does. SmolLM2's begin token opens a turn of ChatML, and gpt-oss was trained without one.
BEGINS = {
    "llama2": True, "llama3": True, "llama3.1": True, "qwen2.5": False, "qwen3": False, "gemma2": True, "gemma3": True,
    "deepseek-v3": True, "gpt-oss": False,
}  # fmt: skip
TEMPLATES = {**NAMED, "caption": CAPTION_ONLY}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", BEGINS)
def test_named_templates(name: str, template: str) -> None:
    family = Family(name, "own", ("</s>",))
    words = real_tokenizers.tokenizer(name)
    if template == "chatml" and "<|im_end|>" not in words.get_vocab():
        words.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    if words.pad_token_id is None:
        words.pad_token = words.eos_token
    end = "<|im_end|>" if template == "chatml" else words.eos_token
    family = replace(family, ends=(end,))
    words.chat_template = None
    from opticnerve.encoders.base import make_image_processor

    pictures = make_image_processor(size=8, mean=[0.5] * 3, std=[0.5] * 3)
    proc = OpticNerveProcessor(pictures, words, num_image_tokens=2, chat_template=with_parts(TEMPLATES[template]))
    begins: Counter[bool] = Counter()

    def check(sample: Sample) -> None:
        if template == "caption":  # a picture and its caption, and nothing else
            answer = sample.conversation.messages[-1]
            user = Message("user", (conversations.PICTURES[0],))
            sample = Sample(replace(sample.conversation, messages=(user, answer)))
        examine(family, proc, sample)
        ids = encode(sample.conversation, proc).input_ids
        begin = words.bos_token_id
        begins[begin is not None and ids[0] == begin] += 1
        if begin is not None and ids[1] == begin:
            raise Broken("two begin tokens")

    judge(f"{name} with {template}", conversations.samples(60, seed=4), check)
    if BEGINS[name] or words.bos_token_id is None:
        assert begins == {BEGINS[name]: 60}
