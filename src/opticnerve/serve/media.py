"""Pictures and sounds of a request, from where the server may take them, opened and within bounds."""

from __future__ import annotations

import base64
import binascii
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import PIL.Image

from opticnerve.data.media.audio import open_audio
from opticnerve.data.media.files import decode_data_url, is_url
from opticnerve.data.media.open import image_size
from opticnerve.data.media.transform import open_for
from opticnerve.serve.errors import ApiError
from opticnerve.serve.fetch import fetch
from opticnerve.serve.limits import Limits
from opticnerve.types import DataError, OpticNerveError


@dataclass(frozen=True, slots=True)
class Sources:
    """Where media may come from beside the request itself: `hosts` on the web, `folders` on this machine."""

    hosts: Sequence[str] = ()
    folders: Sequence[Path] = ()

    def __post_init__(self) -> None:
        for folder in self.folders:
            if not folder.is_dir():
                raise OpticNerveError(f"--allow-media {folder} is no folder")
        for host in self.hosts:
            if "/" in host or not host:
                raise OpticNerveError(f"--allow-url-host takes HOST or HOST:PORT, not {host!r}")

    def read(self, url: str, limits: Limits, param: str) -> bytes:
        """The bytes that a URL stands for.

        Raises:
            ApiError: 400: not base64, not allowed, not there, too big.
        """
        if url[:5].lower() == "data:":
            try:
                return decode_data_url(url)
            except DataError as e:
                raise ApiError(400, f"{param}: {e}", param=param, code="invalid_image_url") from None
        if is_url(url):
            return fetch(url, hosts=self.hosts, max_bytes=limits.body_bytes, seconds=limits.fetch_seconds, param=param)
        if url[:5].lower() == "file:":
            return self._file(url, limits.body_bytes, param)
        raise ApiError(400, f"{param}: give a data URL, data:image/png;base64,…", param=param, code="invalid_image_url")

    def _file(self, url: str, most: int, param: str) -> bytes:
        # One answer for all that is not to be read: whether a file exists elsewhere is nobody's business.
        no = ApiError(
            400, f"{param}: this server does not read that file; send the picture as a data URL", param=param,
            code="invalid_image_url",
        )  # fmt: skip
        try:
            parts = urlsplit(url)
            path = Path(unquote(parts.path)).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            raise no from None
        allowed = (folder.resolve() for folder in self.folders)
        if parts.netloc not in ("", "localhost") or not any(path.is_relative_to(folder) for folder in allowed):
            raise no
        try:
            # Resolved above: a link in its place now is somebody's trick.
            number = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        except OSError:
            raise no from None
        about = os.fstat(number)
        if not stat.S_ISREG(about.st_mode):
            os.close(number)
            raise no
        with os.fdopen(number, "rb") as file:
            if about.st_size > most:
                raise ApiError(
                    400, f"{param}: the file has {about.st_size:,} bytes, more than the {most:,} allowed", param=param
                )
            return file.read(most)


class Opener:
    """Opens what one request shows, and counts it: `pixels` and `media` are for all of it together."""

    def __init__(self, processor: Any, sources: Sources, limits: Limits) -> None:
        self.processor, self.sources, self.limits = processor, sources, limits
        self.pixels, self.media = 0, 0

    def image(self, url: str, param: str) -> PIL.Image.Image:
        if self.processor.image_processor is None:
            raise ApiError(400, f"{param}: this model takes no pictures", param=param)
        self._count(param)
        data = self.sources.read(url, self.limits, param)
        try:
            height, width = image_size(data)
            self.pixels += height * width
            if self.pixels > self.limits.pixels:
                raise ApiError(
                    400, f"{param}: the pictures so far have {self.pixels:,} pixels, more than the "
                    f"{self.limits.pixels:,} allowed; send smaller ones", param=param,
                )  # fmt: skip
            return open_for(self.processor.image_processor, data)
        except DataError as e:
            raise ApiError(400, f"{param}: {e}", param=param, code="invalid_image") from None

    def audio(self, data: str, param: str) -> Any:
        if self.processor.feature_extractor is None:
            raise ApiError(400, f"{param}: this model takes no sound", param=param)
        self._count(param)
        try:
            sound = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError) as e:
            raise ApiError(400, f"{param}: not valid base64: {e}", param=param) from None
        try:
            rate = self.processor.feature_extractor.sampling_rate
            return open_audio(sound, rate=rate, max_seconds=self.limits.audio_seconds)
        except DataError as e:
            raise ApiError(400, f"{param}: {e}", param=param, code="invalid_audio") from None

    def _count(self, param: str) -> None:
        self.media += 1
        if self.media > self.limits.media:
            raise ApiError(
                400, f"{param}: more than the {self.limits.media} pictures and sounds allowed in a request", param=param
            )
