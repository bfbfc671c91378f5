"""Pictures and sounds of a request, from where the server may take them, opened and within bounds.

Those on other hosts are fetched only from allow-listed ones, and never from within this network (`common.fetch`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import PIL.Image

from opticnerve.common.fetch import Unfetched
from opticnerve.common.fetch import fetch as fetch_bounded
from opticnerve.data.media.audio import open_audio
from opticnerve.data.media.files import base64_bytes, decode_data_url, is_url
from opticnerve.data.media.open import image_size
from opticnerve.data.media.timeline import sampling_of
from opticnerve.data.media.transform import open_for
from opticnerve.data.media.video import in_order, pixels_in
from opticnerve.serve.errors import ApiError
from opticnerve.serve.limits import ServerLimits
from opticnerve.types import DataError, ImagePart, MediaProcessor, OpticNerveError


def _refuse(param: str, why: str, code: str | None = "invalid_image_url") -> ApiError:
    return ApiError(400, f"{param}: {why}", param=param, code=code)


def fetch(url: str, *, hosts: Sequence[str], max_bytes: int, seconds: float, param: str) -> bytes:
    """What is at an address on the web; redirects are refused, for they would lead elsewhere.

    Args:
        url: http or https. hosts: allowed ones, as `name` (ports 80 and 443) or `name:port`.
        max_bytes, seconds: bounds of the answer. param: the field that an error names.

    Raises:
        ApiError: 400, whatever the reason: a host that is not allowed or not public, a redirect, an answer that is no
            200, too big or too slow.
    """
    allowed = {h.lower() for h in hosts}

    def refuse(host: str, port: int) -> str | None:
        if f"{host}:{port}" in allowed or (host in allowed and port in (80, 443)):
            return None
        return "this server does not fetch from that host; send the picture as a data URL"

    try:
        return fetch_bounded(url, max_bytes=max_bytes, seconds=seconds, refuse=refuse)
    except Unfetched as e:
        raise _refuse(param, str(e)) from None


@dataclass(frozen=True, slots=True)
class MediaSources:
    """Where media may come from beside the request itself: `hosts` on the web, `folders` on this machine."""

    hosts: Sequence[str] = ()
    folders: Sequence[Path] = ()

    def __post_init__(self) -> None:
        for folder in self.folders:
            if not folder.is_dir():
                raise OpticNerveError(f"--allow-media {folder} is no folder", kind="missing-file")
        for host in self.hosts:
            if "/" in host or not host:
                raise OpticNerveError(f"--allow-url-host takes HOST or HOST:PORT, not {host!r}", kind="wrong-type")

    def read(self, url: str, limits: ServerLimits, param: str) -> bytes:
        """The bytes that a URL stands for. Raises ApiError: 400: not base64, not allowed, not there, too big."""
        if url[:5].lower() == "data:":
            try:
                return decode_data_url(url)
            except DataError as e:
                raise _refuse(param, str(e)) from None
        if is_url(url):
            return fetch(url, hosts=self.hosts, max_bytes=limits.body_bytes, seconds=limits.fetch_seconds, param=param)
        if url[:5].lower() == "file:":
            return self._file(url, limits.body_bytes, param)
        raise _refuse(param, "give a data URL, data:image/png;base64,…")

    def _file(self, url: str, most: int, param: str) -> bytes:
        # One answer for all that is not to be read: whether a file exists elsewhere is nobody's business.
        no = _refuse(param, "this server does not read that file; send the picture as a data URL")
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
                raise _refuse(param, f"the file has {about.st_size:,} bytes, more than the {most:,} allowed", None)
            return file.read(most)


class MediaOpener:
    """Opens what one request shows, and counts it: `pixels` and `media` are for all of it together."""

    def __init__(self, processor: MediaProcessor, sources: MediaSources, limits: ServerLimits) -> None:
        self.processor, self.sources, self.limits = processor, sources, limits
        self.pixels, self.media = 0, 0

    def image(self, url: str, param: str) -> PIL.Image.Image:
        if self.processor.image_processor is None:
            raise _refuse(param, "this model takes no pictures", None)
        self._count(param)
        data = self.sources.read(url, self.limits, param)
        try:
            height, width = image_size(data)
            self.pixels += height * width
            if self.pixels > self.limits.pixels:
                raise _refuse(
                    param, f"the pictures so far have {self.pixels:,} pixels, more than the {self.limits.pixels:,} "
                    "allowed; send smaller ones", None,
                )  # fmt: skip
            return open_for(self.processor.image_processor, data)
        except DataError as e:
            raise _refuse(param, str(e), "invalid_image") from None

    def video(self, url: str, param: str) -> list[ImagePart]:
        """The frames that training would show, opened, with what is written before each."""
        if self.processor.image_processor is None:
            raise _refuse(param, "this model takes no pictures", None)
        self._count(param)
        data = self.sources.read(url, self.limits, param)
        try:
            if (cost := pixels_in(data)) > self.limits.video_pixels:
                raise _refuse(
                    param, f"the video has {cost:,} pixels in all its frames, more than the "
                    f"{self.limits.video_pixels:,} allowed; send a shorter or smaller one", None,
                )  # fmt: skip
            parts = in_order(data, sampling_of(getattr(self.processor, "frames", 8)))
            opened = [replace(p, source=open_for(self.processor.image_processor, p.source)) for p in parts]
        except ApiError:
            raise
        except OpticNerveError as e:  # also where PyAV is missing
            raise _refuse(param, str(e), "invalid_video") from None
        return opened

    def audio(self, data: str, param: str) -> Any:
        extractor = getattr(self.processor, "feature_extractor", None)
        if extractor is None:
            raise _refuse(param, "this model takes no sound", None)
        self._count(param)
        try:
            sound = base64_bytes(data, "audio", "the sound")
            return open_audio(sound, rate=extractor.sampling_rate, max_seconds=self.limits.audio_seconds)
        except DataError as e:
            raise _refuse(param, str(e), "invalid_audio") from None

    def _count(self, param: str) -> None:
        self.media += 1
        if self.media > self.limits.media:
            raise _refuse(
                param, f"more than the {self.limits.media} pictures, videos and sounds allowed in a request", None
            )
