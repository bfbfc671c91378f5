"""What is trained is what is asked, for real tokenizers and real chat templates (`prompt_contract`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import conversations
import families
from conversations import Sample
from families import FAMILIES
from opticnerve.data.collators.next_token import Collator
from opticnerve.data.encode.chat_layout import form_of
from opticnerve.data.encode.packing import pack
from opticnerve.data.encode.tokenize import IGNORE, encode
from opticnerve.inference.generate import Answerer
from opticnerve.models import OpticNerveProcessor
from opticnerve.types import Conversation, DataError, Message, OpticNerveError, TextPart, ask
from prompt_contract import examine, expect, same, scorer

pytestmark = pytest.mark.slow
TRAINABLE = [name for name, family in FAMILIES.items() if not family.refused]
# Saving knows nothing of a template: one family of each tokenizer, and those whose own special tokens are of a kind.
SAVED = {FAMILIES[name].tokenizer: name for name in reversed(TRAINABLE)}
SAVED |= {"white space swallowed": "phi-3", "a date": "devstral", "added and changed": "hermes-3"}


class Case:
    """A family with its processor."""

    def __init__(self, name: str) -> None:
        self.name, self.family = name, FAMILIES[name]
        self.proc: Any = families.processor(self.family)

    def askable(self, sample: Sample) -> bool:
        return sample.system is None or self.family.system == "kept"


@pytest.fixture(scope="module", params=TRAINABLE)
def case(request: pytest.FixtureRequest) -> Case:
    """One family after the other: all its tests, then the next (a real tokenizer is large, and slow to load)."""
    return Case(request.param)


def test_prompt_is_a_prefix_and_all_behind_it_is_learned(case: Case) -> None:
    tried = conversations.samples(case.family.count)
    scorer(case.name, tried, lambda sample: examine(case.family, case.proc, sample))


def test_sequences_begin_with_the_begin_token_once(case: Case) -> None:
    ids = encode(ask("Which?"), case.proc, learn=False).input_ids
    begin = case.proc.tokenizer.bos_token_id
    if case.family.bos is None:
        return
    assert ids[0] == case.proc.tokenizer.convert_tokens_to_ids(case.family.bos) == begin
    assert ids[1] != begin


def test_the_public_path_sends_the_same_prompt(case: Case) -> None:
    """`apply_chat_template(tokenize=True)`, and what `ask`, `chat` and the server send.

    An earlier answer that makes one token with the end of its own prompt (two line breaks) stands apart from it in
    training and in all that opticnerve sends; transformers tokenises the text as it is.
    """
    answerer = Answerer(_Somewhere(), case.proc)
    asked, compared = [], []

    def joined(prompt: Conversation) -> bool:
        """Whether an earlier answer's prompt, tokenised as it is, is no prefix of this one."""
        text = form_of(case.proc).lay_out(prompt, cue=True)
        whole = case.proc.tokenizer(text.text, add_special_tokens=False)["input_ids"]
        starts = [text.text[: answer.start] for answer in text.answers]
        begins = [case.proc.tokenizer(start, add_special_tokens=False)["input_ids"] for start in starts]
        return any(whole[: len(begin)] != begin for begin in begins)

    def check(sample: Sample) -> None:
        if not case.askable(sample):
            return
        prompt = sample.conversation.prompt()
        ids = encode(prompt, case.proc, learn=False).input_ids
        equal(case.proc, "Answerer", ids, answerer.inputs([sample.conversation])["input_ids"][0].tolist())
        asked.append(sample)
        if joined(prompt):
            return
        compared.append(sample)
        chat = prompt.to_chat()
        public = case.proc.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
        row = public["input_ids"]
        equal(case.proc, "apply_chat_template", ids, row[0] if isinstance(row[0], list) else row)

    scorer(case.name, conversations.samples(30, seed=1), check)
    assert 3 * len(compared) >= len(asked)


class _Somewhere:
    """All that an `Answerer` asks of a model before it answers."""

    device = torch.device("cpu")


def equal(proc: Any, what: str, one: list[int], other: list[int]) -> None:
    same(proc, what, one, other)
    same(proc, what, other, one)


def test_batched_is_single(case: Case) -> None:
    """Rows of the collator, and a batch of prompts of different lengths."""
    trained, prompts = [], []
    for sample in conversations.samples(24, seed=2):
        last = sum(m.role == "assistant" for m in sample.conversation.messages) - 1
        if expect(case.family, sample, last) == "trained":
            trained.append(encode(sample.conversation, case.proc))
        if case.askable(sample):
            prompts.append(sample.conversation.prompt())
    if trained:
        batch = Collator(case.proc)([pack([[e]]) for e in trained])
        for i, e in enumerate(trained):
            assert batch.input_ids[i, : len(e.input_ids)].tolist() == e.input_ids
            assert batch.targets[i, : len(e.input_ids)].tolist() == [*e.labels[1:], IGNORE]
    inputs = Answerer(_Somewhere(), case.proc).inputs(prompts)
    for i, prompt in enumerate(prompts):
        alone = encode(prompt, case.proc, learn=False).input_ids
        assert inputs["input_ids"][i][inputs["attention_mask"][i].bool()].tolist() == alone


def test_saved_and_loaded_gives_the_same_tokens(case: Case, tmp_path: Path) -> None:
    """Or says that it cannot, before anything is trained with it."""
    if case.name not in SAVED.values():
        return
    try:
        case.proc.save_pretrained(tmp_path)
    except OpticNerveError:
        return
    again = OpticNerveProcessor.from_pretrained(tmp_path)
    for sample in conversations.samples(40, seed=3):
        if not case.askable(sample):
            continue
        for learn in (False, True):
            chat_state = sample.conversation if learn else sample.conversation.prompt()
            one, other = (outcome(chat_state, p, learn=learn) for p in (case.proc, again))
            assert one == other, f"{case.name}, conversation {sample.conversation.id}"


def outcome(chat_state: Conversation, proc: Any, *, learn: bool) -> Any:
    try:
        made = encode(chat_state, proc, learn=learn)
    except DataError as e:
        return e.kind
    return made.input_ids, made.labels


# -- what is refused, and the remedies --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.refused])
def test_a_template_that_ends_no_turn_is_refused(name: str) -> None:
    with pytest.raises(OpticNerveError):
        encode(ask("Which?", answer="ruby"), families.processor(FAMILIES[name]))


def test_system_words_that_the_template_refuses_or_drops_are_told(case: Case) -> None:
    if case.family.system == "kept":
        return
    for turns in (1, 2):
        asked = (Message("user", (TextPart("Which?"),)), Message("assistant", (TextPart("ruby"),))) * turns
        chat_state = Conversation((Message("system", (TextPart("Be brief."),)), *asked), where="chat.jsonl:7")
        with pytest.raises(DataError) as e:
            encode(chat_state, case.proc)
        assert e.value.kind == "template"
        assert e.value.where == "chat.jsonl:7"
        assert e.value.remedy
        if case.family.system == "refused":
            with pytest.raises(DataError) as e:
                encode(chat_state.prompt(), case.proc, learn=False)
            assert e.value.kind == "template"


def test_a_cue_that_opens_a_think_block_is_told_with_the_remedy(case: Case) -> None:
    if not case.family.thinking.startswith("opened"):
        return
    with pytest.raises(DataError) as e:
        encode(replace(ask("Which?", answer="ruby"), where="chat.jsonl:7"), case.proc)
    assert e.value.kind == "template"
    assert "thinking" in e.value.remedy
    assert str(e.value).startswith("chat.jsonl:7")


@pytest.mark.parametrize("mode", ["strip", "keep", "empty"])
def test_the_remedy_for_think_blocks_is_one(case: Case, mode: str) -> None:
    if case.family.thinking == "words":
        return
    proc = families.processor(case.family, case.proc.tokenizer, thinking=mode)
    scorer(f"{case.name}, thinking: {mode}", conversations.samples(80, seed=5), lambda s: examine(case.family, proc, s))
