"""Many clients at once, slow ones, and ones that go away."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest
from served import LIMITS, Live, chat, image, serving, until

import tiny
from opticnerve.models.vlm.build import Dock
from opticnerve.types import ask

WORDS = ["red", "blue", "dog", "fox", "circle", "square", "green", "how many", "lazy", "beach"]


def test_a_hundred_clients_each_get_their_own_answer(live: Live, alone: Callable[..., str]) -> None:
    rng = random.Random(0)
    asked = []
    for i in range(100):
        question, picture = f"is there a {rng.choice(WORDS)} {rng.choice(WORDS)}?", rng.choice([None, 1, 2, 3])
        asked.append((question, picture, rng.randint(1, 14), i % 3 == 0))
    known: dict[Any, str] = {}
    for question, picture, new, _ in asked:
        pictures = [] if picture is None else [tiny.picture(picture)]
        known[question, picture, new] = alone(ask(question, *pictures), new)
    client = live.client()
    start = threading.Barrier(len(asked))

    def one(question: str, picture: int | None, new: int, stream: bool) -> tuple[str, str]:
        body = chat(question, *([] if picture is None else [image(picture)])) | {"max_tokens": new}
        start.wait(timeout=60)
        if stream:
            chunks = list(client.chat.completions.create(**body, stream=True))
            said = "".join(c.choices[0].delta.content or "" for c in chunks)
        else:
            said = client.chat.completions.create(**body).choices[0].message.content
        return said, known[question, picture, new]

    with ThreadPoolExecutor(len(asked)) as pool:
        results = list(pool.map(lambda a: one(*a), asked))
    assert [said for said, _ in results] == [expected for _, expected in results]
    assert len({said for said, _ in results}) > 30, "answers must be told apart"
    assert until(lambda: live.metric("running_answers") == 0 and live.metric("admitted_requests") == 0)


@pytest.fixture(scope="module")
def patient(make_dock: Callable[..., Dock]) -> Iterator[tuple[Live, threading.Event]]:
    """A server of two slots and one place to wait, whose model stands still with both taken until the event is set."""
    made = make_dock()
    limits = replace(LIMITS, slots=2, queue=1, request_seconds=60.0, body_seconds=1.0, head_seconds=1.0)
    with serving(made.model, made.processor, limits=limits) as live:
        go, batch = threading.Event(), live.service.scheduler.batch
        step = batch.step

        def slowly(*tokens: Any) -> Any:
            time.sleep(0.002)
            if len(batch) == 2:
                go.wait(timeout=60)
            return step(*tokens)

        batch.step = slowly  # type: ignore[method-assign]
        go.set()
        yield live, go
        go.set()


def begin(live: Live, **body: Any) -> tuple[Any, Any]:
    """A streamed request that has its first token: the open response, and its client."""
    client = httpx.Client(timeout=60)
    request = client.build_request("POST", f"{live.url}/v1/chat/completions", json=chat("q") | {"stream": True} | body)
    return client.send(request, stream=True), client


def test_clients_that_go_away_free_their_slots(patient: tuple[Live, threading.Event]) -> None:
    live, go = patient
    go.clear()
    opened = [begin(live, max_tokens=400) for _ in range(2)]
    assert all(answer.status_code == 200 for answer, _ in opened)
    assert until(lambda: live.metric("running_answers") == 2)
    # A third one waits, and leaves before its turn.
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{live.url}/v1/chat/completions", json=chat("q"), timeout=0.5)
    for answer, client in opened:
        answer.close()
        client.close()
    # All it takes is the next token: the step that hangs now, and the turn behind it.
    assert until(lambda: live.service.middleware.admitted == 0)
    steps = live.metric("step_seconds_count")
    go.set()
    assert until(lambda: live.metric("running_answers") == 0 and live.metric("waiting_requests") == 0)
    assert live.metric("step_seconds_count") <= steps + 1, "they are free at the next token"
    assert until(lambda: live.metric("requests_total", status="499") >= 1)
    assert live.post(max_tokens=2).status_code == 200


def test_a_full_house_says_when_to_come_back(patient: tuple[Live, threading.Event]) -> None:
    live, go = patient
    go.clear()
    with ThreadPoolExecutor(3) as pool:
        first = [pool.submit(live.post, max_tokens=300) for _ in range(3)]
        assert until(lambda: live.service.middleware.admitted == 3)
        answer = live.post(max_tokens=5)
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "queue_full"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert httpx.get(f"{live.url}/health").status_code == 200
        # OpenAI's client waits and tries again by itself.
        again = pool.submit(live.client(max_retries=5).chat.completions.create, **chat("q"), max_tokens=2)
        go.set()
        assert [f.result().status_code for f in first] == [200] * 3
        assert again.result().usage.completion_tokens <= 2


def test_time_that_is_over(patient: tuple[Live, threading.Event]) -> None:
    live, go = patient
    limits = live.service.reader.limits
    go.clear()
    try:
        live.service.reader.limits = replace(limits, request_seconds=0.6)
        with ThreadPoolExecutor(3) as pool:
            running = [pool.submit(live.post, max_tokens=400) for _ in range(2)]
            assert until(lambda: live.metric("running_answers") == 2)
            waiting = pool.submit(live.post, max_tokens=400)
            assert until(lambda: live.metric("admitted_requests") == 3)
            time.sleep(0.7)
            go.set()
            for answer in (f.result() for f in running):
                assert answer.status_code == 200
                assert answer.json()["choices"][0]["finish_reason"] == "length"
                assert 1 <= answer.json()["usage"]["completion_tokens"] < 400
            assert waiting.result().status_code == 504
    finally:
        live.service.reader.limits = limits
        go.set()


def test_clients_that_send_slowly_are_let_go(patient: tuple[Live, threading.Event]) -> None:
    live, _ = patient
    address = ("127.0.0.1", int(live.url.rsplit(":", 1)[1]))
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with (
        socket.create_connection(address, timeout=30) as nothing,
        socket.create_connection(address, timeout=30) as half,
    ):
        half.sendall(head[:40])
        assert nothing.recv(100) == b""
        assert half.recv(100) == b""
    with socket.create_connection(address, timeout=30) as body:
        body.sendall(head + b'Content-Length: 1000\r\n\r\n{"model"')
        answer = b""
        while not answer.endswith(b"}}"):
            answer += body.recv(10_000)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"within 1 s; 8 bytes did" in answer
    assert until(lambda: live.service.middleware.admitted == 0)


def test_a_client_that_reads_slowly_costs_the_others_nothing(live: Live, alone: Callable[..., str]) -> None:
    answer, client = begin(live, max_tokens=100, n=2, logprobs=True, top_logprobs=20)
    assert answer.status_code == 200
    assert live.post(max_tokens=4).json()["choices"][0]["message"]["content"] == alone("q", 4)
    assert until(lambda: live.metric("running_answers") == 0), "the answer is made whether it is read or not"
    lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    client.close()


def test_a_model_that_breaks_breaks_one_request(make_dock: Callable[..., Dock]) -> None:
    made = make_dock()
    with serving(made.model, made.processor) as live:
        batch = live.service.scheduler.batch
        read, step = batch.read, batch.step

        def broken(*_: Any) -> Any:
            raise RuntimeError("a kernel failed")

        batch.read = broken  # type: ignore[method-assign]
        answer = live.post(max_tokens=4)
        assert answer.status_code == 500
        assert "kernel" not in answer.text
        batch.read, batch.step = read, broken  # type: ignore[method-assign]
        assert live.post(max_tokens=4).status_code == 500
        opened, client = begin(live, max_tokens=4)
        assert opened.status_code == 200  # its first token came before
        lines = [line for line in opened.iter_lines() if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["type"] == "server_error"
        client.close()
        batch.step = step  # type: ignore[method-assign]
        assert live.post(max_tokens=4).status_code == 200
        assert until(lambda: live.metric("running_answers") == 0)
