"""A bar with what is done and the time left on a terminal; plain lines, now and then, elsewhere."""

from __future__ import annotations

import math
import time
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class _Bar:
    """Context manager: `self.bar` where the console is a terminal, else None."""

    def __init__(
        self, name: str, total: int | None, *columns: ProgressColumn, console: Console | None, transient: bool = False,
        **fields: Any,
    ) -> None:  # fmt: skip
        self.name, self.console, self.began = name, console, time.perf_counter()
        self.bar: RichProgress | None = None
        if console is not None and console.is_terminal:
            columns = (*columns, TimeRemainingColumn())
            self.bar = RichProgress(*columns, console=console, transient=transient)
            self.task = self.bar.add_task(name, total=total, **fields)

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.stop()


class Waiting(_Bar):
    """While something is measured: `update(done, total)` moves the bar. Silent without a console."""

    def __init__(self, console: Console | None, label: str) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        super().__init__(label, None, *columns, console=console, transient=True)

    def __enter__(self) -> Self:
        if self.bar is None and self.console is not None:
            self.console.print(f"{self.name} …", highlight=False)
        return super().__enter__()

    def update(self, done: int, total: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self.console is not None and error[0] is None:
            self.console.print(f"{self.name}: done in {time.perf_counter() - self.began:.0f} s", highlight=False)


class Counting(_Bar):
    """Where there is no bar, `due` tells the time for plain lines.

    Args:
        behind: what stands behind the count, a rich text format; its fields begin as `fields` say.
    """

    def __init__(
        self, name: str, total: int, behind: str, *, console: Console | None, every_s: float, start: int = 0,
        **fields: Any,
    ) -> None:  # fmt: skip
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(behind))
        super().__init__(name, total, *columns, console=console, completed=start, **fields)
        self.total, self.every_s, self.start, self.last = total, every_s, start, 0.0

    def due(self, now: float, done: int) -> bool:
        """Whether a plain line is to be written."""
        if now - self.last < self.every_s and done != self.total:
            return False
        self.last = now
        return True


class Progress(Counting):
    """`update(line)` after each step, with a line of metrics.jsonl."""

    def __init__(self, name: str, steps: int, *, start: int, console: Console | None, every_s: float = 10.0) -> None:
        behind = "loss {task.fields[loss]}{task.fields[held]}  {task.fields[speed]}"
        fields = {"loss": "…", "held": "", "speed": ""}
        super().__init__(name, steps, behind, console=console, every_s=every_s, start=start, **fields)
        self.smooth: float | None = None
        self.held = ""  # what the last look at held-out data found

    def update(self, line: dict[str, Any]) -> None:
        loss = line["loss"]
        if loss is None:  # the step was left out
            loss = math.nan if self.smooth is None else self.smooth
        self.smooth = loss if self.smooth is None or math.isnan(self.smooth) else 0.9 * self.smooth + 0.1 * loss
        if found := line.get("validation"):
            words = (("held out", found.get("loss")), ("score", found.get("score")))
            self.held = "".join(f"  {word} {value:.4f}" for word, value in words if value is not None)
        speed = f"{line['tokens_per_second']:.0f} tokens/s"
        speed += f"  MFU {line['mfu']:.0%}" if "mfu" in line else ""
        speed += f"  waits {waiting:.0%}" if (waiting := line.get("waiting", 0.0)) >= 0.05 else ""
        if self.bar is not None:
            self.bar.update(self.task, completed=line["step"], loss=f"{self.smooth:.4f}", held=self.held, speed=speed)
        elif self.console is not None and self.due(now := time.perf_counter(), line["step"]):
            left = (now - self.began) / max(1, line["step"] - self.start) * (self.total - line["step"])
            self.console.print(
                f"{self.name}: step {line['step']}/{self.total}  loss {self.smooth:.4f}{self.held}  "
                f"{speed}  {left:.0f} s left",
                highlight=False,
            )
