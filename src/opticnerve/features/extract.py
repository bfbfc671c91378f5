"""Showing pictures to a frozen vision encoder, once: threads open and prepare them ahead, the vision encoder sees them
in batches."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from opticnerve.common.progress import Counting
from opticnerve.data.media.images import Source
from opticnerve.data.media.transform import open_for
from opticnerve.data.media.transform import pixels as pixel_values
from opticnerve.types import DataError, Features

BATCH = 32
Named = tuple[str, Source, str]  # a picture's digest, the picture, the sample that shows it
OnError = Callable[[DataError], None]


def extract(
    pictures: Sequence[Named], encode: Callable[[Tensor], Features], image_processor: Any, *,
    threads: int | None = None, on_error: OnError | None = None,
) -> Iterator[tuple[list[str], Features]]:  # fmt: skip
    """Batch by batch the digests of pictures and what the vision encoder sees of them, on the CPU.

    At most two batches a thread wait, so that memory stays flat.

    Args:
        encode: pixels (B, 3, H, W) → `Features`.
        threads: default: a thread for each core, four at most.
        on_error: takes what is wrong with a picture, which is then left out.

    Raises:
        DataError: a picture cannot be opened, and there is no `on_error`.
    """
    threads = threads or min(4, os.cpu_count() or 1)

    def prepare(part: Sequence[Named]) -> tuple[list[str], Tensor | None, list[DataError]]:
        digests, opened, bad = [], [], []
        for digest, source, where in part:
            try:
                opened.append(open_for(image_processor, source, where=where))
                digests.append(digest)
            except DataError as e:
                bad.append(e)
        return digests, pixel_values(image_processor, opened)["pixel_values"] if opened else None, bad

    pool = ThreadPoolExecutor(threads, thread_name_prefix="pictures")
    ahead = (pool.submit(prepare, pictures[i : i + BATCH]) for i in range(0, len(pictures), BATCH))
    try:
        waiting = deque(islice(ahead, 2 * threads))
        while waiting:
            digests, pixels, bad = waiting.popleft().result()
            waiting.extend(islice(ahead, 1))
            for error in bad:
                if on_error is None:
                    raise error
                on_error(error)
            if pixels is not None:
                with torch.inference_mode():
                    features = encode(pixels)
                yield digests, Features(features.tokens_BND.cpu(), features.mask_BN.cpu())
    finally:
        pool.shutdown(cancel_futures=True)


class Counter(Counting):
    """How many pictures are seen, how fast, and the time left."""

    def __init__(self, total: int, console: Console | None, *, every_s: float = 10.0) -> None:
        super().__init__("pictures", total, "{task.fields[speed]}", console=console, every_s=every_s, speed="")
        self.last = self.began

    def update(self, done: int) -> None:
        now = time.perf_counter()
        rate = done / max(now - self.began, 1e-9)
        if self.bar is not None:
            self.bar.update(self.task, completed=done, speed=f"{rate:.0f} a second")
        elif self.console is not None and self.due(now, done):
            left = f"{(self.total - done) / rate:.0f} s left"
            self.console.print(f"pictures: {done:,}/{self.total:,} seen  {rate:.0f} a second  {left}", highlight=False)
