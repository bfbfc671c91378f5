"""How to fuse: connectors between one vision encoder and one language model, under one budget and with one feature
cache."""

from __future__ import annotations

from pathlib import Path

from opticnerve.compare import plots
from opticnerve.compare import report as reports
from opticnerve.compare.base import Base, Budget, Raw
from opticnerve.compare.experiment import Experiment, quick
from opticnerve.compare.report import ALL, Findings, System, align_words, conclusion, number, points
from opticnerve.compare.rows import ExperimentRow
from opticnerve.compare.stats import rank_chance, rank_correlation

BUDGET: Budget = {
    "seeds": 1,
    "questions": 300,
    "align": {"steps": 30, "batch": 8},
    "instruct": {"steps": 70, "batch": 2},
}
QUICK = quick(BUDGET)
FUSION_RATE = 2.0e-3
# Square pictures of 64 px, 16 patches: what a vision encoder of 128 px with a 4 × 4 map gives, in number.
PATCHES: Raw = {"type": "patches", "image_size": 64, "patch_size": 16}

# Name → title, and what changes under `model.image`.
CONNECTORS: dict[str, tuple[str, Raw]] = {
    "linear": ("linear", {"connector": {"type": "linear"}}),
    "mlp": ("mlp, 2 layers", {"connector": {"type": "mlp"}}),
    "pixel-shuffle": ("pixel_shuffle, 2 × 2", {"connector": {"type": "pixel_shuffle", "scale": 2, "depth": 2}}),
    "qformer": ("qformer, 16 queries", {"connector": {"type": "qformer", "num_queries": 16, "depth": 2}}),
    "resampler": (
        "resampler, 16 latents",
        {"connector": {"type": "resampler", "num_latents": 16, "depth": 2, "heads": 8, "head_dim": 32}},
    ),
    "abstractor": ("abstractor, 16 tokens", {"connector": {"type": "abstractor", "out_tokens": 16, "depth": 1}}),
    "cross-attention": (
        "cross-attention before every 5th layer",
        {"connector": {"type": "mlp"}, "fusion": {"type": "cross_attention", "every": 5}},
    ),
    "patches": ("raw patches, no encoder", {"connector": {"type": "mlp"}, "encoder": PATCHES}),
}


# Fact → what it is called, and whether its axis is logarithmic.
COSTS = {
    "visual_tokens": ("visual tokens", "visual tokens of a picture", "tokens.png", False),
    "between_parameters": ("parameters between vision encoder and language model",
                           "parameters of connector and fusion", "parameters.png", True),
    "train_seconds": ("seconds of training", "seconds of training", "seconds.png", False),
}  # fmt: skip


def rows(base: Base, budget: Budget) -> list[ExperimentRow]:
    """The base with each connector in turn. Patches are pixels, cut: nothing of them trains, or is worth caching."""
    return [
        ExperimentRow(name, {name: title}, base.with_image(name, budget, change, FUSION_RATE))
        for name, (title, change) in CONNECTORS.items()
    ]


def report(findings: Findings, folder: Path) -> reports.ExperimentReport:
    """The table, accuracy against each cost, and which differences are real."""
    names = [n for n in CONNECTORS if n in findings]
    more = [
        ("visual tokens", _tokens),
        ("parameters of connector and fusion", lambda s: number(s.mean("between_parameters"))),
        ("all that trains", lambda s: number(s.mean("trained"))),
        ("training seconds", lambda s: number(s.mean("train_seconds"))),
    ]
    note = f"{len(findings.groups[ALL]):,} questions, {len(findings.seeds)} seed(s); whiskers are 95 % intervals"
    images = []
    for fact, (_, words, file, log) in COSTS.items():
        shown = {
            findings[n].title: (cost, found) for n in names
            if (cost := findings[n].mean(fact)) is not None and (found := findings.estimate(n)) is not None
        }  # fmt: skip
        title = f"Accuracy against {words}"
        plots.scatter(shown, folder / file, title=title, note=note, x=words, log=log)
        images.append(f"![{title}]({file})")
    return reports.ExperimentReport(
        "Which connector",
        f"{findings.base.name} with one part changed in each row: what stands between the vision encoder and the "
        "language model. Vision encoder, language model, data, steps and learning rates are the same for all; “raw "
        "patches” has no vision encoder, and the mlp reads pixels. In brackets: 95 % intervals over seeds and "
        "questions.",
        f"{align_words(findings.budget)}; frozen vision encoders saw each picture once, in one feature cache for all "
        "rows (not counted in the seconds).",
        [("Accuracy and cost", reports.accuracy_table(findings, names, more=more)),
         ("Accuracy against cost", "\n\n".join(images))],
        _shows(findings, names),
        [
            "So few steps show which connector learns fastest from little, not which is best after long training. All "
            "of them start from random weights; so do the layers of cross-attention.",
            "Where several rows have equal numbers of visual tokens, the tokens explain nothing between them.",
        ],
    )  # fmt: skip


def _shows(findings: Findings, names: list[str]) -> list[str]:
    if len(names) < 2:
        return []
    means = {n: float(findings[n].table_SQ.mean()) for n in names}
    best, *others = sorted(names, key=lambda n: -means[n])
    last, title = others[-1], findings[best].title
    gaps = {n: gap for n in others if (gap := findings.versus(best, n)) is not None}
    level = [findings[n].title for n, gap in gaps.items() if not gap.sure]
    said = [
        f"Highest: {title}, {100 * means[best]:.1f} %; lowest: {findings[last].title}, {100 * means[last]:.1f} %. "
        f"Between them: {points(gaps[last])} (the two were picked on these questions, so this interval is too narrow).",
        f"Not told apart from {title} (their differences' intervals hold zero): {', '.join(level)}."
        if level
        else f"{title} is ahead of every other row, each with an interval above zero.",
    ]
    for fact, (words, *_) in COSTS.items():
        pairs = [(c, means[n]) for n in names if (c := findings[n].mean(fact)) is not None]
        costs, accuracies = [c for c, _ in pairs], [a for _, a in pairs]
        rho = rank_correlation(costs, accuracies)
        if rho == rho:  # not NaN
            p = rank_chance(costs, accuracies)
            strength = "no clear" if p > 0.05 else "a positive" if rho > 0 else "a negative"
            said.append(
                f"More {words}: {strength} rank correlation with accuracy ({rho:+.2f} over {len(pairs)} rows, "
                f"p = {p:.2g})."
            )
    if "linear" in names and "mlp" in names:
        said.append(conclusion("The mlp", "the linear map", findings.versus("mlp", "linear"), ", all questions"))
    return said


def _tokens(system: System) -> str:
    beside = any(f.get("fusion") == "cross_attention" for f in system.facts.values())
    return number(system.mean("visual_tokens")) + (", beside the text" if beside else "")


EXPERIMENT = Experiment("connectors", BUDGET, QUICK, rows, report)
