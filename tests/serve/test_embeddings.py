"""`/v1/embeddings` of a dual encoder, by OpenAI's client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from served import LIMITS, NAME, Live, image_url, served_by

import errors
import tiny
from opticnerve.inference.embeddings import Embedder
from opticnerve.models.dual_encoder.build import dual as dock_dual_encoder
from opticnerve.serve.server import EmbeddingService, Service, service_of


@pytest.fixture(scope="module")
def dual(bert_folder: str, vision_folder: Any) -> Any:
    made = dock_dual_encoder({"type": "hf_vision", "name": vision_folder("clip_vision_model")}, {"name": bert_folder})
    made.model.eval()
    return made


@pytest.fixture(scope="module")
def embedding(dual: Any) -> Iterator[Live]:
    service = EmbeddingService(model=dual.model, processor=dual.processor, name=NAME, limits=LIMITS)
    with served_by(service) as live:
        yield live


def post(live: Live, **body: Any) -> httpx.Response:
    return httpx.post(f"{live.url}/v1/embeddings", json={"model": NAME, **body}, timeout=60)


def test_vectors_are_the_embedders(embedding: Live, dual: Any) -> None:
    embedder = Embedder(dual.model, dual.processor)
    texts = ["a red circle", "the dog"]
    for form in ("float", "base64"):
        made = embedding.client().embeddings.create(model=NAME, input=texts, encoding_format=form)
        assert made.object == "list"
        found = [d.embedding for d in made.data]
        if form == "float":
            assert np.allclose(found, embedder.texts(texts), atol=1e-6)
    # The client asks for base64 by itself and gives numbers.
    one = embedding.client().embeddings.create(model=NAME, input=texts[0])
    assert np.allclose(one.data[0].embedding, embedder.texts(texts[:1])[0], atol=1e-6)
    assert one.usage.prompt_tokens == len(dual.processor.tokenizer(texts[0])["input_ids"])


def test_pictures_stand_beside_texts(embedding: Live, dual: Any) -> None:
    embedder = Embedder(dual.model, dual.processor)
    made = post(embedding, input=["the dog", image_url(1), "a cat", image_url(2)]).json()
    found = np.array([d["embedding"] for d in made["data"]])
    assert np.allclose(found[[0, 2]], embedder.texts(["the dog", "a cat"]), atol=1e-5)
    assert np.allclose(found[[1, 3]], embedder.images([tiny.picture(1), tiny.picture(2)]), atol=1e-5)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert post(embedding, input=image_url(1)).json()["usage"]["prompt_tokens"] == 0


def test_what_is_refused(embedding: Live, dual: Any) -> None:
    size = len(post(embedding, input="a").json()["data"][0]["embedding"])
    assert post(embedding, input="a", dimensions=size).status_code == 200
    bad: list[tuple[dict[str, Any], str | None, str]] = [
        ({"input": "a", "dimensions": size + 1}, "dimensions", f"{size}"), ({"input": []}, "input", "input"),
        ({"input": [1, 2]}, "input.0", "string"), ({"input": ""}, "input", "1"),
        ({"input": ["a", "dog " * (dual.processor.max_length + 9)]}, "input.1", f"{dual.processor.max_length}"),
        ({"input": "data:image/png;base64,AAAA"}, "input", "image"),
        ({"input": [image_url(i) for i in range(LIMITS.media + 1)]}, f"input.{LIMITS.media}", f"{LIMITS.media}"),
    ]  # fmt: skip
    for body, param, fact in bad:
        answer = post(embedding, **body)
        assert answer.status_code == 400, body
        assert answer.json()["error"]["param"] == param, answer.text
        assert fact in answer.json()["error"]["message"]


def test_the_service_goes_by_the_family(dual: Any, both: Any) -> None:
    assert isinstance(service_of(dual.model, dual.processor, name=NAME), EmbeddingService)
    service = service_of(both.model, both.processor, name=NAME)
    assert isinstance(service, Service)
    service.stop()
    with errors.refused("unsupported", "Linear"):
        service_of(torch.nn.Linear(1, 1), both.processor, name=NAME)


def test_a_dual_encoder_answers_nothing_else(embedding: Live, live: Live) -> None:
    with pytest.raises(openai.NotFoundError):
        embedding.client().chat.completions.create(model=NAME, messages=[{"role": "user", "content": "q"}])
    with pytest.raises(openai.NotFoundError):
        live.client().embeddings.create(model=NAME, input="q")
    [model] = embedding.client().models.list().data
    assert model.modalities == ["text", "image"]  # type: ignore[attr-defined]
    assert httpx.get(f"{embedding.url}/health").json()["status"] == "ok"
    assert "prompt_tokens_total" in httpx.get(f"{embedding.url}/metrics").text
