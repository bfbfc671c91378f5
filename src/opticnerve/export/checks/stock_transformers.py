"""An exported folder in stock transformers, opticnerve being out of reach.

    python -P stock_transformers.py JOB ANSWER

JOB: `folder`, `model_class`, `samples` (chats), `last`, `greedy`. ANSWER: versions, tensors that are missing or too
many, and per sample prompt, ids and greedy tokens; logits and pixels stand beside it in arrays.npz.
"""

from __future__ import annotations

import json
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any


class Barrier(MetaPathFinder):
    """Nobody imports opticnerve here: the folder must load without it."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname.partition(".")[0] == "opticnerve":
            raise ModuleNotFoundError(f"the exported folder asks for {fullname}; it must load in stock transformers")


def main(job: dict[str, Any], answer: Path) -> None:
    sys.meta_path.insert(0, Barrier())
    import numpy as np
    import torch
    import transformers

    model_class = getattr(transformers, job["model_class"])
    model, report = model_class.from_pretrained(job["folder"], dtype=torch.float32, output_loading_info=True)
    processor = transformers.AutoProcessor.from_pretrained(job["folder"])
    model.eval()
    arrays: dict[str, Any] = {}
    said: dict[str, Any] = {
        "engine": f"transformers {transformers.__version__}", "torch": torch.__version__,
        "problems": {k: sorted(map(str, v)) for k, v in report.items() if v}, "samples": [],
    }  # fmt: skip
    for number, chat in enumerate(job["samples"]):
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            logits_KV = model(**inputs, logits_to_keep=job["last"]).logits[0]
            greedy = model.generate(**inputs, max_new_tokens=job["greedy"], do_sample=False)
        ids = inputs["input_ids"][0].tolist()
        arrays[f"logits_{number}"] = logits_KV.numpy()
        if "pixel_values" in inputs:
            arrays[f"pixels_{number}"] = inputs["pixel_values"].numpy()
        if "image_sizes" in inputs:
            arrays[f"sizes_{number}"] = inputs["image_sizes"].numpy()
        said["samples"].append({"text": text, "ids": ids, "greedy": greedy[0, len(ids) :].tolist()})
    np.savez(answer.parent / "arrays.npz", **arrays)
    answer.write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
