"""Processes that share each sequence draw the curve of one: packs, branches, padding, mixtures, recomputed layers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import worlds
from test_many_processes import make, same  # noqa: F401 (a fixture)

from errors import refused
from opticnerve.distributed.collectives import engine, sequence_parallel
from opticnerve.models.vlm.build import Dock
from opticnerve.objectives.next_token import NextToken
from opticnerve.ops import enabled
from opticnerve.recipe import Stage
from opticnerve.train import strategy

SHARED = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_SP_SIZE": "2"}
CASES: dict[str, dict[str, Any]] = {
    "packs, adapter, held out": {
        "pack": {"tokens": 120, "window": 12}, "epochs": 2, "steps": None, "batch_size": 2,
        "validate": {"split": 0.3, "every": 2},
    },
    "all of a mixture, checkpointing": {
        "language_part": "qwen3_moe", "train": {"connector": 1e-2, "language": 1e-3}, "gradient_checkpointing": True,
        "batch_size": 4, "accumulate": 2, "steps": 3,
    },
}  # fmt: skip
TRIED: dict[str, list[tuple[int, dict[str, str]]]] = {
    "packs, adapter, held out": [(2, {})],
    "all of a mixture, checkpointing": [(4, worlds.FSDP2)],
}


@pytest.mark.slow
@pytest.mark.usefixtures("private_cache")
@pytest.mark.skipif(not enabled(), reason="attention within segments is off under OPTICNERVE_PLAIN")
@pytest.mark.parametrize("case", CASES)
def test_those_that_share_sequences_are_one(
    case: str, make: Callable[..., dict[str, Any]], tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    recipe = make(**CASES[case])
    runs: list[tuple[int, dict[str, str]]] = [(1, {}), *((n, {**SHARED, **means}) for n, means in TRIED[case])]
    for processes, means in runs:
        out = tmp_path / str(processes)
        for ended in worlds.world(processes, worlds.train, recipe, out, folder=tmp_path, environment=means):
            assert ended.code == 0, ended.printed[-4000:]
    for processes, _ in runs[1:]:
        same(tmp_path / "1", tmp_path / str(processes))
        for a, b in zip(worlds.curve(tmp_path / "1"), worlds.curve(tmp_path / str(processes)), strict=True):
            assert {k: b[k] for k in ("tokens", "supervised_tokens")} == {
                k: a[k] for k in ("tokens", "supervised_tokens")
            }
            if "validation" in a:
                assert b["validation"]["loss"] == pytest.approx(a["validation"]["loss"], rel=2e-6)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"CP_SIZE": "2"}, "unsupported", "cp_size"),
        ({"TP_SIZE": "2"}, "unsupported", "tp_size"),
        ({"SP_SIZE": "3"}, "mismatch", "4 processes"),
        ({"SP_SIZE": "2", "DP_SHARD_SIZE": "4"}, "mismatch", "4 processes"),
    ],
)
def test_what_is_not_driven_is_refused(options: dict[str, str], kind: str, words: str) -> None:
    given = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "WORLD_SIZE": "4"}
    with refused(kind, words):
        engine({**given, **{f"PARALLELISM_CONFIG_{k}": v for k, v in options.items()}})


def test_how_many_share_a_sequence() -> None:
    assert sequence_parallel({}) == 1
    assert sequence_parallel({**SHARED, "WORLD_SIZE": "4", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}) == 2
    with refused("unsupported", "DeepSpeed"):
        engine({**SHARED, "WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"})


@pytest.mark.skipif(not enabled(), reason="attention within segments is off under OPTICNERVE_PLAIN")
@pytest.mark.parametrize(
    ("fusion", "size", "words"), [("cross_attention", "2", "fusion"), ("splice", "3", "4 heads"), ("splice", "2", "")]
)
def test_models_that_cannot_share_are_refused(
    docked: Callable[..., Dock], monkeypatch: pytest.MonkeyPatch, fusion: str, size: str, words: str
) -> None:
    for name, value in {**SHARED, "PARALLELISM_CONFIG_SP_SIZE": size, "WORLD_SIZE": size}.items():
        monkeypatch.setenv(name, value)
    dock: Any = docked("llama", fusion=fusion)
    stage = Stage(name="align", train={"connector": 1e-3}, data=[{"path": "x.jsonl"}], steps=1)  # type: ignore[list-item]
    with refused("unsupported", words) if words else nullcontext():
        strategy._check_shareable(NextToken(dock.model), stage)
