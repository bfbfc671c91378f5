"""Ask a model a list of questions and score what it says: the entries under "tasks" in results.json.

A model is known here only as `generate`: prompt conversations in, one answer each out. Whoever owns the model does the
batching.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from opticnerve.common import atomic
from opticnerve.data.media.open import open_image
from opticnerve.evaluation.metrics import accuracy_by_type, bleu4, cider, normalise_answer, rouge_l, summarise
from opticnerve.evaluation.scorers import SCORERS, Scorer
from opticnerve.types import Conversation, DataError, OpticNerveError, TextPart

Generate = Callable[[list[Conversation]], list[str]]
Progress = Callable[[int, int], None]
"""Called with (questions done, questions in all)."""

_CHUNK = 256  # questions handed to `generate` at a time, so that progress can be shown
_THUMBNAIL = 384  # longest side of the pictures kept beside the results


def run_vqa(
    generate: Generate, conversations: Sequence[Conversation], *, name: str, scorer: Scorer = SCORERS["vqa"],
    keep: int = 24, progress: Progress | None = None, run_dir: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Ask every question and compare with the references.

    Args:
        conversations: questions with references: `meta["answers"]` (alternatives; ten or more count as the answers of
            as many people and are scored by VQAv2's rule), else the last assistant turn. `meta["type"]` sorts.
        name: what the data is called in reports ("easy-vqa test"). scorer: the rule that answers are scored by.
        keep: how many samples to keep for the card, about half of them wrong ones if there are so many.
        run_dir: if given, the kept samples' pictures are saved small under `run_dir/samples`, so that the run folder
            can be moved, and all answers under `run_dir/answers`; otherwise the pictures' own paths are noted.

    Raises:
        DataError: a question has no reference. OpticNerveError: no questions, or `generate` lost some.
    """
    references = [_references(c) for c in conversations]
    predictions = answer_all(generate, conversations, progress)
    scores = [scorer.score(p, r) for p, r in zip(predictions, references, strict=True)]
    samples = [
        {**_describe(c), "answer": _most_common(r), "prediction": p, "right": s >= 0.5}
        for c, p, r, s in zip(conversations, predictions, references, scores, strict=True)
    ]
    if run_dir is not None:
        _keep_answers(run_dir, name, conversations, samples, scores)
    kept = _mixed([s["right"] for s in samples], keep)
    return {
        "name": name,
        "harness": f"opticnerve {scorer.harness(references)} {harness_version()}",
        **summarise(scores),
        **scorer.report(predictions, references),
        "by_type": accuracy_by_type(scores, [str(c.meta.get("type") or "all") for c in conversations]),
        "samples": _with_pictures(kept, samples, conversations, run_dir, name),
    }


def run_captions(
    generate: Generate, conversations: Sequence[Conversation], *, name: str, keep: int = 24,
    progress: Progress | None = None, run_dir: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Have every picture described and compare with the references: CIDEr, BLEU-4, ROUGE-L (`opticnerve[captions]`).

    References are `meta["captions"]` (several), else the last assistant turn; the rest as in `run_vqa`.
    """
    references = [list(c.meta.get("captions") or ()) or _references(c) for c in conversations]
    predictions = answer_all(generate, conversations, progress)
    samples = [
        {**_describe(c), "answer": r[0], "prediction": p}
        for c, p, r in zip(conversations, predictions, references, strict=True)
    ]
    return {
        "name": name,
        "harness": f"opticnerve captions {harness_version()} (pycocoevalcap CIDEr and ROUGE-L, sacrebleu BLEU-4, "
        "simple tokenizer)",
        "n": len(predictions),
        "cider": cider(predictions, references),
        "bleu4": bleu4(predictions, references),
        "rouge_l": rouge_l(predictions, references),
        "samples": _with_pictures(_spread(len(samples), keep), samples, conversations, run_dir, name),
    }


def answer_all(
    generate: Generate, conversations: Sequence[Conversation], progress: Progress | None = None
) -> list[str]:
    """The answers to all conversations' prompts, in order."""
    if not conversations:
        raise OpticNerveError("there is nothing to evaluate: the list of questions is empty", kind="empty")
    answers: list[str] = []
    for start in range(0, len(conversations), _CHUNK):
        prompts = [c.prompt() for c in conversations[start : start + _CHUNK]]
        got = generate(prompts)
        if len(got) != len(prompts):
            raise OpticNerveError(
                f"generate returned {len(got)} answers to {len(prompts)} questions", kind="wrong-shape"
            )
        answers += got
        if progress:
            progress(len(answers), len(conversations))
    return answers


def score_answers(
    conversations: Sequence[Conversation], predictions: Sequence[str], scorer: Scorer = SCORERS["vqa"]
) -> list[float]:
    """Each prediction's score in [0, 1], by the rule of `run_vqa`."""
    return [scorer.score(p, _references(c)) for c, p in zip(conversations, predictions, strict=True)]


def most_frequent_answer(conversations: Sequence[Conversation], scorer: Scorer = SCORERS["vqa"]) -> dict[str, Any]:
    """What always giving the commonest reference would score: `answer`, `n`, `accuracy`, `ci95`.

    It is picked on the tested questions themselves, which flatters it: a model has to beat it all the same.
    """
    commonest = Counter(normalise_answer(_most_common(_references(c))) for c in conversations)
    if not commonest:
        raise OpticNerveError("there is no most frequent answer: the list of questions is empty", kind="empty")
    answer = min(commonest, key=lambda a: (-commonest[a], a))
    return {"answer": answer, **summarise(score_answers(conversations, [answer] * len(conversations), scorer))}


def usual_answers(
    known: Iterable[Conversation], asked: Sequence[Conversation], *, otherwise: str | None = None
) -> list[str]:
    """What a reader says who knows each question's most frequent answer among `known`, and never looks or listens.

    `otherwise`: to a question that is not among them; by default what is said most often of all.
    """
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for c in known:
        answers[_question(c)][str(c.answer)] += 1
    if otherwise is None:
        said = Counter(a for counted in answers.values() for a in counted.elements())
        otherwise = said.most_common(1)[0][0] if said else ""
    usual = {question: counted.most_common(1)[0][0] for question, counted in answers.items()}
    return [usual.get(_question(c), otherwise) for c in asked]


def _question(c: Conversation) -> str:
    return c.prompt().messages[-1].text.strip()


def harness_version() -> str:
    """The version of opticnerve that scored, so that two results can be compared with open vision encoders."""
    try:
        return version("opticnerve")
    except PackageNotFoundError:
        return "(not installed)"


def _references(c: Conversation) -> list[str]:
    references = [str(a) for a in c.meta.get("answers") or ()] or ([c.answer] if c.answer is not None else [])
    if not references:
        remedy = "give an assistant turn at the end, or meta['answers']"
        problem = f"question {c.id or '(no id)'} has no reference answer"
        raise DataError(problem, where=c.where, remedy=remedy, kind="no-answer")
    return references


def _most_common(references: list[str]) -> str:
    return max(references, key=references.count)


def _keep_answers(
    run_dir: Path, name: str, conversations: Sequence[Conversation], samples: list[dict[str, Any]], scores: list[float]
) -> None:
    """Every question with its answer, a line each, in `run_dir/answers/NAME.jsonl`."""
    lines = []
    for c, s, score in zip(conversations, samples, scores, strict=True):
        said = {key: s[key] for key in ("question", "answer", "prediction")}
        lines.append({"id": c.id, "type": c.meta.get("type"), **said, "right": score})
    (run_dir / "answers").mkdir(parents=True, exist_ok=True)
    atomic.write_lines(run_dir / "answers" / f"{slug(name)}.jsonl", lines, ensure_ascii=False)


def slug(name: str) -> str:
    """A name as a file may be called."""
    return "".join(ch if ch.isalnum() or ch in "-_" else "-" for ch in name)


def _describe(c: Conversation) -> dict[str, Any]:
    prompt = c.prompt()
    texts = [p.text.strip() for p in prompt.messages[-1].parts if isinstance(p, TextPart)] if prompt.messages else []
    image = prompt.images[0].source if prompt.images else None
    return {
        "id": c.id, "image": str(image) if isinstance(image, Path) else None,
        "question": " ".join(t for t in texts if t),
    }  # fmt: skip


def _with_pictures(
    kept: Sequence[int], samples: Sequence[dict[str, Any]], conversations: Sequence[Conversation], run_dir: Path | None,
    name: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """The kept samples; their pictures small beside them, where there is a run folder."""
    found = []
    for i in kept:
        sample, c = samples[i], conversations[i]
        if run_dir is not None and (images := c.prompt().images):
            target = run_dir / "samples" / (slug(f"{name}-{i}") + ".png")
            target.parent.mkdir(parents=True, exist_ok=True)
            picture = open_image(images[0].source, where=c.where or c.id)
            picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
            picture.save(target)
            sample = {**sample, "image": target.relative_to(run_dir).as_posix()}
        found.append(sample)
    return found


def _mixed(right: Sequence[bool], keep: int) -> list[int]:
    """Up to `keep` positions, half of them wrong ones where there are so many, spread over the whole list."""
    wrongs, rights = ([i for i, r in enumerate(right) if r == wanted] for wanted in (False, True))
    n_wrong = min(len(wrongs), max(keep // 2, keep - len(rights)))
    shown = [wrongs[i] for i in _spread(len(wrongs), n_wrong)]
    return sorted(shown + [rights[i] for i in _spread(len(rights), keep - n_wrong)])


def _spread(n: int, keep: int) -> list[int]:
    keep = min(n, keep)
    return [i * n // keep for i in range(keep)]
