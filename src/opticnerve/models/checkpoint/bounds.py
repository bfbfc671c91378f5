"""A model may not be larger than its weights: a configuration that somebody altered must not fill the memory.

config.json says how large a model is built, long before a tensor is read. One that says a million layers, or a width
of 2³⁰, would be built until memory or patience ends. So tensors and modules are counted while a model is built, and
building ends when there are more than the files could fill.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as hooks

from opticnerve.types import OpticNerveError

MAX_HEADER = 100_000_000  # bytes: what the safetensors library itself takes


@dataclass
class Allowance:
    """What the files hold, and what was built so far."""

    source: str
    tensors: int
    elements: int
    built: int = 0
    built_elements: int = 0
    modules: int = 0

    # Encoders are built up to four times (to probe their shapes, on the meta device), tied tensors under each of their
    # names, and tables that are computed stand in no file.
    @property
    def most_tensors(self) -> int:
        return 6 * self.tensors + 500

    @property
    def most_elements(self) -> int:
        return 6 * self.elements + 100_000_000

    @property
    def most_modules(self) -> int:
        return 40 * self.tensors + 3_000

    def count(self, value: Any) -> None:
        self.built += 1
        self.built_elements += value.numel()
        if self.built > self.most_tensors or self.built_elements > self.most_elements:
            raise OpticNerveError(
                f"{self.source}: its configuration describes a model of more than {self.built_elements:,} numbers in "
                f"{self.built:,} tensors, but its weights are {self.elements:,} in {self.tensors:,}; one of the two is "
                "not its own"
            )

    def count_module(self) -> None:
        self.modules += 1
        if self.modules > self.most_modules:
            raise OpticNerveError(
                f"{self.source}: its configuration describes a model of more than {self.most_modules:,} modules, but "
                f"its weights are {self.tensors:,} tensors; one of the two is not its own"
            )


_allowed: ContextVar[Allowance | None] = ContextVar("allowed", default=None)


@contextmanager
def no_larger_than(source: str, tensors: int, elements: int) -> Iterator[None]:
    """Within it, modules that hold much more than so many tensors and numbers are refused while they are built."""
    token = _allowed.set(Allowance(source, tensors, elements))
    handles = [
        hooks.register_module_parameter_registration_hook(_count),
        hooks.register_module_buffer_registration_hook(_count),
        hooks.register_module_module_registration_hook(_count_module),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        _allowed.reset(token)


@contextmanager
def no_larger_than_files(folder: Path) -> Iterator[None]:
    """`no_larger_than` the safetensors files in a folder; without any, there is nothing to compare with."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        yield
        return
    sizes = [shape for file in files for shape in shapes(file).values()]
    with no_larger_than(str(folder), len(sizes), sum(map(prod, sizes))):
        yield


def shapes(file: Path) -> dict[str, list[int]]:
    """Name → shape of the tensors that a safetensors file's header lists; no tensor is read.

    Raises:
        OpticNerveError: it has no such header.
    """
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > min(MAX_HEADER, file.stat().st_size):
                raise ValueError(f"a header of {length:,} bytes in a file of {file.stat().st_size:,}")
            header = json.loads(opened.read(length))
        return {name: _shape(name, entry) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as e:
        raise OpticNerveError(f"{file} is not a readable safetensors file: {str(e)[:200]}") from e


def _shape(name: str, entry: dict[str, Any]) -> list[int]:
    shape = entry["shape"]
    if not all(isinstance(n, int) and 0 <= n < 2**48 for n in shape):
        raise ValueError(f"{name[:80]} has the shape {str(shape)[:80]}")
    return list(shape)


def _count(module: nn.Module, name: str, value: Any) -> None:
    allowed = _allowed.get()
    # Weights that come to a module on the meta device replace what was counted when it was built.
    replaces = isinstance(getattr(module, name, None), Tensor)
    if allowed is not None and value is not None and not replaces:
        allowed.count(value)


def _count_module(module: nn.Module, name: str, value: Any) -> None:
    allowed = _allowed.get()
    if allowed is not None and value is not None:
        allowed.count_module()
