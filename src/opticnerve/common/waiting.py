"""A line that moves while something is measured; a plain one where nobody watches."""

from __future__ import annotations

import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


class Waiting:
    """Context manager; `update(done, total)` moves the bar. Silent without a console."""

    def __init__(self, console: Any, label: str) -> None:
        self.console, self.label, self.bar, self.task = console, label, None, None
        self.began = time.perf_counter()
        if console is not None and console.is_terminal:
            self.bar = Progress(
                SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TimeRemainingColumn(), console=console, transient=True,
            )  # fmt: skip
            self.task = self.bar.add_task(label, total=None)

    def __enter__(self) -> Waiting:
        if self.bar is not None:
            self.bar.start()
        elif self.console is not None:
            self.console.print(f"{self.label} …", highlight=False)
        return self

    def update(self, done: int, total: int) -> None:
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, total=total)

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.console is not None and error[0] is None:
            self.console.print(f"{self.label}: done in {time.perf_counter() - self.began:.0f} s", highlight=False)
