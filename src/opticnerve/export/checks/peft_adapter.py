"""peft's own loading of exported adapters, onto the model without its own, in a process that wrote neither.

    python -P peft_adapter.py JOB ANSWER

JOB: `model`, `folder` (the adapter's), `parts` (that have one), `pictures`, `picture_sizes`, `trust_remote_code`.
ANSWER: as that of stock_transformers.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any], answer: Path) -> None:
    import peft
    import torch

    from opticnerve.export import parity
    from opticnerve.inference.load import load_model
    from opticnerve.language.lora import remove_lora

    model, processor = load_model(
        job["model"], device="cpu", dtype=torch.float32, trust_remote_code=job["trust_remote_code"]
    )
    for part in job["parts"]:
        module: Any = model.part_module(part)
        remove_lora(module)
        peft.PeftModel.from_pretrained(module, Path(job["folder"]) / ("" if part == "language" else part))
    parity.tell(model, processor, job, answer, f"peft {peft.__version__}")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
