"""The tokens of a sample as the model gets them, trained ones apart from the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from opticnerve.types import OpticNerveError

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from opticnerve.data.encode.tokenize import Encoded

IGNORE = -100
MARK = "▦"
_TRAINED = "underline bold green"
_STYLES = {"image": "bold blue", "special": "magenta", "text": ""}


@dataclass(frozen=True, slots=True)
class TokenPiece:
    """What is shown as one: a token's text, or a picture's block of placeholders."""

    text: str
    kind: Literal["text", "special", "image"]
    trained: bool
    count: int = 1


def pieces(encoded: Encoded, processor: Any) -> list[TokenPiece]:
    """Split an `Encoded` into what is shown; a character spread over several tokens is one piece of several tokens."""
    tokenizer = processor.tokenizer
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special} | set(tokenizer.all_special_ids)
    media = {
        processor.image_token_id: ("image", math.inf if processor.counts_by_size else processor.num_image_tokens),
        processor.audio_token_id: ("sound", processor.num_audio_tokens),
    }
    media.pop(None, None)
    ids, labels = encoded.input_ids, encoded.labels
    found: list[TokenPiece] = []
    at = 0
    while at < len(ids):
        trained = labels[at] != IGNORE
        end = at + 1
        if ids[at] in media:
            # One block a picture, also where two pictures of the same size stand side by side.
            name, most = media[ids[at]]
            while end < len(ids) and ids[end] == ids[at] and end - at < most:
                end += 1
            found.append(TokenPiece(name, "image", trained, end - at))
        elif ids[at] in special:
            found.append(TokenPiece(_decode(tokenizer, [ids[at]]), "special", trained))
        else:
            # What a token spells may depend on its left neighbour (SentencePiece's leading space).
            before = [i for i in ids[max(at - 1, 0) : at] if i not in special and i not in media]
            prefix = len(_decode(tokenizer, before))
            text = _decode(tokenizer, [*before, *ids[at:end]])[prefix:]
            # A character may be spread over up to four tokens.
            while text.endswith("\ufffd") and end < min(len(ids), at + 4) and (labels[end] != IGNORE) == trained:
                end += 1
                text = _decode(tokenizer, [*before, *ids[at:end]])[prefix:]
            found.append(TokenPiece(text, "text", trained, end - at))
        at = end
    return found


def show(encoded: Any, processor: Any, console: Console) -> None:
    """Print the pieces of an `Encoded`, what their looks mean, and how many tokens there are of which kind."""
    from rich.text import Text

    legend = Text.assemble(
        ("trained", _TRAINED), "  read only  ", ("special token", "magenta"), "  ", (f"{MARK} image", "bold blue"),
        "  ", ("|", "dim"), " between tokens  ↵ a new line",
    )  # fmt: skip
    total, image = len(encoded.input_ids), encoded.input_ids.count(processor.image_token_id)
    pictures = f"{len(encoded.images)} picture{'' if len(encoded.images) == 1 else 's'}"
    counts = (
        f"{total} tokens: {encoded.supervised} trained, {total - encoded.supervised} read only, {image} of them from "
        f"{pictures}"
    )
    console.print(as_text(pieces(encoded, processor)), "", legend, counts, sep="\n", highlight=False)


def as_text(found: list[TokenPiece]) -> Any:
    """The pieces as rich text: trained ones green and underlined, so that colour is not the only sign."""
    from rich.text import Text

    text = Text()
    for i, piece in enumerate(found):
        if i:
            text.append("|", style="dim")
        style = _TRAINED if piece.trained else _STYLES[piece.kind]
        if piece.kind == "image":
            text.append(f"{MARK} {piece.text} ×{piece.count}", style=style)
            continue
        shown = piece.text.replace("\n", "↵").replace("\t", "⇥") or "∅"
        text.append(shown, style=style)
        if piece.text.endswith("\n") and piece is not found[-1]:
            text.append("\n")
    return text


def to_dict(encoded: Encoded, found: list[TokenPiece]) -> dict[str, Any]:
    """JSON-ready."""
    return {
        "id": encoded.id, "where": encoded.where, "tokens": len(encoded.input_ids), "trained": encoded.supervised,
        "images": len(encoded.images), "pieces": [asdict(p) for p in found],
    }  # fmt: skip


def choose(conversations: Sequence[Any], *, index: int | None, sample_id: str | None) -> Any:
    """One conversation by its place (from 0; negative from the end) or its id. Raises OpticNerveError: no such sample;
    the message says which there are."""
    if sample_id is not None:
        for conversation in conversations:
            if conversation.id == sample_id:
                return conversation
        near = ", ".join(c.id for c in conversations[:3])
        raise OpticNerveError(f"no sample has the id {sample_id!r}; the ids begin {near}", kind="unknown-name")
    at = index or 0
    if not -len(conversations) <= at < len(conversations):
        raise OpticNerveError(
            f"--index {at}: there are {len(conversations):,} samples, 0 to {len(conversations) - 1:,}",
            kind="out-of-range",
        )
    return conversations[at]


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""
