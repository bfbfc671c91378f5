"""A small convolutional eye, with its weights in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opticnerve.encoders.base import Encoder, make_image_processor
from opticnerve.types import Features, OpticNerveError


class ConvStemEncoder(Encoder):
    """Convolutions with stride 2, each halving the map: the stem that Xiao et al. 2021 (Early Convolutions Help
    Transformers See Better, section 4) put before a transformer.

    Args:
        width: channels of the last convolution, and so the width of a token; each one before has half as many.
        depth: number of convolutions.
        image_size: side of the square picture in pixels, a multiple of 2 to the power of `depth`.
    """

    def __init__(self, *, width: int = 64, depth: int = 4, image_size: int = 64) -> None:
        super().__init__()
        if image_size % 2**depth:
            raise OpticNerveError(
                f"image_size {image_size} cannot be halved {depth} times; take a multiple of {2**depth}"
            )
        self.image_size, self.hidden_size = image_size, width
        self.num_tokens = (image_size // 2**depth) ** 2
        widths = [3, *(max(width // 2**i, 8) for i in reversed(range(1, depth))), width]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, kernel_size=3, stride=2, padding=1), nn.GELU())
            for a, b in zip(widths, widths[1:], strict=False)
        )
        # What builds this module again with random weights: it goes into the docked model's config.json.
        self.options = {"width": width, "depth": depth, "image_size": image_size}

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> ConvStemEncoder:
        """`name`: a folder that `save` wrote."""
        encoder = cls.planned(name, **options)
        file = Path(name) / "model.safetensors"
        encoder.load_state_dict(load_file(file))
        encoder.files = [str(file)]  # a run remembers their hashes, and refuses others
        return encoder

    @classmethod
    def planned(cls, name: str, **options: Any) -> ConvStemEncoder:
        """The same without its weights: `opticnerve plan` counts it."""
        file = Path(name) / "config.json"
        if not file.is_file():
            raise OpticNerveError(f"{name!r} is no folder with a conv stem: it has no config.json")
        return cls(**{**json.loads(file.read_text(encoding="utf-8")), **options})

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.options), encoding="utf-8")
        save_file(self.state_dict(), folder / "model.safetensors")

    def forward(self, media: Tensor) -> Features:
        """(B, 3, image_size, image_size) → `Features` (B, num_tokens, width), row by row from the top left."""
        for layer in self.layers:
            media = layer(media)
        tokens_BND = media.flatten(2).transpose(1, 2)
        return Features(tokens_BND, torch.ones(tokens_BND.shape[:2], dtype=torch.bool, device=tokens_BND.device))

    def image_processor(self) -> Any:
        return make_image_processor(size=self.image_size, mean=[0.5] * 3, std=[0.5] * 3)

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)
