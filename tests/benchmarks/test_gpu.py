"""benchmarks/gpu.py with tiny shapes on the CPU: each row, both sides, and what becomes of rows that fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import gpu
import gpu_sides
from side_by_side import Trial


@pytest.mark.parametrize("row", gpu.ROWS)
def test_both_sides_of_a_row_do_the_same_work(row: str) -> None:
    work = gpu.quick(gpu.ROWS[row][1])
    one, other = (gpu_sides.trial(side, work, "cpu") for side in (work.sides * 2)[:2])
    assert one.units == other.units > 0
    assert min(one.seconds, other.seconds) > 0
    if isinstance(work, gpu_sides.Training):
        assert one.check == pytest.approx(other.check, rel=2e-3)
        assert one.notes == other.notes
        assert one.notes["flops"] > 0
    else:
        assert one.check == other.check


@pytest.mark.parametrize("side", gpu.SIDES)
def test_activations_computed_again_give_the_same_loss(side: str) -> None:
    work = gpu.quick(gpu.ROWS["lora"][1])
    assert isinstance(work, gpu_sides.Training)
    again = gpu_sides.replace(work, checkpointing=True)
    assert gpu_sides.trial(side, again, "cpu").check == gpu_sides.trial(side, work, "cpu").check


def test_a_profile_says_where_a_step_goes() -> None:
    work = gpu.quick(gpu.ROWS["siglip-align"][1])
    seen = gpu_sides.trial("opticnerve", work, "cpu", profile=True).notes["profile"]
    assert 0 < seen["busy"] <= seen["seconds"] and seen["kernels"] > 100
    [sentence, *table] = gpu._profiled("siglip-align", seen)
    assert "siglip-align" in sentence and len(table) == 3 + len(seen["longest"])


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side_of: Any, *asked: str) -> tuple[int, dict[str, Any], str]:
    """The command with processes that answer at once."""
    monkeypatch.setattr(gpu, "run_side", side_of)
    results, out = tmp_path / "deep" / "gpu.json", tmp_path / "table.md"
    code = gpu.main(["--quick", "--device", "cpu", "--results", str(results), "--out", str(out), *asked])
    return code, json.loads(results.read_text()), out.read_text()


def answer(script: str, side: str, arguments: list[str], *, timeout: float) -> Trial:
    row = arguments[arguments.index("--row") + 1]
    if row == "matmul":
        return Trial(1.0, 1e12, notes={"machine": "a card"})
    return Trial(2.0 if side == "transformers" else 1.0, 8, 2**30, check=1.0, notes={"flops": 10**11})


def test_the_table_shows_ratio_and_share_of_the_matmul_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, results, table = run(tmp_path, monkeypatch, answer, "--only", "align,generate-1")
    assert code == 0
    assert len(results["trials"]) == 4
    [mine] = [line for line in table.splitlines() if "connector only | opticnerve" in line]
    assert "2.00 (2.00 to 2.00)" in mine
    assert "10.0%" in mine, "10¹¹ operations in a second at 10¹² a second"
    assert "the same" in mine
    assert "Tiny shapes" in table


def test_what_fails_is_told_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(script: str, side: str, arguments: list[str], *, timeout: float) -> Trial:
        if "align" in arguments and side == "transformers":
            raise RuntimeError("gave no trial:\ntorch.OutOfMemoryError: tried to allocate 9 GiB\nand so on")
        if "lora" in arguments:
            raise subprocess.TimeoutExpired("python", timeout)
        return answer(script, side, arguments, timeout=timeout)

    code, results, table = run(tmp_path, monkeypatch, fails, "--only", "align,lora,full")
    assert code == 1
    assert "torch.OutOfMemoryError: tried to allocate 9 GiB" in table
    assert "not done after 120 s" in table
    assert sum("trial" in t for t in results["trials"]) == 3


def test_no_minutes_left_still_gives_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, results, table = run(tmp_path, monkeypatch, answer, "--minutes", "0.01")
    assert (code, results["trials"]) == (0, [])
    assert table.count("no time was left") == sum(len(work.sides) for _, work in gpu.ROWS.values())


def test_a_process_of_its_own_hands_its_trial_over() -> None:
    done = gpu.run_side(gpu.__file__, "opticnerve", ["--row", "matmul", "--quick", "--device", "cpu"], timeout=120)
    assert done.rate > 1e6
    assert "torch" in done.notes["machine"]


def test_unknown_rows_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--only", "allign"])
    assert "unknown rows allign" in capsys.readouterr().err
