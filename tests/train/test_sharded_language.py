# ruff: noqa: F811 (a fixture that is imported)
"""A language model that is read onto shards and is whole nowhere: it draws the curve of one process, leaves the same
files, and its checkpoints, in shards as well, are gone on with by any number of processes."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from safetensors.torch import load_file
from test_many_processes import make, same, save_mixed  # noqa: F401
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from errors import refused
from opticnerve import recipe as recipes
from opticnerve.runs.pipeline import check_shareable, run_recipe
from opticnerve.train import checkpoint
from opticnerve.train.loop import Interrupted

pytestmark = [pytest.mark.usefixtures("private_cache"), pytest.mark.slow]
SHARDED = {**worlds.FSDP2, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}


def is_mapped(address: int) -> bool:
    """Whether it lies in a file of weights, which is read by pages and takes no memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(".safetensors"):
            first, last = (int(part, 16) for part in line.split()[0].split("-"))
            if first <= address < last:
                return True
    return False


class MostBytes(TorchDispatchMode):
    """The most bytes that this process's tensors took together at any time; of what lies in shards, its shard."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        before = len(self._known)
        for tensor in tree_leaves((args, kwargs, made)):
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if type(local) not in (torch.Tensor, torch.nn.Parameter) or local.is_meta:
                continue
            storage = local.untyped_storage()
            if storage.nbytes() > 16_384 and id(storage) not in self._known and not is_mapped(storage.data_ptr()):
                self._known[id(storage)] = weakref.ref(storage)
        if len(self._known) != before:
            alive = {key: s for key, ref in self._known.items() if (s := ref()) is not None}
            self._known = {key: self._known[key] for key in alive}
            self.most = max(self.most, sum(s.nbytes() for s in alive.values()))
        return made


def run(recipe: dict[str, Any], out: Path, resume: bool = False, hurt: str = "") -> None:
    """In a process: all of a run."""
    if hurt:
        worlds._hurt(hurt)
    try:
        run_recipe(recipes.load(recipe), out, resume=resume)
    except Interrupted as e:
        print(e)


def run_counting(recipe: dict[str, Any], out: Path) -> None:
    with MostBytes() as counted:
        run_recipe(recipes.load(recipe), out)
    (out / f"most-{torch.distributed.get_rank()}").write_text(str(counted.most))


def world(recipe: dict[str, Any], out: Path, processes: int, means: dict[str, str], *args: Any) -> Path:
    for ended in worlds.world(processes, run, recipe, out, *args, folder=out.parent, environment=means):
        assert ended.code == 0, ended.printed[-4000:]
    return out


@pytest.mark.parametrize(
    ("language_part", "fusion", "processes"), [("llama", "splice", 2), ("llama tied", "cross_attention", 4)]
)
def test_the_curve_and_the_files_are_those_of_one_process(
    language_part: str, fusion: str, processes: int, make: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:  # fmt: skip
    """Frozen under an adapter, then trained: the second stage begins from the shards of the first."""
    data = save_mixed(tmp_path / "more", 41)  # enough pictures to see whether they are looked at
    recipe = make(language_part=language_part, fusion=fusion, steps=3, data=[{"path": str(data)}])
    recipe["stages"][0]["train"]["language.embeddings"] = 1e-3
    tune = {
        "name": "tune",
        "validate": {"split": 0.25, "every": 3},
        "train": {"language": 1e-3, "connector": 1e-3},
        "gradient_checkpointing": True,
    }
    recipe["stages"].append({**recipe["stages"][0], **tune})
    one, some = world(recipe, tmp_path / "one", 1, {}), world(recipe, tmp_path / "some", processes, SHARDED)
    same(one, some)
    for a, b in zip(worlds.curve(one, 1), worlds.curve(some, 1), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-6)
    mine, theirs = load_file(one / "trained.safetensors"), load_file(some / "trained.safetensors")
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=2e-5, msg=name)
    shutil.rmtree(some / "stages" / "1-tune")  # then the first stage is read from its folder, onto shards
    world(recipe, some, processes, SHARDED, True)
    for name, tensor in load_file(some / "trained.safetensors").items():
        assert torch.equal(theirs[name], tensor), name
    a, b = (json.loads((folder / "results.json").read_text())["stages"] for folder in (one, some))
    assert b[0]["image_use"]["own"] == pytest.approx(a[0]["image_use"]["own"], rel=1e-5)


def test_no_process_ever_holds_all_of_the_language_model(make: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """From before the load until the run is saved; a run that is not asked for it shows that the count would see it."""
    recipe = make(batch_size=2, steps=2, train={"language.last(1)": 1e-3})  # the other layers keep no activations
    recipe["stages"].append({**recipe["stages"][0], "name": "tune"})
    language = Path(recipe["model"]["language"]["name"])
    config = LlamaConfig.from_pretrained(language)
    config.update({"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 16, "head_dim": 32})
    torch.manual_seed(0)
    deep = LlamaForCausalLM(config)
    all_of_it = sum(p.nbytes for p in deep.parameters())
    recipe["model"]["language"]["name"] = str(shutil.copytree(language, tmp_path / "deep"))
    deep.save_pretrained(tmp_path / "deep")
    for name, means in {"sharded": SHARDED, "fsdp2": worlds.FSDP2}.items():
        recipe["stages"] = recipe["stages"][: 2 if name == "sharded" else 1]
        for ended in worlds.world(2, run_counting, recipe, tmp_path / name, folder=tmp_path, environment=means):
            assert ended.code == 0, ended.printed[-4000:]
        most = [int((tmp_path / name / f"most-{rank}").read_text()) for rank in range(2)]
        assert [m < all_of_it for m in most] == [name == "sharded"] * 2, (most, all_of_it)


def test_a_checkpoint_in_shards_is_gone_on_with_by_any_number(
    make: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Exactly by the same number of processes; by one that holds all, as well, and the reverse."""
    recipe = make(batch_size=8, accumulate=2, save_every=3, train={"connector": 1e-2, "language": 1e-3})
    through = world(recipe, tmp_path / "through", 2, SHARDED)
    short, alone = (
        world(recipe, tmp_path / name, processes, means, False, "0 7 SIGTERM")
        for name, processes, means in (("short", 2, SHARDED), ("alone", 1, {}))
    )
    [newest] = (short / "stages" / "0-align").glob("checkpoint-00000004")
    assert len(list((newest / "shards").glob("*.safetensors"))) == 2
    masters = worlds.state(alone)["optimizer"]["masters"]
    found = worlds.state(short)
    assert {n: m.shape for n, m in found["optimizer"]["masters"].items()} == {n: m.shape for n, m in masters.items()}
    again, others, whole = (shutil.copytree(short, tmp_path / name) for name in ("again", "others", "whole"))
    world(recipe, again, 2, SHARDED, True)
    for name, tensor in worlds.weights(through).items():
        assert torch.equal(worlds.weights(again)[name], tensor), name
    same(through, world(recipe, others, 4, SHARDED, True))
    same(through, world(recipe, whole, 1, {}, True))
    same(through, world(recipe, alone, 2, SHARDED, True))
    damaged = sorted((newest / "shards").iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=damaged.name):
        checkpoint.check(newest)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"forgetting": True}, "forgetting: false"),
        ({"evaluate": [{"name": "questions", "data": {"path": "questions.jsonl"}}]}, "opticnerve eval"),
        ({"stages": {"lora": {"dora": True}}}, "dora"),
        ({"stages": {"validate": {"split": 0.2, "every": 2, "keep": "best"}}}, "keep: last"),
        ({"model": {"from": "runs/other"}}, "goes on from another"),
    ],
)
def test_what_needs_a_whole_language_model_is_refused(
    change: dict[str, Any], words: str, make: Callable[..., dict[str, Any]]
) -> None:
    recipe = make()
    stages = [{**stage, **change.get("stages", {})} for stage in recipe["stages"]]
    with refused("unsupported", words):
        check_shareable(recipes.load({**recipe, **change, "stages": stages}))
    check_shareable(recipes.load(recipe))
