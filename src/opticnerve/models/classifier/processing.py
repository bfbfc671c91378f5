"""`FusionClassifierProcessor`: questions and pictures to tensors, and the closed set of answers."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, Literal

from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from opticnerve.data.collators.classification import normal
from opticnerve.models.dual_encoder.processing import DualEncoderProcessor
from opticnerve.types import OpticNerveError


class FusionClassifierProcessor(DualEncoderProcessor):
    """A `DualEncoderProcessor` that knows the answers.

    Args:
        answers: the closed set, in the order of the model's logits.
        The rest as for `DualEncoderProcessor`.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int = 77,
        padding: Literal["longest", "max_length"] = "longest",
        answers: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.answers = list(answers or ())
        super().__init__(image_processor, tokenizer, max_length=max_length, padding=padding, **kwargs)

    def place_of(self, answer: str) -> int:
        """Where an answer stands in the closed set; upper and lower case and spaces around it do not matter.

        Raises:
            OpticNerveError: it is not in the set.
        """
        known = {normal(a): i for i, a in enumerate(self.answers)}
        if normal(answer) not in known:
            near = difflib.get_close_matches(normal(answer), list(known), n=1)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            shown = ", ".join(map(repr, self.answers[:12])) + (" …" if len(self.answers) > 12 else "")
            raise OpticNerveError(
                f"the answer {answer!r} is none of the {len(self.answers)} in the closed set{hint}. The set: {shown}",
                kind="unknown-name",
            )
        return known[normal(answer)]
