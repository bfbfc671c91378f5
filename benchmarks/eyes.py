"""A frozen or opened eye on a CPU: ours, as a training stage has it, against transformers' vision model as it is.

    python benchmarks/eyes.py
    python benchmarks/eyes.py --quick     # tiny shapes, to see that it runs

Random weights of public shapes, bf16, the tokens that a language model would get: the layer before the last of CLIP (as
LLaVA-1.5 takes), the last one of the others. Both sides hold the same weights, in turn in one process. Ours attends by
plain products (`ops.attention`), stops at the layer that is asked for, and leaves out SigLIP's pooling head.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers as tf
from side_by_side import in_turn, machine
from torch import Tensor

from opticnerve.encoders.hf_vision import HFVisionEncoder
from opticnerve.ops.attention import plain_attention


@dataclass(frozen=True)
class Shape:
    """A vision model's configuration, the layer that is read, and how many pictures at once."""

    name: str
    config: Callable[[], Any]
    layer: Any
    pictures: int


SHAPES = [
    Shape("CLIP-ViT-B/16", lambda: tf.CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=16), -2, 8),
    Shape("CLIP-ViT-L/14-336", lambda: tf.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14), -2, 4),
    Shape("SigLIP-so400m-384", lambda: tf.SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=378,
        patch_size=14), "last", 4),
    Shape("DINOv2-B/14-518", lambda: tf.Dinov2Config(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, image_size=518, patch_size=14), "last", 2),
]  # fmt: skip
TINY = [
    Shape("tiny CLIP", lambda: tf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8),
        -2, 2),
    Shape("tiny SigLIP", lambda: tf.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8),
        "last", 2),
]  # fmt: skip


def sides_of(shape: Shape) -> tuple[HFVisionEncoder, dict[str, Callable[[Tensor], Tensor]]]:
    """The eye, and each side's way from pixels to tokens (class tokens included)."""
    torch.manual_seed(0)
    encoder = HFVisionEncoder(architecture=shape.config().to_dict(), layer=shape.layer, class_token="keep")
    encoder.to(torch.bfloat16).eval()
    theirs: Any = type(encoder.model)(shape.config()).to(torch.bfloat16).eval()
    theirs.load_state_dict(encoder.model.state_dict())
    encoder.theirs = theirs  # so that it is frozen and opened with ours

    def transformers(pixels_BCHW: Tensor) -> Tensor:
        if shape.layer == "last":
            return theirs(pixels_BCHW).last_hidden_state
        return theirs(pixels_BCHW, output_hidden_states=True).hidden_states[shape.layer]

    def ours(pixels_BCHW: Tensor) -> Tensor:
        with plain_attention(encoder):
            return encoder(pixels_BCHW).tokens_BND

    return encoder, {"transformers": transformers, "ours": ours}


def measure(shape: Shape, rounds: int) -> dict[str, float]:
    """Median seconds a picture of each side, frozen and opened, and how far their tokens are apart, relatively."""
    encoder, sides = sides_of(shape)
    side = encoder.image_size
    pixels_BCHW = torch.randn(shape.pictures, 3, side, side, dtype=torch.bfloat16)

    def back(see: Callable[[Tensor], Tensor]) -> None:
        see(pixels_BCHW).float().square().sum().backward()
        encoder.zero_grad(set_to_none=True)

    found = {}
    for kind in ("frozen", "open"):
        encoder.requires_grad_(kind == "open")
        runs = {
            f"{name}, {kind}": partial(back, see) if kind == "open" else torch.no_grad()(partial(see, pixels_BCHW))
            for name, see in sides.items()
        }
        found |= {name: seconds / shape.pictures for name, seconds in in_turn(runs, rounds).items()}
    with torch.no_grad():
        one, other = (see(pixels_BCHW).float() for see in sides.values())
    found["apart"] = float((one - other).norm() / one.norm())
    return found


def main(arguments: list[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(arguments)
    print(f"Pictures a second, bf16, medians of {args.rounds} rounds; {machine()}\n")
    print("| eye | frozen: transformers | ours | × | open, with backward: transformers | ours | × | tokens apart |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    rows = []
    for shape in TINY if args.quick else SHAPES:
        found = measure(shape, 2 if args.quick else args.rounds)
        parts = ""
        for kind in ("frozen", "open"):
            theirs, ours = found[f"transformers, {kind}"], found[f"ours, {kind}"]
            parts += f" {1 / theirs:.3g} | {1 / ours:.3g} | {theirs / ours:.2f} |"
        print(f"| {shape.name} |{parts} {found['apart']:.1g} |", flush=True)
        rows.append(found)
    return rows


if __name__ == "__main__":
    main()
