"""Batches made ahead, in processes of their own, and how long whoever takes them had to wait.

Worker processes decode and prepare while the model computes. Torch gives each of them one thread, so that N workers
use N cores; each holds two batches ready. What a worker sends lies in shared memory: pixels travel as bytes, a quarter
of their size as floats, and are normalised on the device that they are for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from opticnerve.data.media.transform import Bytes
from opticnerve.types import DataError, OpticNerveError

AHEAD = 2
"""Batches that each worker holds ready: one to be taken at once, one for when the next takes longer."""


@dataclass
class Sent:
    """What comes from a worker: a batch, or the error that came up while it was made; the bad samples that others
    stand in for; and, where rows are streamed, the places in the stream that a resumed run starts from."""

    batch: Any = None
    error: OpticNerveError | None = None
    left_out: list[DataError] = field(default_factory=list)
    state: Any = None

    def pin_memory(self) -> Sent:
        """torch's pinning thread asks for this: the batch's tensors in page-locked memory."""
        return replace(self, batch=_each(self.batch, Tensor.pin_memory, Bytes.pin_memory))


class FromStep(Dataset[Sent]):
    """The items of `sampler` from number `first` on.

    Errors for users go as values: torch would rebuild them from a text of its own, the sample's name lost in a
    traceback.
    """

    def __init__(self, sampler: Any, first: int) -> None:
        self.sampler, self.first = sampler, first

    def __len__(self) -> int:
        return max(0, len(self.sampler) - self.first)

    def __getitem__(self, index: int) -> Sent:
        take = getattr(self.sampler, "take_left_out", list)
        state = getattr(self.sampler, "state_delta", lambda: None)
        try:
            return Sent(self.sampler[self.first + index], left_out=take(), state=state())
        except OpticNerveError as e:
            return Sent(error=e, left_out=take(), state=state())


def loader(sampler: Any, first: int, workers: int, device: torch.device | str) -> DataLoader[Sent]:
    """Micro-batch `first` and all that follow it, in order; go through it with `TimedBatches`.

    Args:
        sampler: a sequence of batches, such as `train.sampler.StageSampler`.
        workers: processes beside this one; 0 makes each batch here, when it is asked for.
        device: where the batches will go. For CUDA they are put in page-locked memory, from which copies run beside
            the computation.
    """
    return DataLoader(
        FromStep(sampler, first), batch_size=None, num_workers=workers, worker_init_fn=_send_bytes,
        prefetch_factor=AHEAD if workers else None, pin_memory=torch.device(device).type == "cuda",
        generator=torch.Generator(),  # or the loader would draw its seed from the training's random numbers
    )  # fmt: skip


class TimedBatches(Iterator[Any]):
    """The batches of a `loader`, their pixels normalised on `device`.

    `seconds`: how long the caller has waited for them in all, the first one and its workers' start included. Over the
    same stretch of time, it is the share of it that the accelerator had nothing to do for want of data.

    Raises:
        OpticNerveError: what came up in a worker, as it was raised there.
    """

    def __init__(self, batches: DataLoader[Sent], device: torch.device | str | None = None) -> None:
        self._loader, self._device = batches, device
        self._batches: Iterator[Sent] | None = None
        self.seconds = 0.0

    def __next__(self) -> Any:
        asked = time.perf_counter()
        if self._batches is None:
            self._batches = iter(self._loader)
        sent = next(self._batches)
        self.seconds += time.perf_counter() - asked
        if sent.left_out:  # the samples of this process, not a worker's copy, keep count
            self._loader.dataset.sampler.leave_out(sent.left_out)  # type: ignore[attr-defined]
        if sent.state is not None:
            self._loader.dataset.sampler.load_state_delta(sent.state)  # type: ignore[attr-defined]
        if sent.error is not None:
            raise sent.error
        return _each(sent.batch, lambda t: t, lambda b: b.normalised(self._device))


def _send_bytes(worker: int) -> None:
    """A collator that can leave pixels as bytes has an attribute `compact`."""
    info = get_worker_info()
    assert info is not None
    sampler = info.dataset.sampler  # type: ignore[attr-defined]
    if hasattr(getattr(sampler, "collate", None), "compact"):
        sampler.collate.compact = True


def _each(value: object, tensor: Callable[[Tensor], Tensor], pixels: Callable[[Bytes], Any]) -> Any:
    """A batch with each of its tensors, and each of its `Bytes`, put through a function."""
    if isinstance(value, Bytes):
        return pixels(value)
    if isinstance(value, Tensor):
        return tensor(value)
    if isinstance(value, dict):
        return {k: _each(v, tensor, pixels) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_each(v, tensor, pixels) for v in value)
    if is_dataclass(value) and not isinstance(value, type):  # a batch, or `Features`
        return replace(value, **{f.name: _each(getattr(value, f.name), tensor, pixels) for f in fields(value)})
    return value
