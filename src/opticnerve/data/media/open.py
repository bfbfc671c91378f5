"""Opening, measuring and recognising any picture: a file, bytes, a data URL, an opened one, or a frame of a video."""

from __future__ import annotations

import hashlib

import PIL.Image

from opticnerve.data.media.files import digest, errors_at, locate
from opticnerve.data.media.images import (
    MAX_PIXELS,
    ON_ITS_SIDE,
    Source,
    open_lazily,
    open_picture,
    orientation_of,
)
from opticnerve.data.media.video import open_frame, picture_of_folder
from opticnerve.types import DataError, Frame


def open_image(
    source: Source,
    *,
    where: str = "",
    max_pixels: int = MAX_PIXELS,
    at_least: tuple[int, int] | None = None,
    copy: bool = True,
) -> PIL.Image.Image:
    """A loaded picture of mode RGB, 8 bits a channel, upright: of a picture as `open_picture`, of a video's frame as
    `video.frames`, which also say what the arguments mean and what is raised."""
    if isinstance(source, Frame):
        return open_frame(source, where=where, max_pixels=max_pixels, copy=copy)
    return open_picture(source, where=where, max_pixels=max_pixels, at_least=at_least, copy=copy)


def image_digest(source: Source, *, where: str = "") -> str:
    """SHA-256 of the stored bytes, decoded or not: equal for equal files. For an opened picture, of its pixels; for a
    frame, of its video's bytes and its number."""
    if isinstance(source, PIL.Image.Image):
        return hashlib.sha256(repr((source.mode, source.size)).encode() + source.tobytes()).hexdigest()
    if isinstance(source, Frame):
        if (picture := picture_of_folder(source, where=where)) is not None:
            return image_digest(picture, where=where)
        video = image_digest(source.source, where=where)
        return hashlib.sha256(f"{video} {source.key.replace('/', ' ')}".encode()).hexdigest()
    return digest(source, "image", where=where)


def image_size(source: Source, *, where: str = "") -> tuple[int, int]:
    """Height and width of a picture as `open_image` gives it (upright); of a file only the header is read.

    Raises:
        DataError: as `open_image`, as far as a header shows it.
    """
    if not isinstance(source, PIL.Image.Image | Frame):
        try:
            with errors_at(where), open_lazily(locate(source, "image")) as image:
                turned = orientation_of(image) in ON_ITS_SIDE
                return (image.width, image.height) if turned else (image.height, image.width)
        except DataError:
            raise
        except Exception:  # whatever is wrong with it, opening it says so in full
            return image_size(open_image(source, where=where))
    opened = source if isinstance(source, PIL.Image.Image) else open_image(source, where=where, copy=False)
    return opened.height, opened.width
