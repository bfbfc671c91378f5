"""What was trained, and exact references to what was not.

A run keeps the tensors that differ from the base models (connector, LoRA, opened blocks), and names the bases with the
SHA-256 of their files. Loading builds the bases again and refuses others. `opticnerve merge` makes a folder of its own.

    config.json          the whole model's configuration
    dock.json            bases and their hashes, LoRA options, the list of trained tensors, library versions
    trained.safetensors  the trained tensors under their full names
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from opticnerve import registry
from opticnerve.language import load as language
from opticnerve.models.configuration import OpticNerveConfig
from opticnerve.models.modeling import OpticNerveForConditionalGeneration
from opticnerve.models.parts import is_docked, moving_buffers
from opticnerve.models.tower import join, language_sizes
from opticnerve.starter import weights as starter
from opticnerve.starter.cache import fingerprint
from opticnerve.types import OpticNerveError

REFERENCE, TENSORS = "dock.json", "trained.safetensors"


def find(name: Any) -> Path | None:
    """The folder of a delta, or None where `name` is something else (a self-contained folder, a hub name)."""
    folder = Path(str(name))
    return folder if (folder / REFERENCE).is_file() else None


def describe_bases(
    language_name: str, language_files: Iterable[str], towers: dict[str, Any], *, gguf_file: str | None = None
) -> dict[str, Any]:
    """The references: `language` and, per modality, `encoder`: how each is called, and the hash of its weight files."""
    files = list(language_files) or language.hub_files(language_name)
    bases: dict[str, Any] = {"language": {"name": language_name, "sha256": fingerprint(files) if files else None}}
    if gguf_file is not None:
        bases["language"]["gguf_file"] = gguf_file
    return bases | {modality: base_of(name, encoder) for modality, (name, encoder) in towers.items()}


def base_of(name: Any, encoder: Any) -> dict[str, Any]:
    """How an encoder's weights are called, and the hash of their files."""
    files = encoder.weight_files() or [f for n in weight_names(name) for f in _hub_files(n)]
    return {"name": name, "sha256": fingerprint(files) if files else None}


def weight_names(name: Any) -> list[str]:
    """The names of an encoder's weights: one, none, or several where encoders stand side by side."""
    if isinstance(name, dict):
        return [n for inner in name.values() for n in weight_names(inner)]
    return [] if name is None else [str(name)]


def _hub_files(name: str) -> list[str]:
    return [] if starter.is_starter(name) else language.hub_files(name.removeprefix("hf-hub:"))


def save(
    model: OpticNerveForConditionalGeneration,
    folder: Path,
    *,
    bases: dict[str, Any],
    lora: dict[str, Any] | None,
    trained: Iterable[str],
) -> None:
    """Write config.json, dock.json and trained.safetensors.

    Args:
        trained: full names of all parameters that any stage so far has trained; the buffers that move with them
            and all that docking added (connectors, fusions) go along.
    """
    import transformers

    import opticnerve

    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    trained = set(trained)
    names = sorted({*trained, *moving_buffers(model, trained), *filter(is_docked, state)})
    chosen = {n: state[n].detach().cpu().contiguous().clone() for n in names}
    config = model.config
    config.save_pretrained(folder)
    save_file(chosen, folder / TENSORS, metadata={"format": "pt"})
    reference = {
        "opticnerve": opticnerve.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bases": bases,
        "lora": lora,
        "dtype": str(model.language_model.dtype).removeprefix("torch."),
        "tensors": {n: list(t.shape) for n, t in chosen.items()},
    }
    (folder / REFERENCE).write_text(json.dumps(reference, indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """dock.json, checked for what loading needs."""
    try:
        reference = json.loads((folder / REFERENCE).read_text(encoding="utf-8"))
        reference["bases"]["language"]["name"], reference["tensors"], reference["lora"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as e:
        raise OpticNerveError(f"{folder / REFERENCE} is not a dock's reference file: {e!r}") from e
    return dict(reference)


def load(folder: Path, *, dtype: Any = None, trust_remote_code: bool = False) -> OpticNerveForConditionalGeneration:
    """Build the bases, check their hashes, put in what was trained; every tensor is accounted for."""
    reference = read(folder)
    if dtype in (None, "auto"):
        dtype = reference["dtype"]
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    config = OpticNerveConfig.from_pretrained(folder)
    named = reference["bases"]["language"]
    base = language.load_language(named["name"], dtype=dtype, gguf_file=named.get("gguf_file"))
    towers = {}
    for modality, spec in config.towers.items():
        name = reference["bases"][modality]["name"]
        part = registry.encoders.get(spec["encoder"]["type"], allow_dotted=trust_remote_code)
        options = part.loading_options({k: v for k, v in spec["encoder"].items() if k != "type"})
        encoder = part.from_pretrained(name, **options)
        towers[modality] = (name, encoder)
    check_bases(folder, reference["bases"], describe_bases(base.name, base.files, towers))
    sizes = language_sizes(base.model)
    made = {
        m: join(encoder, config.towers[m], sizes, trust_remote_code).to(dtype) for m, (_, encoder) in towers.items()
    }
    model = OpticNerveForConditionalGeneration.from_parts(
        base.model, made, image_token_id=config.image_token_id, audio_token_id=config.audio_token_id
    )
    if reference["lora"]:
        model.give_lora(reference["lora"])
    put(model, folder, reference["tensors"])
    model.config._name_or_path = str(folder)
    return model.eval()


def check_bases(folder: Path, wanted: dict[str, Any], found: dict[str, Any]) -> None:
    """Refuse other weights than those that the dock was trained on."""
    for part, base in wanted.items():
        there = found.get(part, {}).get("sha256")
        if base["sha256"] and there and base["sha256"] != there:
            raise OpticNerveError(
                f"{folder} was trained on other weights of {part} ({base['name']}): SHA-256 {base['sha256'][:16]}…, "
                f"found {there[:16]}…; give it the base it was trained on"
            )


def put(model: OpticNerveForConditionalGeneration, folder: Path, expected: dict[str, list[int]]) -> None:
    """Copy the trained tensors into the model; missing, unexpected and mismatched ones are an error that lists them."""
    state = model.state_dict()
    try:
        with safe_open(folder / TENSORS, framework="pt") as file:
            names = set(file.keys())
            problems = [f"missing {n}" for n in expected if n not in names]
            problems += [f"not listed in {REFERENCE}: {n}" for n in names if n not in expected]
            problems += [f"no place for {n}" for n in names if n not in state]
            for name in sorted(names & set(state)):
                tensor = file.get_tensor(name)
                if tensor.shape != state[name].shape:
                    problems.append(f"{name} is {tuple(tensor.shape)}, the model wants {tuple(state[name].shape)}")
                else:
                    state[name].copy_(tensor)
    except (OSError, SafetensorError) as e:
        raise OpticNerveError(f"{folder / TENSORS} is not a readable safetensors file: {e}") from e
    lacking = [n for n in state if is_docked(n) and n not in names]
    problems += [f"missing {n}" for n in lacking]
    if problems:
        raise OpticNerveError(f"{folder} does not fit its own base: {'; '.join(problems[:12])}")
