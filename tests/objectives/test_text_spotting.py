"""Teaching a connector to read print: what becomes a batch, what the loss is, and that letters are learned."""

from __future__ import annotations

import math
from collections.abc import Callable

import PIL.Image
import PIL.ImageDraw
import pytest
import torch
import torch.nn.functional as F

import tiny
from errors import refused
from opticnerve.connectors.text_spotter import CLASSES
from opticnerve.models.vlm.build import Dock
from opticnerve.objectives.text_spotting import CharacterCollator, TextSpotting, characters_of
from opticnerve.types import Conversation, DataError, ask

pytestmark = pytest.mark.usefixtures("private_cache")
SPOTTER = {"type": "text_spotter", "width": 8, "hidden": 16}
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
        return docked("llama", tiny.native_vision(), connector=SPOTTER)
    vision = {"type": "hf_vision", "name": vision_folder("clip_vision_model"), "fit": "squash"}
    return docked("llama", vision, connector=SPOTTER)


def test_a_words_characters_share_its_box() -> None:
    found = characters_of(ask("Read.", printed(), answer=WORDS + "\nno box here\nthin [1, 1, 1, 90]"))
    assert "".join(c for c, _ in found) == "TOTALof¥7,20"
    assert [middle for _, middle in found[:5]] == [(138, 125), (214, 125), (290, 125), (366, 125), (442, 125)]
    (mixed,) = [characters_of(ask("Read.", printed(), answer="合計 x9 [0, 20, 70, 40]"))]
    assert mixed == [("合", (10, 30)), ("計", (30, 30)), ("x", (55, 30)), ("9", (65, 30))]
    assert characters_of(ask("Read.", printed(), answer="[ [10, 20, 30, 40]")) == [("[", (20, 30))]


def test_no_two_letters_share_a_class() -> None:
    ranges = [(0x20, 0x7F), (0xA0, 0x100), (0x3041, 0x3097), (0x30A1, 0x30FD), (0xFF01, 0xFF5F)]
    letters = [code for first, end in ranges for code in range(first, end)]
    assert len({code % CLASSES for code in letters}) == len(letters)


def test_the_loss_is_a_sum_over_characters_and_adds_up_over_any_split(dock: Dock) -> None:
    objective, collate = TextSpotting(dock.model), TextSpotting.collator(dock.processor, None, 0)  # type: ignore[arg-type]
    whole = collate([samples()])
    loss, count = objective(whole)
    assert sum(map(float, objective.metrics.values())) * int(count) == pytest.approx(loss.item(), rel=1e-4)
    parts = [objective(collate([[one]])) for one in samples()]
    assert int(count) == whole.supervised == 3 * len("TOTALof¥7,20") == sum(int(n) for _, n in parts)
    torch.testing.assert_close(loss, torch.stack([part for part, _ in parts]).sum(), rtol=1e-4, atol=1e-3)


def test_the_loss_is_that_of_the_papers(dock: Dock) -> None:
    batch = CharacterCollator(dock.processor.image_processor)([samples(1)])
    connector = dock.model.image.connector
    features = connector.standardise(dock.model.image.encode(batch.pixel_values, batch.image_sizes))
    grid = features.grids[0] if features.grids else (connector.side, connector.side)
    spotted = connector.spot(features.tokens_BND[0], grid)
    high, wide = spotted.heat_YX.shape
    places = [(int(y * high), int(x * wide)) for x, y in batch.middles_C2.tolist()]
    expected = 0.0
    for y in range(high):
        for x in range(wide):
            near = max(
                math.exp(-((y - v) ** 2 + (x - u) ** 2) / 1.3) if max(abs(y - v), abs(x - u)) < 3 else 0.0
                for v, u in places
            )
            p = spotted.heat_YX[y, x].sigmoid().item()
            expected -= (1 - p) ** 2 * math.log(p) if near == 1 else (1 - near) ** 4 * p**2 * math.log(1 - p)
    named = connector.name(spotted, *torch.tensor(places).T)
    expected += F.cross_entropy(named, batch.classes_C, reduction="sum").item()
    assert TextSpotting(dock.model)(batch)[0].item() == pytest.approx(expected, rel=1e-4)


def test_letters_are_learned_and_read_back(docked: Callable[..., Dock]) -> None:
    torch.manual_seed(0)
    dock = docked("llama", tiny.native_vision(), connector={**SPOTTER, "pool": [1, 1]})
    objective, connector = TextSpotting(dock.model), dock.model.image.connector
    batch = CharacterCollator(dock.processor.image_processor)(
        [[ask("Read.", printed(), answer="\n".join(WORDS.splitlines()[:2]))]]
    )
    optimizer = torch.optim.Adam(dock.model.image.parameters(), lr=1e-2)
    for _ in range(150):
        loss, _ = objective(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        features = connector.standardise(dock.model.image.encode(batch.pixel_values, batch.image_sizes))
        spotted = connector.spot(features.tokens_BND[0], features.grids[0])  # type: ignore[index]
        y_N, x_N, logit_N = connector.peaks(spotted, 99)
        order = x_N[logit_N > 0].argsort()
        found = connector.name(spotted, y_N[logit_N > 0], x_N[logit_N > 0]).argmax(1)[order]
    assert found.tolist() == [ord(c) % CLASSES for c in "TOTALof"]


def test_refusals(docked: Callable[..., Dock]) -> None:
    with refused("box", "objects", error=DataError):
        characters_of(ask("Read.", printed(), answer="TOTAL 12"))
    with refused("no-image", 0, error=DataError):
        characters_of(ask("Read.", answer=WORDS))
    with refused("conflict", "text_spotter"):
        TextSpotting(docked("llama").model)
    cut = docked("llama", connector=SPOTTER)
    cut.model.image.encoder.fit = "crop"
    with refused("conflict", "native", "squash"):
        TextSpotting(cut.model)
