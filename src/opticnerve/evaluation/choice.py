"""Does the model know which caption belongs to the picture? The true one against nine others, by likelihood."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from opticnerve.evaluation.metrics import choice_rank
from opticnerve.evaluation.tasks import harness_version
from opticnerve.inference.likelihood import answer_scores
from opticnerve.types import Conversation, OpticNerveError


def run_choice(
    model: Any,
    processor: Any,
    conversations: Sequence[Conversation],
    *,
    name: str,
    others: int = 9,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """An entry of results.json's `tasks`: how often the true answer is likelier than `others` answers of other
    pictures.

    All candidates stand behind one copy of the picture. The likelihood is the mean log-probability of an answer's
    tokens, its end-of-turn token included, so that long answers are not punished for their length.
    """
    answers = [c.answer for c in conversations]
    if any(a is None for a in answers):
        raise OpticNerveError("choosing among captions needs a true caption for each picture")
    rng = random.Random(seed)
    rows = []
    for done, conversation in enumerate(conversations, start=1):
        mine = {a for c, a in zip(conversations, answers, strict=True) if _same_picture(c, conversation)}
        pool = sorted({str(a) for a in answers} - {str(a) for a in mine})
        if len(pool) < others:
            raise OpticNerveError(f"only {len(pool)} other captions to choose from; {others} are needed")
        candidates = [str(conversation.answer), *rng.sample(pool, others)]
        rows.append(answer_scores(model, processor, conversation, candidates))
        if progress is not None:
            progress(done, len(conversations))
    return {"name": name, "harness": f"opticnerve choice of {others + 1} {harness_version()}", **choice_rank(rows)}


def _same_picture(a: Conversation, b: Conversation) -> bool:
    return [p.source for p in a.pieces] == [p.source for p in b.pieces]
