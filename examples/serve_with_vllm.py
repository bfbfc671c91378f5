"""An `hf-llava` export in vLLM, and whether vLLM gives the same greedy answers as transformers.

    opticnerve export runs/photos exported --to hf-llava
    python examples/serve_with_vllm.py exported                       # an interpreter that has vllm; no opticnerve
    vllm serve exported --limit-mm-per-prompt '{"image": 2}'          # the server itself

Each engine runs in a process of its own and in float32 (vLLM on a CPU: VLLM_CPU_KVCACHE_SPACE=1).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

QUESTIONS = [
    ("Name a colour.", 0),
    ("What is in the picture?", 1),
    ("Compare the two pictures, and say which of them is brighter.", 2),
]


def pictures(count: int) -> list[Any]:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(count)
    return [Image.fromarray(rng.integers(0, 256, (120, 160, 3), dtype=np.uint8)) for _ in range(count)]


def prompts(folder: str) -> list[tuple[str, list[Any]]]:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    chats = [
        [{"role": "user", "content": [*[{"type": "image"}] * n, {"type": "text", "text": q}]}] for q, n in QUESTIONS
    ]
    texts = [processor.apply_chat_template(c, add_generation_prompt=True) for c in chats]
    return [(t, pictures(n)) for t, (_, n) in zip(texts, QUESTIONS, strict=True)]


def with_transformers(folder: str, tokens: int) -> list[list[int]]:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor, found = AutoProcessor.from_pretrained(folder), []
    for text, images in prompts(folder):
        inputs = processor(text=text, images=images or None, return_tensors="pt")
        said = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        found.append(said[0, inputs["input_ids"].shape[1] :].tolist())
    return found


def with_vllm(folder: str, tokens: int) -> list[list[int]]:
    from transformers import AutoConfig
    from vllm import LLM, SamplingParams

    longest = min(1024, AutoConfig.from_pretrained(folder).get_text_config().max_position_embeddings)
    engine = LLM(
        folder, dtype="float32", enforce_eager=True, max_model_len=longest, limit_mm_per_prompt={"image": 2}, seed=0
    )
    asked: list[Any] = [
        {"prompt": text, **({"multi_modal_data": {"image": images}} if images else {})}
        for text, images in prompts(folder)
    ]
    answers = engine.generate(asked, SamplingParams(temperature=0, max_tokens=tokens))
    return [list(a.outputs[0].token_ids) for a in answers]


ENGINES = {"transformers": with_transformers, "vllm": with_vllm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="an export of format hf-llava")
    parser.add_argument("--tokens", type=int, default=12, help="of each answer")
    parser.add_argument("--engine", choices=ENGINES, help="run this one alone, and write its token ids to --to")
    parser.add_argument("--to", type=Path)
    given = parser.parse_args()
    if given.engine:
        given.to.write_text(json.dumps(ENGINES[given.engine](given.folder, given.tokens)))
        return
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for engine in ENGINES:
            to = Path(scratch) / f"{engine}.json"
            command = [sys.executable, __file__, given.folder, "--tokens", str(given.tokens), "--engine", engine]
            subprocess.run([*command, "--to", str(to)], check=True)
            found[engine] = json.loads(to.read_text())
    versions = {n: importlib.metadata.version(n) for n in ("transformers", vllm_package())}
    differing = [q for (q, _), a, b in zip(QUESTIONS, *found.values(), strict=True) if a != b]
    same = len(QUESTIONS) - len(differing)
    sys.stdout.write(json.dumps({"versions": versions, **found}) + "\n")
    sys.stdout.write(f"{same} of {len(QUESTIONS)} greedy answers are the same, token for token\n")
    sys.exit(bool(differing))


def vllm_package() -> str:
    """vLLM's builds are called differently: vllm, vllm-cpu."""
    installed = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    return next(n for n in ("vllm", "vllm-cpu") if n in installed)


if __name__ == "__main__":
    main()
