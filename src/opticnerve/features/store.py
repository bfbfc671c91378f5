"""What a frozen vision encoder saw, computed once and kept on disk for all epochs, stages, connectors and recipes.

A folder belongs to one vision encoder: its name is a hash of the encoder's weights, its options, and how pictures are
prepared for it. In it, shards of safetensors hold the features of some hundreds of pictures, found by the pictures'
content; they are written beside and renamed, so that a process that is killed leaves none half written, and several
processes may write at once. Features keep the encoder's own dtype, unless half of it is asked for: training on them is
training on the live encoder. A budget bounds the disk that all vision encoders' features take (`features.budget`).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

from opticnerve.common.progress import Counting
from opticnerve.data.media.images import Source
from opticnerve.data.media.transform import DECODING, open_for, pixels
from opticnerve.encoders.native import join_features
from opticnerve.features import shards
from opticnerve.features.budget import default_budget, evict, features_dir, hold
from opticnerve.features.digests import Digests
from opticnerve.language.load import tensor_fingerprint
from opticnerve.types import DataError, Features, MediaProcessor

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

    from opticnerve.models.family import FamilyModel

BATCH = 32
Named = tuple[str, Source, str]  # a picture's digest, the picture, the sample that shows it
OnError = Callable[[DataError], None]
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
        self, folder: Path, *, dtype: torch.dtype | None = None, stored: torch.dtype | None = None,
        budget: int | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.dtype, self.stored, self.budget = folder, dtype, stored, budget
        self._mark: Any = hold(folder)
        weakref.finalize(self, self._mark.close)
        self._digests = Digests(folder.parent / "digests.sqlite")
        self._reader = shards.ShardReader()
        self._places: dict[str, tuple[shards.Shard, int]] = {}
        self._listed: set[Path] = set()
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
        for path in sorted(set(self.folder.glob("*.safetensors")) - self._listed):
            self._list(path)

    def digest(self, source: Source, where: str = "") -> str:
        """What a picture is found by: a hash of its content, which is read once."""
        return self._digests(source, where)

    def check(self, source: Source, where: str) -> tuple[shards.Shard, int]:
        """Where a picture's features lie.

        Raises:
            DataError: it is not in the store, because it was never seen or could not be opened.
        """
        place = self._places.get(self.digest(source, where))
        if place is None:
            raise DataError(
                f"this picture is not in the feature cache {self.folder}", where=where, kind="unreadable-image",
                remedy="see whether it can be opened: `opticnerve data check`",
            )  # fmt: skip
        return place

    def rows(self, sources: Sequence[Source], where: Sequence[str]) -> Features:
        """The features of pictures, in their order: (pictures, N, D).

        Raises:
            DataError: one of them is not in the store; `where` names its sample.
        """
        found = self._reader.read([self.check(s, w) for s, w in zip(sources, where, strict=True)])
        return replace(found, tokens_BND=found.tokens_BND.to(self.dtype or found.tokens_BND.dtype))

    def missing(self, pictures: Sequence[tuple[Source, str]], *, on_error: OnError | None = None) -> list[Named]:
        """The pictures that are not in the store, each content once.

        Raises:
            DataError: a picture cannot be read, and there is no `on_error` to take it.
        """
        wanted: dict[str, Named] = {}
        for (source, where), digest in zip(pictures, self._digests.of(pictures), strict=True):
            if isinstance(digest, str):
                if digest not in self._places:
                    wanted.setdefault(digest, (digest, source, where))
            elif on_error is None:
                raise digest
            else:
                on_error(digest)
        return list(wanted.values())

    def fill(
        self, pictures: Sequence[tuple[Source, str]], encode: Callable[..., Features],
        image_processor: BaseImageProcessor, *, missing: Sequence[Named] | None = None, rank: int = 0, world: int = 1,
        threads: int | None = None, progress: Callable[[int], None] | None = None, on_error: OnError | None = None,
    ) -> int:  # fmt: skip
        """See the pictures that are not there yet; returns how many these were.

        Whatever ends it, Ctrl-C included, keeps the shards that are whole.

        Args:
            pictures: each with the sample that shows it. missing: which of them are, where that is known.
            encode: pixels (B, 3, H, W), and the pictures' sizes where they count → `Features`.
            rank, world: this process and how many share the work; each takes the pictures whose hash falls to it.
            progress: is told how many of this process's pictures are seen.

        Raises:
            DataError: a picture cannot be opened, and there is no `on_error` to take it.
            OpticNerveError: what the vision encoder sees does not fit into the budget, which shows after the first
                batch; or it cannot be written.
        """
        missing = self.missing(pictures, on_error=on_error) if missing is None else missing
        mine = [p for p in missing if _falls_to(p[0], world) == rank]
        digests: list[str] = []
        parts: list[Features] = []
        room, done = 0, 0
        for names, features in extract(mine, encode, image_processor, threads=threads, on_error=on_error):
            features = replace(features, tokens_BND=features.tokens_BND.to(self.stored or features.tokens_BND.dtype))
            if not room:
                each = _bytes_each(features)
                room = max(1, min(_SHARD_PICTURES, SHARD_BYTES // each))
                self.refresh()  # others may have begun
                self._make_room(each * sum(d not in self._places for d, *_ in missing))
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
        whole = join_features(parts)
        self._make_room(len(digests) * _bytes_each(whole))  # others may have written meanwhile
        self._list(shards.write(self.folder, digests, whole))

    def _make_room(self, needed: int) -> None:
        if self.budget is not None:
            evict(self.folder.parent, self.folder, needed, self.budget)

    def _list(self, path: Path) -> None:
        shard, digests = shards.describe(path)
        self._listed.add(path)
        self._places |= {d: (shard, row) for row, d in enumerate(digests)}


# -- showing pictures to the encoder ----------------------------------------------------------------------------------


def extract(
    pictures: Sequence[Named], encode: Callable[..., Features], image_processor: BaseImageProcessor, *,
    threads: int | None = None, on_error: OnError | None = None,
) -> Iterator[tuple[list[str], Features]]:  # fmt: skip
    """Batch by batch the digests of pictures and what the vision encoder sees of them, on the CPU.

    At most two batches a thread wait, so that memory stays flat.

    Args:
        encode: pixels (B, 3, H, W), and the pictures' sizes where they count → `Features`.
        threads: default: a thread for each core, four at most.
        on_error: takes what is wrong with a picture, which is then left out.

    Raises:
        DataError: a picture cannot be opened, and there is no `on_error`.
    """
    threads = threads or min(4, os.cpu_count() or 1)

    def prepare(part: Sequence[Named]) -> tuple[list[str], dict[str, Tensor] | None, list[DataError]]:
        digests, opened, bad = [], [], []
        for digest, source, where in part:
            try:
                opened.append(open_for(image_processor, source, where=where))
                digests.append(digest)
            except DataError as e:
                bad.append(e)
        return digests, pixels(image_processor, opened) if opened else None, bad

    pool = ThreadPoolExecutor(threads, thread_name_prefix="pictures")
    ahead = (pool.submit(prepare, pictures[i : i + BATCH]) for i in range(0, len(pictures), BATCH))
    try:
        waiting = deque(islice(ahead, 2 * threads))
        while waiting:
            digests, media, bad = waiting.popleft().result()
            waiting.extend(islice(ahead, 1))
            for error in bad:
                if on_error is None:
                    raise error
                on_error(error)
            if media is not None:
                with torch.inference_mode():
                    features = encode(*media.values())
                yield digests, replace(features, tokens_BND=features.tokens_BND.cpu(), mask_BN=features.mask_BN.cpu())
    finally:
        pool.shutdown(cancel_futures=True)


class Counter(Counting):
    """How many pictures are seen, how fast, and the time left."""

    def __init__(self, total: int, console: Console | None, *, every_s: float = 10.0) -> None:
        super().__init__("pictures", total, "{task.fields[speed]}", console=console, every_s=every_s, speed="")
        self.last = self.began

    def update(self, done: int) -> None:
        now = time.perf_counter()
        rate = done / max(now - self.began, 1e-9)
        if self.bar is not None:
            self.bar.update(self.task, completed=done, speed=f"{rate:.0f} a second")
        elif self.console is not None and self.due(now, done):
            left = f"{(self.total - done) / rate:.0f} s left"
            self.console.print(f"pictures: {done:,}/{self.total:,} seen  {rate:.0f} a second  {left}", highlight=False)


# -- a model's store --------------------------------------------------------------------------------------------------


def open_store(
    model: FamilyModel, processor: MediaProcessor, *, budget: int | None = None, stored: str | None = None
) -> FeatureStore:
    """The store of a model's frozen vision encoder, in `features` of opticnerve's cache.

    What is stored follows the model: tokens for a docked language model and a fusion classifier, one pooled vector for
    a dual encoder.

    Args:
        budget: bytes for all stores; see `features.budget.default_budget` for the default.
        stored: `bfloat16` to store features in that dtype, whatever the vision encoder's is; another store than
            without.
    """
    encoder = model.image.encoder
    name = hashlib.sha256(tensor_fingerprint(encoder.state_dict()).encode())
    prepared = {k: v for k, v in processor.image_processor.to_dict().items() if not k.startswith("_")}
    depends_on = {"encoder": encoder.options, "prepared": prepared, "pooling": getattr(model.image, "pooling", None),
            "decoding": DECODING}  # fmt: skip
    dtype = next((p.dtype for p in encoder.parameters() if p.is_floating_point()), None)
    stored_as = getattr(torch, stored) if stored else None
    if stored_as is not None and stored_as != dtype:
        depends_on["stored"] = stored
    name.update(json.dumps(depends_on, sort_keys=True, default=str).encode())
    root = features_dir()
    budget = default_budget(root) if budget is None else budget
    return FeatureStore(root / name.hexdigest()[:24], dtype=dtype, stored=stored_as, budget=budget)


def encode_function(model: FamilyModel) -> Callable[..., Features]:
    """Pixels (and sizes, where they count) → what the store holds, for a model of any family."""

    def encode(*media: Tensor) -> Features:
        features = model.image.encode(*media)
        if isinstance(features, Features):
            return features
        return Features(features[:, None], torch.ones(len(features), 1, dtype=torch.bool))

    return encode


def see_all(
    model: FamilyModel, processor: MediaProcessor, pictures: Sequence[tuple[Source, str]], *, budget: int | None = None,
    stored: str | None = None, rank: int = 0, world: int = 1, wait: Callable[[], None] | None = None,
    threads: int | None = None, on_error: OnError | None = None, console: Console | None = None,
) -> FeatureStore:  # fmt: skip
    """The store of the model's frozen vision encoder, with all of these pictures in it.

    Args:
        budget, stored: see `open_store`. rank, world: this process and how many share the work.
        wait: returns when all processes have called it.
        on_error: takes what is wrong with a picture, which is then left out; without it the first one is raised.

    Raises:
        DataError: a picture cannot be opened. OpticNerveError: the features do not fit into the budget.
    """
    store = open_store(model, processor, budget=budget, stored=stored)
    new = store.missing(pictures, on_error=on_error)
    console = console if new and rank == 0 else None
    if console is not None:
        line = f"seeing {len(new):,} of {len(pictures):,} pictures once, for all epochs: {store.folder}"
        console.print(line, style="dim")
    encode, training = encode_function(model), model.image.encoder.training
    model.image.encoder.eval()
    try:
        with Counter(sum(_falls_to(d, world) == rank for d, *_ in new), console) as counter:
            store.fill(
                pictures, encode, processor.image_processor, missing=new, rank=rank, world=world, threads=threads,
                progress=counter.update, on_error=on_error,
            )  # fmt: skip
        if wait is not None and world > 1:
            wait()
            store.refresh()
            # Processes that share no disk see the others' share themselves.
            left = [picture for picture in new if picture[0] not in store]
            store.fill(
                pictures, encode, processor.image_processor, missing=left, threads=threads, on_error=lambda e: None
            )
    finally:
        model.image.encoder.train(training)
    return store


def _falls_to(digest: str, world: int) -> int:
    """The process that sees a picture: told by its content, so that all agree whatever each has found on disk."""
    return int(digest[:8], 16) % world


def _bytes_each(features: Features) -> int:
    """What one picture takes on disk, its digest in the file's header included."""
    if features.grids is not None:  # of its own length each: the mean
        tokens = -(-int(features.mask_BN.sum()) // len(features.grids))
        return tokens * features.tokens_BND[0, 0].nbytes + 88
    return features.tokens_BND[0].nbytes + features.mask_BN[0].nbytes + 80
