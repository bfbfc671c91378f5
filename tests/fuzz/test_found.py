"""What fuzzing has found: each fault by name, so that it stays found."""

from __future__ import annotations

import copy
import io
import json
import struct
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from fuzz_recipes import GOOD
from fuzz_target import limited

from errors import refused
from opticnerve.data.dataset.read import read
from opticnerve.data.media.audio import open_audio
from opticnerve.data.media.video import frames
from opticnerve.inference.load import load_model, load_processor
from opticnerve.models import OpticNerveConfig
from opticnerve.models.checkpoint import delta
from opticnerve.models.checkpoint.strict import wrap_errors
from opticnerve.models.vlm.build import Dock
from opticnerve.recipe import load
from opticnerve.types import DataError, RecipeError


class TestRecipes:
    BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(9)
    )

    @pytest.mark.parametrize(
        ("text", "refusal"),
        [
            (BOMB, ("recipe", "10,000")),
            ("model: &m {image: *m}", ("recipe", "*m")),
            ("[" * 2_000, ("recipe", 30)),
            ("- " * 5_000 + "x", ("recipe", 30)),
            ("x" * 250_001, ("recipe", "250,000")),
            ("a: 2026-99-99", ("recipe", "1..12")),
            ("a: " + "9" * 5_000, ("recipe", 5000)),
            ("a: !!bool maybe", ("recipe", "maybe")),
            ("a: !!float ''", ("recipe", "YAML")),
            ("a: !!timestamp x", ("recipe", "YAML")),
            ("a: !!python/object/apply:os.system ['true']", ("recipe", "os.system")),
        ],
        ids=lambda text: text[:20],
    )
    def test_refused(self, text: str, refusal: tuple[Any, ...], tmp_path: Path) -> None:
        (tmp_path / "r.yaml").write_text(text)
        with limited(10), refused(*refusal, error=RecipeError):
            load(tmp_path / "r.yaml")
        if "\n" not in text:
            with limited(10), refused(*refusal, error=RecipeError):
                load({}, [f"name={text.removeprefix('a: ')}"])

    def test_anchors_are_taken_within_reason(self, tmp_path: Path) -> None:
        (tmp_path / "r.yaml").write_text(
            "model: {language: {name: x}, image: {encoder: {type: patches}}}\n"
            "stages:\n"
            "- &s {name: a, train: {connector: 0.1}, data: [{path: d}], steps: 1}\n"
            "- {<<: *s, name: b}\n"
        )
        assert [s.name for s in load(tmp_path / "r.yaml").stages] == ["a", "b"]

    @pytest.mark.parametrize(
        "override", ["x" * 100_000, "name.x=" + "y" * 100_000, "a=" + "[1, " * 9_000, "stages.²=1"]
    )
    def test_messages_stay_short(self, override: str) -> None:
        with pytest.raises(RecipeError) as told:
            load({"stages": [1], "name": "n", "model": ["z" * 100_000]}, [override])
        assert len(str(told.value)) < 3_000

    def test_a_part_of_half_a_character(self) -> None:
        recipe = copy.deepcopy(GOOD[0])
        recipe["stages"][0]["train"] = {"\ud800": 1e-4}
        with refused("recipe", "surrogate", error=RecipeError):
            load(recipe)


def test_a_folder_of_frames_may_not_link_out_of_the_media_folder(tmp_path: Path) -> None:
    (tmp_path / "media/clip").mkdir(parents=True)
    PIL.Image.new("RGB", (4, 4), "red").save(tmp_path / "secret.png")
    (tmp_path / "media/clip/0.png").symlink_to(tmp_path / "secret.png")
    turns = [{"from": "human", "value": "<video> what?"}, {"from": "gpt", "value": "x"}]
    (tmp_path / "d.json").write_text(json.dumps([{"video": "clip", "conversations": turns}]))
    with refused("outside-media", "d.json", "media", error=DataError):
        list(read(tmp_path / "d.json", media=tmp_path / "media"))
    assert list(read(tmp_path / "d.json", media=tmp_path / "media", allow_outside_media=True))


@pytest.mark.parametrize("rate", [10, 134_233_728])
def test_sound_of_an_impossible_rate(rate: int) -> None:
    pytest.importorskip("soundfile")
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(bytes(400))
    with refused("unreadable-audio", f"{rate:,}", "1,000 to 192,000", error=DataError):
        open_audio(out.getvalue())


class TestVideos:
    def test_a_picture_that_breaks_when_its_frames_are_counted(self) -> None:
        with refused("unreadable-video", 14, error=DataError):
            frames(b"II*\0\x08\0\0\0" + bytes(6), 2)

    def test_a_title_that_is_no_utf8(self) -> None:
        av = pytest.importorskip("av")
        out = io.BytesIO()
        with av.open(out, "w", format="avi") as file:
            file.metadata["title"] = "TITLE-OF-IT"
            stream = file.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            for packet in [*stream.encode(av.VideoFrame(32, 32, "yuv420p")), *stream.encode()]:
                file.mux(packet)
        assert b"TITLE-OF-IT" in out.getvalue()
        assert len(frames(out.getvalue().replace(b"TITLE-OF-IT", b"TITLE-\xff\xfe-IT"), 1)) == 1


@pytest.mark.usefixtures("private_cache")
class TestCheckpoints:
    @pytest.fixture
    def whole(self, docked: Callable[..., Dock], tmp_path: Path) -> Path:
        made = docked("qwen2")
        made.model.save_pretrained(tmp_path / "whole")
        made.processor.save_pretrained(tmp_path / "whole")
        return tmp_path / "whole"

    def change(self, folder: Path, *keys: Any, to: Any) -> None:
        config = json.loads((folder / "config.json").read_text())
        here = config
        for key in keys[:-1]:
            here = here[key]
        here[keys[-1]] = to
        (folder / "config.json").write_text(json.dumps(config))

    @pytest.mark.parametrize(
        ("keys", "value", "refusal"),
        [
            (("text_config", "num_hidden_layers"), 2**31, ("too-large", "num_hidden_layers", "10,000")),
            (("text_config", "num_hidden_layers"), 9_000, ("damaged", "num_hidden_layers")),
            (("text_config", "hidden_size"), 2**20, ("too-large",)),
            (("text_config", "vocab_size"), 2**40, ("too-large",)),
            (("towers", "image", "connector", "depth"), 10**5, ("too-large",)),
            (("towers", "image", "connector"), None, ("wrong-type", "towers.image.connector")),
            (("towers", "image", "encoder", "type"), ["mlp"], ("wrong-type", "towers.image.encoder")),
            (("towers",), [], ("wrong-type", "towers")),
            (("text_config", "model_type"), None, ("unknown-name", "text_config.model_type")),
            (("image_token_id",), "7", ("wrong-type", "image_token_id")),
            (("lora",), 3, ("wrong-type", "lora")),
        ],
        ids=str,
    )
    def test_a_configuration_that_lies(
        self, whole: Path, keys: tuple[Any, ...], value: Any, refusal: tuple[Any, ...]
    ) -> None:
        self.change(whole, *keys, to=value)
        with limited(20), refused(*refusal):
            load_model(whole, device="cpu")

    def test_a_base_whose_name_is_none(self, docked: Callable[..., Dock], tmp_path: Path) -> None:
        made = docked("qwen2")
        made.save(tmp_path / "run", trained=[n for n, _ in made.model.named_parameters() if "connector" in n])
        reference = json.loads((tmp_path / "run/dock.json").read_text())
        reference["bases"]["language"]["name"] = " "
        (tmp_path / "run/dock.json").write_text(json.dumps(reference))
        with refused("name", "' '"):
            load_model(tmp_path / "run", device="cpu")

    @pytest.mark.parametrize("name", ["tokenizer.json", "processor_config.json", "tokenizer_config.json"])
    def test_a_processor_that_is_damaged(self, whole: Path, name: str) -> None:
        (whole / name).write_text('{"version": [')
        with refused("damaged", "processor"):
            load_processor(str(whole))

    @pytest.mark.parametrize(
        "data",
        [b"", struct.pack("<Q", 2**63), struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 9) + b'{"a": NaN', struct.pack("<Q", 50) + b"[" * 50],
        ids=["empty", "endless header", "a list", "no JSON", "cut"],
    )  # fmt: skip
    def test_a_header_that_lies(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / delta.TENSORS).write_bytes(data)
        model: Any = torch.nn.Linear(2, 2)
        with refused("damaged", "trained.safetensors"):
            delta.put(model, tmp_path, {})

    def test_a_config_in_a_newer_format(self, whole: Path) -> None:
        self.change(whole, "dock_format", to=99)
        with refused("mismatch", 99, "config.json"):
            OpticNerveConfig.from_pretrained(whole)


def test_a_parquet_cell_that_is_no_utf8(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    broken = pa.array([b"\xff\xfe.png"]).view(pa.string())
    pq.write_table(pa.table({"image": broken, "caption": ["x"]}), tmp_path / "d.parquet")
    with refused("table", "d.parquet", error=DataError):
        list(read(tmp_path / "d.parquet"))


def test_a_panic_of_rust_is_told() -> None:
    panic = type("PanicException", (BaseException,), {})
    with refused("damaged", "index 11", "the processor", "here"), wrap_errors("the processor", "here"):
        raise panic("range end index 11 out of range")
    with pytest.raises(KeyboardInterrupt), wrap_errors("the processor", "here"):
        raise KeyboardInterrupt


class TestHalfASurrogatePair:
    """JSON can spell it, UTF-8 cannot."""

    @pytest.mark.parametrize(
        "address", ["http://127.0.0.1:9/\ud800.png", "https://\ud800.org/x.png", "s3://\ud800/x.png"]
    )
    def test_in_an_address(self, tmp_path: Path, address: str) -> None:
        (tmp_path / "d.jsonl").write_text(json.dumps({"image": address, "caption": "x"}) + "\n")
        with refused("url", "surrogate", error=DataError):
            list(read(tmp_path / "d.jsonl", media_cache=tmp_path / "media"))

    def test_in_the_key_of_an_annotation(self, tmp_path: Path) -> None:
        questions, answers = ({"question_id": f"\ud800{n}", key: "x"} for n, key in ((1, "question"), (1, "answer")))
        for name, row in (("questions.jsonl", questions | {"image": ""}), ("answers.jsonl", answers)):
            (tmp_path / name).write_text(json.dumps(row) + "\n")
        [found] = read(tmp_path / "questions.jsonl", annotations=tmp_path / "answers.jsonl")
        assert found.answer == "x"
