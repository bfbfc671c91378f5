"""The classification objective: the right answer among a closed set."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from opticnerve.data.collators.classification import AnswerBatch, AnswerCollator
from opticnerve.objectives.base import Objective


class Classification(Objective):
    """Cross-entropy over the closed set of a `FusionClassifier`'s answers, summed over questions.

    Late fusion's predictors learn side by side, each for itself: their losses are added.
    """

    def forward(self, batch: AnswerBatch) -> tuple[Tensor, Tensor]:
        """The float32 loss sum, and the number of questions."""
        scores = self.model.score(batch.input_ids, batch.attention_mask, batch.pixel_values, batch.image_features)
        right = scores.logits_BA.argmax(1) == batch.targets
        self.metrics = {"accuracy": float(right.float().mean())}
        return scores.loss(batch.targets), batch.targets.new_tensor(len(batch.targets))

    @classmethod
    def collator(cls, processor: Any, stage: Any, seed: int) -> AnswerCollator:
        """What makes batches of questions."""
        return AnswerCollator(processor)
