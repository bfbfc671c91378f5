"""Training against transformers' Trainer and TRL, side by side: samples a second, peak memory, and the floor.

    python benchmarks/train.py --stage align         # a CLIP-ViT-B/16-shaped eye, mlp, SmolLM2-135M's shape; captions
    python benchmarks/train.py --stage instruct      # LoRA on all linear layers; conversations of mixed length
    python benchmarks/train.py --stage align --ablate     # ours, with one technique less at a time
    python benchmarks/train.py --quick               # tiny shapes, to see that it runs

All sides train the same random weights on the same drawn pictures and words, in bf16, for three epochs, from JPEG files
to the last step; ours builds its feature cache within the measured time. transformers' `LlavaForConditionalGeneration`
stands at its best settings: bf16 weights, fused AdamW, batches of like length, words tokenised beforehand. Before they
train, all compute loss and gradient norm of the same batch: these must agree. `trl` is measured where it is installed.

The floor is what the fewest floating-point operations of the run (see `shapes.flops`) would take at the rate of matrix
products of the same process.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import shapes
import train_data
from side_by_side import Trial, alternate, finish, machine, peak_resident, table

EPOCHS, BATCH, RANK = 3, 8, 16
LORA = {"rank": RANK, "alpha": 2 * RANK}
TRAINS: dict[str, shapes.Trains] = {"align": "connector", "instruct": "lora"}
CHECKED = 2  # samples whose loss is compared
ABLATIONS = {
    "all": [],
    "live eye": ["cache_features=false"],
    "padded, not packed": ["pack=null"],
    "torch's attention": ["ablate=attention"],
    "logits everywhere": ["ablate=logits"],
    "transformers' and peft's layers": ["ablate=layers"],
    "an idle eye in memory": ["ablate=offload"],
    "nothing of ops (OPTICNERVE_PLAIN)": ["ablate=ops"],
}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=list(TRAINS), default="align")
    parser.add_argument("--shape", choices=list(shapes.SHAPES), default="smollm2-135m")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step, on all sides")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="in our stage")
    parser.add_argument("--sides", default="", help="these alone, separated by commas")
    parser.add_argument("--ablate", action="store_true", help="ours alone, with one technique less at a time")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and two rounds")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    return parser


# -- ours -------------------------------------------------------------------------------------------------------------


def opticnerve(args: Any, folder: Path) -> Trial:
    """A stage of a recipe, as `opticnerve train` runs it."""
    from opticnerve.data.collators.next_token import Collator
    from opticnerve.data.encode.packing import pack
    from opticnerve.models.freeze import freeze
    from opticnerve.models.vlm.build import Dock
    from opticnerve.objectives.next_token import NextToken
    from opticnerve.ops.fused_layers import fuse_layers
    from opticnerve.recipe import load
    from opticnerve.train import loop
    from opticnerve.train.loop import run_stage

    os.environ["OPTICNERVE_CACHE"] = str(folder / "cache")
    shape, processor = shapes.SHAPES[args.shape], train_data.processor(shapes.SHAPES[args.shape])
    file = train_data.write(folder / "data", args.stage, args.samples)
    own = {"template": "caption"} if args.stage == "align" else {"lora": LORA}
    recipe = load({
        "name": "benchmark",
        "model": {"language": {"name": "drawn"}, "image": {"encoder": {"type": "hf_vision", "name": "drawn"}}},
        "stages": [{
            "name": args.stage, "train": shapes.stage(TRAINS[args.stage]), "data": [{"path": str(file)}], **own,
            "epochs": EPOCHS, "batch_size": BATCH, "accumulate": args.accumulate, "schedule": "constant", "warmup": 0,
            "cache_features": True, "pack": 8192,
        }],
    }, [f"stages.0.{change}" for change in args.set if not change.startswith("ablate=")])  # fmt: skip
    model = shapes.ours(shape)
    model.config.image_token_id = processor.image_token_id
    _without(args.set)
    # What is looked at after a stage is no training; the peers do not look.
    loop.image_use = lambda *given, **options: None

    samples = train_data.encoded(file, args.stage, processor)
    stage = recipe.stages[0]
    frozen = freeze(model, {"connector": 1e-3})
    batch = Collator(processor)([pack([[s]]) for s in samples[:CHECKED]])
    with fuse_layers(model.language_model):
        loss, count = NextToken(model)(batch)
        (loss / count).backward()
    check = [float(loss.detach() / count), _norm(p for group in frozen.groups.values() for p in group.values())]
    model.zero_grad(set_to_none=True)

    started = time.perf_counter()
    result = run_stage(Dock(model, processor, {}), recipe, stage, folder / "run" / "stages" / "1", trained_before=set())
    seconds = time.perf_counter() - started
    return _trial(args, samples, seconds, check, {"steps_seconds": result.seconds, "final_loss": result.final_loss})


def _without(changes: list[str]) -> None:
    """Take a technique away, to see what it contributes."""
    import torch

    from opticnerve.objectives import next_token
    from opticnerve.train import setup

    if "ablate=attention" in changes:
        next_token.supported = lambda language_model: False
    if "ablate=logits" in changes:

        def everywhere(language_model: Any, places_M: Any, targets_M: Any, **inputs: Any) -> Any:
            logits_BLV = language_model(**inputs, use_cache=False).logits.float()
            return torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1)[places_M], targets_M, reduction="none")

        next_token.supervised_loss = everywhere
    if "ablate=layers" in changes:
        setup.fuse_layers = lambda language_model, functions, required: contextlib.nullcontext(0)
    if "ablate=ops" in changes:
        os.environ["OPTICNERVE_PLAIN"] = "1"
    if "ablate=offload" in changes:
        setup.offload_encoder = lambda vision_encoder, folder, console: None


# -- peers ------------------------------------------------------------------------------------------------------------


def transformers(args: Any, folder: Path, *, trl: bool = False) -> Trial:
    """`LlavaForConditionalGeneration` under `Trainer`, or under TRL's `SFTTrainer`."""
    import torch
    from transformers import Trainer, TrainingArguments

    shape, processor = shapes.SHAPES[args.shape], train_data.processor(shapes.SHAPES[args.shape])
    file = train_data.write(folder / "data", args.stage, args.samples)
    samples = train_data.encoded(file, args.stage, processor)
    rows = [
        {
            "input_ids": [
                shape.language_part.image_token_id if i == processor.image_token_id else i for i in s.input_ids
            ],
            "labels": s.labels, "picture": s.images[0].source,
        }
        for s in samples
    ]  # fmt: skip

    def collate(some: list[dict[str, Any]]) -> dict[str, Any]:
        import PIL.Image

        length = max(len(row["input_ids"]) for row in some)

        def pad(name: str, value: int) -> Any:
            return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in some])

        mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (length - len(r["input_ids"])) for r in some])
        pictures = [PIL.Image.open(row["picture"]).convert("RGB") for row in some]
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"].to(torch.bfloat16)
        return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100), "attention_mask": mask,
                "pixel_values": pixels}  # fmt: skip

    model = shapes.llava(shape)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    loss = model(**collate(rows[:CHECKED])).loss
    loss.backward()
    check = [float(loss.detach()), _norm(model.model.multi_modal_projector.parameters())]
    model.zero_grad(set_to_none=True)
    model = shapes.open_llava(model, TRAINS[args.stage], lora=LORA)

    options: dict[str, Any] = {
        "output_dir": str(folder / "run"), "num_train_epochs": EPOCHS, "report_to": [], "save_strategy": "no",
        "per_device_train_batch_size": BATCH // args.accumulate, "gradient_accumulation_steps": args.accumulate,
        "learning_rate": 1e-3, "lr_scheduler_type": "constant", "optim": "adamw_torch_fused", "max_grad_norm": 1.0,
        "train_sampling_strategy": "group_by_length", "remove_unused_columns": False, "logging_steps": 10**6,
        "disable_tqdm": True, "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip
    if trl:
        import datasets
        from trl import SFTConfig, SFTTrainer

        data: Any = datasets.Dataset.from_list([{**row, "picture": str(row["picture"])} for row in rows])
        # It would compute activations twice to save memory, which is not its fastest.
        options["gradient_checkpointing"] = False
        config = SFTConfig(**options, bf16=False, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
        trainer: Any = SFTTrainer(
            model=model, args=config, train_dataset=data, data_collator=collate, processing_class=processor.tokenizer
        )
    else:
        trainer = Trainer(model=model, args=TrainingArguments(**options), train_dataset=rows, data_collator=collate)  # type: ignore[arg-type]
    started = time.perf_counter()
    result = trainer.train()
    seconds = time.perf_counter() - started
    return _trial(args, samples, seconds, check, {"final_loss": result.training_loss})


# -- both -------------------------------------------------------------------------------------------------------------


def _trial(args: Any, samples: list[Any], seconds: float, check: list[float], notes: dict[str, Any]) -> Trial:
    shape = shapes.SHAPES[args.shape]
    # The rate is measured after training, so that its matrices do not count as the side's memory.
    peak = peak_resident()
    tokens = BATCH * sum(len(s.input_ids) for s in samples) // len(samples)
    rate = shapes.matmul_rate([(tokens, i, o) for i, o in set(shape.language_part.matrices)])
    lengths = [len(s.input_ids) for s in samples]
    supervised = sum(label != -100 for s in samples for label in s.labels)
    steps = shapes.flops(
        shape, lengths=lengths, supervised=supervised, images=len(samples), trains=TRAINS[args.stage], rank=RANK,
        live_encoder=False,
    )  # fmt: skip
    needed = EPOCHS * steps + shapes.encoder_flops(shape.vision_encoder, len(samples))  # a picture must be seen once
    notes |= {"floor_seconds": needed / rate, "matmul_gflops": rate / 1e9}
    return Trial(seconds, EPOCHS * len(samples), peak_bytes=peak, check=check, notes=notes)


def _norm(parameters: Any) -> float:
    return float(sum(float(p.grad.detach().float().square().sum()) for p in parameters) ** 0.5)


def main() -> None:
    args = arguments().parse_args()
    if args.quick:
        args.shape, args.rounds, args.samples = "tiny", min(args.rounds, 2), 8
    if args.side:
        with tempfile.TemporaryDirectory() as folder:
            if args.side == "transformers":
                finish(transformers(args, Path(folder)))
            elif args.side == "trl":
                finish(transformers(args, Path(folder), trl=True))
            else:
                args.set += ABLATIONS.get(args.side, [])
                finish(opticnerve(args, Path(folder)))
        return
    sides = list(ABLATIONS) if args.ablate else ["opticnerve", "transformers"]
    sides += ["trl"] if not args.ablate and importlib.util.find_spec("trl") else []
    sides = args.sides.split(",") if args.sides else sides
    common = ["--stage", args.stage, "--shape", args.shape, "--samples", str(args.samples)]
    common += ["--accumulate", str(args.accumulate), *(f"--set={change}" for change in args.set)]
    results = alternate(__file__, sides, common, rounds=args.rounds)
    print(f"{args.stage}, {args.shape}, batch {BATCH}, {args.samples} samples, {EPOCHS} epochs; {machine()}\n")
    print(table(results, against=sides[0] if args.ablate or "transformers" not in sides else "transformers"))
    ours = results[sides[0]]
    shares = [t.notes["floor_seconds"] / t.seconds for t in ours]
    rates = [t.notes["matmul_gflops"] for t in ours]
    print(
        f"\nOf the floor: {statistics.median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%}) at "
        f"{statistics.median(rates):.0f} GFLOP/s ({min(rates):.0f} to {max(rates):.0f})"
    )


if __name__ == "__main__":
    sys.exit(main())
