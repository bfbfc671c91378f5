"""`FusionClassifier`: a vision encoder and a text encoder that answer questions from a closed set, by transformers'
conventions.

`timing` says when the two meet: early, intermediate or late; everything else stays the same, so that the three can be
compared with each other, and with a vision-language model, on the same questions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import ModelOutput

from opticnerve import registry
from opticnerve.data.collators.classification import normal
from opticnerve.encoders.base import Encoder
from opticnerve.encoders.text import HFTextEncoder, text_encoders
from opticnerve.models.classifier.configuration import FusionClassifierConfig, Timing
from opticnerve.models.classifier.parts import COMBINATIONS, Scores, TextMemory, make_head
from opticnerve.models.two_towers import EncoderTower, TwoTowerModel
from opticnerve.models.vlm.tower import described, placed_like
from opticnerve.recipe import ClassifierSpec
from opticnerve.types import Features, OpticNerveError


@dataclass
class FusionClassifierOutput(ModelOutput):
    """`logits` (B, answers); late fusion's are logarithms of probabilities. `loss`: the mean, with labels."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class FusionClassifier(TwoTowerModel):
    """`image` (None for early fusion), `text`, and the head `classifier`; the answers stand in the configuration."""

    PARTS = ClassifierSpec.PARTS
    WHOLE_PARTS = ("image.encoder.", "text.encoder.", "classifier.")

    config_class = FusionClassifierConfig
    config: FusionClassifierConfig
    classifier: Any

    def _assemble(self, vision_encoder: Encoder | None, reader: HFTextEncoder) -> None:
        config = self.config
        if (vision_encoder is None) != (config.timing == "early"):
            raise OpticNerveError(
                "early fusion reads the pixels themselves; give it no image encoder"
                if config.timing == "early"
                else f"{config.timing} fusion needs an image encoder",
                kind="conflict",
            )
        if config.timing != "late" and config.combine != "mean":
            raise OpticNerveError(f"combine is for late fusion alone; leave {config.combine!r} out", kind="conflict")
        if vision_encoder is not None and vision_encoder.modality != "image":
            raise OpticNerveError(
                f"a fusion classifier looks at pictures; {type(vision_encoder).__name__} hears", kind="unsupported"
            )
        check_answers(config.answers)
        self.image = None if vision_encoder is None else EncoderTower(vision_encoder)
        self.text = EncoderTower(reader)
        options = {**config.head, **({"combine": config.combine} if config.timing == "late" else {})}
        self.classifier = make_head(config.timing, vision_encoder, reader, len(config.answers), options)
        self._memory = TextMemory(reader)

    @classmethod
    def from_parts(
        cls, image: Encoder | None, text: HFTextEncoder, *, timing: Timing, answers: list[str], combine: str = "mean",
        **head: Any,
    ) -> FusionClassifier:  # fmt: skip
        """A classifier around encoders that hold their weights already; the head is fresh.

        Args:
            image: a vision encoder; None for early fusion. text: a text encoder, such as `HFTextEncoder`. answers: the
                closed set. combine: late fusion's rule. head: keywords of the head, see `parts`.
        """
        config = FusionClassifierConfig(
            timing=timing, answers=list(answers), combine=combine, head=head,
            image=None if image is None else {"encoder": described(registry.encoders, image)},
            text={"encoder": described(text_encoders, text)},
        )  # fmt: skip
        made: FusionClassifier = cls._around(config, image, text)
        return made

    # -- the flow -------------------------------------------------------------------------------------------------

    @property
    def combine(self) -> str:
        """Late fusion's rule: mean, vote, product, learned, or image or text alone. It may be set."""
        return self.config.combine

    @combine.setter
    def combine(self, rule: str) -> None:
        if self.config.timing != "late" or rule not in COMBINATIONS:
            raise OpticNerveError(
                f"combine is one of {', '.join(COMBINATIONS)}, for late fusion alone; not {rule!r} for "
                f"{self.config.timing} fusion",
                kind="conflict",
            )
        self.config.combine = rule
        self.classifier.combine = rule

    def score(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, pixel_values: Tensor | None = None,
        image_features: Features | None = None,
    ) -> Scores:  # fmt: skip
        """Questions (B, L) about pictures (B, 3, H, W), or about what the vision encoder saw of them (a cache), to
        `Scores`.

        Raises:
            ValueError: not exactly one of pictures and features, other numbers of them than of questions, or features
                for early fusion.
        """
        if (pixel_values is None) == (image_features is None):
            raise ValueError("give exactly one of pixel_values and image_features")
        seen = len(pixel_values) if pixel_values is not None else len(image_features.mask_BN)  # type: ignore[union-attr]
        if seen != len(input_ids):
            raise ValueError(f"{seen} pictures for {len(input_ids)} questions; give one to each")
        mask_BL = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        read = self._memory.read(input_ids, mask_BL)
        weight = placed_like(self.classifier)
        read.states = Features(read.states.tokens_BND.to(weight.dtype), read.states.mask_BN)
        read.vector_BD = read.vector_BD.to(weight.dtype)
        if self.image is None:
            if pixel_values is None:
                raise ValueError("early fusion reads pixels, not features; give pixel_values")
            scores: Scores = self.classifier(pixel_values.to(weight.device, weight.dtype), read)
            return scores
        features = self.image.encode(pixel_values) if pixel_values is not None else image_features
        assert features is not None
        tokens_BND = features.tokens_BND.to(weight.device, weight.dtype)
        scored: Scores = self.classifier(Features(tokens_BND, features.mask_BN.to(weight.device)), read)
        return scored

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, pixel_values: Tensor | None = None,
        image_features: Features | None = None, labels: Tensor | None = None, return_dict: bool | None = None,
    ) -> FusionClassifierOutput:  # fmt: skip
        """See `score`. `labels` (B,): places of the right answers in `config.answers`."""
        scores = self.score(input_ids, attention_mask, pixel_values, image_features)
        loss = None if labels is None else scores.loss(labels) / len(labels)
        return FusionClassifierOutput(loss=loss, logits=scores.logits_BA)


def check_answers(answers: list[str]) -> None:
    """Raise where the closed set is none: empty, of one answer, with a blank one, or with one twice."""
    if not answers:
        raise OpticNerveError("the closed set of answers is empty; name at least two", kind="empty")
    if len(answers) == 1:
        raise OpticNerveError(
            f"{answers[0]!r} is the only answer, and would always be right; name at least two", kind="empty"
        )
    names = [normal(a) for a in answers]
    if "" in names:
        raise OpticNerveError(f"answer {names.index('') + 1} of {len(names)} is blank; leave it out", kind="empty")
    if twice := [a for a, n in zip(answers, names, strict=True) if names.count(n) > 1]:
        raise OpticNerveError(
            f"answers named more than once: {', '.join(map(repr, twice))}; keep one of each (upper and lower case are "
            f"one answer)",
            kind="conflict",
        )
