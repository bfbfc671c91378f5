"""Why stages: the connector first or everything at once, adapters or whole weights; measured by what staging is for:
forgetting, cost and convergence."""

from __future__ import annotations

from opticnerve.compare.base import Base, Raw, stage_of
from opticnerve.compare.experiment import Budget, Experiment
from opticnerve.compare.rows import Row
from opticnerve.compare.stages_report import TITLES, report
from opticnerve.plan import data as plan_data
from opticnerve.plan import model as plan_model

BUDGET: Budget = {
    "seeds": 2,
    "questions": 100,
    "align": {"steps": 16, "batch": 8},
    "instruct": {"steps": 28, "batch": 2},
    "forgetting_tokens": 1024,
    "memory_steps": 2,
}
QUICK: Budget = {
    "seeds": 1,
    "questions": 12,
    "align": {"steps": 1, "batch": 2},
    "instruct": {"steps": 1, "batch": 2},
    "forgetting_tokens": 64,
    "memory_steps": 1,
}
# Learning rates of parts that the base does not train itself.
RATES = {"encoder": 1.0e-4, "language": 1.0e-4, "language.lora": 2.0e-4, "connector": 1.0e-3}


def rows(base: Base, budget: Budget) -> list[Row]:
    """Six ways through the same number of tokens."""
    connector = {"connector": _rate(base, "connector")}
    lora = connector | {"language.lora": _rate(base, "language.lora")}
    whole = connector | {"language": RATES["language"]}
    everything = whole | {"encoder": RATES["encoder"]}
    adapter = _adapter(base)
    more = extra_steps(base, budget)
    plans: dict[str, tuple[bool, dict[str, float], Raw | None]] = {
        "align-instruct": (True, lora, adapter | {"when": "always"}),
        "align-instruct-aside": (True, lora, adapter | {"when": "media"}),
        "instruct-only": (False, lora, adapter | {"when": "always"}),
        "at-once": (False, everything, None),
        "connector-only": (True, connector, None),
        "align-instruct-full": (True, whole, None),
    }
    made = []
    for name, (aligned, train, options) in plans.items():
        align, instruct = budget["align"], budget["instruct"]
        stages = []
        if aligned:
            stages.append(
                stage_of(base.captions, steps=align["steps"], batch_size=align["batch"], train=connector, lora=None,
                         cache_features=base.can_cache)
            )  # fmt: skip
        stages.append(
            stage_of(base.questions, steps=instruct["steps"] + (0 if aligned else more), batch_size=instruct["batch"],
                     train=train, lora=options, cache_features=base.can_cache and "encoder" not in train)
        )  # fmt: skip
        measured = {"forgetting": True, "forgetting_tokens": budget["forgetting_tokens"]}
        made.append(Row(name, {name: TITLES[name]}, base.docked(name, stages, budget["questions"], **measured)))
    return made


def extra_steps(base: Base, budget: Budget) -> int:
    """How many steps of questions have as many tokens as all steps of captions: what the rows without them get."""
    processor = plan_model.processor_for(base.recipe)
    align, instruct = budget["align"], budget["instruct"]
    lengths = []
    for stage in (base.captions, base.questions):
        data = plan_data.inspect_data(stage, processor, seed=base.recipe.seed)
        lengths.append(max(1, data.length))
    return max(1, round(align["steps"] * align["batch"] * lengths[0] / (instruct["batch"] * lengths[1])))


def _rate(base: Base, part: str) -> float:
    """The learning rate that the base's last stage gives a part, or ours."""
    named = {p.removeprefix("image."): rate for p, rate in base.questions.train.items()}
    return named.get(part, RATES[part])


def _adapter(base: Base) -> Raw:
    return base.questions.lora.model_dump(mode="json") if base.questions.lora is not None else {"rank": 8}


EXPERIMENT = Experiment("stages", BUDGET, QUICK, rows, report, isolated=True)
