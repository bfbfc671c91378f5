"""The files under recipes/launch say what they claim, by accelerate's own parser; engines that are not driven are
refused."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from errors import refused
from opticnerve.distributed.collectives import engine, keeps_shards, sequence_parallel, timeout

LAUNCH = Path(__file__).resolve().parents[2] / "recipes" / "launch"
ENGINES = {
    "ddp": "ddp", "fsdp2": "fsdp2", "fsdp2-zero2": "fsdp2",
    "fsdp2-sharded": "fsdp2", "fsdp2-sequence": "fsdp2", "multi-node": "fsdp2", "deepspeed-zero2": "zero2",
    "deepspeed-zero3": "zero3",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(p.stem for p in LAUNCH.glob("*.yaml")))
def test_launch_files_choose_the_engine_they_claim(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.delenv(variable, raising=False)
    command = ["--config_file", str(LAUNCH / f"{name}.yaml"), "-m", "opticnerve_launch", "train", "recipe.yaml"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    assert args.mixed_precision == "no"
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""
        _, given = prepare_deepspeed_cmd_env(args)
    else:
        given = prepare_multi_gpu_env(args)
    assert engine({**given, "WORLD_SIZE": "8"}) == ENGINES[name]
    assert sequence_parallel({**given, "WORLD_SIZE": "8"}) == (2 if name == "fsdp2-sequence" else 1)
    assert keeps_shards({**given, "WORLD_SIZE": "8"}) == (name == "fsdp2-sharded")
    if ENGINES[name] == "fsdp2":
        assert given["FSDP_RESHARD_AFTER_FORWARD"] == ("false" if name == "fsdp2-zero2" else "true")


def test_the_slurm_script_is_shell_and_names_files_that_exist() -> None:
    script = LAUNCH / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    for file in re.findall(r"recipes/launch/[\w.-]+", script.read_text()):
        assert (LAUNCH.parents[1] / file).is_file(), file


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "zero_stage 1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "LOCAL_STATE_DICT"},
            "SHARDED_STATE_DICT",
        ),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron"),
    ],
)
def test_engines_that_are_not_driven_are_refused(environment: dict[str, str], words: str) -> None:
    with refused("unsupported", words):
        keeps_shards(environment)


def test_the_timeout_is_ours_to_choose() -> None:
    assert timeout({}).total_seconds() == 600
    assert timeout({"OPTICNERVE_TIMEOUT": "12.5"}).total_seconds() == 12.5
    with refused("out-of-range", "OPTICNERVE_TIMEOUT=soon"):
        timeout({"OPTICNERVE_TIMEOUT": "soon"})
