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
    from opticnerve.inference.load import load_model

    trusted = job["trust_remote_code"]
    model, processor = load_model(job["folder"], device="cpu", dtype=torch.float32, trust_remote_code=trusted)
    tell(model, processor, job, answer, f"opticnerve {opticnerve.__version__}")


def tell(model: Any, processor: Any, job: dict[str, Any], answer: Path, engine: str) -> None:
    """Write what a docked model says to the job's samples."""
    import numpy as np
    import torch

    from opticnerve.common import atomic
    from opticnerve.export import parity, samples

    chosen = samples.make(
        Path(job["pictures"]), picture_sizes=[tuple(s) for s in job["picture_sizes"]],
        sees="image" in model.towers, hears="audio" in model.towers,
    )  # fmt: skip
    arrays: dict[str, Any] = {}
    said: dict[str, Any] = {"engine": engine, "torch": torch.__version__, "samples": []}
    for number, found in enumerate(parity.record(model, processor, chosen)):
        arrays[f"logits_{number}"] = found.logits_KV.numpy()
        if found.pixels is not None:
            arrays[f"pixels_{number}"] = found.pixels.numpy()
        said["samples"].append({"text": found.text, "ids": found.ids, "greedy": found.greedy})
    np.savez(answer.parent / "arrays.npz", **arrays)
    atomic.write_json(answer, said)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
