"""A bar with loss, speed and time left on a terminal; a plain line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Context manager; `update(line)` after each step, with a line of metrics.jsonl."""

    def __init__(self, name: str, steps: int, *, start: int, console: Console | None, every_s: float = 10.0) -> None:
        self.name, self.steps, self.console, self.every_s = name, steps, console, every_s
        self.smooth: float | None = None
        self.began, self.start, self.last = time.perf_counter(), start, 0.0
        self.bar: RichProgress | None = None
        if console is not None and console.is_terminal:
            self.bar = RichProgress(
                TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}  {task.fields[speed]}"), TimeRemainingColumn(), console=console,
            )  # fmt: skip
            self.task = self.bar.add_task(name, total=steps, completed=start, loss="…", speed="")

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, line: dict[str, Any]) -> None:
        self.smooth = line["loss"] if self.smooth is None else 0.9 * self.smooth + 0.1 * line["loss"]
        speed = f"{line['tokens_per_second']:.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=line["step"], loss=f"{self.smooth:.4f}", speed=speed)
        elif self.console is not None:
            now = time.perf_counter()
            if now - self.last >= self.every_s or line["step"] == self.steps:
                self.last = now
                left = (now - self.began) / max(1, line["step"] - self.start) * (self.steps - line["step"])
                self.console.print(
                    f"{self.name}: step {line['step']}/{self.steps}  loss {self.smooth:.4f}  {speed}  "
                    f"{left:.0f} s left",
                    highlight=False,
                )
