"""Going on from what exists: a whole docked model (`model: {from: …}`), or a connector (`connector: {from: …}`)."""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from opticnerve.common.cache import fingerprint, weight_files
from opticnerve.connectors.base import Connector
from opticnerve.connectors.mlp import LinearConnector
from opticnerve.models.checkpoint import delta
from opticnerve.models.checkpoint.source import ModelSource, check_pinned
from opticnerve.models.checkpoint.strict import wrap_errors
from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
from opticnerve.models.vlm.processing import OpticNerveProcessor, stops
from opticnerve.recipe import FROM, ContinuedSpec, ModelSpec, PartSpec, Recipe, Stage
from opticnerve.recipe.model import check_tower, no_cache
from opticnerve.types import OpticNerveError

_log = logging.getLogger(__name__)


@dataclass
class Continued:
    """A docked model as it was found: what `build.Dock` is made of."""

    model: OpticNerveForConditionalGeneration
    processor: OpticNerveProcessor
    bases: dict[str, Any]
    lora: dict[str, Any] | None
    inherited: set[str]
    origins: dict[str, Any]


def continue_from(spec: ContinuedSpec, stages: Sequence[Stage], *, dtype: torch.dtype) -> Continued:
    """The model that a recipe goes on from, in the recipe's precision; connectors are calibrated no more.

    A run's folder says what its bases are, and what it trained goes into the new run's folder. Any other folder is
    itself the base.

    Raises:
        OpticNerveError: it is not there, or no docked model, or not the one that the run began with; or a stage trains
            what it does not have.
    """
    source = ModelSource.find(spec.source)
    check_stages(source, stages)
    origin = {"name": spec.source, "sha256": source.sha256(spec.sha256)}
    model = source.load(OpticNerveForConditionalGeneration, dtype=dtype)
    processor = load_processor(source)
    model.generation_config.update(**stops(model.generation_config, processor))
    for tower in model.towers.values():
        tower.connector.calibrated.fill_(True)  # measuring again would change what was learned
    bases, inherited = {delta.WHOLE: origin}, set()
    if source.adapter is None and delta.find(source.folder) is not None:
        reference = delta.read(Path(source.folder))
        named = {n for n, _ in model.named_parameters()}
        bases, inherited = reference["bases"], {n for n in reference["tensors"] if n in named}
    return Continued(model, processor, bases, model.config.lora, inherited, {"model": origin})


def check_stages(source: ModelSource, stages: Sequence[Stage]) -> None:
    """See that the stages ask for nothing that the model does not have, before its weights are read."""
    towers = source.config.towers
    for stage in stages:
        for part in stage.train:
            try:
                check_tower(part, list(towers))
            except ValueError as e:
                raise OpticNerveError(f"stage {stage.name}: {part}: {e} ({source.name})", kind="unknown-name") from None
        tiled = bool(towers.get("image", {}).get("tiling"))
        if stage.cache_features and (reason := no_cache("image" in towers, tiled)):
            raise OpticNerveError(f"stage {stage.name}: cache_features: {reason}; leave it out", kind="unsupported")


def load_processor(source: ModelSource) -> OpticNerveProcessor:
    """The processor beside a model.

    Raises:
        OpticNerveError: there is none, or it is damaged.
    """
    if not (Path(source.folder) / "processor_config.json").is_file():
        raise OpticNerveError(
            f"{source.folder} holds a model without its processor; save it there, too (processor.save_pretrained)",
            kind="missing-file",
        )
    with wrap_errors("the processor", source.folder):
        found: OpticNerveProcessor = OpticNerveProcessor.from_pretrained(source.folder)
    return found


def planned(spec: ContinuedSpec, *, dtype: torch.dtype) -> tuple[ModelSource, OpticNerveForConditionalGeneration]:
    """The same model on the meta device; no weight is read."""
    source = ModelSource.find(spec.source, weights=False)
    config = source.config
    with wrap_errors("the model", source.folder), torch.device("meta"):
        model = OpticNerveForConditionalGeneration(config)
        nn.Module.to(model, dtype)
    model.eval()  # type: ignore[no-untyped-call]
    return source, model


# -- a connector alone ------------------------------------------------------------------------------------------------

# As LLaVA's code saves a connector: mm_projector.0.weight, mm_projector.2.weight, …; of one matrix mm_projector.weight.
_GLANCE = ("model_type", "hidden_size", "num_hidden_layers", "patch_size", "image_size")
_LLAVA = re.compile(r"(?:.*\.)?mm_projector\.(?:(\d+)\.)?(weight|bias)")


@dataclass(frozen=True)
class TrainedConnector:
    """A connector that was trained before: how it is built (`type` and options), its tensors, and where it is from.

    `behind`: what stood before it, an encoder's entry in a configuration, as far as that is known.
    """

    spec: dict[str, Any]
    tensors: dict[str, Tensor]
    origin: dict[str, str]
    behind: dict[str, Any] | None = None

    def put(self, connector: Connector, encoder: Mapping[str, Any]) -> None:
        """Fill a fresh connector of the same kind.

        Raises:
            OpticNerveError: it is of other widths; the message has both.
        """
        state, name = connector.state_dict(), self.origin["name"]
        odd = [f"{n} is {tuple(t.shape)} there, {tuple(state[n].shape)} here" for n, t in self.tensors.items()
               if n in state and t.shape != state[n].shape]  # fmt: skip
        odd += [f"{n} is there alone" for n in self.tensors.keys() - state.keys()]
        odd += [f"{n} is here alone" for n in state.keys() - self.tensors.keys()]
        if odd:
            raise OpticNerveError(
                f"the connector ({self.spec['type']}) of {name} does not fit between these parts, where it has to lead "
                f"from width {connector.in_size} to {connector.out_size}: {'; '.join(sorted(odd)[:8])}",
                kind="wrong-shape",
            )
        if self.behind is not None and (differs := _differing(self.behind, encoder)):
            _log.warning("the connector of %s was trained behind another encoder: %s", name, "; ".join(differs))
        connector.load_state_dict(self.tensors)
        connector.calibrated.fill_(True)


def take_connector(modality: str, spec: PartSpec, *, weights: bool = True) -> TrainedConnector | None:
    """What `connector: {from: …}` names; None where it names nothing.

    Args:
        weights: read its tensors, too.

    Raises:
        OpticNerveError: there is no such connector, it is another one than the run began with, or the recipe says of it
            what is not so.
    """
    given = spec.options
    if (name := given.pop(FROM, None)) is None:
        return None
    pinned = given.pop("sha256", None)
    read = _of_file if Path(name).is_file() else _of_model
    found = read(name, modality, pinned, weights)
    said = given if spec.type == FROM else {"type": spec.type, **given}
    if wrong := [f"{k}: {v!r} here, {found.spec.get(k)!r} there" for k, v in said.items() if found.spec.get(k) != v]:
        raise OpticNerveError(
            f"model.{modality}.connector: from {name} is of another kind: {'; '.join(wrong)}; leave out what its own "
            "folder says",
            kind="conflict",
        )
    return found


def _of_model(name: str, modality: str, pinned: str | None, weights: bool) -> TrainedConnector:
    source = ModelSource.find(name, weights=weights)
    if source.adapter is not None:
        raise OpticNerveError(
            f"connector: from {name} is peft's adapter; name the model that it stands on, {source.folder}",
            kind="unsupported",
        )
    towers = source.config.towers
    if modality not in towers:
        raise OpticNerveError(
            f"model.{modality}.connector: {name} has no {modality} tower; it has {', '.join(towers)}", kind="mismatch"
        )
    tensors: dict[str, Tensor] = {}
    start = f"{modality}.connector."
    for file in weight_files(Path(source.folder)) if weights else ():
        tensors |= {n.removeprefix(start): t for n, t in _tensors(Path(file)).items() if n.startswith(start)}
    origin = {"name": name, "sha256": source.sha256(pinned) if weights else ""}
    return TrainedConnector(dict(towers[modality]["connector"]), tensors, origin, towers[modality]["encoder"])


def _of_file(name: str, modality: str, pinned: str | None, weights: bool) -> TrainedConnector:
    """LLaVA's `mm_projector`, as safetensors or as the pickle that its code writes, of which only tensors are read."""
    found: dict[tuple[int | None, str], Tensor] = {}
    for key, tensor in _tensors(Path(name)).items():
        match = _LLAVA.fullmatch(key)
        if match is None:
            raise OpticNerveError(f"{name} is no mm_projector of LLaVA's: it holds {key[:80]}", kind="unsupported")
        found[int(match[1]) if match[1] else None, match[2]] = tensor.float()
    numbers = sorted({n for n, _ in found if n is not None})
    bias = any(kind == "bias" for _, kind in found)
    layers: list[int | None] = [*numbers] or [None]
    shapes = [tuple(found[n, "weight"].shape) for n in layers if (n, "weight") in found]
    whole = len(shapes) == len(layers) and all(len(shape) == 2 for shape in shapes)
    if not whole or numbers != list(range(0, 2 * len(numbers), 2)) or (numbers and (None, "weight") in found):
        raise OpticNerveError(
            f"{name} is no mm_projector of LLaVA's: it has the layers {numbers} and matrices of {shapes}",
            kind="unsupported",
        )
    options: dict[str, Any] = {"bias": bias, "calibrate": False}
    spec = {"type": "mlp", "depth": len(numbers), "activation": "gelu"} if numbers else {"type": "linear"}
    made = {f"layers.{n}.{kind}" if numbers else f"linear.{kind}": t for (n, kind), t in found.items()}
    made |= dict(LinearConnector(in_size=shapes[0][1], out_size=shapes[-1][0], in_tokens=1).named_buffers())
    return TrainedConnector(
        {**spec, **options}, made, {"name": name, "sha256": check_pinned(name, fingerprint([name]), pinned)}
    )


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (
        OSError, SafetensorError, RuntimeError, EOFError, LookupError, TypeError, ValueError, pickle.UnpicklingError
    ) as e:  # fmt: skip
        raise OpticNerveError(f"{file} cannot be read: {str(e)[:200]}", kind="damaged") from e
    if not isinstance(loaded, dict) or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in loaded.items()):
        raise OpticNerveError(f"{file} holds something else than tensors by name", kind="unsupported")
    return loaded


def _differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Where two entries of an encoder differ, by key; of its architecture a glance."""
    one, other = (
        {**part, "architecture": {k: dict(part.get("architecture") or {}).get(k) for k in _GLANCE}}
        for part in (there, here)
    )
    keys = sorted(k for k in one.keys() | other.keys() if json.dumps(one.get(k)) != json.dumps(other.get(k)))
    return [f"{k} {str(one.get(k))[:80]} there, {str(other.get(k))[:80]} here" for k in keys]


# -- what a run began with --------------------------------------------------------------------------------------------


def pinned(recipe: Recipe) -> Recipe:
    """The recipe with the hashes of what it goes on from, unless it names them."""
    model = recipe.model
    if isinstance(model, ContinuedSpec) and model.sha256 is None:
        return recipe.model_copy(
            update={"model": model.model_copy(update={"sha256": ModelSource.find(model.source).sha256()})}
        )
    if not isinstance(model, ModelSpec):
        return recipe
    changes = {}
    for modality, tower in model.towers.items():
        found = take_connector(modality, tower.connector)
        if found is not None:
            again = PartSpec(**{**tower.connector.model_dump(), "sha256": found.origin["sha256"]})
            changes[modality] = tower.model_copy(update={"connector": again})
    return recipe.model_copy(update={"model": model.model_copy(update=changes)}) if changes else recipe


def pinned_as(recipe: Recipe, kept: Recipe) -> Recipe:
    """The recipe with the hashes of a kept one, where both go on from the same and it names none itself."""
    raw, old = recipe.model_dump(mode="json"), kept.model_dump(mode="json")
    pairs = [(raw["model"], old["model"])]
    for modality in ("image", "audio"):
        pairs.append(tuple((r["model"].get(modality) or {}).get("connector") or {} for r in (raw, old)))  # type: ignore[arg-type]
    changed = False
    for mine, theirs in pairs:
        if mine.get(FROM) and mine[FROM] == theirs.get(FROM) and not mine.get("sha256"):
            mine["sha256"], changed = theirs.get("sha256"), True
    return Recipe.model_validate(raw, context={"without_data": True}) if changed else recipe
