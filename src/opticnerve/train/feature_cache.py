"""What a frozen eye saw, computed once and kept on disk for all epochs, stages, connectors and recipes.

A folder belongs to one eye: its name is a hash of the encoder's weights, its options, and how pictures are prepared for
it. In it, shards of safetensors hold the features of some hundreds of pictures, found by the pictures' content; they
are written beside and renamed, so that a process that is killed leaves none half written, and several processes may
write at once. Features keep the encoder's own dtype: training on them is training on the live encoder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opticnerve.data.images import Source, image_digest, open_image
from opticnerve.models.parts import is_docked_model
from opticnerve.starter.cache import cache_dir
from opticnerve.types import Features, OpticNerveError

SHARD = 256
"""Pictures to a file."""
_BATCH = 32


class FeatureStore:
    """Features by a picture's content.

    Args:
        folder: of one eye, see `open_store`. It is read at once; shards that others add later are not seen.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, tuple[Path, int]] = {}
        self._digests: dict[Path, str] = {}
        self._files: dict[Path, Any] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            self._list(shard)

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        # Open files do not travel to the data loader's workers; each opens its own.
        return {**self.__dict__, "_files": {}}

    def __contains__(self, digest: str) -> bool:
        return digest in self._places

    def digests(self, pictures: Sequence[tuple[Source, str]]) -> list[str]:
        """What pictures are found by: hashes of their content."""
        return [self._digest(source, where) for source, where in pictures]

    def rows(self, sources: Sequence[Source], where: Sequence[str]) -> Features:
        """The features of pictures, in their order: (pictures, N, D).

        Raises:
            OpticNerveError: one of them was never seen; `where` names its sample.
        """
        found = []
        for source, place in zip(sources, where, strict=True):
            digest = self._digest(source, place)
            if digest not in self._places:
                raise OpticNerveError(f"{place}: this picture is not in the feature cache {self.folder}")
            found.append(self._read(*self._places[digest]))
        return Features(torch.stack([t for t, _ in found]), torch.stack([m for _, m in found]))

    def fill(
        self,
        pictures: Sequence[tuple[Source, str]],
        encode: Callable[[Tensor], Features],
        image_processor: Any,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """See the pictures that are not there yet; returns how many these were.

        Args:
            pictures: each with the sample that shows it. encode: pixels (B, 3, H, W) → `Features`.
        """
        wanted = {self._digest(s, where): (s, where) for s, where in pictures}
        missing = [(d, *wanted[d]) for d in wanted if d not in self._places]
        for start in range(0, len(missing), SHARD):
            part = missing[start : start + SHARD]
            seen = []
            for first in range(0, len(part), _BATCH):
                opened = [open_image(s, where=where) for _, s, where in part[first : first + _BATCH]]
                with torch.inference_mode():
                    seen.append(encode(image_processor(opened, return_tensors="pt")["pixel_values"]))
                if progress is not None:
                    progress(start + first + len(opened), len(missing))
            self._write([d for d, _, _ in part], seen)
        return len(missing)

    def _digest(self, source: Source, where: str) -> str:
        if not isinstance(source, Path):
            return image_digest(source, where=where)
        if source not in self._digests:
            self._digests[source] = image_digest(source, where=where)
        return self._digests[source]

    def _write(self, digests: list[str], seen: list[Features]) -> None:
        tensors = {
            "tokens": torch.cat([f.tokens_BND.cpu() for f in seen]).contiguous(),
            "mask": torch.cat([f.mask_BN.cpu() for f in seen]).contiguous(),
        }
        name = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
        target = self.folder / f"{name}.safetensors"
        partial = self.folder / f".{name}-{os.getpid()}.partial"
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, partial, metadata={"digests": json.dumps(digests)})
            partial.replace(target)
        except (OSError, SafetensorError) as e:
            raise OpticNerveError(
                f"the feature cache {self.folder} cannot be written: {e}; free some space, or leave out cache_features"
            ) from e
        finally:
            partial.unlink(missing_ok=True)
        self._list(target)

    def _list(self, shard: Path) -> None:
        try:
            with safe_open(shard, framework="pt") as file:
                digests = json.loads(file.metadata()["digests"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as e:
            raise OpticNerveError(f"{shard} is no shard of a feature cache: {e}; delete it") from e
        self._places |= {d: (shard, row) for row, d in enumerate(digests)}

    def _read(self, shard: Path, row: int) -> tuple[Tensor, Tensor]:
        if shard not in self._files:
            self._files[shard] = safe_open(shard, framework="pt").__enter__()
        file = self._files[shard]
        return file.get_slice("tokens")[row], file.get_slice("mask")[row]


def open_store(model: Any, processor: Any, *, root: Path | None = None) -> FeatureStore:
    """The store of a model's frozen eye, in `root` (default: `features` in opticnerve's cache).

    What is stored follows the model: tokens for a docked language model and a fusion classifier, one pooled vector for
    a dual encoder.
    """
    encoder = model.image.encoder
    name = hashlib.sha256()
    for part, tensor in sorted(encoder.state_dict().items()):
        name.update(f"{part} {tuple(tensor.shape)} {tensor.dtype}".encode())
        name.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    prepared = {k: v for k, v in processor.image_processor.to_dict().items() if not k.startswith("_")}
    told = {"encoder": encoder.options, "prepared": prepared, "pooling": getattr(model.image, "pooling", None)}
    name.update(json.dumps(told, sort_keys=True, default=str).encode())
    return FeatureStore((root or cache_dir() / "features") / name.hexdigest()[:24])


def encode_function(model: Any) -> Callable[[Tensor], Features]:
    """Pixels → what the store holds, for any of the three kinds of model."""
    if is_docked_model(model):
        eye: Callable[[Tensor], Features] = model.image.encode
        return eye

    def encode(pixel_values: Tensor) -> Features:
        seen = model.image.encode(pixel_values)
        if isinstance(seen, Features):
            return seen
        return Features(seen[:, None], torch.ones(len(seen), 1, dtype=torch.bool))

    return encode


def see_all(model: Any, processor: Any, pictures: Sequence[tuple[Source, str]], *, console: Any = None) -> FeatureStore:
    """The store of the model's frozen eye, with all of these pictures in it."""
    store = open_store(model, processor)
    new = sum(d not in store for d in dict.fromkeys(store.digests(pictures)))
    if console is not None and new:
        console.print(f"seeing {new:,} of {len(pictures):,} pictures once, for all epochs: {store.folder}", style="dim")
    training = model.image.encoder.training
    model.image.encoder.eval()
    try:
        store.fill(pictures, encode_function(model), processor.image_processor)
    finally:
        model.image.encoder.train(training)
    return store
