"""The card's sections on what a model can do and what it lost: scores, image dependence, forgetting, samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from opticnerve.common.markdown import as_typed, percent, plain, points, slug, table
from opticnerve.evaluation.metrics import wilson_interval
from opticnerve.runs.card.plots import image_dependence_plot, samples_plot
from opticnerve.runs.folder import RunFolder, finite

Task = dict[str, Any]
DIRECTIONS = {"image_to_text": "picture → text", "text_to_image": "text → picture"}
RETRIEVAL_HEAD = ["data", "direction", "queries / candidates", "R@1", "R@5", "R@10", "R@1 untrained"]


def answers(run: RunFolder) -> str:
    """What a model answers to questions: a table for each kind of score, and the harnesses that made them."""
    return _evaluation(
        run, lambda found: [_accuracies(found), _yes_no(found), _boxes(found), _captions(found), _harnesses(found)]
    )


def matches(run: RunFolder) -> str:
    """What a dual encoder finds: retrieval and zero-shot classification, against chance and against projections that
    learned nothing."""
    untrained = run.results.get("untrained") or []

    def sections(found: list[Task]) -> list[str]:
        rows = retrieval_rows(found, untrained)
        retrieval = (
            [table(RETRIEVAL_HEAD, rows, right=(2, 3, 4, 5, 6)), "In brackets what chance gives."] if rows else []
        )
        fresh = "*Untrained*: the same encoders with fresh projections, before the first step." if untrained else ""
        return [*retrieval, _zero_shot(found, untrained), fresh]

    return _evaluation(run, sections)


def _evaluation(run: RunFolder, sections: Callable[[list[Task]], list[str]]) -> str:
    if not (found := run.results.get("tasks") or []):
        return f"## Evaluation\n\nNot evaluated yet. Run `opticnerve eval {as_typed(run.path)}`."
    return "\n\n".join(["## Evaluation", *filter(None, sections(found))])


def _accuracies(found: list[Task]) -> str:
    rows = []
    for t in (t for t in found if "accuracy" in t):
        rows.append([f"**{plain(t['name'])}**", "all", *_score_cells(t)])
        if guess := t.get("most_frequent_answer"):
            rows.append(["", f"always “{plain(guess['answer'])}”", *_score_cells(guess)])
        kinds = t.get("by_type") or {}
        rows += [["", plain(kind), *_score_cells(k)] for kind, k in kinds.items() if len(kinds) > 1]
    return table(["data", "questions", "n", "accuracy", "95 % interval"], rows, right=(2, 3)) if rows else ""


def _score_cells(entry: Task) -> list[str]:
    n, accuracy = int(entry["n"]), entry.get("accuracy")
    if accuracy is None:
        return [f"{n:,}", "–", "–"]
    low, high = entry.get("ci95") or wilson_interval(accuracy * n, n)
    return [f"{n:,}", percent(accuracy), f"{percent(low)} – {percent(high)}"]


def _yes_no(found: list[Task]) -> str:
    """What an accuracy hides where one answer is given too often. (A share of nothing, such as the precision of yes
    where nobody said it, is none.)"""
    keys = ("precision", "recall", "f1", "yes_share")
    rows = [
        [f"**{plain(t['name'])}**", f"{t['n']:,}", *("–" if t[k] is None else percent(t[k]) for k in keys)]
        for t in found
        if "yes_share" in t
    ]
    head = ["yes or no", "n", "precision of yes", "recall of yes", "F1", "share of yes"]
    return table(head, rows, right=(1, 2, 3, 4, 5)) if rows else ""


def _boxes(found: list[Task]) -> str:
    rows = [[f"**{plain(t['name'])}**", f"{t['n']:,}", f"{t['mean_iou']:.3f}"] for t in found if "mean_iou" in t]
    return table(["boxes", "n", "mean IoU"], rows, right=(1, 2)) if rows else ""


def _captions(found: list[Task]) -> str:
    keys = ("cider", "bleu4", "rouge_l")
    rows = [
        [f"**{plain(t['name'])}**", f"{t['n']:,}", *(f"{t[k]:.3f}" if k in t else "–" for k in keys)]
        for t in found
        if "cider" in t
    ]
    return table(["captions", "n", "CIDEr", "BLEU-4", "ROUGE-L"], rows, right=(1, 2, 3, 4)) if rows else ""


def _harnesses(found: list[Task]) -> str:
    harnesses = dict.fromkeys(str(t["harness"]) for t in found if t.get("harness"))
    return f"Scored by {plain('; '.join(harnesses))}. Intervals are Wilson's."


def retrieval_rows(tasks: list[Task], untrained: list[Task] | None = None) -> list[list[str]]:
    """data, direction, candidates, R@1, R@5, R@10 (each with its chance), and R@1 before training."""
    before = {t["name"]: t for t in untrained or []}
    rows = []
    for task in tasks:
        for key, name in DIRECTIONS.items():
            if (found := task.get(key)) is None:
                continue
            recalls = [found.get(f"R@{n}") for n in (1, 5, 10)]
            cells = [f"{percent(r['accuracy'])} ({r['chance']:.2%})" if r else "–" for r in recalls]
            first = before.get(task["name"], {}).get(key, {}).get("R@1")
            start = percent(first["accuracy"]) if first else "–"
            rows.append([plain(task["name"]), name, f"{found['n']:,} / {found['candidates']:,}", *cells, start])
    return rows


def _zero_shot(found: list[Task], untrained: list[Task]) -> str:
    before = {t["name"]: t for t in untrained}
    rows = []
    for t in (t for t in found if "chance" in t and "accuracy" in t):
        (low, high), start = t["ci95"], before.get(t["name"])
        rows.append([
            plain(t["name"]), f"{t['n']:,}", f"{t['classes']:,}", percent(t["accuracy"]),
            f"{percent(low)} – {percent(high)}", f"{t['chance']:.2%}", percent(start["accuracy"]) if start else "–",
        ])  # fmt: skip
    head = ["zero-shot", "n", "classes", "accuracy", "95 % interval", "chance", "untrained"]
    return table(head, rows, right=(1, 2, 3, 4, 5, 6)) if rows else ""


def image_dependence(run: RunFolder) -> str:
    title = "## Image dependence"
    if not (d := run.results.get("image_dependence")):
        return f"{title}\n\nNot measured yet."
    image_dependence_plot(d, run.path / "plots/image-dependence.png")
    text = (
        f"{title}\n\n![Accuracy with the real, a blank and another sample's picture](plots/image-dependence.png)\n\n"
        f"The same {d['n']:,} questions: {percent(d['real'])} right with the real picture, {percent(d['blank'])} with "
        f"a blank one, {percent(d['shuffled'])} with another sample's. "
        f"**Real minus blank: {points(d['real'] - d['blank'])}.**"
    )
    if "shuffled_frames" in d:
        text += (
            f" With the frames of its own video in another order: {percent(d['shuffled_frames'])} "
            f"({points(d['real'] - d['shuffled_frames'])} less than in their own)."
        )
    if d.get("sampling") == "balanced":
        text += (
            "\n\nThe questions are balanced: each comes with each of its answers equally often, about different "
            "pictures, so that its words alone give no clue."
        )
    for sampling, other in (d.get("other_samples") or {}).items():
        text += (
            f" On {other['n']:,} questions {sampling}, words alone give clues: {percent(other['real'])} real, "
            f"{percent(other['blank'])} blank, {percent(other['shuffled'])} another's "
            f"({points(other['real'] - other['blank'])})."
        )
    return text


def forgetting(run: RunFolder) -> str:
    title = "## What the language model forgot"
    if not (entries := run.results.get("forgetting") or []):
        return f"{title}\n\nNot measured yet."
    base, start = finite(entries[0].get("perplexity")), plain(entries[0].get("after", "the start"))
    rows = []
    for i, e in enumerate(entries):
        change = f"{finite(e.get('perplexity')) / base - 1:+.2%}" if i else "–"
        same = {True: "yes, bit by bit", False: "no", None: "–"}[e.get("logits_identical")]
        marks = [a.get("holds") for a in e.get("answers") or []]
        held = f"{sum(map(bool, marks))} of {len(marks)}" if any(m is not None for m in marks) else "–"
        rows.append([plain(e.get("after", "?")), f"{finite(e.get('perplexity')):.3f}", change, same, held])
    head = [
        "after",
        "perplexity",
        f"change from {start}",
        "text-only logits unchanged",
        "answers with the expected word",
    ]
    parts = [title, table(head, rows, right=(1, 2))]
    if tokens := entries[0].get("tokens"):
        parts.append(f"Perplexity on {tokens:,} tokens of English prose written for opticnerve (lower is better).")
    if reused := [f"{plain(e['after'])} as {plain(e['same_as'])}" for e in entries if e.get("same_as")]:
        parts.append(f"Not computed again where the logits are the same bit by bit: {', '.join(reused)}.")
    for e in entries:
        if forced := e.get("perplexity_adapter_on"):
            parts.append(
                f"The adapter works on prompts with a picture alone (`lora.when: media`), so text alone meets the "
                f"untouched model. Forced to work on text after {plain(e['after'])}, it would make the perplexity "
                f"{forced:.2f} ({forced / base - 1:+.1%})."
            )
    by_stage = [{a["question"]: a for a in e.get("answers") or []} for e in entries]
    if asked := dict.fromkeys(q for given in by_stage for q in given):
        rows = [[plain(q), *(_answer_cell(given.get(q)) for given in by_stage)] for q in asked]
        side_by_side = table(["question", *(plain(e.get("after", "?")) for e in entries)], rows)
        summary = "<details><summary>Answers to text-only questions, side by side</summary>"
        parts.append(f"{summary}\n\n{side_by_side}\n\n</details>")
    return "\n\n".join(parts)


def _answer_cell(answer: dict[str, Any] | None) -> str:
    if answer is None:
        return "–"
    return {True: "✓ ", False: "✗ ", None: ""}[answer.get("holds")] + plain(
        answer.get("answer") or "(nothing)", most=240
    )


def samples(run: RunFolder) -> str:
    parts = []
    for i, task in enumerate(t for t in run.results.get("tasks") or [] if t.get("samples")):
        file = "plots/samples.png" if i == 0 else f"plots/samples-{slug(task['name'])}.png"
        samples_plot(task["samples"], run.path / file, folder=run.path, title=str(task["name"]))
        note = ""
        if task.get("accuracy") is not None:
            note = f" Chosen to show right (✓) and wrong (✗) answers; overall {percent(task['accuracy'])} are right."
        parts += [f"![Pictures with question, answer and reference]({file})", f"From {plain(task['name'])}.{note}"]
    return "\n\n".join(["## Samples", *parts]) if parts else ""
