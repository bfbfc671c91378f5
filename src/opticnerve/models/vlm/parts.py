"""The parts of a docked model by the words a stage uses: `connector`, `encoder.last(2)`, `language.lora`, …"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from opticnerve.encoders.base import last_blocks
from opticnerve.language.adapters import is_adapter
from opticnerve.language.layers import decoder_layers
from opticnerve.models.adapted import AdaptedParts, adapter_of
from opticnerve.recipe import MODALITIES, split_part
from opticnerve.types import OpticNerveError

# What each word for a part of a tower stands for, as beginnings of names within it.
TOWER_PARTS = {"encoder": ("encoder.",), "connector": ("connector.", "tiling."), "fusion": ("fusion.",)}
ADAPTED_HALVES = ("encoder", "fusion")  # which of them may hold an adapter


class DockedParts(AdaptedParts):
    """What `models.family.FamilyModel` asks of a model about its parts, for a language model with `towers`."""

    towers: Any
    language_model: Any

    @property
    def device(self: Any) -> torch.device:
        """Where inputs go. (transformers asks the first weight, which is on `meta` while it is offloaded.)"""
        device: torch.device = next((p.device for p in self.parameters()), torch.device("cpu"))
        if device.type != "meta" or not hasattr(self, "hf_device_map"):
            return device
        places = [place for place in self.hf_device_map.values() if place not in ("cpu", "disk")]
        return torch.device(places[0] if places else "cpu")

    def adaptable(self) -> list[str]:
        """The parts that may hold an adapter."""
        return ["language", *(f"{m}.{half}" for m in self.towers for half in ADAPTED_HALVES)]

    def part_module(self, part: str) -> nn.Module:
        """`language`, `image.encoder`, `image.fusion`, …: the module that an adapter of this part stands in."""
        modality, _, half = part.partition(".")
        found: nn.Module = getattr(self.towers[modality], half) if half else self.language_model
        return found

    def run_encoder(self, part: str) -> object:
        """Send nothing, as media, through a tower's encoder."""
        tower = self.towers[part.partition(".")[0]]
        return tower.encode(*tower.dummy_media())

    def part_parameters(self: Any, part: str) -> dict[str, nn.Parameter]:
        """Full name → parameter of one part. Tied weights appear once.

        Raises:
            OpticNerveError: the model has no such part, or the part has no parameters; the message names the remedy.
        """
        modality, inner = split_part(part)
        found = _language(self, inner) if inner.startswith("language") else _tower(self, modality, inner, part)
        if not found:
            raise OpticNerveError(f"{part} has no parameters in this model", kind="empty")
        return found

    def full_name(self, part: str) -> str:
        """`connector` → `image.connector`: the word for a part that is clear without its recipe."""
        modality, inner = split_part(part)
        return inner if inner.startswith("language") else f"{modality or _only_tower(self, part)}.{inner}"

    def whole_parts(self) -> list[tuple[str, tuple[str, ...]]]:
        """What the freeze table sums up: each label, and the beginnings of the names under it."""
        towers = [(f"{m}.{half}", prefixes(m, half)) for m in self.towers for half in TOWER_PARTS]
        return [*towers, ("language", ("language_model.",))]


def moving_buffers(model: nn.Module, trained: Iterable[str]) -> list[str]:
    """Full names of the persistent buffers that training moves: the connectors' calibration, and what stands beside a
    trained parameter (a batch norm's statistics)."""
    owners = {name.rpartition(".")[0] for name in trained}
    kept = model.state_dict().keys()
    return [
        name
        for name, _ in model.named_buffers()
        if name in kept and (".connector." in name or name.rpartition(".")[0] in owners)
    ]


def prefixes(modality: str, half: str) -> tuple[str, ...]:
    """Beginnings of the full names of what belongs to one half of a tower: `image.connector.`, …"""
    return tuple(f"{modality}.{start}" for start in TOWER_PARTS[half])


def is_docked(name: str) -> bool:
    """Whether a tensor of the model belongs to what docking added: a connector, a tiling, a fusion."""
    return name.startswith(tuple(s for m in MODALITIES for half in ("connector", "fusion") for s in prefixes(m, half)))


def _only_tower(model: DockedParts, part: str) -> str:
    have = list(model.towers)
    if len(have) != 1:
        raise OpticNerveError(
            f"{part}: the model's towers are {', '.join(have) or 'none'}; write e.g. image.{part}", kind="unknown-name"
        )
    return str(have[0])


def _tower(model: Any, modality: str | None, inner: str, part: str) -> dict[str, nn.Parameter]:
    modality = modality or _only_tower(model, part)
    if modality not in model.towers:
        raise OpticNerveError(f"{part}: the model has no {modality} tower", kind="unknown-name")
    half = inner.removesuffix(".lora")
    names = {n: p for n, p in model.named_parameters() if n.startswith(f"{modality}.")}
    if half != inner:
        return adapter_of(names, prefixes(modality, half), f"{modality}.{half}")
    names = {n: p for n, p in names.items() if not is_adapter(n)}
    if inner in TOWER_PARTS:
        found = {n: p for n, p in names.items() if n.startswith(prefixes(modality, inner))}
        if not found and inner == "fusion":
            raise OpticNerveError(
                f"{part}: a fusion of this type has no weights; leave it out of `train`", kind="empty"
            )
        return found
    count = int(re.findall(r"\d+", inner)[0])
    chosen = {id(p) for block in last_blocks(model.towers[modality].encoder, count) for p in block.parameters()}
    return {n: p for n, p in names.items() if id(p) in chosen}


def _language(model: Any, inner: str) -> dict[str, nn.Parameter]:
    names = {n: p for n, p in model.named_parameters() if n.startswith("language_model.")}
    if inner == "language.lora":
        return adapter_of(names, ("language_model.",), "language")
    names = {n: p for n, p in names.items() if not is_adapter(n)}
    if inner == "language":
        return names
    if inner == "language.embeddings":
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        chosen = {id(p) for end in ends if end is not None for p in end.parameters()}
    else:
        blocks = decoder_layers(model.language_model)[1]
        count = int(re.findall(r"\d+", inner)[0])
        if not 0 < count <= len(blocks):
            raise OpticNerveError(
                f"{inner}: the language model has {len(blocks)} layers; ask for 1 to {len(blocks)}", kind="out-of-range"
            )
        chosen = {id(p) for block in blocks[-count:] for p in block.parameters()}
    return {n: p for n, p in names.items() if id(p) in chosen}
