"""`python -m opticnerve.compare.worker SPEC.json`: one row of an experiment in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from opticnerve.types import OpticNerveError


def main(path: str) -> int:
    """Perform the row and write its outcome; 130 if it was stopped (and saved), 1 if it failed."""
    spec: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    threading.Thread(target=_stop_with, args=(spec["parent"],), daemon=True).start()
    code = 0
    try:
        from opticnerve.compare.perform import perform

        found = perform(spec)
    except KeyboardInterrupt:
        return 130
    except Exception as e:  # it is told to the parent, which goes on with other rows
        traceback.print_exc()
        found = {"error": str(e) if isinstance(e, OpticNerveError) else f"{type(e).__name__}: {e}"}
        code = 1
    Path(spec["outcome"]).write_text(json.dumps(found, default=str), encoding="utf-8")
    return code


def _stop_with(parent: int) -> None:
    """Stop, and save, when the process that waits for this one is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
