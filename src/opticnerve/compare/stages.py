"""Why stages: the connector first or everything at once, adapters or whole weights; measured by what staging is for:
accuracy, forgetting, cost and convergence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opticnerve.common.markdown import plain, table
from opticnerve.common.units import format_duration
from opticnerve.compare import plots
from opticnerve.compare.base import Base, Budget, Raw, stage_of
from opticnerve.compare.experiment import Experiment, quick
from opticnerve.compare.report import (
    ExperimentReport,
    Findings,
    accuracy_table,
    conclusion,
    number,
    size,
    systems_table,
)
from opticnerve.compare.rows import ExperimentRow
from opticnerve.compare.stats import failed, running, steps_to

BUDGET: Budget = {
    "seeds": 2,
    "questions": 100,
    "align": {"steps": 16, "batch": 8},
    "instruct": {"steps": 28, "batch": 2},
    "forgetting_tokens": 1024,
    "memory_steps": 2,
}
QUICK = quick(BUDGET, forgetting_tokens=64, memory_steps=1)
# Learning rates of parts that the base does not train itself.
RATES = {"encoder": 1.0e-4, "language": 1.0e-4, "language.lora": 2.0e-4, "connector": 1.0e-3}
REACHED = 1.25  # a training has converged where its loss is within this factor of the best row's final loss
FORGOTTEN = 1.005  # perplexity that is not half a percent above what it was says nothing of forgetting
TITLES = {
    "align-instruct": "align → instruct, LoRA",
    "align-instruct-aside": "align → instruct, LoRA that steps aside on text",
    "instruct-only": "instruct only, LoRA",
    "at-once": "everything at once, all weights",
    "connector-only": "align → instruct, connector only",
    "align-instruct-full": "align → instruct, whole language model",
}


def rows(base: Base, budget: Budget) -> list[ExperimentRow]:
    """Six ways through the same number of tokens."""
    rates = RATES | {p.removeprefix("image."): rate for p, rate in base.questions.train.items()}
    connector = {"connector": rates["connector"]}
    lora = connector | {"language.lora": rates["language.lora"]}
    whole = connector | {"language": RATES["language"]}
    given = base.questions.lora
    adapter: Raw = {"rank": 8} if given is None else given.model_dump(mode="json")
    always, media = adapter | {"when": "always"}, adapter | {"when": "media"}
    plans: dict[str, tuple[bool, dict[str, float], Raw | None]] = {
        "align-instruct": (True, lora, always),
        "align-instruct-aside": (True, lora, media),
        "instruct-only": (False, lora, always),
        "at-once": (False, whole | {"encoder": RATES["encoder"]}, None),
        "connector-only": (True, connector, None),
        "align-instruct-full": (True, whole, None),
    }
    align, instruct = budget["align"], budget["instruct"]
    longer = instruct | {"steps": instruct["steps"] + extra_steps(base, budget)}
    measured = {"forgetting": True, "forgetting_tokens": budget["forgetting_tokens"]}
    made = []
    for name, (aligned, train, options) in plans.items():
        cached = base.can_cache and "encoder" not in train
        stages = [stage_of(base.questions, instruct if aligned else longer, train=train, lora=options,
                           cache_features=cached)]  # fmt: skip
        if aligned:
            first = stage_of(base.captions, align, train=connector, lora=None, cache_features=base.can_cache)
            stages.insert(0, first)
        made.append(
            ExperimentRow(name, {name: TITLES[name]}, base.docked(name, stages, budget["questions"], **measured))
        )
    return made


def extra_steps(base: Base, budget: Budget) -> int:
    """How many steps of questions have as many tokens as all steps of captions: what the rows without them get."""
    align, instruct = budget["align"], budget["instruct"]
    captions, questions = base.tokens
    count: int = max(1, round(align["steps"] * align["batch"] * captions / (instruct["batch"] * questions)))
    return count


# -- the report -------------------------------------------------------------------------------------------------------

Curve = tuple[list[float], list[float], int]
"""Tokens read so far, losses, and the steps of earlier stages."""


def report(findings: Findings, folder: Path) -> ExperimentReport:
    """Accuracy, forgetting, cost, convergence; and what can be said of staging."""
    base, b = findings.base, findings.budget
    names = [n for n in TITLES if n in findings]
    recipes = [o.row.recipe for o in findings.outcomes if o.row.recipe is not None]
    single = [r["stages"][0]["steps"] for r in recipes if len(r["stages"]) == 1]
    rates = {part: rate for r in recipes for stage in r["stages"] for part, rate in stage["train"].items()}
    curves = {n: c for n in TITLES if (c := _curves(findings, n))}
    threshold = REACHED * min((_end(c) for c in curves.values()), default=np.nan)
    return ExperimentReport(
        "Why stages",
        f"The same vision encoder, connector and language model ({base.name}), trained in {len(names)} ways. “Align” "
        "trains the connector on captions, “instruct” on questions; “everything at once” opens vision encoder, "
        "connector and language model from the first step, on questions. In brackets: 95 % intervals over seeds and "
        "questions.",
        f"{b['align']['steps']} steps of {b['align']['batch']} captions and {b['instruct']['steps']} steps of "
        f"{b['instruct']['batch']} rows of questions. Rows without the first stage get its tokens' worth of further "
        f"steps on questions{f' ({single[0]} steps in all)' if single else ''}; how many tokens each row read is in "
        f"the table of costs. Learning rates: {', '.join(f'{p} {r:g}' for p, r in rates.items())}.",
        [
            ("Accuracy", accuracy_table(findings, names)),
            ("Forgetting", _forgetting_table(findings, names)),
            ("Cost", _cost_table(findings, names, folder)),
            ("Convergence", _convergence(findings, curves, threshold, folder)),
        ],
        [
            *_on_accuracy(findings), *_on_forgetting(findings), *_on_cost(findings),
            *_on_convergence(findings, curves, threshold),
        ],
        [
            f"Perplexity is measured on the beginning of one English text ({b['forgetting_tokens']:,} tokens), and the "
            "text-only questions are few: small changes are not told apart.",
            "What another learning rate would forget, and learn, was not tried, for adapters as for whole weights.",
            "Everything at once and instruct only see no captions: what captions teach beside alignment is part of the "
            "difference.",
        ],
    )  # fmt: skip


def _forgetting_of(findings: Findings, name: str) -> dict[str, Any] | None:
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
        "forced": f" ({np.mean(forced):.2f} with the adapter forced on)" if forced else "",
    }  # fmt: skip


def _forgetting_table(findings: Findings, names: Sequence[str]) -> str:
    lines = [
        [TITLES[name], f"{f['before']:.2f}", f"{f['after']:.2f}{f['forced']}", f"{100 * (f['ratio'] - 1):+.1f} %",
         f"{f['held_before']:.1f} of {f['asked']}", f"{f['held']:.1f} of {f['asked']}",
         "yes" if f["identical"] else "no"]
        for name in names if (f := _forgetting_of(findings, name)) is not None
    ]  # fmt: skip
    head = ["", "perplexity before", "after", "change", "text answers right before", "after"]
    return table([*head, "text logits bit-identical"], lines, right=(1, 2, 3, 4, 5))


def _cost_table(findings: Findings, names: Sequence[str], folder: Path) -> str:
    text = systems_table(findings, names, [
        ("parameters trained", lambda s: number(s.mean("trained"))),
        ("optimizer's memory", lambda s: size(s.mean("optimizer_bytes"))),
        ("peak memory of training", lambda s: size(s.mean("peak_training_bytes"))),
        ("training", lambda s: format_duration(s.mean("train_seconds") or 0.0)),
        ("steps", lambda s: number(s.mean("steps"))),
        ("tokens", lambda s: number(s.mean("tokens"))),
    ])  # fmt: skip
    note = (
        "The optimizer's memory is computed: two float32 moments for each trained parameter, and a float32 master "
        "where the weight is bf16. The peak is that of a process of its own that takes "
        f"{findings.budget['memory_steps']} step(s) of each stage and does nothing else, Python and its libraries "
        "included."
    )
    known = {TITLES[n]: findings[n].mean("peak_training_bytes") for n in names}
    peaks = {title: peak / 2**30 for title, peak in known.items() if peak is not None}
    if not peaks:
        return f"{text}\n\n{note}"
    plots.bars(peaks, folder / "memory.png", title="Peak memory of training", note="one seed", x="GiB")
    return f"{text}\n\n{note}\n\n![Peak memory of training](memory.png)"


def _curves(findings: Findings, name: str) -> list[Curve]:
    """The last stage's loss of each seed, over the tokens of all stages."""
    made = []
    for seed, stages in findings.curves.get(name, {}).items():
        # What diverged may have ended in its captions, and stops where no other curve does.
        if seed in findings.diverged.get(name, {}) or not stages or not stages[-1].metrics:
            continue
        earlier = [m["tokens"] for s in stages[:-1] for m in s.metrics]
        tokens = np.cumsum([m["tokens"] for m in stages[-1].metrics]) + sum(earlier)
        losses = [m["loss"] if m["loss"] is not None else np.nan for m in stages[-1].metrics]
        made.append((tokens.tolist(), losses, len(earlier)))
    return made


def _convergence(findings: Findings, curves: dict[str, list[Curve]], threshold: float, folder: Path) -> str:
    lines = []
    for name in TITLES:
        seeds, many = curves.get(name, []), _trainings(findings, name)
        if not many:
            continue
        reached = [r for c in seeds if (r := reach(c, threshold)) is not None]
        means = [number(float(m)) for m in np.mean(reached, 0)] if reached else ["not reached"] * 2
        fails = failures(findings, curves, name)
        lines.append([
            TITLES[name], f"{_end(seeds):.3f}" if seeds else "–", *means, f"{len(reached)} of {many}",
            f"{len(fails)} of {many}" + (f": {plain('; '.join(fails))}" if fails else ""),
        ])  # fmt: skip
    head = ["", "loss at the end", f"steps to {threshold:.3f}", "tokens to it", "seeds that reach it", "failures"]
    shown = {TITLES[n]: [(x, y) for x, y, _ in c] for n, c in curves.items()}
    plots.bands(
        shown, folder / "loss.png", title="Loss on questions", x="tokens read, captions included", threshold=threshold,
        note=f"smoothed, mean over seeds with their range; dotted: {threshold:.3f}",
    )  # fmt: skip
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
    bad = [why for _, losses, _ in curves.get(name, []) if (why := failed(losses)) is not None]
    return [*findings.diverged.get(name, {}).values(), *bad]


def _end(seeds: Sequence[Curve]) -> float:
    """The loss at the end, averaged over the last steps and over seeds."""
    return float(np.mean([running(losses)[-1] for _, losses, _ in seeds]))


def _trainings(findings: Findings, name: str) -> int:
    return sum(o.row.name == name and o.record is not None for o in findings.outcomes)


# -- what can be said -------------------------------------------------------------------------------------------------


def _on_accuracy(findings: Findings) -> list[str]:
    first = "align-instruct"
    return [
        f"Accuracy: {conclusion(f'“{TITLES[first]}”', f'“{TITLES[second]}”', gap, ', all questions')}"
        for second in ("instruct-only", "at-once", "connector-only", "align-instruct-full")
        if (gap := findings.versus(first, second)) is not None
    ]


def _on_forgetting(findings: Findings) -> list[str]:
    found = {n: f for n in TITLES if n in findings and (f := _forgetting_of(findings, n)) is not None}
    change = {n: f"“{TITLES[n]}” {100 * (f['ratio'] - 1):+.1f} %" for n, f in found.items()}
    said = []
    if len(found) > 1:
        ranked = sorted(found, key=lambda n: -found[n]["ratio"])
        said.append(f"Perplexity on text, from the most forgetting down: {', '.join(change[n] for n in ranked)}.")
    for saying, less, more in (
        ("aligning the connector first protects the language model", "align-instruct", "instruct-only"),
        ("an adapter forgets less than whole weights", "align-instruct", "align-instruct-full"),
        ("everything at once forgets more than whole weights after aligning", "align-instruct-full", "at-once"),
    ):
        if less in found and more in found:
            word = holds(found[less]["ratios"], found[more]["ratios"])
            if max(found[less]["ratio"], found[more]["ratio"]) < FORGOTTEN:
                word = "cannot be seen, for neither forgets,"
            said.append(f"That {saying} {word} here: {change[less]} against {change[more]}.")
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
    if 2 / math.comb(len(less) + len(more), len(less)) <= 0.05:
        return word
    return f"{word} in all {len(less)} × {len(more)} pairs of trainings, too few to rule out chance,"


def _on_cost(findings: Findings) -> list[str]:
    said, first = [], "align-instruct"
    facts = {
        "peak_training_bytes": "the peak memory", "train_seconds": "the seconds",
        "optimizer_bytes": "the optimizer's memory",
    }  # fmt: skip
    for second in ("align-instruct-full", "at-once"):
        if first not in findings or second not in findings:
            continue
        pairs = [(findings[first].mean(f), findings[second].mean(f), words) for f, words in facts.items()]
        parts = [f"{more / less:.1f} × {words}" for less, more, words in pairs if less and more]
        if parts:
            said.append(f"Cost: “{TITLES[second]}” takes {', '.join(parts)} of “{TITLES[first]}”.")
    return said


def _on_convergence(findings: Findings, curves: dict[str, list[Curve]], threshold: float) -> list[str]:
    said = []
    if {"align-instruct", "instruct-only"} <= set(curves):
        reached = {n: [reach(c, threshold) for c in curves[n]] for n in ("align-instruct", "instruct-only")}
        known = {n: [r[1] for r in each if r is not None] for n, each in reached.items()}
        if all(len(known[n]) == len(each) for n, each in reached.items()):
            first, second = (float(np.mean(tokens)) for tokens in known.values())
            word = "fewer" if first < second else "more"
            said.append(
                f"Counting its captions, aligning first takes {word} tokens to a loss of {threshold:.3f} than "
                f"questions from the start: {first:,.0f} against {second:,.0f} (mean over seeds)."
            )
        else:
            counts = [f"“{TITLES[n]}” in {len(known[n])} of {len(each)} seeds" for n, each in reached.items()]
            said.append(f"A loss of {threshold:.3f} is reached by {' and by '.join(counts)}.")
    trainings = {n: many for n in TITLES if (many := _trainings(findings, n))}
    total, counted = sum(trainings.values()), {n: len(failures(findings, curves, n)) for n in trainings}
    if some := [f"“{TITLES[n]}” {count}" for n, count in counted.items() if count]:
        said.append(f"Failed trainings: {', '.join(some)}, of {total} in all.")
    elif total:
        folk = "; that everything at once does not converge does not show at this scale" if "at-once" in counted else ""
        said.append(f"None of the {total} trainings failed{folk}.")
    return said


EXPERIMENT = Experiment("stages", BUDGET, QUICK, rows, report, isolated=True)
