"""A video becomes the frames that the rule says, each upright and RGB, or one clear error; and nothing is decoded
before a frame is opened."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from errors import refused
from opticnerve.data.dataset.read import read
from opticnerve.data.media import video
from opticnerve.data.media.open import image_digest, image_size, open_image
from opticnerve.data.media.video import frames, spaced
from opticnerve.types import Conversation, DataError, Frame, ImagePart, TextPart

STEP = 8  # frame number n is a field of grey 8 · n, with a white corner at the top left


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    video._recent.cache_clear()
    yield
    video._recent.cache_clear()


def picture(number: int, size: tuple[int, int] = (64, 48)) -> PIL.Image.Image:
    made = PIL.Image.new("RGB", size, (STEP * number,) * 3)
    made.paste("white", (0, 0, 8, 8))
    return made


def animation(count: int, format: str = "GIF", **options: Any) -> bytes:
    file = io.BytesIO()
    first, *rest = [picture(i) for i in range(count)]
    first.save(file, format, save_all=True, append_images=rest, duration=100, **options)
    return file.getvalue()


def film(
    file: Path, count: int = 30, codec: str = "mpeg4", *, size: tuple[int, int] = (64, 48), turn: int = 0,
    container: dict[str, str] | None = None, **options: str,
) -> Path:  # fmt: skip
    """A video of ten frames a second; `turn`: degrees counterclockwise that a player shall turn it by."""
    av = pytest.importorskip("av", reason="PyAV is not installed (extra: video)")
    with av.open(str(file), "w", options=container or {}) as made:
        stream = made.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        if turn:
            if not hasattr(stream, "set_display_rotation"):
                pytest.skip("this PyAV cannot write how a film was held")
            stream.set_display_rotation(turn)
        for i in range(count):
            made.mux(stream.encode(av.VideoFrame.from_image(picture(i, size))))
        made.mux(stream.encode())
    return file


def numbers(pictures: list[PIL.Image.Image]) -> list[int]:
    """Which frame each picture is, read off its grey."""
    assert all(p.mode == "RGB" for p in pictures)
    return [round(p.getpixel((40, 30))[0] / STEP) for p in pictures]  # type: ignore[index]


def refusal_of(source: Any, count: int = 4, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        frames(source, count, where="data.jsonl:7", **options)
    assert caught.value.where == "data.jsonl:7"
    return caught.value


@pytest.mark.parametrize(("total", "count"), [(30, 8), (8, 8), (100, 7), (9, 2), (1, 1)])
def test_the_rule_is_transformers(total: int, count: int) -> None:
    from transformers.video_utils import VideoMetadata, default_sample_indices_fn

    metadata = VideoMetadata(total_num_frames=total, fps=10)
    assert spaced(total, count) == default_sample_indices_fn(metadata, num_frames=count).tolist()


class TestAnimations:
    @pytest.mark.parametrize(
        ("format", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})], ids=["gif", "webp", "apng"]
    )
    def test_frames_at_equal_distances(self, format: str, options: dict[str, Any], tmp_path: Path) -> None:
        content = animation(12, format, **options)
        found = frames(content, 5)
        assert numbers(found) == spaced(12, 5) == [0, 2, 4, 7, 9]
        assert found[0].getpixel((2, 2)) == (255, 255, 255)
        (tmp_path / "clip.bin").write_bytes(content)  # the content says what it is, not the name
        assert numbers(frames(tmp_path / "clip.bin", 3)) == [0, 4, 8]

    def test_of_few_frames_some_come_twice(self) -> None:
        assert numbers(frames(animation(3), 8)) == [0, 0, 0, 1, 1, 1, 2, 2]

    def test_what_comes_back_is_the_caller_s(self) -> None:
        content = animation(3)
        frames(content, 2)[0].paste("red", (0, 0, 64, 48))
        assert numbers(frames(content, 2)) == [0, 1]

    def test_transparency_lies_over_white(self) -> None:
        file = io.BytesIO()
        clear = [PIL.Image.new("RGBA", (8, 8), (0, 0, 0, 0)), PIL.Image.new("RGBA", (8, 8), (255, 0, 0, 128))]
        clear[0].save(file, "WEBP", save_all=True, append_images=clear[1:], lossless=True)
        assert frames(file.getvalue(), 2)[0].getpixel((3, 3)) == (255, 255, 255)


class TestContainers:
    @pytest.mark.parametrize(
        ("name", "codec"),
        [("a.mp4", "libx264"), ("a.mp4", "mpeg4"), ("a.webm", "libvpx"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4"),
         ("a.mkv", "ffv1"), ("a.ts", "mpeg2video"), ("a.mov", "libx264")],
    )  # fmt: skip
    def test_frames_at_equal_distances(self, name: str, codec: str, tmp_path: Path) -> None:
        file = film(tmp_path / name, 30, codec)
        found = frames(file, 7)
        assert numbers(found) == spaced(30, 7) == [0, 4, 8, 12, 17, 21, 25]
        assert {f.size for f in found} == {(64, 48)}
        assert min(found[3].getpixel((2, 2))) > 200  # type: ignore[arg-type, type-var]
        assert numbers(frames(file.read_bytes(), 2)) == [0, 15]

    def test_pixels_are_those_that_transformers_reads(self, tmp_path: Path) -> None:
        from transformers.video_utils import load_video

        file = film(tmp_path / "a.mp4")
        theirs, _ = load_video(str(file), num_frames=6, backend="pyav")
        ours = np.stack([np.asarray(f) for f in frames(file, 6)])
        assert np.array_equal(ours, theirs)

    @pytest.mark.parametrize("turn", [90, -90, 180])
    def test_a_turned_film_stands_upright(self, turn: int, tmp_path: Path) -> None:
        shown = frames(film(tmp_path / "a.mp4", 5, turn=turn), 1)[0]
        wanted = picture(0).rotate(turn, expand=True)
        assert shown.size == wanted.size
        assert np.abs(np.asarray(shown, dtype=int) - np.asarray(wanted)).max() < 60

    def test_coded_frames_that_are_never_shown_are_not_counted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Were they, the last frames would be missing (VP8's hidden reference frames; here 20 are pretended)."""
        file = film(tmp_path / "a.mp4", 10)
        monkeypatch.setattr(video, "_count", lambda *_: 30)
        assert numbers(frames(file, 5)) == spaced(10, 5)

    @pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted as Linux lists them")
    def test_decoding_starts_no_thread(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A decoder that is freed while it has threads may hang for good."""
        file = film(tmp_path / "a.mp4", 30, "libx264", size=(640, 360))
        before, during, upright = set(os.listdir("/proc/self/task")), set[str](), video._upright

        def listing(frame: Any) -> PIL.Image.Image:
            during.update(os.listdir("/proc/self/task"))
            return upright(frame)

        monkeypatch.setattr(video, "_upright", listing)
        assert len(frames(file, 4)) == 4 and during <= before

    def test_without_pyav_it_says_what_to_install(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "av", None)
        (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x20ftypisom")
        with refused("not-installed", "'opticnerve[video]'") as caught:
            frames(tmp_path / "a.mp4", 2)
        # Not a bad sample: `bad_samples: skip` must not pass over every video of the data.
        assert not isinstance(caught.value, DataError)
        assert numbers(frames(animation(4), 2)) == [0, 2]


class TestFolders:
    def test_pictures_by_number(self, tmp_path: Path) -> None:
        for i in range(12):
            picture(i).save(tmp_path / f"frame_{i}.png")
        (tmp_path / "notes.txt").write_text("no picture")
        assert numbers(frames(tmp_path, 4)) == [0, 3, 6, 9]

    def test_a_bad_picture_is_named(self, tmp_path: Path) -> None:
        picture(0).save(tmp_path / "1.png")
        (tmp_path / "2.png").write_bytes(b"nothing")
        assert "2.png is not an image" in refusal_of(tmp_path, 2).problem
        assert numbers(frames(tmp_path, 1)) == [0]  # a picture that is not taken is not opened

    def test_no_pictures(self, tmp_path: Path) -> None:
        assert "holds no pictures" in refusal_of(tmp_path).problem


class TestRefusals:
    def test_files_that_hold_no_video(self, tmp_path: Path) -> None:
        pytest.importorskip("av", reason="PyAV is not installed (extra: video)")
        still = io.BytesIO()
        picture(0).save(still, "JPEG")
        sound = io.BytesIO()
        with wave.open(sound, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(bytes(1600))
        playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"
        cases: dict[str, tuple[bytes, str]] = {
            "empty.mp4": (b"", "is empty"),
            "text.mp4": (b"no video at all" * 50, "no video of a known container"),
            "list.mp4": (playlist, "no video of a known container"),
            "list.m3u8": (playlist, "no video of a known container"),
            "concat.mp4": (b"ffconcat version 1.0\nfile a.mp4\n", "no video of a known container"),
            "sound.mp4": (sound.getvalue(), "no video"),
            "still.jpg": (still.getvalue(), "a still picture (JPEG)"),
            "one.gif": (animation(1), "a still picture (GIF)"),
        }
        for name, (content, problem) in cases.items():
            (tmp_path / name).write_bytes(content)
            error = refusal_of(tmp_path / name)
            assert error.kind == "unreadable-video" and name in str(error) and problem in error.problem, name
            assert problem in refusal_of(content).problem, name
        missing = refusal_of(tmp_path / "nowhere.mp4")
        assert missing.kind == "missing-video" and "nowhere.mp4" in missing.problem

    def test_a_playlist_of_a_real_film_is_not_followed(self, tmp_path: Path) -> None:
        """FFmpeg would: whoever writes the data could have any file read."""
        target = film(tmp_path / "a.ts", codec="mpeg2video")
        listed = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:3,\n{target}\n#EXT-X-ENDLIST\n"
        (tmp_path / "a.m3u8").write_text(listed)
        assert "no video of a known container" in refusal_of(tmp_path / "a.m3u8").problem

    def test_sound_alone(self, tmp_path: Path) -> None:
        av = pytest.importorskip("av", reason="PyAV is not installed (extra: video)")
        with av.open(str(tmp_path / "a.mp4"), "w") as made:
            stream = made.add_stream("aac", rate=16000, layout="mono")
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 16000
            made.mux([*stream.encode(silence), *stream.encode()])
        assert "there is no video in" in refusal_of(tmp_path / "a.mp4").problem

    @pytest.mark.parametrize("kept", [0.5, 0.8])
    @pytest.mark.parametrize(
        ("name", "codec", "container"),
        [("a.mp4", "libx264", {}), ("a.mp4", "libx264", {"movflags": "faststart"}), ("a.webm", "libvpx", {}),
         ("a.avi", "mpeg4", {})],
        ids=["mp4", "mp4 with its index first", "webm", "avi"],
    )  # fmt: skip
    def test_a_cut_off_film(self, name: str, codec: str, container: Any, kept: float, tmp_path: Path) -> None:
        file = film(tmp_path / name, 30, codec, container=container)
        content = file.read_bytes()
        error = refusal_of(content[: int(len(content) * kept)])
        assert error.kind == "unreadable-video"
        assert "cut off" in error.problem or "damaged or incomplete" in error.problem

    @pytest.mark.parametrize("format", ["WEBP", "PNG"])
    def test_a_cut_off_animation(self, format: str) -> None:
        content = animation(30, format)
        assert refusal_of(content[: len(content) // 2]).kind == "unreadable-video"

    @pytest.mark.parametrize("form", ["gif", "ts"])
    def test_forms_that_do_not_say_how_long_they_are_end_where_they_end(self, form: str, tmp_path: Path) -> None:
        whole = animation(30) if form == "gif" else film(tmp_path / "a.ts", codec="mpeg2video").read_bytes()
        found = numbers(frames(whole[: len(whole) // 2], 4))
        assert found[0] == 0 and 6 < found[-1] < 15 and found == sorted(set(found))

    def test_bounds(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = film(tmp_path / "a.mp4", 30)
        for source in (file, animation(30)):
            assert "64 × 48 = 3,072 pixels" in refusal_of(source, max_pixels=3000).problem
            with monkeypatch.context() as patch:
                patch.setattr(video, "MAX_FRAMES", 29)
                assert "30 frames of 64 × 48" in refusal_of(source).problem
            with monkeypatch.context() as patch:
                patch.setattr(video, "MAX_DECODED", 30 * 64 * 48 - 1)
                assert "30 frames of 64 × 48" in refusal_of(source).problem
            with monkeypatch.context() as patch:
                patch.setattr(video, "MAX_KEPT", 4 * 64 * 48 - 1)
                assert "12,288 pixels" in refusal_of(source).problem
        monkeypatch.setattr(video, "MAX_SECONDS", 2)
        assert "takes 3 seconds, more than the 2" in refusal_of(file).problem

    @pytest.mark.parametrize("count", [0, -1, 1025])
    def test_how_many(self, count: int, tmp_path: Path) -> None:
        with refused("out-of-range", count, 1, 1024):
            frames(animation(3), count)
        (tmp_path / "a.jsonl").write_text("{}")
        with refused("format", count, error=DataError):
            read(tmp_path / "a.jsonl", frames=count)


class TestFrame:
    def test_it_is_opened_like_any_picture(self) -> None:
        content = animation(12)
        named = [Frame(content, i, 5) for i in range(5)]
        assert numbers([open_image(f) for f in named]) == spaced(12, 5)
        assert {image_size(f) for f in named} == {(48, 64)}
        assert pickle.loads(pickle.dumps(named[2])) == named[2]

    def test_a_video_is_decoded_once_for_all_its_frames(self) -> None:
        content = animation(12)
        for i in range(5):
            open_image(Frame(content, i, 5))
        assert video._recent.cache_info().misses == 1

    def test_a_changed_file_is_read_again(self, tmp_path: Path) -> None:
        file = tmp_path / "a.gif"
        file.write_bytes(animation(12))
        assert numbers([open_image(Frame(file, 1, 2))]) == [6]
        file.write_bytes(animation(4))
        os.utime(file, ns=(1, 1))
        assert numbers([open_image(Frame(file, 1, 2))]) == [2]

    def test_digest(self, tmp_path: Path) -> None:
        (tmp_path / "a.gif").write_bytes(animation(12))
        (tmp_path / "b.gif").write_bytes(animation(12))
        digests = [image_digest(Frame(tmp_path / n, i, 4)) for n in ("a.gif", "b.gif") for i in range(4)]
        assert digests[:4] == digests[4:] and len(set(digests)) == 4
        (tmp_path / "clip").mkdir()
        picture(3).save(tmp_path / "clip/1.png")
        assert image_digest(Frame(tmp_path / "clip", 0, 1)) == image_digest(tmp_path / "clip/1.png")

    def test_errors_say_where(self) -> None:
        with refused("unreadable-video", "data.jsonl:3", 0, error=DataError):
            open_image(Frame(b"", 0, 2), where="data.jsonl:3")


class TestReaders:
    def conversation(self, tmp_path: Path, record: Any, **options: Any) -> Conversation:
        (tmp_path / "data.jsonl").write_text(json.dumps(record))
        (found,) = read(tmp_path / "data.jsonl", **options)
        return found

    def chat(self, *parts: Any, **fields: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": [*parts]}, {"role": "assistant", "content": "It moves."}]} | (
            fields
        )

    @pytest.mark.parametrize("key", ["video", "path", "url"])
    def test_chat(self, key: str, tmp_path: Path) -> None:
        (tmp_path / "a.gif").write_bytes(b"not looked at yet")
        record = self.chat({"type": "text", "text": "See:"}, {"type": "video", key: "a.gif"})
        parts = self.conversation(tmp_path, record, frames=3).messages[0].parts
        assert parts == (TextPart("See:"), *(ImagePart(Frame(tmp_path / "a.gif", i, 3)) for i in range(3)))  # type: ignore[arg-type]
        assert len(self.conversation(tmp_path, record).images) == 8

    def test_chat_with_listed_videos_and_images(self, tmp_path: Path) -> None:
        for name in ("a.gif", "b.gif", "1.png"):
            (tmp_path / name).write_bytes(b"")
        record = self.chat(
            {"type": "video"}, {"type": "image"}, {"type": "video"}, {"type": "text", "text": "?"},
            videos=["a.gif", "b.gif"], images=["1.png"],
        )  # fmt: skip
        sources: list[Any] = [i.source for i in self.conversation(tmp_path, record, frames=2).images]
        names = [s.name if isinstance(s, Path) else (s.source.name, s.index) for s in sources]
        assert names == [("a.gif", 0), ("a.gif", 1), "1.png", ("b.gif", 0), ("b.gif", 1)]

    def test_a_list_of_pictures_is_a_video(self, tmp_path: Path) -> None:
        for i in range(6):
            picture(i).save(tmp_path / f"{i}.png")
        record = self.chat({"type": "video", "video": [f"{i}.png" for i in range(6)]}, {"type": "text", "text": "?"})
        found = self.conversation(tmp_path, record, frames=3)
        assert [i.source for i in found.images] == [tmp_path / f"{i}.png" for i in (0, 2, 4)]

    @pytest.mark.parametrize("marker", ["<video>", "<image>"])
    def test_llava(self, marker: str, tmp_path: Path) -> None:
        (tmp_path / "a.gif").write_bytes(animation(6))
        says = [{"from": "human", "value": f"{marker}\nWhat moves?"}, {"from": "gpt", "value": "A ball."}]
        found = self.conversation(tmp_path, {"video": "a.gif", "conversations": says}, frames=2)
        assert found.messages[0].text == "What moves?"
        assert numbers([open_image(i.source) for i in found.images]) == [0, 3]

    def test_the_tag_without_a_video(self, tmp_path: Path) -> None:
        says = [{"from": "human", "value": "<video>What moves?"}, {"from": "gpt", "value": "A ball."}]
        with pytest.raises(DataError) as caught:
            self.conversation(tmp_path, {"conversations": says})
        assert caught.value.kind == "placeholder-without-image"

    @pytest.mark.parametrize(
        ("record", "refusal"),
        [
            ({"type": "video", "video": "no.mp4"}, ("missing-video", "no.mp4")),
            ({"type": "video", "video": "../a.mp4"}, ("outside-media", "../a.mp4")),
            ({"type": "video", "video": "https://x.org/a.mp4"}, ("url", "https://x.org/a.mp4")),
            ({"type": "video", "video": 5}, ("wrong-type", "int 5")),
            ({"type": "video", "video": []}, ("placeholder-without-image", "0 video")),
            ({"type": "video"}, ("placeholder-without-image", "0 video")),
        ],
    )
    def test_bad_records(self, record: Any, refusal: tuple[Any, ...], tmp_path: Path) -> None:
        with refused(*refusal, error=DataError):
            self.conversation(tmp_path, self.chat(record, {"type": "text", "text": "?"}))

    def test_without_a_place_it_stands_first(self, tmp_path: Path) -> None:
        (tmp_path / "a.gif").write_bytes(animation(6))
        says = [{"from": "human", "value": "What moves?"}, {"from": "gpt", "value": "A ball."}]
        found = self.conversation(tmp_path, {"video": "a.gif", "conversations": says}, frames=2)
        assert [type(p) for p in found.messages[0].parts] == [ImagePart, ImagePart, TextPart]

    def test_a_record_may_list_the_frames(self, tmp_path: Path) -> None:
        for i in range(4):
            picture(i).save(tmp_path / f"{i}.png")
        says = [{"from": "human", "value": "<video>What moves?"}, {"from": "gpt", "value": "A ball."}]
        record = {"video": [f"{i}.png" for i in range(4)], "conversations": says}
        found = self.conversation(tmp_path, record, frames=2)
        assert [i.source for i in found.images] == [tmp_path / "0.png", tmp_path / "2.png"]
