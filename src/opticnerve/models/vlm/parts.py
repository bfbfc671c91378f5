"""The parts of a docked model by the words a stage uses: `connector`, `encoder.last(2)`, `language.lora`, …"""

from __future__ import annotations

import re
from collections.abc import Iterable
from os import PathLike
from typing import Any

import torch
from torch import nn

from opticnerve.common.private_names import saves_adapters_alone
from opticnerve.encoders.base import last_blocks
from opticnerve.language.adapters import beside, has_others, is_adapter, without_others
from opticnerve.language.layers import decoder_layers
from opticnerve.language.lora import add_lora, check_called, has_lora, is_lora
from opticnerve.language.quantization import dequantized_state, quantized_layers
from opticnerve.recipe import MODALITIES, split_part
from opticnerve.types import OpticNerveError

# What each word for a part of a tower stands for, as beginnings of names within it.
TOWER_PARTS = {"encoder": ("encoder.",), "connector": ("connector.", "tiling."), "fusion": ("fusion.",)}
ADAPTED_HALVES = ("encoder", "fusion")  # which of them may hold an adapter


class DockedParts:
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

    def part_module(self: Any, part: str) -> nn.Module:
        """`language`, `image.encoder`, `image.fusion`, …: the module that an adapter of this part stands in."""
        modality, _, half = part.partition(".")
        found: nn.Module = getattr(self.towers[modality], half) if half else self.language_model
        return found

    @property
    def adapted(self: Any) -> dict[str, nn.Module]:
        """The parts that hold an adapter of ours."""
        parts = ["language", *(f"{m}.{half}" for m in self.towers for half in ADAPTED_HALVES)]
        return {part: module for part in parts if has_lora(module := self.part_module(part))}

    @property
    def adapters(self: Any) -> dict[str, dict[str, Any]]:
        """Options of our adapters, by the part that they stand in."""
        found: dict[str, dict[str, Any]] = self.config.adapters
        return found

    def give_lora(self: Any, options: dict[str, Any], part: str = "language", *, fresh: bool = True) -> None:
        """Put an adapter on a part; the configuration remembers it. (`options`, `fresh`: as for `add_lora`.)

        Raises:
            OpticNerveError: as `add_lora`; or it is to step aside on text, which reaches the language model alone.
        """
        module, where = self.part_module(part), dict[str, Any]()
        if part != "language":
            if options.get("when", "always") != "always":
                raise OpticNerveError(
                    f"{part}.lora: when: media is for language.lora; text alone reaches no {part}", kind="conflict"
                )
            where = {"what": part, "blocks": module.blocks() if part.endswith(".encoder") else [module]}
        add_lora(module, options, fresh=fresh, **where)
        if fresh and part.endswith(".encoder") and not any(p.is_meta for p in module.parameters()):
            tower = self.towers[part.partition(".")[0]]
            check_called(module, lambda: tower.encode(*tower.dummy_media()), part)
        self.config.note_adapter(part, options)

    def _forget_adapters(self: Any) -> None:
        """The configuration claims no adapter that is gone (peft may have merged ours)."""
        for part in self.adapters.keys() - self.adapted.keys():
            self.config.note_adapter(part, None)

    @property
    def peft_config(self) -> dict[str, Any]:
        """What peft notes on a model: the adapters that others put on it, and ours beside them."""
        try:
            found: dict[str, Any] = vars(self)["_peft_config"]
        except KeyError:
            raise AttributeError("peft_config") from None
        return found

    @peft_config.setter
    def peft_config(self: Any, adapters: dict[str, Any]) -> None:
        """peft has put the first adapter of others on; see `beside`."""
        if "_peft_config" not in vars(self) and (ours := self.adapted):
            beside(self, adapters, next(iter(ours.values())).lora_config)
        vars(self)["_peft_config"] = adapters

    @peft_config.deleter
    def peft_config(self: Any) -> None:
        """peft has taken its adapters off again, and perhaps merged ours, which the configuration then claims no
        more."""
        vars(self).pop("_peft_config", None)
        self._forget_adapters()

    def save_pretrained(self: Any, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """As for any model of transformers. Adapters that others put on stay out: peft saves them, each in a folder.
        What a recipe had quantised is written dequantised."""
        self._forget_adapters()
        if kwargs.get("state_dict") is None and not saves_adapters_alone(self):
            others, packed = has_others(self), quantized_layers(self)
            if others or packed:
                state = without_others(self) if others else self.state_dict()
                kwargs["state_dict"] = dequantized_state(state, packed, self.dtype)
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

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
        return _adapter(names, prefixes(modality, half), f"{modality}.{half}")
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


def _adapter(names: dict[str, nn.Parameter], starts: tuple[str, ...], part: str) -> dict[str, nn.Parameter]:
    if not (found := {n: p for n, p in names.items() if n.startswith(starts) and is_lora(n)}):
        raise OpticNerveError(
            f"{part}.lora: {part} carries no adapter; `give_lora` puts one there", kind="unknown-name"
        )
    return found


def _language(model: Any, inner: str) -> dict[str, nn.Parameter]:
    names = {n: p for n, p in model.named_parameters() if n.startswith("language_model.")}
    if inner == "language.lora":
        return _adapter(names, ("language_model.",), "language")
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
