"""Hostile checkpoints: altered JSON, safetensors whose headers lie, torn training checkpoints, and whole folders."""

from __future__ import annotations

import atexit
import functools
import json
import random
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

import fuzz_mutate as hurt
import torch
from fuzz_target import Target
from safetensors.torch import save_file
from torch import nn

import tiny
from opticnerve.inference.load import load_model, load_processor
from opticnerve.language.chat_template import CHATML
from opticnerve.models import OpticNerveConfig
from opticnerve.models.checkpoint import delta
from opticnerve.models.checkpoint.strict import told
from opticnerve.models.family import family_of
from opticnerve.models.vlm.build import dock
from opticnerve.train import checkpoint

DELTA, WHOLE = "delta", "whole"
PROCESSOR = (
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


@functools.cache
def folders() -> dict[str, Path]:
    """A run's folder beside its bases, and the same model as a folder of its own."""
    place = Path(tempfile.mkdtemp(prefix="opticnerve-fuzz-models-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    language = tiny.save_language(place / "language", "qwen2", chat_template=CHATML)
    made = dock(tiny.save_vision(place / "vision"), "mlp", language)
    made.lora = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": ["q_proj"]}
    made.model.give_lora(made.lora)
    made.save(place / DELTA, [n for n, _ in made.model.named_parameters() if ".lora_" in n])
    made.model.save_pretrained(place / WHOLE)
    made.processor.save_pretrained(place / WHOLE)
    return {DELTA: place / DELTA, WHOLE: place / WHOLE}


def altered(rng: random.Random, kind: str, names: tuple[str, ...]) -> bytes:
    """A case: the kind of folder, the file in it, and what the file shall hold."""
    name = rng.choice([n for n in names if (folders()[kind] / n).is_file()])
    good = (folders()[kind] / name).read_bytes()
    if name.endswith(".json") and rng.random() < 0.8:
        good = hurt.json_bytes(rng, hurt.json_hurt(rng, json.loads(good)))
    elif name.endswith(".safetensors") and rng.random() < 0.8:
        good = lying(rng, good)
    else:
        good = hurt.bytes_hurt(rng, good)
    return f"{kind} {name}\n".encode() + good


def put_together(data: bytes, folder: Path) -> Path:
    """The folder that a case describes."""
    head, _, body = data.partition(b"\n")
    kind, _, name = head.decode("ascii", "replace").partition(" ")
    known = {p.name for p in folders()[kind if kind in folders() else DELTA].iterdir()}
    kind, name = (kind, name) if kind in folders() and name in known else (DELTA, delta.REFERENCE)
    made = folder / "model"
    if made.exists():
        shutil.rmtree(made)
    made.mkdir()
    for file in folders()[kind].iterdir():
        if file.name != name:
            (made / file.name).symlink_to(file)
    (made / name).write_bytes(body)
    return made


# -- JSON -------------------------------------------------------------------------------------------------------------


def make_json(rng: random.Random) -> bytes:
    return altered(rng, DELTA, (delta.REFERENCE, "config.json"))


def run_json(data: bytes, folder: Path) -> None:
    made = put_together(data, folder)
    reference = delta.read(made)
    family_of(str(made))
    with told("config.json", made):
        config = OpticNerveConfig.from_pretrained(made)
    delta.towers_differ(made, set(config.towers), set(reference["bases"]) - {"language"})
    delta.check_bases(made, reference["bases"], reference["bases"])


def make_processor(rng: random.Random) -> bytes:
    return altered(rng, WHOLE, PROCESSOR)


def run_processor(data: bytes, folder: Path) -> None:
    load_processor(str(put_together(data, folder)))


# -- safetensors ------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """As much of a model as `delta.put` looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.ModuleDict({"connector": nn.Linear(3, 2)})
        self.language_model = nn.Linear(4, 4, bias=False)


EXPECTED = {n: list(t.shape) for n, t in Small().state_dict().items()}


@functools.cache
def tensors() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save_file(Small().state_dict(), Path(folder) / "good.safetensors")
        return (Path(folder) / "good.safetensors").read_bytes()


def lying(rng: random.Random, good: bytes) -> bytes:
    """A file whose header says other than what it holds."""
    (length,) = struct.unpack("<Q", good[:8])
    header, body = json.loads(good[8 : 8 + length]), good[8 + length :]
    names = [n for n in header if n != "__metadata__"]
    for _ in range(rng.randint(1, 3)):
        entry = header.get(rng.choice(names))
        entry = entry if isinstance(entry, dict) else None
        number = rng.choice((*hurt.NUMBERS, -(2**63), 3.5))
        match rng.randrange(7):
            case 0 if entry:
                entry["data_offsets"] = [rng.choice((0, number)), rng.choice((number, len(body), len(body) + 1))]
            case 1 if entry:
                entry["shape"] = [rng.choice((*hurt.NUMBERS[:8], -1, number)) for _ in range(rng.randrange(4))]
            case 2 if entry:
                entry["dtype"] = rng.choice(
                    ("F64", "F16", "BF16", "I32", "I64", "U8", "BOOL", "F8_E4M3", "X", "", None, 1, "F4")
                )
            case 3 if len(names) > 1 and entry:
                header[rng.choice(names)] = entry
            case 4:
                header.pop(rng.choice(names), None)
            case 5:
                header[rng.choice((*hurt.STRINGS, "image.connector.weight", "__metadata__"))] = rng.choice(
                    (entry, *hurt.VALUES)
                )
            case 6:
                header = hurt.json_hurt(rng, header, most=1)
                if not isinstance(header, dict):
                    header = {"a": header}
    text = hurt.json_bytes(rng, header)
    if rng.random() < 0.1:
        text = text[:1] + text[1:-1] + b"," + text[1:-1] + text[-1:]  # every key twice
    said = rng.choice(hurt.NUMBERS) % 2**64 if rng.random() < 0.15 else len(text)
    return struct.pack("<Q", said) + text + (body if rng.random() < 0.8 else body[: rng.randrange(len(body) + 1)])


def make_tensors(rng: random.Random) -> bytes:
    return lying(rng, tensors()) if rng.random() < 0.7 else hurt.bytes_hurt(rng, tensors())


def run_tensors(data: bytes, folder: Path) -> None:
    (folder / delta.TENSORS).write_bytes(data)
    model: Any = Small()
    before = {n: t.shape for n, t in model.state_dict().items()}
    with torch.no_grad():
        delta.put(model, folder, EXPECTED)
    assert {n: t.shape for n, t in model.state_dict().items()} == before


# -- what a training run resumes from ---------------------------------------------------------------------------------


@functools.cache
def saved() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        state = {"model": {"w": torch.ones(3)}, "rng": checkpoint.rng_state(), "metrics": [{"loss": 0.5}]}
        made = checkpoint.save(Path(folder), 3, state)
        return {f.name: f.read_bytes() for f in made.iterdir()}


def make_checkpoint(rng: random.Random) -> bytes:
    name = rng.choice(list(saved()))
    good = saved()[name]
    if name.endswith(".json") and rng.random() < 0.6:
        return name.encode() + b"\n" + hurt.json_bytes(rng, hurt.json_hurt(rng, json.loads(good)))
    return name.encode() + b"\n" + hurt.bytes_hurt(rng, good)


def run_checkpoint(data: bytes, folder: Path) -> None:
    head, _, body = data.partition(b"\n")
    made = folder / "checkpoint-00000003"
    made.mkdir(exist_ok=True)
    for name, good in saved().items():
        (made / name).write_bytes(body if name.encode() == head else good)
    told_of: list[str] = []
    state = checkpoint.newest(folder, warn=told_of.append)
    assert state is not None or told_of, "passed over without a word"
    if state is not None:
        assert torch.equal(state["model"]["w"], torch.ones(3))


def make_state(rng: random.Random) -> bytes:
    return hurt.bytes_hurt(rng, saved()[checkpoint.STATE])


def run_state(data: bytes, folder: Path) -> None:
    """A state whose hash was made to fit: someone tampered with it, and `weights_only` stands alone."""
    from opticnerve.common.atomic import sha256

    made = folder / "checkpoint-00000003"
    made.mkdir(exist_ok=True)
    (made / checkpoint.STATE).write_bytes(data)
    sums = {checkpoint.STATE: {"sha256": sha256(made / checkpoint.STATE), "bytes": len(data)}}
    (made / checkpoint.SUMS).write_text(json.dumps(sums))
    checkpoint.newest(folder, warn=lambda said: None)


# -- whole folders ----------------------------------------------------------------------------------------------------


def make_model(rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return altered(
            rng, WHOLE, ("config.json", "config.json", "model.safetensors", "generation_config.json", *PROCESSOR)
        )
    return altered(rng, DELTA, (delta.REFERENCE, delta.REFERENCE, "config.json", "config.json", delta.TENSORS))


def run_model(data: bytes, folder: Path) -> None:
    load_model(put_together(data, folder), device="cpu")


TARGETS = (
    Target("checkpoint-json", make_json, run_json),
    Target("processors", make_processor, run_processor, share=0.2),
    Target("safetensors", make_tensors, run_tensors),
    Target("training-checkpoints", make_checkpoint, run_checkpoint),
    Target("training-states", make_state, run_state),
    Target("models", make_model, run_model, share=0.1),
)
