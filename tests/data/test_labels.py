"""Invariant 1: the labelled spans of a conversation decode to exactly the assistant's words, for every chat template."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import tiny
from errors import refused
from opticnerve.data.encode.tokenize import IGNORE, Encoded, encode, end_of_turn
from opticnerve.encoders.base import make_image_processor
from opticnerve.language.chat_template import CAPTION_ONLY, CHATML, PLAIN_CHAT, with_parts
from opticnerve.models import OpticNerveProcessor
from opticnerve.types import Conversation, DataError, ImagePart, Message, TextPart, ask

FOLDER = Path(__file__).parent.parent / "templates"


@dataclass(frozen=True)
class Case:
    """A template as its model ships it; `end` is what is learned behind the words, `trims` what it does to them."""

    template: str
    bos: str | None
    eos: str
    end: str
    trims: bool = False
    system: bool = True
    block: str = ""  # what it writes between its generation prompt and the last answer


def shipped(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


CASES = {
    "smollm2": Case(shipped("smollm2"), "<|im_start|>", "<|im_end|>", "<|im_end|>"),
    "qwen2.5": Case(shipped("qwen2.5"), None, "<|im_end|>", "<|im_end|>"),
    "qwen3": Case(shipped("qwen3"), None, "<|im_end|>", "<|im_end|>", block="<think>\n\n</think>\n\n"),
    "llama-2": Case(shipped("llama-2"), "<s>", "</s>", " </s>", trims=True),
    "llama-3": Case(shipped("llama-3"), "<|begin_of_text|>", "<|endoftext|>", "<|eot_id|>", trims=True),
    "mistral-v0.3": Case(shipped("mistral-v0.3"), "<s>", "</s>", "</s>", trims=True, system=False),
    "gemma": Case(shipped("gemma"), "<s>", "</s>", "<end_of_turn>", trims=True, system=False),
    "phi-3": Case(shipped("phi-3"), "<s>", "<|endoftext|>", "<|end|>"),
    "vicuna": Case(shipped("vicuna"), "<s>", "</s>", "</s>", trims=True),
    "zephyr": Case(shipped("zephyr"), "<s>", "</s>", "</s>"),
    "indented": Case(shipped("indented"), "<s>", "</s>", "</s>"),
    "chatml": Case(CHATML, None, "<|im_end|>", "<|im_end|>"),
    "plain chat": Case(PLAIN_CHAT, None, "<|endoftext|>", "<|endoftext|>"),
    "caption only": Case(CAPTION_ONLY, None, "<|endoftext|>", "<|endoftext|>"),
}
PROCESSORS: dict[tuple[str, str], OpticNerveProcessor] = {}


def processor(name: str = "chatml", kind: str = "byte-level", tokens: int = 3) -> OpticNerveProcessor:
    if (name, kind) not in PROCESSORS:
        case = CASES[name]
        words = tiny.tokenizer(kind, bos=case.bos, eos=case.eos, chat_template=case.template)
        pictures = make_image_processor(size=32, mean=[0.5] * 3, std=[0.5] * 3)
        PROCESSORS[name, kind] = OpticNerveProcessor(pictures, words, num_image_tokens=tokens)
    return PROCESSORS[name, kind]


def learned(encoded: Encoded, processor: Any) -> list[str]:
    """What the labelled runs say, special tokens included."""
    runs: list[list[int]] = []
    for i, label in enumerate(encoded.labels):
        if label == IGNORE:
            continue
        assert label == encoded.input_ids[i]
        if i and encoded.labels[i - 1] != IGNORE:
            runs[-1].append(label)
        else:
            runs.append([label])
    return [processor.tokenizer.decode(r, skip_special_tokens=False) for r in runs]


def turns(*texts: Any, system: str | None = None) -> Conversation:
    """user, assistant, user, …; a text, or a list of texts and pictures."""
    messages = [] if system is None else [Message("system", (TextPart(system),))]
    for i, text in enumerate(texts):
        parts = text if isinstance(text, list) else [text]
        messages.append(
            Message("assistant" if i % 2 else "user", tuple(TextPart(p) if isinstance(p, str) else p for p in parts))
        )
    return Conversation(tuple(messages), id="sample 7", where="chat.jsonl:7")


def check(conversation: Conversation, name: str, kind: str) -> Encoded:
    """Encode, and compare each labelled run with the words that the assistant says."""
    case, proc = CASES[name], processor(name, kind)
    encoded = encode(conversation, proc)
    answers = [m.text for m in conversation.messages if m.role == "assistant"]
    wanted = [(a.strip() if case.trims else a) + case.end for a in answers]
    wanted[-1] = case.block + wanted[-1]
    found = learned(encoded, proc)
    assert len(found) == len(wanted)
    for said, want in zip(found, wanted, strict=True):
        # A space of the template may share its token with the first word; SentencePiece decoders drop a first space.
        extra = said.removesuffix(want.lstrip())
        assert said.endswith(want.lstrip())
        assert not extra.strip(), f"{extra!r} is not the assistant's"
        if kind.startswith("byte-level"):
            assert said.endswith(want)
            assert len(said) <= len(want) + 1
    return encoded


ONE = ImagePart(tiny.picture(1))
TWO = ImagePart(tiny.picture(2))


@pytest.mark.parametrize("kind", tiny.TOKENIZERS)
@pytest.mark.parametrize("name", CASES)
class TestEveryTemplateAndTokenizer:
    def test_one_turn(self, name: str, kind: str) -> None:
        check(turns("what colour is it?", "It's red."), name, kind)

    def test_several_turns_with_words_of_the_template(self, name: str, kind: str) -> None:
        conversation = turns("user", "assistant", "USER: is it?", "ASSISTANT: user\nmodel", "It's red.", "It's red.")
        check(conversation, name, kind)

    def test_pictures_anywhere(self, name: str, kind: str) -> None:
        conversation = turns(
            [ONE, "what is this?"], "a dog", ["compare", TWO, "and", ONE, "please"], "both are dogs\nand cats"
        )
        encoded = check(conversation, name, kind)
        assert encoded.images == [ONE, TWO, ONE]
        assert encoded.input_ids.count(processor(name, kind).image_token_id) == 9

    def test_emoji_newlines_and_other_scripts(self, name: str, kind: str) -> None:
        check(turns("あれは何？ 🦊", "狐です 🦊🦊。\n\nÉtonnant — naïve", "👩‍👩‍👧", "👩‍👩‍👧 x"), name, kind)

    def test_system(self, name: str, kind: str) -> None:
        if not CASES[name].system:
            pytest.skip("this template refuses a system turn")
        check(turns("q", "an answer", system="It's red. an answer"), name, kind)
        check(turns("q", "an answer", system=""), name, kind)


@pytest.mark.parametrize("kind", tiny.TOKENIZERS)
@pytest.mark.parametrize(
    "name", ["smollm2", "qwen2.5", "gemma", "phi-3", "vicuna", "chatml", "plain chat", "caption only"]
)
def test_generation_starts_from_what_training_saw(name: str, kind: str) -> None:
    """(Not tested where a template's cue and its assistant's turn differ, or a tokenizer joins "\n\n" at the end alone.)"""
    proc, conversation = processor(name, kind), turns([ONE, "what is this?"], "a dog")
    whole, prompt = encode(conversation, proc), encode(conversation.prompt(), proc, learn=False)
    first = next(i for i, label in enumerate(whole.labels) if label != IGNORE)
    assert set(prompt.labels) == {IGNORE}
    assert whole.input_ids[: first - 1] == prompt.input_ids[: first - 1]
    # A last space may have joined the first word.
    assert len(prompt.input_ids) - first in (0, 1)


FRAGMENTS = st.sampled_from(
    ["user", "assistant", "ASSISTANT: ", "\n", "\n\n", " ", "<|im_end|>", "</s>", "[/INST]", "<|im_start|>user\n", "🦊",
     "the circle", "<<SYS>>", "<think>", "{{", "{% if %}", "\u200d", "\ufeff", "e\u0301", "\t", "\r\n", "model"]
)  # fmt: skip
TEXTS = st.lists(
    FRAGMENTS | st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\ue0f0\ue0f1"), max_size=8),
    max_size=5,
).map("".join)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(sorted(CASES)),
    kind=st.sampled_from(["byte-level", "byte-level, trimmed offsets"]),
    texts=st.lists(TEXTS, min_size=2, max_size=6).filter(lambda t: len(t) % 2 == 0),
    system=st.none() | TEXTS,
    shown=st.integers(0, 3),
)
def test_any_words(name: str, kind: str, texts: list[str], system: str | None, shown: int) -> None:
    """The property behind all the others: over any words, exactly what the assistant says is learned, or it is refused."""
    case, proc = CASES[name], processor(name, kind)
    said: list[Any] = list(texts)
    for i in range(0, min(2 * shown, len(said)), 2):
        said[i] = [ONE, said[i]]
    if name == "caption only":  # its form is a picture and its caption: no words stand before
        said[::2] = [[ONE]] * len(said[::2])
    assume("<image>" not in "".join([*texts, system or ""]))
    conversation = turns(*said, system=system if case.system else None)
    answers = [m.text for m in conversation.messages if m.role == "assistant"]
    if name == "qwen3" and any(a.startswith("\n") or "</think>" in a for a in answers):
        # The one lawful way out: a template that strips in a way of its own.
        with contextlib.suppress(DataError):
            encode(conversation, proc)
        return
    encoded = encode(conversation, proc)
    ids = [i for i, label in enumerate(encoded.labels) if label != IGNORE]
    found = proc.tokenizer.decode([encoded.input_ids[i] for i in ids], skip_special_tokens=False)
    said = [(a.strip() if case.trims else a) + case.end for a in answers]
    wanted = "".join([*said[:-1], case.block, said[-1]])
    # White space before an answer may share a token with it, in the template as in the answer.
    assert "".join(found.split()) == "".join(wanted.split())
    assert encoded.input_ids.count(proc.image_token_id) == 3 * len(conversation.images)


@pytest.mark.parametrize("name", CASES)
def test_text_only_prompts_render_to_the_same_letters(name: str) -> None:
    case, proc = CASES[name], processor(name)
    for conversation in (
        turns("q"),
        turns("  a\n", "b ", "c"),
        turns("x", "y", system="s") if case.system else turns("x", "y"),
    ):
        for cue in (True, False):
            strings = [{"role": m.role, "content": m.text} for m in conversation.messages]
            bare = proc.tokenizer.apply_chat_template(
                strings, chat_template=case.template, tokenize=False, add_generation_prompt=cue
            )
            for chat in (strings, conversation.to_chat()):
                ours = proc.apply_chat_template(
                    chat, chat_template=with_parts(case.template), add_generation_prompt=cue
                )
                assert ours == bare


@pytest.mark.parametrize(
    "start", ["\n", "\n\n", "  ", " \n  ", "x ", "{%- set a = 1 %}", "  {% if true %}{% endif %}\n"]
)
@pytest.mark.parametrize(
    "rest", ["{% for m in messages %}\n{{ m.content }}{% endfor %}", "{{ messages[0].content }}", "{# c #} y"]
)
def test_a_templates_first_white_space_survives(start: str, rest: str) -> None:
    chat, words = [{"role": "user", "content": "q"}], processor().tokenizer
    bare = words.apply_chat_template(chat, chat_template=start + rest, tokenize=False)
    assert words.apply_chat_template(chat, chat_template=with_parts(start + rest), tokenize=False) == bare


def test_with_parts_is_idempotent_and_has_a_default() -> None:
    assert with_parts(with_parts(CHATML)) == with_parts(CHATML)
    assert with_parts(None) == with_parts(PLAIN_CHAT)


def test_messages_without_words_reach_the_template_as_they_are() -> None:
    """Tool calls have no content; the template decides what to write."""
    chat = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {}}}]},
    ]
    words = processor("qwen2.5").tokenizer
    template = CASES["qwen2.5"].template
    bare = words.apply_chat_template(chat, chat_template=template, tokenize=False)
    assert words.apply_chat_template(chat, chat_template=with_parts(template), tokenize=False) == bare


def test_special_tokens_that_swallow_white_space() -> None:
    """Phi-3's `<|assistant|>` takes the white space behind it into its own token."""
    from tokenizers import AddedToken

    words = tiny.tokenizer(bos="<s>", eos="<|endoftext|>", chat_template=CASES["phi-3"].template)
    words.backend_tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False, rstrip=True) for t in ("<|assistant|>", "<|end|>", "<|user|>")]
    )
    proc = OpticNerveProcessor(make_image_processor(size=32, mean=[0.5] * 3, std=[0.5] * 3), words)
    assert learned(encode(turns("q", "a dog", "q", " a cat"), proc), proc) == ["a dog<|end|>", "a cat<|end|>"]


def test_a_template_that_rewrites_the_words_is_refused() -> None:
    shouting = CHATML.replace("message['content']", "message['content'] | upper")
    with refused("template", "chat.jsonl:7", "assistant", error=DataError):
        encode(turns("q", "a dog"), processor(), template=with_parts(shouting))


def test_thinking_that_the_template_drops_is_refused_and_kept_thinking_is_learned() -> None:
    proc = processor("qwen3")
    old = turns("q", "<think>\nhm\n</think>\n\nyes", "q", "no")
    with refused("template", "chat.jsonl:7", "model.language.thinking", error=DataError):
        encode(old, proc)
    assert learned(encode(turns("q", "yes", "q", "no"), proc), proc) == [
        "yes<|im_end|>", "<think>\n\n</think>\n\nno<|im_end|>",
    ]  # fmt: skip


def test_a_template_that_drops_a_turn_is_refused() -> None:
    last_only = with_parts("{{ messages[-1]['content'] }}{{ eos_token }}")
    with refused("template", "chat.jsonl:7", "assistant turn", error=DataError):
        encode(turns("q", "a", "q", "b"), processor(), template=last_only)


def test_a_template_without_an_end_is_refused() -> None:
    endless = with_parts("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    with refused("unsupported", "eos_token"):
        encode(turns("q", "a"), processor(), template=endless)


@pytest.mark.parametrize(("name", "end"), [("llama-3", "<|eot_id|>"), ("gemma", "<end_of_turn>"), ("llama-2", "</s>")])
def test_the_end_of_a_turn_is_the_templates_own(name: str, end: str) -> None:
    assert end_of_turn(processor(name), processor(name).chat_template) == end


def test_nothing_to_learn_names_the_sample() -> None:
    with refused("no-assistant-turn", "chat.jsonl:7", error=DataError):
        encode(turns("only a question"), processor())


def test_too_long_names_both_numbers() -> None:
    conversation = turns([ONE, "q"], "a dog")
    length = len(encode(conversation, processor()).input_ids)
    assert len(encode(conversation, processor(), max_length=length).input_ids) == length
    with refused("too-long", length, "max_length", length - 1, error=DataError) as e:
        encode(conversation, processor(), max_length=length - 1)
    assert e.value.kind == "too-long"


@pytest.mark.parametrize("conversation", [turns("an <image> here", "a"), turns([ONE, "q"], "an <image> there")])
def test_a_placeholder_word_in_the_text_is_refused(conversation: Conversation) -> None:
    with refused("placeholder-without-image", "chat.jsonl:7", "<image>", error=DataError):
        encode(conversation, processor())


def test_a_template_that_loses_a_picture_is_refused() -> None:
    blind = with_parts("{% for m in messages %}{{ m['content'] | replace('<image>', '') }}{{ eos_token }}{% endfor %}")
    with refused("template", "1 <image>", 0, error=DataError):
        encode(turns([ONE, "q"], "a"), processor(), template=blind)


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    class Processor:
        tokenizer = Slow()

    with refused("unsupported", "tokenizer.json"):
        encode(ask("q", answer="a"), Processor())


def test_the_begin_token_is_written_once() -> None:
    """By the template where it writes one, by the tokenizer elsewhere; never by both."""
    for name in ("llama-2", "zephyr"):
        proc = processor(name, "metaspace")
        ids = encode(turns("q", "a"), proc).input_ids
        assert ids[0] == proc.tokenizer.bos_token_id
        assert ids[1] != proc.tokenizer.bos_token_id
