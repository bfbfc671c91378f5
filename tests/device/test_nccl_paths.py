"""Two processes that each think they have a CUDA device: NCCL is asked for, and is only given tensors that lie there.

Gloo carries them, for there is no card. What NCCL itself refuses beyond the CPU's tensors is not known here.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

import tiny
from pretend_device import CUDA, Watch, place, pretended

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
import worlds

pytestmark = pytest.mark.slow
EXCHANGES = ("all_reduce", "broadcast", "all_gather", "all_to_all_single")
STEPS = 3
# Each: the stage, and the exchange that is meant. (Shared sequences fill gradients in C++, out of the watch's sight.)
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "a language model": (
        {"train": {"connector": 1e-2, "language": 1e-3}, "validate": {"split": 0.3, "every": 2}}, "all_reduce"
    ),
    "two towers": (
        {"objective": {"type": "contrastive", "duplicates": "mask"},
         "train": {"image.projection": 1e-2, "text.projection": 1e-2}}, "all_gather"
    ),
}  # fmt: skip


class WithBuckets(Watch):
    """DDP's reducer makes its buckets where the gradients are, out of Python's sight, and fills them by products."""

    def __torch_dispatch__(self, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mul.out:
            self.device.put(kwargs["out"], CUDA)
        return super().__torch_dispatch__(func, types_, args, kwargs)


def train(recipe: dict[str, Any], out: Path) -> None:
    """In one process: with a device, `worlds.train`; `exchanged-RANK.json` says what went between the processes."""
    os.environ.pop("ACCELERATE_USE_CPU")
    begin, backends, seen = dist.init_process_group, list[str](), Counter[str]()

    def begin_with_gloo(backend: str, **options: Any) -> None:
        backends.append(backend)
        begin("gloo", **options)

    def checked(name: str, exchange: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            seen[name] += 1
            tensors = [t for t in tree_leaves((args, options)) if isinstance(t, torch.Tensor)]
            assert {place(t) for t in tensors} == {CUDA}, f"NCCL has no {name} for tensors of the CPU"
            return exchange(*args, **options)

        return call

    replaced: dict[str, Any] = {name: checked(name, getattr(dist, name)) for name in EXCHANGES}
    replaced["init_process_group"] = begin_with_gloo
    with pretended(WithBuckets), patch.multiple(dist, **replaced):
        worlds.train(recipe, out)
    assert backends == ["nccl"]
    (out / f"exchanged-{os.environ['RANK']}.json").write_text(json.dumps(seen))


@pytest.mark.parametrize("case", CASES)
def test_what_goes_between_the_processes_lies_on_the_device(
    case: str, tmp_path: Path, bert_folder: str, language_folder: Callable[..., str], vision_folder: Callable[..., str]
) -> None:
    stage, exchange = CASES[case]
    tiny.save_captions(tmp_path)
    model: dict[str, Any] = {"image": {"encoder": {"type": "hf_vision", "name": vision_folder()}}}
    if case == "two towers":
        model |= {"text": {"encoder": {"name": bert_folder}}, "projection_dim": 8}
    else:
        model["language"] = {"name": language_folder("llama")}
    data = [{"path": str(tmp_path / "captions.jsonl")}]
    recipe = {
        "precision": "fp32", "forgetting": False, "model": model,
        "stages": [{"name": "learn", "data": data, "steps": STEPS, "batch_size": 4, **stage}],
    }  # fmt: skip
    curves = []
    for name, work in (("there", train), ("here", worlds.train)):
        ended = worlds.world(2, work, recipe, tmp_path / name, folder=tmp_path)
        assert [e.code for e in ended] == [0, 0], ended[0].printed + ended[1].printed
        curves.append([line["loss"] for line in worlds.curve(tmp_path / name) if "loss" in line])
    assert len(curves[0]) == STEPS
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"there/exchanged-{rank}.json").read_text())[exchange] > 0
