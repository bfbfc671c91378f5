"""Everything that a GPU decides, in one call of under ten minutes: LLaVA-1.5-7B's shapes from random weights in three
kinds of training, SigLIP × Qwen2.5-0.5B, and generation, each beside transformers on the same card.

    python benchmarks/gpu.py --out table.md --results gpu.json      # the whole table
    python benchmarks/gpu.py --only align,lora --minutes 4 --profile
    python benchmarks/gpu.py --quick --device cpu                   # every row with tiny shapes, to see that it runs

The card needs 80 GB. On its machine there must be PyTorch, transformers ≥ 5.17, accelerate, Pillow, and peft for the
row `lora`; beside them opticnerve itself wants rich, pyyaml, psutil and pydantic. An image without pydantic gets it as
wheels carried along: pydantic, pydantic_core, annotated-types, typing_inspection. Nothing is fetched: weights are
random, data is made. `PYTHONPATH=src` stands for an installation.

Each row of each side is a process of its own with a time limit; sides take turns, round after round, until the rounds
are done or the minutes are over. Results go to a JSON file as they come, so that a run that is cut off leaves what it
has. MFU is the floating-point operations that the samples need at least (`shapes.flops`) over the time and the best
rate of bare bf16 matrix products on the same card in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gpu_sides import Generation, Training, trial
from side_by_side import Trial, agreement, finish, machine, run_side

SIDES = ["transformers", "opticnerve"]
_7B = "llava-1.5-7b"
_CAPTION: dict[str, Any] = {"question": (1, 4), "answer": (8, 60)}
_CHAT: dict[str, Any] = {"question": (16, 200), "answer": (16, 500), "pack": 4096}

# AdamW with float32 steps takes 16 bytes a weight: 113 GB for all of LLaVA-1.5-7B. So `full` steps in bf16, on both
# sides, and `full-float32` has 12 of the 32 layers.
ROWS: dict[str, tuple[str, Training | Generation]] = {
    "align": ("LLaVA-1.5-7B, connector only", Training(_7B, "connector", 8, 1, 128, **_CAPTION)),
    "lora": ("LLaVA-1.5-7B, connector and LoRA of rank 128", Training(_7B, "lora", 16, 4, 96, **_CHAT)),
    "full": (
        "LLaVA-1.5-7B, connector and language model, AdamW in bf16",
        Training(_7B, "full", 16, 8, 64, **_CHAT, masters=False),
    ),
    "full-float32": (
        "LLaVA-1.5-7B with 12 of 32 layers, connector and language model, AdamW in float32",
        Training(_7B, "full", 16, 4, 96, **_CHAT, layers=12),
    ),
    "qlora": (
        "LLaVA-1.5-7B, connector and LoRA of rank 128 over nf4, activations computed again",
        Training(_7B, "lora", 16, 4, 96, **_CHAT, nf4=True, checkpointing=True),
    ),
    "align-cached": (
        "LLaVA-1.5-7B, connector only, features cached",
        Training(_7B, "connector", 8, 1, 128, **_CAPTION, cached=True),
    ),
    "naflex-align": (
        "SigLIP 2 so400m NaFlex × Qwen3-0.6B, connector only",
        Training("siglip2-qwen3-0.6b", "connector", 32, 1, 512, **_CAPTION),
    ),
    "naflex-full": (
        "SigLIP 2 so400m NaFlex × Qwen3-0.6B, connector and language model, AdamW in float32",
        Training("siglip2-qwen3-0.6b", "full", 32, 1, 512, **_CHAT),
    ),
    "siglip-align": (
        "SigLIP-B/16 × Qwen2.5-0.5B, connector only",
        Training("siglip-qwen2.5-0.5b", "connector", 32, 1, 512, **_CAPTION),
    ),
    "siglip-full": (
        "SigLIP-B/16 × Qwen2.5-0.5B, connector and language model, AdamW in float32",
        Training("siglip-qwen2.5-0.5b", "full", 32, 1, 512, **_CHAT),
    ),
    "generate-1": ("LLaVA-1.5-7B, one question, 64 tokens", Generation(_7B, 1, 64)),
    "generate-8": ("LLaVA-1.5-7B, eight questions about eight pictures, 64 tokens", Generation(_7B, 8, 64)),
    "ten-questions": ("LLaVA-1.5-7B, ten questions about one picture, 64 tokens", Generation(_7B, 10, 64, True)),
}
MATMUL = [(8192, 8192, 8192), (16384, 4096, 4096), (8192, 4096, 11008), (4096, 4096, 4096)]


def quick(work: Training | Generation) -> Training | Generation:
    """The same row in seconds on a CPU."""
    encoder = work.shape.partition("-")[0]
    shape = f"tiny-{encoder}" if encoder.startswith("siglip") else "tiny"
    if isinstance(work, Generation):
        return replace(work, shape="tiny-siglip", tokens=6)  # whose words depend on what it reads: untied
    chat = {"question": (4, 20), "answer": (4, 40), "pack": 96} if work.pack else {"question": (1, 2), "answer": (4, 9)}
    layers = 1 if work.layers else None
    return replace(work, shape=shape, batch=4, accumulate=min(2, work.accumulate), count=8, layers=layers, **chat)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help=f"rows, with commas between: {', '.join(ROWS)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one process")
    parser.add_argument("--rounds", type=int, default=5, help="at most, as far as the minutes go")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one round")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again, on both sides")
    parser.add_argument("--profile", action="store_true", help="of each training row one step of ours, by kernels")
    parser.add_argument("--compile", action="store_true", help="torch.compile, on both sides")
    parser.add_argument("--out", type=Path, help="where the markdown table goes, beside the terminal")
    parser.add_argument("--results", type=Path, default=Path("runs/gpu.json"))
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    rows = args.only.split(",") if args.only else list(ROWS)
    if unknown := sorted(set(rows) - set(ROWS)):
        parser.error(f"unknown rows {', '.join(unknown)}; known: {', '.join(ROWS)}")
    if args.side:
        finish(_one(args))
        return 0
    results = measure(rows, args)
    text = table(results)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    return 1 if any("error" in t for t in results["trials"]) else 0


def _one(args: argparse.Namespace) -> Trial:
    if args.row == "matmul":
        from shapes import matmul_rate

        sizes = [(256, 256, 256)] if args.quick else MATMUL
        rate = matmul_rate(sizes, device=args.device, seconds=0.02 if args.quick else 1.0)
        return Trial(1.0, rate, notes={"machine": machine()})
    work = ROWS[args.row][1]
    work = quick(work) if args.quick else work
    if isinstance(work, Training):
        work = replace(work, checkpointing=args.checkpointing or work.checkpointing)
    return trial(args.side, work, args.device, compiled=args.compile, profile=args.profile)


def measure(rows: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Run what the minutes allow, the JSON file written after each process."""
    ends = time.monotonic() + 60 * args.minutes
    asked = ["--device", args.device]
    asked += [f"--{flag}" for flag in ("quick", "checkpointing", "compile") if getattr(args, flag)]
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python benchmarks/gpu.py", *sys.argv[1:]]),
        "rows": rows,
        "tiny": args.quick,
        "trials": [],
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    takes: dict[str, float] = {}
    failed: set[str] = set()
    work = [(0, "matmul", "opticnerve")]
    for number in range(1 if args.quick else args.rounds):
        turns = SIDES if number % 2 == 0 else SIDES[::-1]
        work += [(number, row, side) for row in rows for side in turns if side in ROWS[row][1].sides]
    for number, row, side in work:
        left = ends - time.monotonic()
        if row + side in failed or left < takes.get(row + side, 10.0):
            continue
        print(f"round {number + 1}, {row}, {side}: ", end="", file=sys.stderr, flush=True)
        started = time.monotonic()
        entry: dict[str, Any] = {"row": row, "side": side, "round": number}
        try:
            once = ["--profile"] if args.profile and number == 0 else []
            done = run_side(__file__, side, ["--row", row, *asked, *once], timeout=min(args.limit, left))
            if row == "matmul":
                results |= {"rate": done.rate, **done.notes}
            else:
                results["trials"].append({**entry, "trial": asdict(done)})
            print(f"{done.rate:.4g} a second, {done.peak_bytes / 2**30:.1f} GiB", file=sys.stderr, flush=True)
        except (RuntimeError, subprocess.TimeoutExpired) as e:  # the other rows are worth their time
            if isinstance(e, subprocess.TimeoutExpired) and left < args.limit:
                print("the minutes are over", file=sys.stderr, flush=True)
                break
            failed.add(row + side)
            results["trials"].append({**entry, "error": reason(e)})
            print(reason(e), file=sys.stderr, flush=True)
        takes[row + side] = 1.1 * (time.monotonic() - started)
        args.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def reason(error: Exception) -> str:
    """Why a process gave no trial, in a line: its last one that names an error."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"not done after {error.timeout:.0f} s"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1])[:300]


def table(results: dict[str, Any]) -> str:
    """Markdown: for each row both sides' median rate, their ratio, MFU where training is measured, and peak memory."""
    rate = results.get("rate")
    tiny = "**Tiny shapes (--quick): that it runs, no more.** " if results["tiny"] else ""
    lines = [
        f"{tiny}{results['date']}, {results.get('machine', 'unknown machine')}; `{results['command']}`",
        f"Bare bf16 matrix products: {rate / 1e12:.4g} TFLOP/s." if rate else "The matmul rate was not measured.",
        "",
        "| row | side | rate | × transformers | MFU | peak memory | × transformers | same loss or tokens | rounds |",
        "|---|---|---:|---:|---:|---:|---:|---|---:|",
    ]
    for row in results["rows"]:
        title, work = ROWS[row]
        unit = "samples/s" if isinstance(work, Training) else "tokens/s"
        found = {side: _of(results, row, side) for side in SIDES}
        for side in work.sides:
            if mine := found[side]:
                cells = _cells(mine, found[SIDES[0]], unit, rate, base_side=side == SIDES[0])
            else:
                cells = [_error(results, row, side), *[""] * 6]
            lines.append(f"| {title} | {side} | {' | '.join(cells)} |")
    for row in results["rows"]:
        for one in _of(results, row, "opticnerve").values():
            if seen := one.notes.get("profile"):
                lines += ["", *_profiled(row, seen)]
    return "\n".join(lines)


def _profiled(row: str, seen: dict[str, Any]) -> list[str]:
    """A step of a row by its kernels."""
    return [
        f"A step of {row}: {1e3 * seen['seconds']:.1f} ms, {seen['busy'] / seen['seconds']:.0%} of it in "
        f"{seen['kernels']:,} kernels; {seen['waits']} waits of the host.",
        "", "| kernel | ms | times |", "|---|---:|---:|",
        *(f"| `{name.replace('|', ' ')}` | {ms:.2f} | {count} |" for name, ms, count in seen["longest"]),
    ]  # fmt: skip


def _cells(
    mine: dict[int, Trial], base: dict[int, Trial], unit: str, rate: float | None, *, base_side: bool
) -> list[str]:
    speed = statistics.median(t.rate for t in mine.values())
    peak = statistics.median(t.peak_bytes for t in mine.values())
    flops = [t.notes["flops"] / t.seconds for t in mine.values() if "flops" in t.notes]
    mfu = f"{statistics.median(flops) / rate:.1%}" if flops and rate else ""
    both = [n for n in mine if n in base]
    faster = smaller = same = ""
    if both and not base_side:
        ratios = [mine[n].rate / base[n].rate for n in both]
        faster = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        smaller = f"{peak / statistics.median(t.peak_bytes for t in base.values()):.2f}"
        same = agreement([mine[n].check for n in both], [base[n].check for n in both])
    return [f"{speed:.4g} {unit}", faster, mfu, f"{peak / 2**30:.1f} GiB", smaller, same, str(len(mine))]


def _of(results: dict[str, Any], row: str, side: str) -> dict[int, Trial]:
    """A side's trials by round."""
    return {
        t["round"]: Trial(**t["trial"])
        for t in results["trials"]
        if (t["row"], t["side"]) == (row, side) and "trial" in t
    }


def _error(results: dict[str, Any], row: str, side: str) -> str:
    errors = [t["error"] for t in results["trials"] if (t["row"], t["side"]) == (row, side) and "error" in t]
    return errors[0].replace("|", "\\|") if errors else "no time was left"


if __name__ == "__main__":
    sys.exit(main())
