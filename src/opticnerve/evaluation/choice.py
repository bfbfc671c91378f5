"""Does the model know which caption belongs to the picture? The true one against nine others, by likelihood."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from opticnerve.evaluation.metrics import choice_rank, summarise
from opticnerve.evaluation.tasks import Progress, harness_version
from opticnerve.inference.likelihood import answer_scores
from opticnerve.types import Conversation, DataError, OpticNerveError

if TYPE_CHECKING:
    from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
    from opticnerve.models.vlm.processing import OpticNerveProcessor


def run_choice(
    model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor, conversations: Sequence[Conversation],
    *, name: str, others: int = 9, seed: int = 0, progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """An entry of results.json's `tasks`: how often the true answer is likelier than `others` answers of other
    pictures.

    All candidates stand behind one copy of the picture. The likelihood is the mean log-probability of an answer's
    tokens, its end-of-turn token included, so that long answers are not punished for their length.
    """
    answers = [c.answer for c in conversations]
    if any(a is None for a in answers):
        raise OpticNerveError("choosing among captions needs a true caption for each picture", kind="missing-field")
    rng = random.Random(seed)
    rows = []
    for done, conversation in enumerate(conversations, start=1):
        shown = [p.source for p in conversation.pieces]
        mine = {str(c.answer) for c in conversations if [p.source for p in c.pieces] == shown}
        pool = sorted({str(a) for a in answers} - mine)
        if len(pool) < others:
            raise OpticNerveError(
                f"only {len(pool)} other captions to choose from; {others} are needed", kind="out-of-range"
            )
        candidates = [str(conversation.answer), *rng.sample(pool, others)]
        rows.append(answer_scores(model, processor, conversation, candidates))
        if progress is not None:
            progress(done, len(conversations))
    return {"name": name, "harness": f"opticnerve choice of {others + 1} {harness_version()}", **choice_rank(rows)}


def run_multiple_choice(
    model: OpticNerveForConditionalGeneration,
    processor: OpticNerveProcessor,
    conversations: Sequence[Conversation],
    *,
    name: str,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """An entry of results.json's `tasks`: how often the right one of a question's own choices is the likeliest answer.

    `meta["choices"]` holds them. `accuracy` goes by the mean log-probability of an answer's tokens, as in `run_choice`;
    `accuracy_by_sum` by the probability of the whole answer, which favours short ones. A tie is no win. `chance` is
    the mean of 1 / number of choices. A question whose answer is none of its choices is a DataError.
    """
    by: dict[Literal["mean", "sum"], list[float]] = {"mean": [], "sum": []}
    chances: list[float] = []
    for done, conversation in enumerate(conversations, start=1):
        choices = [str(c) for c in conversation.meta.get("choices") or ()]
        where = conversation.where or conversation.id
        if len(choices) < 2 or conversation.answer not in choices:
            raise DataError(
                f"the answer {conversation.answer!r} stands against {len(choices)} choices", where=where,
                remedy="give choices, a list of two or more, and answer, one of them", kind="choices",
            )  # fmt: skip
        candidates = [str(conversation.answer), *(c for c in choices if c != conversation.answer)]
        for over, found in by.items():
            best, *rest = answer_scores(model, processor, conversation, candidates, over=over)
            found.append(float(all(best > other for other in rest)))
        chances.append(1 / len(choices))
        if progress is not None:
            progress(done, len(conversations))
    harness = f"opticnerve multiple choice by likelihood {harness_version()}"
    return {
        "name": name, "harness": harness, **summarise(by["mean"]),
        "accuracy_by_sum": summarise(by["sum"])["accuracy"], "chance": sum(chances) / len(chances),
    }  # fmt: skip
