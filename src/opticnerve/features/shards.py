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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file

from opticnerve.common import atomic
from opticnerve.encoders.native import collect
from opticnerve.types import Features, OpticNerveError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Shard:
    """Where the features of a file's pictures lie: `tokens` and `mask` begin at these bytes of it.

    Of pictures that keep their shape there is no mask: their tokens lie behind one another, (tokens, D), and `grids`
    (pictures, 2) says how many rows and columns each has, `starts` which token is each one's first.
    """

    path: Path
    shape: tuple[int, ...]  # (pictures, N, D), or (tokens, D)
    dtype: torch.dtype
    tokens: int
    mask: int = 0
    grids: NDArray[np.int32] | None = None
    starts: NDArray[np.int64] | None = None


def write(folder: Path, digests: Sequence[str], features: Features) -> Path:
    """A file of these pictures, all of it or nothing.

    Raises:
        OpticNerveError: it cannot be written.
    """
    name = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
    target = folder / f"{name}.safetensors"
    partial = folder / f".{name}-{os.getpid()}.partial"
    tensors = {"tokens": features.tokens_BND.contiguous(), "mask": features.mask_BN.contiguous()}
    if features.grids is not None:
        grids = torch.tensor(features.grids, dtype=torch.int32)
        tensors = {"tokens": features.tokens_BND[features.mask_BN], "grids": grids}
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
        start, tokens = 8 + length, header["tokens"]
        other = header["mask" if "mask" in header else "grids"]
        begin, begin_other = start + tokens["data_offsets"][0], start + other["data_offsets"][0]
        shard = Shard(path, tuple(tokens["shape"]), _DTYPES[tokens["dtype"]], begin, begin_other)
        digests: list[str] = json.loads(header["__metadata__"]["digests"])
        end = start + max(tokens["data_offsets"][1], other["data_offsets"][1])
        pictures = tokens["shape"][0] if "mask" in header else other["shape"][0]
        if path.stat().st_size != end or len(digests) != pictures:
            raise ValueError("it ends too early")
        if "mask" not in header:
            grids = np.fromfile(path, "<i4", 2 * pictures, offset=begin_other).reshape(-1, 2)
            shard = replace(shard, mask=0, grids=grids, starts=np.cumsum(np.append(0, grids.prod(1))))
        if (other["shape"] != tokens["shape"][:2]) if shard.starts is None else shard.starts[-1] != tokens["shape"][0]:
            raise ValueError("its tables do not fit each other")
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
        """Picture `n` of each file named: (pictures, N, D), in the files' dtype.

        Raises:
            OpticNerveError: a file is gone or torn.
        """
        first = places[0][0]
        if first.grids is not None:
            return self._of_shapes(places)
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

    def _of_shapes(self, places: Sequence[tuple[Shard, int]]) -> Features:
        """Pictures that keep their shape: the shorter rows end in zeros, masked out."""
        rows, grids, width = [], [], places[0][0].shape[-1]
        for shard, picture in places:
            if shard.grids is None or shard.starts is None or shard.shape[-1] != width:
                raise OpticNerveError(
                    f"{shard.path} and {places[0][0].path} hold features of different shapes; delete one",
                    kind="mismatch",
                )
            grids.append((int(shard.grids[picture, 0]), int(shard.grids[picture, 1])))
            rows.append(torch.empty(grids[-1][0] * grids[-1][1], width, dtype=shard.dtype))
            first = shard.tokens + int(shard.starts[picture]) * width * shard.dtype.itemsize
            self._read(shard, rows[-1].view(torch.uint8).numpy().data.cast("B"), first)
        return collect(rows, grids)

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
