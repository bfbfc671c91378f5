"""Scores for answers and captions, each with the rule that it follows.

Answers are compared as by VQAv2's evaluation (https://github.com/GT-Vision-Lab/VQA, `vqaEval.py`); captions by CIDEr
(Vedantam et al. 2015, arXiv:1411.5726) and BLEU-4 (Papineni et al. 2002) from the libraries that the field uses.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Sequence
from typing import Any

from opticnerve.types import OpticNerveError, to_install

Interval = tuple[float, float]

_ARTICLES = {"a", "an", "the"}
_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_COUNTED)}
_Z95 = 1.959963984540054


def normalise_answer(text: str) -> str:
    """An answer in the form in which answers are compared.

    The rule is VQAv2's: lower case; apostrophes dropped; commas within numbers and full stops outside numbers dropped;
    other punctuation becomes a space; number words up to ten (and "none") become digits; articles are dropped. It is
    applied always (VQAv2 skips it when all ten people agree), and knows no table of contractions ("dont" is "don't").
    An answer that the rule would empty ("a", "the", "?") is only lower-cased and stripped.
    """
    text = " ".join(text.lower().split())
    words = re.sub(r"['’`]", "", text)
    words = re.sub(r"(?<=\d),(?=\d)", "", words)
    words = re.sub(r"(?<!\d)\.|\.(?!\d)", "", words)
    words = re.sub(r"[^\w\s.]|_", " ", words)
    kept = [_NUMBERS.get(w, w) for w in words.split() if w not in _ARTICLES]
    return " ".join(kept) or text


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether the prediction is one of the references, both normalised."""
    return normalise_answer(prediction) in {normalise_answer(r) for r in references}


def vqa_soft_accuracy(prediction: str, references: Sequence[str]) -> float:
    """VQAv2's accuracy for one question: the mean over all leave-one-out subsets of `min(1, agreeing people / 3)`.

    `references` are the answers of several people (ten, in VQAv2), repetitions included.
    """
    if len(references) < 2:
        raise OpticNerveError(
            f"soft VQA accuracy needs the answers of several people, got {len(references)}", kind="out-of-range"
        )
    mine = normalise_answer(prediction)
    agree = [normalise_answer(r) == mine for r in references]
    return sum(min(1.0, (sum(agree) - a) / 3) for a in agree) / len(agree)


def wilson_interval(successes: float, n: int) -> Interval:
    """Wilson's 95 % interval of a share (Wilson 1927), as `(low, high)` within [0, 1]; `(0, 1)` for no observations.

    `successes` may be a sum of partial scores in [0, 1]: the interval is then on the wide side.
    """
    if n < 0 or not -1e-9 <= successes <= n + 1e-9:
        raise ValueError(f"{successes} successes out of {n}")
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = p + _Z95**2 / (2 * n)
    spread = _Z95 * math.sqrt(max(0.0, p * (1 - p)) / n + _Z95**2 / (4 * n * n))
    scale = 1 + _Z95**2 / n
    # Rounding must not push an end past the share itself at 0 and 1.
    return max(0.0, min(p, (centre - spread) / scale)), min(1.0, max(p, (centre + spread) / scale))


def summarise(scores: Sequence[float]) -> dict[str, Any]:
    """`n`, mean `accuracy` (None for no scores) and `ci95` of per-question scores in [0, 1]."""
    n, total = len(scores), float(sum(scores))
    return {"n": n, "accuracy": total / n if n else None, "ci95": list(wilson_interval(total, n))}


def accuracy_by_type(scores: Sequence[float], types: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`summarise` for each type of question, the most frequent type first."""
    groups: dict[str, list[float]] = {}
    for score, kind in zip(scores, types, strict=True):
        groups.setdefault(kind, []).append(score)
    return {kind: summarise(s) for kind, s in sorted(groups.items(), key=lambda g: (-len(g[1]), g[0]))}


def caption_tokens(text: str) -> str:
    """A caption as lower-case words with single spaces between them, punctuation left out.

    It stands in for COCO's PTB tokenizer, which wants Java and makes "man 's" of "man's": scores are comparable among
    opticnerve's runs and close to, not the same as, those of the COCO server.
    """
    return " ".join(re.findall(r"\w+(?:['’-]\w+)*", text.lower()))


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D as COCO computes it (pycocoevalcap; 1.0 here is "100" in papers), document frequencies from `references`,
    which must be of two pictures or more."""
    _check_captions(predictions, references)
    if len(predictions) < 2:
        raise OpticNerveError(
            "CIDEr weighs words by how many pictures they occur with: give at least two pictures", kind="out-of-range"
        )
    scorer = _extra("pycocoevalcap.cider.cider_scorer").CiderScorer(n=4, sigma=6.0)
    for prediction, refs in zip(predictions, references, strict=True):
        scorer += (caption_tokens(prediction), [caption_tokens(r) for r in refs])
    score, _ = scorer.compute_score()
    return float(score)


def bleu4(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 in [0, 1] (sacrebleu, unsmoothed, words of `caption_tokens`); numbers of references may differ."""
    _check_captions(predictions, references)
    metric = _extra("sacrebleu.metrics").BLEU(tokenize="none", smooth_method="none", force=True)
    most = max(len(r) for r in references)
    streams = [[caption_tokens(r[i]) if i < len(r) else None for r in references] for i in range(most)]
    return float(metric.corpus_score([caption_tokens(p) for p in predictions], streams).score) / 100


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-L (Lin 2004) in [0, 1] as COCO computes it (pycocoevalcap, beta 1.2, words of `caption_tokens`), the mean
    over pictures."""
    _check_captions(predictions, references)
    scorer = _extra("pycocoevalcap.rouge.rouge").Rouge()
    pairs = zip(predictions, references, strict=True)
    scores = [scorer.calc_score([caption_tokens(p)], [caption_tokens(r) for r in refs]) for p, refs in pairs]
    return float(sum(scores) / len(scores))


def choice_rank(log_likelihoods: Sequence[Sequence[float]], true: int = 0) -> dict[str, Any]:
    """How often the true caption beats the others by likelihood.

    Args:
        log_likelihoods: for each picture, one number for each caption. true: where the true one stands in each row.

    Returns: `n`, `accuracy` (share where the true one is best: a tie is no win), `ci95`, `mean_rank` (1 is best),
        `choices`, and `chance`.
    """
    widths = {len(row) for row in log_likelihoods}
    if len(widths) != 1 or min(widths) < 2 or not 0 <= true < min(widths):
        raise OpticNerveError(
            f"every picture needs the same number (≥ 2) of captions, the true one at {true}; got {widths}",
            kind="wrong-shape",
        )
    if any(not math.isfinite(x) for row in log_likelihoods for x in row):
        raise OpticNerveError(
            "a log-likelihood is not finite; check for empty captions and for overflow", kind="not-finite"
        )
    ranks = [1 + sum(x >= row[true] for i, x in enumerate(row) if i != true) for row in log_likelihoods]
    choices = widths.pop()
    won = summarise([float(r == 1) for r in ranks])
    return {**won, "mean_rank": sum(ranks) / len(ranks), "choices": choices, "chance": 1 / choices}


def _check_captions(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not predictions or len(predictions) != len(references) or not all(references):
        raise OpticNerveError(
            f"{len(predictions)} captions for {len(references)} pictures; each needs a caption and a reference",
            kind="wrong-shape",
        )


def _extra(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        how = to_install("opticnerve[captions]")
        raise OpticNerveError(f"caption scores need {module.split('.')[0]}: {how} ({e})", kind="not-installed") from e
