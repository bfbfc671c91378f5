"""Any sound a user may have, as one thing: mono samples of one rate between -1 and 1, or one clear error.

Data readers, chat, server and evaluation open their sound here and nowhere else. Decoding is libsndfile's (by
`soundfile`), resampling soxr's; both come with `pip install 'opticnerve[audio]'`.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import re
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from opticnerve.data.media.files import digest, errors_at, locate, name_of, unreadable
from opticnerve.types import OpticNerveError, to_install

Source = Path | str | bytes | NDArray[np.float32]
Samples = NDArray[np.float32]

RATE = 16_000  # what Whisper and most other audio encoders were trained on
MAX_SECONDS = 600.0
# Samples a second of files: from telephones' half to studios' most. Beyond them a header is damaged, or lies.
MIN_RATE, MAX_RATE = 1_000, 192_000

# libsndfile reads many more, some of them by next to nothing.
_FORMATS = {"WAV": "wav", "WAVEX": "wav", "RF64": "wav", "FLAC": "flac", "MP3": "mp3", "OGG": "ogg"}
_BLOCK = 65_536  # samples decoded at a time
_UNKNOWN_LENGTH = 2**62
_UNRECOGNISED, _NO_FILE = 1, 7  # of libsndfile's error numbers
# MPEG frames hold 1,152 samples; encoders differ by one or two in what they count.
_SLACK = 2 * 1_152
# Float files may overshoot 1; one of such size holds 16- or 24-bit numbers that nobody divided.
_LOUDEST = 100.0


def open_audio(source: Source, *, where: str = "", rate: int = RATE, max_seconds: float = MAX_SECONDS) -> Samples:
    """Mono samples (N,), float32, `rate` a second.

    Args:
        source: a file, encoded bytes, a `data:` URL, or samples already opened, which come back as they are. Nothing
            is ever fetched.
        where: what the error shall name, e.g. `clips.jsonl:12`.
        rate: samples a second of what is returned; sound of another rate is resampled (soxr, high quality).
        max_seconds: longer sound is refused, by its header where that says so, before it is decoded.

    How each kind of sound is read: wav (8 to 32 bits, float; also with the length left open, as ffmpeg streams it),
    flac, mp3, ogg (Vorbis and Opus); several channels become their mean.

    Raises:
        DataError: kind `missing-audio` (no such file), `url` (http addresses are not fetched), or `unreadable-audio`:
            a folder, an empty file, no sound of these formats, damaged, cut off (as far as the format lets one tell:
            wav, flac, ogg, and mp3 with a length in its header), no samples, NaN or infinite or undivided samples,
            longer than `max_seconds`, of less than 1,000 or more than 192,000 samples a second.
        OpticNerveError: soundfile or soxr is not installed.
    """
    if isinstance(source, np.ndarray):
        return source
    soundfile, soxr = _library("soundfile"), _library("soxr")
    name = name_of(source, "audio")
    with errors_at(where, name, "audio"):
        try:
            with _opened(locate(source, "audio")) as file, soundfile.SoundFile(file) as sound:
                _check_header(sound, name, max_seconds)
                mono_N = _decode(sound, name)
                sound_rate = int(sound.samplerate)
        except soundfile.LibsndfileError as e:
            if e.code == _UNRECOGNISED:
                raise _unreadable(f"{name} is not sound of a known format ({_known()})", _CONVERT) from e
            # For a cut mp3 libsndfile says that the file does not exist, which it does.
            reason = "" if e.code == _NO_FILE else f": {str(e.error_string).rstrip('.')}"
            raise _unreadable(f"{name} is damaged or incomplete{reason}") from e
        _check_samples(mono_N, name)
    if sound_rate != rate:
        mono_N = soxr.resample(mono_N, sound_rate, rate)
    return np.ascontiguousarray(mono_N, dtype=np.float32)


def audio_digest(source: Source, *, where: str = "") -> str:
    """SHA-256 of the stored bytes, not decoded: equal for equal files. Of opened samples, of their numbers."""
    if isinstance(source, np.ndarray):
        return hashlib.sha256(source.tobytes()).hexdigest()
    return digest(source, "audio", where=where)


_CONVERT = "convert it, for example with `ffmpeg -i FILE out.wav`"
_unreadable = partial(unreadable, "audio")


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as e:  # OSError: the wheel's libsndfile does not load here
        raise OpticNerveError(
            f"sound needs the package {name}, which cannot be imported: {e}; run `{to_install('opticnerve[audio]')}`",
            kind="not-installed",
        ) from e


def _opened(located: Path | bytes) -> BinaryIO:
    """An open file without a name: libsndfile would trust one that ends in .raw."""
    return io.BytesIO(located) if isinstance(located, bytes) else os.fdopen(os.open(located, os.O_RDONLY), "rb")


def _known() -> str:
    return ", ".join(dict.fromkeys(_FORMATS.values()))


def _check_header(sound: Any, name: str, max_seconds: float) -> None:
    """Refuse by what the file says of itself, before anything is decoded."""
    if sound.format not in _FORMATS:
        raise _unreadable(f"{name} is {sound.format}, which is none of {_known()}", _CONVERT)
    if not MIN_RATE <= sound.samplerate <= MAX_RATE:
        raise _unreadable(
            f"{name} has {sound.samplerate:,} samples a second; {MIN_RATE:,} to {MAX_RATE:,} are read", _CONVERT
        )
    if sound.frames >= _UNKNOWN_LENGTH:
        raise _unreadable(f"{name} does not say how long it is", _CONVERT)
    if sound.frames == 0:
        raise _unreadable(f"{name} holds no samples")
    if sound.frames > max_seconds * sound.samplerate:
        raise _unreadable(
            f"{name} is {sound.frames / sound.samplerate:,.1f} seconds long, more than the {max_seconds:,g} allowed",
            "cut it into pieces",
        )
    # libsndfile reads a wav file that was cut off as if it were whole; its log alone tells.
    if (found := re.search(r"^data\s*:\s*(\d+)\s*\(should be (\d+)\)", sound.extra_info, re.MULTILINE)) is not None:
        declared, there = int(found[1]), int(found[2])
        # A program that writes to a pipe cannot know the length, and declares the largest there is.
        if there < declared < 0x7FFF0000:
            raise _unreadable(f"{name} is cut off: {there:,} bytes of sound, of {declared:,} declared")


def _decode(sound: Any, name: str) -> Samples:
    """Block by block, so that many channels never stand in memory together."""
    declared = int(sound.frames)
    parts: list[Samples] = [np.zeros(0, np.float32)]
    # Not `sound.blocks`: where a file ends early, it hands over the block's length of whatever memory holds.
    while len(block_NC := sound.read(_BLOCK, dtype="float32", always_2d=True)):
        parts.append(block_NC.mean(axis=1))
    mono_N = np.concatenate(parts)
    if len(mono_N) < declared - (_SLACK if sound.format == "MP3" else 0):
        raise _unreadable(f"{name} is cut off: {len(mono_N):,} samples, of {declared:,} declared")
    return mono_N


def _check_samples(mono_N: Samples, name: str) -> None:
    if not len(mono_N):
        raise _unreadable(f"{name} holds no samples")
    if bad := int((~np.isfinite(mono_N)).sum()):
        raise _unreadable(f"{name} holds {bad:,} samples that are NaN or infinite, of {len(mono_N):,}")
    if (loudest := float(np.abs(mono_N).max())) > _LOUDEST:
        raise _unreadable(
            f"{name} has samples up to {loudest:,.0f}; floating-point sound lies between -1 and 1",
            "divide its samples by the largest number of their kind, such as 32,768",
        )
