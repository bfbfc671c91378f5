"""`FusionClassifierConfig`: a vision encoder and a text encoder that choose from a closed set of answers, without
weights."""

from __future__ import annotations

from typing import Any, Literal, get_args

from transformers import PreTrainedConfig

from opticnerve.models.adapted import AdaptedTowers
from opticnerve.types import OpticNerveError

Timing = Literal["early", "intermediate", "late"]


class FusionClassifierConfig(AdaptedTowers, PreTrainedConfig):
    """Configuration of a `FusionClassifier`, by transformers' conventions.

    Args:
        timing: when the two meet; see `opticnerve.models.classifier.parts`.
        answers: the closed set.
        image: `{"encoder": {"type": …, …}}`, a vision encoder and the keywords that build it; None for early fusion,
            which sees the pixels. text: `{"encoder": {"type": …, …}}`. `lora` in either: `{"encoder": options of its
            adapter}`.
        head: keywords of the head (`width`, `depth`, `heads`, `dropout`, `pixels`).
        combine: how late fusion makes one answer of two; `image` and `text` stand for one of them alone.
    """

    model_type = "opticnerve_fusion_classifier"

    def __init__(
        self,
        timing: Timing = "intermediate",
        answers: list[str] | None = None,
        image: dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
        head: dict[str, Any] | None = None,
        combine: str = "mean",
        **kwargs: Any,
    ) -> None:
        if timing not in get_args(Timing):
            raise OpticNerveError(
                f"timing is one of {', '.join(get_args(Timing))}, not {timing!r}", kind="unknown-name"
            )
        self.timing, self.answers = timing, list(answers or ())
        self.image, self.text, self.head, self.combine = image, text or {}, head or {}, combine
        super().__init__(**kwargs)
