"""Attention on a CPU: our plain products against torch's kernel, forward and backward, in turn on the same tensors.

    python benchmarks/attention.py
    python benchmarks/attention.py --quick     # tiny shapes, to see that it runs

`ops.attention.LONGEST` says up to how many positions ours is taken: where this table says that it is the faster.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from side_by_side import in_turn, machine
from torch import Tensor

from opticnerve.ops.attention import faster, products


@dataclass(frozen=True)
class Shape:
    """N segments of L positions, H query heads and K key heads of width D."""

    name: str
    segments: int
    heads: int
    key_heads: int
    length: int
    width: int
    causal: bool = True


SHAPES = [
    Shape("SmolLM2-135M, captions", 8, 9, 3, 240, 64),
    Shape("SmolLM2-135M", 4, 9, 3, 512, 64),
    Shape("SmolLM2-135M", 2, 9, 3, 1024, 64),
    Shape("SmolLM2-135M", 1, 9, 3, 2048, 64),
    Shape("SmolLM2-135M, tiles", 1, 9, 3, 4096, 64),
    Shape("SmolLM2-135M", 1, 9, 3, 8192, 64),
    Shape("Vicuna-7B, captions", 2, 32, 32, 640, 128),
    Shape("CLIP-B/16", 8, 12, 12, 197, 64, causal=False),
    Shape("CLIP-L/14-336", 4, 16, 16, 577, 64, causal=False),
    Shape("SigLIP-so400m-384", 4, 16, 16, 729, 72, causal=False),
]
TINY = [Shape("tiny", 2, 4, 2, 24, 8), Shape("tiny eye", 2, 4, 4, 17, 8, causal=False)]


def measure(shape: Shape, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Median milliseconds of each side, forward and with the backward pass, and how far the outputs are apart."""
    torch.manual_seed(0)
    rows, length, width = shape.segments, shape.length, shape.width
    q, k, v = (
        torch.randn(rows, heads, length, width, dtype=dtype).requires_grad_()
        for heads in (shape.heads, shape.key_heads, shape.key_heads)
    )
    grad = torch.randn_like(q)
    scaling = width**-0.5

    def both(run: Callable[[], Tensor]) -> None:
        torch.autograd.grad(run(), [q, k, v], grad)

    sides: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: products(q, k, v, scaling, causal=shape.causal),
        "torch": lambda: F.scaled_dot_product_attention(
            q, k, v, is_causal=shape.causal, scale=scaling, enable_gqa=shape.heads != shape.key_heads
        ),
    }  # fmt: skip
    parts = {f"{side}, forward": torch.no_grad()(run) for side, run in sides.items()}
    parts |= {f"{side}, both": partial(both, run) for side, run in sides.items()}
    found = {name: seconds * 1e3 for name, seconds in in_turn(parts, rounds).items()}
    with torch.no_grad():
        found["apart"] = float((sides["ours"]() - sides["torch"]()).abs().max())
    return found


def main(arguments: list[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(arguments)
    print(f"Milliseconds, medians of {args.rounds} rounds; {machine()}\n")
    print("| shape | positions | dtype | torch, forward | × ours | torch, with backward | × ours | apart | taken |")
    print("|---|---:|---|---:|---:|---:|---:|---:|---|")
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for shape in TINY if args.quick else SHAPES:
            found = measure(shape, dtype, 2 if args.quick else args.rounds)
            taken = faster(torch.empty(1, 1, shape.length, 1, dtype=dtype), all_see_all=not shape.causal)
            parts = "".join(
                f" {found[f'torch, {part}']:.2f} | {found[f'torch, {part}'] / found[f'ours, {part}']:.2f} |"
                for part in ("forward", "both")
            )
            name = f"{shape.name} × {shape.segments}"
            print(
                f"| {name} | {shape.length:,} | {str(dtype)[6:]} |{parts} {found['apart']:.1g} | "
                f"{'ours' if taken else 'torch'} |",
                flush=True,
            )
            rows.append(found)
    return rows


if __name__ == "__main__":
    main()
