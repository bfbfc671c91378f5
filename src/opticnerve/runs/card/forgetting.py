"""The card's section on what the language model forgot."""

from __future__ import annotations

from typing import Any

from opticnerve.common.markdown import plain, table
from opticnerve.runs.folder import RunFolder, finite


def forgetting(run: RunFolder) -> str:
    """The card's section."""
    title = "## What the language model forgot"
    entries = run.results.get("forgetting") or []
    if not entries:
        return f"{title}\n\nNot measured yet."
    base = finite(entries[0].get("perplexity"))
    rows = []
    for i, e in enumerate(entries):
        change = f"{finite(e.get('perplexity')) / base - 1:+.2%}" if i else "–"
        same = {True: "yes, bit by bit", False: "no", None: "–"}[e.get("logits_identical")]
        held = f"{_held(e)} of {len(e.get('answers') or [])}" if _held(e) is not None else "–"
        rows.append([plain(e.get("after", "?")), f"{finite(e.get('perplexity')):.3f}", change, same, held])
    head = [
        "after",
        "perplexity",
        f"change from {plain(entries[0].get('after', 'the start'))}",
        "text-only logits unchanged",
    ]
    parts = [title, table([*head, "answers with the expected word"], rows, right=(1, 2))]
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
    parts.append(_answers_side_by_side(entries))
    return "\n\n".join(p for p in parts if p)


def _held(entry: dict[str, Any]) -> int | None:
    marks = [a.get("holds") for a in entry.get("answers") or []]
    return sum(bool(m) for m in marks) if any(m is not None for m in marks) else None


def _answers_side_by_side(entries: list[dict[str, Any]]) -> str:
    by_stage = [{a["question"]: a for a in e.get("answers") or []} for e in entries]
    asked = list(dict.fromkeys(q for answers in by_stage for q in answers))
    if not asked:
        return ""
    rows = [[plain(q), *(_answer_cell(answers.get(q)) for answers in by_stage)] for q in asked]
    answers_table = table(["question", *(plain(e.get("after", "?")) for e in entries)], rows)
    return f"<details><summary>Answers to text-only questions, side by side</summary>\n\n{answers_table}\n\n</details>"


def _answer_cell(answer: dict[str, Any] | None) -> str:
    if answer is None:
        return "–"
    mark = {True: "✓ ", False: "✗ ", None: ""}[answer.get("holds")]
    return mark + plain(answer.get("answer") or "(nothing)", most=240)
