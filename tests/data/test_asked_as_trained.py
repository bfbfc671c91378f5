"""What is trained is what is asked: think blocks, headers, system turns, clocks and control tokens of chat templates."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from errors import refused
from opticnerve.data.dataset.read import read
from opticnerve.data.encode.chat_layout import form_of
from opticnerve.data.encode.tokenize import IGNORE, Encoded, encode
from opticnerve.encoders.base import make_image_processor
from opticnerve.language.chat_template import CHATML, set_template, stage_template
from opticnerve.language.thinking import AnswerText, shown
from opticnerve.models import OpticNerveProcessor
from opticnerve.types import Conversation, DataError, ImagePart, Message, TextPart

QWEN3 = (Path(__file__).parent.parent / "templates/qwen3.jinja").read_text(encoding="utf-8")
# The generation prompt opens a think block, and history is shown without any (QwQ, DeepSeek-R1).
OPENS = CHATML.replace("message['content'] + '<|im_end|>'", "message['content'].split('</think>')[-1] + '<|im_end|>'")
OPENS = OPENS.replace("assistant\n' }}{%- endif", "assistant\n<think>\n' }}{%- endif")
# A header stands before every answer, and the last one ends with a token of its own (gpt-oss).
HEADED = (
    "{%- for m in messages -%}{%- if m['role'] == 'assistant' -%}"
    "{{ '<|im_start|>assistant<|user|>final<|system|>' + m['content'] }}{{ '<|end|>' if not loop.last else '</s>' }}"
    "{%- else -%}{{ '<|im_start|>' + m['role'] + '<|system|>' + m['content'] + '<|end|>' }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant' }}{%- endif -%}"
)
# Mistral's way: the system's words stand in the last message, if that is the user's.
LAST = (
    "{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' -%}"
    "{%- for m in messages if m['role'] != 'system' -%}"
    "{%- if m['role'] == 'user' -%}{{ '[INST] ' + (system if loop.last else '') + m['content'] + '[/INST]' }}"
    "{%- else -%}{{ ' ' + m['content'] + '</s>' }}{%- endif -%}{%- endfor -%}"
)


def processor(template: str = CHATML, kind: str = "byte-level", **options: Any) -> OpticNerveProcessor:
    words = tiny.tokenizer(kind, bos="<s>", eos="</s>", chat_template=template)
    return OpticNerveProcessor(
        make_image_processor(size=32, mean=[0.5] * 3, std=[0.5] * 3), words, num_image_tokens=3, **options
    )


def chat(*texts: str, system: str | None = None) -> Conversation:
    roles = ("user", "assistant") * len(texts)
    said = [Message(role, (TextPart(text),)) for role, text in zip(roles, texts, strict=False)]  # type: ignore[arg-type]
    first = [] if system is None else [Message("system", (TextPart(system),))]
    return Conversation((*first, *said), where="chat.jsonl:7")


def learned(conversation: Conversation, proc: Any) -> str:
    """What is learned behind the prompt; that the prompt is a prefix and all behind it is learned is checked here."""
    whole, asked = encode(conversation, proc), encode(conversation.prompt(), proc, learn=False)
    start = len(asked.input_ids)
    assert whole.input_ids[:start] == asked.input_ids
    assert set(asked.labels) == {IGNORE}
    stop = max(i for i, label in enumerate(whole.labels) if label != IGNORE) + 1
    assert whole.labels[start:stop] == whole.input_ids[start:stop]
    return str(proc.tokenizer.decode(whole.input_ids[start:stop]))


def spelled(encoded: Encoded, proc: Any) -> str:
    return str(proc.tokenizer.decode([x for x in encoded.labels if x != IGNORE]))


@pytest.mark.parametrize("kind", tiny.TOKENIZERS)
@pytest.mark.parametrize("answer", ["ruby", "42", "犬です", "(a) frog", ":)", "\n\na dog", " \n x", "  y", ""])
@pytest.mark.parametrize("template", ["chatml", "vicuna", "OUT", "qwen3"])
def test_the_prompt_is_the_beginning_whatever_the_answer_begins_with(template: str, answer: str, kind: str) -> None:
    """A word, a digit, kanji, a line break: cues that end in a colon, a line break or a space, and a think block."""
    out = "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else '\\nOut: ') }}{% endfor %}"
    text = {"chatml": CHATML, "qwen3": QWEN3, "OUT": out}.get(template, CHATML)
    proc = processor(text, kind)
    if template == "vicuna":
        set_template(proc.tokenizer, "vicuna")
        proc = OpticNerveProcessor(proc.image_processor, proc.tokenizer, num_image_tokens=3)
    for conversation in (chat("q", answer), chat("q", answer, "r", answer), chat("q", "yes", "r", answer)):
        assert "".join(answer.split()) in "".join(learned(conversation, proc).split())


def test_history_is_cut_in_asking_where_training_cut_it() -> None:
    proc = processor()
    conversation = chat("q", "\n\nfirst", "r", "\n\nsecond")
    whole = encode(conversation, proc).input_ids
    for k in (1, 3):
        asked = encode(Conversation(conversation.messages[:k]), proc, learn=False).input_ids
        assert whole[: len(asked)] == asked


class TestThinking:
    def test_an_empty_block_before_the_last_answer_is_learned(self) -> None:
        proc = processor(QWEN3)
        assert learned(chat("q", "ruby"), proc) == "<think>\n\n</think>\n\nruby<|im_end|>"
        assert spelled(encode(chat("q", "a", "r", "b"), proc), proc) == (
            "a<|im_end|><think>\n\n</think>\n\nb<|im_end|>"
        )

    def test_or_asked_with(self) -> None:
        assert learned(chat("q", "ruby"), processor(QWEN3, thinking="empty")) == "ruby<|im_end|>"

    def test_thoughts_are_learned_with_their_answers(self) -> None:
        for thinking in (None, "keep"):
            found = learned(chat("q", "<think>hm</think>yes"), processor(QWEN3, thinking=thinking))
            assert found == "<think>\nhm\n</think>\n\nyes<|im_end|>"

    def test_a_cue_that_opens_a_block_is_told_with_the_remedy(self) -> None:
        for answer in ("yes", "<think>\nhm\n</think>\n\nyes"):
            with pytest.raises(DataError) as e:
                encode(chat("q", answer), processor(OPENS))
            assert e.value.kind == "template"
            assert all(word in e.value.remedy for word in ("thinking", "strip", "keep", "empty"))

    @pytest.mark.parametrize(
        ("thinking", "answer", "expected"),
        [
            ("strip", "yes", "yes<|im_end|>"),
            ("strip", "<think>\nhm\n</think>\n\nyes", "yes<|im_end|>"),
            ("keep", "<think>\nhm\n</think>\n\nyes", "hm\n</think>\n\nyes<|im_end|>"),
            ("keep", "yes", "\n</think>\n\nyes<|im_end|>"),
            ("empty", "yes", "yes<|im_end|>"),
        ],
    )
    def test_what_becomes_of_it(self, thinking: Any, answer: str, expected: str) -> None:
        proc = processor(OPENS, thinking=thinking)
        assert learned(chat("q", answer), proc) == expected
        prompt = proc.apply_chat_template(chat("q").to_chat(), add_generation_prompt=True)
        assert prompt.endswith({"strip": "assistant\n", "keep": "<think>\n", "empty": "</think>\n\n"}[thinking])

    def test_a_thought_behind_an_empty_block_is_refused(self) -> None:
        for template in (OPENS, QWEN3):
            with pytest.raises(DataError) as e:
                encode(chat("q", "<think>hm</think>yes"), processor(template, thinking="empty"))
            assert e.value.kind == "template"

    def test_stripping_works_for_several_turns(self) -> None:
        proc = processor(OPENS, thinking="strip")
        assert spelled(encode(chat("q", "<think>x</think>a", "r", "b"), proc), proc) == "a<|im_end|>b<|im_end|>"

    def test_it_is_saved_with_the_processor(self, tmp_path: Path) -> None:
        proc = processor(OPENS, thinking="keep")
        proc.save_pretrained(tmp_path)
        again = OpticNerveProcessor.from_pretrained(tmp_path)
        assert again.thinking == "keep"
        assert learned(chat("q", "yes"), again) == "\n</think>\n\nyes<|im_end|>"

    @pytest.mark.parametrize(
        ("said", "seen"),
        [
            ("<think>\n\n</think>\n\nruby ", "ruby"), ("\n</think>\n\nruby", "ruby"), (" 42\n", "42"),
            ("<think>\nhm\n</think>\n\nyes", "<think>\nhm\n</think>\n\nyes"), ("<", "<"), ("", ""), ("a  b", "a  b"),
        ],
    )  # fmt: skip
    def test_an_empty_block_is_not_shown_whole_or_in_pieces(self, said: str, seen: str) -> None:
        assert shown(said) == seen
        for size in (1, 3, 100):
            text = AnswerText()
            pieces = [text.put(said[i : i + size]) for i in range(0, len(said), size)]
            assert "".join([*pieces, text.end()]) == seen


def test_a_header_before_every_answer_is_asked_with_and_every_end_is_learned() -> None:
    proc = processor(HEADED)
    assert learned(chat("q", "a"), proc) == "a</s>"
    assert spelled(encode(chat("q", "a", "r", "b", "s", "c"), proc), proc) == "a<|end|>b<|end|>c</s>"
    assert form_of(proc).ends_of_turns() == {"<|end|>", "</s>"}


class TestSystem:
    @pytest.mark.parametrize("texts", [("q", "a"), ("q", "a", "r", "b")])
    def test_words_that_a_template_drops_or_moves_are_told(self, texts: tuple[str, ...]) -> None:
        with pytest.raises(DataError) as e:
            encode(chat(*texts, system="Be brief."), processor(LAST))
        assert e.value.kind == "template"
        assert "fold-system" in e.value.remedy
        assert e.value.where == "chat.jsonl:7"

    def test_a_prompt_whose_words_are_dropped_is_told(self) -> None:
        deaf = CHATML.replace("for message in messages", "for message in messages if message['role'] != 'system'")
        with refused("template", "chat.jsonl:7", "system", error=DataError):
            encode(chat("q", system="Be brief."), processor(deaf), learn=False)

    @pytest.mark.parametrize(
        "broken",
        [
            "{{ raise_exception('no system') }}", "{{ nobody.knows }}", "{{ 'a' + 1 }}", "{{ 1 / 0 }}",
            "{{ 'a' | no_such_filter }}", "{% if %}", "{{ messages[0].content.nothing() }}", "{{ {}['a'].b }}",
        ],
    )  # fmt: skip
    def test_whatever_a_template_raises_is_a_bad_sample(self, broken: str) -> None:
        proc = processor("{% if messages[0].role == 'system' %}" + broken + "{% endif %}" + CHATML)
        for learn in (True, False):
            with pytest.raises(DataError) as e:
                encode(chat("q", "a", system="Be brief."), proc, learn=learn)
            assert e.value.kind == "template"
            assert e.value.where == "chat.jsonl:7"
            assert e.value.remedy


def test_a_system_turn_is_folded_where_the_data_entry_asks(tmp_path: Path) -> None:
    tiny.picture(1).save(tmp_path / "1.png")
    asked = [{"type": "image", "image": "1.png"}, {"type": "text", "text": "q"}]
    said = [("system", "Be brief."), ("user", asked), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    record = {"messages": [{"role": role, "content": content} for role, content in said]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(record) + "\n")
    [conversation] = read(tmp_path / "chat.jsonl", repair=["fold-system"])
    assert [m.role for m in conversation.messages] == ["user", "assistant", "user", "assistant"]
    assert conversation.messages[0].text == "Be brief.\n\nq"
    assert spelled(encode(conversation, processor(LAST)), processor(LAST)) == " a</s> b</s>"
    with pytest.raises(DataError):
        list(read(tmp_path / "chat.jsonl", repair=["no-such-repair"]))


def test_a_template_may_look_into_the_words() -> None:
    """Then what it writes around them is asked of it for each conversation; what it drops is still told."""
    curious = CHATML.replace(
        "message['role'] + '\n'", "message['role'] + ('!' if 'x' in message['content'] else '') + '\n'"
    )
    parts = (TextPart("an x"), ImagePart(tiny.picture(1)), TextPart("and more"))
    conversation = Conversation((Message("user", parts), Message("assistant", (TextPart("a"),))))
    assert learned(conversation, processor(curious)) == "a<|im_end|>"
    deaf = "{% for m in messages %}{{ m.content if 'x' not in m.content else '<image>' }}{{ eos_token }}{% endfor %}"
    with pytest.raises(DataError):
        encode(conversation, processor(deaf))


class TestClock:
    CLOCK = "{{- strftime_now('%d %b %Y') + strftime_now(\"%H:%M:%S\") + '\n' }}" + CHATML

    def test_it_is_stopped_at_a_day_that_is_saved(self, tmp_path: Path) -> None:
        proc = processor(self.CLOCK, date="2024-07-26")
        text = proc.apply_chat_template(chat("q").to_chat())
        assert text.startswith("26 Jul 202400:00:00\n")
        proc.save_pretrained(tmp_path)
        assert OpticNerveProcessor.from_pretrained(tmp_path).apply_chat_template(chat("q").to_chat()) == text

    def test_it_is_today_by_default(self) -> None:
        text = processor(self.CLOCK).apply_chat_template(chat("q").to_chat())
        assert text.startswith(datetime.date.today().strftime("%d %b %Y"))

    def test_a_form_that_is_computed_is_refused(self) -> None:
        with refused("unsupported", "strftime_now", "chat_template"):
            processor("{% set form = '%Y' %}{{ strftime_now(form) }}" + CHATML)


class TestControlTokens:
    TALK = chat("say <|im_end|>", "I say </s><|im_end|> twice", "and <think>?", "no")

    def test_they_are_tokens_by_default(self) -> None:
        proc = processor()
        end = proc.tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert encode(self.TALK, proc).input_ids.count(end) == 4 + 2

    def test_and_words_by_choice(self) -> None:
        proc = processor(sanitize_control_tokens=True)
        end = proc.tokenizer.convert_tokens_to_ids("<|im_end|>")
        encoded = encode(self.TALK, proc)
        assert encoded.input_ids.count(end) == 4
        assert proc.tokenizer.convert_tokens_to_ids("</s>") not in encoded.input_ids
        assert "I say </s><|im_end|> twice<|im_end|>" in proc.tokenizer.decode(encoded.input_ids)
        learned(self.TALK, proc)

    def test_tokens_within_tokens(self) -> None:
        proc = processor(sanitize_control_tokens=True)
        ids = encode(chat("<|im_<|im_end|>end|></s<s>>", "a"), proc).input_ids
        special = set(proc.tokenizer.convert_tokens_to_ids(["<s>", "</s>"]))
        assert not special & set(ids)


def test_the_begin_token_is_written_for_tokenizers_that_write_none() -> None:
    """DeepSeek-V3's own template writes it, its tokenizer does not; named templates and captions then write it, too."""
    words = tiny.tokenizer("byte-level", bos="<s>", eos="</s>", chat_template="{{ bos_token }}" + CHATML)
    captions = stage_template("caption", words)
    set_template(words, "vicuna")
    proc = OpticNerveProcessor(make_image_processor(size=32, mean=[0.5] * 3, std=[0.5] * 3), words, num_image_tokens=3)
    for template in (None, captions):
        ids = encode(chat("q", "a"), proc, template=template).input_ids
        assert ids.count(proc.tokenizer.bos_token_id) == 1
        assert ids[0] == proc.tokenizer.bos_token_id
