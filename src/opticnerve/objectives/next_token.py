"""Cross-entropies: of the assistant's next token, and of the right answer among a closed set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opticnerve.data.collators.classification import AnswerBatch, AnswerCollator
from opticnerve.data.encode.tokenize import IGNORE
from opticnerve.language import experts
from opticnerve.objectives.base import Objective
from opticnerve.ops.head import supervised_logits, supervised_loss
from opticnerve.ops.varlen import supported, within
from opticnerve.types import MediaProcessor, OpticNerveError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from opticnerve.data.collators.next_token import Batch
    from opticnerve.ops.sequence import SequenceGroup
    from opticnerve.recipe import Stage


class NextToken(Objective):
    """The assistant's next token: the sum over supervised tokens, so that any split of a batch adds up exactly."""

    unit = "tokens"

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`batch`: a `Batch`. Returns the float32 loss sum and the number of supervised tokens, both scalars.

        Where a mixture of experts trains, the sum has its routers' loss in it, whose mean `metrics` tells.
        """
        processes = self.processes
        own = batch if processes is None else _share(batch, processes)
        targets_M = own.targets.flatten()[own.learned_M]
        count = targets_M.new_full((), len(targets_M))
        with reading(self.model, batch, processes) as (language_model, inputs):
            weight = experts.balanced(language_model) if torch.is_grad_enabled() else 0.0
            with experts.watched(language_model) if weight else nullcontext() as routers:
                loss_M = supervised_loss(language_model, own.learned_M, targets_M, **inputs)
        self.add_sources(own.loss_sources, loss_M)
        if routers is None:
            return loss_M.sum(), count
        balance, everywhere = experts.balance_loss(language_model, routers, own.group >= 0, count)
        self.metrics = {"router_loss": everywhere}
        return loss_M.sum() + weight * balance, count


class Classification(Objective):
    """Cross-entropy over the closed set of a `FusionClassifier`'s answers, summed over questions.

    Late fusion's predictors learn side by side, each for itself: their losses are added.
    """

    def forward(self, batch: AnswerBatch) -> tuple[Tensor, Tensor]:
        """The float32 loss sum, and the number of questions."""
        scores = self.model.score(batch.input_ids, batch.attention_mask, batch.pixel_values, batch.image_features)
        right = scores.logits_BA.argmax(1) == batch.targets
        self.metrics = {"accuracy": right.float().mean()}
        losses_B = scores.losses(batch.targets)
        self.add_sources(batch.sources, losses_B)
        return losses_B.sum(), batch.targets.new_full((), len(batch.targets))

    @classmethod
    def collator(cls, processor: MediaProcessor, stage: Stage, seed: int) -> AnswerCollator:
        """What makes batches of questions."""
        return AnswerCollator(processor)


def batch_logits(model: Any, batch: Batch) -> Tensor:
    """Logits (M, V) of a batch's rows at the M positions that have a target, pictures and packing and all."""
    with reading(model, batch) as (language_model, inputs):
        return supervised_logits(language_model, batch.learned_M, **inputs)


def _share(batch: Batch, processes: SequenceGroup) -> Batch:
    """A batch whose positions are this process's; it says of media, samples and segments what the whole says."""
    targets = processes.share(batch.targets, IGNORE)
    return replace(
        batch,
        input_ids=processes.share(batch.input_ids),
        positions=processes.share(batch.positions),
        targets=targets,
        learned_M=(targets != IGNORE).flatten().nonzero().squeeze(1),
        group=processes.share(batch.group, -1),
        branch=processes.share(batch.branch),
        sources=None if batch.sources is None else processes.share(batch.sources, -1),
    )


@contextmanager
def reading(
    model: Any, batch: Batch, processes: SequenceGroup | None = None
) -> Iterator[tuple[Any, dict[str, Any]]]:  # fmt: skip
    """The language model of `model`, and what it takes for a batch; it must run within.

    Args:
        processes: those that share the sequences: it takes this one's positions.
    """
    language_model = model.language_model
    prompt = model.read(batch.input_ids, group=None if batch.plain else batch.group, **batch.media)
    by_segment = supported(language_model)
    if not batch.plain and not by_segment:
        _check_window(language_model.config, batch.input_ids.shape[1])
    segments = batch.segments if by_segment else None
    if processes is not None:
        assert segments is not None
        assert prompt.embeds_BLD is not None
        segments = replace(segments, spread=(processes, batch.input_ids.shape[1]))
        batch, prompt.embeds_BLD = _share(batch, processes), processes.share(prompt.embeds_BLD)
    inputs = {
        "inputs_embeds": prompt.embeds_BLD,
        "position_ids": batch.positions,
        "attention_mask": None if by_segment else batch.attention_mask(prompt.embeds_BLD.dtype),
    }
    with model.multimodal_context(prompt), within(language_model, segments):
        yield language_model, inputs


def _check_window(config: PreTrainedConfig, length: int) -> None:
    """A mask of ours replaces the language model's own, sliding windows included: refuse rows that would notice."""
    window = getattr(config.get_text_config(), "sliding_window", None)
    if window and length > window:
        raise OpticNerveError(
            f"a packed row has {length} tokens, but {config.model_type} attends within {window}: lower per_image, or "
            f"set share_prefix: false",
            kind="too-long",
        )
