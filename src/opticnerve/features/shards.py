"""Files of features: some hundreds of pictures in one safetensors file, read row by row where they lie.

Rows are read by position (`pread`) straight into the batch that they belong to. Mapping the files is as fast, but every
page once touched would count as the process's memory; safetensors' own slices are five times slower for such rows.
(Layout of the files: https://huggingface.co/docs/safetensors, "Format".)
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from opticnerve.common import atomic
from opticnerve.types import Features, OpticNerveError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Shard:
    """Where the features of a file's pictures lie: `tokens` and `mask` begin at these bytes of it."""

    path: Path
    shape: tuple[int, ...]  # (pictures, N, D)
    dtype: torch.dtype
    tokens: int
    mask: int


def write(folder: Path, digests: Sequence[str], features: Features) -> Path:
    """A file of these pictures, all of it or nothing.

    Raises:
        OpticNerveError: it cannot be written.
    """
    name = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
    target = folder / f"{name}.safetensors"
    partial = folder / f".{name}-{os.getpid()}.partial"
    tensors = {"tokens": features.tokens_BND.contiguous(), "mask": features.mask_BN.contiguous()}
    try:
        save_file(tensors, partial, metadata={"digests": json.dumps(list(digests))})
        atomic.sync(partial)
        partial.replace(target)
    except (OSError, SafetensorError) as e:
        raise OpticNerveError(
            f"the feature cache {folder} cannot be written: {e}; free some space, or leave out cache_features",
            kind="disk-full",
        ) from e
    finally:
        partial.unlink(missing_ok=True)
    return target


def describe(path: Path) -> tuple[Shard, list[str]]:
    """A file's place of each thing, and the digests of its pictures.

    Raises:
        OpticNerveError: it is torn, or no such file.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > 100_000_000:
                raise ValueError("its header is damaged")
            header: dict[str, Any] = json.loads(file.read(length))
        tokens, mask, start = header["tokens"], header["mask"], 8 + length
        begin, begin_mask = start + tokens["data_offsets"][0], start + mask["data_offsets"][0]
        shard = Shard(path, tuple(tokens["shape"]), _DTYPES[tokens["dtype"]], begin, begin_mask)
        digests: list[str] = json.loads(header["__metadata__"]["digests"])
        end = start + max(tokens["data_offsets"][1], mask["data_offsets"][1])
        if path.stat().st_size != end or len(digests) != shard.shape[0] or mask["shape"] != tokens["shape"][:2]:
            raise ValueError("it ends too early")
    except (OSError, struct.error, ValueError, KeyError, TypeError, IndexError) as e:
        raise OpticNerveError(f"{path} is no shard of a feature cache: {e}; delete it", kind="damaged") from e
    return shard, digests


class ShardReader:
    """Rows out of many files, of which few are open at a time. Each process opens its own."""

    def __init__(self, most_open: int = 64) -> None:
        self.most_open = most_open
        self._files: OrderedDict[Path, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def __del__(self) -> None:
        for file in self._files.values():
            file.close()

    def read(self, places: Sequence[tuple[Shard, int]]) -> Features:
        """Row `n` of each file named: (rows, N, D), in the files' dtype.

        Raises:
            OpticNerveError: a file is gone or torn.
        """
        first = places[0][0]
        _, count, width = first.shape
        size = count * width * first.dtype.itemsize
        tokens_BND = torch.empty(len(places), count, width, dtype=first.dtype)
        mask_BN = torch.empty(len(places), count, dtype=torch.bool)
        tokens, mask = (t.view(torch.uint8).numpy().data.cast("B") for t in (tokens_BND, mask_BN))
        for i, (shard, row) in enumerate(places):
            if (shard.shape[1:], shard.dtype) != (first.shape[1:], first.dtype):
                raise OpticNerveError(
                    f"{shard.path} and {first.path} hold features of different shapes; delete one", kind="mismatch"
                )
            self._read(shard, tokens[i * size : (i + 1) * size], shard.tokens + row * size)
            self._read(shard, mask[i * count : (i + 1) * count], shard.mask + row * count)
        return Features(tokens_BND, mask_BN)

    def _read(self, shard: Shard, into: memoryview, at: int) -> None:
        try:
            if shard.path not in self._files:
                if len(self._files) >= self.most_open:
                    self._files.popitem(last=False)[1].close()
                self._files[shard.path] = shard.path.open("rb", buffering=0)
            self._files.move_to_end(shard.path)
            got = os.preadv(self._files[shard.path].fileno(), [into], at)
        except OSError as e:
            raise OpticNerveError(
                f"{shard.path} cannot be read: {e}; start again, it is then made anew", kind="damaged"
            ) from e
        if got != len(into):
            raise OpticNerveError(f"{shard.path} ends too early; delete it", kind="damaged")
