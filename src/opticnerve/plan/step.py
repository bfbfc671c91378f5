"""A step of a stage on the meta device: what it needs, by how many layers compute their activations again."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from pydantic import ByteSize, TypeAdapter
from torch import nn

from opticnerve import registry
from opticnerve.common.units import format_bytes
from opticnerve.models.family import Family
from opticnerve.models.vlm.tower import Tower
from opticnerve.plan import cost
from opticnerve.plan.data import StageData
from opticnerve.recipe import Stage
from opticnerve.train.memory import recomputed_layers
from opticnerve.train.setup import make_objective, within_context
from opticnerve.types import OpticNerveError

_MOST_SAMPLES = 1024  # whose pictures are opened to trace an objective with


class Step:
    """Traces a stage's micro-batch, once for each number of layers that it is asked for.

    Next token is traced by shapes alone: rows of a mean length, with as many pictures. Other objectives are traced with
    a step's samples, which their own collators make batches of.

    Args:
        dock: the meta model, opened as the stage opens it, and its processor.
        visual: placeholders of a picture. packed: see `cost.memory`.

    Attributes:
        layers: of the language model. untraced: why nothing can be counted, if so; activations are then 0.
    """

    def __init__(self, stage: Stage, dock: Family, data: StageData, visual: int, packed: dict[int, int]) -> None:
        self.model, self.packed = dock.model, packed
        self.stage = within_context(stage, self.model)
        self.layers = 0 if self.model.language_model is None else recomputed_layers(self.model, wanted=True)
        self.own: dict[str, nn.Parameter] = {}
        self.untraced = ""
        self._known: dict[int, cost.Trace] = {}
        self._trace: Callable[[int], cost.Trace]
        if stage.objective.type == "next_token":
            self._trace = self._by_shapes(data, visual)
            return
        try:
            self._trace = self._by_objective(dock, data)
            self.trace(0)
        except OpticNerveError as e:
            self.untraced = str(e)
            self._trace = lambda layers: cost.Trace(0, 0)

    def trace(self, layers: int) -> cost.Trace:
        """With the activations of so many layers computed again."""
        if layers not in self._known:
            self._known[layers] = self._trace(layers)
        return self._known[layers]

    def memory(self, layers: int, *, process: int = 0) -> cost.Memory:
        """What a step needs so; and, where `layers` is 0, what it would with all of them, too."""
        stage = self.stage
        return cost.memory(
            self.model, self.trace(0), self.trace(layers or self.layers), checkpointing=layers > 0, process=process,
            packed=self.packed, optimizer=stage.optimizer, ema=stage.ema is not None, accumulate=stage.accumulate,
            own=self.own,
        )  # fmt: skip

    def recomputed(self) -> int:
        """Of how many layers the stage computes activations again: as it says, or as few as keep its budget.

        Raises:
            OpticNerveError: they do not fit the model; or the budget is not kept with all of them, or nothing can be
                counted.
        """
        wanted = self.stage.gradient_checkpointing
        if not isinstance(wanted, str):
            return recomputed_layers(self.model, wanted)
        budget, name = _bytes(wanted), f"stage {self.stage.name}: gradient_checkpointing: {wanted}"
        if not self.layers:
            return recomputed_layers(self.model, wanted=True)  # which says that it is for language models
        if self.untraced:
            raise OpticNerveError(
                f"{name}: what a step of {self.stage.objective.type} needs cannot be counted ({self.untraced}); write "
                "a number of layers",
                kind="unsupported",
            )
        least = self.memory(self.layers).total
        if least > budget:
            raise OpticNerveError(
                f"{name}: a step needs {format_bytes(least)} even with all {self.layers} layers computed again; raise "
                "accumulate, or the budget",
                kind="out-of-range",
            )
        few, enough = 0, self.layers  # `enough` layers are, fewer than `few` are not
        while few < enough:
            middle = (few + enough) // 2
            few, enough = (few, middle) if self.memory(middle).total <= budget else (middle + 1, enough)
        return enough

    def _by_shapes(self, data: StageData, visual: int) -> Callable[[int], cost.Trace]:
        rows, length = self.stage.batch_size // self.stage.accumulate, data.length or visual + 64
        # Batches are padded to their longest row.
        longest = max((len(r) for r in data.rows), default=length)
        padded = min(longest, math.ceil(1.25 * length)) if data.rows else length
        media = {m: math.ceil(rows * data.media(m) * _pieces(t)) for m, t in self.model.towers.items()}
        shapes: dict[str, Any] = {
            "rows": rows, "length": padded, "media": media, "supervised": math.ceil(rows * (data.supervised or 32)),
        }  # fmt: skip
        return lambda layers: cost.trace_step(self.model, **shapes, recompute=layers, together=self.stage.accumulate)

    def _by_objective(self, dock: Family, data: StageData) -> Callable[[int], cost.Trace]:
        stage = self.stage
        if dock.processor is None or not data.drawn:
            raise OpticNerveError("there is no sample to trace it with", kind="missing-field")
        if stage.batch_size > _MOST_SAMPLES:
            raise OpticNerveError(
                f"a step takes {stage.batch_size:,} samples, of which plan opens no more than {_MOST_SAMPLES:,}",
                kind="out-of-range",
            )
        collate = registry.objectives.get(stage.objective.type).collator(dock.processor, stage, 0)
        if collate is None:
            raise OpticNerveError("it takes rows of tokens, as next_token alone is traced with", kind="unsupported")
        rows = stage.batch_size // stage.accumulate
        batches = [collate(data.drawn[k : k + rows]) for k in range(0, stage.batch_size, rows)]

        def trace(layers: int) -> cost.Trace:
            make = partial(make_objective, stage, self.model)
            found, self.own = cost.trace_objective(make, batches, self.model, recompute=layers)
            return found

        return trace


def _bytes(budget: str) -> int:
    """Of `40GiB`."""
    return int(TypeAdapter(ByteSize).validate_python(budget))


def _pieces(tower: Tower) -> int:
    """Tiles of a picture in the middle of what the tiling allows; 1 where there are no tiles."""
    if tower.tiling is None:
        return 1
    spec = tower.tiling.spec
    tiles = sorted(spec.num_pieces(*point) for point in spec.pinpoints)
    return int(tiles[len(tiles) // 2])
