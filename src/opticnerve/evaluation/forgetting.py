"""What did the language model forget while it learned to see?

Three looks at the language model alone, before any training and after each stage: perplexity on a fixed English text,
answers to fixed text-only questions, and a fingerprint of its logits, which must not change while only the connector
trains. Text and questions were written for this project, so that no language model has been trained on them.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opticnerve.evaluation.tasks import Generate
from opticnerve.language.layers import context_length
from opticnerve.models.freeze import undisturbed
from opticnerve.types import OpticNerveError, ask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "Before the ship left, the captain counted the lamps: 3 on deck, 2 below. How many lamps were there? There were"

_LOGITS_BYTES = 512 * 2**20  # float32 logits of one forward pass stay below this, whatever the batch size asked for
_POSITIONS = 256  # positions whose log-probabilities are taken at a time


def perplexity(
    language_model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, text: str | None = None,
    tokens: int | None = 20_480, window: int = 1024, batch_size: int = 4,
) -> dict[str, Any]:  # fmt: skip
    """Perplexity of a causal language model on a text, read in windows that do not overlap.

    Every token but the text's first is predicted exactly once, from the tokens before it in its window; the mean is
    over tokens, not over windows. No special tokens are added. Compare only for the same tokenizer, text, window.

    Args:
        language_model: its `forward(input_ids=…)` returns `.logits` of shape (batch, tokens, vocabulary).
        text: opticnerve's held-out text if None. tokens: how many to predict, from its start; None for all of it.
        window: tokens that the model sees at once; cut to the model's `max_position_embeddings` if that is smaller.
        batch_size: windows in a forward pass; fewer if their logits would exceed half a gigabyte.

    Returns: `perplexity`, `nll` (mean, in nats), `tokens`, `window`, `seconds`, `text_sha256`.

    Raises:
        OpticNerveError: the text is too short, or the model gives logits that are not finite.
    """
    text = held_out_text() if text is None else text
    ids = _token_ids(tokenizer, text)
    if tokens is not None:
        ids = ids[: tokens + 1]
    if len(ids) < 2:
        raise OpticNerveError("perplexity needs a text of at least two tokens", kind="out-of-range")
    window = min(window, context_length(getattr(language_model, "config", None)) or window)
    if window < 1 or batch_size < 1:
        raise OpticNerveError(
            f"window and batch_size must be at least 1, got {window} and {batch_size}", kind="out-of-range"
        )

    start = time.perf_counter()
    total = torch.zeros((), dtype=torch.float64)
    with undisturbed(language_model):
        for inputs_BT, targets_BT in _batches(ids, window, _fitting(batch_size, window, len(tokenizer))):
            logits_BTV = language_model(input_ids=inputs_BT.to(_device(language_model))).logits
            total += _summed_nll(logits_BTV, targets_BT)
    nll = float(total) / (len(ids) - 1)
    if not math.isfinite(nll):
        raise OpticNerveError(
            "the language model's logits are not finite: its weights are broken, or overflow in this dtype",
            kind="not-finite",
        )
    return {
        "perplexity": math.exp(nll) if nll < 700 else math.inf, "nll": nll, "tokens": len(ids) - 1, "window": window,
        "seconds": time.perf_counter() - start, "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }  # fmt: skip


def text_answers(generate: Generate) -> list[dict[str, Any]]:
    """The answers to the fixed text-only questions: `question`, `answer`, `expected` words, and whether one `holds`."""
    asked = questions()
    answers = generate([ask(q["question"]) for q in asked])
    if len(answers) != len(asked):
        raise OpticNerveError(f"generate returned {len(answers)} answers to {len(asked)} questions", kind="wrong-shape")
    return [{**q, "answer": a, "holds": holds_expected(a, q["expected"])} for q, a in zip(asked, answers, strict=True)]


def text_probe(language_model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the float32 logits (and their shape) of a fixed text-only prompt.

    Equal before and after means bit-identical. Compare on one machine with one number of threads only: elsewhere the
    same weights may round differently.
    """
    ids = torch.tensor([_token_ids(tokenizer, PROBE)], device=_device(language_model))
    with undisturbed(language_model):
        logits = language_model(input_ids=ids).logits.float().cpu().contiguous()
    return hashlib.sha256(f"{tuple(logits.shape)}".encode() + logits.numpy().tobytes()).hexdigest()


def forgetting_entry(
    after: str, language_model: nn.Module, tokenizer: PreTrainedTokenizerBase, generate: Generate, *,
    untouched: dict[str, Any] | None = None, reuse_identical: bool = False, tokens: int | None = 20_480,
) -> dict[str, Any]:  # fmt: skip
    """One entry of "forgetting" in results.json: all three looks after a stage (or "untouched").

    Args:
        after: the stage's name, or "untouched".
        untouched: the entry from before training; with it, `logits_identical` is true or false, otherwise None.
        reuse_identical: if the logits are bit-identical to the untouched ones, copy its numbers and say so under
            `same_as`. For stages in which no weight of the language model is open.
    """
    probe = text_probe(language_model, tokenizer)
    if reuse_identical and untouched is not None and probe == untouched["probe"]:
        return {**untouched, "after": after, "logits_identical": True, "same_as": untouched["after"], "seconds": 0.0}
    answers = text_answers(generate)
    return {
        "after": after, **perplexity(language_model, tokenizer, tokens=tokens), "answers": answers,
        "answers_hold": sum(bool(a["holds"]) for a in answers), "probe": probe,
        "logits_identical": None if untouched is None else probe == untouched["probe"],
    }  # fmt: skip


def holds_expected(answer: str, expected: Sequence[str]) -> bool:
    """Whether one of the expected words stands in the answer as a word of its own, upper or lower case."""
    return any(re.search(rf"(?<!\w){re.escape(e)}(?!\w)", answer, re.IGNORECASE) for e in expected)


@cache
def held_out_text() -> str:
    """English prose written for opticnerve: more than 20,481 tokens of SmolLM2's tokenizer."""
    return (files("opticnerve.evaluation") / "texts" / "held_out.txt").read_text(encoding="utf-8")


def questions() -> list[dict[str, Any]]:
    """The fixed text-only questions, each with the words of which a right answer holds one."""
    text = (files("opticnerve.evaluation") / "texts" / "questions.json").read_text(encoding="utf-8")
    return list(json.loads(text))


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: the tokenizer would warn that the text is longer than the model's context; we cut it into windows.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _batches(ids: list[int], window: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets (one token later), in full windows batch by batch, then the rest on its own."""
    inputs, targets = torch.tensor(ids[:-1]), torch.tensor(ids[1:])
    full = len(inputs) // window * window
    for start in range(0, full, batch_size * window):
        part = slice(start, min(full, start + batch_size * window))
        yield inputs[part].view(-1, window), targets[part].view(-1, window)
    if full < len(inputs):
        yield inputs[None, full:], targets[None, full:]


def _summed_nll(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    logits_NV, targets_N = logits_BTV.flatten(0, 1), targets_BT.flatten().to(logits_BTV.device)
    pairs = zip(logits_NV.split(_POSITIONS), targets_N.split(_POSITIONS), strict=True)
    # Sums of thousands of terms lose digits in float32.
    return torch.stack([F.cross_entropy(x.float(), y, reduction="none").double().sum().cpu() for x, y in pairs]).sum()


def _fitting(batch_size: int, window: int, vocabulary: int) -> int:
    return max(1, min(batch_size, _LOGITS_BYTES // (4 * window * max(vocabulary, 1))))


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
