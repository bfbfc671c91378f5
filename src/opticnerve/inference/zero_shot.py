"""Zero-shot classification: a picture belongs to the class whose name it lies nearest.

Source: Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision, section 3.1. A class
is the mean of its name in several sentences, each of length 1, and the mean brought to length 1 again: CLIP's prompt
ensemble (section 3.1.4).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opticnerve.data.media.images import Source
from opticnerve.inference.embeddings import Embedder, Vectors
from opticnerve.types import Conversation, OpticNerveError

TEMPLATES: dict[str, tuple[str, ...]] = {
    "plain": ("{}",),
    "photo": ("a photo of a {}.",),
    # The seven that OpenAI's notebook found to do as well as all eighty on ImageNet.
    "clip": (
        "itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.", "a {} in a video game.",
        "art of the {}.", "a photo of the small {}.",
    ),
}  # fmt: skip
"""Prompt templates by name; {} is where the class stands."""

Templates = str | Sequence[str]
"""A name of `TEMPLATES`, or the templates themselves."""


def class_vectors(embedder: Embedder, classes: Sequence[str], templates: Templates = "photo") -> Vectors:
    """(classes, D): the directions of the classes.

    Raises:
        OpticNerveError: fewer than two classes, one named twice or without a name, or a template without its {}.
    """
    check_classes(classes)
    sentences = _templates(templates)
    texts = [t.replace("{}", c) for c in classes for t in sentences]
    vectors_CTD = embedder.texts(texts).reshape(len(classes), len(sentences), -1)
    mean_CD = vectors_CTD.mean(1)
    return np.asarray(mean_CD / np.linalg.norm(mean_CD, axis=1, keepdims=True), dtype=np.float32)


class ZeroShotClassifier:
    """Classifies pictures among named classes.

    Args:
        embedder: the model. classes: at least two names. templates: see `TEMPLATES`; more than one make an ensemble.
    """

    def __init__(self, embedder: Embedder, classes: Sequence[str], templates: Templates = "photo") -> None:
        self.embedder, self.classes = embedder, list(classes)
        self.vectors_CD = class_vectors(embedder, classes, templates)

    def probabilities(self, images: Sequence[Source]) -> Vectors:
        """(images, classes), rows adding up to 1: the softmax of the model's logits over the classes."""
        return self.from_vectors(self.embedder.images(images))

    def from_vectors(self, image_ND: Vectors) -> Vectors:
        """The same for pictures that are vectors already."""
        logits_NC = self.embedder.logit_scale * image_ND.astype(np.float64) @ self.vectors_CD.T
        logits_NC = np.exp(logits_NC - logits_NC.max(1, keepdims=True))
        return np.asarray(logits_NC / logits_NC.sum(1, keepdims=True), dtype=np.float32)

    def predict(self, images: Sequence[Source]) -> list[str]:
        """The likeliest class of each picture."""
        return [self.classes[i] for i in self.probabilities(images).argmax(1)]


class ZeroShotPredictor:
    """Answers a question about a picture with the choice that lies nearest to the picture; the question is not read.
    "plain" `templates` suit answers that are captions already."""

    def __init__(self, embedder: Embedder, templates: Templates = "plain") -> None:
        self.embedder, self.templates = embedder, templates
        self._known: dict[tuple[str, ...], ZeroShotClassifier] = {}

    def scores(self, conversation: Conversation, choices: Sequence[str]) -> list[float]:
        """Probabilities of the choices, in their order.

        Raises:
            OpticNerveError: the conversation has not exactly one picture, or the choices are no classes.
        """
        if len(conversation.images) != 1:
            raise OpticNerveError(
                f"{conversation.where or conversation.id or 'the question'}: zero-shot classification looks at one "
                f"picture; there are {len(conversation.images)}",
                kind="out-of-range",
            )
        if (key := tuple(choices)) not in self._known:
            self._known[key] = ZeroShotClassifier(self.embedder, choices, self.templates)
        return list(map(float, self._known[key].probabilities([conversation.images[0].source])[0]))


def check_classes(classes: Sequence[str]) -> None:
    """Raise where there is nothing to choose between."""
    if not classes:
        raise OpticNerveError("the list of classes is empty; name at least two", kind="empty")
    names = [" ".join(c.lower().split()) for c in classes]
    if not all(names):
        raise OpticNerveError(f"class {names.index('')} of {len(names)} has no name", kind="missing-field")
    if twice := sorted({c for c, n in zip(classes, names, strict=True) if names.count(n) > 1}):
        raise OpticNerveError(
            f"classes named more than once: {', '.join(map(repr, twice))}; keep one of each", kind="conflict"
        )
    if len(names) == 1:
        raise OpticNerveError(
            f"{classes[0]!r} is the only class, and every picture would be it; name at least two", kind="out-of-range"
        )


def _templates(templates: Templates) -> Sequence[str]:
    if isinstance(templates, str):
        if templates not in TEMPLATES and "{}" not in templates:
            known = ", ".join(TEMPLATES)
            raise OpticNerveError(
                f"unknown templates {templates!r}; known: {known}; one of your own needs a {{}}", kind="unknown-name"
            )
        return TEMPLATES.get(templates, (templates,))
    if not templates:
        raise OpticNerveError("the list of templates is empty", kind="empty")
    if bad := [t for t in templates if "{}" not in t]:
        raise OpticNerveError(f"template {bad[0]!r} has no {{}} where the class would stand", kind="missing-field")
    return templates
