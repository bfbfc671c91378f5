"""A merged folder, loaded by opticnerve in a process that knows nothing of the run it came from.

    python -P own_folder.py JOB ANSWER

JOB: `folder`, `pictures` (where the samples' pictures are), `picture_sizes`, `trust_remote_code`. ANSWER: as that of
stock_transformers.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any], answer: Path) -> None:
    import torch

    import opticnerve
    from opticnerve.export import parity
    from opticnerve.inference.load import load_model

    trusted = job["trust_remote_code"]
    model, processor = load_model(job["folder"], device="cpu", dtype=torch.float32, trust_remote_code=trusted)
    parity.tell(model, processor, job, answer, f"opticnerve {opticnerve.__version__}")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
