"""Two or more sides measured against each other in one run: in turn, each trial in a process of its own.

A benchmark that uses this runs itself: without `--side` it alternates, with `--side NAME` it makes one trial and hands
it over with `finish`. A process of its own gives each trial a peak memory of its own, and turns spread whatever else
the machine does over all sides alike.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_MARK = "trial: "


@dataclass
class Trial:
    """One side, once.

    Attributes:
        seconds: of the measured part. units: samples, tokens or pictures done in them.
        peak_bytes: the process's peak resident memory, or the CUDA device's peak where one was used; `finish` fills it.
        check: what must be the same on all sides: a loss, a list of losses, the tokens that came out.
        notes: whatever else the table's reader wants to know.
    """

    seconds: float
    units: float
    peak_bytes: int = 0
    check: Any = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return self.units / self.seconds


def in_turn(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, one after the other in every round, in this process; a first round is not counted."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds + 1):
        for side, run in sides.items():
            started = time.perf_counter()
            run()
            seconds[side].append(time.perf_counter() - started)
    return {side: statistics.median(values[1:]) for side, values in seconds.items()}


def finish(trial: Trial) -> None:
    """Hand the trial to the process that asked for it."""
    if not trial.peak_bytes:
        trial.peak_bytes = _cuda_peak() or peak_resident()
    print(_MARK + json.dumps(asdict(trial)), flush=True)


def peak_resident() -> int:
    """The most memory that this process ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _cuda_peak() -> int:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return 0
    return int(torch.cuda.max_memory_allocated())


def run_side(script: str | Path, side: str, arguments: list[str], *, timeout: float | None = None) -> Trial:
    """One trial of `side`, in a process of its own.

    Raises:
        RuntimeError: it failed; what it last said is in the message.
    """
    command = [sys.executable, str(script), "--side", side, *arguments]
    environment = {"GOMP_SPINCOUNT": "3000", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or not lines:
        raise RuntimeError(f"{' '.join(command)} gave no trial:\n{(done.stdout + done.stderr)[-3000:]}")
    return Trial(**json.loads(lines[-1].removeprefix(_MARK)))


def alternate(script: str | Path, sides: list[str], arguments: list[str], *, rounds: int = 5) -> dict[str, list[Trial]]:
    """`rounds` trials of each side, in turn; who begins changes from round to round."""
    results: dict[str, list[Trial]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in sides if number % 2 == 0 else sides[::-1]:
            trial = run_side(script, side, arguments)
            results[side].append(trial)
            print(
                f"{number + 1} of {rounds}, {side}: {trial.rate:.3g} a second, {trial.peak_bytes / 2**30:.2f} GiB",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    return results


def table(results: dict[str, list[Trial]], *, unit: str = "samples", against: str = "transformers") -> str:
    """Markdown: for each side the median rate, its ratio to `against` with the least and most of single rounds, peak
    memory and its ratio, and whether `check` agrees."""
    base = results[against]
    lines = [
        f"| side | {unit}/s | × {against} | peak memory | × {against} | same result |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for side, trials in results.items():
        ratios = [t.rate / b.rate for t, b in zip(trials, base, strict=True)]
        rate = statistics.median(t.rate for t in trials)
        ratio = rate / statistics.median(b.rate for b in base)
        peak = statistics.median(t.peak_bytes for t in trials)
        of = peak / statistics.median(b.peak_bytes for b in base)
        spread = "" if side == against else f" ({min(ratios):.2f} to {max(ratios):.2f})"
        same = "" if side == against else agreement([t.check for t in trials], [b.check for b in base])
        lines.append(f"| {side} | {rate:.3g} | {ratio:.2f}{spread} | {peak / 2**30:.2f} GiB | {of:.2f} | {same} |")
    return "\n".join(lines)


def agreement(ours: list[Any], theirs: list[Any]) -> str:
    """In words, how far the checks of two sides lie apart."""
    if any(c is None for c in [*ours, *theirs]):
        return "not compared"
    if ours == theirs:
        return "the same"
    try:
        both = [(_list(o), _list(t)) for o, t in zip(ours, theirs, strict=True)]
        pairs = [(float(a), float(b)) for o, t in both for a, b in zip(o, t, strict=True)]
    except (TypeError, ValueError):
        return "**different**"
    return f"within {max(abs(a - b) / max(abs(b), 1e-9) for a, b in pairs):.1e}"


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def machine() -> str:
    """The machine, in a line."""
    import torch
    import transformers

    if torch.cuda.is_available():
        what = torch.cuda.get_device_name()
    else:
        what = f"{torch.get_num_threads()} threads of {_processor()}"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{what}; Python {platform.python_version()}, {versions}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def profiled(step: Callable[[], None], device: str) -> dict[str, Any]:
    """Where a step goes: `seconds`; `busy`, of them in kernels; `kernels` and `waits` (copies to the host and
    synchronisations), counted; and the `longest` kernels with their milliseconds and counts. On a CPU its operators
    take the kernels' place."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    def finish() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    finish()
    with torch.profiler.profile(activities=kinds, acc_events=True) as seen:
        started = time.perf_counter()
        step()
        finish()
        seconds = time.perf_counter() - started
    averages = seen.key_averages()
    if device == "cuda":
        kernels = [e for e in averages if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        own = {e.key: (e.self_device_time_total / 1e3, e.count) for e in kernels}
    else:
        own = {e.key: (e.self_cpu_time_total / 1e3, e.count) for e in averages}
    waits = sum(e.count for e in averages if e.key in ("cudaStreamSynchronize", "cudaDeviceSynchronize", "aten::item"))
    longest = sorted(own.items(), key=lambda pair: -pair[1][0])[:12]
    return {
        "seconds": seconds, "busy": sum(ms for ms, _ in own.values()) / 1e3, "kernels": sum(n for _, n in own.values()),
        "waits": waits, "longest": [[name[:90], round(ms, 3), n] for name, (ms, n) in longest],
    }  # fmt: skip
