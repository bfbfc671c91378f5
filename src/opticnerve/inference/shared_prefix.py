"""Several questions about one picture: the picture, and all that stands before the first different word, is read once.

A prompt's keys and values do not depend on what comes after it, so those of the common beginning are computed for one
row and repeated for all (Pope et al. 2022, Efficiently Scaling Transformer Inference, section 3.3, share the cache of
one prompt likewise between its samples).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opticnerve.data.labels import encode
from opticnerve.inference.generate import Answerer
from opticnerve.models.prompt import kept
from opticnerve.types import Conversation, OpticNerveError


@torch.inference_mode()
def answer_about(
    answerer: Answerer, conversations: Sequence[Conversation], *, max_new_tokens: int = 64, batch_size: int = 16
) -> list[str]:
    """Greedy answers to questions that show the same pictures and sounds, in order: what `Answerer.answer` says.

    Raises:
        OpticNerveError: the questions show different media, or the model looks at pictures beside the text
            (cross-attention), where no row of the cache holds them.
    """
    prompts = [c.prompt() for c in conversations]
    if not prompts:
        return []
    first = [p.source for p in prompts[0].pieces]
    if any([p.source for p in c.pieces] != first for c in prompts[1:]):
        raise OpticNerveError("these questions show different pictures; ask them with Answerer.answer")
    if answerer.processor.reads_questions:
        raise OpticNerveError("this connector reads the question with the picture; use Answerer.answer")
    model, tokenizer = answerer.model, answerer.processor.tokenizer
    encoded = [encode(p, answerer.processor, learn=False) for p in prompts]
    rows, media_end = [e.input_ids for e in encoded], encoded[0].media_end
    shared = _common(rows)
    if shared < media_end:
        raise OpticNerveError(
            f"the questions differ at token {shared}, before the end of their pictures at {media_end}; put the picture "
            f"first in each"
        )
    whole = answerer.inputs(prompts[:1])
    prefix = {k: v for k, v in whole.items() if k not in ("input_ids", "attention_mask")}
    answers: list[str] = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        # Each batch writes to its cache, so each gets one of its own.
        cache = model(
            input_ids=whole["input_ids"][:, :shared], use_cache=True, logits_to_keep=1, **prefix
        ).past_key_values
        if any(seen is not None for seen in kept(cache).values()):
            raise OpticNerveError("with cross-attention the pictures stand beside the text; use Answerer.answer")
        cache.batch_repeat_interleave(len(part))
        ids_BL, mask_BL = _padded(part, shared, tokenizer.pad_token_id)
        out_BL = model.generate(
            input_ids=ids_BL.to(model.device), attention_mask=mask_BL.to(model.device), past_key_values=cache,
            max_new_tokens=max_new_tokens, do_sample=False, **answerer.stops(),
        )  # fmt: skip
        texts = answerer.processor.batch_decode(out_BL[:, ids_BL.shape[1] :], skip_special_tokens=True)
        answers += [t.strip() for t in texts]
    return answers


def _common(rows: Sequence[Sequence[int]]) -> int:
    """Tokens that all rows begin with, leaving at least one of each to ask the language model about."""
    most = min(len(r) for r in rows) - 1
    count = 0
    while count < most and all(r[count] == rows[0][count] for r in rows[1:]):
        count += 1
    return count


def _padded(rows: Sequence[list[int]], shared: int, pad: int) -> tuple[Tensor, Tensor]:
    """Prefix, then padding, then each row's own tokens: their ends stand below each other, as generation needs."""
    longest = max(len(r) for r in rows)
    ids = [r[:shared] + [pad] * (longest - len(r)) + r[shared:] for r in rows]
    mask = [[1] * shared + [0] * (longest - len(r)) + [1] * (len(r) - shared) for r in rows]
    return torch.tensor(ids), torch.tensor(mask)
