"""What can be said of staging: accuracy, forgetting, cost and convergence of the rows of `stages`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opticnerve.common.markdown import duration, plain, table
from opticnerve.compare import plots
from opticnerve.compare.findings import ALL, Findings
from opticnerve.compare.report import Report, accuracy_table, conclusion, number, size
from opticnerve.compare.stats import failed, running, steps_to

REACHED = 1.25  # a training has converged where its loss is within this factor of the best row's final loss

TITLES = {
    "align-instruct": "align → instruct, LoRA",
    "align-instruct-aside": "align → instruct, LoRA that steps aside on text",
    "instruct-only": "instruct only, LoRA",
    "at-once": "everything at once, all weights",
    "connector-only": "align → instruct, connector only",
    "align-instruct-full": "align → instruct, whole language model",
}


def report(findings: Findings, folder: Path) -> Report:
    """Accuracy, forgetting, cost, convergence; and what can be said of staging."""
    base, b = findings.base, findings.budget
    names = [n for n in TITLES if n in findings]
    align, instruct = b["align"], b["instruct"]
    single = [len(r.recipe["stages"]) == 1 for r in {o.row.name: o.row for o in findings.outcomes}.values() if r.recipe]
    said = Report(
        "Why stages",
        f"The same vision encoder, connector and language model ({base.name}), trained in {len(names)} ways. "
        f"“Align” trains the "
        f"connector on captions, “instruct” on questions; “everything at once” opens vision encoder, connector and "
        f"language model "
        f"from the first step, on questions. In brackets: 95 % intervals over seeds and questions.",
        f"{align['steps']} steps of {align['batch']} captions and {instruct['steps']} steps of {instruct['batch']} "
        f"rows of questions. Rows without the first stage get its tokens' worth of further steps on questions"
        + (f" ({_steps_of_single(findings)} steps in all)" if any(single) else "")
        + "; how many tokens each row read is in the table of costs. Learning rates: "
        + ", ".join(f"{p} {r:g}" for p, r in _rates(findings).items())
        + ".",
    )  # fmt: skip
    curves = {n: c for n in TITLES if (c := _curves(findings, n))}
    threshold = REACHED * min((_end(c) for c in curves.values()), default=np.nan)
    said.sections = [
        ("Accuracy", accuracy_table(findings, names)),
        ("Forgetting", _forgetting_table(findings, names)),
        ("Cost", _cost_table(findings, names, folder)),
        ("Convergence", _convergence(findings, curves, threshold, folder)),
    ]
    said.shows = _shows(findings, curves, threshold)
    said.does_not = [
        "Perplexity is measured on the beginning of one English text "
        f"({b['forgetting_tokens']:,} tokens), and the text-only questions are few: small changes are not told apart.",
        "What another learning rate would forget, and learn, was not tried, for adapters as for whole weights.",
        "Everything at once and instruct only see no captions: what captions teach beside alignment is part of the "
        "difference.",
    ]
    return said


def forgetting_of(findings: Findings, name: str) -> dict[str, Any] | None:
    """Means over seeds: perplexity `before`, `after`, their `ratio`, right text answers `held_before` and `held`."""
    entries = [f["forgetting"] for f in findings[name].facts.values() if len(f.get("forgetting") or ()) > 1]
    if not entries:
        return None

    def mean(at: int, key: str) -> float:
        return float(np.mean([e[at][key] for e in entries]))

    forced = [e[-1]["perplexity_adapter_on"] for e in entries if "perplexity_adapter_on" in e[-1]]
    before, after = mean(0, "perplexity"), mean(-1, "perplexity")
    return {
        "before": before, "after": after, "ratio": after / before,
        "ratios": [e[-1]["perplexity"] / e[0]["perplexity"] for e in entries], "held_before": mean(0, "answers_hold"),
        "held": mean(-1, "answers_hold"), "asked": len(entries[0][0]["answers"]),
        "identical": all(e[-1].get("logits_identical") for e in entries),
        "forced": float(np.mean(forced)) if forced else None,
    }  # fmt: skip


def _forgetting_table(findings: Findings, names: Sequence[str]) -> str:
    lines = []
    for name in names:
        f = forgetting_of(findings, name)
        if f is None:
            continue
        same = "yes" if f["identical"] else "no"
        forced = f" ({f['forced']:.2f} with the adapter forced on)" if f["forced"] is not None else ""
        lines.append([
            TITLES[name], f"{f['before']:.2f}", f"{f['after']:.2f}{forced}", f"{100 * (f['ratio'] - 1):+.1f} %",
            f"{f['held_before']:.1f} of {f['asked']}", f"{f['held']:.1f} of {f['asked']}", same,
        ])  # fmt: skip
    head = [
        "",
        "perplexity before",
        "after",
        "change",
        "text answers right before",
        "after",
        "text logits bit-identical",
    ]
    return table(head, lines, right=(1, 2, 3, 4, 5))


def _cost_table(findings: Findings, names: Sequence[str], folder: Path) -> str:
    lines, peaks = [], {}
    for name in names:
        s = findings[name]
        peak = s.mean("peak_training_bytes")
        if peak is not None:
            peaks[TITLES[name]] = peak / 2**30
        lines.append([
            TITLES[name], number(s.mean("trained")), size(s.mean("optimizer_bytes")), size(peak),
            duration(s.mean("train_seconds") or 0.0), number(s.mean("steps")), number(s.mean("tokens")),
        ])  # fmt: skip
    head = ["", "parameters trained", "optimizer's memory", "peak memory of training", "training", "steps", "tokens"]
    note = (
        "The optimizer's memory is computed: two float32 moments for each trained parameter, and a float32 master "
        "where the weight is bf16. The peak is that of a process of its own that takes "
        f"{findings.budget['memory_steps']} step(s) of each stage and does nothing else, Python and its libraries "
        "included."
    )
    text = table(head, lines, right=tuple(range(1, 7)))
    if not peaks:
        return f"{text}\n\n{note}"
    plots.bars(peaks, folder / "memory.png", title="Peak memory of training", note="one seed", x="GiB")
    return f"{text}\n\n{note}\n\n![Peak memory of training](memory.png)"


Curve = tuple[list[float], list[float], int]
"""Tokens read so far, losses, and the steps of earlier stages."""


def _curves(findings: Findings, name: str) -> list[Curve]:
    """The last stage's loss of each seed, over the tokens of all stages."""
    made = []
    for seed, stages in findings.curves.get(name, {}).items():
        # What diverged may have ended in its captions, and stops where no other curve does.
        if seed in findings.diverged.get(name, {}) or not stages or not stages[-1].metrics:
            continue
        earlier = sum(m["tokens"] for s in stages[:-1] for m in s.metrics)
        tokens = np.cumsum([m["tokens"] for m in stages[-1].metrics]) + earlier
        losses = [m["loss"] if m["loss"] is not None else np.nan for m in stages[-1].metrics]
        made.append((tokens.tolist(), losses, sum(len(s.metrics) for s in stages[:-1])))
    return made


def _convergence(findings: Findings, curves: dict[str, list[Curve]], threshold: float, folder: Path) -> str:
    lines = []
    for name in (n for n in TITLES if _trainings(findings, n)):
        seeds, many = curves.get(name, []), _trainings(findings, name)
        reached = [reach(c, threshold) for c in seeds]
        steps = [r[0] for r in reached if r is not None]
        tokens = [r[1] for r in reached if r is not None]
        fails = failures(findings, curves, name)
        lines.append([
            TITLES[name], f"{_end(seeds):.3f}" if seeds else "–",
            number(float(np.mean(steps))) if steps else "not reached",
            number(float(np.mean(tokens))) if tokens else "not reached", f"{len(steps)} of {many}",
            f"{len(fails)} of {many}" + (f": {plain('; '.join(fails))}" if fails else ""),
        ])  # fmt: skip
    head = ["", "loss at the end", f"steps to {threshold:.3f}", "tokens to it", "seeds that reach it", "failures"]
    shown = {TITLES[n]: [(x, y) for x, y, _ in c] for n, c in curves.items()}
    note = f"smoothed, mean over seeds with their range; dotted: {threshold:.3f}"
    plots.bands(shown, folder / "loss.png", title="Loss on questions", note=note, x="tokens read, captions included",
                threshold=threshold)  # fmt: skip
    return (
        f"Steps and tokens count from the very beginning, captions included; the mark is {REACHED:g} × the final loss "
        f"of the best row (mean over seeds); losses are averaged over up to ten steps, for one batch may be lucky. "
        f"Curves of trainings that diverged are left out. A training fails if its loss is not finite or ends no lower "
        f"than it began.\n\n"
        f"{table(head, lines, right=(1, 2, 3, 4))}\n\n![Loss on questions](loss.png)"
    )


def reach(curve: Curve, threshold: float) -> tuple[int, float] | None:
    """Steps and tokens from the beginning until the smoothed loss is at the threshold; None if it never is."""
    tokens, losses, earlier = curve
    step = steps_to(losses, threshold)
    return None if step is None else (earlier + step, tokens[step - 1])


def failures(findings: Findings, curves: dict[str, list[Curve]], name: str) -> list[str]:
    """Why trainings of a row failed; those that stopped with a loss that is no number count once."""
    diverged = findings.diverged.get(name, {})
    bad = [why for _, losses, _ in curves.get(name, []) if (why := failed(losses)) is not None]
    return [*diverged.values(), *bad]


def _end(seeds: Sequence[Curve]) -> float:
    """The loss at the end, averaged over the last steps and over seeds."""
    return float(np.mean([running(losses)[-1] for _, losses, _ in seeds]))


def _rates(findings: Findings) -> dict[str, float]:
    """Part → learning rate, over all stages of all rows."""
    recipes = [o.row.recipe for o in findings.outcomes if o.row.recipe is not None]
    return {part: rate for recipe in recipes for stage in recipe["stages"] for part, rate in stage["train"].items()}


def _trainings(findings: Findings, name: str) -> int:
    return sum(o.row.name == name and o.record is not None for o in findings.outcomes)


def _steps_of_single(findings: Findings) -> int:
    return next(r["stages"][0]["steps"] for o in findings.outcomes if (r := o.row.recipe) and len(r["stages"]) == 1)


# -- what can be said -------------------------------------------------------------------------------------------------


def _shows(findings: Findings, curves: dict[str, list[Curve]], threshold: float) -> list[str]:
    said = []
    for first, second in (
        ("align-instruct", "instruct-only"),
        ("align-instruct", "at-once"),
        ("align-instruct", "connector-only"),
        ("align-instruct", "align-instruct-full"),
    ):
        gap = findings.versus(first, second)
        if gap is not None:
            said.append(
                "Accuracy: " + conclusion(f"“{TITLES[first]}”", f"“{TITLES[second]}”", gap, f", {ALL} questions")
            )
    said += _on_forgetting(findings) + _on_cost(findings) + _on_convergence(findings, curves, threshold)
    return said


FORGOTTEN = 1.005  # perplexity that is not half a percent above what it was says nothing of forgetting


def _on_forgetting(findings: Findings) -> list[str]:
    found = {n: f for n in TITLES if n in findings and (f := forgetting_of(findings, n)) is not None}
    said = []

    def change(name: str) -> str:
        return f"“{TITLES[name]}” {100 * (found[name]['ratio'] - 1):+.1f} %"

    if len(found) > 1:
        ranked = sorted(found, key=lambda n: -found[n]["ratio"])
        said.append(f"Perplexity on text, from the most forgetting down: {', '.join(change(n) for n in ranked)}.")
    for saying, less, more in (
        ("aligning the connector first protects the language model", "align-instruct", "instruct-only"),
        ("an adapter forgets less than whole weights", "align-instruct", "align-instruct-full"),
        ("everything at once forgets more than whole weights after aligning", "align-instruct-full", "at-once"),
    ):
        if less in found and more in found:
            word = holds(found[less]["ratios"], found[more]["ratios"])
            if max(found[less]["ratio"], found[more]["ratio"]) < FORGOTTEN:
                word = "cannot be seen, for neither forgets,"
            said.append(f"That {saying} {word} here: {change(less)} against {change(more)}.")
    silent = [TITLES[n] for n in found if found[n]["identical"]]
    if silent:
        said.append(f"Nothing is forgotten (text logits bit-identical) with: “{'”, “'.join(silent)}”.")
    return said


def holds(less: Sequence[float], more: Sequence[float]) -> str:
    """Whether all trainings of one kind forget less than all of the other, and whether that may be chance.

    If the two kinds do not differ, one order in `C(a + b, a)` has all of one below all of the other, and one the
    reverse (the exact rank-sum test): with three seeds each that is chance in 10 % of cases, with four in 3 %.
    """
    word = "holds" if max(less) < min(more) else "does not hold" if min(less) > max(more) else None
    if word is None:
        return "is not decided"
    chance = 2 / math.comb(len(less) + len(more), len(less))
    return (
        word
        if chance <= 0.05
        else f"{word} in all {len(less)} × {len(more)} pairs of trainings, too few to rule out chance,"
    )


def _on_cost(findings: Findings) -> list[str]:
    said = []
    for first, second in (("align-instruct", "align-instruct-full"), ("align-instruct", "at-once")):
        if first not in findings or second not in findings:
            continue
        parts = []
        for fact, words in (
            ("peak_training_bytes", "the peak memory"),
            ("train_seconds", "the seconds"),
            ("optimizer_bytes", "the optimizer's memory"),
        ):
            less, more = findings[first].mean(fact), findings[second].mean(fact)
            if less and more:
                parts.append(f"{more / less:.1f} × {words}")
        if parts:
            said.append(f"Cost: “{TITLES[second]}” takes {', '.join(parts)} of “{TITLES[first]}”.")
    return said


def _on_convergence(findings: Findings, curves: dict[str, list[Curve]], threshold: float) -> list[str]:
    said = []
    if {"align-instruct", "instruct-only"} <= set(curves):
        reached = {n: [reach(c, threshold) for c in curves[n]] for n in ("align-instruct", "instruct-only")}
        if all(all(r is not None for r in each) for each in reached.values()):
            first, second = (float(np.mean([r[1] for r in reached[n] if r])) for n in reached)
            word = "fewer" if first < second else "more"
            said.append(
                f"Counting its captions, aligning first takes {word} tokens to a loss of {threshold:.3f} than "
                f"questions from the start: {first:,.0f} against {second:,.0f} (mean over seeds)."
            )
        else:
            counts = [f"“{TITLES[n]}” in {sum(r is not None for r in e)} of {len(e)} seeds" for n, e in reached.items()]
            said.append(f"A loss of {threshold:.3f} is reached by {' and by '.join(counts)}.")
    counted = {n: len(failures(findings, curves, n)) for n in TITLES if _trainings(findings, n)}
    total = sum(_trainings(findings, n) for n in counted)
    some = [f"“{TITLES[n]}” {k}" for n, k in counted.items() if k]
    if some:
        said.append(f"Failed trainings: {', '.join(some)}, of {total} in all.")
    elif total:
        folk = "; that everything at once does not converge does not show at this scale" if "at-once" in counted else ""
        said.append(f"None of the {total} trainings failed{folk}.")
    return said
