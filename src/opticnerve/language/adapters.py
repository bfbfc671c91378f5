"""Our adapter beside those of others: peft's layers hold both, and nothing that peft switches switches ours.

`get_peft_model(dock, …)` and what is built on it (trl, `PeftModel.load_adapter`) put adapters onto the very layers that
hold ours. To them ours is part of the base: `set_adapter`, `disable_adapter` and `unload` leave it where it is and as
trainable as it was, and only `merge_and_unload` without names adds it into the weights, with theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from opticnerve.types import OpticNerveError

ADAPTER = "opticnerve"
# Ours once had peft's own default name. Patterns, for `from_pretrained(key_mapping=…)` reads them, too.
OLD_NAMES = {rf"\.lora_{half}\.default\.": f".lora_{half}.{ADAPTER}." for half in "AB"}


def current_name(name: str) -> str:
    """The name of a tensor of ours, from files of any age."""
    for old, new in OLD_NAMES.items():
        name = re.sub(old, new, name)
    return name


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter's weight, whosever it is."""
    return ".lora_" in name or name.startswith("lora_")


def our_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and layers that hold our adapter."""
    return ((n, m) for n, m in module.named_modules() if isinstance(m, LoraLayer) and ADAPTER in m.lora_A)


def check_plain(layer: nn.Module, what: str) -> None:
    """Refuse to add anything into quantised weights.

    Raises:
        OpticNerveError: they are.
    """
    weight = getattr(layer, "weight", None)
    if weight is None:  # a mixture's experts
        weight = next(layer.parameters())
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point() or type(weight.data) is not Tensor:
        raise OpticNerveError(
            f"{what} cannot be merged into quantised weights; merge before quantising (`opticnerve merge`, or load "
            "without quantization_config)",
            kind="unsupported",
        )


# Its methods are those of a layer of peft's; a true base would change the layout of the objects, and `adopt` could not
# turn a layer into one.
if TYPE_CHECKING:
    _Layer = LoraLayer
else:
    _Layer = object


class DockedLayer(_Layer):
    """What comes before peft's own class among the bases of a layer that holds our adapter.

    Attributes:
        others: names of the others' adapters that are active. others_on: False within their `disable_adapter()`.
        gated: whether ours works beside media alone, so that no sum of weights does what it does.
    """

    others: list[str]
    others_on: bool
    gated: bool
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    merged_adapters: list[str]
    adapter_layer_names: tuple[str, ...]

    @property
    def active_adapter(self) -> list[str]:
        """What peft and transformers call active is theirs."""
        return self.others

    @property
    def active_adapters(self) -> list[str]:
        """What the forward pass goes through: ours always, and first."""
        return [ADAPTER, *(self.others if self.others_on else [])]

    @property
    def disable_adapters(self) -> bool:
        """Never: where the others are off, ours is on."""
        return False

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate the others' adapters of these names."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        theirs = [n for n in names if n != ADAPTER]
        with _as_trainable_as_before(self):
            super().set_adapter(theirs, inference_mode=inference_mode)
        self.others = theirs

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the others."""
        if not enabled and self.merged:
            self.unmerge()
        with _as_trainable_as_before(self):
            self.others_on = True  # peft activates again what is active
            super().enable_adapters(enabled)
        self.others_on = enabled

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Make room for one more adapter."""
        if adapter_name == ADAPTER:
            raise OpticNerveError(
                f"{ADAPTER!r} is the name of the adapter that the dock has already; choose another adapter_name",
                kind="exists-already",
            )
        super().update_layer(adapter_name, *args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take one of the others away."""
        if adapter_name == ADAPTER:
            raise OpticNerveError(
                f"{ADAPTER!r} is the dock's own adapter, and stays; `opticnerve merge` adds it into the weights",
                kind="unsupported",
            )
        with _as_trainable_as_before(self):
            super().delete_adapter(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add all adapters into the weight: peft's layers compute none of them while one is merged."""
        names = self.active_adapters if adapter_names is None else adapter_names
        if ADAPTER not in {*names, *self.merged_adapters}:
            raise OpticNerveError(
                f"merging {', '.join(names)} in place would switch the dock's own adapter off; merge both "
                "(merge_adapter() without names), or merge_and_unload(adapter_names=…), which leaves the dock's own",
                kind="conflict",
            )
        self._merge(safe_merge, names)

    def _merge(self, safe_merge: bool, names: list[str]) -> None:
        if ADAPTER in names and self.gated:
            raise OpticNerveError(
                "the dock's own adapter works beside media alone (lora.when: media), and no sum of weights does that; "
                "merge the others' alone: merge_and_unload(adapter_names=[…])",
                kind="unsupported",
            )
        check_plain(self.get_base_layer(), "an adapter")
        super().merge(safe_merge=safe_merge, adapter_names=names)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """What stands here when the others have gone (peft asks): this layer, or the plain one with ours merged in."""
        if merge:
            names = self.active_adapters if adapter_names is None else list(adapter_names)
            self._merge(safe_merge, [n for n in names if n not in self.merged_adapters])
        if ADAPTER in self.merged_adapters:
            base: nn.Module = self.get_base_layer()
            return base
        self.merged_adapters.clear()
        with _as_trainable_as_before(self):
            for name in set(self.lora_A) | set(self.lora_embedding_A):
                if name != ADAPTER:
                    super().delete_adapter(name)
        self.others, self.others_on = [], True
        return cast("nn.Module", self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Such classes are made as they are needed, so that pickle would not find them by their names.
        return _empty, (type(self).__mro__[2],), vars(self)


@contextmanager
def _as_trainable_as_before(layer: LoraLayer) -> Iterator[None]:
    """Within it, whatever peft opens and freezes, our weights stay as they were."""
    holders = [getattr(layer, name) for name in layer.adapter_layer_names]
    ours = [p for h in holders if ADAPTER in h for p in h[ADAPTER].parameters()]
    before = [p.requires_grad for p in ours]
    try:
        yield
    finally:
        for parameter, trained in zip(ours, before, strict=True):
            parameter.requires_grad_(trained)


_classes: dict[type, Any] = {}


def docked_class(plain: type) -> Any:
    """The class of peft's that keeps our adapter on. (peft's `all-linear` goes by the word in its name.)"""
    if plain not in _classes:
        about = {"__module__": __name__, "__doc__": DockedLayer.__doc__}
        _classes[plain] = type(f"Docked{plain.__name__}", (DockedLayer, plain), about)
    return _classes[plain]


def _empty(plain: type) -> Any:
    cls = docked_class(plain)
    return cls.__new__(cls)


def adopt(layer: Any, others: list[str], others_on: bool = True) -> None:
    """From now on, a layer of peft's that holds our adapter keeps it on."""
    layer.__class__ = docked_class(type(layer))
    layer.others, layer.others_on, layer.gated = others, others_on, False


def release(layer: Any) -> nn.Module | None:
    """Take our adapter out of a layer: the plain module that stands in its place; None where others keep the layer."""
    theirs = [n for n in layer.lora_A if n != ADAPTER]
    if not theirs:
        base: nn.Module = layer.get_base_layer()
        return base
    trainable = {id(p): p.requires_grad for p in layer.parameters()}
    others, on = layer.others, layer.others_on
    layer.__class__ = type(layer).__mro__[2]
    for name in ("others", "others_on", "gated"):
        delattr(layer, name)
    if ADAPTER in layer.merged_adapters:
        layer.merged_adapters.remove(ADAPTER)
    layer.delete_adapter(ADAPTER)
    layer.set_adapter(others)
    layer.enable_adapters(on)
    for parameter in layer.parameters():
        parameter.requires_grad_(trainable[id(parameter)])
    return None


def beside(model: nn.Module, adapters: dict[str, Any], ours: LoraConfig) -> None:
    """Put right what peft did to a model as it put an adapter beside ours.

    It leaves open what trained before, which it would freeze where there is no adapter yet; and it must know of ours,
    or it saves our weights among its own, and loads them over newer ones.

    Args:
        adapters: what peft notes (`peft_config`); ours is added.

    Raises:
        OpticNerveError: one is of a kind that takes ours off with itself.
    """
    for name, config in adapters.items():
        if config.peft_type != "LORA":
            raise OpticNerveError(
                f"the adapter {name!r} is {config.peft_type}, and the dock carries LoRA of its own, beside which peft "
                "keeps LoRA alone; add the dock's own into its weights before (`opticnerve merge`)",
                kind="unsupported",
            )
    biases = any(config.bias != "none" for config in adapters.values())
    for name, parameter in model.named_parameters():
        theirs = any(f".{adapter}." in f"{name}." for adapter in adapters)
        if not theirs and not (biases and name.endswith("bias")):
            parameter.requires_grad_(False)
    adapters[ADAPTER] = ours


def has_others(model: nn.Module) -> bool:
    """Whether others put adapters onto a model."""
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    return any(not isinstance(m, DockedLayer) or len(m.lora_A) > 1 for m in layers)


def without_others(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors under the names that they have without other people's adapters."""
    layers = {name: isinstance(m, DockedLayer) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    found = {}
    for name, tensor in model.state_dict().items():
        if ".modules_to_save." in name:
            continue
        layer = next((n for n in layers if name.startswith(f"{n}.")), None)
        if layer is not None:
            inner = name.removeprefix(f"{layer}.")
            if not inner.startswith("base_layer.") and f".{ADAPTER}." not in inner:
                continue
            name = name if layers[layer] else f"{layer}.{inner.removeprefix('base_layer.')}"
        found[name.replace(".original_module.", ".")] = tensor
    return found
