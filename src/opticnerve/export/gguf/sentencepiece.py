"""A tokenizer of SentencePiece's kind in a GGUF file (Llama 2, Vicuna, TinyLlama, Mistral): scores and word spaces.

transformers keeps such a tokenizer as merges in order of rank; llama.cpp keeps a score for each word, and joins two
neighbours whenever the outcome is a word, the best score first. Both do the same where every way to join a word is
among the merges, and those of one word stand together: then the score is minus the word's place. It is checked here,
for merges that were learnt one by one (not made from SentencePiece's words) do not have it.

Before words stands a space, `▁`, and the two libraries have different rules for the one at a beginning:
    always   before every stretch of text, also behind a special word: llama.cpp's `add_space_prefix`
    first    at the beginning of a text alone: llama.cpp has no such rule; its chat template writes the space instead
    never    nowhere
"""

from __future__ import annotations

from typing import Any, Literal

from gguf import GGUFWriter, TokenType

from opticnerve.types import OpticNerveError

SPACE = "▁"
Rule = Literal["always", "first", "never"]
_PREPEND = {"type": "Prepend", "prepend": SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def is_sentencepiece(state: dict[str, Any]) -> bool:
    """Whether a backend's state (`tokenizer.json`) is of this kind: letters without a word become bytes `<0x00>`."""
    model = state["model"]
    return model["type"] == "BPE" and bool(model.get("byte_fallback"))


def rule(state: dict[str, Any]) -> Rule | None:
    """Where a space is put before text; None where no known rule does the same."""
    normalizer, cut = state.get("normalizer") or {}, state.get("pre_tokenizer")
    steps = normalizer["normalizers"] if normalizer.get("type") == "Sequence" else [normalizer] if normalizer else []
    if cut is None and steps == [_PREPEND, _REPLACE]:
        return "always"
    if cut is None and steps == [_REPLACE]:
        return "never"
    if steps or cut is None or cut.get("type") != "Metaspace" or cut["replacement"] != SPACE or cut.get("split", True):
        return None
    scheme: Rule = cut["prepend_scheme"]
    return scheme


def refusals(state: dict[str, Any]) -> list[str]:
    """Why it cannot be written; empty if it can."""
    model = state["model"]
    if rule(state) is None:
        return [
            "its tokenizer is SentencePiece's kind, but puts spaces before words by a rule that is not known here "
            "(known: Llama's, by a Metaspace that does not split, or by Prepend and Replace)"
        ]
    words = set(model["vocab"])
    if lacking := [b for b in map(byte_word, range(256)) if b not in words]:
        return [f"its tokenizer lacks {len(lacking)} of the 256 bytes (first {lacking[0]}), which llama.cpp relies on"]
    if odd := [t["content"] for t in state["added_tokens"] if t["lstrip"] or t["rstrip"]]:
        return [f"its special words {', '.join(odd[:4])} swallow the white space beside them; llama.cpp keeps it"]
    try:
        places(state)
    except OpticNerveError as e:
        return [str(e)]
    return []


def places(state: dict[str, Any]) -> dict[str, int]:
    """Each joined word's place in the order of joining; an error where the merges are not SentencePiece's, so that no
    score per word does the same."""
    model = state["model"]
    words = set(model["vocab"])
    reserved = {t["content"] for t in state["added_tokens"]} | set(map(byte_word, range(256)))
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    found: dict[str, int] = {}
    last = None
    for left, right in merges:
        if (word := left + right) != last:
            if word in found:
                raise OpticNerveError(_other(f"the ways to join {word!r} do not stand together"), kind="unsupported")
            found[word], last = len(found), word
    known = set(merges)
    for word in words - reserved:
        ways = [(word[:i], word[i:]) for i in range(1, len(word))]
        if lost := [w for w in ways if w[0] in words - reserved and w[1] in words - reserved and w not in known]:
            raise OpticNerveError(
                _other(f"{lost[0][0]!r} and {lost[0][1]!r} are words, and never joined"), kind="unsupported"
            )
        if ways and word not in found:
            raise OpticNerveError(_other(f"{word!r} is a word that nothing joins to"), kind="unsupported")
    return found


def byte_word(byte: int) -> str:
    """SentencePiece's word for a byte."""
    return f"<0x{byte:02X}>"


def _other(why: str) -> str:
    return (
        f"its tokenizer has SentencePiece's bytes, but not its way of joining ({why}); llama.cpp would cut words "
        "elsewhere; nearest: a language model with the tokenizer of Llama 2, or a byte-level one"
    )


def write(writer: GGUFWriter, state: dict[str, Any], tokens: list[str], kinds: list[TokenType]) -> None:
    """Words with their kinds and scores.

    `kinds`: as for any tokenizer; bytes and the unknown word get theirs here.
    """
    joined, unknown = places(state), state["model"].get("unk_token")
    bytes_ = set(map(byte_word, range(256)))
    scores = []
    for number, token in enumerate(tokens):
        if token in bytes_:
            kinds[number] = TokenType.BYTE
        elif token == unknown:
            kinds[number] = TokenType.UNKNOWN
        # Letters are never joined to; SentencePiece scores them behind every joined word.
        plain = -float(joined.get(token, len(joined) + number))
        scores.append(plain if kinds[number] is TokenType.NORMAL else 0.0)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(rule(state) == "always")
