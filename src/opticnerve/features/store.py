"""What a frozen vision encoder saw, computed once and kept on disk for all epochs, stages, connectors and recipes.

A folder belongs to one vision encoder: its name is a hash of the encoder's weights, its options, and how pictures are
prepared for it. In it, shards of safetensors hold the features of some hundreds of pictures, found by the pictures'
content; they are written beside and renamed, so that a process that is killed leaves none half written, and several
processes may write at once. Features keep the encoder's own dtype, unless half of it is asked for: training on them is
training on the live encoder. A budget bounds the disk that all vision encoders' features take (`data.feature_disk`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opticnerve.data.media.images import Source
from opticnerve.data.media.transform import DECODING
from opticnerve.features import shards
from opticnerve.features.budget import default_budget, evict, features_dir, hold
from opticnerve.features.digests import Digests
from opticnerve.features.extract import Counter, Named, OnError, seen
from opticnerve.language.load import tensor_fingerprint
from opticnerve.types import DataError, Features

SHARD_BYTES = 64 << 20
"""About so much to a file: it is what filling holds in memory."""
_SHARD_PICTURES = 4096


class FeatureStore:
    """Features by a picture's content.

    Args:
        folder: of one vision encoder, see `open_store`. It is read at once; of shards that others add later, `refresh`
            knows.
        dtype: what rows come in; by default what they are stored in.
        stored: what new features are stored in; by default what the vision encoder gives.
        budget: bytes that the folder may take together with its neighbours; by default they are not bounded.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype | None = None,
        stored: torch.dtype | None = None,
        budget: int | None = None,
    ) -> None:
        self.folder, self.dtype, self.stored, self.budget = folder, dtype, stored, budget
        self._mark: Any = hold(folder)
        self._digests = Digests(folder.parent / "digests.sqlite")
        self._reader = shards.Reader()
        self._shards: list[shards.Shard] = []
        self._places: dict[str, tuple[int, int]] = {}
        self.refresh()

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        # The mark stays with the process that trains, which outlives the data loader's workers.
        return {**self.__dict__, "_mark": None}

    def __contains__(self, digest: str) -> bool:
        return digest in self._places

    def refresh(self) -> None:
        """Learn of the shards that other processes have written."""
        listed = {shard.path for shard in self._shards}
        for path in sorted(self.folder.glob("*.safetensors")):
            if path not in listed:
                self._list(path)

    def digest(self, source: Source, where: str = "") -> str:
        """What a picture is found by: a hash of its content, which is read once."""
        return self._digests(source, where)

    def check(self, source: Source, where: str) -> None:
        """Raise a `DataError` for a picture that is not in the store, because it could not be opened."""
        if self.digest(source, where) not in self._places:
            raise DataError(
                f"this picture is not in the feature cache {self.folder}", where=where, kind="unreadable-image",
                remedy="see whether it can be opened: `opticnerve data check`",
            )  # fmt: skip

    def rows(self, sources: Sequence[Source], where: Sequence[str]) -> Features:
        """The features of pictures, in their order: (pictures, N, D).

        Raises:
            DataError: one of them was never seen; `where` names its sample.
        """
        for source, place in zip(sources, where, strict=True):
            self.check(source, place)
        places = [self._places[self.digest(s, w)] for s, w in zip(sources, where, strict=True)]
        found = self._reader.read([(self._shards[shard], row) for shard, row in places])
        return Features(found.tokens_BND.to(self.dtype or found.tokens_BND.dtype), found.mask_BN)

    def missing(self, pictures: Sequence[tuple[Source, str]], *, on_error: OnError | None = None) -> list[Named]:
        """The pictures that are not in the store, each content once.

        Raises:
            DataError: a picture cannot be read, and there is no `on_error` to take it.
        """
        wanted: dict[str, tuple[Source, str]] = {}
        for picture, digest in zip(pictures, self._digests.of(pictures), strict=True):
            if isinstance(digest, str):
                wanted.setdefault(digest, picture)
            elif on_error is None:
                raise digest
            else:
                on_error(digest)
        return [(d, *picture) for d, picture in wanted.items() if d not in self._places]

    def fill(
        self,
        pictures: Sequence[tuple[Source, str]],
        encode: Callable[[Tensor], Features],
        image_processor: Any,
        *,
        rank: int = 0,
        world: int = 1,
        threads: int | None = None,
        progress: Callable[[int], None] | None = None,
        on_error: OnError | None = None,
    ) -> int:
        """See the pictures that are not there yet; returns how many these were.

        Whatever ends it, Ctrl-C included, keeps the shards that are whole.

        Args:
            pictures: each with the sample that shows it. encode: pixels (B, 3, H, W) → `Features`.
            rank, world: this process and how many share the work; each takes the pictures whose hash falls to it.
            progress: is told how many of this process's pictures are seen.

        Raises:
            DataError: a picture cannot be opened, and there is no `on_error` to take it.
            OpticNerveError: what the vision encoder sees does not fit into the budget, which shows after the first
                batch; or it cannot be written.
        """
        missing = self.missing(pictures, on_error=on_error)
        mine = [p for p in missing if _falls_to(p[0], world) == rank]
        digests: list[str] = []
        parts: list[Features] = []
        room, done = 0, 0
        for names, features in seen(mine, encode, image_processor, threads=threads, on_error=on_error):
            features = Features(features.tokens_BND.to(self.stored or features.tokens_BND.dtype), features.mask_BN)
            if not room:
                each = _bytes_each(features)
                room = max(1, min(_SHARD_PICTURES, SHARD_BYTES // each))
                if self.budget is not None:
                    self.refresh()  # others may have begun
                    left = sum(d not in self._places for d, *_ in missing)
                    evict(self.folder.parent, self.folder, each * left, self.budget)
            digests += names
            parts.append(features)
            if len(digests) >= room:
                self._write(digests, parts)
                digests, parts = [], []
            done += len(names)
            if progress is not None:
                progress(done)
        if digests:
            self._write(digests, parts)
        return len(mine)

    def _write(self, digests: list[str], parts: list[Features]) -> None:
        whole = Features(torch.cat([f.tokens_BND for f in parts]), torch.cat([f.mask_BN for f in parts]))
        if self.budget is not None:  # others may have written meanwhile
            evict(self.folder.parent, self.folder, len(digests) * _bytes_each(whole), self.budget)
        self._list(shards.write(self.folder, digests, whole))

    def _list(self, path: Path) -> None:
        shard, digests = shards.describe(path)
        self._shards.append(shard)
        self._places |= {d: (len(self._shards) - 1, row) for row, d in enumerate(digests)}


def open_store(
    model: Any, processor: Any, *, root: Path | None = None, budget: int | None = None, stored: str | None = None
) -> FeatureStore:
    """The store of a model's frozen vision encoder, in `root` (default: `features` in opticnerve's cache).

    What is stored follows the model: tokens for a docked language model and a fusion classifier, one pooled vector for
    a dual encoder.

    Args:
        budget: bytes for all stores in `root`; see `data.feature_disk.default_budget` for the default.
        stored: `bfloat16` to store features in that dtype, whatever the vision encoder's is; another store than
            without.
    """
    encoder = model.image.encoder
    name = hashlib.sha256(tensor_fingerprint(encoder.state_dict()).encode())
    prepared = {k: v for k, v in processor.image_processor.to_dict().items() if not k.startswith("_")}
    told = {"encoder": encoder.options, "prepared": prepared, "pooling": getattr(model.image, "pooling", None),
            "decoding": DECODING}  # fmt: skip
    dtype = next((p.dtype for p in encoder.parameters() if p.is_floating_point()), None)
    stored_as = getattr(torch, stored) if stored else None
    if stored_as is not None and stored_as != dtype:
        told["stored"] = stored
    name.update(json.dumps(told, sort_keys=True, default=str).encode())
    root = root or features_dir()
    budget = default_budget(root) if budget is None else budget
    return FeatureStore(root / name.hexdigest()[:24], dtype=dtype, stored=stored_as, budget=budget)


def encode_function(model: Any) -> Callable[[Tensor], Features]:
    """Pixels → what the store holds, for a model of any family."""

    def encode(pixel_values: Tensor) -> Features:
        features = model.image.encode(pixel_values)
        if isinstance(features, Features):
            return features
        return Features(features[:, None], torch.ones(len(features), 1, dtype=torch.bool))

    return encode


def see_all(
    model: Any,
    processor: Any,
    pictures: Sequence[tuple[Source, str]],
    *,
    budget: int | None = None,
    stored: str | None = None,
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], None] | None = None,
    threads: int | None = None,
    on_error: OnError | None = None,
    console: Any = None,
) -> FeatureStore:
    """The store of the model's frozen vision encoder, with all of these pictures in it.

    Args:
        budget, stored: see `open_store`. rank, world: this process and how many share the work.
        wait: returns when all processes have called it.
        on_error: takes what is wrong with a picture, which is then left out; without it the first one is raised.

    Raises:
        DataError: a picture cannot be opened. OpticNerveError: the features do not fit into the budget.
    """
    store = open_store(model, processor, budget=budget, stored=stored)
    new = [_falls_to(digest, world) for digest, *_ in store.missing(pictures, on_error=lambda e: None)]
    console = console if new and rank == 0 else None
    if console is not None:
        told = f"seeing {len(new):,} of {len(pictures):,} pictures once, for all epochs: {store.folder}"
        console.print(told, style="dim")
    encode, training = encode_function(model), model.image.encoder.training
    model.image.encoder.eval()
    try:
        with Counter(new.count(rank), console) as counter:
            store.fill(
                pictures, encode, processor.image_processor, rank=rank, world=world, threads=threads,
                progress=counter.update, on_error=on_error,
            )  # fmt: skip
        if wait is not None and world > 1:
            wait()
            store.refresh()
            # Processes that share no disk see the others' share themselves.
            store.fill(pictures, encode, processor.image_processor, threads=threads, on_error=lambda e: None)
    finally:
        model.image.encoder.train(training)
    return store


def _falls_to(digest: str, world: int) -> int:
    """The process that sees a picture: told by its content, so that all agree whatever each has found on disk."""
    return int(digest[:8], 16) % world


def _bytes_each(features: Features) -> int:
    """What one picture takes on disk, its digest in the file's header included."""
    return features.tokens_BND[0].nbytes + features.mask_BN[0].nbytes + 80
