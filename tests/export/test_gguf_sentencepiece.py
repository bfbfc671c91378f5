"""SentencePiece's words in a GGUF file: llama.cpp's way of joining, written out here, against transformers'."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest
import transformers as tf
from gguf import TokenType

import tiny
from errors import refused
from opticnerve.export.gguf import sentencepiece
from opticnerve.export.gguf import tokenizer as gguf_tokens


def state_of(tokenizer: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return found


@pytest.fixture(scope="module")
def words() -> Any:
    return tiny.tokenizer("sentencepiece, never", bos="<s>")


class Written:
    """What a GGUFWriter is told."""

    def __init__(self) -> None:
        self.said: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda value: self.said.update({name: value})


def written(tokenizer: Any) -> dict[str, Any]:
    state, vocab = state_of(tokenizer), tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    added = {t["content"] for t in state["added_tokens"]}
    kinds = [TokenType.CONTROL if t in added else TokenType.NORMAL for t in tokens]
    writer: Any = Written()
    sentencepiece.write(writer, state, tokens, kinds)
    return dict(writer.said)


def joined(text: str, score: dict[str, float]) -> list[str]:
    """llama.cpp's `llm_tokenizer_spm_session`: of all neighbours that make a word, the best score first, then the
    leftmost; what is left and is no word becomes bytes."""
    pieces = list(text.replace(" ", "▁"))
    while True:
        ways = [(-score[a + b], i) for i, (a, b) in enumerate(zip(pieces, pieces[1:], strict=False)) if a + b in score]
        if not ways:
            break
        i = min(ways)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    found = []
    for piece in pieces:
        found += [piece] if piece in score else [sentencepiece.byte_word(b) for b in piece.encode()]
    return found


def test_joining_by_these_scores_is_joining_by_the_merges(words: Any) -> None:
    said = written(words)
    kinds = zip(said["add_token_list"], said["add_token_scores"], said["add_token_types"], strict=True)
    score = {t: s for t, s, kind in kinds if kind is TokenType.NORMAL}
    generator = random.Random(0)
    pieces = [*"abcdefgh .:\n42(é東", " the", "circle", "  ", " is", "red", "USER", "ASSISTANT", "brown fox"]
    for _ in range(300):
        text = "".join(generator.choices(pieces, k=generator.randint(1, 12)))
        assert joined(text, score) == words.tokenize(text, add_special_tokens=False), repr(text)


def test_bytes_and_the_unknown_word_have_kinds_of_their_own(words: Any) -> None:
    said = written(words)
    kinds = dict(zip(said["add_token_list"], said["add_token_types"], strict=True))
    assert (kinds["<0x0A>"], kinds["<unk>"], kinds["<s>"]) == (TokenType.BYTE, TokenType.UNKNOWN, TokenType.CONTROL)
    assert said["add_tokenizer_model"] == "llama"


def test_a_space_before_text_by_each_rule() -> None:
    rules = {s: state_of(tiny.tokenizer(f"sentencepiece, {s}")) for s in ("prepend", "always", "first", "never")}
    found = {scheme: sentencepiece.rule(state) for scheme, state in rules.items()}
    assert found == {"prepend": "always", "always": "always", "first": "first", "never": "never"}
    cut = copy.deepcopy(rules["first"])
    cut["pre_tokenizer"]["split"] = True
    assert sentencepiece.rule(cut) is None
    assert written(tiny.tokenizer("sentencepiece, always"))["add_add_space_prefix"] is True
    assert written(tiny.tokenizer("sentencepiece, first"))["add_add_space_prefix"] is False


def test_transformers_own_llama_tokenizer_is_of_this_kind(words: Any) -> None:
    """As it is built for every Llama 2 and Vicuna: a space at the beginning of a text alone."""
    model = state_of(words)["model"]
    own = tf.LlamaTokenizer(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]])
    assert gguf_tokens.refusals(own) == []
    assert sentencepiece.rule(state_of(own)) == "first"
    assert gguf_tokens.first_space(own) == " "


def changed(state: dict[str, Any], change: str) -> dict[str, Any]:
    state = copy.deepcopy(state)
    model, merges = state["model"], state["model"]["merges"]
    if change == "a way is missing":
        del merges[-1]
    elif change == "ways apart":
        twice = next(i for i, (a, b) in enumerate(zip(merges, merges[1:], strict=False)) if "".join(a) == "".join(b))
        merges.append(merges.pop(twice))
    elif change == "a byte is missing":
        del model["vocab"]["<0x41>"]
    elif change == "strips":
        state["added_tokens"][0]["rstrip"] = True
    elif change == "cuts":
        state["pre_tokenizer"] = {"type": "Digits", "individual_digits": True}
    return state


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("a way is missing", "not its way of joining"),
        ("ways apart", "do not stand together"),
        ("a byte is missing", "lacks 1 of the 256 bytes"),
        ("strips", "swallow the white space"),
        ("cuts", "by a rule that is not known"),
    ],
)
def test_what_scores_cannot_say_is_refused(words: Any, change: str, reason: str) -> None:
    assert sentencepiece.refusals(state_of(words)) == []
    [said] = sentencepiece.refusals(changed(state_of(words), change))
    assert reason in said


class Chat:
    """As much of a processor as `beginning` asks."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.tokenizer, self.template = tokenizer, template

    def apply_chat_template(self, chat: list[dict[str, Any]]) -> str:
        image = "<image>" if len(chat[0]["content"]) > 1 else ""
        return self.template.replace("PICTURE", image)


def test_the_space_that_the_template_writes() -> None:
    first = tiny.tokenizer("sentencepiece, first", bos="<s>")
    first.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert gguf_tokens.beginning(Chat(first, "USER: PICTURE a")) == " "
    assert gguf_tokens.beginning(Chat(first, "<s>USER: PICTURE a")) == ""
    assert gguf_tokens.beginning(Chat(tiny.tokenizer(), "USER: PICTURE a")) == ""
    with refused("unsupported", "picture's placeholder"):
        gguf_tokens.beginning(Chat(first, "PICTUREa"))
