"""Where easy-VQA's shapes are, and how much of a map falls on them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest

from errors import refused
from opticnerve.starter import easy_vqa

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import localization

COLOURS = {
    "black": (0, 0, 0), "blue": (0, 0, 255), "brown": (165, 42, 42), "gray": (128, 128, 128), "green": (0, 128, 0),
    "red": (255, 0, 0), "teal": (0, 128, 128), "yellow": (255, 255, 0),
}  # fmt: skip


def half() -> np.ndarray:
    mask = np.zeros((8, 8), dtype=bool)
    mask[:, :4] = True
    return mask


def test_a_drawn_square_is_found() -> None:
    picture = PIL.Image.new("RGB", (20, 10), (250, 245, 240))
    PIL.ImageDraw.Draw(picture).rectangle((3, 2, 6, 8), fill="yellow")
    wanted = np.zeros((10, 20), dtype=bool)
    wanted[2:9, 3:7] = True
    assert np.array_equal(localization.object_mask(picture), wanted)


def test_a_blank_picture_has_no_object() -> None:
    with refused("empty"):
        localization.object_mask(PIL.Image.new("RGB", (8, 8), "white"))


def test_on_real_pictures_the_object_has_the_colour_that_the_answers_say() -> None:
    media = easy_vqa.locate()
    facts = easy_vqa.gather(easy_vqa._load(media, "test"))
    known = [(image, f) for image, f in sorted(facts.items()) if f.colours][:60]
    for image, each in known:
        with PIL.Image.open(media / "test" / "images" / f"{image}.png") as picture:
            mask = localization.object_mask(picture)
            median = np.median(np.asarray(picture.convert("RGB"))[mask], axis=0)
        nearest = min(COLOURS, key=lambda name: float(np.abs(median - COLOURS[name]).sum()))
        assert {nearest} == each.colours, image
        assert 0.003 < mask.mean() < 0.3


class TestMass:
    def test_a_flat_map_scores_the_area(self) -> None:
        mask = np.random.default_rng(0).random((64, 64)) < 0.1
        for side in (1, 4, 6, 64):
            assert localization.mass_on_object(np.full((side, side), 3.0), mask) == pytest.approx(mask.mean())

    def test_all_on_and_all_off(self) -> None:
        on = np.array([[1.0, 0], [1, 0]])
        assert localization.mass_on_object(on, half()) == 1
        assert localization.mass_on_object(1 - on, half()) == 0

    def test_scale_and_negative_values_do_not_count(self) -> None:
        assert localization.mass_on_object([[2.0, -9], [1, 1]], half()) == pytest.approx(0.75)
        assert localization.mass_on_object([[200.0, -9], [100, 100]], half()) == pytest.approx(0.75)

    def test_cells_of_unequal_size(self) -> None:
        fine = localization.enlarge(np.arange(1, 10).reshape(3, 3), 8, 8)
        assert fine.shape == (8, 8)
        assert fine.sum() == pytest.approx(1)
        assert np.unique(fine).size == 9

    @pytest.mark.parametrize(
        ("bad", "kind"),
        [([[0.0, -1], [0, 0]], "empty"), ([[np.nan, 1], [0, 0]], "wrong-type"), ([1.0, 2.0], "wrong-type")],
    )
    def test_maps_that_say_nothing(self, bad: list[Any], kind: str) -> None:
        with refused(kind, "map"):
            localization.mass_on_object(bad, half())

    def test_no_map_of_that_grid_does_better(self) -> None:
        mask = np.zeros((16, 16), dtype=bool)
        mask[2:7, 2:7] = True
        best = localization.best_mass(mask, 4, 4)
        singles = np.eye(16).reshape(16, 4, 4)
        assert best == pytest.approx(max(localization.mass_on_object(m, mask) for m in singles))
        assert best < 1


def test_the_pointing_game() -> None:
    assert localization.points_at_object([[0.9, 0.1], [0, 0]], half()) == 1
    assert localization.points_at_object([[0.1, 0.9], [0, 0]], half()) == 0
    assert localization.points_at_object([[0.9, 0.9], [0, 0]], half()) == 0.5


def test_the_bootstrap_covers_the_mean() -> None:
    values = np.random.default_rng(1).normal(0.4, 0.1, 50)
    low, high = localization.bootstrap_interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 50**0.5, rel=0.1)
    assert localization.bootstrap_interval([0.2] * 5) == pytest.approx((0.2, 0.2))
    with refused("empty"):
        localization.bootstrap_interval([])


def test_the_plot_of_shares(tmp_path: Path) -> None:
    row = {"model": "m", "method": "rollout", "mass": 0.2, "low": 0.1, "high": 0.3, "area": 0.1, "best": 0.5}
    assert (
        localization.shares_plot([row, {**row, "method": "occlusion"}], tmp_path / "s.png", title="t", note="n")
        .stat()
        .st_size
    )
