"""The peak of a training step on a pretended CUDA device is the one that `plan` foresaw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from test_device_training import LAST, _its_own_accelerator, data, losses, make  # noqa: F401

from opticnerve.common.progress import Progress
from opticnerve.ops import enabled
from opticnerve.plan import plan
from opticnerve.recipe import Recipe
from pretend_device import pretended

FORESEEN = (
    "padded", "packed", "frozen", "LoRA", "DPO", "Q-Former pretraining", "contrastive",
    "contrastive, cached embeddings", "classification",
)  # fmt: skip


@pytest.mark.skipif(not enabled(), reason="what is foreseen has the layers that OPTICNERVE_PLAIN switches off")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", FORESEEN)
def test_the_peak_is_foreseen(
    case: str, precision: str, make: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    recipe, peaks = make(case, precision), {}
    with pretended() as device:

        def seen(self: Progress, line: dict[str, Any]) -> None:
            peaks[line["step"]] = device.peak
            device.reset_peak()

        monkeypatch.setattr(Progress, "update", seen)
        losses(recipe, tmp_path / "there")
    monkeypatch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)
    [planned] = plan.make(recipe).stages
    assert not planned.untraced
    memory = planned.memory
    assert memory.total - memory.process == pytest.approx(peaks[LAST], rel=0.1)
