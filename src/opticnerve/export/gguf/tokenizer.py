"""A tokenizer's metadata in a GGUF file: words, their kinds, merges, and which rule cuts text before merging.

llama.cpp knows cutting rules by name (`tokenizer.ggml.pre`). A tokenizer's own rule is compared with the ones known
here, letter by letter; any other is refused, for llama.cpp would cut the text elsewhere without a word.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from gguf import GGUFWriter, TokenType

from opticnerve.export.gguf import sentencepiece
from opticnerve.language.chat_template import with_parts
from opticnerve.types import OpticNerveError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from opticnerve.models.vlm.processing import OpticNerveProcessor

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# What stands between the model's own template and the prelude that opticnerve put before it.
_PRELUDE_ENDS = "{%- set messages = opticnerve.messages -%}"

_LINE_BREAKS = (
    "{%- set spaced = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{%- set spaced.messages = spaced.messages + "
    "[dict(message, content=message['content'].replace('__>', '__>\n'))] -%}"
    "{%- else -%}{%- set spaced.messages = spaced.messages + [message] -%}{%- endif -%}{%- endfor -%}"
    "{%- set messages = spaced.messages -%}"
)


def pre_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """llama.cpp's name of the rule by which a byte-level BPE cuts text; None where no known rule does the same."""
    state = _state(tokenizer)
    rule = state.get("pre_tokenizer") or {}
    steps = rule.get("pretokenizers", [rule])
    normalizer = (state.get("normalizer") or {}).get("type")
    match [_step(s) for s in steps]:
        case [("ByteLevel", True)]:
            name = "gpt-2"
        case [("Digits", True), ("ByteLevel", True)]:
            name = "smollm"
        case [("Split", pattern), ("ByteLevel", False)] if pattern == _QWEN2:
            name = "qwen2"
        case [("Split", pattern), ("ByteLevel", False)] if pattern == _LLAMA3:
            name = "llama-bpe"
        case _:
            return None
    # Qwen's normalizer (NFC) belongs to its rule; no other known rule has one.
    return name if normalizer is None or (name, normalizer) == ("qwen2", "NFC") else None


def _step(step: dict[str, Any]) -> tuple[Any, ...]:
    match step.get("type"):
        case "ByteLevel" if not step["add_prefix_space"]:
            return "ByteLevel", step["use_regex"]
        case "Digits":
            return "Digits", step["individual_digits"]
        case "Split" if step["behavior"] == "Isolated" and not step["invert"]:
            return "Split", step["pattern"].get("Regex")
        case other:
            return (other,)


def refusals(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Why a tokenizer cannot be written; empty if it can."""
    if not getattr(tokenizer, "is_fast", False):
        return ["its tokenizer is not one of the tokenizers library"]
    state = _state(tokenizer)
    if (kind := state["model"]["type"]) != "BPE":
        return [
            f"its tokenizer is a {kind}; written are byte-level BPE (GPT-2's, Llama 3's, Qwen's, SmolLM's) and "
            "SentencePiece's BPE (Llama 2's, Vicuna's, TinyLlama's)"
        ]
    if sentencepiece.is_sentencepiece(state):
        return sentencepiece.refusals(state)
    if pre_tokenizer(tokenizer) is None:
        return [
            "its tokenizer cuts text by a rule that is not known here, and llama.cpp would cut it elsewhere; known: "
            "gpt-2, llama-bpe, qwen2, smollm"
        ]
    return []


def _state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What stands in `tokenizer.json`."""
    found: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return found


def first_space(tokenizer: PreTrainedTokenizerBase) -> str:
    """The space that a tokenizer puts at the beginning of a text, and there alone, which llama.cpp must be given."""
    state = _state(tokenizer)
    return " " if sentencepiece.is_sentencepiece(state) and sentencepiece.rule(state) == "first" else ""


def beginning(processor: OpticNerveProcessor) -> str:
    """What the chat template must write first in llama.cpp: `first_space`, unless it begins with a special word. An
    error where it does so in one conversation and not in another."""
    space = first_space(processor.tokenizer)
    if not space:
        return ""
    added = _state(processor.tokenizer)["added_tokens"]
    special = (*(t["content"] for t in added), space, sentencepiece.SPACE)
    words = {"type": "text", "text": "a"}
    begins = {
        processor.apply_chat_template([{"role": "user", "content": parts}]).startswith(special)
        for parts in ([words], [{"type": "image"}, words])
    }
    if len(begins) > 1:
        raise OpticNerveError(
            "the tokenizer puts a space at the beginning of a text, but not before a special word, and the chat "
            "template begins with a picture's placeholder or with words; llama.cpp cannot do both: let the template "
            "begin with the role, or the begin token",
            kind="unsupported",
        )
    return "" if begins.pop() else space


def write(
    writer: GGUFWriter,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    *,
    rows: int,
    turn_end: int | None,
    begins: str = "",
) -> None:
    """Words, kinds, merges or scores, special ids and chat template.

    Args:
        rows: of the embedding table; ids beyond it (the picture's placeholder) are left out, rows without a word get
            names of their own. turn_end: the id that ends an answer, where it is not the tokenizer's end token.
        begins: see `beginning`.
    """
    if reasons := refusals(tokenizer):
        raise OpticNerveError("; ".join(reasons), kind="unsupported")
    state = _state(tokenizer)
    words = {i: w for w, i in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens = [words.get(i, f"[PAD{i}]") for i in range(rows)]
    kinds = [TokenType.NORMAL if i in words else TokenType.UNUSED for i in range(rows)]
    for i, token in added.items():
        if i in words and i < rows:
            kinds[i] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    if sentencepiece.is_sentencepiece(state):
        sentencepiece.write(writer, state, tokens, kinds)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(str(pre_tokenizer(tokenizer)))
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]])
    for name in ("bos", "eos", "pad", "unk"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None and number < rows:
            getattr(writer, f"add_{name}_token_id")(number)
    if turn_end is not None and turn_end != tokenizer.eos_token_id:
        writer.add_eot_token_id(turn_end)
    first = tokenizer("a")["input_ids"][0]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and first == tokenizer.bos_token_id)
    writer.add_add_eos_token(False)
    space = f"{{{{ {begins!r} }}}}" if begins else ""
    writer.add_chat_template(space + own_template(template))


def own_template(template: str) -> str:
    """The template for llama.cpp, which joins a message's parts itself, as opticnerve's prelude does, but for the line
    break behind a picture: a prelude puts it behind each of its markers (`<__media…__>`)."""
    _, found, rest = template.partition(_PRELUDE_ENDS)
    return _LINE_BREAKS + rest if found and with_parts(rest) == template else template


def half_letters(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[int]:
    """Words that are no whole letters of UTF-8: llama.cpp reports no probabilities for them."""
    return [i for i, text in enumerate(tokenizer.batch_decode([[i] for i in range(rows)])) if "\ufffd" in text]
