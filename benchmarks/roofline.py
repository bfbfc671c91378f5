"""What a micro-batch of gpu.py's rows would take on an H200, kernel by kernel: a model, not a measurement.

    python benchmarks/roofline.py                            # the rows of docs/performance.md, both sides
    python benchmarks/roofline.py --only lora --side opticnerve --lines

The code of a row runs on the pretended device (`tests/pretend_device.py`) at the row's real widths and lengths, with
one and with two layers of each model, from which the rest follows. Large tensors have shapes and no numbers. Each
kernel takes the longer of what it moves at the card's bandwidth and what it computes at its rate (Williams et al. 2009,
Roofline), and no less than a smallest time; a step is no shorter than the launching of its kernels. Gaps, caches and
kernels worse than the rates below are not known here. Beside it the peak of live bytes, without the allocator's own.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import gpu
import gpu_sides
import shapes
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from transformers.initialization import no_init_weights

from pretend_device import CPU, CUDA, NO_KERNELS, Watch, pretended, site

ROWS = ("align", "lora", "siglip-align", "siglip-full")
CARD = 790e12
"""Operations a second of bare bf16 products on an H200; products within a step reach nine tenths of it."""
BANDWIDTH = 4.3e12
PRODUCTS, ATTENTION, ATTENTION_BACK = 0.89 * CARD, 400e12, 320e12
GATHERED = 0.6
"""Of the bandwidth, where rows are picked."""
SMALLEST, LAUNCH, LAUNCH_BACK = 2.5e-6, 8e-6, 5e-6
"""Seconds: of the smallest kernel, and of the host for one in the forward and in the backward pass."""
WANTED = {"align": 0.6, "full": 0.6}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addmm_", "baddbmm_", "convolution", "linear"}
_PICKS = {"index_select", "index", "embedding", "gather", "index_copy", "masked_scatter"}
# What comes out of these is asked for, or says how large something is: they are computed.
_REAL = {"nonzero", "index", "masked_select", "masked_scatter", "equal", "_local_scalar_dense"}
_LARGE = 50_000
"""Numbers of a tensor from which on it has none."""


@dataclass(frozen=True)
class Kernel:
    name: str
    where: str
    flops: float
    moved: float
    backward: bool

    @property
    def kind(self) -> str:
        if self.name in _PRODUCTS:
            return "products"
        if "scaled_dot" in self.name or "attention" in self.name or "varlen" in self.name:
            return "attention"
        if "adamw" in self.name or self.name.startswith("_foreach") or "optim.py" in self.where:
            return "optimizer"
        if "varlen.py" in self.where or "packed_attention.py" in self.where:
            return "laying segments"
        if "head.py" in self.where or "nll_loss" in self.name or "log_softmax" in self.name:
            return "head and loss"
        return "norms, MLPs, LoRA" if "fused_layers.py" in self.where else "other elementwise"

    @property
    def seconds(self) -> float:
        seconds = self.moved / (BANDWIDTH * (GATHERED if self.name in _PICKS else 1.0))
        if self.kind == "attention":
            seconds = max(seconds, self.flops / (ATTENTION_BACK if "backward" in self.name else ATTENTION))
        return max(seconds, self.flops / PRODUCTS if self.kind == "products" else 0.0, SMALLEST)


class Record(Watch):
    """Takes down every kernel while `on`; large tensors are not computed."""

    kernels: list[Kernel]
    on = False

    def compute(self, func: Any, name: str, args: Any, kwargs: Any, *, there: bool) -> Any:
        given = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        counts = not func.is_view and name not in NO_KERNELS
        large = any(t.is_floating_point() and t.numel() > _LARGE for t in given)
        if there and counts and large and name not in _REAL:
            out = _imagined(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        if there and counts and Record.on:
            made = [o for o in tree_leaves(out) if isinstance(o, Tensor)]
            back = torch._C._current_autograd_node() is not None  # type: ignore[attr-defined]
            Record.kernels.append(
                Kernel(name, site(), _flops(name, args, kwargs, made), _moved(name, args, given, made), back)
            )
        return out


def _imagined(func: Any, args: Any, kwargs: Any) -> Any:
    """What comes out, its numbers left open."""
    if func._schema.is_mutable:
        written = [
            a for s, a in zip(func._schema.arguments, args, strict=False) if s.alias_info and s.alias_info.is_write
        ]
        return written[0] if func._schema.returns else None

    def without(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return torch.device("meta") if isinstance(value, torch.device) else value

    def here(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CPU)
        return value

    with torch.utils._python_dispatch._disable_current_modes():
        return tree_map(here, func(*tree_map(without, args), **tree_map(without, kwargs)))


def _moved(name: str, args: Any, given: Sequence[Tensor], made: Sequence[Tensor]) -> float:
    def size(tensor: Tensor) -> float:
        return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())

    if name in ("index_select", "embedding", "gather", "index"):
        return 2 * sum(map(size, made))
    if name == "copy_":
        return size(args[0]) + min(size(args[1]), args[0].numel() * args[1].element_size())
    if name in ("fill_", "zero_"):
        return size(args[0])
    written = [] if made and any(made[0] is t for t in given) else made
    return sum(map(size, given)) + sum(map(size, written or made[:1]))


def _flops(name: str, args: Any, kwargs: Any, made: Sequence[Tensor]) -> float:
    if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"):
        left, right = args[:2] if name in ("mm", "bmm") else args[1:3]
        return 2.0 * left.numel() * right.shape[-1]
    if name == "convolution":
        return 2.0 * made[0].numel() * args[1][0].numel()
    if "varlen" in name:
        query, _, _, starts_S = args[1:5] if (back := "backward" in name) else args[:4]
        pairs = starts_S.diff().double().square().sum().item()
        return 4.0 * float(pairs) * query.shape[1] * query.shape[2] * 0.5 * (2.5 if back else 1)
    if "scaled_dot" in name:
        back = "backward" in name
        query, key = args[1:3] if back else args[:2]
        causal = any(a is True for a in args) or kwargs.get("is_causal") is True
        rows, heads, length, width = query.shape
        return 4.0 * rows * heads * length * key.shape[2] * width * (0.5 if causal else 1) * (2.5 if back else 1)
    return 0.0


# -- rows -------------------------------------------------------------------------------------------------------------

Totals = dict[str, tuple[float, float, float]]
"""By kind of kernel: seconds on the card, kernels, seconds of the host."""


def counted(row: str, side: str, layers: int, seeing: int) -> tuple[Totals, float, list[Kernel], list[Any]]:
    """One micro-batch with so many layers: totals, peak of live bytes, its kernels, its samples."""
    work = gpu.ROWS[row][1]
    assert isinstance(work, gpu_sides.Training), f"{row} is no training"
    shape, size = work.shaped(), work.batch // work.accumulate
    small = replace(
        shape, language_part=replace(shape.language_part, layers=layers),
        vision_encoder=replace(shape.vision_encoder, layers=seeing),
    )  # fmt: skip
    shapes.SHAPES[name := f"{row} of {layers} and {seeing}"] = small
    work = replace(work, shape=name, batch=size, accumulate=1, count=size, layers=None)
    before, Record.kernels, Record.on = gpu_sides._start_counting, [], False
    with no_init_weights(), pretended(Record) as device:  # draws would wait for numbers that are not there

        def start(_: str) -> None:
            device.reset_peak()
            Record.kernels.clear()
            Record.on = True

        gpu_sides._start_counting = start
        try:
            gpu_sides.trial(side, work, CUDA)
        finally:
            gpu_sides._start_counting, Record.on = before, False
    return _totals(Record.kernels), device.peak, list(Record.kernels), work.samples()[1]


def _totals(kernels: Sequence[Kernel]) -> Totals:
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for kernel in kernels:
        mine = found[kernel.kind]
        mine[0] += kernel.seconds
        mine[1] += 1
        mine[2] += LAUNCH_BACK if kernel.backward else LAUNCH
    return {kind: (a, b, c) for kind, (a, b, c) in found.items()}


@dataclass(frozen=True)
class Prediction:
    row: str
    side: str
    totals: Totals
    peak: float
    needs: float
    tokens: int
    samples: int
    accumulate: int
    kernels: list[Kernel]

    @property
    def step(self) -> float:
        """Seconds of an optimizer step: of the card, or of the host if that takes longer."""
        optimizer = self.totals.get("optimizer", (0.0, 0.0, 0.0))
        micro = [sum(t[i] for k, t in self.totals.items() if k != "optimizer") for i in (0, 2)]
        return max(self.accumulate * m + o for m, o in zip(micro, (optimizer[0], optimizer[2]), strict=True))

    @property
    def mfu(self) -> float:
        return self.accumulate * self.needs / CARD / self.step


def predict(row: str, side: str) -> Prediction:
    """The row's micro-batch at all its layers."""
    work = gpu.ROWS[row][1]
    assert isinstance(work, gpu_sides.Training)
    shape, size = work.shaped(), work.batch // work.accumulate
    eye = shape.vision_encoder
    used = eye.layers + 1 + eye.layer if eye.layer < 0 else eye.layer
    unused = eye.layers - used
    one, two, seeing = (counted(row, side, a, b + unused) for a, b in ((1, 1), (2, 1), (1, 2)))
    depth = shape.language_part.layers

    def whole(a: float, b: float, c: float) -> float:
        return max(0.0, a + (depth - 1) * (b - a) + (used - 1) * (c - a))

    zeros = (0.0, 0.0, 0.0)
    kinds = sorted(one[0] | two[0] | seeing[0])
    parts = {k: [t[0].get(k, zeros) for t in (one, two, seeing)] for k in kinds}
    totals = {
        k: (whole(*(t[0] for t in p)), whole(*(t[1] for t in p)), whole(*(t[2] for t in p))) for k, p in parts.items()
    }
    needs = shapes.flops(
        shape, lengths=[len(s.input_ids) for s in one[3]], supervised=sum(s.supervised for s in one[3]),
        images=len(one[3]), trains=work.trains,
    )  # fmt: skip
    tokens = sum(len(s.input_ids) for s in one[3])
    peak = whole(one[1], two[1], seeing[1])
    return Prediction(row, side, totals, peak, needs, tokens, size, work.accumulate, one[2])


def table(found: Sequence[Prediction]) -> str:
    """Markdown: a line for each row and side."""
    kinds = [
        "products",
        "attention",
        "norms, MLPs, LoRA",
        "other elementwise",
        "laying segments",
        "head and loss",
        "optimizer",
    ]
    lines = [
        f"| row | side | a micro-batch, ms on the card | {' | '.join(kinds)} | kernels | host, ms | peak | samples/s | "
        "MFU at most | wanted | measured |",
        "|---|---|" + "---:|" * (len(kinds) + 8),
    ]
    for p in found:
        micro = {k: t for k, t in p.totals.items() if k != "optimizer"}
        cells = [f"{1e3 * p.totals.get(k, (0.0, 0, 0))[0]:.1f}" for k in kinds]
        lines.append(
            f"| {p.row} | {p.side} | {1e3 * sum(t[0] for t in micro.values()):.0f} | {' | '.join(cells)} | "
            f"{sum(t[1] for t in p.totals.values()):,.0f} | {1e3 * sum(t[2] for t in micro.values()):.0f} | "
            f"{p.peak / 2**30:.0f} GiB | {p.accumulate * p.samples / p.step:.1f} | {p.mfu:.0%} | "
            f"{f'{WANTED[p.row]:.0%}' if p.row in WANTED else ''} | not yet run |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(ROWS), help="rows of gpu.py, with commas between")
    parser.add_argument("--side", choices=gpu.SIDES, help="one of the two")
    parser.add_argument("--lines", action="store_true", help="what takes longest, by the line that asks for it")
    args = parser.parse_args(arguments)
    found = []
    for row in args.only.split(","):
        for side in [args.side] if args.side else gpu.SIDES:
            found.append(made := predict(row, side))
            print(f"{row}, {side}: {1e3 * made.step:.0f} ms a step", file=sys.stderr, flush=True)
            if args.lines:
                took: Counter[str] = Counter()
                for kernel in made.kernels:
                    took[f"{kernel.name} {'(backward) ' if kernel.backward else ''}{kernel.where}"] += kernel.seconds
                print("\n".join(f"  {1e3 * s:8.3f} ms of one layer each  {k}" for k, s in took.most_common(20)))
    print(table(found))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
