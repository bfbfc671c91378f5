"""Hostile pictures, sound and videos: real files of each format, with their bytes hurt."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import io
import random
import struct
import wave
import zlib
from pathlib import Path

import fuzz_mutate as hurt
import numpy as np
import PIL.Image
from fuzz_target import Target

from opticnerve.data.media.audio import MAX_SECONDS, RATE, audio_digest, open_audio
from opticnerve.data.media.open import image_size, open_image
from opticnerve.data.media.video import frames


@functools.cache
def pictures() -> tuple[bytes, ...]:
    rng = np.random.default_rng(0)
    rgb = PIL.Image.fromarray(rng.integers(0, 256, (24, 16, 3), dtype=np.uint8))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    made = [
        written(rgb, "PNG"), written(rgb, "PNG", exif=exif), written(rgb.convert("P"), "PNG", transparency=3),
        written(PIL.Image.fromarray(rng.integers(0, 2**16, (9, 9), dtype=np.uint16)), "PNG"),
        written(rgb.convert("LA"), "PNG"), written(rgb.convert("1"), "PNG"),
        written(rgb, "JPEG", exif=exif, quality=60), written(rgb, "JPEG", progressive=True), written(rgb.convert("CMYK"), "JPEG"),
        written(rgb, "WEBP"), written(rgb.convert("RGBA"), "WEBP", lossless=True, exif=exif), written(rgb, "BMP"), written(rgb.convert("P"), "BMP"),
        written(rgb, "GIF"), written(rgb, "TIFF"), written(rgb, "TIFF", compression="tiff_lzw"), written(rgb, "TIFF", compression="jpeg"),
        written(rgb.convert("L"), "TIFF", compression="tiff_deflate"), written(rgb, "PPM"), written(rgb.convert("1"), "PPM"),
        written(rgb, "ICO", sizes=[(16, 16)]), written(rgb, "JPEG2000"), b"P3 2 2 255 " + b"1 2 3 " * 4,
    ]  # fmt: skip
    if "AVIF" in PIL.Image.SAVE:
        made.append(written(rgb, "AVIF"))
    return (*made, *animations())


@functools.cache
def animations() -> tuple[bytes, ...]:
    rng = np.random.default_rng(1)
    first, *rest = (PIL.Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)) for _ in range(4))
    return tuple(
        written(first, f, save_all=True, append_images=rest, duration=40) for f in ("GIF", "WEBP", "PNG", "TIFF")
    )


def written(picture: PIL.Image.Image, format: str, **options: object) -> bytes:
    PIL.Image.init()
    out = io.BytesIO()
    picture.save(out, format, **options)
    return out.getvalue()


def png(width: int, height: int, kind: int = 2, depth: int = 8, data: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG that says of itself what one likes, with checksums that are right."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width & 0xFFFFFFFF, height & 0xFFFFFFFF, depth & 255, kind & 255, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def make_image(rng: random.Random) -> bytes:
    if rng.random() < 0.1:
        zeros = zlib.compress(bytes(rng.choice((10, 10_000, 10_000_000))), 9)
        width, height = (rng.choice((*hurt.NUMBERS, 8_000, 100_000)) for _ in range(2))
        return png(width, height, rng.choice((0, 2, 3, 4, 6, 7)), rng.choice((1, 2, 4, 8, 16, 3)), zeros)
    return hurt.bytes_hurt(rng, rng.choice(pictures()), others=pictures(), most=4)


# Decoding takes a second for some ten million pixels, honest ones too; what is tried here is the parsing.
SMALL = 4_000_000


def run_image(data: bytes, folder: Path) -> None:
    opened = open_image(data, max_pixels=SMALL)
    assert opened.mode == "RGB"
    assert 0 < opened.width * opened.height <= SMALL
    image_size(data)
    open_image(data, at_least=(4, 4), max_pixels=SMALL)


# -- sound ------------------------------------------------------------------------------------------------------------


@functools.cache
def sounds() -> tuple[bytes, ...]:
    soundfile = importlib.import_module("soundfile")
    rng = np.random.default_rng(0)
    one, two = rng.uniform(-0.5, 0.5, 900).astype(np.float32), rng.uniform(-0.5, 0.5, (700, 2)).astype(np.float32)
    made = []
    for format, subtype, samples, rate in (
        ("WAV", "PCM_16", one, 16_000), ("WAV", "PCM_24", two, 44_100), ("WAV", "FLOAT", one, 8_000), ("WAV", "IMA_ADPCM", one, 16_000),
        ("WAV", "ULAW", one, 8_000), ("WAVEX", "PCM_16", two, 48_000), ("RF64", "PCM_16", one, 16_000), ("FLAC", "PCM_16", one, 16_000),
        ("FLAC", "PCM_24", two, 96_000), ("OGG", "VORBIS", two, 44_100), ("OGG", "OPUS", one, 48_000), ("MP3", "MPEG_LAYER_III", one, 24_000),
    ):  # fmt: skip
        out = io.BytesIO()
        soundfile.write(out, samples, rate, format=format, subtype=subtype)
        made.append(out.getvalue())
    plain = io.BytesIO()
    with wave.open(plain, "wb") as file:
        file.setparams((1, 2, 8_000, 0, "NONE", ""))
        file.writeframes(bytes(400))
    return (*made, plain.getvalue())


def make_sound(rng: random.Random) -> bytes:
    return hurt.bytes_hurt(rng, rng.choice(sounds()), others=sounds(), most=4)


def run_sound(data: bytes, folder: Path) -> None:
    samples = open_audio(data)
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert 0 < len(samples) <= MAX_SECONDS * RATE + RATE
    assert np.isfinite(samples).all()
    audio_digest(data)


# -- video ------------------------------------------------------------------------------------------------------------


@functools.cache
def videos() -> tuple[bytes, ...]:
    av = importlib.import_module("av")
    made = []
    for container, codec in (
        ("mp4", "mpeg4"),
        ("matroska", "mpeg4"),
        ("avi", "mpeg4"),
        ("mpegts", "mpeg2video"),
        ("webm", "libvpx-vp9"),
    ):
        out = io.BytesIO()
        with av.open(out, "w", format=container) as file:
            stream = file.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            for i in range(5):
                frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 40 * i, np.uint8), format="rgb24")
                for packet in stream.encode(frame):
                    file.mux(packet)
            for packet in stream.encode():
                file.mux(packet)
        made.append(out.getvalue())
    return (*made, *animations())


def make_video(rng: random.Random) -> bytes:
    return hurt.bytes_hurt(rng, rng.choice(videos()), others=videos(), most=4)


def run_video(data: bytes, folder: Path) -> None:
    found = frames(data, 3, max_pixels=SMALL)
    assert len(found) == 3
    assert all(f.mode == "RGB" for f in found)


def _targets() -> tuple[Target, ...]:
    """What is installed: sound and video are extras."""
    wanted = (
        ("", Target("images", make_image, run_image)),
        ("soundfile", Target("sounds", make_sound, run_sound)),
        ("av", Target("videos", make_video, run_video)),
    )
    return tuple(target for library, target in wanted if not library or importlib.util.find_spec(library))


TARGETS = _targets()
