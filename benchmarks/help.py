"""How long `opticnerve … --help` takes: the processor's time and the wall's, median of several calls of each command.

python benchmarks/help.py [calls]
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time

COMMANDS = [
    "", "demo", "plan", "train", "ask", "chat", "eval", "merge", "import", "parts", "classify", "embed", "look",
    "compare fusion", "compare connectors", "compare stages", "data check", "data show",
]  # fmt: skip


def measure(words: list[str]) -> tuple[float, float]:
    """(processor seconds, wall seconds) of one call."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "opticnerve_launch", *words, "--help"], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return busy, time.perf_counter() - started


def main() -> None:
    calls = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    for command in COMMANDS:
        found = [measure(command.split()) for _ in range(calls)]
        busy, wall = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"opticnerve {command + ' ' if command else ''}--help".ljust(32), f"{busy:.2f} s busy, {wall:.2f} s wall")


if __name__ == "__main__":
    main()
