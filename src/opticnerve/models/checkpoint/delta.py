"""What was trained, and exact references to what was not.

A run keeps the tensors that differ from the base models (connector, LoRA, opened blocks), and names the bases with the
SHA-256 of their files. Loading builds the bases again and refuses others. `opticnerve merge` makes a folder of its own.

    config.json          the whole model's configuration
    generation_config.json  which tokens end an answer
    dock.json            bases and their hashes, what it went on from, LoRA options, the list of trained tensors and the
                         hash of their file, format and library versions
    trained.safetensors  the trained tensors under their full names
    README.md            how it is loaded, where none was
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Protocol

import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from opticnerve import registry
from opticnerve.common import atomic
from opticnerve.common.cache import fingerprint
from opticnerve.common.shards import copy_into
from opticnerve.common.tensors import save_tensors
from opticnerve.common.version import __version__
from opticnerve.language.adapters import current_name
from opticnerve.language.layers import decoder_layers
from opticnerve.language.load import load_language
from opticnerve.language.lora import take_start_out
from opticnerve.language.quantization import quantize
from opticnerve.models.checkpoint.options import LoadOptions, floating
from opticnerve.models.checkpoint.readme import introduce
from opticnerve.models.checkpoint.source import ModelSource
from opticnerve.models.checkpoint.strict import no_larger_than, shapes, wrap_errors
from opticnerve.models.vlm.configuration import FORMAT, QUANTIZED_FORMAT, OpticNerveConfig, check_format
from opticnerve.models.vlm.parts import is_docked, moving_buffers
from opticnerve.models.vlm.tower import join, language_sizes
from opticnerve.recipe import Quantize
from opticnerve.types import OpticNerveError

REFERENCE, TENSORS = "dock.json", "trained.safetensors"
WHOLE = "model"  # among bases: a dock as a whole, in place of its parts
Name = str | dict[str, Any] | None  # of an encoder's weights: several where encoders stand side by side
_log = logging.getLogger(__name__)


class HasFiles(Protocol):
    def weight_files(self) -> list[str]: ...


class _Base(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str | dict[str, Any] | None
    sha256: str | None
    quantize: Quantize | None = None


class _Language(_Base):
    name: str
    gguf_file: str | None = None


class _Reference(BaseModel):
    """What loading needs of dock.json."""

    model_config = ConfigDict(strict=True)

    bases: dict[str, _Base]
    lora: dict[str, Any] | None
    tensors: dict[str, list[Annotated[int, Field(ge=0, lt=2**48)]]]
    dtype: Literal["float32", "bfloat16", "float16", "float64"]
    sha256: str | None = None


def find(name: str | Path) -> Path | None:
    """The folder of a delta, or None where `name` is something else (a self-contained folder, a hub name).

    Raises:
        OpticNerveError: trained tensors are there, and the file that names their bases is not.
    """
    folder = Path(str(name))
    if (folder / REFERENCE).is_file():
        return folder
    if (folder / TENSORS).is_file():
        raise OpticNerveError(
            f"{folder} holds what was trained ({TENSORS}), but no {REFERENCE}, which names the base models; copy it "
            "from the run that wrote the folder",
            kind="missing-file",
        )
    return None


def describe_bases(
    language_name: str, language_files: Iterable[str], towers: dict[str, Any], *, gguf_file: str | None = None,
    quantized: Mapping[str, Quantize] = MappingProxyType({}),
) -> dict[str, Any]:  # fmt: skip
    """The references: `language` and, per modality, `encoder`: how each is called, the hash of its weight files, and
    how it is quantised, if it is: such weights are made again of those files."""
    bases = {"language": _base(language_name, list(language_files))}
    if gguf_file is not None:
        bases["language"]["gguf_file"] = gguf_file
    bases |= {modality: base_of(name, encoder) for modality, (name, encoder) in towers.items()}
    return {p: base | ({"quantize": quantized[p]} if p in quantized else {}) for p, base in bases.items()}


def quantize_part(module: nn.Module, part: str, quantized: Mapping[str, Quantize]) -> None:
    """Quantise the layers of a language model's decoder, or of the encoder of a modality, if that is asked for."""
    if kind := quantized.get(part):
        within = f"{decoder_layers(module)[0]}." if part == "language" else ""
        quantize(module, kind, part, within)


def base_of(name: Name, encoder: HasFiles) -> dict[str, Any]:
    """How an encoder's weights are called, and the hash of their files."""
    return _base(name, encoder.weight_files())


def _base(name: Name, files: list[str]) -> dict[str, Any]:
    return {"name": name, "sha256": fingerprint(files) if files else None}


def encoder_name(name: Name, kind: str) -> str:
    """How reports call an encoder: by its weights' name, or names, or by its type where it has none."""
    if isinstance(name, dict):
        return " + ".join(encoder_name(n, kind) for n in name.values())
    return str(name) if name is not None else kind


def weight_names(name: Name) -> list[str]:
    """The names of an encoder's weights: one, none, or several where encoders stand side by side."""
    if isinstance(name, dict):
        return [n for inner in name.values() for n in weight_names(inner)]
    return [] if name is None else [str(name)]


def versions() -> dict[str, str]:
    """What wrote a folder."""
    return {"opticnerve": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def save(
    model: Any, folder: Path, *, bases: dict[str, Any], lora: dict[str, Any] | None, trained: Iterable[str],
    origins: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write config.json, dock.json and trained.safetensors.

    Args:
        origins: what the model, or a part of it, went on from: names and hashes.
        trained: full names of all parameters that any stage so far has trained; the buffers that move with them
            and all that docking added (connectors, fusions) go along.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    trained = {now_called(name, state) for name in trained}
    names = sorted({*trained, *moving_buffers(model, trained), *filter(is_docked, state)})
    chosen = {n: state[n] for n in names}
    introduce(folder, model.config)
    model.config.save_pretrained(folder)
    model.generation_config.to_json_file(folder / GENERATION_CONFIG_NAME)
    save_tensors(chosen, folder / TENSORS)
    reference = {
        "format": QUANTIZED_FORMAT if any(base.get("quantize") for base in bases.values()) else FORMAT,
        **versions(),
        "bases": bases,
        **({"from": origins} if origins else {}),
        "lora": lora,
        "dtype": str(model.language_model.dtype).removeprefix("torch."),
        "sha256": atomic.sha256(folder / TENSORS),
        "tensors": {n: list(t.shape) for n, t in chosen.items()},
    }
    atomic.write_json(folder / REFERENCE, reference)


def now_called(name: str, state: Mapping[str, Any]) -> str:
    """A tensor that was trained before its layer got an adapter has another name since."""
    owner, _, leaf = name.rpartition(".")
    wrapped = f"{owner}.base_layer.{leaf}"
    return wrapped if name not in state and wrapped in state else name


def read(folder: Path) -> dict[str, Any]:
    """dock.json, checked for what loading needs.

    Raises:
        OpticNerveError: it is damaged, or of a format newer than this opticnerve knows.
    """
    place = folder / REFERENCE
    try:
        reference: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        if isinstance(reference, dict):
            check_format(reference.get("format", 1), str(place))
        _Reference.model_validate(reference)
        bases = reference["bases"]
        _Language.model_validate(bases[WHOLE] if WHOLE in bases else bases["language"])
    except (OSError, KeyError, ValueError, RecursionError) as e:
        if isinstance(e, OpticNerveError):
            raise
        raise OpticNerveError(
            f"{place} is not a dock's reference file: {str(e)[:200] or type(e).__name__}", kind="damaged"
        ) from e
    return {**reference, "tensors": {current_name(n): shape for n, shape in reference["tensors"].items()}}


def load(
    cls: type[Any],
    folder: Path,
    *,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool | None = False,
    **options: Any,
) -> Any:
    """A model of `cls`: build the bases, check their hashes, put in what was trained; every tensor is accounted for.

    `options`: the other keywords of `from_pretrained`, see `checkpoint.options`.

    Raises:
        OpticNerveError: a file is damaged or of a newer format, a base is not the one that was trained on, the
            tensors are not those that dock.json lists and the model wants, or an option asks for what cannot be done.
    """
    dtype, trust_remote_code = floating(options, dtype), bool(trust_remote_code)
    chosen = LoadOptions.of(folder, options)
    reference = read(folder)
    if dtype in (None, "auto"):
        dtype = reference["dtype"]
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    with wrap_errors("config.json", folder):
        config = OpticNerveConfig.from_pretrained(folder)
    chosen.agree(folder, config)
    build = _whole if WHOLE in reference["bases"] else _joined
    model = build(cls, folder, reference, config, dtype, trust_remote_code, chosen)
    put(model, folder, reference["tensors"], sha256=reference.get("sha256"))
    take_start_out(model, without=reference["tensors"])
    if (folder / GENERATION_CONFIG_NAME).is_file():  # older folders have none
        with wrap_errors(GENERATION_CONFIG_NAME, folder):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config.name_or_path = model.name_or_path = str(folder)  # peft notes the second on adapters
    chosen.apply(model)
    return chosen.result(model.eval())


def _whole(
    cls: type[Any], folder: Path, reference: dict[str, Any], config: OpticNerveConfig, dtype: torch.dtype,
    trusted: bool, chosen: LoadOptions,
) -> Any:  # fmt: skip
    """The dock that the run went on from, with the adapter that the run gave it."""
    if chosen.quantization_config is not None:
        raise OpticNerveError(
            f"{folder} went on from another model, which is loaded as it was; leave quantization_config out, or merge",
            kind="unsupported",
        )
    named = reference["bases"][WHOLE]
    with wrap_errors(f"the model {named['name']!r}", folder):
        source = ModelSource.find(named["name"])
        check_bases(folder, reference["bases"], {WHOLE: {"sha256": source.sha256()}})
        model = source.load(cls, dtype=dtype, trust_remote_code=trusted)
    give_adapters(model, config, reference["lora"])
    return model


def give_adapters(model: Any, config: OpticNerveConfig, lora: dict[str, Any] | None) -> None:
    """Adapters that are still empty, where a folder has some and the model none. `lora`: the language model's, as
    dock.json has it; those of towers are in `config`."""
    wanted = {part: options for part, options in config.adapters.items() if part != "language"}
    for part, options in {**({"language": lora} if lora else {}), **wanted}.items():
        if part not in model.adapted:
            model.give_lora(options, part, fresh=False)


def _joined(
    cls: type[Any], folder: Path, reference: dict[str, Any], config: OpticNerveConfig, dtype: torch.dtype,
    trusted: bool, chosen: LoadOptions,
) -> Any:  # fmt: skip
    """The dock built of its language model and its encoders, with connectors and adapters that are still empty."""
    towers_differ(folder, set(config.towers), set(reference["bases"]) - {"language"})
    named = reference["bases"]["language"]
    quantized = chosen.quantized({p: b["quantize"] for p, b in reference["bases"].items() if b.get("quantize")})
    with wrap_errors(f"the language model {named['name']!r}", folder):
        base = load_language(named["name"], dtype=dtype, gguf_file=named.get("gguf_file"))
        quantize_part(base.model, "language", quantized)
    towers = {}
    for modality, spec in config.towers.items():
        name = reference["bases"][modality]["name"]
        with wrap_errors(f"the {modality} encoder {name}", folder):
            part = registry.encoders.get(spec["encoder"]["type"], allow_dotted=trusted)
            options = part.loading_options({k: v for k, v in spec["encoder"].items() if k != "type"})
            towers[modality] = (name, part.from_pretrained(name, **options))
    check_bases(folder, reference["bases"], describe_bases(base.name, base.files, towers))
    sizes = language_sizes(base.model)
    trained = reference["tensors"].values()
    with wrap_errors("the docked model", folder), no_larger_than(str(folder), len(trained), sum(map(prod, trained))):
        made = {m: join(encoder, config.towers[m], sizes, trusted).to(dtype) for m, (_, encoder) in towers.items()}
        for modality, tower in made.items():
            quantize_part(tower.encoder, modality, quantized)
        model = cls.from_parts(
            base.model, made, image_token_id=config.image_token_id, audio_token_id=config.audio_token_id
        )
        give_adapters(model, config, reference["lora"])
    return model


def towers_differ(folder: Path, described: set[str], named: set[str]) -> None:
    """Refuse a folder whose two files speak of different towers."""
    if described != named:
        raise OpticNerveError(
            f"{folder}: config.json describes the towers {', '.join(sorted(described)) or 'none'}, {REFERENCE} names "
            f"bases for {', '.join(sorted(named)) or 'none'}; the two files do not belong together",
            kind="mismatch",
        )


def check_bases(folder: Path, wanted: dict[str, Any], found: dict[str, Any]) -> None:
    """Refuse other weights than those that the dock was trained on, and weights of which nobody can tell.

    A base whose files had no hash when the dock was saved (weights that no file on this machine held) stays unverified,
    and the log says so each time.
    """
    for part, base in wanted.items():
        there, name, hashed = found.get(part, {}).get("sha256"), base["name"], base["sha256"]
        if hashed is None:
            if name is not None:
                _log.warning("%s: the weights of %s (%s) cannot be verified, for no hash of them was recorded",
                             folder, part, name)  # fmt: skip
        elif there is None:
            raise OpticNerveError(
                f"{folder} was trained on weights of {part} ({name}) with the SHA-256 {hashed[:16]}…, and no weight "
                f"file of that name was found here to compare with; name the folder or file that holds them in "
                f"{REFERENCE}",
                kind="mismatch",
            )
        elif hashed != there:
            raise OpticNerveError(
                f"{folder} was trained on other weights of {part} ({name}): SHA-256 {hashed[:16]}…, found "
                f"{there[:16]}…; give it the base it was trained on",
                kind="mismatch",
            )


def put(model: nn.Module, folder: Path, expected: dict[str, list[int]], *, sha256: str | None = None) -> None:
    """Copy the trained tensors into the model; missing, unexpected and mismatched ones are an error that lists them.

    Args:
        expected: name → shape of what the folder holds, by its dock.json. sha256: of its file, where that is recorded.
    """
    file, state = folder / TENSORS, model.state_dict()
    found = shapes(file)
    names = {current_name(n): n for n in found}
    held = {n: found[old] for n, old in names.items()}
    problems = [f"missing {n}" for n in expected if n not in held]
    problems += [f"not listed in {REFERENCE}: {n}" for n in held if n not in expected]
    problems += [f"no place for {n}" for n in held if n not in state]
    for name, shape in held.items():
        if name in state and shape != list(state[name].shape):
            problems.append(f"{name} is {_shape_text(shape)}, the model wants {_shape_text(state[name].shape)}")
        elif name in expected and shape != expected[name]:
            problems.append(f"{name} is {_shape_text(shape)}, {REFERENCE} says {_shape_text(expected[name])}")
    problems += [f"missing {n}" for n in state if is_docked(n) and n not in held and n not in expected]
    _refuse(folder, problems)
    if sha256 is not None and (hashed := atomic.sha256(file)) != sha256:
        raise OpticNerveError(
            f"{file} was changed or damaged after it was written: SHA-256 {hashed[:16]}…, {REFERENCE} says "
            f"{sha256[:16]}…; bring it back from a copy",
            kind="damaged",
        )
    try:
        with safe_open(file, framework="pt") as opened:
            for name in held:
                tensor = opened.get_tensor(names[name])
                if tensor.is_floating_point() != state[name].is_floating_point():
                    problems.append(f"{name} holds {tensor.dtype}, the model wants {state[name].dtype}")
                else:
                    copy_into(state[name], tensor)
    except (OSError, SafetensorError) as e:
        raise OpticNerveError(f"{file} is not a readable safetensors file: {str(e)[:200]}", kind="damaged") from e
    _refuse(folder, problems)


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise OpticNerveError(
            f"{folder} does not fit its own base: {'; '.join(p[:300] for p in problems[:12])}{more}", kind="mismatch"
        )


def _shape_text(shape: Iterable[int]) -> str:
    return str(tuple(shape))[:200]
