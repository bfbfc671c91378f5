"""dual(): an eye and a text encoder make a `DualEncoder` with its processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from opticnerve.build import Spec, load_encoder
from opticnerve.build import _vision_spec as vision_spec
from opticnerve.encoders.pooling import EyePooling
from opticnerve.encoders.text import HFTextEncoder, text_encoders
from opticnerve.language.load import hub_files, load_language
from opticnerve.models.dual_encoder import DualEncoder
from opticnerve.models.dual_processing import DualEncoderProcessor
from opticnerve.models.tower import check_options
from opticnerve.starter import minilm
from opticnerve.starter import weights as starter
from opticnerve.starter.cache import fingerprint
from opticnerve.types import OpticNerveError


@dataclass
class DualDock:
    """A `DualEncoder`, its processor, and the references to the weights it was made of."""

    model: DualEncoder
    processor: DualEncoderProcessor
    bases: dict[str, Any]

    def __iter__(self) -> Any:
        """So that `model, processor = dual(…)` reads as one expects."""
        return iter((self.model, self.processor))


def dual(
    image: Spec,
    text: Spec = minilm.NAME,
    *,
    pooling: EyePooling = "mean",
    projection_dim: int | None = 512,
    image_projection: dict[str, Any] | bool = True,
    text_projection: dict[str, Any] | bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int | None = 0,
    **options: Any,
) -> DualDock:
    """Put an eye and a text encoder into one space, with fresh projections.

    Args:
        image: as for `dock`'s `vision`. text: a hub name, local folder or starter name of a BERT, of CLIP's or SigLIP's
            text model, or of a causal language model (GGUF files, too); or a mapping such as
            `{"name": …, "pooling": "mean", "max_length": 32}`.
        pooling, projection_dim, image_projection, text_projection, options: see `DualEncoder.from_parts`.
        dtype: of the weights in memory. seed: for the projections; None leaves torch's generator alone.
    """
    eye_name, eye = load_encoder("image", vision_spec(image))
    reader_name, reader = load_text_encoder({"name": text} if isinstance(text, str) else text)
    if seed is not None:
        torch.manual_seed(seed)
    model = DualEncoder.from_parts(
        eye, reader, pooling=pooling, projection_dim=projection_dim, image_projection=image_projection,
        text_projection=text_projection, **options,
    )  # fmt: skip
    processor = DualEncoderProcessor(
        eye.image_processor(), reader.tokenizer, max_length=reader.max_length, padding=reader.padding
    )
    bases = {"image": _base(eye_name, eye), "text": _base(reader_name, reader)}
    return DualDock(model.to(dtype), processor, bases)  # type: ignore[arg-type]


def load_text_encoder(spec: dict[str, Any]) -> tuple[str, Any]:
    """The name of the weights and the text encoder that holds them, with its tokenizer."""
    options = dict(spec)
    kind, name = options.pop("type", "hf_text"), options.pop("name", None)
    if name is None:
        raise OpticNerveError("the text encoder needs a name: a hub name, a local folder, or starter/…")
    cls = text_encoders.get(kind)
    check_options("text encoder", kind, cls, options)
    language = starter.is_starter(name) and name in starter.LANGUAGES
    if cls is HFTextEncoder and (language or name.endswith(".gguf")):
        brain = load_language(name)
        encoder = cls.from_loaded(brain.model, brain.tokenizer, **options)
        encoder.files = list(brain.files)
        return name, encoder
    return name, cls.from_pretrained(name, **options)


def _base(name: Any, encoder: Any) -> dict[str, Any]:
    """How the weights are called, and the hash of their files."""
    files = encoder.weight_files()
    if not files and isinstance(name, str) and not starter.is_starter(name):
        files = hub_files(name.removeprefix("hf-hub:"))
    return {"name": name, "sha256": fingerprint(files) if files else None}
