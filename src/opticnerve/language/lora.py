"""LoRA on the language model, by peft (Hu et al. 2021, LoRA)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from opticnerve.language.adapters import ADAPTER, adopt, check_plain, is_adapter, our_layers, release
from opticnerve.language.experts import expert_tensors, is_expert
from opticnerve.language.layers import decoder_layers
from opticnerve.types import OpticNerveError

DEFAULTS: dict[str, Any] = {
    "rank": 16, "alpha": None, "dropout": 0.0, "targets": "all-linear", "when": "always", "dora": False,
    "rank_stabilised": False, "init": None,
}  # fmt: skip
START = "start"  # of init: pissa, a buffer beside each half: what it began with, which its layer's weight is without


def add_lora(
    language_model: nn.Module, options: dict[str, Any], *, dtype: torch.dtype | None = None, fresh: bool = True
) -> None:
    """Put low-rank adapters beside the language model's linear layers, in place.

    Args:
        options: `rank`; `alpha` (2 × rank by default); `dropout`; `targets`: "all-linear" (every linear layer of the
            decoder, no expert of a mixture), or a list of name endings such as [q_proj, v_proj], which may name
            experts: [experts.down_proj]; `when`: see `AdapterMask`.
            `dora` (Liu et al. 2024, section 4), `rank_stabilised` (Kalajdzievski 2023): peft's. `init`: of the weights,
            peft's; `pissa` (Meng et al. 2024, section 3) begins with the weight's first singular vectors and takes
            what they make out of the weight, which is frozen then.
        fresh: False where trained weights follow from a file: nothing is taken out of any weight.
        dtype: of the adapter weights; the language model's own by default. (peft's default, float32 beside bf16
            weights, casts every activation and is a third slower on a CPU.)
    """
    unknown = set(options) - set(DEFAULTS)
    if unknown:
        raise OpticNerveError(
            f"unknown lora option {sorted(unknown)}; known: {', '.join(DEFAULTS)}", kind="unknown-key"
        )
    chosen = {**DEFAULTS, **options}
    if has_lora(language_model):
        raise OpticNerveError(
            "the language model carries a LoRA adapter already; merge it before adding another", kind="exists-already"
        )
    targets = chosen["targets"]
    names = linear_layers(language_model)
    packed = [n for n in names if not _plain(language_model.get_submodule(n)).weight.is_floating_point()]  # type: ignore[operator]
    pissa = chosen["init"] == "pissa"
    if packed and (chosen["dora"] or pissa):
        raise OpticNerveError(
            f"lora: {'dora' if chosen['dora'] else 'init: pissa'} reads the weight beside which it stands, and "
            f"{packed[0]} is quantised; leave one of the two out",
            kind="conflict",
        )
    tensors: list[str] = []
    if targets == "all-linear":
        targets = [n for n in names if not is_expert(n)]
    else:
        tensors = [n for n in expert_tensors(language_model) if _ends(n, targets)]
        hit = [n for n in names if _ends(n, targets)]
        if not hit and not tensors:
            raise OpticNerveError(
                f"lora targets {targets} name no linear layer of the language model; "
                f"its layers end in {', '.join(sorted({n.rsplit('.', 1)[-1] for n in names}))}",
                kind="unknown-name",
            )
        if tensors and (also := _not_on_experts(chosen)):
            raise OpticNerveError(
                f"lora: {also} does not go with experts ({tensors[0]}), whose adapter is a change of their weights; "
                "leave one of the two out",
                kind="conflict",
            )
        targets = hit
    rank, alpha = chosen["rank"], chosen["alpha"]
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank if alpha is None else alpha, lora_dropout=chosen["dropout"], target_modules=targets,
        target_parameters=tensors or None,
        use_dora=chosen["dora"], use_rslora=chosen["rank_stabilised"],
        init_lora_weights=True if pissa else chosen["init"] or True,
        fan_in_fan_out=any(isinstance(_plain(language_model.get_submodule(n)), Conv1D) for n in names),  # GPT-2's
    )  # fmt: skip
    _inject(config, language_model)
    if chosen["when"] == "media":
        AdapterMask.install(language_model)
    dtype = dtype or next(p.dtype for p in language_model.parameters() if p.is_floating_point())
    for name, parameter in language_model.named_parameters():
        if is_lora(name):
            parameter.data = parameter.data.to(dtype)
    if pissa:
        _start_with_singular_vectors(language_model, dtype, fresh=fresh)


def _ends(name: str, targets: list[str]) -> bool:
    return any(name == t or name.endswith("." + t) for t in targets)


def _not_on_experts(chosen: dict[str, Any]) -> str | None:
    """The first of the options that a change of weights, which all tokens of a batch share, cannot follow."""
    wanted = {"dora": chosen["dora"], "init": chosen["init"], "dropout": chosen["dropout"] > 0,
              "when: media": chosen["when"] == "media"}  # fmt: skip
    return next((name for name, given in wanted.items() if given), None)


@torch.no_grad()
def _start_with_singular_vectors(language_model: nn.Module, dtype: torch.dtype, *, fresh: bool) -> None:
    """PiSSA: W is kept as W - s B₀ A₀, and the adapter begins as B₀, A₀. Both are remembered in buffers: a run's folder
    names W by its base, and whoever loads it takes the same product out again."""
    for _, layer in our_layers(language_model):
        base = layer.get_base_layer()
        if fresh and not base.weight.is_meta:
            whole = base.weight.data
            layer.pissa_init(ADAPTER, "pissa")
            base.weight.data = whole
        for half in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
            half.weight.data = half.weight.data.to(dtype)
            begun = half.weight.data.clone() if fresh else torch.zeros_like(half.weight.data)
            half.register_buffer(START, begun)
        layer.start_is_in = True
    if fresh:
        take_start_out(language_model)


@torch.no_grad()
def take_start_out(language_model: nn.Module) -> None:
    """Take out of each weight what its adapter began with, once, where it began with some of it."""
    for _, layer in our_layers(language_model):
        if not getattr(layer, "start_is_in", False):
            continue
        base, low, high = layer.get_base_layer(), layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        product = layer.scaling[ADAPTER] * (high.start.float() @ low.start.float())
        left = base.weight.float() - (product.t() if layer.fan_in_fan_out else product)
        base.weight.data = left.to(base.weight.dtype)
        layer.start_is_in = False


def _inject(config: LoraConfig, language_model: nn.Module) -> None:
    """Have peft put our adapter in, and leave everything else as it was: what trains, which other adapters are active,
    what the model is said to carry."""
    trained = {id(p): p.requires_grad for p in language_model.parameters()}
    others: dict[int, tuple[list[str], bool]] = {
        id(m): (list(m.active_adapters), not m.disable_adapters)
        for m in language_model.modules()
        if isinstance(m, LoraLayer)
    }
    noted = vars(language_model).pop("peft_config", None)
    inject_adapter_in_model(config, language_model, adapter_name=ADAPTER)
    # Noted there, ours would be one that peft may switch; to peft it is part of the base.
    vars(language_model).pop("peft_config", None)
    if noted is not None:
        language_model.peft_config = noted
    language_model.lora_config = config  # type: ignore[assignment]
    for layer in [m for m in language_model.modules() if isinstance(m, LoraLayer)]:
        active, on = others.get(id(layer), ([], True))
        if ADAPTER in layer.lora_A:
            adopt(layer, active, on)
        else:
            layer.set_adapter(active)
    for parameter in language_model.parameters():
        # peft freezes and opens weights as it goes; what trains is the stage's business alone.
        parameter.requires_grad_(trained.get(id(parameter), False))


class AdapterMask:
    """Which rows of a batch the adapter works on (`when: media`).

    An adapter that learned to answer about pictures has no business with text alone: rows without a picture are left to
    the bare language model, bit for bit, so that nothing it knew is forgotten. Phi-4-Multimodal's mixture of LoRAs does
    so per modality (Abouelenin et al. 2025, section 2).
    """

    adapter = ADAPTER

    def __init__(self) -> None:
        self.rows_B: Tensor | None = None

    @classmethod
    def install(cls, language_model: nn.Module) -> None:
        """Hook a mask onto the output of our adapter in every layer."""
        mask = cls()
        for _, layer in our_layers(language_model):
            layer.lora_B[ADAPTER].register_forward_hook(mask)
            layer.gated = True
        language_model.adapter_mask = mask  # type: ignore[assignment]

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        if self.rows_B is None:
            return None
        return out * self.rows_B.to(out.dtype).view(-1, *[1] * (out.ndim - 1))


def mask_of(language_model: nn.Module) -> AdapterMask | None:
    """The mask on a language model's adapter, where it has one."""
    mask: AdapterMask | None = getattr(language_model, "adapter_mask", None)
    return mask


@contextmanager
def adapter_on(language_model: nn.Module, rows_B: Tensor | None) -> Iterator[None]:
    """Within it, the adapter works on the rows where `rows_B` is True; on all of them for None, or without a mask."""
    mask = mask_of(language_model)
    if mask is None:
        yield
        return
    before, mask.rows_B = mask.rows_B, rows_B
    try:
        yield
    finally:
        mask.rows_B = before


def linear_layers(language_model: nn.Module) -> list[str]:
    """Names of the linear layers that LoRA may wrap, or has wrapped: those within the decoder's layers. GPT-2's Conv1D
    is one."""
    found: list[str] = []
    for name, module in language_model.named_modules():
        inside = (found and name.startswith(f"{found[-1]}.")) or is_adapter(name)  # of an adapter's layer
        if not inside and isinstance(_plain(module), nn.Linear | Conv1D):
            found.append(name)
    start = decoder_layers(language_model)[0]
    return [name for name in found if name.startswith(f"{start}.")]


def _plain(module: nn.Module) -> nn.Module:
    base: nn.Module = module.get_base_layer() if isinstance(module, LoraLayer) else module
    return base


def is_lora(name: str) -> bool:
    """Whether a parameter's name is that of a weight of our adapter."""
    return re.search(rf"(^|\.)lora_([AB]|magnitude_vector)\.{ADAPTER}\.", name) is not None


def _magnitude(layer: Any) -> list[nn.Module]:
    return [layer.lora_magnitude_vector[ADAPTER]] if ADAPTER in layer.lora_magnitude_vector else []


def has_lora(module: nn.Module) -> bool:
    """Whether a model carries our adapter, beside others' or alone."""
    return any(True for _ in our_layers(module))


def merge_lora(language_model: nn.Module) -> None:
    """Add our adapter into each weight and take it away, in place; the sum is made in float32. Others' stay.

    Raises:
        OpticNerveError: it works beside media alone, or the weights are quantised.
    """
    layers = list(our_layers(language_model))
    for _, layer in layers:
        check_plain(layer.get_base_layer(), "the adapter")
    for name, layer in reversed(layers):  # of the tensors of a layer's experts one's adapter stands within another's
        base = layer.get_base_layer()
        dtype = next(base.parameters()).dtype
        for part in (base, layer.lora_A[ADAPTER], layer.lora_B[ADAPTER], *_magnitude(layer)):
            part.float()
        if layer.merged:
            layer.unmerge()
        layer.merge(safe_merge=True, adapter_names=[ADAPTER])
        base.to(dtype)
        if (plain := release(layer)) is not None:
            parent_name, _, child = name.rpartition(".")
            setattr(language_model.get_submodule(parent_name) if parent_name else language_model, child, plain)
    vars(language_model).pop("lora_config", None)
