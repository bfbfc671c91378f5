"""JPEGs decoded no larger than they are needed: the same picture, and everything else bit for bit as before."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import PIL.Image
import pytest
from PIL.Image import Transpose

from opticnerve.data.media.open import open_image

ORIENTATIONS = {
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
}  # fmt: skip


def scene(width: int, height: int, mode: str = "RGB") -> PIL.Image.Image:
    """Smooth, and different in every corner."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    colours = np.stack([x, y, (x + y) / 2 * 0.8 + 0.1], -1) * 200 + 20
    return PIL.Image.fromarray(colours.astype(np.uint8)).convert(mode)


def jpeg(image: PIL.Image.Image, *, orientation: int = 1, **options: Any) -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, exif=exif, **options)
    return file.getvalue()


def far(one: PIL.Image.Image, other: PIL.Image.Image) -> int:
    """The most that two pictures differ by, in 8-bit steps, at the size of the smaller one."""
    small, large = sorted((one, other), key=lambda i: i.width)
    return int(
        np.abs(np.asarray(small, int) - np.asarray(large.resize(small.size, PIL.Image.Resampling.BOX), int)).max()
    )


@pytest.mark.parametrize(
    ("at_least", "size"),
    [
        ((30, 40), (40, 30)),
        ((31, 40), (80, 60)),
        ((60, 80), (80, 60)),
        ((100, 100), (160, 120)),
        ((121, 1), (320, 240)),
    ],
)
def test_the_smallest_eighth_quarter_or_half_that_is_large_enough(
    at_least: tuple[int, int], size: tuple[int, int]
) -> None:
    image = open_image(jpeg(scene(320, 240)), at_least=at_least)
    assert (image.size, image.mode) == (size, "RGB")
    assert far(image, scene(320, 240)) <= 6


@pytest.mark.parametrize("at_least", [(240, 320), (200, 200), (1000, 1000)])
def test_what_would_not_be_halved_is_decoded_whole(at_least: tuple[int, int]) -> None:
    stored = jpeg(scene(320, 240))
    assert np.array_equal(open_image(stored, at_least=at_least), open_image(stored))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_it_comes_upright_and_its_upright_size_counts(orientation: int) -> None:
    stored = jpeg(scene(320, 160), orientation=orientation)
    whole = open_image(stored)
    assert whole.size == scene(320, 160).transpose(ORIENTATIONS[orientation]).size
    # Height and width are asked for as they are seen: half of each is there, and no less.
    half = open_image(stored, at_least=(whole.height // 2, whole.width // 2))
    assert half.size == (whole.width // 2, whole.height // 2)
    assert far(half, whole) <= 6


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_picture_opened_twice_is_turned_once(orientation: int, format: str) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    scene(32, 16).save(file, format, exif=exif)
    once = open_image(file.getvalue())
    assert np.array_equal(open_image(once), once)


@pytest.mark.parametrize(("mode", "options"), [("L", {}), ("CMYK", {}), ("RGB", {"progressive": True}),
                                               ("RGB", {"subsampling": 0})])  # fmt: skip
def test_every_kind_of_jpeg(mode: str, options: dict[str, Any]) -> None:
    stored = jpeg(scene(320, 240, mode), **options)
    small, whole = open_image(stored, at_least=(60, 80)), open_image(stored)
    assert (small.size, small.mode) == ((80, 60), "RGB")
    assert far(small, whole) <= 6


def test_the_first_of_several_pictures_in_a_file() -> None:
    file = io.BytesIO()
    scene(320, 240).save(file, "MPO", save_all=True, append_images=[PIL.Image.new("RGB", (320, 240))], quality=95)
    assert PIL.Image.open(file).format == "MPO"
    small = open_image(file.getvalue(), at_least=(60, 80))
    assert small.size == (80, 60)
    assert far(small, scene(320, 240)) <= 6


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP", "GIF"])
def test_other_formats_come_whole(format: str) -> None:
    file = io.BytesIO()
    scene(64, 48).save(file, format)
    assert np.array_equal(open_image(file.getvalue(), at_least=(4, 4)), open_image(file.getvalue()))


def test_a_picture_that_somebody_else_opened_stays_as_it_is() -> None:
    theirs = PIL.Image.open(io.BytesIO(jpeg(scene(320, 240))))
    assert open_image(theirs, at_least=(30, 40)).size == (320, 240)
    assert theirs.size == (320, 240)
    loaded = scene(8, 8)
    opened = open_image(loaded)
    opened.putpixel((0, 0), (255, 255, 255))
    assert loaded.getpixel((0, 0)) != (255, 255, 255), "what is opened is a picture of its own"
