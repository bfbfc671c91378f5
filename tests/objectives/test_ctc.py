"""Reading boxed words off an encoder's map: what becomes a batch, what the loss is, and that letters are learned."""

from __future__ import annotations

from collections.abc import Callable

import PIL.Image
import PIL.ImageDraw
import pytest
import torch
import torch.nn.functional as F

import tiny
from errors import refused
from opticnerve.models.vlm.build import Dock
from opticnerve.objectives.ctc import CLASSES, CTC, WordCollator, words_of
from opticnerve.types import Conversation, DataError, ask

pytestmark = pytest.mark.usefixtures("private_cache")
WORDS = "TOTAL [100, 50, 480, 200]\nof [500, 60, 640, 200]\n¥7,20 [100, 500, 640, 800]"


def printed(seed: int = 0, size: tuple[int, int] = (64, 32)) -> PIL.Image.Image:
    picture = PIL.Image.new("RGB", size, "white")
    PIL.ImageDraw.Draw(picture).text((4 + seed, 4), "TOTAL of", fill="black")
    return picture


def samples(count: int = 3) -> list[Conversation]:
    return [ask("Read.", printed(i, (64 + 8 * i, 32 - 4 * i)), answer=WORDS) for i in range(count)]


@pytest.fixture(params=["native", "squash"])
def dock(request: pytest.FixtureRequest, docked: Callable[..., Dock], vision_folder: Callable[..., str]) -> Dock:
    torch.manual_seed(0)
    if request.param == "native":
        return docked("llama", tiny.native_vision())
    return docked("llama", {"type": "hf_vision", "name": vision_folder("clip_vision_model"), "fit": "squash"})


def test_words_and_their_boxes_are_lines_of_the_answer() -> None:
    found = words_of(ask("Read.", printed(), answer=WORDS + "\nno box here\nthin [1, 1, 2, 90]"))
    assert [word for word, _ in found] == ["TOTAL", "of", "¥7,20"]
    assert [box for _, box in found] == [(100, 50, 480, 200), (500, 60, 640, 200), (100, 500, 640, 800)]
    assert words_of(ask("Read.", printed(), answer="(348) [10, 20, 30, 40]")) == [("(348)", (10, 20, 30, 40))]


def test_no_two_letters_share_a_class() -> None:
    ranges = [(0x20, 0x7F), (0xA0, 0x100), (0x3041, 0x3097), (0x30A1, 0x30FD), (0xFF01, 0xFF5F)]
    letters = [code for first, end in ranges for code in range(first, end)]
    assert len({code % CLASSES for code in letters}) == len(letters)


def test_the_loss_is_a_sum_over_words_and_adds_up_over_any_split(dock: Dock) -> None:
    objective, collate = CTC(dock.model, width=8), CTC.collator(dock.processor, None, 0)  # type: ignore[arg-type]
    whole = collate([samples()])
    loss, count = objective(whole)
    parts = [objective(collate([[one]])) for one in samples()]
    assert int(count) == whole.supervised == 3 * len("TOTALof¥7,20") == sum(int(n) for _, n in parts)
    torch.testing.assert_close(loss, torch.stack([part for part, _ in parts]).sum(), rtol=1e-4, atol=1e-3)


def test_the_loss_is_ctc_of_what_is_read_in_each_box(dock: Dock) -> None:
    objective = CTC(dock.model, width=8)
    batch = WordCollator(dock.processor.image_processor)([samples(1)])
    [map_DHW] = objective.maps(batch)
    logits_WTK, times = objective.read(map_DHW, batch.boxes_W4)
    words, expected = ["TOTAL", "of", "¥7,20"], 0.0
    for word, logits_TK, count in zip(words, logits_WTK, times.tolist(), strict=True):
        targets = torch.tensor([ord(c) % CLASSES + 1 for c in word])
        one = F.ctc_loss(
            logits_TK[:count].log_softmax(-1)[:, None], targets[None], torch.tensor([count]), torch.tensor([len(word)]),
            zero_infinity=True, reduction="sum",
        )  # fmt: skip
        expected += one.item()
    assert objective(batch)[0].item() == pytest.approx(expected, rel=1e-4)


def test_a_wider_box_is_read_at_more_times_and_another_place_gives_other_scores(dock: Dock) -> None:
    objective = CTC(dock.model, width=8)
    [map_DHW] = objective.maps(WordCollator(dock.processor.image_processor)([samples(1)]))
    boxes = torch.tensor([[0.125, 0.125, 0.375, 0.5], [0.125, 0.125, 0.875, 0.5], [0.5, 0.5, 0.75, 0.875]])
    logits_WTK, times = objective.read(map_DHW, boxes)
    assert times[0] < times[1] and times[0] == times[2]
    assert not torch.allclose(logits_WTK[0, : times[0]], logits_WTK[2, : times[2]], atol=1e-3)


def test_letters_are_learned_and_read_back(docked: Callable[..., Dock]) -> None:
    torch.manual_seed(0)
    dock = docked("llama", tiny.native_vision())
    objective = CTC(dock.model, width=16)
    batch = WordCollator(dock.processor.image_processor)(
        [[ask("Read.", printed(), answer="\n".join(WORDS.splitlines()[:2]))]]
    )
    learned = [*objective.own_parameters().values(), *dock.model.image.encoder.parameters()]
    optimizer = torch.optim.Adam(learned, lr=1e-2)
    for _ in range(200):
        loss, _ = objective(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    read = objective.transcribe(batch)
    assert read == [[ord(c) % CLASSES + 1 for c in word] for word in ("TOTAL", "of")]


def test_refusals(docked: Callable[..., Dock]) -> None:
    with refused("box", "objects", error=DataError):
        words_of(ask("Read.", printed(), answer="TOTAL 12"))
    with refused("no-image", 0, error=DataError):
        words_of(ask("Read.", answer=WORDS))
    cut = docked("llama")
    cut.model.image.encoder.fit = "crop"
    with refused("conflict", "native", "squash"):
        CTC(cut.model)
