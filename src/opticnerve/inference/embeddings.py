"""Pictures and texts as vectors of one space, on the model's device and in files that search engines take."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from opticnerve.common import atomic
from opticnerve.data.media.images import Source
from opticnerve.data.media.transform import open_for
from opticnerve.inference.load import load_any
from opticnerve.models.checkpoint.source import resolve
from opticnerve.models.dual_encoder.modeling import DualEncoder
from opticnerve.models.dual_encoder.processing import DualEncoderProcessor
from opticnerve.models.family import family_of
from opticnerve.types import OpticNerveError, to_install

Vectors = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]
"""Called with (done, total)."""


def load_dual_encoder(
    name: str | Path, *, device: str | None = None, trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """A `DualEncoder` in `eval()` and its processor; `name` as for `load_any`."""
    folder = resolve(str(name))
    if family_of(folder).MODEL is not DualEncoder:
        raise OpticNerveError(
            f"{name} holds no dual encoder; train one with `opticnerve train starter-contrastive`", kind="unsupported"
        )
    return load_any(folder, device=device, trust_remote_code=trust_remote_code)


class Embedder:
    """A `DualEncoder` with its processor: (N, D) float32 vectors of length 1, so that a dot product is the cosine.

    Args: model, processor: as from `load_dual_encoder`. batch_size: pictures or texts that go through at a time.
    """

    def __init__(self, model: DualEncoder, processor: DualEncoderProcessor, *, batch_size: int = 64) -> None:
        self.model, self.processor, self.batch_size = model, processor, batch_size

    @property
    def logit_scale(self) -> float:
        """What the model multiplies cosines by."""
        return float(self.model.logit_scale.detach().float().exp())

    def images(self, sources: Sequence[Source], *, progress: Progress | None = None) -> Vectors:
        """Pictures: files, bytes, or opened ones."""

        def embed(part: Sequence[Source]) -> Tensor:
            opened = [open_for(self.processor.image_processor, s) for s in part]
            pixels = self.processor(images=opened, return_tensors="pt")["pixel_values"]
            return self.model.get_image_features(pixels.to(self.model.device))

        return self._all(sources, embed, "picture", progress)

    def texts(self, texts: Sequence[str], *, progress: Progress | None = None) -> Vectors:
        """Texts; those longer than the processor's `max_length` are cut."""

        def embed(part: Sequence[str]) -> Tensor:
            batch = self.processor(text=list(part), return_tensors="pt").to(self.model.device)
            return self.model.get_text_features(batch["input_ids"], batch.get("attention_mask"))

        return self._all(texts, embed, "text", progress)

    def _all(
        self, items: Sequence[Any], embed: Callable[[Any], Tensor], what: str, progress: Progress | None
    ) -> Vectors:
        if not items:
            raise OpticNerveError(f"there is no {what} to embed: the list is empty", kind="empty")
        found = []
        with torch.inference_mode():
            for start in range(0, len(items), self.batch_size):
                vectors_BD = embed(items[start : start + self.batch_size])
                found.append(F.normalize(vectors_BD.float(), dim=1).cpu().numpy())
                if progress is not None:
                    progress(min(start + self.batch_size, len(items)), len(items))
        return np.concatenate(found)


def save_embeddings(
    folder: Path, name: str, vectors: Vectors, ids: Sequence[str], *, faiss_index: bool = False
) -> dict[str, Path]:
    """Write vectors and what they are of.

    `NAME.npy`: (N, D), float32, C-contiguous, each of length 1: what Faiss's `index.add(numpy.load(file))` takes as it
    is, with inner product for cosine. `NAME.ids.jsonl`: `{"row": 0, "id": …}`, a line for each row. With `faiss_index`
    also `NAME.faiss`, an exact `IndexFlatIP` that `faiss.read_index` reads.

    Raises:
        OpticNerveError: numbers of vectors and ids differ, an id occurs twice, a vector is zero or not finite, or
            faiss is wanted and not installed.
    """
    if vectors.ndim != 2 or len(vectors) != len(ids):
        raise OpticNerveError(
            f"vectors of shape {vectors.shape} for {len(ids)} ids; give one row for each id", kind="wrong-shape"
        )
    commonest, times = Counter(ids).most_common(1)[0] if ids else ("", 0)
    if times > 1:
        raise OpticNerveError(
            f"the id {commonest!r} occurs {times} times; search results are told apart by it", kind="conflict"
        )
    lengths_N = np.linalg.norm(vectors.astype(np.float32), axis=1)
    if not np.isfinite(lengths_N).all() or not (lengths_N > 0).all():
        bad = int(np.flatnonzero(~(np.isfinite(lengths_N) & (lengths_N > 0)))[0])
        raise OpticNerveError(
            f"the vector of {ids[bad]!r} has length {lengths_N[bad]}: it points nowhere", kind="out-of-range"
        )
    ready_ND = np.ascontiguousarray(vectors / lengths_N[:, None], dtype=np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    written = {"vectors": folder / f"{name}.npy", "ids": folder / f"{name}.ids.jsonl"}
    vectors_file = io.BytesIO()
    np.save(vectors_file, ready_ND)
    atomic.write(written["vectors"], vectors_file.getvalue())
    atomic.write_lines(written["ids"], ({"row": row, "id": i} for row, i in enumerate(ids)), ensure_ascii=False)
    if faiss_index:
        written["index"] = folder / f"{name}.faiss"
        atomic.write(written["index"], _faiss_index(ready_ND))
    return written


def _faiss_index(ready_ND: Vectors) -> bytes:
    try:
        import faiss
    except ImportError as e:
        raise OpticNerveError(
            f"a Faiss index needs faiss: {to_install('faiss-cpu')}, or leave the index out", kind="not-installed"
        ) from e
    index = faiss.IndexFlatIP(ready_ND.shape[1])
    index.add(ready_ND)
    return bytes(faiss.serialize_index(index))
