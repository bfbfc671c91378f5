"""No encoder at all: pixels, cut into patches, go straight to the connector and into the language model.

Source: Bavishi et al. 2023, Fuyu-8B (https://www.adept.ai/blog/fuyu-8b): "image patches are linearly projected into
the first layer of the transformer". With the connector `linear` and the fusion `splice` this is early fusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from opticnerve.encoders.base import Encoder, all_real
from opticnerve.encoders.native import Grid, NativeLayout, collect, cut_patches, of_pictures
from opticnerve.types import Features, OpticNerveError


class PatchesEncoder(Encoder):
    """Normalised pixels as tokens; there are no weights, pretrained or other.

    A token is one patch: its rows from top to bottom, in a row its pixels from left to right, of a pixel red, green
    and blue (the order of `FuyuImageProcessor.patchify_image`). Tokens come in raster order. Fuyu takes pictures of any
    size and writes a newline token behind each row of patches; here there is none.

    Args:
        image_size: side of the square picture in pixels.
        patch_size: side of a patch in pixels (30 in Fuyu); `image_size` must be a multiple of it.
        fit: how a picture is made square: "squash", "crop" or "pad"; or "native", which keeps its shape (Fuyu's way but
            for the newlines): `image_size` then says nothing.
        min_patches, max_patches: the budget of `fit: native`, see `NativeLayout`; 1 and 256 by default.
        mean, std: normalisation per channel (0.5 each in Fuyu).
    """

    needs_name: ClassVar[bool] = False

    def __init__(
        self, *, image_size: int = 240, patch_size: int = 30, fit: str = "squash", mean: list[float] | None = None,
        std: list[float] | None = None, min_patches: int | None = None, max_patches: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if patch_size < 1 or image_size < 1 or image_size % patch_size:
            raise OpticNerveError(
                f"pictures of {image_size} px do not divide into patches of {patch_size} px; "
                f"image_size must be a multiple of patch_size",
                kind="wrong-shape",
            )
        self.take_pictures(image_size, fit, mean, std)
        self.patch_size = patch_size
        budget = self.take_budget(fit, min_patches, max_patches, NativeLayout(patch_size, 1, 256))
        self.num_tokens = (image_size // patch_size) ** 2 if self.native is None else self.native.max_tokens
        self.hidden_size = 3 * patch_size**2
        self.options = {
            "image_size": image_size, "patch_size": patch_size, "fit": fit, "mean": self.mean, "std": self.std,
            **budget,
        }  # fmt: skip

    @classmethod
    def from_pretrained(cls, name: None = None, **options: Any) -> PatchesEncoder:
        """`name` must be None: patches have no weights."""
        if name is not None:
            raise OpticNerveError(f"patches have no weights to load; remove the name {name!r}", kind="conflict")
        return cls(**options)

    @classmethod
    def planned(cls, name: None = None, **options: Any) -> PatchesEncoder:
        return cls.from_pretrained(name, **options)

    def forward(self, pixel_values: Tensor, grids: Sequence[Grid] = ()) -> Features:
        if self.native is not None:
            return collect(of_pictures(pixel_values, grids), grids)
        return all_real(cut_patches(pixel_values, self.patch_size))

    def blocks(self) -> list[nn.Module]:
        """None: there is nothing to train in it."""
        return []
