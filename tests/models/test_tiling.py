"""High-resolution tiling: options, counts, the order of tokens, pictures to tiles."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st

from errors import refused
from opticnerve.models.vlm.tiling import NEWLINE, Tiling
from opticnerve.types import Features

SIZES = st.integers(1, 3000)


def tiling(*, grid: int | None = 4, width: int = 8, tile_tokens: int | None = None, **options: Any) -> Tiling:
    return Tiling.from_options(options, tile_size=32, grid=grid, language_width=width, tile_tokens=tile_tokens)


def tokens(tiles: int, per_tile: int, width: int = 8) -> Features:
    """Token t of tile i holds the number i · per_tile + t in every channel."""
    numbers = torch.arange(tiles * per_tile, dtype=torch.float32).reshape(tiles, per_tile, 1).expand(-1, -1, width)
    return Features(numbers, torch.ones(tiles, per_tile, dtype=torch.bool))


def test_pinpoints_are_llava_nexts_at_the_encoders_size() -> None:
    made = Tiling.from_options({}, tile_size=336, grid=24, language_width=4)
    assert made.options == {
        "pinpoints": tf.LlavaNextConfig().image_grid_pinpoints, "unpad": True, "newline": True, "thumbnail": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{}, {"unpad": False}, {"newline": False}, {"thumbnail": False, "pinpoints": [[32, 32], [96, 64]]}],
)
def test_options_build_the_same_tiling_again(options: dict[str, Any]) -> None:
    made = tiling(**options)
    again = tiling(**json.loads(json.dumps(made.options)))
    assert again.spec == made.spec
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in made.named_parameters()}


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"pinpoint": [[32, 32]]}, ("unknown-key", "pinpoint", "thumbnail")),
        ({"pinpoints": [[32, 40]]}, ("wrong-shape", "[32, 40]", 32, "[32, 32]")),
        ({"pinpoints": []}, ("empty", "tiling.pinpoints")),
        ({"pinpoints": [[32]]}, ("wrong-type", "tiling.pinpoints", "[height, width]")),
        ({"pinpoints": [[32, 64.0]]}, ("wrong-type", "tiling.pinpoints", "[height, width]")),
        ({"pinpoints": [[0, 32]]}, ("wrong-type", "tiling.pinpoints", "[height, width]")),
        ({"unpad": "no"}, ("wrong-type", "tiling.unpad", "'no'")),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], refusal: tuple[Any, ...]) -> None:
    with refused(*refusal):
        tiling(**options)


@pytest.mark.parametrize("flag", ["unpad", "newline"])
def test_what_needs_a_map_is_refused_without_one(flag: str) -> None:
    with refused("unsupported", f"tiling.{flag}"):
        tiling(grid=None, tile_tokens=5, **{flag: True})


def test_without_a_map_the_tiles_stand_one_after_the_other() -> None:
    made = tiling(grid=None, tile_tokens=5)
    assert not list(made.parameters())
    assert made.spec.layout(64, 64).tolist() == list(range(25))


def test_sizes_that_contradict_each_other_are_refused() -> None:
    with refused("wrong-shape", 5, 4):
        tiling(tile_tokens=5)
    with refused("missing-field", "tile_tokens"):
        tiling(grid=None)


def test_rows_of_the_canvas_are_read_across_tiles() -> None:
    made = tiling(grid=2, pinpoints=[[32, 64]])
    # Thumbnail 0-3, left tile 4-7, right tile 8-11.
    assert made.spec.layout(32, 64).tolist() == [0, 1, 2, 3, 4, 5, 8, 9, NEWLINE, 6, 7, 10, 11, NEWLINE]


def test_padding_is_left_out_only_on_request() -> None:
    wide, tall = (16, 64), (64, 16)
    made, whole = tiling(pinpoints=[[64, 64]]), tiling(pinpoints=[[64, 64]], unpad=False)
    assert made.count(*wide) == 16 + 2 * (8 + 1)
    assert made.count(*tall) == 16 + 8 * (2 + 1)
    assert whole.count(*wide) == whole.count(*tall) == 16 + 8 * (8 + 1)


def test_a_picture_as_thin_as_a_hair_is_still_seen() -> None:
    assert tiling().count(1, 2000) == 16  # LLaVA-NeXT's: the thumbnail alone
    assert tiling(thumbnail=False).count(1, 2000) > 0


@given(height=SIZES, width=SIZES, thumbnail=st.booleans(), newline=st.booleans(), unpad=st.booleans())
def test_every_token_is_read_at_most_once(height: int, width: int, **flags: bool) -> None:
    made = tiling(**flags)
    layout = made.spec.layout(height, width)
    read = layout[layout != NEWLINE]
    tiles = made.tiles(height, width)
    assert len(set(read.tolist())) == len(read) <= tiles * 16
    assert 0 < made.count(height, width) == len(layout) <= made.spec.max_tokens
    if not flags["unpad"]:
        assert set(read.tolist()) == set(range(tiles * 16))
    if flags["thumbnail"]:
        assert layout[:16].tolist() == list(range(16))


def test_pictures_of_a_batch_are_arranged_apart() -> None:
    made = tiling()
    sizes = [(40, 40), (10, 300), (64, 30)]
    tiles = [made.tiles(*s) for s in sizes]
    features = tokens(sum(tiles), 16)
    together = made.arrange(features, torch.tensor(sizes))
    lengths = [made.count(*s) for s in sizes]
    assert together.mask_BN.sum(1).tolist() == lengths
    assert together.tokens_BND.shape == (3, max(lengths), 8)
    assert bool((together.tokens_BND[~together.mask_BN] == 0).all())
    first = 0
    for row, size, count, length in zip(together.tokens_BND, sizes, tiles, lengths, strict=True):
        part = Features(features.tokens_BND[first : first + count], features.mask_BN[first : first + count])
        alone = made.arrange(part, [size])
        torch.testing.assert_close(alone.tokens_BND[0], row[:length], rtol=0, atol=0)
        first += count


def test_no_pictures_make_no_rows() -> None:
    none = tiling().arrange(tokens(0, 16), torch.zeros(0, 2, dtype=torch.long))
    assert none.tokens_BND.shape == (0, 0, 8)


def test_masked_tokens_stay_masked() -> None:
    made = tiling(grid=None, tile_tokens=3, pinpoints=[[32, 32]])
    features = tokens(2, 3)
    features.mask_BN[1, 2] = False
    assert made.arrange(features, [(9, 9)]).mask_BN.tolist() == [[True] * 5 + [False]]


def test_tiles_that_do_not_fit_the_sizes_are_an_error_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="ask for 5 tiles of 16 tokens; given are 4 of 16"):
        tiling().arrange(tokens(4, 16), [(40, 40)])
    with pytest.raises(ValueError, match="ask for 5 tiles of 16 tokens; given are 5 of 15"):
        tiling().arrange(tokens(5, 15), [(40, 40)])


def test_newline_learns_and_takes_the_tokens_type() -> None:
    made = tiling()
    features = tokens(10, 16)
    features = Features(features.tokens_BND.bfloat16(), features.mask_BN)
    out = made.arrange(features, [(40, 40), (40, 40)])
    assert out.tokens_BND.dtype == torch.bfloat16
    out.tokens_BND.sum().backward()
    assert made.newline is not None
    # One row end for each of the eight rows of the two canvases.
    torch.testing.assert_close(made.newline.grad, torch.full((8,), 16.0))


def test_tiling_is_built_on_the_meta_device() -> None:
    with torch.device("meta"):
        made = tiling()
    assert made.newline is not None
    assert made.newline.is_meta
    assert made.count(40, 40) == 88


# -- pictures to tiles --------------------------------------------------------------------------------------------


def picture(height: int, width: int, seed: int = 0) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


@pytest.mark.parametrize("own", [tf.CLIPImageProcessor(), tf.SiglipImageProcessor(resample=2)])
def test_a_picture_as_large_as_the_canvas_is_cut_and_normalised_by_hand(own: Any) -> None:
    seen = picture(64, 96)
    processor = tiling(pinpoints=[[64, 96]]).image_processor(own)
    out = processor(seen, return_tensors="pt")
    pixels = torch.from_numpy(np.array(seen)).permute(2, 0, 1) / 255
    pixels = (pixels - torch.tensor(own.image_mean)[:, None, None]) / torch.tensor(own.image_std)[:, None, None]
    for i, tile in enumerate(out["pixel_values"][1:]):
        row, column = divmod(i, 3)
        mine = pixels[:, row * 32 : (row + 1) * 32, column * 32 : (column + 1) * 32]
        torch.testing.assert_close(tile, mine, rtol=0, atol=1e-5)
    assert out["image_sizes"].tolist() == [[64, 96]]


def test_preparation_is_the_encoders() -> None:
    own = tf.CLIPImageProcessor(do_normalize=False, rescale_factor=1.0, resample=2, do_convert_rgb=False)
    processor = tiling().image_processor(own)
    for key in ("do_normalize", "rescale_factor", "resample", "do_convert_rgb", "image_mean", "image_std"):
        assert getattr(processor, key) == getattr(own, key)


@given(sizes=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=3))
def test_as_many_tiles_come_out_as_are_counted(sizes: list[tuple[int, int]]) -> None:
    for flag in (True, False):
        made = tiling(thumbnail=flag)
        out = made.image_processor(tf.CLIPImageProcessor())([picture(*s) for s in sizes], return_tensors="pt")
        assert out["pixel_values"].shape == (sum(made.tiles(*s) for s in sizes), 3, 32, 32)
        assert [tuple(s) for s in out["image_sizes"].tolist()] == sizes


def test_without_thumbnail_the_tiles_alone_are_left() -> None:
    with_it, without = (tiling(thumbnail=t).image_processor(tf.CLIPImageProcessor()) for t in (True, False))
    seen = [picture(40, 70, 1), picture(90, 30, 2)]
    tiles = with_it(seen, return_tensors="pt")["pixel_values"]
    first = tiling().tiles(40, 70)
    expected = torch.cat([tiles[1:first], tiles[first + 1 :]])
    torch.testing.assert_close(without(seen, return_tensors="pt")["pixel_values"], expected, rtol=0, atol=0)


def test_saved_and_loaded_it_makes_the_same_tiles(tmp_path: Path) -> None:
    made = tiling(pinpoints=[[32, 64], [96, 32]], thumbnail=False).image_processor(tf.CLIPImageProcessor())
    made.save_pretrained(tmp_path)
    again = tf.AutoImageProcessor.from_pretrained(tmp_path)
    assert type(again) is type(made)
    seen = picture(50, 33)
    for key, value in made(seen, return_tensors="pt").items():
        torch.testing.assert_close(again(seen, return_tensors="pt")[key], value, rtol=0, atol=0)


def test_a_new_program_loads_it(tmp_path: Path) -> None:
    """Importing the models alone makes it known to transformers."""
    tiling().image_processor(tf.CLIPImageProcessor()).save_pretrained(tmp_path)
    code = (
        "import sys, opticnerve.models, transformers; "
        "print(type(transformers.AutoImageProcessor.from_pretrained(sys.argv[1])).__name__)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert said.strip() == "TilingImageProcessor"


def test_an_image_processor_without_normalisation_is_refused() -> None:
    with refused("unsupported", "image_mean"):
        tiling().image_processor(SimpleNamespace(resample=3))
