"""A CUDA device without CUDA: tensors that say `cuda:0`, computed on the CPU, that refuse to mix with others.

    with pretended() as device:
        model.to("cuda")
        ...
    device.waits, device.kernels, device.peak

A storage that was put there carries a mark. `Tensor.device`, `.to`, the factories and `torch.cuda` are replaced, so that
code takes its CUDA paths; a `TorchDispatchMode` sees every operation, autograd's too, hands marks on, raises where CUDA
would (tensors of two devices), and counts kernels, what makes the host wait, and the bytes that live. Numbers are the
CPU's. It is a guide: what CUDA's own kernels refuse is not known here, nor how long anything takes.
"""

from __future__ import annotations

import queue
import sys
import threading
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import reference_attention
from opticnerve.ops import kernels, packed_attention

CUDA, CPU = "cuda", "cpu"
DEVICE = torch.device(CUDA, 0)
MEMORY = 143_771 << 20
"""An H200's."""

_DEVICE = torch._C.TensorBase.device.__get__
_TO, _NUMPY, _TOLIST = torch._C.TensorBase.to, torch._C.TensorBase.numpy, torch._C.TensorBase.tolist
_TENSOR, _AS_TENSOR = torch.tensor, torch.as_tensor

# No kernel runs: memory is taken or seen otherwise.
NO_KERNELS = {
    "detach", "alias", "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "lift_fresh",
    "lift_fresh_copy", "view", "_unsafe_view", "_reshape_alias", "set_", "resize_", "is_same_size", "sym_size",
    "_local_scalar_dense", "is_pinned", "_pin_memory", "record_stream",
}  # fmt: skip
_ANY_DEVICE = {"copy_", "_to_copy", "set_", "record_stream", "is_same_size"}
_VALUES_TO_HOST = {"_local_scalar_dense": "item", "equal": "item", "is_nonzero": "item"}
# What comes out is as large as the numbers say: the host asks how large.
_SIZES_TO_HOST = {"nonzero", "masked_select", "unique_consecutive", "_unique2", "unique_dim", "bincount"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# A 0-dimensional tensor of the CPU goes into a kernel as its argument, but not into these.
_NO_SCALARS = {"cat", "stack", "index_select", "gather", "scatter", "index_copy", "embedding"}
_FACTORIES = (
    "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint", "randperm", "linspace", "eye",
    "tensor", "as_tensor", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like",
    "randint_like", "tril_indices", "triu_indices", "empty_strided", "scalar_tensor", "asarray", "normal",
)  # fmt: skip
_NEW = ("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "new_empty_strided")


class MixedDevices(RuntimeError):
    """Tensors of two devices met in an operation."""


@dataclass
class PretendedDevice:
    """What the device has seen. `waits`: (what, where) → how often the host waited; `kernels`: (operation, where) →
    how often it ran; `live`, `peak`: bytes that lie there now, and at most did (`reset_peak` begins anew).

    Where: the innermost line of the package (`ops/head.py:114`), or else of whoever is not torch.
    """

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    kernels: Counter[tuple[str, str]] = field(default_factory=Counter)
    live: int = 0
    peak: int = 0
    counting: bool = True

    def reset(self) -> None:
        """Forget what was counted."""
        self.waits.clear()
        self.kernels.clear()
        self.reset_peak()

    def reset_peak(self) -> None:
        self.peak = self.live

    def wait(self, what: str) -> None:
        if self.counting:
            self.waits[what, site()] += 1

    def put(self, tensor: Tensor, where: str) -> Tensor:
        """Have a tensor's storage lie there."""
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:  # vmap's, whose own lies below
            return tensor
        if where == CPU:
            if vars(storage).pop("pretended", None):
                storage.freed()  # type: ignore[attr-defined]
        elif not hasattr(storage, "pretended"):
            storage.pretended = where  # type: ignore[attr-defined]
            size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            storage.freed = weakref.finalize(storage, self._freed, size)  # type: ignore[attr-defined]
            storage.freed.atexit = False  # type: ignore[attr-defined]
        return tensor

    def _freed(self, size: int) -> None:
        self.live -= size


def place(tensor: Tensor) -> str:
    """The kind of device that a tensor says it lies on."""
    real: str = _DEVICE(tensor).type
    if real != CPU:
        return real
    try:
        return getattr(tensor.untyped_storage(), "pretended", CPU)
    except (NotImplementedError, RuntimeError):  # no storage: a wrapper, or sparse
        return CPU


def site() -> str:
    """The innermost line of the package that is running; see `PretendedDevice`."""
    frame, first = sys._getframe(1), None
    while frame is not None:
        name = frame.f_code.co_filename
        if "/src/opticnerve/" in name:
            return f"{name.split('/src/opticnerve/')[1]}:{frame.f_lineno}"
        watching = name == __file__ or isinstance(frame.f_locals.get("self"), Watch)
        if first is None and not watching and "/torch/" not in name and "unittest/mock" not in name:
            first = f"{name.rsplit('site-packages/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return first or "?"


class Watch(TorchDispatchMode):
    """Every operation under it is looked at; see the page."""

    def __init__(self, device: PretendedDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        given = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        places = {place(t) for t in given}
        there = CUDA in places
        if there and CPU in places and name not in _ANY_DEVICE:
            self._check_mixture(func, name, args, [t for t in given if place(t) == CPU])
        if there and self.device.counting:
            self._count(func, name, args)
        out = self.compute(func, name, args, kwargs, there=there)
        if there and name == "copy_":
            to_host, pinned = place(args[0]) == CPU, is_pinned(args[0]) or is_pinned(args[1])
            if len(places) == 2 and not (pinned and (kwargs.get("non_blocking") or args[2:3] == (True,))):
                self.device.wait("copy to the host" if to_host else "copy from pageable memory")
        elif there:
            for made in tree_leaves(out):
                if isinstance(made, Tensor):
                    self.device.put(made, CUDA)
        return out

    def compute(self, func: Any, name: str, args: Any, kwargs: Any, *, there: bool) -> Any:
        """Run the operation."""
        return func(*args, **kwargs)

    def _check_mixture(self, func: Any, name: str, args: Any, on_host: list[Tensor]) -> None:
        together = name.startswith(("_foreach", "_fused"))
        if all(t.dim() == 0 for t in on_host) and not together and name not in _NO_SCALARS:
            return
        if name in _INDEXING and place(args[0]) == CUDA:  # torch takes the numbers of places there itself
            values = args[2] if len(args) > 2 and isinstance(args[2], Tensor) else None
            if values is None or place(values) == CUDA or values.dim() == 0:
                self.device.wait("index by a tensor of the host")
                return
        raise MixedDevices(
            f"{func} at {site()} got tensors of cuda:0 and of the cpu, {[tuple(t.shape) for t in on_host]}"
        )

    def _count(self, func: Any, name: str, args: Any) -> None:
        if name in _VALUES_TO_HOST:
            self.device.wait(_VALUES_TO_HOST[name])
        elif name in _SIZES_TO_HOST or (name == "repeat_interleave" and len(args) == 1):
            self.device.wait(name)
        elif name in _INDEXING and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1] or ()):
            self.device.wait("index by a mask")
        if name not in NO_KERNELS and not func.is_view:
            self.device.kernels[name, site()] += 1


# -- what is replaced --------------------------------------------------------------------------------------------------


def _kind(device: Any) -> str | None:
    if device is None:
        return None
    return CUDA if isinstance(device, int) else torch.device(device).type


def is_pinned(tensor: Tensor, *_: Any) -> bool:
    return place(tensor) == CPU and hasattr(tensor.untyped_storage(), "pinned")


def _pin(tensor: Tensor, *_: Any) -> Tensor:
    if place(tensor) == CUDA:
        raise RuntimeError("cannot pin a tensor of cuda:0; only those of the cpu can be pinned")
    out = tensor.clone()
    out.untyped_storage().pinned = True  # type: ignore[attr-defined]
    return out


def _moving(device: PretendedDevice) -> Callable[..., Tensor]:
    """`Tensor.to`."""

    def to(self: Tensor, *args: Any, **options: Any) -> Tensor:
        copy = options.pop("copy", False)
        if "other" in options:
            args = (options.pop("other"), *args)
        if args and isinstance(args[0], Tensor):
            args = (place(args[0]), args[0].dtype, *args[1:])
        rest = [torch.device(CUDA, a) if isinstance(a, int) and not isinstance(a, bool) else a for a in args]
        if len(rest) == 4 or (len(rest) == 3 and isinstance(rest[0], torch.dtype)):
            copy = rest.pop()
        asked, dtype, at_once, layout = torch._C._nn._parse_to(*rest, **options)  # type: ignore[attr-defined]
        have = place(self)
        want = have if asked is None else asked.type
        kept: dict[str, Any] = {} if layout is None else {"memory_format": layout}
        if not {have, want} <= {CPU, CUDA}:
            return _TO(self, asked, dtype or self.dtype, copy=copy, **kept)
        peak = device.peak
        out: Tensor = _TO(self, dtype=dtype or self.dtype, copy=copy, **kept)
        if want == have:
            return out
        if out.untyped_storage()._cdata == self.untyped_storage()._cdata:
            out = out.clone()
        device.put(out, want)
        if want == CPU:
            device.peak = max(peak, device.live)  # it is made there
            device.wait("copy to the host")
        elif not (at_once and is_pinned(self)):
            device.wait("copy from pageable memory")
        return out

    return to


def _factory(device: PretendedDevice, real: Any) -> Any:
    @wraps(real)
    def made(*args: Any, **options: Any) -> Any:
        kind, pinned = _kind(options.get("device")), options.pop("pin_memory", False)
        if kind != CUDA:
            out = real(*args, **options)
            if kind == CPU and isinstance(out, Tensor):  # zeros_like(what lies there, device="cpu")
                device.put(out, CPU)
            return _pin(out) if pinned else out
        if getattr(options.get("generator"), "kind", CUDA if options.get("generator") is None else CPU) != CUDA:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        out = device.put(real(*args, **{**options, "device": CPU}), CUDA)
        if real in (_TENSOR, _AS_TENSOR):
            device.wait("a tensor of the host's numbers")
        elif device.counting:
            device.kernels["factory", site()] += 1
        return out

    return made


class _Generator(torch.Generator):
    def __new__(cls, device: Any = CPU) -> _Generator:
        made: _Generator = super().__new__(cls, CPU if _kind(device) == CUDA else device)  # type: ignore[call-arg]
        made.kind = _kind(device)
        return made

    def __init__(self, device: Any = CPU) -> None:
        pass

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE if self.kind == CUDA else torch.device(CPU)

    kind: str | None


def _values(device: PretendedDevice, real: Any, what: str) -> Any:
    """`tolist` or `numpy`: one wait."""

    def read(self: Tensor, *args: Any, **options: Any) -> Any:
        if place(self) == CPU:
            return real(self, *args, **options)
        if real is _NUMPY and not options.get("force"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        device.wait(what)
        before, device.counting = device.counting, False
        try:
            return real(self, *args, **options)
        finally:
            device.counting = before

    return read


def _grouped(real: Any) -> Any:
    """Tensors by device and dtype, for optimizers and clipping."""

    def group(lists: list[list[Tensor | None]], with_indices: bool = False) -> dict[Any, Any]:
        found = {}
        for (there, dtype), (mine, places) in real(lists, True).items():
            first = next(column for column in mine if any(t is not None for t in column))
            kinds = [place(t) for t in first]
            for kind in dict.fromkeys(kinds):
                keep = [i for i, k in enumerate(kinds) if k == kind]
                columns = [[c[i] for i in keep] if c else c for c in mine]
                found[DEVICE if kind == CUDA else there, dtype] = (columns, [places[i] for i in keep])
        return found

    return group


def _pinned(data: Any, device: Any = None) -> Any:
    if isinstance(data, Tensor):
        return _pin(data)
    if hasattr(data, "pin_memory"):
        return data.pin_memory()
    if isinstance(data, dict):
        return {k: _pinned(v) for k, v in data.items()}
    return type(data)(map(_pinned, data)) if isinstance(data, list | tuple) else data


def _pin_loop(given: Any, out: Any, device_id: Any, done: Any, device: Any) -> None:
    """torch's thread between workers and loop."""
    while not done.is_set():
        try:
            number, data = given.get(timeout=0.1)
        except queue.Empty:
            continue
        out.put((number, _pinned(data)))


def _cuda(device: PretendedDevice) -> dict[str, Any]:
    """Functions of `torch.cuda`, by name."""
    random = torch.default_generator
    about = types.SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=MEMORY, multi_processor_count=132)
    constants = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "set_device": None,
        "get_device_name": about.name, "get_device_capability": (9, 0), "get_device_properties": about,
        "reset_peak_memory_stats": None, "empty_cache": None, "is_bf16_supported": True, "manual_seed": None,
        "manual_seed_all": None, "is_current_stream_capturing": False, "current_stream": _STREAM, "ipc_collect": None,
        "_is_in_bad_fork": False, "device": nullcontext(),
    }  # fmt: skip

    def restore(state: Tensor, *_: Any) -> None:
        random.set_state(state)

    def states() -> list[Tensor]:
        return [random.get_state()]

    def restore_all(states: list[Tensor]) -> None:
        random.set_state(states[0])

    answers: dict[str, Any] = {k: lambda *_, v=v, **__: v for k, v in constants.items()}
    return answers | {
        "mem_get_info": lambda *_: (MEMORY - device.live, MEMORY),
        "memory_allocated": lambda *_: device.live,
        "max_memory_allocated": lambda *_: device.peak,
        "reset_peak_memory_stats": lambda *_: device.reset_peak(),
        "synchronize": lambda *_: device.wait("synchronize"),
        "get_rng_state": lambda *_: random.get_state(),
        "set_rng_state": restore,
        "get_rng_state_all": states,
        "set_rng_state_all": restore_all,
        "initial_seed": random.initial_seed,
    }


_STREAM = types.SimpleNamespace(synchronize=lambda: None, is_capturing=lambda: False)
_ACCELERATOR: dict[str, Any] = {
    "current_stream": lambda *_: _STREAM,
    "is_available": lambda: True, "current_accelerator": lambda check_available=False: torch.device(CUDA),
    "device_count": lambda: 1, "current_device_index": lambda: 0, "current_device_idx": lambda: 0,
    "set_device_index": lambda d: None, "set_device_idx": lambda d: None, "empty_cache": lambda: None,
}  # fmt: skip


# What CUDA alone computes, and what would be compiled for it.
_KERNELS: dict[str, Any] = {
    "varlen_attn": reference_attention.varlen_attn, "flex": reference_attention.Flex, "_compiled": lambda f: f
}  # fmt: skip


@contextmanager
def pretended(watch: type[Watch] = Watch) -> Iterator[PretendedDevice]:
    """Within it there is a CUDA device. Not to be nested."""
    import torch.nn.utils.clip_grad as clipping
    import torch.utils._foreach_utils as foreach
    import torch.utils.data._utils.pin_memory as pinning
    from torch.utils._device import DeviceContext, _device_constructors

    device = PretendedDevice()
    to = _moving(device)
    _device_constructors()  # cached: the real ones
    group = _grouped(foreach._group_tensors_by_device_and_dtype)
    pad_sequence = torch._C._nn.pad_sequence  # type: ignore[attr-defined]
    within, thread = DeviceContext.__torch_function__, threading.Thread.run

    def constructed(self: Any, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`with torch.device("cuda"):`"""
        kwargs = kwargs or {}
        if self.device.type == CUDA and func in _device_constructors() and kwargs.get("device") is None:
            out = func(*args, **{**kwargs, "device": CPU})
            return device.put(out, CUDA) if isinstance(out, Tensor) else out
        return within(self, func, types_, args, kwargs)

    def padded(rows: list[Tensor], *args: Any, **options: Any) -> Tensor:
        """Its own factory says where the real device is."""
        before, device.counting = device.counting, False
        try:
            return device.put(pad_sequence(rows, *args, **options), place(rows[0]))
        finally:
            device.counting = before

    def run(self: threading.Thread) -> None:
        with watch(device):
            thread(self)

    def fresh(real: Any) -> Any:
        def made(self: Tensor, *args: Any, **options: Any) -> Tensor:
            kind = _kind(options.pop("device", None)) or place(self)
            out = device.put(real(self, *args, **options), kind)
            if real is torch._C.TensorBase.new_tensor and kind == CUDA:
                device.wait("a tensor of the host's numbers")
            return out

        return made

    tensor = {
        "device": property(lambda t: DEVICE if place(t) == CUDA else _DEVICE(t)),
        "is_cuda": property(lambda t: place(t) == CUDA), "is_cpu": property(lambda t: place(t) == CPU),
        "get_device": lambda t: 0 if place(t) == CUDA else -1, "to": to, "pin_memory": _pin, "is_pinned": is_pinned,
        "cuda": lambda t, device=None, non_blocking=False, **_: to(t, DEVICE, non_blocking=non_blocking),
        "cpu": lambda t, **_: to(t, torch.device(CPU)),
        "numpy": _values(device, _NUMPY, "copy to the host"), "tolist": _values(device, _TOLIST, "tolist"),
        **{name: fresh(getattr(torch._C.TensorBase, name)) for name in _NEW},
    }  # fmt: skip
    places: list[tuple[Any, dict[str, Any]]] = [
        (Tensor, tensor),
        (torch, {n: _factory(device, getattr(torch, n)) for n in _FACTORIES} | {"Generator": _Generator}),
        (torch._C._nn, {"pad_sequence": padded}),  # type: ignore[attr-defined]
        (DeviceContext, {"__torch_function__": constructed}),
        (torch.cuda, _cuda(device)),
        (packed_attention, _KERNELS),
        (kernels, {"compiled": lambda f: f}),
        (torch.accelerator, _ACCELERATOR | {"synchronize": lambda *_: device.wait("synchronize")}),
        (foreach, {"_group_tensors_by_device_and_dtype": group}),
        (clipping, {"_group_tensors_by_device_and_dtype": group}),
        (pinning, {"pin_memory": _pinned, "_pin_memory_loop": _pin_loop}),
        (threading.Thread, {"run": run}),
    ]
    with ExitStack() as stack:
        for owner, replaced in places:
            for name, value in replaced.items():
                stack.enter_context(patch.object(owner, name, value, create=True))
        stack.enter_context(watch(device))
        # accelerate keeps the device that it found for the rest of the process.
        stack.callback(AcceleratorState._reset_state, reset_partial_state=True)
        yield device
