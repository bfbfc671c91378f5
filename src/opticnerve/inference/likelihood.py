"""How likely a docked language model finds given answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F

from opticnerve.data.collators.next_token import Collator
from opticnerve.data.encode.packing import pack
from opticnerve.data.encode.tokenize import encode
from opticnerve.objectives.next_token import batch_logits
from opticnerve.types import Conversation, Message, TextPart

if TYPE_CHECKING:
    from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
    from opticnerve.models.vlm.processing import OpticNerveProcessor


def answer_scores(
    model: OpticNerveForConditionalGeneration,
    processor: OpticNerveProcessor,
    conversation: Conversation,
    candidates: Sequence[str],
    *,
    over: Literal["mean", "sum"] = "mean",
) -> list[float]:
    """Log-probability of each candidate as the answer to a conversation's prompt, its end-of-turn token included.

    All candidates stand behind one copy of the picture. `over`: the "mean" of an answer's tokens, so that long ones
    are not punished for their length, or their "sum", the logarithm of the answer's probability.
    """
    prompt = conversation.prompt()
    samples = [
        encode(replace(prompt, messages=(*prompt.messages, Message("assistant", (TextPart(a),)))), processor)
        for a in candidates
    ]
    batch = Collator(processor)([pack([samples])]).to(model.device)
    with torch.inference_mode():
        targets_M, branch_M = (t.flatten()[batch.learned_M] for t in (batch.targets, batch.branch))
        log_p_M = -F.cross_entropy(batch_logits(model, batch).float(), targets_M, reduction="none")
    first = 0 if len(candidates) == 1 else 1
    found = [log_p_M[branch_M == k + first] for k in range(len(candidates))]
    return [float(x.mean() if over == "mean" else x.sum()) for x in found]
