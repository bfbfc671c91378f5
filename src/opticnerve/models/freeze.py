"""What trains and what does not: every part that a stage does not name is frozen, in `eval()`, and stays as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from opticnerve.encoders.base import Encoder
from opticnerve.language.quantization import QuantizedLinear
from opticnerve.models.family import FamilyModel
from opticnerve.types import OpticNerveError


@dataclass(frozen=True)
class FreezeRow:
    """One line of the freeze table."""

    part: str
    parameters: int
    trained: bool
    learning_rate: float | None
    dtype: str


@dataclass(frozen=True)
class Frozen:
    """The outcome of freezing: the table, and the trained parameters of each part (full name → parameter)."""

    rows: list[FreezeRow]
    groups: dict[str, dict[str, nn.Parameter]]
    rates: dict[str, float]

    @property
    def trained(self) -> int:
        return sum(r.parameters for r in self.rows if r.trained)

    @property
    def total(self) -> int:
        return sum(r.parameters for r in self.rows)

    def beside(self, own: dict[str, nn.Parameter], rate: float) -> Frozen:
        """With what an objective has of its own, which trains beside the model and is no part of it."""
        if not own:
            return self
        row = FreezeRow("objective", sum(p.numel() for p in own.values()), True, rate, "float32")
        named = {f"objective.{n}": p for n, p in own.items()}
        return Frozen([*self.rows, row], {**self.groups, "objective": named}, {**self.rates, "objective": rate})

    def to_dict(self) -> dict[str, Any]:
        return {"rows": [asdict(r) for r in self.rows], "trained": self.trained, "total": self.total}

    def table(self) -> Any:
        """A rich table for the terminal."""
        from rich.table import Table

        table = Table(title=f"{self.trained:,} of {self.total:,} parameters train ({self.trained / self.total:.2%})")
        for column in ("part", "parameters", "", "learning rate", "dtype"):
            table.add_column(column, justify="right" if column in ("parameters", "learning rate") else "left")
        for r in self.rows:
            rate = f"{r.learning_rate:g}" if r.learning_rate is not None else ""
            table.add_row(
                r.part, f"{r.parameters:,}", "trained" if r.trained else "frozen", rate, r.dtype,
                style="bold" if r.trained else "dim",
            )  # fmt: skip
        return table


def freeze(model: FamilyModel, train: Mapping[str, float]) -> Frozen:
    """Open the named parts at their learning rates, freeze all others, set train and eval modes.

    A module is in `train()` only if it holds a trained parameter itself or is one of the trained part's modules
    (dropout included); frozen batch norms stay in `eval()`, so that their statistics do not move, and so do all of an
    encoder with `fit: native`.
    """
    groups: dict[str, dict[str, nn.Parameter]] = {}
    rates: dict[str, float] = {}
    taken: set[int] = set()
    # Of two parts that overlap (`language.last(1)`, `language.last(3)`), the one named first keeps what both hold.
    for part, rate in train.items():
        name = model.full_name(part)
        groups[name] = {n: p for n, p in model.part_parameters(part).items() if id(p) not in taken}
        if not groups[name]:
            raise OpticNerveError(
                f"train: all of {part} belongs to parts named before it; name the narrower part first, or leave it out",
                kind="conflict",
            )
        if quantized := [n for n, p in groups[name].items() if not p.is_floating_point()]:
            raise OpticNerveError(f"train: {part} is quantised ({quantized[0]}), and does not train", kind="conflict")
        rates[name] = rate
        taken |= {id(p) for p in groups[name].values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in taken)
    model.eval()
    for module in model.modules():
        own = list(module.parameters())
        if own and all(p.requires_grad for p in own):
            module.train()
        # LoRA's dropout lives beside a frozen weight.
        lora = [child for name, child in module.named_children() if name.startswith("lora_")]
        if any(p.requires_grad for child in lora for p in child.parameters()):
            for child in lora:
                child.train()
    for module in model.modules():
        if isinstance(module, Encoder):
            module.hold_statistics()
    return Frozen(_rows(model, groups, rates), groups, rates)


def _rows(model: FamilyModel, groups: dict[str, dict[str, nn.Parameter]], rates: dict[str, float]) -> list[FreezeRow]:
    """The table: each trained part, and what is left frozen of each whole (encoder, connector, language model, …)."""
    rows, packed = [], {id(m.weight): m for m in model.modules() if isinstance(m, QuantizedLinear)}

    def row(label: str, these: Iterable[nn.Parameter], rate: float | None) -> FreezeRow:
        known = [(p, packed.get(id(p))) for p in these]
        count = sum(p.numel() if layer is None else layer.in_features * layer.out_features for p, layer in known)
        dtypes = {str(p.dtype).removeprefix("torch.") if layer is None else layer.kind for p, layer in known}
        return FreezeRow(label, count, rate is not None, rate, "/".join(sorted(dtypes)))

    trained = {id(p) for g in groups.values() for p in g.values()}
    for whole, prefix in model.whole_parts():
        mine = {n: p for n, p in model.named_parameters() if n.startswith(prefix)}
        rest = [p for p in mine.values() if id(p) not in trained]
        for name, group in groups.items():
            if group and next(iter(group)).startswith(prefix):
                rows.append(row(name, group.values(), rates[name]))
        if rest:
            label = (
                whole if len(rest) == len(mine) or not any(n.startswith(whole) for n in groups) else f"{whole} (rest)"
            )
            rows.append(row(label, rest, None))
    return rows


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inference without a trace: eval mode and no gradients inside, every module's own mode put back afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        # Not inference_mode: tables that a model caches meanwhile (rotary angles) could not be trained through later.
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def decay_groups(parts: list[str], tensors: list[list[Any]], weight_decay: float) -> list[dict[str, Any]]:
    """Groups for AdamW, of each part those with decay before those without: no decay on biases and norms, as GPT-3 and
    most after it."""
    groups: list[dict[str, Any]] = []
    for part, mine in zip(parts, tensors, strict=True):
        for decay, these in ((weight_decay, [t for t in mine if t.ndim > 1]), (0.0, [t for t in mine if t.ndim <= 1])):
            if these:
                groups.append({"params": these, "part": part, "weight_decay": decay})
    return groups
