"""An engine in a process of its own: what an exported folder says where opticnerve is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opticnerve.types import OpticNerveError

CHECKS = Path(__file__).parent / "checks"
SECONDS = 3600.0


def run(check: str, job: dict[str, Any], scratch: Path, *, python: str | Path = sys.executable) -> dict[str, Any]:
    """Run `checks/CHECK.py JOB ANSWER` and read its answer; whatever it says on stderr is shown if it fails.

    Args:
        job: plain JSON. scratch: a folder for job and answer. python: the interpreter that has the engine.

    Returns:
        The check's JSON; arrays that it left in `arrays.npz` beside it are under "arrays".

    Raises:
        OpticNerveError: the check failed; the message ends with its last lines.
    """
    asked, answer = scratch / "job.json", scratch / "answer.json"
    asked.write_text(json.dumps(job), encoding="utf-8")
    answer.unlink(missing_ok=True)
    # -P: the folder of the checks is not searched for modules. Threads as many as here, so that sums agree.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    command = [str(python), "-P", str(CHECKS / f"{check}.py"), str(asked), str(answer)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS, check=False)
    except OSError as e:
        raise OpticNerveError(f"{python} does not run: {e}; --check-python names an interpreter") from e
    except subprocess.TimeoutExpired as e:
        raise OpticNerveError(f"the check {check} has not ended after {SECONDS:.0f} s; nothing was exported") from e
    if done.returncode or not answer.is_file():
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise OpticNerveError(
            f"the exported model does not run in its engine (exit code {done.returncode}); nothing was exported:\n"
            + "\n".join(lines[-12:])
        )
    return read(scratch)


def read(scratch: Path) -> dict[str, Any]:
    """What a check has left in `scratch`."""
    said: dict[str, Any] = json.loads((scratch / "answer.json").read_text(encoding="utf-8"))
    arrays = scratch / "arrays.npz"
    if arrays.is_file():
        with np.load(arrays) as kept:
            said["arrays"] = {name: torch.from_numpy(kept[name]) for name in kept.files}
    return said


def samples_of(said: dict[str, Any]) -> list[dict[str, Any]]:
    """A check's samples with their arrays: as `parity.compare_logits` takes them."""
    arrays = said.get("arrays", {})
    return [
        {**sample, "logits_KV": arrays[f"logits_{i}"], "pixels": arrays.get(f"pixels_{i}")}
        for i, sample in enumerate(said["samples"])
    ]
