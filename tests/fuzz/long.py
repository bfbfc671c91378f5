"""The long form of the fuzz tests: `python tests/fuzz/long.py --cases 10000`.

Each target runs in a process of its own, which a case may not crash, hang or fill: no error but ours, no more than
`SECONDS` a case, no more than `MEBIBYTES` of memory over what the first cases took. A case that breaks a rule is saved
to a file; `--replay FILE` runs it again in this process, with its traceback. The same seed makes the same cases.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
WARM = 50  # cases after which the memory that libraries take for themselves is taken
PATIENCE = 15  # seconds after which code that takes no alarm is stopped from outside
CEILING = 6 * 1024**3  # bytes of memory beyond which a process gets no more


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="for each target (targets that load models: a share)")
    parser.add_argument("--target", action="append", help="this one alone; may be given several times")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "opticnerve-fuzz")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run a saved case again")
    parser.add_argument("--worker", nargs=2, type=int, metavar=("FROM", "TO"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.replay:
        return replay(given.replay)
    from fuzz_targets import TARGETS

    if unknown := sorted(set(given.target or ()) - set(TARGETS)):
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    if given.worker:
        work(TARGETS[given.target[0]], given.seed, *given.worker, given.out)
        return 0
    print(f"seed {given.seed}; failing cases go to {given.out}")
    failed = 0
    for name in given.target or TARGETS:
        failed += fuzz(name, given.seed, max(1, round(given.cases * TARGETS[name].share)), given.out)
    return int(failed > 0)


def fuzz(name: str, seed: int, cases: int, out: Path) -> int:
    """One target, in as many processes as it breaks; returns how many cases failed."""
    from fuzz_target import case
    from fuzz_targets import TARGETS

    started, at, seen = time.monotonic(), 0, collections.Counter[str]()
    groups: dict[str, list[str]] = {}
    summary = {"peak": 0.0, "slowest": 0.0}
    while at < cases:
        command = [sys.executable, __file__, "--target", name, "--seed", str(seed), "--out", str(out)]
        done = subprocess.run(
            [*command, "--worker", str(at), str(cases)], capture_output=True, text=True, errors="replace", check=False
        )
        for line in done.stdout.splitlines():
            if not line.startswith("{"):
                continue
            said = json.loads(line)
            at = said["index"] + 1
            seen[said["what"]] += 1
            summary = {k: max(v, said.get(k, 0.0)) for k, v in summary.items()}
            if "group" in said:
                groups.setdefault(said["group"], []).append(said["file"])
        if at < cases:  # it died of a case
            index = int((out / f".{name}-{seed}").read_text() or at)
            file = out / f"{name}-{seed}-{index}.case"
            file.write_bytes(case(TARGETS[name], seed, index))
            reason = f"the process ended with {done.returncode}: {done.stderr.strip()[-300:]}"
            groups.setdefault(reason, []).append(str(file))
            seen["failed"] += 1
            at = index + 1
    counts = ", ".join(f"{n:,} {what}" for what, n in sorted(seen.items()))
    print(
        f"{name}: {cases:,} cases in {time.monotonic() - started:.0f} s: {counts}; the slowest took "
        f"{summary['slowest']:.2f} s, memory grew by {summary['peak']:.0f} MiB",
        flush=True,
    )
    for group, files in sorted(groups.items()):
        print(f"  {len(files)} × {group}\n      {files[0]}", flush=True)
    return seen["failed"]


def work(target: Any, seed: int, start: int, end: int, out: Path) -> None:
    """Run the cases from `start` on; a line of JSON on stdout for each."""
    from fuzz_target import MEBIBYTES, SECONDS, Hang, attempt, case, peak_mebibytes

    quiet()
    place = out / f".{target.name}-{seed}"
    # Address space that is only reserved (torch, threads) counts little here: RLIMIT_DATA is about what is private.
    resource.setrlimit(resource.RLIMIT_DATA, (CEILING + _data(), resource.RLIM_INFINITY))
    known, full = None, False
    with tempfile.TemporaryDirectory() as folder, place.open("w+") as at:
        for index in range(start, end):
            at.seek(0)
            at.write(f"{index:<12}")
            at.flush()
            data = case(target, seed, index)
            said: dict[str, Any] = {"index": index}
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
            began = time.monotonic()
            try:
                said["what"] = attempt(target, data, Path(folder))
            except Hang:
                # A busy neighbour may have held it up: in peace, it takes that long of the processor, or forever.
                began, busy = time.monotonic(), time.process_time()
                try:
                    said["what"] = attempt(target, data, Path(folder), seconds=5 * SECONDS)
                    if (took := time.process_time() - busy) > SECONDS:
                        raise Hang(f"it took {took:.1f} seconds")
                except Hang as e:
                    said |= {"what": "failed", "group": describe(e)}
                except Exception as e:
                    said |= {"what": "failed", "group": describe(e)}
            except Exception as e:
                said |= {"what": "failed", "group": describe(e)}
            said["slowest"] = round(time.monotonic() - began, 3)
            faulthandler.cancel_dump_traceback_later()
            if index - start >= WARM:
                known = peak_mebibytes() if known is None else known
                said["peak"] = round(peak_mebibytes() - known, 1)
                if said["peak"] > MEBIBYTES and not full:
                    full = True
                    said |= {"what": "failed", "group": f"memory grew by more than {MEBIBYTES:,} MiB"}
            if "group" in said:
                file = out / f"{target.name}-{seed}-{index}.case"
                file.write_bytes(data)
                said["file"] = str(file)
            print(json.dumps(said), flush=True)
    place.unlink()


def replay(file: Path) -> int:
    from fuzz_target import attempt
    from fuzz_targets import TARGETS

    name = next((n for n in sorted(TARGETS, key=len, reverse=True) if file.name.startswith(n + "-")), None)
    if name is None:
        raise SystemExit(f"the name of {file} begins with none of {', '.join(TARGETS)}")
    with tempfile.TemporaryDirectory() as folder:
        print(f"{name}: {attempt(TARGETS[name], file.read_bytes(), Path(folder))}")
    return 0


def describe(error: BaseException) -> str:
    """The same for the same fault: the kind of error, and the last place of ours that it went through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/opticnerve/" in f.filename] or frames
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
    return f"{type(error).__name__} through {place}: {str(error)[:90]!r}"


def quiet() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["OPTICNERVE_CACHE"] = tempfile.mkdtemp(prefix="opticnerve-fuzz-cache-")


def _data() -> int:
    """Bytes that RLIMIT_DATA counts now."""
    try:
        fields = Path("/proc/self/statm").read_text().split()
        return int(fields[5]) * resource.getpagesize()
    except OSError:
        return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
