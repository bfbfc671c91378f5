"""Tiles that are read one by one, against InternVL's and Idefics3's own processors: counts, pixels, words."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import refused
from opticnerve.models.vlm.splitting import PictureWords, SplitLayout, split_layout
from opticnerve.models.vlm.tiling import Tiling

# Square, odd, very wide, very tall, tiny, one pixel.
SIZES = [(40, 40), (33, 71), (17, 640), (500, 13), (3, 5), (1, 1), (64, 64), (200, 301)]
COLOURS: dict[str, Any] = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}


def picture(height: int, width: int) -> PIL.Image.Image:
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def internvl(fewest: int = 1, most: int = 12) -> tuple[SplitLayout, Any]:
    layout = SplitLayout(32, 4, "internvl", fewest, most)
    theirs = tf.GotOcr2ImageProcessor(
        size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=fewest, max_patches=most, **COLOURS
    )
    return layout, theirs


def idefics3(longest: int | None = 128, split: bool = True) -> tuple[SplitLayout, Any]:
    layout = SplitLayout(32, 4, "idefics3", longest_side=longest, split=split)
    theirs = tf.Idefics3ImageProcessor(
        do_resize=longest is not None, size={"longest_edge": longest or 1}, max_image_size={"longest_edge": 32},
        do_image_splitting=split, **COLOURS,
    )  # fmt: skip
    return layout, theirs


@given(height=st.integers(1, 4000), width=st.integers(1, 4000), most=st.integers(1, 12), fewest=st.integers(1, 3))
def test_tiles_are_counted_as_internvl_counts_them(height: int, width: int, most: int, fewest: int) -> None:
    layout, theirs = internvl(min(fewest, most), most)
    expected = theirs.get_number_of_image_patches(height, width)
    assert layout.num_pieces(height, width) == expected
    assert layout.num_tokens(height, width) == 4 * expected <= layout.max_tokens


@settings(max_examples=40)
@given(height=st.integers(1, 300), width=st.integers(1, 300), longest=st.sampled_from([32, 96, 150, None]))
def test_tiles_are_counted_as_idefics3_makes_them(height: int, width: int, longest: int | None) -> None:
    layout, theirs = idefics3(longest)
    made = theirs([[picture(height, width)]], return_tensors="pt", return_row_col_info=True)
    rows, columns = made["rows"][0][0], made["cols"][0][0]
    assert layout.shape(height, width) == (rows or 1, columns or 1)
    assert layout.num_pieces(height, width) == made["pixel_values"].shape[1]
    if longest:
        assert layout.num_tokens(height, width) <= layout.max_tokens


@pytest.mark.parametrize("make", [internvl, lambda: internvl(2, 5)])
def test_internvls_pixels(make: Any) -> None:
    layout, theirs = make()
    pictures = [picture(*size) for size in SIZES]
    ours = layout.image_processor(**COLOURS)(pictures, return_tensors="pt")
    expected = theirs(pictures, return_tensors="pt")
    torch.testing.assert_close(ours["pixel_values"], expected["pixel_values"], rtol=0, atol=1e-6)
    assert ours["image_sizes"].tolist() == [list(size) for size in SIZES]
    assert len(ours["pixel_values"]) == sum(layout.num_pieces(*size) for size in SIZES)


@pytest.mark.parametrize("make", [idefics3, lambda: idefics3(None), lambda: idefics3(96, split=False)])
def test_idefics3s_pixels(make: Any) -> None:
    layout, theirs = make()
    for size in SIZES:
        ours = layout.image_processor(resample=theirs.resample, **COLOURS)([picture(*size)], return_tensors="pt")
        expected = theirs([[picture(*size)]], return_tensors="pt")
        torch.testing.assert_close(ours["pixel_values"], expected["pixel_values"][0], rtol=0, atol=1e-6)


def test_a_side_is_never_longer_than_idefics3s_longest() -> None:
    assert SplitLayout(364, 1, "idefics3", longest_side=8000).first_size(100, 200) == (2048, 4096)
    assert SplitLayout(364, 1, "idefics3", longest_side=8000).first_size(200, 100) == (4096, 2048)


def test_words_stand_around_tiles_and_around_the_whole() -> None:
    words = PictureWords("<", "[{row},{column}]", ";", "T", "A", ">")
    layout = SplitLayout(32, 2, "internvl", max_tiles=4)
    assert layout.shape(64, 32) == (2, 1)
    assert words.write("x", layout, 64, 32, 6) == "<[1,1]xx;[2,1]xx;Txx>"
    assert words.write("x", layout, 20, 20, 2) == "<Axx>"
    assert words.write("x", None, 0, 0, 3) == "<Axxx>"


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"type": "internvl", "max_tiles": 0}, ("out-of-range", 1, 0)),
        ({"type": "internvl", "min_tiles": 4, "max_tiles": 3}, ("out-of-range", 4, 3)),
        ({"type": "idefics3", "longest_side": -1}, ("out-of-range", -1)),
        ({"type": "idefics3", "max_tiles": 3}, ("unknown-key", "idefics3", "max_tiles", "longest_side")),
        ({"type": "internvl", "pinpoints": [[32, 32]]}, ("unknown-key", "internvl", "pinpoints")),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], refusal: tuple[Any, ...]) -> None:
    with refused(*refusal):
        split_layout(options, tile_size=32, tile_tokens=4)


@pytest.mark.parametrize("make", [internvl, idefics3])
def test_a_tiling_is_built_again_from_its_options(make: Any) -> None:
    layout, _ = make()
    ends: dict[str, Any] = {"tile_size": 32, "language_width": 8}
    made = Tiling.from_options(layout.options, tile_tokens=4, grid=None, **ends)
    assert made.spec == layout
    assert made.newline is None
    assert Tiling.from_options(layout.options, grid=2, **ends).spec == layout
    with refused("missing-field", "tile_tokens"):
        Tiling.from_options(layout.options, grid=None, **ends)
