"""Generated tokens a second, against transformers' `generate` with the same weights and the same tokens out.

    python benchmarks/generate.py --batch 1            # one question about one picture
    python benchmarks/generate.py --batch 8            # eight pictures with a question each, of mixed length
    python benchmarks/generate.py --questions 10       # ten questions about one picture
    python benchmarks/generate.py --batch 8 --ablate   # each technique taken away alone
    python benchmarks/generate.py --quick              # tiny shapes, to see that it runs

SmolLM2-135M's shape in bf16 behind a CLIP-ViT-B/16-shaped eye (196 soft tokens) and a two-layer mlp. The weights are
random, but such that every step says another token, so that the comparison of tokens means something (`lively`). Each
side is timed on its second run, the eye's and the prompt's part included.
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

import torch
from made_data import pixels
from shapes import SHAPES, Shape, llava, ours
from side_by_side import Trial, alternate, finish, machine, table

ABLATED = {
    "no fused step": {"fused": False},
    "no packed weights": {"pack": False},
    "no room in the cache": {"room": False, "fused": False},
}


def prompts(shape: Shape, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Placeholders and a question of 8 to 24 random tokens for each row, padded on the left: (rows, L) and its mask."""
    rng = random.Random(0)
    soft = [shape.language_part.image_token_id] * shape.vision_encoder.tokens
    asked = [
        soft + [rng.randrange(8, shape.language_part.vocabulary - 1) for _ in range(rng.randint(8, 24))]
        for _ in range(rows)
    ]
    longest = max(map(len, asked))
    ids = [[0] * (longest - len(r)) + r for r in asked]
    mask = [[0] * (longest - len(r)) + [1] * len(r) for r in asked]
    return torch.tensor(ids), torch.tensor(mask)


def lively(model: Any, *, robust: bool = False) -> Any:
    """The model with weights that make it say something else with every token.

    Matrices that keep what they are given at its size let the smallest difference of rounding show in the tokens.
    `robust`: the layers add little to the last token's embedding, and the head says the token behind it, by margins
    that batches of other shapes, and so other rounding, cannot turn. (That prefix sharing gives the tokens of separate
    prompts is for the tests to show.)
    """
    language = model.language_model if hasattr(model, "language_model") else model.model.language_model
    head = model.get_output_embeddings()
    with torch.no_grad():
        if robust:
            head.weight = torch.nn.Parameter(head.weight.roll(1, 0))
            for name, parameter in getattr(language, "model", language).layers.named_parameters():
                if "o_proj" in name or "down_proj" in name:
                    parameter.mul_(0.02)
        else:
            for parameter in getattr(language, "model", language).layers.parameters():
                if parameter.ndim == 2:  # drawn with a deviation of 0.02
                    parameter.mul_(1.5 / (0.02 * parameter.shape[1] ** 0.5))
    return model


def theirs(model: Any, ids: torch.Tensor, mask: torch.Tensor, images: torch.Tensor, new: int) -> list[list[int]]:
    """transformers' tokens."""
    out = model.generate(
        input_ids=ids, attention_mask=mask, pixel_values=images, max_new_tokens=new, do_sample=False, pad_token_id=0
    )
    return out[:, ids.shape[1] :].tolist()


def mine(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, images: torch.Tensor, new: int, *, shared: int = 0,
    fused: bool = True, room: bool = True, pack: bool = True,
) -> list[list[int]]:  # fmt: skip
    """Our tokens; `shared`: of so many first tokens of all rows, read once, `images` shows one row's."""
    from opticnerve.inference.decoding import decode
    from opticnerve.inference.shared_prefix import layout, read_heads
    from opticnerve.ops.fused_decode import FusedDecoder

    decoder = FusedDecoder.of(model.language_model, pack=pack) if fused else None
    inputs, cache = {"input_ids": ids, "attention_mask": mask, "pixel_values": images}, None
    if shared:
        rows = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
        cache = read_heads(model, [rows[0][:shared]], {"pixel_values": images}, [0] * len(rows), pad=0)
        inputs = layout([r[:shared] for r in rows], [r[shared:] for r in rows], pad=0)
    tokens = decode(
        model, inputs, cache=cache, max_new_tokens=new, fused=decoder, room=room, do_sample=False, pad_token_id=0
    )
    said = torch.stack(list(tokens), 1).tolist()
    if decoder is not None:
        decoder.release()
    return said


def trial(arguments: argparse.Namespace) -> Trial:
    """One side, once."""
    shape = SHAPES["tiny" if arguments.quick else "smollm2-135m"]
    new, side = 8 if arguments.quick else arguments.tokens, arguments.side
    rows = arguments.questions or arguments.batch
    ids, mask = prompts(shape, rows)
    images = pixels(shape, 1 if arguments.questions else rows, torch.bfloat16)
    if side.startswith("transformers"):
        model = lively(llava(shape), robust=bool(arguments.questions))
        if arguments.questions and side != "transformers, one batch":

            def run() -> list[list[int]]:
                asked = [row[kept.bool()][None] for row, kept in zip(ids, mask, strict=True)]
                return [theirs(model, row, torch.ones_like(row), images, new)[0] for row in asked]

        else:

            def run() -> list[list[int]]:
                return theirs(model, ids, mask, images.expand(rows, -1, -1, -1), new)

    else:
        model = lively(ours(shape), robust=bool(arguments.questions))
        options = ABLATED.get(side.removeprefix("opticnerve, "), {})

        def run() -> list[list[int]]:
            return mine(
                model,
                ids,
                mask,
                images,
                new,
                shared=shape.vision_encoder.tokens if arguments.questions else 0,
                **options,
            )

    run()
    started = time.perf_counter()
    said = run()
    seconds = time.perf_counter() - started
    return Trial(seconds, rows * new, check=said, notes={"distinct": len({t for row in said for t in row})})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1, help="pictures, with a question each")
    parser.add_argument("--questions", type=int, default=0, help="ask so many about one picture instead")
    parser.add_argument("--tokens", type=int, default=64, help="new ones for each question")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ablate", action="store_true", help="also each technique taken away (or put in) alone")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two rounds")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        finish(trial(arguments))
        return
    sides = ["transformers", *(["transformers, one batch"] if arguments.questions else []), "opticnerve"]
    if arguments.ablate:
        sides += [f"opticnerve, {name}" for name in ABLATED]
    passed = [f"--{name}={getattr(arguments, name)}" for name in ("batch", "questions", "tokens")]
    passed += ["--quick"] if arguments.quick else []
    results = alternate(__file__, sides, passed, rounds=2 if arguments.quick else arguments.rounds)
    print(machine())
    print(table(results, unit="tokens"))
    same = next(iter(results.values()))[0].notes["distinct"]
    print(f"\nOf {results['transformers'][0].units:g} tokens, {same} are distinct.")


if __name__ == "__main__":
    main()
