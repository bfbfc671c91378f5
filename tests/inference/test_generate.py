"""Answers in order, in batches or word by word; a stream that stops when it is closed and tells when it fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from errors import refused
from opticnerve.common.hub import HubError
from opticnerve.inference.generate import Answerer
from opticnerve.inference.load import default_device, load_model
from opticnerve.models.vlm.build import Dock, dock
from opticnerve.types import DataError, ask

pytestmark = pytest.mark.usefixtures("private_cache")
ASKED = [
    ask("a rather long question about the picture, is it not?", tiny.picture(1)),
    ask("q", tiny.picture(2), tiny.picture(3)),
    ask("text alone"),
    ask("is it?", tiny.picture(4)),
    ask("what colour is the circle in the picture", tiny.picture(5)),
]


@pytest.fixture(scope="module")
def answerer(language_folder: Callable[..., str], vision_folder: Callable[..., str], private_cache: Any) -> Answerer:
    made = dock(vision_folder(), "mlp", language_folder("llama"))
    with torch.no_grad():
        for parameter in made.model.image.connector.parameters():
            parameter.mul_(5)
    return Answerer(made.model, made.processor)


def threads() -> int:
    return sum(t.is_alive() for t in threading.enumerate())


class TestAnswer:
    def test_order_and_batches_make_no_difference(self, answerer: Answerer) -> None:
        alone = [answerer.answer([c], max_new_tokens=8)[0] for c in ASKED]
        assert len(set(alone)) > 3
        for size in (1, 2, 5, 16):
            assert answerer.answer(ASKED, max_new_tokens=8, batch_size=size) == alone
        assert answerer.answer(ASKED[::-1], max_new_tokens=8, batch_size=2) == alone[::-1]

    def test_a_known_answer_is_not_shown(self, answerer: Answerer) -> None:
        told = [ask("q", tiny.picture(2), answer="a red circle")]
        assert answerer.answer(told, max_new_tokens=8) == answerer.answer([ask("q", tiny.picture(2))], max_new_tokens=8)

    def test_progress_and_nothing(self, answerer: Answerer) -> None:
        done: list[int] = []
        answerer.answer(ASKED, max_new_tokens=1, batch_size=2, progress=done.append)
        assert done == [2, 4, 5]
        assert answerer.answer([]) == []

    def test_special_words_are_left_out_and_the_end_ends(self, answerer: Answerer) -> None:
        model, end = answerer.model, answerer.processor.tokenizer.eos_token_id
        head = model.language_model.lm_head.weight
        before = head.clone()
        try:
            with torch.no_grad():
                head.zero_()[end] = 0
                hook = model.language_model.lm_head.register_forward_hook(
                    lambda m, a, out: out.index_fill(-1, torch.tensor([end]), 9.0)
                )
            assert answerer.answer([ASKED[1]], max_new_tokens=50) == [""]
        finally:
            hook.remove()
            with torch.no_grad():
                head.copy_(before)

    def test_a_bad_picture_names_itself(self, answerer: Answerer, tmp_path: Path) -> None:
        (tmp_path / "bad.png").write_bytes(b"no picture")
        with refused("unreadable-image", "bad.png", error=DataError):
            answerer.answer([ask("q", tmp_path / "bad.png")])


def test_generation_stops_at_the_end_of_turn_of_the_template(
    language_folder: Callable[..., str], vision_folder: Callable[..., str]
) -> None:
    """The end that training teaches is the template's, which need not be the tokenizer's."""
    llama3 = (Path(__file__).parent.parent / "templates/llama-3.jinja").read_text()
    made = dock(
        vision_folder(), "mlp", {"name": language_folder("llama"), "chat_template": llama3.replace("bos_token + ", "")}
    )
    stops = Answerer(made.model, made.processor).stops()["eos_token_id"]
    tokenizer = made.processor.tokenizer
    assert {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot_id|>")} <= set(stops)


class TestStream:
    @pytest.mark.parametrize("i", range(3))
    def test_the_same_words_as_in_one_piece(self, answerer: Answerer, i: int) -> None:
        pieces = list(answerer.stream(ASKED[i], max_new_tokens=12))
        assert "".join(pieces).strip() == answerer.answer([ASKED[i]], max_new_tokens=12)[0]

    def test_closing_stops_the_model(self, answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
        steps: list[int] = []
        handle = answerer.model.language_model.lm_head.register_forward_pre_hook(
            lambda *_: (steps.append(1), time.sleep(0.01))[0]
        )
        before = threads()
        stream = answerer.stream(ASKED[2], max_new_tokens=400)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        handle.remove()
        assert threads() == before
        assert len(steps) < 300

    def test_an_error_reaches_the_reader(self, answerer: Answerer, tmp_path: Path) -> None:
        before = threads()
        with refused("missing-image", "gone.png", error=DataError):
            list(answerer.stream(ask("q", tmp_path / "gone.png")))
        assert threads() == before

    def test_an_error_in_the_middle_reaches_the_reader(self, answerer: Answerer) -> None:
        count = 0

        def fail(*_: Any) -> None:
            nonlocal count
            count += 1
            if count == 4:
                raise RuntimeError("out of memory, say")

        handle = answerer.model.language_model.lm_head.register_forward_pre_hook(fail)
        try:
            with pytest.raises(RuntimeError, match="out of memory, say"):
                list(answerer.stream(ASKED[0], max_new_tokens=20))
        finally:
            handle.remove()

    def test_sampling_repeats_with_its_seed(self, answerer: Answerer) -> None:
        def answer_batch(seed: int) -> str:
            return "".join(answerer.stream(ASKED[0], max_new_tokens=10, temperature=1.0, top_p=0.9, seed=seed))

        assert answer_batch(1) == answer_batch(1)
        assert len({answer_batch(s) for s in range(4)}) > 1


class TestLoad:
    @pytest.fixture
    def saved(self, docked: Callable[..., Dock], tmp_path: Path) -> Path:
        made = docked()
        made.model.save_pretrained(tmp_path / "m")
        made.processor.save_pretrained(tmp_path / "m")
        return tmp_path / "m"

    def test_a_folder(self, saved: Path) -> None:
        model, processor = load_model(saved, device="cpu")
        assert not model.training
        assert Answerer(model, processor).answer([ASKED[0]], max_new_tokens=3)

    def test_a_run_in_progress_serves_its_last_stage(self, docked: Callable[..., Dock], tmp_path: Path) -> None:
        from opticnerve.models.checkpoint import delta

        made = docked()
        for i in range(2):
            with torch.no_grad():
                made.model.image.connector.layers[2].bias.fill_(float(i))
            folder = tmp_path / "run" / "stages" / f"{i}-s"
            delta.save(made.model, folder, bases=made.bases, lora=None, trained=[])
            made.processor.save_pretrained(folder)
        model, _ = load_model(tmp_path / "run", device="cpu")
        assert float(model.image.connector.layers[2].bias.detach()[0]) == 1.0

    def test_refusals(self, tmp_path: Path) -> None:
        with refused("missing-file", tmp_path, "config.json"):
            load_model(tmp_path)
        with refused("name", tmp_path / "nowhere", error=HubError):
            load_model(tmp_path / "nowhere")
        with refused("name", "./runs/typo", error=HubError):
            load_model("./runs/typo")

    def test_device(self) -> None:
        assert default_device() in ("cpu", "cuda", "mps", "xpu")
