"""`/v1/embeddings` of a dual encoder: texts, and pictures as data URLs, as vectors of one space."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from opticnerve.inference.embeddings import Embedder
from opticnerve.models.dual_encoder.modeling import DualEncoder
from opticnerve.models.dual_encoder.processing import DualEncoderProcessor
from opticnerve.serve.errors import ApiError
from opticnerve.serve.limits import Metrics, ServerLimits
from opticnerve.serve.media import MediaOpener, MediaSources
from opticnerve.serve.replies import Embedding, EmbeddingList, EmbeddingUsage
from opticnerve.serve.schema import EmbeddingRequest


class EmbeddingMaker:
    """Makes vectors, one request at a time.

    Args:
        model, processor: as from `load_dual_encoder`. sources: where pictures may come from. limits: of the server.
        metrics: what is counted.

    `pool`: the one thread that may call `make`. `longest`: tokens of a text.
    """

    def __init__(
        self,
        model: DualEncoder,
        processor: DualEncoderProcessor,
        sources: MediaSources,
        limits: ServerLimits,
        metrics: Metrics,
    ) -> None:
        self.embedder, self.processor = Embedder(model, processor), processor
        self.sources, self.limits, self.metrics = sources, limits, metrics
        self.longest = int(processor.max_length)
        self.pool = ThreadPoolExecutor(1, "model")

    def make(self, asked: EmbeddingRequest) -> EmbeddingList:
        """The vectors of a request. Raises ApiError: 400: a text that is too long, a picture that cannot be had."""
        inputs = [asked.input] if isinstance(asked.input, str) else asked.input
        param = "input" if isinstance(asked.input, str) else "input.{}"
        pictures = [i for i, text in enumerate(inputs) if text[:5].lower() == "data:"]
        texts = [i for i in range(len(inputs)) if i not in {*pictures}]
        opener = MediaOpener(self.processor, self.sources, self.limits)
        opened = [opener.image(inputs[i], param.format(i)) for i in pictures]
        tokens = self._tokens({param.format(i): inputs[i] for i in texts})
        found: dict[int, npt.NDArray[np.float32]] = {}
        if texts:
            found |= zip(texts, self.embedder.texts([inputs[i] for i in texts]), strict=True)
        if pictures:
            found |= zip(pictures, self.embedder.images(opened), strict=True)
        size = len(found[0])
        if asked.dimensions not in (None, size):
            raise ApiError(
                400, f"dimensions is {asked.dimensions}; this model's vectors have {size}", param="dimensions"
            )
        self.metrics.prompt_tokens.inc(tokens)
        data = [Embedding(index=i, embedding=_written(found[i], asked.encoding_format)) for i in range(len(inputs))]
        usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
        return EmbeddingList(data=data, model=asked.model, usage=usage)

    def _tokens(self, texts: dict[str, str]) -> int:
        """How many tokens the texts have, by the field that each stands in."""
        total = 0
        encoded = self.processor.tokenizer([*texts.values()], verbose=False)["input_ids"] if texts else []
        for param, ids in zip(texts, encoded, strict=True):
            if len(ids) > self.longest:
                raise ApiError(
                    400, f"{param} has {len(ids):,} tokens, more than the {self.longest:,} that the text encoder "
                    "reads; shorten it", param=param, code="context_length_exceeded",
                )  # fmt: skip
            total += len(ids)
        return total


def _written(vector_D: npt.NDArray[np.float32], form: str | None) -> list[float] | str:
    """As the client wants it: numbers, or the bytes of little-endian float32 in base64."""
    if form == "base64":
        return base64.b64encode(vector_D.astype("<f4").tobytes()).decode()
    return [float(x) for x in vector_D]
