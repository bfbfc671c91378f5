"""A video as pictures: some of its frames at equal distances, so that any model that sees pictures sees it.

Which frames: of T frames, number ⌊i · T / count⌋ for i = 0 … count − 1, transformers' uniform sampling
(`video_utils.default_sample_indices_fn`), which LLaVA-NeXT-Video uses, too. Of fewer frames than `count` some come
twice. Frames are counted, not seconds: in a video of varying rate they are not at equal times.

In time (`timed`): `data.media.timeline`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import PIL.Image

from opticnerve.data.media.files import errors_at, name_of, unreadable
from opticnerve.data.media.images import MAX_PIXELS, open_picture
from opticnerve.data.media.timeline import MAX_COUNT, FrameSampling, Timeline
from opticnerve.types import DataError, Frame, ImagePart, OpticNerveError, to_install

MAX_SECONDS, MAX_FRAMES = 3600, 216_000  # an hour, at 60 frames a second
MAX_DECODED = 300_000_000_000  # pixels that may have to be decoded: an hour of 1920 × 1080 at 30 frames a second is 224
MAX_KEPT = 256_000_000  # pixels of the frames that are kept: 123 of 1920 × 1080

_ANIMATED, _STILL = ("GIF", "WEBP", "PNG", "AVIF"), ("JPEG", "MPO", "BMP", "TIFF")
_PICTURES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# A closed list of FFmpeg's names: it would also follow playlists to other files, and take a text for a video.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf"
_UPRIGHT = {90: PIL.Image.Transpose.ROTATE_90, 180: PIL.Image.Transpose.ROTATE_180, 270: PIL.Image.Transpose.ROTATE_270}
_unreadable = partial(unreadable, "video")


def in_order(source: Path | bytes, sampling: int | FrameSampling) -> list[ImagePart]:
    """A video's frames as parts of a message, not yet decoded: so many, or as many as its length and `sampling` say.

    Raises:
        DataError, OpticNerveError: as `frames`, where the length is wanted; of a folder, whose pictures have no times.
    """
    if isinstance(sampling, int):
        return [ImagePart(Frame(source, index, sampling)) for index in range(sampling)]
    with errors_at("", name_of(source, "video"), "video"):
        timeline = _timeline(source, _stamp(source), MAX_PIXELS)
    numbers = timeline.spaced(sampling.count(timeline.seconds))
    stamps = [timeline.timestamp(number) if sampling.timestamps else "" for number in numbers]
    return [
        ImagePart(Frame(source, index, len(numbers), timed=True), stamp, sampling.pool)
        for index, stamp in enumerate(stamps)
    ]


def frames(source: Path | bytes, count: int, *, where: str = "", max_pixels: int = MAX_PIXELS) -> list[PIL.Image.Image]:
    """`count` frames as pictures of mode RGB, in their order.

    Args:
        source: a file of a video container (MP4, WebM, Matroska, AVI, MPEG, …; needs PyAV, the extra `video`), an
            animated GIF, WebP, PNG or AVIF, a folder of pictures (by name, numbers by their value), or the bytes of a
            file. Sound is not read. GIF and MPEG streams do not say how long they are: one that is cut off ends there.
        where: what the error shall name. max_pixels: of one frame.

    Raises:
        DataError: kind `missing-video`, or `unreadable-video`: empty, damaged or cut off, no video in it, a still
            picture, larger or longer than the bounds above.
        OpticNerveError: PyAV is not installed, or count is not 1 to 1024.
    """
    return [f.copy() for f in _loaded(source, count, False, where, max_pixels)]


def open_frame(frame: Frame, *, where: str = "", max_pixels: int = MAX_PIXELS, copy: bool = True) -> PIL.Image.Image:
    """The picture that a `Frame` names; errors as of `frames`. `copy`: False for who only reads it."""
    found = _loaded(frame.source, frame.of, frame.timed, where, max_pixels)[frame.index]
    return found.copy() if copy else found


def pixels_in(source: Path | bytes, *, max_pixels: int = MAX_PIXELS) -> int:
    """Pixels of all frames of a file, which may have to be decoded; errors as of `frames`."""
    name = name_of(source, "video")
    with errors_at("", name, "video"):
        picture = None if _is_folder(source, name) else _as_picture(source, name, max_pixels)
        if picture is not None:
            with picture:
                return int(getattr(picture, "n_frames", 1)) * picture.width * picture.height
        return _scan(source, name, max_pixels)[2]


def picture_of_folder(frame: Frame, *, where: str = "") -> Path | None:
    """The file that holds a frame, where the video is a folder of pictures; else None."""
    if not isinstance(frame.source, Path) or not frame.source.is_dir():
        return None
    with errors_at(where, name_of(frame.source, "video"), "video"):
        return _pictures(frame.source, frame.of)[frame.index]


def spaced(total: int, count: int) -> list[int]:
    """The numbers of `count` of `total` things at equal distances; the first is always among them."""
    return [i * total // count for i in range(count)]


def _stamp(source: Path | bytes) -> int | None:
    return source.stat().st_mtime_ns if isinstance(source, Path) and source.exists() else None


def _loaded(
    source: Path | bytes, count: int, timed: bool, where: str, max_pixels: int
) -> tuple[PIL.Image.Image, ...]:  # fmt: skip
    if not 0 < count <= MAX_COUNT:
        raise OpticNerveError(f"frames is {count}; ask for 1 to {MAX_COUNT} frames of a video", kind="out-of-range")
    with errors_at(where, name_of(source, "video"), "video"):
        return _recent(source, _stamp(source), count, timed, max_pixels)


@lru_cache(maxsize=1)
def _recent(
    source: Path | bytes, stamp: int | None, count: int, timed: bool, max_pixels: int
) -> tuple[PIL.Image.Image, ...]:
    """The frames of the last video stay in memory: they are opened one by one, and decoded together."""
    name = name_of(source, "video")
    timeline = _timeline(source, stamp, max_pixels) if timed else None
    if _is_folder(source, name):
        return tuple(_of_folder(Path(str(source)), count, max_pixels))
    picture = _as_picture(source, name, max_pixels)
    if picture is not None:
        with picture:
            numbers = timeline.spaced(count) if timeline else spaced(getattr(picture, "n_frames", 1), count)
            return tuple(_of_animation(picture, name, numbers))
    if timeline is None:
        return tuple(_of_container(source, name, count, max_pixels))
    wanted = [timeline.ticks[number] for number in timeline.spaced(count)]
    found, _ = _decoded(source, name, wanted, max_pixels, timed=True)
    if len(found) < len(set(wanted)):
        raise _unreadable(f"{name} shows {len(found)} of {len(set(wanted))} frames at the times that it says")
    return tuple(found[tick] for tick in wanted)


def _is_folder(source: Path | bytes, name: str) -> bool:
    """Whether a video is a folder of pictures. Raises DataError: neither that nor a file with anything in it."""
    if isinstance(source, Path):
        if not source.exists():
            raise DataError(f"{name} does not exist", remedy="check the path", kind="missing-video")
        if source.is_dir():
            return True
        if not source.is_file():
            raise _unreadable(f"{name} is not a regular file")
    if not (source if isinstance(source, bytes) else source.stat().st_size):
        raise _unreadable(f"{name} is empty")
    return False


@lru_cache(maxsize=8)
def _timeline(source: Path | bytes, stamp: int | None, max_pixels: int) -> Timeline:
    """When a video's frames are shown; nothing of a container is decoded for it.

    Raises:
        DataError: as `frames`; or it does not say.
    """
    name = name_of(source, "video")
    if _is_folder(source, name):
        raise _unreadable(f"{name} is a folder of pictures, which have no times", "give frames as a number")
    picture = _as_picture(source, name, max_pixels)
    found = _scan(source, name, max_pixels)[1] if picture is None else _scan_animation(picture, name)
    if not found.ticks or found.end <= found.ticks[0]:
        raise _unreadable(f"{name} does not say when its frames are shown", "give frames as a number")
    return found


def _scan_animation(picture: Any, name: str) -> Timeline:
    with picture:
        ticks = [0]
        for index in range(picture.n_frames):
            try:
                picture.seek(index)
            except Exception as e:  # Pillow raises whatever its parsing trips over
                raise _unreadable(f"{name} is damaged or incomplete at frame {index}: {e or type(e).__name__}") from e
            # No time at all is shown as a tenth of a second, by browsers, too.
            ticks.append(ticks[-1] + (int(picture.info.get("duration") or 0) or 100))
    return Timeline(tuple(ticks[:-1]), ticks[-1], Fraction(1, 1000))


def _of_folder(folder: Path, count: int, max_pixels: int) -> Iterator[PIL.Image.Image]:
    kept = 0
    for picture in _pictures(folder, count):
        image = open_picture(picture, max_pixels=max_pixels)
        kept += image.width * image.height
        _check_kept(str(folder), count, kept)
        yield image


def _pictures(folder: Path, count: int) -> list[Path]:
    found = sorted((p for p in folder.iterdir() if p.suffix.lower() in _PICTURES), key=_by_number)
    if not found:
        raise _unreadable(f"the folder {folder} holds no pictures ({', '.join(_PICTURES)})")
    return [found[index] for index in spaced(len(found), count)]


def _by_number(path: Path) -> list[Any]:
    """So that 2.jpg comes before 10.jpg."""
    return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in re.split(r"(\d+)", path.name)]


def _as_picture(source: Path | bytes, name: str, max_pixels: int) -> PIL.Image.Image | None:
    """The file as Pillow sees it; None where it is no picture."""
    PIL.Image.init()
    known = [f for f in (*_ANIMATED, *_STILL) if f in PIL.Image.OPEN]
    try:
        picture = PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=known)
        total = getattr(picture, "n_frames", 1)
    except PIL.UnidentifiedImageError:
        return None
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as e:
        raise _unreadable(f"{name} has too many pixels: {e}") from e
    except Exception as e:  # Pillow raises whatever its parsing trips over
        raise _unreadable(f"{name} is damaged or incomplete: {e or type(e).__name__}") from e
    if picture.format not in _ANIMATED or total < 2:
        picture.close()
        raise _unreadable(f"{name} is a still picture ({picture.format})", "give it as an image")
    _check_bounds(name, total, *picture.size, max_pixels=max_pixels)
    return picture


def _of_animation(picture: PIL.Image.Image, name: str, numbers: list[int]) -> Iterator[PIL.Image.Image]:
    _check_kept(name, len(numbers), len(numbers) * picture.width * picture.height)
    for index in numbers:
        try:
            picture.seek(index)
            yield open_picture(picture.copy())
        except (DataError, MemoryError):
            raise
        except Exception as e:  # Pillow raises whatever its parsing trips over
            raise _unreadable(f"{name} is damaged or incomplete at frame {index}: {e or type(e).__name__}") from e


def _of_container(source: Path | bytes, name: str, count: int, max_pixels: int) -> list[PIL.Image.Image]:
    """Two passes: one counts the coded frames without decoding them, one decodes up to the last that is wanted."""
    total = _count(source, name, max_pixels)
    found, decoded = _decoded(source, name, spaced(total, count), max_pixels)
    if len(found) < len(set(spaced(total, count))):  # coded frames that are never shown: count what is
        if not decoded:
            raise _unreadable(f"{name} holds {total} coded frames, and none can be decoded")
        total = decoded
        found, _ = _decoded(source, name, spaced(total, count), max_pixels)
    return [found[index] for index in spaced(total, count)]


def _count(source: Path | bytes, name: str, max_pixels: int) -> int:
    """Coded frames in the file, after all bounds are checked."""
    return _scan(source, name, max_pixels)[0]


def _scan(source: Path | bytes, name: str, max_pixels: int) -> tuple[int, Timeline, int]:
    """Coded frames in the file, when they are shown, and how many pixels they have, after all bounds are checked."""
    ticks: list[int | None] = []
    last = 0
    with _container(source, name) as (container, stream):
        declared = float(container.duration or 0) / 1e6
        _check_length(name, declared)
        total = shown = 0
        end = 0.0
        for packet in container.demux():
            if packet.pts is not None and packet.time_base:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index == stream.index and packet.size:
                total += 1
                shown += not packet.is_discard
                if not packet.is_discard:
                    ticks.append(packet.pts)
                    last = max(last, (packet.pts or 0) + (packet.duration or 0))
        end -= float(container.start_time or 0) / 1e6
        _check_length(name, end)
        _check_bounds(name, total, stream.codec_context.width, stream.codec_context.height, max_pixels=max_pixels)
        if total < 0.9 * (stream.frames or 0):
            raise _unreadable(f"{name} is cut off: it holds {total} of {stream.frames} frames")
        if end < 0.9 * declared - 1 / float(stream.average_rate or 1):
            raise _unreadable(f"{name} is cut off: it ends after {end:.1f} of {declared:.1f} seconds")
        if not shown:
            raise _unreadable(f"{name} holds no frame")
        pixels = total * int(stream.codec_context.width) * int(stream.codec_context.height)
        known = sorted(tick for tick in ticks if tick is not None)
        if len(known) < len(ticks):
            return shown, Timeline((), 0, Fraction(1)), pixels
        if last <= known[-1]:  # a last frame without a length: as long as the others
            last = known[-1] + max(1, round((known[-1] - known[0]) / max(1, len(known) - 1)))
        return shown, Timeline(tuple(known), last, Fraction(stream.time_base)), pixels


def _decoded(
    source: Path | bytes, name: str, wanted: list[int], max_pixels: int, *, timed: bool = False
) -> tuple[dict[int, PIL.Image.Image], int]:
    """Number → frame of those that are wanted, and how many were decoded (to the last wanted one, or to the end).
    `timed`: wanted are not numbers but times, in the stream's own unit; a frame that is never shown gives way to the
    next one."""
    found: dict[int, PIL.Image.Image] = {}
    number, left = 0, sorted(set(wanted), reverse=True)
    # The generator ends before the container closes.
    with _container(source, name) as (container, stream), closing(container.decode(stream)) as shown:
        for frame in shown:
            at = frame.pts if timed else number
            if at is not None and at >= left[-1]:
                _check_bounds(name, 1, frame.width, frame.height, max_pixels=max_pixels)
                _check_kept(name, len(wanted), len(wanted) * frame.width * frame.height)
                picture = _upright(frame)
                while left and at >= left[-1]:
                    found[left.pop()] = picture
            number += 1
            if not left:
                break
    return found, number


def _upright(frame: Any) -> PIL.Image.Image:
    """As a player shows it: telephones film lying down and say so beside the picture."""
    # One thread here, too: PyAV 17 and later keep a converter, whose threads a process forked from this one lacks.
    image: PIL.Image.Image = frame.to_image(**({"threads": 1} if _pyav() >= 17 else {}))
    turn = round(frame.rotation / 90) * 90 % 360  # counterclockwise
    return image.transpose(_UPRIGHT[turn]) if turn else image


@contextmanager
def _container(source: Path | bytes, name: str) -> Iterator[tuple[Any, Any]]:
    """The opened container and its video stream; whatever FFmpeg trips over is a `DataError`."""
    try:
        import av
    except ImportError as e:
        raise OpticNerveError(
            f"{name} needs PyAV to be read: {to_install('opticnerve[video]')}", kind="not-installed"
        ) from e

    # From an open file, not a name: FFmpeg reads some names as addresses, and nothing is ever fetched.
    file = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"}
    try:
        # A title that is no UTF-8 says nothing against the pictures; PyAV 19 and later take it by themselves.
        any_title: dict[str, Any] = {"metadata_errors": "replace"} if _pyav() < 19 else {}
        with file, av.open(file, options=options, **any_title) as container:
            covers = av.stream.Disposition.attached_pic
            streams = [s for s in container.streams.video if not s.disposition & covers]
            if not streams:
                raise _unreadable(f"there is no video in {name} ({container.format.name})", "name another file")
            if streams[0].codec_context is None:
                raise _unreadable(f"the video in {name} is of a codec that FFmpeg does not know", "convert it")
            # One thread, where FFmpeg takes one a core: a decoder that is freed waits for its threads, and with PyAV 16
            # that can last for good (its issues 751, 909, 1962). PyAV has no call that closes a decoder sooner.
            streams[0].codec_context.thread_count = 1
            streams[0].codec_context.thread_type = "NONE"
            yield container, streams[0]
    except (av.FFmpegError, EOFError) as e:
        reason = e.strerror if isinstance(e, av.FFmpegError) else "end of file"
        raise _unreadable(
            f"{name} is no video of a known container, or is damaged or incomplete: {reason}",
            "MP4, WebM, Matroska, AVI, MPEG, Ogg and the like are read; replace the video or remove the sample",
        ) from e


def _pyav() -> int:
    import av

    return int(av.__version__.partition(".")[0])


def _check_bounds(name: str, total: int, width: int, height: int, *, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise _unreadable(
            f"the frames of {name} have {width} × {height} = {width * height:,} pixels, more than the {max_pixels:,} "
            "allowed", "make it smaller",
        )  # fmt: skip
    if total > MAX_FRAMES or total * width * height > MAX_DECODED:
        raise _unreadable(
            f"{name} has {total:,} frames of {width} × {height}; at most {MAX_FRAMES:,} frames and {MAX_DECODED:,} "
            "pixels in all are read", "cut it, or make it smaller",
        )  # fmt: skip


def _check_length(name: str, seconds: float) -> None:
    if seconds > MAX_SECONDS:
        raise _unreadable(f"{name} takes {seconds:,.0f} seconds, more than the {MAX_SECONDS:,} allowed", "cut it")


def _check_kept(name: str, count: int, pixels: int) -> None:
    if pixels > MAX_KEPT:
        raise _unreadable(
            f"{count} frames of {name} have {pixels:,} pixels, more than the {MAX_KEPT:,} that are kept",
            "ask for fewer frames, or make it smaller",
        )
