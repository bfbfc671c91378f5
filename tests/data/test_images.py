"""Every odd picture becomes one upright 8-bit RGB picture, or one clear error."""

from __future__ import annotations

import base64
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opticnerve.data.media.open import image_digest, open_image
from opticnerve.types import DataError

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image: PIL.Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and holds nothing."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def refused(source: object, **options: object) -> DataError:
    with pytest.raises(DataError) as caught:
        open_image(source, where="data.jsonl:7", **options)  # type: ignore[arg-type]
    assert caught.value.where == "data.jsonl:7"
    return caught.value


def pixel(source: object, x: int = 0, y: int = 0) -> object:
    image = open_image(source)  # type: ignore[arg-type]
    assert image.mode == "RGB"
    return image.getpixel((x, y))


@pytest.mark.parametrize("as_string", [True, False])
def test_a_file_is_opened_and_closed(tmp_path: Path, as_string: bool) -> None:
    path = tmp_path / "red.png"
    PIL.Image.new("RGB", (3, 2), RED).save(path)
    image = open_image(str(path) if as_string else path)
    path.unlink()
    assert (image.size, image.getpixel((2, 1))) == ((3, 2), RED)


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    whole = encoded(PIL.Image.effect_noise((64, 64), 90))
    jpeg = encoded(PIL.Image.effect_noise((64, 64), 90), "JPEG")
    cases = {
        "empty.png": (b"", "empty"),
        "cut.png": (whole[: len(whole) // 2], "damaged or incomplete"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "damaged or incomplete"),
        "text.jpg": (b"no picture at all", "not an image"),
        "drawing.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
    }
    for name, (content, problem) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        error = refused(path)
        assert error.kind == "unreadable-image" and name in str(error) and problem in error.problem, name
    assert "folder" in refused(tmp_path).problem
    missing = refused(tmp_path / "nowhere.png")
    assert missing.kind == "missing-image" and "nowhere.png" in missing.problem


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert "regular file" in refused(tmp_path / "pipe.png").problem


def test_a_bomb_is_refused_by_its_header_with_both_numbers() -> None:
    error = refused(png_header(9_000, 8_000))
    assert "72,000,000" in str(error) and "64,000,000" in str(error)
    beyond_pillow = refused(png_header(60_000, 60_000))  # Pillow itself refuses to open this one
    assert "3,600,000,000" in str(beyond_pillow) and "64,000,000" in str(beyond_pillow)
    assert "12 pixels" in str(refused(PIL.Image.new("RGB", (4, 3)), max_pixels=11))
    assert open_image(PIL.Image.new("RGB", (4, 3)), max_pixels=12).size == (4, 3)


def test_no_pixels() -> None:
    assert "no pixels" in refused(PIL.Image.new("RGB", (0, 5))).problem
    assert refused(png_header(0, 5)).kind == "unreadable-image"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = PIL.Image.new("RGB", (3, 2), WHITE)
    upright.putpixel((0, 0), RED)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation → the transposition that leads back from upright
    stored = upright.transpose(PIL.Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    image = open_image(encoded(stored, exif=exif.tobytes()))
    assert np.array_equal(np.asarray(image), np.asarray(upright))


def test_a_broken_exif_block_does_not_lose_the_picture() -> None:
    assert pixel(encoded(PIL.Image.new("RGB", (2, 2), RED), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")) == RED


def test_cmyk_becomes_rgb() -> None:
    red = PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    r, g, b = np.asarray(open_image(encoded(red, "JPEG", quality=100)))[0, 0]
    assert r > 240 and g < 15 and b < 15


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(format: str) -> None:
    grey = PIL.Image.fromarray(np.array([[0, 257, 32_896, 65_535]], dtype=np.uint16))
    image = open_image(encoded(grey, format))
    assert [image.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]  # type: ignore[index]


def test_32_bit_integers_count_to_65535_and_floats_are_refused() -> None:
    whole = PIL.Image.fromarray(np.array([[-5, 32_896, 70_000]], dtype=np.int32))
    assert [open_image(whole).getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]  # type: ignore[index]
    assert "floating-point" in refused(PIL.Image.fromarray(np.zeros((2, 2), np.float32))).problem


def test_transparency_lies_over_white() -> None:
    assert pixel(encoded(PIL.Image.new("RGBA", (2, 2), (255, 0, 0, 0)))) == WHITE
    assert pixel(encoded(PIL.Image.new("RGBA", (2, 2), (255, 0, 0, 255)))) == RED
    assert pixel(encoded(PIL.Image.new("RGBA", (2, 2), (0, 0, 0, 128)))) == (127, 127, 127)
    assert pixel(encoded(PIL.Image.new("LA", (2, 2), (0, 0)))) == WHITE
    palette = PIL.Image.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((1, 0), 1)
    see_through = encoded(palette, transparency=0)
    assert (pixel(see_through, 0), pixel(see_through, 1)) == (WHITE, RED)
    assert (pixel(encoded(palette), 0), pixel(encoded(palette), 1)) == ((0, 0, 0), RED)
    assert pixel(encoded(PIL.Image.new("RGB", (2, 2), RED), transparency=RED)) == WHITE
    grey = PIL.Image.fromarray(np.array([[7, 0]], dtype=np.uint16))
    assert pixel(encoded(grey, transparency=7)) == WHITE


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(format: str) -> None:
    frames = [PIL.Image.new("RGB", (8, 8), c) for c in (RED, (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert getattr(PIL.Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    assert pixel(data) == RED


@pytest.mark.parametrize("mode", ["1", "L"])
def test_black_and_white_and_grey(mode: str) -> None:
    assert pixel(encoded(PIL.Image.new(mode, (2, 2), 255))) == WHITE


def test_nothing_is_fetched() -> None:
    error = refused("HTTPS://example.org/cat.png")
    assert error.kind == "url" and "download" in error.remedy


def test_data_urls() -> None:
    body = base64.b64encode(encoded(PIL.Image.new("RGB", (2, 2), RED))).decode()
    assert pixel(f"data:image/png;base64,{body}") == RED
    assert "base64" in refused("data:image/png;base64,@@@").problem
    assert "base64" in refused("data:image/png,abc").problem


def test_the_picture_given_is_not_the_picture_returned() -> None:
    given_image = PIL.Image.new("RGB", (2, 2), RED)
    open_image(given_image).putpixel((0, 0), WHITE)
    assert given_image.getpixel((0, 0)) == RED


def test_digests_tell_contents_apart(tmp_path: Path) -> None:
    one, two = encoded(PIL.Image.new("RGB", (2, 2), RED)), encoded(PIL.Image.new("RGB", (2, 2), WHITE))
    (tmp_path / "one.png").write_bytes(one)
    assert image_digest(tmp_path / "one.png") == image_digest(one) != image_digest(two)
    wide, tall = PIL.Image.new("RGB", (4, 1)), PIL.Image.new("RGB", (1, 4))
    assert image_digest(wide) != image_digest(tall)


WHOLE = {f: encoded(PIL.Image.effect_noise((16, 16), 90), f) for f in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")}


@given(format=st.sampled_from(sorted(WHOLE)), at=st.floats(0, 1), byte=st.integers(0, 255), cut=st.booleans())
def test_damage_gives_a_picture_or_a_data_error(format: str, at: float, byte: int, cut: bool) -> None:
    data = WHOLE[format]
    place = int(at * (len(data) - 1))
    damaged = data[:place] if cut else data[:place] + bytes([byte]) + data[place + 1 :]
    try:
        assert open_image(damaged, max_pixels=10_000_000).mode == "RGB"
    except DataError as e:
        assert e.kind == "unreadable-image"
