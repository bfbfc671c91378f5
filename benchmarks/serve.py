"""Requests a second and the time to the first token: answers written together against one at a time.

    python benchmarks/serve.py            # the shipped model, 8 clients, every second question about a picture
    python benchmarks/serve.py runs/demo --clients 32 --slots 16
    python benchmarks/serve.py --quick    # a few tokens, to see that it runs

Each client sends its next request when the last one is answered, over HTTP, streamed. Both sides run in turn in one
process, on the same loaded model and with the same requests; the first round of each is not counted. `same` is how many
answers of the two sides agree: in float32 all of them should, in bfloat16 batches of another size round differently.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import torch
from PIL import Image, ImageDraw
from side_by_side import machine

from opticnerve.inference.load import load_model
from opticnerve.serve.limits import ServerLimits
from opticnerve.serve.server import Server, Service
from opticnerve.web.listen import listen

# Every second one is about a picture, where the model has an eye; its answers are short.
QUESTIONS = [
    "what shape is in the image?",
    "Tell me about the history of Paris.",
    "what color is the shape?",
    "Write a short story about a dog.",
]
COLORS, SHAPES = ["red", "green", "blue", "black"], ["ellipse", "rectangle"]


@dataclass
class Side:
    """What a side did with all requests of a round."""

    seconds: float
    first: list[float]
    answers: list[str]
    tokens: int


def requests(model: str, count: int, tokens: int, pictures: bool) -> list[dict[str, Any]]:
    """Bodies, no two alike."""
    made = []
    for i in range(count):
        parts: list[dict[str, Any]] = [{"type": "text", "text": f"{QUESTIONS[i % 4]}{' ' * (i // 4 % 2)}"}]
        if pictures and i % 2 == 0:
            drawn, data = Image.new("RGB", (64, 64), "white"), io.BytesIO()
            shape = getattr(ImageDraw.Draw(drawn), SHAPES[i % 4 // 2])
            shape((8 + i % 16, 8, 40 + i % 16, 40), fill=COLORS[i // 4 % 4])
            drawn.save(data, "PNG")
            url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
            parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
        made.append(
            {
                "model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": tokens, "stream": True,
                "stream_options": {"include_usage": True}, "temperature": 0,
            }
        )  # fmt: skip
    return made


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[float, str, int]:
    """Seconds to the first token, the answer, its tokens."""
    began, first, text, tokens = time.perf_counter(), 0.0, "", 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - began
                chunk = json.loads(line.removeprefix("data: "))
                tokens = (chunk["usage"] or {}).get("completion_tokens", tokens)
                text += "".join(c["delta"].get("content") or "" for c in chunk["choices"])
    return first, text, tokens


async def crowd(url: str, bodies: list[dict[str, Any]], clients: int) -> Side:
    """All requests, `clients` at a time."""
    free = asyncio.Semaphore(clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=clients)) as client:

        async def one(body: dict[str, Any]) -> tuple[float, str, int]:
            async with free:
                return await ask(client, body)

        began = time.perf_counter()
        found = await asyncio.gather(*map(one, bodies))
    seconds = time.perf_counter() - began
    return Side(seconds, [f for f, _, _ in found], [t for _, t, _ in found], sum(n for _, _, n in found))


@contextmanager
def served(model: Any, processor: Any, slots: int, clients: int) -> Iterator[str]:
    """A server with so many slots, at the address that this gives."""
    limits = ServerLimits(slots=slots, queue=clients + 1, grace_seconds=0)
    socket = listen("127.0.0.1", 0)
    server = Server(Service(model=model, processor=processor, name="bench", limits=limits))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.stop()
        thread.join()


def measure(model: Any, processor: Any, options: argparse.Namespace) -> dict[str, list[Side]]:
    pictures = processor.image_processor is not None
    bodies = requests("bench", options.requests, options.tokens, pictures)
    slots = {"one at a time": 1, f"up to {options.slots} together": options.slots}
    sides: dict[str, list[Side]] = {name: [] for name in slots}
    for number in range(options.rounds + 1):
        for name, count in slots.items():
            with served(model, processor, count, options.clients) as url:
                side = asyncio.run(crowd(url, bodies, options.clients))
            if number:
                sides[name].append(side)
    return sides


def report(sides: dict[str, list[Side]]) -> list[dict[str, Any]]:
    """A row for each side: medians over its rounds."""
    base = next(iter(sides.values()))[0].answers
    rows = []
    for name, rounds in sides.items():
        seconds = statistics.median(s.seconds for s in rounds)
        first = sorted(f for s in rounds for f in s.first)
        rows.append(
            {
                "side": name, "requests/s": len(base) / seconds, "tokens/s": rounds[0].tokens / seconds,
                "first token, median s": statistics.median(first), "first token, 95 % s": first[int(0.95 * len(first))],
                "same": f"{sum(a == b for a, b in zip(base, rounds[0].answers, strict=True))}/{len(base)}",
            }
        )  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="starter")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="the longest answer")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--float32", action="store_true", help="all answers must then be the same")
    parser.add_argument("--quick", action="store_true", help="8 requests of 4 tokens, once")
    options = parser.parse_args(arguments)
    if options.quick:
        options.clients, options.requests, options.tokens, options.rounds = 4, 8, 4, 1
    loaded = load_model(options.model, dtype=torch.float32 if options.float32 else None)
    rows = report(measure(*loaded, options))
    print(
        f"{machine()}; {options.clients} clients, {options.requests} requests, answers of ≤ {options.tokens} tokens\n"
    )
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    faster = rows[1]["requests/s"] / rows[0]["requests/s"]
    print(f"\ntogether: {faster:.1f} times the requests a second")
    return rows


if __name__ == "__main__":
    main()
