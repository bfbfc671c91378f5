"""What one card must hold for a step, by `plan`'s counting: four sizes of language model, four ways to train them.

    python benchmarks/memory.py
    python benchmarks/memory.py 7B QLoRA      # some of the sizes and ways

CLIP-L/14-336 with a two-layer MLP before each; weights in bf16, AdamW over float32 masters, a micro-batch of 4 rows of
1,024 tokens, 576 of which are a picture and 128 are learned, `gradient_checkpointing`. Shapes alone: no weight is made.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from shapes import _CLIP_L, _QWEN_500M, Brain, Shape, ours

from opticnerve.language.layers import decoder_layers
from opticnerve.language.quantization import planned_bytes, quantizable
from opticnerve.models.freeze import freeze
from opticnerve.plan.cost import Memory, memory, trace_step

_QWEN = {"tied": False, "positions": 32768, "rope_theta": 1e6}
SIZES = {
    "0.5B": _QWEN_500M,
    "3B": Brain("qwen2", 2048, 11008, 36, 16, 2, 151936, **{**_QWEN, "tied": True}),
    "7B": Brain("qwen2", 3584, 18944, 28, 28, 4, 152064, **_QWEN),
    "13B": Brain("llama", 5120, 13824, 40, 40, 40, 32064, tied=False, positions=4096, rope_theta=1e4),
}
WAYS = {
    "connector": {"connector": 1e-3},
    "LoRA": {"connector": 2e-5, "language.lora": 2e-4},
    "QLoRA": {"connector": 2e-5, "language.lora": 2e-4},
    "full": {"connector": 2e-5, "language": 2e-5},
}
ROWS, LENGTH, LEARNED = 4, 1024, 128
CARDS = (8, 12, 16, 24, 32, 48, 80)  # GiB
SPARE = 1.1  # for what the allocator and the device's own context take


def foresee(size: str, way: str) -> Memory:
    """The bytes of a step."""
    model: Any = ours(Shape(_CLIP_L, SIZES[size]), device="meta")
    start = f"{decoder_layers(model.language_model)[0]}."
    layers = dict(quantizable(model.language_model, start)) if way == "QLoRA" else {}
    packed = {id(layer.weight): planned_bytes("nf4", layer) for layer in layers.values()}
    if "language.lora" in WAYS[way]:
        with torch.device("meta"):
            model.give_lora({"rank": 16})
    freeze(model, WAYS[way])
    trace = trace_step(
        model, rows=ROWS, length=LENGTH, media={"image": ROWS}, supervised=ROWS * LEARNED,
        recompute=len(decoder_layers(model.language_model)[1]),
    )  # fmt: skip
    return memory(model, trace, trace, checkpointing=True, process=0, packed=packed)


def card(total: int) -> str:
    """The smallest card that holds so many bytes."""
    fitting = [c for c in CARDS if c * 2**30 >= SPARE * total]
    return f"{fitting[0]} GB" if fitting else "several of 80 GB"


def row(size: str, way: str) -> str:
    """A line of the table."""
    needed = foresee(size, way)
    parts = (needed.weights, needed.gradients + needed.optimizer, needed.activations_checkpointed, needed.total)
    return f"| {size} | {way} | {' | '.join(f'{part / 1e9:.1f}' for part in parts)} | {card(needed.total)} |"


def main(arguments: list[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("only", nargs="*", help=f"of {', '.join((*SIZES, *WAYS))}")
    only = set(parser.parse_args(arguments).only)
    sizes, ways = ([name for name in names if name in only or not only & set(names)] for names in (SIZES, WAYS))
    lines = [row(size, way) for size in sizes for way in ways]
    head = "| language model | trains | weights, GB | gradients and optimizer | activations | together | card |"
    print("\n".join([head, "|---|---|---:|---:|---:|---:|---|", *lines]))
    return lines


if __name__ == "__main__":
    main()
