"""Any picture a user may have, as one thing: a loaded 8-bit RGB picture, or one clear error.

Data readers, chat, server and evaluation open their pictures here and nowhere else, so that a rotated, transparent or
16-bit picture looks the same to the model in training and in use.
"""

from __future__ import annotations

import io
import re
import struct
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path

import numpy as np
import PIL.Image
from PIL.Image import Transpose
from PIL.JpegImagePlugin import JpegImageFile

from opticnerve.data.media.files import errors_at, locate, name_of, unreadable
from opticnerve.types import DataError, Frame

Stored = Path | str | bytes | PIL.Image.Image
Source = Stored | Frame

MAX_PIXELS = 64_000_000
_TWELVE_BITS = 4_095

# A closed list: Pillow would also hand EPS to Ghostscript, and recognises some formats by next to nothing.
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")

_EXIF_ORIENTATION = 0x0112
# EXIF orientation → what turns the stored picture upright (EXIF 2.32, tag 0x0112).
_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
ON_ITS_SIDE = (5, 6, 7, 8)
# Where Pillow looks for an orientation.
_SAYS_ORIENTATION = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


_TOO_LONG_NOTES = ("MAX_TEXT", "Decompressed Data Too Large")  # in what Pillow raises
_unreadable = partial(unreadable, "image")


def open_picture(
    source: Stored,
    *,
    where: str = "",
    max_pixels: int = MAX_PIXELS,
    at_least: tuple[int, int] | None = None,
    copy: bool = True,
) -> PIL.Image.Image:
    """A loaded picture of mode RGB, 8 bits a channel, upright.

    Args:
        source: a file, encoded bytes, a `data:` URL, or a picture already opened. Nothing is ever fetched.
        where: what the error shall name, e.g. `captions.jsonl:12`.
        max_pixels: pictures with more are refused by their header, before anything is decoded.
        at_least: height and width in pixels, upright, that are enough. A JPEG is then decoded at the smallest of 1/8,
            1/4, 1/2 and 1/1 that has both, which libjpeg does in the cosine transform itself, for a fraction of the
            time and memory. Other formats, and pictures already opened, come as they are.
            (`data.media.transform.open_for` knows what an image processor needs.)
        copy: False: an opened picture of which nothing has to be changed comes back itself, for who only reads it.

    How each kind of picture is read:

    - EXIF orientation is applied (an unreadable EXIF block counts as none).
    - Animated GIF, WebP and APNG: the first frame.
    - Transparency (RGBA, LA, palette or a transparent colour): laid over white.
    - 16-bit grey: 0…65535 becomes 0…255. Pillow's own conversion would clip everything above 255 to white. One whose
      values end at 4095 or below holds 12 bits or fewer: it would come out all but black, and is refused.
    - CMYK, YCbCr, palette, 1-bit, grey: converted by Pillow (Adobe's inverted CMYK included).

    Raises:
        DataError: kind `missing-image` (no such file), `url` (http addresses are not fetched), or `unreadable-image`:
            a folder, an empty or truncated file, no image at all, more than `max_pixels`, no pixels,
            floating-point pixels (their range is not known).
    """
    with errors_at(where):
        return _opened(source, max_pixels, at_least, copy)


def _opened(source: Stored, max_pixels: int, at_least: tuple[int, int] | None, copy: bool) -> PIL.Image.Image:
    given = source if isinstance(source, PIL.Image.Image) else None
    name = name_of(source, "image") if given is None else f"the opened picture of mode {given.mode}"
    try:
        with ExitStack() as unfinished:
            image = open_lazily(locate(source, "image")) if given is None else given  # type: ignore[arg-type]
            if given is None:
                unfinished.callback(image.close)  # what cannot be read would keep its file open
            _check_size(image, name, max_pixels)
            if at_least is not None and given is None and isinstance(image, JpegImageFile):
                height, width = at_least
                image.draft(None, (height, width) if orientation_of(image) in ON_ITS_SIDE else (width, height))
            image.load()
            _check_size(image, name, max_pixels)  # icons declare one size and may carry another
            upright = _upright(image)
            # What was opened here belongs to nobody else. (Formats with several frames would keep their file open.)
            closed = upright is not image or type(image) in (PIL.Image.Image, JpegImageFile)
            own = closed and (upright is not source or not copy)
            plain = own and upright.mode == "RGB" and not upright.has_transparency_data
            made = upright if plain else _to_rgb(upright)
            unfinished.pop_all()
            return made
    except (DataError, MemoryError):
        raise
    except PIL.UnidentifiedImageError as e:
        raise _unreadable(f"{name} is not an image of a known format ({_known_formats()})") from e
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as e:
        # Pillow refuses while it opens, so the size is known from its message alone.
        found = re.search(r"\d+", str(e))
        raise _too_big(f"{int(found[0]):,}" if found else "too many", name, max_pixels) from e
    except Exception as e:
        if not isinstance(source, PIL.Image.Image) and any(said in str(e) for said in _TOO_LONG_NOTES):
            # Pillow bounds what a PNG's notes unpack to; the pixels want none of them.
            return _opened(_without_notes(locate(source, "image"), name), max_pixels, at_least, copy)
        # Pillow's decoders raise whatever their parsing trips over (OSError, SyntaxError, struct.error, IndexError…);
        # for the user it is one case.
        raise _unreadable(f"{name} is damaged or incomplete: {e or type(e).__name__}") from e


def described(source: object) -> str:
    """A picture or a sound in one line: its file, or what else it is and how large."""
    match source:
        case Frame():
            return f"{described(source.source)}, frame {source.index + 1} of {source.of}"
        case bytes():
            size = f"{len(source) / 1000:,.0f} kB" if len(source) >= 1000 else f"{len(source)} bytes"
            return f"picture, {size}"
        case Path():
            return str(source)
        case PIL.Image.Image():
            return f"picture, {source.width} × {source.height}"
        case _:
            return type(source).__name__


def open_lazily(located: Path | bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(located) if isinstance(located, bytes) else located, formats=_known_list())


def _without_notes(located: Path | bytes, name: str) -> bytes:
    """A PNG without its texts and its colour profile; what may say its orientation is kept, unless it is packed."""
    raw = located if isinstance(located, bytes) else located.read_bytes()
    kept, at, dropped = [raw[:8]], 8, False
    while at + 12 <= len(raw):
        end = at + 12 + int.from_bytes(raw[at : at + 4], "big")
        kind, body = raw[at + 4 : at + 8], raw[at + 8 : at + 40]
        if kind in (b"zTXt", b"tEXt", b"iCCP") or (kind == b"iTXt" and not body.startswith(b"XML:com.adobe.xmp\0\0")):
            dropped = True
        else:
            kept.append(raw[at:end])
        at = end
    if not dropped:
        raise _unreadable(f"{name} holds notes that unpack to too much")
    return b"".join(kept)


@cache
def _known_list() -> tuple[str, ...]:
    PIL.Image.init()
    return tuple(f for f in _FORMATS if f in PIL.Image.OPEN)


def _known_formats() -> str:
    return ", ".join(f for f in _known_list() if f not in ("DIB", "MPO"))


def _check_size(image: PIL.Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width <= 0 or height <= 0:
        raise _unreadable(f"{name} has no pixels: {width} × {height}")
    if width * height > max_pixels:
        raise _too_big(f"{width} × {height} = {width * height:,}", name, max_pixels)


def orientation_of(image: PIL.Image.Image) -> int:
    try:
        found = image.getexif().get(_EXIF_ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error):
        # The pixels are good; a broken camera block is no reason to lose them.
        return 1
    return found if isinstance(found, int) else 1


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    orientation = orientation_of(image)
    if orientation not in _UPRIGHT:
        return image
    upright = image.transpose(_UPRIGHT[orientation])
    for key in _SAYS_ORIENTATION:  # or whoever opens the opened picture again turns it again
        upright.info.pop(key, None)
    return upright


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey_HW = np.asarray(image).astype(np.int64).clip(0, 65_535)
        eight_HW = np.rint(grey_HW / 257).astype(np.uint8)
        hole = image.info.get("transparency")
        brightest = int(grey_HW[grey_HW != hole].max(initial=0) if isinstance(hole, int) else grey_HW.max(initial=0))
        if 0 < brightest <= _TWELVE_BITS:
            raise ValueError(
                f"its 16-bit values end at {brightest:,} of 65,535, so that it is all but black; multiply them to "
                f"the full range, or save it with 8 bits"
            )
        if isinstance(hole, int):
            eight_HW = np.where(grey_HW == hole, np.uint8(255), eight_HW)
        return PIL.Image.fromarray(eight_HW).convert("RGB")
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _too_big(pixels: str, name: str, max_pixels: int) -> DataError:
    return _unreadable(
        f"{name} has {pixels} pixels, more than the {max_pixels:,} allowed",
        "make it smaller; a small file that unfolds to so many pixels may be a decompression bomb",
    )
