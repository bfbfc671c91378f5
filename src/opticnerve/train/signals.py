"""Ctrl-C and SIGTERM, between steps."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def asked_by_signals(ask: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks the loop to save and leave after its step; a second one is Python's own."""
    before: dict[Any, Any] = {}

    def handle(number: int, frame: Any) -> None:
        signal.signal(number, before[number])
        ask()

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
    except ValueError:  # not in the main thread: signals are somebody else's
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
