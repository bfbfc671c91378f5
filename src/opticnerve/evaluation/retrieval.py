"""What a `DualEncoder` knows: finding the caption of a picture, the picture of a caption, and the class of a picture.

R@K is the share of queries with a right one among the K nearest, the field's measure since Hodosh et al. 2013 (Framing
Image Description as a Ranking Task, section 5). A tie is no win.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from opticnerve.data.collators.contrastive import caption_of
from opticnerve.data.media.open import image_digest
from opticnerve.evaluation.metrics import summarise
from opticnerve.evaluation.tasks import harness_version
from opticnerve.inference.embeddings import Embedder, Progress, Vectors
from opticnerve.inference.zero_shot import Templates, ZeroShotClassifier
from opticnerve.types import Conversation, OpticNerveError

KS = (1, 5, 10)
_BLOCK = 1024  # queries whose similarities are held at a time


def ranks(query_QD: Vectors, found_MD: Vectors, right: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
    """For each query the rank (from 1) of the best of its right candidates, `right[q]`, one or more rows of `found_MD`;
    wrong ones as near count as nearer."""
    if len(query_QD) != len(right) or not all(right):
        raise OpticNerveError(
            f"{len(query_QD)} queries, {sum(map(bool, right))} of them with something right to find",
            kind="missing-field",
        )
    out = []
    for start in range(0, len(right), _BLOCK):
        near_BM = query_QD[start : start + _BLOCK] @ found_MD.T
        right_BM = np.zeros(near_BM.shape, dtype=bool)
        for row, columns in enumerate(right[start : start + _BLOCK]):
            right_BM[row, list(columns)] = True
        best_B = np.where(right_BM, near_BM, -np.inf).max(1)
        out.append(1 + ((near_BM >= best_B[:, None]) & ~right_BM).sum(1))
    return np.concatenate(out)


def recalls(found: npt.NDArray[np.int64], right: Sequence[Sequence[int]], candidates: int) -> dict[str, Any]:
    """R@1, R@5, R@10 from ranks, each with `n`, `accuracy`, `ci95` and `chance`; and the median rank.

    A K that is no smaller than the number of candidates says nothing and is left out.
    """
    entry: dict[str, Any] = {"n": len(found), "candidates": candidates, "median_rank": float(np.median(found))}
    for k in KS:
        if k < candidates:
            by_chance = [_chance(k, len(r), candidates) for r in right]
            entry[f"R@{k}"] = {
                **summarise([float(rank <= k) for rank in found]), "chance": sum(by_chance) / len(by_chance),
            }  # fmt: skip
    return entry


def run_retrieval(
    embedder: Embedder, conversations: Sequence[Conversation], *, name: str, progress: Progress | None = None
) -> dict[str, Any]:
    """An entry of results.json's `tasks`: image→text and text→image retrieval over captioned pictures.

    Conversations are pairs as for training. Several with the same picture (by its content) give it several captions,
    any of which is right; the same words under several pictures are one text, for which any of these is right.
    """
    texts = list(dict.fromkeys(caption_of(c) for c in conversations))
    digests = [image_digest(c.images[0].source, where=c.where or c.id) for c in conversations]
    sources = {d: c.images[0].source for d, c in zip(digests, conversations, strict=True)}
    image_of = {d: i for i, d in enumerate(sources)}
    text_of = {t: i for i, t in enumerate(texts)}
    if len(sources) < 2 or len(texts) < 2:
        raise OpticNerveError(
            f"retrieval among {len(sources)} pictures and {len(texts)} captions: give at least two of each",
            kind="out-of-range",
        )
    pairs = {(image_of[d], text_of[caption_of(c)]) for d, c in zip(digests, conversations, strict=True)}
    right_texts: list[list[int]] = [[] for _ in sources]
    right_images: list[list[int]] = [[] for _ in texts]
    for image, text in sorted(pairs):
        right_texts[image].append(text)
        right_images[text].append(image)
    image_ID, text_TD = embedder.images(list(sources.values()), progress=progress), embedder.texts(texts)
    return {
        "name": name,
        "harness": f"opticnerve retrieval {harness_version()}",
        "n": len(conversations),
        "image_to_text": recalls(ranks(image_ID, text_TD, right_texts), right_texts, len(texts)),
        "text_to_image": recalls(ranks(text_TD, image_ID, right_images), right_images, len(sources)),
    }


def run_zero_shot(
    embedder: Embedder, conversations: Sequence[Conversation], *, name: str, classes: Sequence[str] | None = None,
    templates: Templates = "photo", progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """An entry of results.json's `tasks`: each picture's answer chosen among all classes by its nearness alone.

    `classes`: the closed set, by default all answers that occur; an answer outside it is an error.
    """
    answers = [caption_of(c) for c in conversations]
    classes = sorted(set(answers)) if classes is None else list(classes)
    if outside := sorted(set(answers) - set(classes)):
        raise OpticNerveError(
            f"{len(outside)} answers are none of the {len(classes)} classes: {', '.join(map(repr, outside[:5]))}"
            f"{' …' if len(outside) > 5 else ''}; add them, or leave these pictures out",
            kind="unknown-name",
        )
    classifier = ZeroShotClassifier(embedder, classes, templates)
    image_ND = embedder.images([c.images[0].source for c in conversations], progress=progress)
    best_N = classifier.from_vectors(image_ND).argmax(1)
    place = {c: i for i, c in enumerate(classes)}
    return {
        "name": name,
        "harness": f"opticnerve zero-shot {harness_version()}",
        **summarise([float(place[a] == b) for a, b in zip(answers, best_N, strict=True)]),
        "classes": len(classes),
        "chance": 1 / len(classes),
    }


def _chance(k: int, right: int, candidates: int) -> float:
    """That k of the candidates, drawn at random, hold a right one."""
    return 1.0 - math.comb(candidates - right, k) / math.comb(candidates, k)
