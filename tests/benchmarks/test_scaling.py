"""benchmarks/scaling.py with tiny models: each axis is measured, drawn and written down."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import scaling
import scaling_points
from side_by_side import Trial

POINTS = [(axis, name, values[-1]) for axis, series in scaling.TINY.items() for name, values in series.items()]


@pytest.mark.parametrize(("axis", "series", "value"), POINTS)
def test_each_axis_is_measured(axis: str, series: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTICNERVE_CACHE", "restored by pytest")  # the stage over rows keeps its cache elsewhere
    done = scaling.measure(axis, series, value, quick=True)
    assert done.seconds > 0
    assert done.units == (value if axis == "batch" else 8 if axis == "rows" else 1)
    if axis == "rows":
        assert done.notes["first_step_seconds"] > 0
        assert done.notes["resident_bytes"] >= done.notes["before_bytes"] > 0
        assert done.notes["file_bytes"] > 20 * value
    else:
        assert done.notes["floor_seconds"] > 0


def test_what_grows_does_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches have the sizes that the axes say."""
    seen: list[Any] = []

    def kept(step: Any) -> float:
        cells = dict(zip(step.__code__.co_freevars, (c.cell_contents for c in step.__closure__), strict=True))
        seen.append(cells["given"])
        return 1.0

    monkeypatch.setattr(scaling_points, "_repeat", kept)
    for axis, series, value in [
        ("image_tokens", scaling.CACHED, 32),
        ("image_tokens", scaling.LIVE, 32),
        ("sequence", scaling.CACHED, 128),
        ("batch", scaling.CACHED, 2),
    ]:
        scaling.measure(axis, series, value, quick=True)
    tiles, live, sequence, batch = seen
    assert tiles.media["image_features"].tokens_BND.shape[:2] == (2, 16)
    assert tiles.tokens == 32 + scaling_points.CAPTION
    assert live.media["pixel_values"].shape[0] == 2
    assert sequence.input_ids.shape == (1, 128)
    assert batch.samples == 2


def test_tables_and_plots_say_how_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(script: str, side: str, arguments: list[str], *, timeout: float) -> Trial:
        value = int(side.split("/")[-1])
        notes = {"before_bytes": 2**30, "floor_seconds": value**2 / 2, "first_step_seconds": 1.0 + value * 1e-6}
        notes |= {"resident_bytes": 2**30 + 1000 * value, "file_bytes": 70 * value}
        return Trial(float(value**2), 1, peak_bytes=2**30 + value * 2**20, notes=notes)

    monkeypatch.setattr(scaling, "run_side", answer)
    assert scaling.main(["--root", str(tmp_path), "--only", "sequence,rows"]) == 0
    assert scaling.main(["--root", str(tmp_path), "--only", "batch"]) == 0
    text = (tmp_path / "docs" / "scaling-measured.md").read_text()
    assert "from 1,024 to 2,048, seconds a sample grow with the power 2.00, memory" in text
    assert 'beyond "before" with the power 1.00' in text
    assert "| 50% |" in text
    assert "each row more costs 1,000 bytes of resident memory and 1.0 µs before the first step" in text
    assert set(json.loads((tmp_path / "benchmarks" / "scaling.json").read_text())) == {"sequence", "rows", "batch"}
    for axis in ("sequence", "rows", "batch"):
        image = tmp_path / "docs" / "images" / f"scaling-{axis}.png"
        assert f"images/{image.name}" in text
        with PIL.Image.open(image) as plot:
            assert plot.width > 1000
    assert not (tmp_path / "docs" / "images" / "scaling-language.png").exists(), "not measured yet"


def test_a_point_that_fails_is_told_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(script: str, side: str, arguments: list[str], *, timeout: float) -> Trial:
        if side.endswith("/16"):
            raise RuntimeError("gave no trial:\nMemoryError: too much")
        return Trial(1.0, 1, peak_bytes=2**30, notes={"before_bytes": 2**29, "floor_seconds": 0.5})

    monkeypatch.setattr(scaling, "run_side", answer)
    assert scaling.main(["--root", str(tmp_path), "--only", "batch"]) == 0
    text = (tmp_path / "docs" / "scaling-measured.md").read_text()
    assert "Not measured: 16: MemoryError: too much." in text
    assert "| 8 |" in text
    assert "| 16 |" not in text


def test_a_process_of_its_own_hands_its_point_over() -> None:
    done = scaling.run_side(scaling.__file__, f"batch/{scaling.CACHED}/2", ["--quick"], timeout=300)
    assert done.units == 2
    assert done.peak_bytes > done.notes["before_bytes"]


def test_unknown_axes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        scaling.main(["--only", "depth"])
    assert "unknown axes depth" in capsys.readouterr().err
