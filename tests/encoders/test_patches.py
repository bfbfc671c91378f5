"""Raw patches: counted out by hand, and in the order of Fuyu's image processor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

import tiny
from errors import refused
from opticnerve.encoders.base import last_blocks
from opticnerve.encoders.patches import PatchesEncoder


def numbered(side: int) -> torch.Tensor:
    """(1, 3, side, side): channel c at row y, column x holds c·100 + y·10 + x."""
    c, y, x = torch.meshgrid(torch.arange(3), torch.arange(side), torch.arange(side), indexing="ij")
    return (c * 100 + y * 10 + x)[None].float()


def test_by_hand() -> None:
    features = PatchesEncoder(image_size=4, patch_size=2)(numbered(4))
    # Pixel after pixel, red green blue of each; patches from left to right, then the next row of them.
    assert features.tokens_BND.tolist() == [
        [
            [0, 100, 200, 1, 101, 201, 10, 110, 210, 11, 111, 211],
            [2, 102, 202, 3, 103, 203, 12, 112, 212, 13, 113, 213],
            [20, 120, 220, 21, 121, 221, 30, 130, 230, 31, 131, 231],
            [22, 122, 222, 23, 123, 223, 32, 132, 232, 33, 133, 233],
        ]
    ]
    assert features.mask_BN.all() and features.mask_BN.shape == (1, 4)


@pytest.mark.parametrize("patch_size", [2, 3, 6])
def test_as_fuyu_cuts_them(patch_size: int) -> None:
    pixels = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    theirs = tf.FuyuImageProcessor().patchify_image(pixels, patch_size=tf.image_utils.SizeDict(height=patch_size, width=patch_size))  # fmt: skip
    encoder = PatchesEncoder(image_size=6, patch_size=patch_size)
    assert torch.equal(encoder(pixels).tokens_BND, theirs)
    assert theirs.shape[1:] == (encoder.num_tokens, encoder.hidden_size)


def test_fuyus_pixels_too() -> None:
    """A square picture of the right size: the numbers that Fuyu's own processor hands to its language model."""
    size = {"height": 60, "width": 60}
    theirs = tf.FuyuImageProcessor(size=size)([tiny.picture(1, 60)], return_tensors="pt")
    cut = tf.FuyuImageProcessor().patchify_image(torch.as_tensor(theirs["images"][0][0])[None])
    encoder = PatchesEncoder(image_size=60, patch_size=30)
    pixels = encoder.image_processor()([tiny.picture(1, 60)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(encoder(pixels).tokens_BND, cut, atol=1e-6, rtol=0)


def test_there_are_no_weights_to_name_or_train() -> None:
    encoder = PatchesEncoder.from_pretrained(None, image_size=32, patch_size=8)
    assert (encoder.num_tokens, encoder.hidden_size, encoder.media_shape) == (16, 192, (3, 32, 32))
    assert not list(encoder.parameters()) and not list(encoder.buffers()) and not encoder.weight_files()
    assert PatchesEncoder.take_name({"patch_size": 8}) == (None, {"patch_size": 8})
    assert PatchesEncoder.planned(None, **PatchesEncoder.loading_options(encoder.options)).options == encoder.options
    with refused("out-of-range", "0 blocks"):
        last_blocks(encoder, 1)
    with refused("conflict", "'fuyu'"):
        PatchesEncoder.from_pretrained("fuyu")


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
def test_pictures_of_any_shape(fit: str) -> None:
    encoder = PatchesEncoder(image_size=48, patch_size=16, fit=fit, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    pixels = encoder.image_processor()([tiny.picture(1).resize((90, 30))], return_tensors="pt")["pixel_values"]
    assert encoder(pixels).tokens_BND.shape == (1, 9, 768)
    assert PatchesEncoder(**encoder.options).image_processor().to_dict() == encoder.image_processor().to_dict()


@pytest.mark.parametrize(("image_size", "patch_size"), [(224, 30), (8, 0), (0, 8), (8, 16)])
def test_sizes_that_do_not_divide(image_size: int, patch_size: int) -> None:
    with refused("wrong-shape", image_size, patch_size):
        PatchesEncoder(image_size=image_size, patch_size=patch_size)


def test_early_fusion_trains_and_answers(docked: Any) -> None:
    """Docked without any encoder: pixels, one matrix, and the language model."""
    model, processor = docked("llama", {"type": "patches", "image_size": 32, "patch_size": 8}, connector="linear")
    assert model.image.num_tokens == 16
    from opticnerve.inference.generate import Answerer
    from opticnerve.types import ask

    batch = Answerer(model, processor).inputs([ask("q", tiny.picture(1)), ask("q", tiny.picture(2))])
    out = model(**batch)
    out.logits.float().pow(2).mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.image.connector.parameters())
    assert not torch.allclose(out.logits[0], out.logits[1])
