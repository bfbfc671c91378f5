"""What models of every family do alike with low-rank adapters, others' and ours, and with weights that a recipe had
quantised."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import nn

from opticnerve.common.private_names import saves_adapters_alone
from opticnerve.language.adapters import beside, has_others, without_others
from opticnerve.language.lora import add_lora, check_called, has_lora, is_lora, merge_lora
from opticnerve.language.quantization import dequantize, dequantized_state, quantized_layers
from opticnerve.types import OpticNerveError


class AdaptedParts:
    """Parts of a model that may hold an adapter, under the names that the configuration keeps their options by:
    `language`, `image.encoder`, `image.fusion`, `text.encoder`.

    Comes before `PreTrainedModel` among a class's bases.
    """

    def adaptable(self) -> list[str]:
        """The parts that may hold an adapter."""
        raise NotImplementedError

    def part_module(self, part: str) -> nn.Module:
        """The module that an adapter of this part stands in; an OpticNerveError where none can."""
        raise NotImplementedError

    def run_encoder(self, part: str) -> object:
        """Send something through the encoder that `part` names."""
        raise NotImplementedError

    @property
    def adapted(self) -> dict[str, nn.Module]:
        """The parts that hold an adapter of ours."""
        return {part: module for part in self.adaptable() if has_lora(module := self.part_module(part))}

    @property
    def adapters(self: Any) -> dict[str, dict[str, Any]]:
        """Options of our adapters, by the part that they stand in."""
        found: dict[str, dict[str, Any]] = self.config.adapters
        return found

    def give_lora(self: Any, options: dict[str, Any], part: str = "language", *, fresh: bool = True) -> None:
        """Put an adapter on a part; the configuration remembers it. (`options`, `fresh`: as for `add_lora`.)

        Raises:
            OpticNerveError: as `add_lora`; or it is to step aside on text, which the language model's alone can.
        """
        module, where = self.part_module(part), dict[str, Any]()
        if part != "language":
            if options.get("when", "always") != "always":
                raise OpticNerveError(f"{part}.lora: when: media is for language.lora alone", kind="conflict")
            where = {"what": part, "blocks": module.blocks() if part.endswith(".encoder") else [module]}
        add_lora(module, options, fresh=fresh, **where)
        if fresh and part.endswith(".encoder") and not any(p.is_meta for p in module.parameters()):
            check_called(module, lambda: self.run_encoder(part), part)
        self.config.note_adapter(part, options)

    def merge_adapters(self: Any) -> None:
        """Add our adapters, where there are some, into the weights beside them; one that steps aside on text
        (`lora.when: media`) stays as it is. Quantised weights, which take no sum, are plain ones after it."""
        dequantize(self, self.dtype)
        for part, module in self.adapted.items():
            if self.adapters[part].get("when", "always") == "always":
                merge_lora(module)
                self.config.note_adapter(part, None)

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


def adapter_of(names: dict[str, nn.Parameter], starts: tuple[str, ...], part: str) -> dict[str, nn.Parameter]:
    """Of a model's parameters those of our adapter on a part, whose names begin so; an OpticNerveError without one."""
    if not (found := {n: p for n, p in names.items() if n.startswith(starts) and is_lora(n)}):
        raise OpticNerveError(
            f"{part}.lora: {part} carries no adapter; `give_lora` puts one there", kind="unknown-name"
        )
    return found


def adapters_of(towers: Mapping[str, Mapping[str, Any] | None]) -> dict[str, dict[str, Any]]:
    """Options of adapters by part (`image.encoder`), as the entries of towers in a configuration keep them."""
    return {f"{t}.{half}": o for t, spec in towers.items() for half, o in ((spec or {}).get("lora") or {}).items()}


def with_adapter(spec: Mapping[str, Any], half: str, options: dict[str, Any] | None) -> dict[str, Any]:
    """A tower's entry in a configuration that remembers an adapter on its encoder or fusion; with None, that there is
    none."""
    rest = {k: v for k, v in spec.items() if k != "lora"}
    held = {k: v for k, v in {**(spec.get("lora") or {}), half: options}.items() if v is not None}
    return {**rest, "lora": held} if held else rest


class AdaptedTowers:
    """Before `PreTrainedConfig` among the bases of a configuration whose towers are `image` and `text`: it remembers
    the adapters on their encoders."""

    @property
    def adapters(self: Any) -> dict[str, dict[str, Any]]:
        """Options of our adapters, by the part that they stand in: `image.encoder`, `text.encoder`."""
        return adapters_of({"image": self.image, "text": self.text})

    def note_adapter(self, part: str, options: dict[str, Any] | None) -> None:
        """Remember an adapter of a part, or, with None, that there is none."""
        tower, _, half = part.partition(".")
        setattr(self, tower, with_adapter(getattr(self, tower), half, options))
