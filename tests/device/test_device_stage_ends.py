"""What stands in memory where a stage begins and ends: the model once, and nothing as large beside it."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_device_training import _its_own_accelerator, data, losses, make  # noqa: F401
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opticnerve.common.tensors import save_tensors
from opticnerve.models.freeze import Frozen
from opticnerve.models.vlm.build import Dock
from opticnerve.recipe import Recipe
from opticnerve.train import checkpoint
from opticnerve.train.optim import MasterAdamW
from pretend_device import pretended


class Allocated(TorchDispatchMode):
    """Counts the bytes of storages that come into being within it: `live` now, `peak` at most."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known = weakref.WeakSet(t.untyped_storage() for t in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for made in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)):
            if made not in given and made not in self.known:
                self.known.add(made)
                self.live += (size := made.nbytes())
                self.peak = max(self.peak, self.live)
                weakref.finalize(made, self._freed, size).atexit = False
        return out

    def _freed(self, size: int) -> None:
        self.live -= size


def test_tensors_are_written_one_by_one(tmp_path: Path) -> None:
    shapes = {"a": (64, 32), "b": (), "c": (7,), "d": (0, 3)}
    tensors = {n: torch.randn(shape).to(torch.bfloat16 if n == "c" else torch.float32) for n, shape in shapes.items()}
    tensors |= {"turned": torch.randn(32, 64).T, "numbers": torch.arange(5), "flags": torch.tensor([True, False])}
    with pretended():
        there = {n: t.to("cuda") for n, t in tensors.items()}
        with Allocated(*there.values()) as allocated:
            save_tensors(there, tmp_path / "there")
        largest = max(t.nbytes for t in tensors.values())
        assert largest <= allocated.peak <= 2 * largest  # one that is turned is laid out anew
    found = load_file(tmp_path / "there")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in tensors.items())


def test_the_file_is_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.randn(3, i) for i in (1, 2, 5)}
    save_tensors(tensors, tmp_path / "ours")
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_at_a_stages_end_the_optimizer_is_gone(
    precision: str, make: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    seen, save = {}, Dock.save
    with pretended() as device:

        def watched(dock: Dock, *args: Any) -> None:
            weights = {t.untyped_storage() for t in (*dock.model.parameters(), *dock.model.buffers())}
            seen["model"], seen["live"] = sum(s.nbytes() for s in weights), device.live
            device.reset_peak()
            save(dock, *args)
            seen["peak"] = device.peak

        monkeypatch.setattr(Dock, "save", watched)
        losses(make("padded", precision), tmp_path)
    assert seen["peak"] <= 1.05 * seen["model"], seen


def test_averages_change_places_with_the_weights() -> None:
    weights = {n: torch.nn.Parameter(torch.randn(32, 32, dtype=d)) for n, d in
               {"a": torch.float32, "b": torch.bfloat16}.items()}  # fmt: skip
    optimizer = MasterAdamW(Frozen([], {"part": weights}, {"part": 0.1}), betas=(0.9, 0.9), weight_decay=0.0, ema=0.5)
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    optimizer.clip(None)
    optimizer.step(1.0)
    own = {n: w.detach().clone() for n, w in weights.items()}
    with Allocated() as allocated, optimizer.averaged():
        assert all(torch.equal(w, optimizer.averages[n].to(w.dtype)) for n, w in weights.items())
        assert not any(torch.equal(w, own[n]) for n, w in weights.items())
        assert allocated.peak < own["a"].nbytes
    assert all(torch.equal(w, own[n]) for n, w in weights.items())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc says what a process holds of its own")
def test_a_checkpoint_is_not_read_into_memory(tmp_path: Path) -> None:
    state = {"masters": {"w": torch.ones(16 << 20)}}
    saved = checkpoint.save(tmp_path, 1, state)
    before = _anonymous()
    found = checkpoint.read(saved)
    assert torch.equal(found["masters"]["w"], state["masters"]["w"])
    assert _anonymous() - before < 32 << 20


def _anonymous() -> int:
    """Bytes of this process that no file stands behind."""
    return sum(m.anonymous for m in psutil.Process().memory_maps(grouped=True))
