"""LoRA on a language model, an encoder or a fusion, by peft (Hu et al. 2021, LoRA)."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Sequence
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
    module: nn.Module, options: dict[str, Any], *, dtype: torch.dtype | None = None, fresh: bool = True,
    what: str = "the language model", blocks: Sequence[nn.Module] | None = None,
) -> None:  # fmt: skip
    """Put low-rank adapters beside the linear layers of a language model, or of another module, in place.

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
        what: the module's name, for messages. blocks: see `linear_layers`.

    Raises:
        OpticNerveError: unknown options, targets that name no layer, layers that cannot take such an adapter, or
            there is an adapter already.
    """
    unknown = set(options) - set(DEFAULTS)
    if unknown:
        raise OpticNerveError(
            f"unknown lora option {sorted(unknown)}; known: {', '.join(DEFAULTS)}", kind="unknown-key"
        )
    chosen = {**DEFAULTS, **options}
    if has_lora(module):
        raise OpticNerveError(
            f"{what} carries a LoRA adapter already; merge it before adding another", kind="exists-already"
        )
    targets = chosen["targets"]
    names = linear_layers(module, blocks)
    if not names:
        raise OpticNerveError(
            f"{what} has no linear layers that LoRA could stand beside (convolutions, for one, are none); train it "
            "whole, or its last blocks",
            kind="unsupported",
        )
    packed = [n for n in names if not _plain(module.get_submodule(n)).weight.is_floating_point()]  # type: ignore[operator]
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
        tensors = [n for n in expert_tensors(module) if _ends(n, targets)]
        hit = [n for n in names if _ends(n, targets)]
        if not hit and not tensors:
            raise OpticNerveError(
                f"lora targets {targets} name no linear layer of {what}; "
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
        fan_in_fan_out=any(isinstance(_plain(module.get_submodule(n)), Conv1D) for n in names),  # GPT-2's
    )  # fmt: skip
    _inject(config, module)
    if chosen["when"] == "media":
        AdapterMask.install(module)
    dtype = dtype or next(p.dtype for p in module.parameters() if p.is_floating_point())
    for name, parameter in module.named_parameters():
        if is_lora(name):
            parameter.data = parameter.data.to(dtype)
    if pissa:
        _start_with_singular_vectors(module, dtype, fresh=fresh)


def _ends(name: str, targets: list[str]) -> bool:
    return any(name == t or name.endswith("." + t) for t in targets)


def _not_on_experts(chosen: dict[str, Any]) -> str | None:
    """The first of the options that a change of weights, which all tokens of a batch share, cannot follow."""
    wanted = {"dora": chosen["dora"], "init": chosen["init"], "dropout": chosen["dropout"] > 0,
              "when: media": chosen["when"] == "media"}  # fmt: skip
    return next((name for name, given in wanted.items() if given), None)


@torch.no_grad()
def _start_with_singular_vectors(module: nn.Module, dtype: torch.dtype, *, fresh: bool) -> None:
    """PiSSA: W is kept as W - s B₀ A₀, and the adapter begins as B₀, A₀. Both are remembered in buffers: a run's folder
    names W by its base, and whoever loads it takes the same product out again."""
    for _, layer in our_layers(module):
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
        take_start_out(module)


@torch.no_grad()
def take_start_out(module: nn.Module, *, without: Container[str] = ()) -> None:
    """Take out of each weight what its adapter began with, once, where it began with some of it. `without`: names of
    weights that came from a file without it."""
    for name, layer in our_layers(module):
        if not getattr(layer, "start_is_in", False):
            continue
        if f"{name}.base_layer.weight" in without:
            layer.start_is_in = False
            continue
        base, low, high = layer.get_base_layer(), layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        product = layer.scaling[ADAPTER] * (high.start.float() @ low.start.float())
        left = base.weight.float() - (product.t() if layer.fan_in_fan_out else product)
        base.weight.data = left.to(base.weight.dtype)
        layer.start_is_in = False


def _inject(config: LoraConfig, module: nn.Module) -> None:
    """Have peft put our adapter in, and leave everything else as it was: what trains, which other adapters are active,
    what the model is said to carry."""
    trained = {id(p): p.requires_grad for p in module.parameters()}
    others: dict[int, tuple[list[str], bool]] = {
        id(m): (list(m.active_adapters), not m.disable_adapters) for m in module.modules() if isinstance(m, LoraLayer)
    }
    noted = vars(module).pop("peft_config", None)
    inject_adapter_in_model(config, module, adapter_name=ADAPTER)
    # Noted there, ours would be one that peft may switch; to peft it is part of the base.
    vars(module).pop("peft_config", None)
    if noted is not None:
        module.peft_config = noted
    module.lora_config = config  # type: ignore[assignment]
    for layer in [m for m in module.modules() if isinstance(m, LoraLayer)]:
        active, on = others.get(id(layer), ([], True))
        if ADAPTER in layer.lora_A:
            adopt(layer, active, on)
        else:
            layer.set_adapter(active)
    for parameter in module.parameters():
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


def linear_layers(module: nn.Module, blocks: Sequence[nn.Module] | None = None) -> list[str]:
    """Names of the linear layers that LoRA may wrap, or has wrapped. GPT-2's Conv1D is one.

    Layers that torch reads past their `forward` (those of its own attention and transformer layers) are none: an
    adapter beside them would do nothing.

    Args:
        blocks: where they are; by default within the layers of the decoder that the module is.
    """
    found: list[str] = []
    inside: list[str] = []  # of an adapter's layer, or of one of torch's
    for name, child in module.named_modules():
        if is_adapter(name) or (inside and name.startswith(f"{inside[-1]}.")):
            continue
        if isinstance(child, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            inside.append(name)
        elif isinstance(_plain(child), nn.Linear | Conv1D):
            inside.append(name)
            found.append(name)
    blocks = decoder_layers(module)[1] if blocks is None else blocks
    within = {id(m) for block in blocks for m in block.modules()}
    return [name for name in found if id(module.get_submodule(name)) in within]


def check_called(module: nn.Module, run: Callable[[], object], what: str) -> None:
    """See that the layers with an adapter are called, for some modules read their weights instead (timm's EVA and BEiT
    those of `qkv`), and an adapter would do nothing there.

    Args:
        run: sends something through the module, in `eval()`.

    Raises:
        OpticNerveError: a layer is not called though what it stands in is.
    """
    called: set[int] = set()

    def note(child: nn.Module, _: object) -> None:
        called.add(id(child))

    handles = [m.register_forward_pre_hook(note) for m in module.modules()]
    training = [m for m in module.modules() if m.training]
    try:
        with torch.no_grad():
            module.eval()
            run()
    finally:
        for handle in handles:
            handle.remove()
        for child in training:
            child.training = True
    passed = [
        name for name, layer in our_layers(module)
        if id(layer) not in called and id(module.get_submodule(name.rpartition(".")[0])) in called
    ]  # fmt: skip
    if passed:
        ends = sorted({name.rpartition(".")[2] for name in passed})
        others = sorted({name.rpartition(".")[2] for name, _ in our_layers(module)} - set(ends))
        raise OpticNerveError(
            f"{what}.lora: {passed[0]} is not called, its weight is read past it, and an adapter beside it would do "
            f"nothing; give lora.targets without {', '.join(ends)}, such as [{', '.join(others)}]",
            kind="unsupported",
        )


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


def merge_lora(module: nn.Module) -> None:
    """Add our adapter into each weight and take it away, in place; the sum is made in float32. Others' stay.

    Raises:
        OpticNerveError: it works beside media alone, or the weights are quantised.
    """
    layers = list(our_layers(module))
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
        _replace(module, name, release(layer))
    vars(module).pop("lora_config", None)


@torch.no_grad()
def remove_lora(module: nn.Module) -> None:
    """Take our adapter off again, in place: the weights as they were without it. Others' stay."""
    for name, layer in reversed(list(our_layers(module))):
        if (low := getattr(layer.lora_A[ADAPTER], START, None)) is not None:  # PiSSA's, put back
            base, product = layer.get_base_layer(), layer.scaling[ADAPTER] * (layer.lora_B[ADAPTER].start @ low)
            base.weight += product.t() if layer.fan_in_fan_out else product
        _replace(module, name, release(layer))
    vars(module).pop("lora_config", None)


def _replace(module: nn.Module, name: str, plain: nn.Module | None) -> None:
    """Put the plain layer in its adapter's place, unless others keep that."""
    if plain is not None:
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, plain)
