"""An export in vLLM, and whether vLLM gives the same greedy answers as transformers.

    opticnerve export runs/photos exported --to hf-llava
    python examples/serve_with_vllm.py exported                       # an interpreter that has vllm
    python examples/serve_with_vllm.py exported --vllm-python vllm/bin/python    # one that has it elsewhere
    vllm serve exported --limit-mm-per-prompt '{"image": 2}'          # the server itself

An `hf-llava` folder needs no opticnerve on either side. A `merged` one needs it on both (see docs/serving.md).
Each engine runs in a process of its own and in float32 (vLLM on a CPU: VLLM_CPU_KVCACHE_SPACE=1).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Each question, and the pictures beside it (width, height).
QUESTIONS: list[tuple[str, list[tuple[int, int]]]] = [
    ("Name a colour.", []),
    ("How many days has a week, and what are they called?", []),
    ("What is in the picture?", [(160, 120)]),
    ("Which colour is it?", [(97, 333)]),
    ("Describe the picture in one sentence.", [(224, 224)]),
    ("Is it day or night?", [(640, 60)]),
    ("Compare the two pictures, and say which of them is brighter.", [(160, 120), (120, 160)]),
    ("Are they the same?", [(224, 224), (224, 224)]),
]
LIKELIEST = 5  # words of each step whose log-probabilities are compared


def pictures(sizes: list[tuple[int, int]]) -> list[Any]:
    import numpy as np
    from PIL import Image

    made = []
    for number, (width, height) in enumerate(sizes):
        rng = np.random.default_rng([number, width, height])
        y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
        mixed = np.stack([x, y, 1 - x], -1) @ rng.uniform(0, 120, (3, 3)) + rng.normal(0, 20, (height, width, 3))
        made.append(Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8)))
    return made


def with_transformers(folder: str, tokens: int) -> dict[str, Any]:
    """Prompt and answer of each question as token ids, and the log-probabilities of all words at each step."""
    import torch
    import transformers

    if json.loads((Path(folder) / "config.json").read_text())["model_type"] == "opticnerve":
        import opticnerve  # noqa: F401  (registers its classes)

    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    answers = []
    for question, sizes in QUESTIONS:
        shown = [{"type": "image", "image": p} for p in pictures(sizes)]
        chat = [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}]
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        said = model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        prompt = inputs["input_ids"][0].tolist()
        answers.append({
            "prompt": prompt,
            "said": said.sequences[0, len(prompt) :].tolist(),
            "logprobs": [step[0].float().log_softmax(-1).tolist() for step in said.logits],
        })  # fmt: skip
    return {
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__}, "device": str(model.device),
        "answers": answers,
    }  # fmt: skip


def with_vllm(folder: str, tokens: int) -> dict[str, Any]:
    """The same from vLLM; log-probabilities of the likeliest words alone, as [id, value]."""
    import torch
    import transformers
    import vllm

    longest = 2048
    text = json.loads((Path(folder) / "config.json").read_text())["text_config"]
    engine = vllm.LLM(
        folder, dtype="float32", enforce_eager=True, limit_mm_per_prompt={"image": 2}, seed=0,
        max_model_len=min(longest, text.get("max_position_embeddings", longest)),
    )  # fmt: skip
    chats: list[Any] = [
        [{
            "role": "user",
            "content": [
                *({"type": "image_pil", "image_pil": p} for p in pictures(sizes)), {"type": "text", "text": question}
            ],
        }]
        for question, sizes in QUESTIONS
    ]  # fmt: skip
    settings = vllm.SamplingParams(temperature=0, max_tokens=tokens, logprobs=LIKELIEST)
    answers = [
        {
            "prompt": list(answer.prompt_token_ids or ()),
            "said": list(answer.outputs[0].token_ids),
            "logprobs": [[[i, p.logprob] for i, p in step.items()] for step in answer.outputs[0].logprobs or ()],
        }
        for answer in engine.chat(chats, settings)
    ]
    versions = {"vllm": vllm.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    return {"versions": versions, "device": engine.llm_engine.vllm_config.device_config.device_type, "answers": answers}


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The largest difference of two log-probabilities (nats), of steps before which both have said the same."""
    largest, same = 0.0, 0
    while same < min(len(ours["said"]), len(theirs["said"])) and ours["said"][same] == theirs["said"][same]:
        same += 1
    steps = min(same + 1, len(ours["logprobs"]), len(theirs["logprobs"]))
    for whole, likely in zip(ours["logprobs"][:steps], theirs["logprobs"][:steps], strict=True):
        largest = max([largest, *(abs(whole[i] - logprob) for i, logprob in likely)])
    return largest


ENGINES = {"transformers": with_transformers, "vllm": with_vllm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="an export of format hf-llava or merged")
    parser.add_argument("--tokens", type=int, default=12, help="of each answer")
    parser.add_argument("--vllm-python", default=sys.executable, help="the interpreter that has vllm")
    parser.add_argument("--engine", choices=ENGINES, help="run this one alone, and write what it says to --to")
    parser.add_argument("--to", type=Path)
    given = parser.parse_args()
    if given.engine:
        given.to.write_text(json.dumps(ENGINES[given.engine](given.folder, given.tokens)))
        return
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for engine, python in (("transformers", sys.executable), ("vllm", given.vllm_python)):
            to = Path(scratch) / f"{engine}.json"
            command = [python, __file__, given.folder, "--tokens", str(given.tokens), "--engine", engine]
            subprocess.run([*command, "--to", str(to)], check=True)
            found[engine] = json.loads(to.read_text())
    rows = [
        {
            "question": question, "pictures": len(sizes), "prompt tokens": len(ours["prompt"]),
            "answer tokens": len(ours["said"]), "same prompt": ours["prompt"] == theirs["prompt"],
            "same answer": ours["said"] == theirs["said"], "largest difference": round(difference(ours, theirs), 7),
        }
        for (question, sizes), ours, theirs in zip(
            QUESTIONS, found["transformers"]["answers"], found["vllm"]["answers"], strict=True
        )
    ]  # fmt: skip
    for engine, said in found.items():
        sys.stdout.write(f"{engine}: {json.dumps(said['versions'])} on {said['device']}\n")
    for row in rows:
        sys.stdout.write(json.dumps(row) + "\n")
    same = sum(row["same prompt"] and row["same answer"] for row in rows)
    with_pictures = sum(bool(row["pictures"]) for row in rows)
    sys.stdout.write(
        f"{same} of {len(rows)} prompts and greedy answers are the same, token for token ({with_pictures} with "
        f"pictures); log-probabilities differ by at most {max(row['largest difference'] for row in rows):.2g} nats\n"
    )
    sys.exit(same != len(rows))


if __name__ == "__main__":
    main()
