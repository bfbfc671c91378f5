"""DeepSpeed's ZeRO-2 and ZeRO-3 draw the curve of one process, and write checkpoints that any engine goes on with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from test_many_processes import CASES, make, same  # noqa: F401 (a fixture)

from errors import refused
from opticnerve.distributed.collectives import engine
from opticnerve.distributed.deepspeed import Zero
from opticnerve.objectives.next_token import NextToken

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
ENGINES = {
    "ddp": {}, "fsdp2": worlds.FSDP2, "zero2": {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}  # fmt: skip


def run(recipe: dict[str, Any], out: Path, processes: int, kind: str = "ddp", *args: Any) -> Path:
    given = ENGINES[kind]
    for ended in worlds.world(processes, worlds.train, recipe, out, *args, folder=out.parent, environment=given):
        assert ended.code == 0, ended.printed[-4000:]
    return out


@pytest.mark.slow
@pytest.mark.usefixtures("private_cache")
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
@pytest.mark.parametrize("case", CASES)
def test_processes_are_one(
    case: str, kind: str, make: Callable[..., dict[str, Any]], tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    pytest.importorskip("deepspeed", reason="the engine deepspeed is not installed")
    recipe, processes = make(**CASES[case]), 4 if (case, kind) in (("accumulate", "zero2"), ("pack", "zero3")) else 2
    same(run(recipe, tmp_path / "one", 1), run(recipe, tmp_path / kind, processes, kind))


@pytest.mark.slow
@pytest.mark.usefixtures("private_cache")
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, "zero3"), (2, "zero3")),
        ((2, "zero2"), (1, "ddp")),
        ((1, "ddp"), (2, "zero3")),
        ((2, "fsdp2"), (4, "zero2")),
    ],
    ids=["ZeRO-3 to itself", "ZeRO-2 to 1", "1 to ZeRO-3", "FSDP2 on 2 to ZeRO-2 on 4"],
)
def test_what_some_saved_others_go_on_with(
    before: tuple[int, str], after: tuple[int, str], make: Callable[..., dict[str, Any]], tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    pytest.importorskip("deepspeed", reason="the engine deepspeed is not installed")
    recipe = make(batch_size=8, accumulate=2, save_every=3)
    one = run(recipe, tmp_path / "one", 1)
    short = run(recipe, tmp_path / "short", *before, False, "0 7 SIGTERM")  # stops after step 4, and saves it
    saved, alone = worlds.state(short), worlds.state(one, 3)
    assert saved["step"] == 4
    for name, tensor in alone["optimizer"]["masters"].items():
        assert saved["optimizer"]["masters"][name].shape == tensor.shape
    moments, others = alone["optimizer"]["adam"]["state"], saved["optimizer"]["adam"]["state"]
    assert moments.keys() == others.keys()
    for k, values in moments.items():
        assert {n: v.shape for n, v in others[k].items()} == {n: v.shape for n, v in values.items()}
    same(one, run(recipe, short, *after, True))


@pytest.mark.slow
@pytest.mark.usefixtures("private_cache")
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_masters_of_bf16_weights_are_float32_in_shares(
    kind: str, make: Callable[..., dict[str, Any]], tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    pytest.importorskip("deepspeed", reason="the engine deepspeed is not installed")
    recipe = make(precision="bf16", save_every=5, train={"connector": 1e-4, "language": 1e-5})
    one, two = run(recipe, tmp_path / "one", 1), run(recipe, tmp_path / "two", 2, kind)
    for a, b in zip(worlds.curve(one), worlds.curve(two), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-2)
    masters = worlds.state(two, 5)["optimizer"]["masters"]
    assert {m.dtype for m in masters.values()} == {torch.float32}
    assert any((m != m.bfloat16()).any() for m in masters.values())
    for name, tensor in worlds.state(one, 5)["optimizer"]["masters"].items():
        torch.testing.assert_close(masters[name], tensor, rtol=2e-2, atol=2e-3, msg=name)


@pytest.mark.slow
@pytest.mark.usefixtures("private_cache")
def test_a_lost_process_ends_all_with_its_name(make: Callable[..., dict[str, Any]], tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("deepspeed", reason="the engine deepspeed is not installed")
    recipe = make(save_every=2)
    environment = {"OPTICNERVE_TIMEOUT": "20", **ENGINES["zero3"]}
    other, _ = worlds.world(
        2, worlds.train, recipe, tmp_path / "run", False, "1 3 SIGKILL", folder=tmp_path, environment=environment
    )
    assert other.code == 1, other.printed[-3000:]
    assert "process 1 of 2" in other.printed
    assert "ended or does not answer" in other.printed
    assert worlds.state(tmp_path / "run")["step"] == 2


def train_over_a_broken_step(recipe: dict[str, Any], out: Path) -> None:
    forward, calls = NextToken.forward, [0]

    def broken(self: NextToken, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss, count = forward(self, batch)
        calls[0] += 1
        return loss * (torch.nan if calls[0] == 2 else 1.0), count

    NextToken.forward = broken  # type: ignore[method-assign]
    worlds.train(recipe, out)


@pytest.mark.slow
@pytest.mark.usefixtures("private_cache")
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_a_step_that_is_no_number_is_left_out(
    kind: str,
    make: Callable[..., dict[str, Any]],  # noqa: F811
    tmp_path: Path,
) -> None:
    pytest.importorskip("deepspeed", reason="the engine deepspeed is not installed")
    recipe = make(steps=4, on_divergence="skip")
    for out, processes in ((tmp_path / "one", 1), (tmp_path / kind, 2)):
        given = ENGINES[kind] if processes == 2 else {}
        for ended in worlds.world(processes, train_over_a_broken_step, recipe, out, folder=tmp_path, environment=given):
            assert ended.code == 0, ended.printed[-3000:]
    for a, b in zip(worlds.curve(tmp_path / "one"), worlds.curve(tmp_path / kind), strict=True):
        assert b["loss"] == (None if a["step"] == 2 else pytest.approx(a["loss"], rel=2e-6))


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("CONFIG_FILE", "ds.json", "deepspeed_config_file"),
        ("OFFLOAD_OPTIMIZER_DEVICE", "cpu", "offload_optimizer_device"),
        ("OFFLOAD_PARAM_DEVICE", "nvme", "offload_param_device"),
        ("ZERO3_INIT", "true", "zero3_init"),
        ("ZERO_STAGE", "1", "zero_stage 1"),
    ],
)
def test_options_that_are_not_honoured_are_refused(option: str, value: str, words: str) -> None:
    assert engine(ENGINES["zero3"]) == "zero3"
    with refused("unsupported", words):
        engine({**DEEPSPEED, f"ACCELERATE_DEEPSPEED_{option}": value})


def test_a_run_without_deepspeed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with refused("not-installed", "deepspeed", "pip install"):
        Zero(torch.nn.Linear(1, 1), stage=2, device=torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.usefixtures("private_cache")
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_a_second_stage_goes_on_with_the_first(
    kind: str,
    make: Callable[..., dict[str, Any]],  # noqa: F811
    tmp_path: Path,
) -> None:
    """Each stage gets an engine of its own; what another one had is whole again in between."""
    pytest.importorskip("deepspeed", reason="the engine deepspeed is not installed")
    recipe = make(steps=2)
    recipe["stages"].append({**recipe["stages"][0], "name": "tune", "train": {"language": 1e-4}})
    one, two = run(recipe, tmp_path / "one", 1), run(recipe, tmp_path / kind, 2, kind)
    for number in (0, 1):
        for a, b in zip(worlds.curve(one, number), worlds.curve(two, number), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=2e-6)
