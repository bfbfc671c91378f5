"""Every kind of sound becomes mono samples of one rate between -1 and 1, or one clear error."""

from __future__ import annotations

import base64
import hashlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import refused
from opticnerve.data.media import audio
from opticnerve.data.media.audio import audio_digest, open_audio
from opticnerve.types import DataError

sf = pytest.importorskip("soundfile", reason="sound needs `pip install 'opticnerve[audio]'`")
pytest.importorskip("soxr", reason="sound needs `pip install 'opticnerve[audio]'`")


def sine(hertz: float = 440, *, rate: int = 16_000, seconds: float = 1, loudness: float = 0.5) -> Any:
    return (loudness * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def encoded(samples: Any, rate: int = 16_000, format: str = "WAV", subtype: str | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    sf.write(file, samples, rate, format=format, subtype=subtype, **options)
    return file.getvalue()


def pitch(samples: Any, rate: int) -> float:
    """The loudest frequency, in hertz, to a tenth of a bin or so (parabola through the peak)."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    k = int(spectrum.argmax())
    left, middle, right = np.log(spectrum[k - 1 : k + 2])
    return float((k + 0.5 * (left - right) / (left - 2 * middle + right)) * rate / len(samples))


def refusal_of(source: object, kind: str = "unreadable-audio", **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        open_audio(source, where="clips.jsonl:7", **options)  # type: ignore[arg-type]
    assert caught.value.where == "clips.jsonl:7"
    assert caught.value.kind == kind
    assert caught.value.remedy
    return str(caught.value)


class TestWhatIsRead:
    @pytest.mark.parametrize(
        ("subtype", "step"),
        [("PCM_U8", 2**-7), ("PCM_16", 2**-15), ("PCM_24", 2**-23), ("PCM_32", 2**-23), ("FLOAT", 0), ("DOUBLE", 0)],
    )
    def test_wav_of_every_width_keeps_its_samples(self, subtype: str, step: float) -> None:
        wave = sine()
        heard = open_audio(encoded(wave, subtype=subtype))
        assert heard.dtype == np.float32
        assert np.abs(heard - wave).max() <= step

    @pytest.mark.parametrize("format", ["WAVEX", "RF64", "FLAC"])
    def test_lossless_formats(self, format: str) -> None:
        assert np.abs(open_audio(encoded(sine(), format=format, subtype="PCM_16")) - sine()).max() <= 2**-15

    @pytest.mark.parametrize(
        ("format", "subtype"), [("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS"), ("OGG", "OPUS")], ids=str
    )
    def test_lossy_formats_at_24_khz(self, format: str, subtype: str) -> None:
        heard = open_audio(encoded(sine(440, rate=24_000), 24_000, format, subtype))
        assert len(heard) == pytest.approx(16_000, abs=1_600)
        middle = heard[4_000:12_000]
        assert pitch(middle, 16_000) == pytest.approx(440, abs=1)
        assert np.abs(middle).max() == pytest.approx(0.5, abs=0.05)

    def test_channels_become_their_mean(self) -> None:
        left, right = sine(300), sine(700)
        heard = open_audio(encoded(np.stack([left, right], 1), subtype="FLOAT"))
        np.testing.assert_allclose(heard, (left + right) / 2, atol=1e-7)
        opposite = np.stack([left, -left], 1)
        assert np.abs(open_audio(encoded(opposite, subtype="FLOAT"))).max() == 0

    def test_a_file_a_name_bytes_and_a_data_url_are_the_same(self, tmp_path: Path) -> None:
        data = encoded(sine())
        path = tmp_path / "clip.raw"  # the content counts, and not the name
        path.write_bytes(data)
        url = "data:audio/wav;base64," + base64.b64encode(data).decode()
        first = open_audio(path)
        assert all(np.array_equal(first, open_audio(s)) for s in (str(path), data, url))
        assert {audio_digest(s) for s in (path, str(path), data, url)} == {hashlib.sha256(data).hexdigest()}

    def test_opened_samples_come_back(self) -> None:
        wave = sine()
        assert open_audio(wave) is wave
        assert audio_digest(wave) == audio_digest(wave.copy()) != audio_digest(sine(441))

    def test_a_streamed_wav_declares_no_length(self) -> None:
        """As ffmpeg writes it to a pipe."""
        data = bytearray(encoded(sine()))
        at = data.find(b"data") + 4
        data[at : at + 4] = b"\xff\xff\xff\xff"
        assert len(open_audio(bytes(data))) == 16_000


class TestResampling:
    @pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 24_000, 44_100, 48_000])
    @pytest.mark.parametrize("hertz", [110.0, 997.0, 3_000.0])
    def test_a_sine_keeps_its_pitch_and_loudness(self, rate: int, hertz: float) -> None:
        heard = open_audio(encoded(sine(hertz, rate=rate), rate, subtype="FLOAT"))
        assert len(heard) == pytest.approx(16_000, abs=2)
        middle = heard[2_000:-2_000]
        assert pitch(middle, 16_000) == pytest.approx(hertz, abs=0.2)
        wanted = sine(hertz)[2_000 : 2_000 + len(middle)]
        assert np.abs(middle - wanted).max() < 1e-3

    def test_what_the_new_rate_cannot_hold_is_gone_and_does_not_fold_back(self) -> None:
        heard = open_audio(encoded(sine(11_000, rate=48_000), 48_000, subtype="FLOAT"))
        assert np.abs(heard[500:-500]).max() < 1e-3

    def test_another_rate_is_had_by_asking(self) -> None:
        assert len(open_audio(encoded(sine()), rate=8_000)) == 8_000


class TestRefusals:
    def test_no_such_file(self, tmp_path: Path) -> None:
        assert "nothing.wav does not exist" in refusal_of(tmp_path / "nothing.wav", "missing-audio")

    def test_a_folder_and_an_empty_file(self, tmp_path: Path) -> None:
        (tmp_path / "empty.wav").touch()
        assert "is a folder" in refusal_of(tmp_path)
        assert "is an empty file" in refusal_of(tmp_path / "empty.wav")
        assert "is empty" in refusal_of(b"")

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
    def test_a_pipe_is_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        assert "not a regular file" in refusal_of(tmp_path / "pipe")

    @pytest.mark.parametrize("data", [b"hello world" * 50, b"RIFF", b"\x89PNG\r\n\x1a\n" + bytes(100)])
    def test_no_sound(self, data: bytes) -> None:
        assert "not sound of a known format (wav, flac, mp3, ogg)" in refusal_of(data)

    def test_a_format_that_libsndfile_alone_knows(self) -> None:
        message = refusal_of(encoded(sine(), format="AIFF"))
        assert "is AIFF, which is none of wav, flac, mp3, ogg" in message
        assert "ffmpeg" in message

    def test_a_wav_that_was_cut_off(self) -> None:
        data = encoded(sine())
        assert "is cut off: 15,978 bytes of sound, of 32,000 declared" in refusal_of(data[:16_022])

    @pytest.mark.parametrize("format", ["FLAC", "OGG", "MP3"])
    @pytest.mark.parametrize("part", [0.5, 0.05])
    def test_a_packed_file_that_was_cut_off(self, format: str, part: float) -> None:
        data = encoded(sine(seconds=3), format=format)
        message = refusal_of(data[: int(len(data) * part)])
        assert "damaged or incomplete" in message or "is cut off" in message
        assert "does not exist" not in message

    def test_a_flac_of_unknown_length(self) -> None:
        data = bytearray(encoded(sine(), format="FLAC"))
        data[21] &= 0xF0  # STREAMINFO: the lower four and the next 32 bits are the number of samples
        data[22:26] = bytes(4)
        assert "does not say how long it is" in refusal_of(bytes(data))

    def test_no_samples(self) -> None:
        assert "holds no samples" in refusal_of(encoded(sine()[:0]))

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_no_numbers(self, bad: float) -> None:
        wave = sine()
        wave[5] = bad
        assert "holds 1 samples that are NaN or infinite, of 16,000" in refusal_of(encoded(wave, subtype="FLOAT"))

    def test_samples_that_nobody_divided(self) -> None:
        message = refusal_of(encoded(sine(loudness=32_767), subtype="FLOAT"))
        assert "samples up to 32,7" in message
        assert "32,768" in message

    def test_too_long_is_told_by_the_header(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(audio, "_decode", lambda *_: pytest.fail("decoded"))
        assert "is 3.0 seconds long, more than the 2.5 allowed" in refusal_of(encoded(sine(seconds=3)), max_seconds=2.5)

    def test_a_web_address(self) -> None:
        assert "fetches nothing" in refusal_of("https://example.org/a.wav", "url")

    @pytest.mark.parametrize("url", ["data:audio/wav,abc", "data:audio/wav;base64,???"])
    def test_a_bad_data_url(self, url: str) -> None:
        message = refusal_of(url)
        assert "base64" in message
        assert "data:audio/wav;base64" in message

    @pytest.mark.parametrize("name", ["soundfile", "soxr"])
    def test_an_absent_library_names_the_remedy(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, name, None)
        with refused("not-installed", name, "'opticnerve[audio]'"):
            open_audio(encoded(sine()))

    @given(st.binary(min_size=1, max_size=200), st.sampled_from([b"", b"RIFF", b"fLaC", b"OggS", b"ID3", b"\xff\xfb"]))
    def test_noise_is_refused_and_nothing_else(self, data: bytes, head: bytes) -> None:
        try:
            open_audio(head + data)
        except DataError as e:
            assert e.kind == "unreadable-audio"


@pytest.mark.photos
def test_real_speech_is_opened() -> None:
    folder = Path(os.environ.get("PHOTOS", "")) / "flickr8k_captions" / "audio"
    files = sorted(folder.glob("*.mp3"))[:20] if os.environ.get("PHOTOS") else []
    if not files:
        pytest.skip("no spoken captions: PHOTOS names no folder that holds flickr8k_captions/audio")
    for file in files:
        heard = open_audio(file)
        assert len(heard) == pytest.approx(sf.info(file).duration * 16_000, abs=2)
        assert 0.01 < np.abs(heard).max() < 2
