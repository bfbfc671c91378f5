"""The training that the page has started: who it is, and whether it still lives.

What is known of it lies in a file below the folder of runs, not in memory: a page that is loaded again, or another
server on the same folder, finds the same training.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from opticnerve.common import atomic
from opticnerve.types import OpticNerveError

FOLDER = ".opticnerve-ui"
"""Below the folder of runs: the file of the training, a lock, and what each training has printed."""

PROGRAM = "opticnerve_launch"
"""The module that is run; a process whose command line lacks it is none of ours, whatever its number."""


@dataclass(frozen=True, slots=True)
class Job:
    """A training as a process.

    Args:
        run: the run's folder, below the folder of runs.
        pid, created: the process, and when it was made (seconds since the epoch): numbers of processes are given again.
        command: as one would type it.
        asked: when it was asked to stop. code: how it ended, if the server that started it saw that.
    """

    run: str
    pid: int
    created: float
    command: str
    started: float
    asked: float | None = None
    code: int | None = None


def read_job(root: Path) -> Job | None:
    """The newest training started below `root`; None if there was none.

    Raises:
        OpticNerveError: the file that tells of it is damaged.
    """
    path = _file(root)
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return Job(**{**told, "run": str(told["run"]), "pid": int(told["pid"]), "created": float(told["created"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as e:
        raise OpticNerveError(f"{path} is damaged ({e}); see that no training runs, and delete it") from e


def write_job(root: Path, job: Job) -> None:
    _file(root).parent.mkdir(parents=True, exist_ok=True)
    atomic.write_json(_file(root), asdict(job))


def lives(job: Job | None) -> bool:
    """Whether the process is there, is the same one, and has not ended."""
    import psutil

    if job is None or job.code is not None:
        return False
    try:
        process = psutil.Process(job.pid)
        same = abs(process.create_time() - job.created) < 2
        return same and process.status() != psutil.STATUS_ZOMBIE and PROGRAM in process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied, ValueError, OverflowError):
        return False


def trained_by(folder: Path) -> int | None:
    """The number of a process that, by its command line, trains in this folder, or in some folder beside it."""
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError, ValueError):
            words = process.cmdline()
            command = next((i for i, w in enumerate(words) if w in ("train", "demo")), 0)
            if not command or not any("opticnerve" in w for w in words[:command]):
                continue
            here, given = Path(process.cwd()), words[command + 1 :]
            named = [w.removeprefix("--out=") for w in given]
            unnamed = not any(w == "--resume" or w.startswith("--out") for w in given)
            if unnamed and folder.parent.resolve() == (here / "runs").resolve():
                return int(process.pid)
            if any((here / w).resolve() == folder.resolve() for w in named):
                return int(process.pid)
    return None


def ended(root: Path, pid: int, code: int) -> None:
    """Note how a training ended, unless another one has begun since."""
    job = read_job(root)
    if job is not None and job.pid == pid and job.code is None:
        write_job(root, replace(job, code=code))


def log_of(root: Path, run: str) -> Path:
    """Where a run's training prints to."""
    return root / FOLDER / f"{run.replace('/', '--')}.log"


def _file(root: Path) -> Path:
    return root / FOLDER / "training.json"
