"""A language model that is read onto shards is the one that is loaded whole, bit for bit, whatever its family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import worlds
from torch.distributed.tensor import DTensor

from opticnerve.language.load import load_language
from opticnerve.language.sharded import loading_onto_shards
from opticnerve.types import OpticNerveError

pytestmark = [pytest.mark.usefixtures("private_cache"), pytest.mark.slow]
# Tied and not, tables of positions, a scale and soft caps, a recurrent state, experts that transformers stacks.
FAMILIES = ("llama", "llama tied", "gpt2", "opt", "gemma2", "mamba", "qwen3_moe")


def compare(folders: dict[str, str]) -> None:
    """In each process."""
    dist.init_process_group("gloo")
    for family, folder in folders.items():
        with loading_onto_shards(dist.get_world_size()):
            found = load_language(folder, dtype=torch.bfloat16).model
        whole = load_language(folder, dtype=torch.bfloat16).model
        assert type(found) is type(whole)
        assert found.config.to_dict() == whole.config.to_dict(), family
        assert found.generation_config.to_dict() == whole.generation_config.to_dict(), family
        assert len(list(found.parameters())) == len(list(whole.parameters())), family  # tied ones once
        parameters = dict(found.named_parameters(remove_duplicate=False))
        for name, parameter in whole.named_parameters(remove_duplicate=False):
            shard = parameters.pop(name)
            assert isinstance(shard, DTensor), name
            assert shard.to_local().shape[0] <= -(-shard.shape[0] // dist.get_world_size()), name
            assert shard.dtype == parameter.dtype, name
            assert torch.equal(shard.full_tensor(), parameter), name
        assert not parameters
        for name, buffer in whole.named_buffers():
            assert torch.equal(found.get_buffer(name), buffer), name


def compare_or_say(folders: dict[str, str]) -> None:
    try:
        compare(folders)
    except OpticNerveError as e:
        print(e)


def test_each_family_is_the_one_that_is_loaded_whole(language_folder: Callable[..., str], tmp_path: Path) -> None:
    folders = {family: language_folder(family) for family in FAMILIES}
    mixture = {"qwen3_moe": folders.pop("qwen3_moe")}
    for processes, given in ((3, folders), (2, mixture)):  # 3: few sizes divide by it
        for ended in worlds.world(processes, compare, given, folder=tmp_path):
            assert ended.code == 0, ended.printed[-4000:]
    for ended in worlds.world(3, compare_or_say, mixture, folder=tmp_path):
        assert "4 experts" in ended.printed
        assert "3 processes" in ended.printed
