"""Classes by their names alone, prompt ensembles, and vectors in files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

import tiny
from errors import refused
from opticnerve.encoders.hf_vision import HFVisionEncoder
from opticnerve.encoders.text import HFTextEncoder
from opticnerve.inference.embeddings import Embedder, load_dual_encoder, save_embeddings
from opticnerve.inference.zero_shot import TEMPLATES, ZeroShotClassifier, ZeroShotPredictor, class_vectors
from opticnerve.models.dual_encoder.modeling import DualEncoder
from opticnerve.models.dual_encoder.processing import DualEncoderProcessor
from opticnerve.types import ask

CLASSES = ["circle", "square", "triangle"]


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    torch.manual_seed(0)
    words = tiny.tokenizer()
    config = tf.BertConfig(
        vocab_size=len(words), hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    reader = HFTextEncoder.from_loaded(tf.BertModel(config), words, max_length=32)
    vision_encoder = HFVisionEncoder(architecture=tiny.vision_config("vit").to_dict())
    processor = DualEncoderProcessor(vision_encoder.image_processor(), words, max_length=32)
    return Embedder(DualEncoder.from_parts(vision_encoder, reader, projection_dim=16), processor, batch_size=2)


def test_batches_change_nothing_and_vectors_have_length_one(embedder: Embedder) -> None:
    pictures = [tiny.picture(i) for i in range(5)]
    seen: list[tuple[int, int]] = []
    together = embedder.images(pictures, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(together[4:], embedder.images(pictures[4:]), rtol=1e-4, atol=1e-5)
    texts = ["a dog", "the quick brown fox jumps over the lazy dog", "no"]
    np.testing.assert_allclose(embedder.texts(texts)[2:], embedder.texts(texts[2:]), rtol=1e-4, atol=1e-5)
    with refused("empty", "picture"):
        embedder.images([])


def test_probabilities_are_the_models_softmax(embedder: Embedder) -> None:
    pictures = [tiny.picture(i) for i in range(4)]
    sentences = [f"a photo of a {c}." for c in CLASSES]
    batch = embedder.processor(images=pictures, text=sentences, return_tensors="pt")
    with torch.no_grad():
        wanted = embedder.model(**batch).logits_per_image.softmax(1)
    classifier = ZeroShotClassifier(embedder, CLASSES)
    np.testing.assert_allclose(classifier.probabilities(pictures), wanted, rtol=1e-3, atol=1e-5)
    assert classifier.predict(pictures) == [CLASSES[i] for i in wanted.argmax(1)]


def test_an_ensemble_is_the_normalised_mean_of_normalised_sentences(embedder: Embedder) -> None:
    templates = TEMPLATES["clip"]
    assert len(templates) == 7
    for row, name in zip(class_vectors(embedder, CLASSES, "clip"), CLASSES, strict=True):
        mean = embedder.texts([t.replace("{}", name) for t in templates]).mean(0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), rtol=1e-4, atol=1e-5)


def test_a_name_with_braces_is_taken_as_it_is(embedder: Embedder) -> None:
    found = class_vectors(embedder, ["{0}", "{}"], "the {}!")
    np.testing.assert_allclose(found, embedder.texts(["the {0}!", "the {}!"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("classes", "templates", "kind", "facts"), [
    ([], "photo", "empty", ["classes"]),
    (["dog"], "photo", "out-of-range", ["'dog'"]),
    (["dog", "cat", " Dog "], "photo", "conflict", ["' Dog ', 'dog'"]),
    (["dog", " "], "photo", "missing-field", ["class 1 of 2"]),
    (CLASSES, "fotos", "unknown-name", ["'fotos'", "plain, photo, clip"]),
    (CLASSES, [], "empty", ["templates"]),
    (CLASSES, ["a {}", "a photo"], "missing-field", ["'a photo'", "{}"]),
])  # fmt: skip
def test_bad_classes_and_templates(
    embedder: Embedder, classes: list[str], templates: Any, kind: str, facts: list[str]
) -> None:
    with refused(kind, *facts):
        ZeroShotClassifier(embedder, classes, templates)


def test_scores_of_a_questions_choices(embedder: Embedder) -> None:
    predictor, question = ZeroShotPredictor(embedder), ask("what is it?", tiny.picture(3))
    scores = predictor.scores(question, CLASSES)
    assert sum(scores) == pytest.approx(1, abs=1e-5)
    wanted = ZeroShotClassifier(embedder, CLASSES, "{}").probabilities([tiny.picture(3)])[0]
    np.testing.assert_allclose(scores, wanted, rtol=1e-5)
    # The order of the choices is the order of the scores.
    np.testing.assert_allclose(predictor.scores(question, CLASSES[::-1]), scores[::-1], rtol=1e-4)
    with refused("out-of-range", "the question", "are 2"):
        predictor.scores(ask("?", tiny.picture(1), tiny.picture(2)), CLASSES)


def test_loaded_from_a_folder(embedder: Embedder, tmp_path: Path) -> None:
    embedder.model.save_pretrained(tmp_path)
    embedder.processor.save_pretrained(tmp_path)
    model, processor = load_dual_encoder(tmp_path, device="cpu")
    again = Embedder(model, processor)
    np.testing.assert_allclose(
        again.images([tiny.picture(1)]), embedder.images([tiny.picture(1)]), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(again.texts(["a dog"]), embedder.texts(["a dog"]), rtol=1e-4, atol=1e-6)


# -- files ----------------------------------------------------------------------------------------------------------


def test_vectors_in_a_file_are_ready_for_faiss(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((3, 5)).T.astype(np.float64)  # neither contiguous nor float32
    written = save_embeddings(tmp_path, "pictures", vectors, [f"id-{i}" for i in range(5)])
    found = np.load(written["vectors"])
    assert found.dtype == np.float32
    assert found.flags["C_CONTIGUOUS"]
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(found, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), rtol=1e-5)
    lines = [json.loads(line) for line in written["ids"].read_text().splitlines()]
    assert lines == [{"row": i, "id": f"id-{i}"} for i in range(5)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pictures.ids.jsonl", "pictures.npy"]


def test_a_faiss_index_finds_each_vector_itself(tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss", reason="faiss is not installed")
    vectors = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    written = save_embeddings(tmp_path, "v", vectors, list("abcdef"), faiss_index=True)
    index = faiss.read_index(str(written["index"]))
    scores, rows = index.search(np.load(written["vectors"]), 1)
    assert rows[:, 0].tolist() == list(range(6))
    np.testing.assert_allclose(scores, 1, rtol=1e-5)


def test_without_faiss_the_index_is_an_error_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with refused("not-installed", "pip install faiss-cpu"):
        save_embeddings(tmp_path, "v", np.ones((1, 2), dtype=np.float32), ["a"], faiss_index=True)


@pytest.mark.parametrize(("vectors", "ids", "kind", "facts"), [
    (np.ones((2, 3)), ["a"], "wrong-shape", ["(2, 3)", "1 ids"]),
    (np.ones((2, 3)), ["a", "a"], "conflict", ["'a'", "2 times"]),
    (np.array([[1.0, 0], [0, 0]]), ["a", "b"], "out-of-range", ["'b'", "length 0.0"]),
    (np.array([[1.0, 0], [np.nan, 0]]), ["a", "b"], "out-of-range", ["'b'", "length nan"]),
])  # fmt: skip
def test_vectors_that_cannot_be_searched(
    tmp_path: Path, vectors: Any, ids: list[str], kind: str, facts: list[str]
) -> None:
    with refused(kind, *facts):
        save_embeddings(tmp_path, "v", vectors, ids)
    assert not list(tmp_path.iterdir())
