"""LoRA on the language model, by peft (Hu et al. 2021, LoRA)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from opticnerve.common.private_names import forget_adapters
from opticnerve.language.layers import decoder_layers
from opticnerve.types import OpticNerveError

DEFAULTS: dict[str, Any] = {"rank": 16, "alpha": None, "dropout": 0.0, "targets": "all-linear", "when": "always"}


def add_lora(language_model: nn.Module, options: dict[str, Any], *, dtype: torch.dtype | None = None) -> None:
    """Put low-rank adapters beside the language model's linear layers, in place.

    Args:
        options: `rank`; `alpha` (2 × rank by default); `dropout`; `targets`: "all-linear" (every linear layer of the
            decoder), or a list of module-name endings such as [q_proj, v_proj]; `when`: see `AdapterMask`.
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
    if targets == "all-linear":
        targets = names
    else:
        hit = [n for n in names if any(n == t or n.endswith("." + t) for t in targets)]
        if not hit:
            raise OpticNerveError(
                f"lora targets {targets} name no linear layer of the language model; "
                f"its layers end in {', '.join(sorted({n.rsplit('.', 1)[-1] for n in names}))}",
                kind="unknown-name",
            )
    rank, alpha = chosen["rank"], chosen["alpha"]
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank if alpha is None else alpha, lora_dropout=chosen["dropout"], target_modules=targets,
        fan_in_fan_out=any(isinstance(language_model.get_submodule(n), Conv1D) for n in names),  # GPT-2's layers
    )  # fmt: skip
    frozen = {name: p.requires_grad for name, p in language_model.named_parameters()}
    inject_adapter_in_model(config, language_model)
    for name, parameter in language_model.named_parameters():
        # peft freezes and opens weights as it goes; what trains is the stage's business alone.
        parameter.requires_grad_(frozen.get(name.replace(".base_layer", ""), False))
    if chosen["when"] == "media":
        AdapterMask.install(language_model)
    dtype = dtype or next(p.dtype for p in language_model.parameters() if p.is_floating_point())
    for name, parameter in language_model.named_parameters():
        if is_lora(name):
            parameter.data = parameter.data.to(dtype)


class AdapterMask:
    """Which rows of a batch the adapter works on (`when: media`).

    An adapter that learned to answer about pictures has no business with text alone: rows without a picture are left to
    the bare language model, bit for bit, so that nothing it knew is forgotten. Phi-4-Multimodal's mixture of LoRAs does
    so per modality (Abouelenin et al. 2025, section 2).
    """

    def __init__(self) -> None:
        self.rows_B: Tensor | None = None

    @classmethod
    def install(cls, language_model: nn.Module) -> None:
        """Hook a mask onto the output of every adapter."""
        mask = cls()
        for name, module in language_model.named_modules():
            if name.rpartition(".")[0].endswith("lora_B"):
                module.register_forward_hook(mask)
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
    """Names of the linear layers that LoRA may wrap: those within the decoder's layers. GPT-2's Conv1D is one."""
    start = decoder_layers(language_model)[0]
    modules = language_model.named_modules()
    return [name for name, m in modules if isinstance(m, nn.Linear | Conv1D) and name.startswith(f"{start}.")]


def is_lora(name: str) -> bool:
    """Whether a parameter's name is that of an adapter weight."""
    return ".lora_" in name or name.startswith("lora_")


def has_lora(module: nn.Module) -> bool:
    return any(isinstance(m, LoraLayer) for m in module.modules())


def merge_lora(language_model: nn.Module) -> None:
    """Add each adapter into its weight and take the adapter away, in place; the sum is made in float32."""
    for name, module in list(language_model.named_modules()):
        if not isinstance(module, LoraLayer):
            continue
        layer: Any = module
        base = layer.get_base_layer()
        dtype = base.weight.dtype
        layer.float()
        layer.merge(safe_merge=True)
        base.to(dtype)
        parent_name, _, child = name.rpartition(".")
        setattr(language_model.get_submodule(parent_name) if parent_name else language_model, child, base)
    forget_adapters(language_model)
