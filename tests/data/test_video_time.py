"""Frames of a video in time: which, when, and what is said of them; and what a model is trained and asked with."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import tiny
from errors import refused
from opticnerve import recipe as recipes
from opticnerve.data.dataset.convert import record_of_conversation
from opticnerve.data.dataset.load import load_data
from opticnerve.data.dataset.read import read
from opticnerve.data.encode.tokenize import IGNORE, encode
from opticnerve.data.media import video
from opticnerve.data.media.open import image_digest, open_image
from opticnerve.data.media.timeline import FrameSampling, Timeline
from opticnerve.data.media.video import in_order
from opticnerve.inference.generate import Answerer
from opticnerve.models.vlm.build import Dock
from opticnerve.models.vlm.processing import OpticNerveProcessor
from opticnerve.recipe.loading import data_entry
from opticnerve.types import Conversation, DataError, Frame, ImagePart, RecipeError, TextPart, ask

STEP = 8  # frame number n is a field of grey 8 · n


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    video._recent.cache_clear()
    video._timeline.cache_clear()


def clip(durations: list[int], format: str = "GIF") -> bytes:
    """An animation whose frames are shown so many milliseconds each."""
    file = io.BytesIO()
    first, *rest = [PIL.Image.new("RGB", (48, 32), (STEP * i,) * 3) for i in range(len(durations))]
    first.save(file, format, save_all=True, append_images=rest, duration=durations, lossless=True)
    return file.getvalue()


def film(file: Path, times: list[int], codec: str = "libx264") -> Path:
    """A video whose frames begin at these hundredths of a second."""
    av = pytest.importorskip("av", reason="PyAV is not installed (extra: video)")
    with av.open(str(file), "w") as made:
        stream = made.add_stream(codec, rate=100)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 100)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), STEP * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 100)
            made.mux(stream.encode(frame))
        made.mux(stream.encode())
    return file


def numbers(parts: list[ImagePart]) -> list[int]:
    """Which frames these are, read off their grey."""
    return [round(open_image(p.source).getpixel((40, 20))[0] / STEP) for p in parts]  # type: ignore[index]


@pytest.mark.parametrize(
    ("total", "rate", "fps"), [(300, 30, 1), (300, 30, 2), (100, 25, 0.3), (90, 10, 7), (17, 5, 5)]
)
def test_at_a_steady_rate_the_rule_is_transformers(total: int, rate: int, fps: float) -> None:
    from transformers.video_utils import VideoMetadata, default_sample_indices_fn

    theirs = default_sample_indices_fn(VideoMetadata(total_num_frames=total, fps=rate), fps=fps).tolist()
    for unit in (Fraction(1, rate), Fraction(1, 1000)):
        ticks = [round(Fraction(i, rate) / unit) for i in range(total + 1)]
        timeline = Timeline(tuple(ticks[:-1]), ticks[-1], unit)
        count = FrameSampling(fps, 1024).count(timeline.seconds)
        assert timeline.spaced(count) == theirs


@pytest.mark.parametrize(("fps", "most", "count"), [(1, 32, 12), (2, 32, 24), (0.1, 32, 1), (0.01, 32, 1), (30, 8, 8)])
def test_how_many(fps: float, most: int, count: int) -> None:
    assert FrameSampling(fps, most).count(Fraction(12)) == count


def test_an_animation_that_lingers_is_shown_by_its_clock() -> None:
    """Counted frames would all but one be of the last second."""
    found = in_order(clip([9000, *[100] * 10]), FrameSampling(1))
    assert numbers(found) == [*[0] * 9, 1]
    assert [p.timestamp for p in found] == [*["<0.0 seconds>"] * 9, "<9.0 seconds>"]
    assert numbers(in_order(clip([9000, *[100] * 10]), 10)) == [i * 11 // 10 for i in range(10)]


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9")])
def test_a_film_of_varying_rate_is_shown_by_its_clock(name: str, codec: str, tmp_path: Path) -> None:
    times = [0, 10, 20, 250, 260, 400, 500, 550]
    found = in_order(film(tmp_path / name, times, codec), FrameSampling(1))
    assert len(found) in (5, 6)  # of 5.5 to 6 seconds: how long the last frame stays, some do not say
    assert numbers(found)[:4] == [0, 2, 2, 4]
    assert [p.timestamp for p in found][:4] == ["<0.0 seconds>", "<0.2 seconds>", "<0.2 seconds>", "<2.6 seconds>"]


def test_times_begin_with_the_first_frame(tmp_path: Path) -> None:
    """A transport stream's clock begins anywhere."""
    found = in_order(film(tmp_path / "a.ts", [100 * i for i in range(1, 5)], "libx264"), FrameSampling(1))
    assert [p.timestamp for p in found] == [f"<{i}.0 seconds>" for i in range(3)] and numbers(found) == [0, 1, 2]


def test_a_coded_frame_that_is_never_shown_gives_way_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, real = film(tmp_path / "a.mp4", [100 * i for i in range(6)]), video._scan

    def with_hidden(*given: Any) -> tuple[int, Timeline, int]:
        count, found, pixels = real(*given)
        return count, Timeline(tuple(sorted((*found.ticks, found.ticks[2] + 1))), found.end, found.unit), pixels

    monkeypatch.setattr(video, "_scan", with_hidden)
    assert numbers(in_order(file, FrameSampling(1))) == [0, 1, 3, 3, 4]


def test_what_has_no_times_is_refused(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    with refused("unreadable-video", str(tmp_path), error=DataError):
        in_order(tmp_path, FrameSampling(1))
    with refused("out-of-range", 0):
        FrameSampling(0)
    with refused("out-of-range", 1025, 1024):
        FrameSampling(1, 1025)


def test_frames_in_time_are_other_pictures_to_a_cache() -> None:
    content = clip([100] * 6)
    timed, counted = (Frame(content, 1, 3, timed) for timed in (True, False))
    assert image_digest(timed) != image_digest(counted)
    assert timed.key != counted.key


# -- what is read, trained and asked ----------------------------------------------------------------------------------

IN_TIME = {"fps": 1, "max": 4}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two videos in one conversation, and one in another."""
    for name, durations in (("a", [1000] * 3), ("b", [500] * 4), ("c", [3000, 100, 100])):
        (tmp_path / f"{name}.gif").write_bytes(clip(durations))
    two = [{"type": "video"}, {"type": "text", "text": "and"}, {"type": "video"}, {"type": "text", "text": "which?"}]
    said = {"role": "assistant", "content": "the red circle"}
    lines = [
        {"messages": [{"role": "user", "content": two}, said], "videos": ["a.gif", "b.gif"]},
        {"messages": [{"role": "user", "content": "<video>\nwhen?"}, {**said, "content": "no"}], "videos": ["c.gif"]},
    ]  # fmt: skip
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "data.jsonl"


def shown(conversation: Conversation) -> list[str]:
    """What the user's turn says, frame by frame."""
    return [p.text if isinstance(p, TextPart) else "*" for p in conversation.messages[0].written_out().parts]


def test_records_say_when(data: Path) -> None:
    first, second = load_data(data_entry({"path": str(data), "frames": IN_TIME}))
    assert shown(first) == [
        "<0.0 seconds>", "*", "<1.0 seconds>", "*", "<2.0 seconds>", "*", "and",
        "<0.0 seconds>", "*", "<1.0 seconds>", "*", "which?",
    ]  # fmt: skip
    assert shown(second) == ["<0.0 seconds>", "*", "<0.0 seconds>", "*", "<0.0 seconds>", "*", "when?"]
    assert first.messages[0].text == "andwhich?"  # the question is what people said
    silent, _ = read(data, frames=FrameSampling(1, 4, timestamps=False))
    assert shown(silent) == ["*"] * 3 + ["and"] + ["*"] * 2 + ["which?"]
    assert [p["type"] for p in first.to_chat()[0]["content"]][:3] == ["text", "image", "text"]


def test_a_list_of_pictures_has_no_times(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    content = [{"type": "video", "video": ["1.png", "1.png"]}, {"type": "text", "text": "?"}]
    record = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "no"}]}
    (tmp_path / "d.jsonl").write_text(json.dumps(record))
    with refused("unreadable-video", 2, error=DataError):
        list(read(tmp_path / "d.jsonl", frames=FrameSampling(1)))


def test_a_converted_record_reads_as_the_same_frames(data: Path) -> None:
    def refer(kind: str, source: Any) -> dict[str, Any]:
        return {kind: Path(source).name}

    for conversation in read(data, frames=FrameSampling(1, 4)):
        again = data.with_name("again.jsonl")
        again.write_text(json.dumps(record_of_conversation(conversation, refer)))
        (found,) = read(again, frames=FrameSampling(1, 4))
        assert found.messages == conversation.messages


@pytest.mark.parametrize("encoder", ["squares", "native"])
def test_what_is_trained_is_what_is_asked(encoder: str, data: Path, docked: Callable[..., Dock]) -> None:
    made = docked("llama", tiny.native_vision()) if encoder == "native" else docked("llama")
    conversations = list(read(data, frames=FrameSampling(1, 4)))
    for c in conversations:
        whole, asked = encode(c, made.processor), encode(c.prompt(), made.processor, learn=False)
        assert whole.input_ids[: len(asked.input_ids)] == asked.input_ids
        assert set(whole.labels[: len(asked.input_ids)]) == {IGNORE}
        text = made.processor.tokenizer.decode(asked.input_ids)
        assert text.count("seconds>") == len(c.images)
        assert text.index("<0.0 seconds><image>") < text.index("?")
    answerer = Answerer(made.model, made.processor)
    together = answerer.answer(conversations, max_new_tokens=6)
    assert together == [answerer.answer([c], max_new_tokens=6)[0] for c in conversations]


def test_the_processor_remembers_which_frames_training_showed(
    data: Path, language_folder: Callable[..., str], vision_folder: Callable[..., str], tmp_path: Path
) -> None:
    stage = {"name": "align", "train": {"connector": 1e-3}, "batch_size": 2, "steps": 1}
    model = {
        "language": {"name": language_folder()},
        "image": {"encoder": {"type": "hf_vision", "name": vision_folder()}},
    }
    for frames, kept in ((IN_TIME, {**IN_TIME, "timestamps": True, "pool": 1}), (5, 5), (8, 8)):
        recipe = recipes.load({"model": model, "stages": [stage | {"data": [{"path": str(data), "frames": frames}]}]})
        processor = Dock.build(recipe).processor
        processor.save_pretrained(tmp_path / "kept")
        assert processor.frames == OpticNerveProcessor.from_pretrained(tmp_path / "kept").frames == kept


def test_a_recipe_says_which_key_is_wrong(data: Path) -> None:
    for frames, key in (({"fps": 0}, "frames.fps"), ({"fps": 1, "most": 3}, "frames.most"), ({"max": 3}, "frames.fps")):
        with pytest.raises(RecipeError) as caught:
            data_entry({"path": str(data), "frames": frames})
        assert key in str(caught.value) and "\n" not in str(caught.value)


def test_a_question_about_a_video_is_asked_with_its_frames(data: Path) -> None:
    parts = in_order(data.with_name("a.gif"), FrameSampling(1))
    assert shown(ask("when?").shown(parts)) == [
        "<0.0 seconds>",
        "*",
        "<1.0 seconds>",
        "*",
        "<2.0 seconds>",
        "*",
        "when?",
    ]


# -- fewer tokens a frame ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["squares", "native"])
def test_pooled_frames_are_means_of_squares(encoder: str, data: Path, docked: Callable[..., Dock]) -> None:
    """A picture beside them is not pooled; training, asking alone and asking together read the same tokens."""
    made = docked("llama", tiny.native_vision()) if encoder == "native" else docked("llama")
    conversations = list(read(data, frames=FrameSampling(1, 4, pool=2)))
    picture = ImagePart(PIL.Image.new("RGB", (40, 24), "red"))
    conversations = [c.shown([picture]) for c in conversations]
    tower, answerer = made.model.image, Answerer(made.model, made.processor)
    for c in conversations:
        whole, asked = encode(c, made.processor), encode(c.prompt(), made.processor, learn=False)
        assert whole.input_ids[: len(asked.input_ids)] == asked.input_ids
        inputs = answerer.inputs([c])
        pools = inputs["image_pools"].tolist()
        assert pools == [1] + [2] * (len(c.images) - 1)
        plain = tower.encode(inputs["pixel_values"], inputs.get("image_sizes"))
        full = tower.connect(plain, inputs.get("image_sizes"))
        with torch.no_grad():
            soft = made.model.get_image_features(**{k: v for k, v in inputs.items() if "image" in k or "pixel" in k})
        rows, columns = full.grids[1] if full.grids else (4, 4)
        map_YXD = full.tokens_BND[1, : rows * columns].unflatten(0, (rows, columns))
        squares = [
            map_YXD[y : y + 2, x : x + 2].flatten(0, 1).mean(0) for y in range(0, rows, 2) for x in range(0, columns, 2)
        ]
        torch.testing.assert_close(soft.pooler_output[1], torch.stack(squares))
        torch.testing.assert_close(soft.pooler_output[0], full.tokens_BND[0, full.mask_BN[0]])
        counts = [len(p) for p in soft.pooler_output]
        assert asked.input_ids.count(made.processor.image_token_id) == sum(counts)
        assert counts == [tower.tokens_of(size, pool) for size, pool in zip(sizes_of(inputs), pools, strict=True)]
    together = answerer.answer(conversations, max_new_tokens=6)
    assert together == [answerer.answer([c], max_new_tokens=6)[0] for c in conversations]
    inputs = answerer.inputs(conversations)
    beams = made.model.generate(**inputs, num_beams=2, max_new_tokens=3, do_sample=False, **answerer.stops())
    assert beams.shape[0] == len(conversations)


def sizes_of(inputs: dict[str, Any]) -> list[list[int]]:
    sizes: list[list[int]] = inputs.get(
        "image_sizes", torch.zeros(len(inputs["image_pools"]), 2, dtype=torch.long)
    ).tolist()
    return sizes


@pytest.mark.parametrize("options", [{"connector": {"type": "resampler", "num_latents": 4, "heads": 2, "head_dim": 8,
                                                    "key_value_heads": 2}},
                                     {"fusion": {"type": "cross_attention", "every": 1}},
                                     {"tiling": {"type": "anyres"}}], ids=["resampler", "cross", "tiling"])  # fmt: skip
def test_tokens_that_form_no_map_are_not_pooled(options: Any, data: Path, docked: Callable[..., Dock]) -> None:
    made = docked("llama", **options)
    with refused("unsupported", "pool", 2):
        encode(next(iter(read(data, frames=FrameSampling(1, 4, pool=2)))), made.processor)
