"""When to fuse: early, intermediate and late fusion, contrastive zero-shot, and vision-language models, on one set of
questions; with the two modalities alone, so that one sees which questions need both."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from opticnerve.compare import plots
from opticnerve.compare import report as reports
from opticnerve.compare.base import Base, Budget, Raw, one_by_one, stage_of
from opticnerve.compare.experiment import Experiment, quick
from opticnerve.compare.report import ALL, Findings, System, align_words, conclusion, number, percent
from opticnerve.compare.rows import ExperimentRow
from opticnerve.compare.stats import over_seeds

# Steps × rows. The classifiers' steps are such that they train for about as many seconds as the language models do.
BUDGET: Budget = {
    "seeds": 2,
    "questions": 250,
    "align": {"steps": 30, "batch": 8},
    "instruct": {"steps": 70, "batch": 2},
    "contrastive": {"steps": 120, "batch": 64},
    "early": {"steps": 400, "batch": 64},
    "intermediate": {"steps": 400, "batch": 64},
    "late": {"steps": 500, "batch": 64},
    "same_batch": 16,  # of the classifiers that see as many questions as the language models
}
QUICK = quick(BUDGET, same_batch=2)
CLASSIFIER = {"classifier": 1.0e-3}
CONTRASTIVE = {"image.projection": 1.0e-3, "text.projection": 1.0e-3, "text.encoder": 1.0e-4, "temperature": 1.0e-3}
CROSS_ATTENTION: Raw = {"type": "cross_attention", "every": 5}
CROSS_ATTENTION_RATE = 2.0e-3

# Narrower than by default, so that minutes are enough.
HEADS: dict[str, Raw] = {"intermediate": {"width": 128}}

TIMINGS = ("early", "intermediate", "late")
RULES = {
    "text": ("question-alone", "question alone (its branch)"),
    "image": ("picture-alone", "picture alone (its branch)"),
    "mean": ("late-mean", "late: mean"),
    "vote": ("late-vote", "late: vote"),
    "product": ("late-product", "late: product"),
    "learned": ("late-learned", "late: learned weights"),
}
LATE = ("late-mean", "late-vote", "late-product", "late-learned")
ORDER = (
    "question-alone", "picture-alone", "early", "intermediate", *LATE, "zero-shot", "vlm-splice",
    "vlm-cross-attention", "ensemble",
)  # fmt: skip
SAME = "same-"
"""Before the names of the classifiers that see as many questions as the language models do."""
BOTH, LOOK = "needs both", "words mislead"


def rows(base: Base, budget: Budget) -> list[ExperimentRow]:
    """The language models, the classifiers under both budgets, the dual encoder, and an ensemble."""
    instruct, batch = budget["instruct"], budget["same_batch"]
    seen = base.questions_in(instruct["steps"], instruct["batch"])
    same = {"steps": max(1, math.ceil(seen / batch)), "batch": batch}
    shared = {"choices": base.answers, "questions": base.asked(budget["questions"])}
    made = []
    for kind, change in (("splice", {}), ("cross-attention", {"fusion": CROSS_ATTENTION})):
        name = f"vlm-{kind}"
        recipe = base.with_image(name, budget, change, CROSS_ATTENTION_RATE)
        made.append(ExperimentRow(name, {name: f"VLM, {kind.replace('-', ' ')}"}, recipe, keep_weights=not change))
    made += [_classifier(base, timing, "", budget[timing], budget) for timing in TIMINGS]
    made += [_classifier(base, timing, SAME, same, budget) for timing in TIMINGS]
    stage = stage_of(
        base.captions, budget["contrastive"], objective={"type": "contrastive", "duplicates": "mask"},
        train=CONTRASTIVE, lora=None, cache_features=base.can_cache, data=one_by_one(base.captions.data),
    )  # fmt: skip
    made.append(
        ExperimentRow("contrastive", {"zero-shot": "contrastive, zero-shot (question not read)"},
                      base.dual("contrastive", stage), asks=({"ask": "zero_shot", "system": "zero-shot", **shared},))
    )  # fmt: skip
    parts = ("intermediate", "vlm-splice")
    made.append(
        ExperimentRow("ensemble", {"ensemble": "late: intermediate and VLM splice, mean"},
            asks=({"ask": "ensemble", "system": "ensemble", **shared},), needs=parts,
            of=tuple(r.recipe for r in made if r.name in parts and r.recipe is not None))
    )  # fmt: skip
    return made


def _classifier(base: Base, timing: str, prefix: str, length: Budget, budget: Budget) -> ExperimentRow:
    stage = stage_of(
        base.questions, length, objective={"type": "classification"}, train=CLASSIFIER, lora=None,
        data=one_by_one(base.questions.data), template="chat",
    )  # fmt: skip
    name, late, many = prefix + timing, timing == "late", budget["questions"]
    recipe = base.classifier(name, timing, stage, None if late else many, **HEADS.get(timing, {}))
    if not late:
        return ExperimentRow(name, {name: f"{timing} fusion"}, recipe, keep_weights=name == "intermediate")
    systems = {prefix + system: title for system, title in RULES.values()}
    rules = {rule: prefix + system for rule, (system, _) in RULES.items()}
    return ExperimentRow(name, systems, recipe, asks=({"ask": "late", "rules": rules, "questions": base.asked(many)},))


def report(findings: Findings, folder: Path) -> reports.ExperimentReport:
    """Two tables, a plot of each, and what can be said of intermediate fusion."""
    base, b = findings.base, findings.budget
    alone = base.question_alone(b["questions"])
    mark_groups(findings, alone)
    baseline = {g: float(np.mean([alone[i] for i in q])) if q else 0.0 for g, q in findings.groups.items()}
    usual = ["the words' most frequent answer in training"]
    usual += [f"{100 * baseline[g]:.1f} %" if q else "–" for g, q in findings.groups.items()]
    steps = ", ".join(f"{t} {b[t]['steps']} × {b[t]['batch']}" for t in TIMINGS)
    said = reports.ExperimentReport(
        "When to fuse",
        f"Three timings of fusion, contrastive learning and two vision-language models, all made of the parts of "
        f"{base.name} (text encoder `{base.text}` where there is one) and asked the same "
        f"{len(findings.groups[ALL]):,} questions. “{BOTH}” are the questions that neither modality alone answers "
        f"(averaged over seeds, by the two branches of late fusion); “{LOOK}” are those to which the words' most "
        f"frequent answer in training is wrong. In brackets: 95 % intervals over seeds and questions.",
        f"Language models: {align_words(b)}. Classifiers, in steps × questions: {steps}, chosen so that they train "
        f"for about as many seconds (those that it took are in the table); and once more with as many questions as the "
        f"language models saw, {b['same_batch']} to a step. Contrastive: {b['contrastive']['steps']} steps of "
        f"{b['contrastive']['batch']} captions. Encoders of pictures are frozen throughout.",
    )
    more = [
        ("training seconds", lambda s: number(s.mean("train_seconds"))),
        ("questions trained on", _questions),
    ]
    for prefix, file, heading, note in (
        ("", "seconds.png", "About equal seconds of training",
         "classifiers trained for about as long as the language models"),
        (SAME, "questions.png", "Equal numbers of questions",
         "classifiers saw as many questions as the language models"),
    ):  # fmt: skip
        # The language models are those that the equal numbers are equal to.
        names = [n for o in ORDER if (n := o if o.startswith("vlm-") else prefix + o) in findings]
        if not names:
            continue
        shown = {
            g: {findings[n].title: findings.estimate(n, g) for n in names} for g, q in findings.groups.items() if q
        }
        plots.dots(shown, folder / file, title=heading, note=note, lines=baseline, line_label=usual[0])
        text = reports.accuracy_table(findings, names, more=more, first=[usual])
        said.sections.append((heading, f"{text}\n\n![{heading}]({file})"))
    said.shows = _shows(findings, baseline[ALL])
    said.does_not = [
        f"On questions that need both, each branch alone is wrong by the choice of questions, which is hard on late "
        f"fusion: it can be right there only where two wrong guesses add up to a right one. “{LOOK}” is chosen without "
        f"a look at any of the models.",
        "Training seconds leave out what the frozen vision encoder's pictures cost once, when they enter the cache.",
        f"The classifiers can answer nothing outside {len(base.answers)} answers; that the language models can is "
        f"worth nothing on these questions.",
    ]  # fmt: skip
    return said


def mark_groups(findings: Findings, alone: list[float]) -> None:
    """Add the questions that need both modalities, and those whose words mislead."""
    if "question-alone" in findings and "picture-alone" in findings:
        read, seen = (findings[n].table_SQ.mean(0) for n in ("question-alone", "picture-alone"))
        findings.groups[BOTH] = np.flatnonzero((read < 0.5) & (seen < 0.5)).tolist()
    findings.groups[LOOK] = [i for i in findings.groups[ALL] if alone[i] < 0.5]


def _shows(findings: Findings, baseline: float) -> list[str]:
    said, groups = [], findings.groups
    if groups.get(BOTH):
        many, everything = len(groups[BOTH]), len(groups[ALL])
        said.append(f"{many} of {everything} questions ({many / everything:.0%}) are answered by neither branch alone.")
    for prefix, under in (("", "about equal seconds"), (SAME, "equal numbers of questions")):
        mine = prefix + "intermediate"
        for group in (g for g in (BOTH, LOOK, ALL) if mine in findings and groups.get(g)):
            chosen, where = groups[group], f", at {under}, {'all questions' if group == ALL else group}"
            rivals = {n: float(findings[n].table_SQ[:, chosen].mean()) for x in LATE if (n := prefix + x) in findings}
            best = [max(rivals, key=rivals.__getitem__)] if rivals else []
            for other in (n for n in [prefix + "early", *best] if n in findings):
                label = findings[other].title + (" (the best of the late ones)" if other in best else "")
                said.append(conclusion("Intermediate fusion", label, findings.versus(mine, other, group), where))
    for mine, words, others in (
        ("vlm-splice", "The VLM by splice", ("vlm-cross-attention", "intermediate", SAME + "intermediate")),
        ("ensemble", "Their ensemble", ("vlm-splice", "intermediate")),
    ):
        for other in (n for n in others if mine in findings and n in findings):
            label = findings[other].title + (" (equal questions)" if other.startswith(SAME) else "")
            said.append(conclusion(words, label, findings.versus(mine, other), ", all questions"))
    blind = [
        system.title for name, system in findings.systems.items()
        if name not in ("question-alone", "picture-alone") and not name.startswith(SAME)
        and (e := over_seeds(system.table_SQ)) is not None and e.low <= baseline
    ]  # fmt: skip
    if blind:
        said.append(
            f"Not surely above what the words alone give away ({100 * baseline:.1f} %), so not shown to look: "
            f"{'; '.join(blind)}."
        )
    if "zero-shot" in findings:
        shares = [f"{g} {percent(findings.estimate('zero-shot', g))}" for g, q in groups.items() if q]
        said.append(
            f"The contrastive model never reads the question and gives one answer to each picture: {'; '.join(shares)}."
        )
    return said


def _questions(system: System) -> str:
    """Samples of the last stage; the dual encoder is trained on captions alone."""
    if system.row == "contrastive":
        return "0 (captions)"
    counts = [list(f["samples"].values())[-1] for f in system.facts.values() if f.get("samples")]
    return number(sum(counts) / len(counts)) if counts else "–"


EXPERIMENT = Experiment("fusion", BUDGET, QUICK, rows, report)
