"""Does the model know which caption belongs to the picture? The true one against nine others, by likelihood."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from opticnerve.data.collate import Collator
from opticnerve.data.labels import IGNORE, encode
from opticnerve.data.packing import pack
from opticnerve.evaluation.metrics import choice_rank
from opticnerve.evaluation.tasks import harness_version
from opticnerve.objectives.next_token import batch_logits
from opticnerve.types import Conversation, Message, OpticNerveError, TextPart


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


def answer_scores(model: Any, processor: Any, conversation: Conversation, candidates: Sequence[str]) -> list[float]:
    """Mean log-probability per token of each candidate as the answer to a conversation's prompt."""
    prompt = conversation.prompt()
    samples = [
        encode(replace(prompt, messages=(*prompt.messages, Message("assistant", (TextPart(a),)))), processor)
        for a in candidates
    ]
    batch = Collator(processor)([pack([samples])]).to(model.device)
    with torch.inference_mode():
        keep_BL = batch.targets != IGNORE
        logits_MV = batch_logits(model, batch, keep_BL)
        log_p_M = -F.cross_entropy(logits_MV.float(), batch.targets[keep_BL], reduction="none")
    branch_M = batch.branch[keep_BL]
    first = 0 if len(candidates) == 1 else 1
    return [float(log_p_M[branch_M == k + first].mean()) for k in range(len(candidates))]


def _same_picture(a: Conversation, b: Conversation) -> bool:
    return [p.source for p in a.pieces] == [p.source for p in b.pieces]
