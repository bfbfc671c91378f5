"""Two and four processes draw the curve of one, by DDP and by FSDP2: uneven data, batches without a picture, several
micro-batches, packed rows; and what one of them saved, another number goes on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds

import tiny

pytestmark = [pytest.mark.usefixtures("private_cache"), pytest.mark.slow]
ENGINES = {
    "ddp": {}, "fsdp2": worlds.FSDP2, "fsdp2-zero2": {**worlds.FSDP2, "FSDP_RESHARD_AFTER_FORWARD": "false"},
}  # fmt: skip


def save_mixed(folder: Path, count: int = 11) -> Path:
    """Text alone, except for every fifth sample: most of a process's batches hold no picture. 11: nothing divides it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        content: list[dict[str, Any]] = [{"type": "text", "text": f"what is {i}?"}]
        if i % 5 == 0:
            tiny.picture(i).save(folder / f"{i}.png")
            content.insert(0, {"type": "image", "path": f"{i}.png"})
        answer = ["yes", "no", "three foxes", "a red circle " * 5][i % 4]
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        lines.append(json.dumps({"messages": messages}))
    (folder / "mixed.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "mixed.jsonl"


@pytest.fixture
def make(
    language_folder: Callable[..., str], vision_folder: Callable[..., str], tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    data = save_mixed(tmp_path / "data")

    def recipe(
        *, language_part: str = "llama", fusion: str = "splice", precision: str = "fp32", **stage: Any
    ) -> dict[str, Any]:
        vision_encoder = {"type": "hf_vision", "name": vision_folder("clip_vision_model")}
        given = {
            "name": "align", "train": {"connector": 1e-2, "language.lora": 1e-2}, "batch_size": 4, "steps": 6,
            "data": [{"path": str(data)}], **stage,
        }  # fmt: skip
        image = {"encoder": vision_encoder, "fusion": {"type": fusion}}
        model = {"language": {"name": language_folder(language_part)}, "image": image}
        return {"precision": precision, "model": model, "stages": [given], "forgetting": False}

    return recipe


def run(recipe: dict[str, Any], out: Path, processes: int, engine: str = "ddp", *, resume: bool = False) -> Path:
    means = ENGINES[engine]
    for ended in worlds.world(processes, worlds.train, recipe, out, resume, folder=out.parent, environment=means):
        assert ended.code == 0, ended.printed[-4000:]
    return out


def same(one: Path, other: Path, rel: float = 2e-6) -> None:
    assert [line["samples"] for line in worlds.curve(other)] == [line["samples"] for line in worlds.curve(one)]
    for a, b in zip(worlds.curve(one), worlds.curve(other), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=rel), (a["step"], a["loss"], b["loss"])
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    mine, others = worlds.weights(one), worlds.weights(other)
    assert mine.keys() == others.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


CASES: dict[str, dict[str, Any]] = {
    "accumulate": {"batch_size": 8, "accumulate": 2},
    "cross_attention": {"fusion": "cross_attention", "train": {"connector": 1e-2, "fusion": 1e-2}},
    "adapters": {"train": {"connector": 1e-2, "encoder.lora": 1e-2, "language.lora": 1e-2}},
    "pack": {"pack": {"tokens": 120, "window": 12}, "epochs": 3, "steps": None},
    "vision encoder, language model, checkpointing": {
        "train": {"encoder.last(2)": 1e-3, "connector": 1e-2, "language": 1e-3}, "language_part": "llama tied",
        "gradient_checkpointing": True,
    },
}  # fmt: skip


TRIED = {
    "accumulate": [("ddp", 4), ("fsdp2-zero2", 2)],
    "cross_attention": [("fsdp2", 2), ("ddp", 4)],
    "adapters": [("ddp", 2), ("fsdp2", 2)],
    "pack": [("ddp", 2), ("fsdp2", 4)],
    "vision encoder, language model, checkpointing": [("ddp", 2), ("fsdp2", 4)],
}


@pytest.mark.parametrize("case", CASES)
def test_processes_are_one(case: str, make: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    recipe = make(**CASES[case])
    one = run(recipe, tmp_path / "one", 1)
    for engine, processes in TRIED[case]:
        same(one, run(recipe, tmp_path / f"{engine}-{processes}", processes, engine))


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, "fsdp2"), (4, "ddp")), ((4, "ddp"), (1, "ddp")), ((1, "ddp"), (2, "fsdp2"))],
    ids=["FSDP2 on 2 to DDP on 4", "DDP on 4 to 1", "1 to FSDP2 on 2"],
)
def test_what_some_saved_others_go_on_with(
    before: tuple[int, str], after: tuple[int, str], make: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """All kinds write one kind of checkpoint, of whole tensors: it goes on to the curve that one process draws."""
    recipe = make(batch_size=8, accumulate=2, save_every=3)
    one = run(recipe, tmp_path / "one", 1)
    short = tmp_path / "short"
    # all are asked to stop by one of them, which got the signal: a checkpoint, and the exit of an interruption
    for ended in worlds.world(
        before[0], worlds.train, recipe, short, False, "0 7 SIGTERM", folder=tmp_path, environment=ENGINES[before[1]]
    ):
        assert ended.code == 0, ended.printed[-3000:]
        assert "stopped; saved to" in ended.printed
    saved = worlds.state(short)
    assert saved["step"] == 4
    alone = worlds.state(one, 3)
    assert len(saved["rng"]) == before[0]
    assert saved["optimizer"]["masters"].keys() == alone["optimizer"]["masters"].keys()
    for name, tensor in alone["optimizer"]["masters"].items():
        assert saved["optimizer"]["masters"][name].shape == tensor.shape
    for k, values in alone["optimizer"]["adam"]["state"].items():
        assert {n: v.shape for n, v in saved["optimizer"]["adam"]["state"][k].items()} == {
            n: v.shape for n, v in values.items()
        }
    same(one, run(recipe, short, *after, resume=True))


def test_masters_of_bf16_weights_are_float32_in_shards(make: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """bf16 rounds sums by their order, so curves are near and not the same; the masters take steps below bf16."""
    recipe = make(precision="bf16", save_every=5, train={"connector": 1e-4, "language": 1e-5})
    one, two = run(recipe, tmp_path / "one", 1), run(recipe, tmp_path / "two", 2, "fsdp2")
    for a, b in zip(worlds.curve(one), worlds.curve(two), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-2)
    masters = worlds.state(two, 5)["optimizer"]["masters"]
    assert {m.dtype for m in masters.values()} == {torch.float32}
    assert any((m != m.bfloat16()).any() for m in masters.values())
    for name, tensor in worlds.state(one, 5)["optimizer"]["masters"].items():
        torch.testing.assert_close(masters[name], tensor, rtol=2e-2, atol=2e-3, msg=name)
