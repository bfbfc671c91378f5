"""What opticnerve uses of other libraries that these do not promise to keep, each behind one function.

`tests/test_private_names.py` has a test for each that says what broke, and finds private names that stand elsewhere.
Overriding a method that the library calls (`_init_weights`, `_preprocess`, …) is no use in this sense; tests there see
that it is still called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# -- transformers -----------------------------------------------------------------------------------------------------

# The keyword, and the field of outputs, of keys and values. Not private, but renamed: `cache` from 5.24 on,
# `past_key_values` before.
CACHE = "cache" if "cache" in {f.name for f in fields(CausalLMOutputWithPast)} else "past_key_values"


def cache_name(model: nn.Module) -> str:
    """The keyword by which a model's `forward` takes its cache: Mamba's kind calls it `cache_params`."""
    return "cache_params" if "cache_params" in inspect.signature(model.forward).parameters else CACHE


def is_without_positions(model: nn.Module) -> bool:
    """Whether a model is Mamba's kind: a recurrent state alone, whose `forward` takes the mask of new tokens only."""
    return is_stateful(model) and "position_ids" not in inspect.signature(model.forward).parameters


# What `preprocess` of an image processor calls around `_preprocess`.
PREPROCESS_STEPS = (
    "_fuse_mean_std_and_rescale_factor",
    "_prepare_image_like_inputs",
    "_preprocess_image_like_inputs",
)


def attention_of(config: PreTrainedConfig) -> str | None:
    """The name of the attention that a configuration has chosen, such as `sdpa`."""
    name: str | None = config._attn_implementation
    return name


def set_attention(config: PreTrainedConfig, name: str | None) -> None:
    """As a model's `set_attn_implementation`, for one configuration and without its checks: it is done in each step."""
    config._attn_implementation = name


def experts_of(config: PreTrainedConfig) -> str | None:
    """How a mixture's experts are computed, such as `grouped_mm`."""
    name: str | None = config._experts_implementation
    return name


def set_experts(config: PreTrainedConfig, name: str | None) -> None:
    """As a model's `set_experts_implementation`, for one configuration and without its checks."""
    config._experts_implementation = name


def offers_attention(model: nn.Module) -> bool:
    """Whether a model takes its attention from `AttentionInterface`."""
    return bool(getattr(model, "_supports_attention_backend", False))


def is_stateful(model: nn.Module) -> bool:
    """Whether a model carries a recurrent state, so that its cache cannot be cut or put beside another."""
    return bool(model._is_stateful)


def layers_not_to_split(model: nn.Module) -> list[str]:
    """The classes of a model's layers that must stay on one device: what a model around it hands on."""
    return list(getattr(model, "_no_split_modules", None) or [])


def set_layers_not_to_split(model: PreTrainedModel, names: list[str]) -> None:
    """For the model around another one: accelerate asks it."""
    model._no_split_modules = names


def checkpoint_layers(model: Any, context_fn: Callable[[], Any]) -> None:
    """Compute the activations of a model's layers again instead of keeping them. Not private, but renamed in 5.24."""
    kwargs = {"use_reentrant": False, "context_fn": context_fn}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def keep_activations(model: Any) -> None:
    """Take `checkpoint_layers` back."""
    renamed = getattr(model, "activation_checkpointing_disable", None)
    (renamed or model.gradient_checkpointing_disable)()


def generation_config(model: Any, **options: Any) -> Any:
    """The `GenerationConfig` that `model.generate(**options)` would go by."""
    config, _ = model._prepare_generation_config(None, **options)
    return config


def generation_rules(model: Any, config: Any, ids_BL: Tensor) -> Any:
    """What `generate` does to the scores of each token (`LogitsProcessorList`; it is empty where nothing is done).

    `config` (see `generation_config`) gets its special tokens as tensors, as `generate` gives them to it.
    """
    model._prepare_special_tokens(config, True, device=ids_BL.device)
    return model._get_logits_processor(
        generation_config=config, input_ids_seq_length=ids_BL.shape[1], encoder_input_ids=ids_BL,
        device=str(ids_BL.device),
    )  # fmt: skip


def repeat_rows(model: Any, times: int, ids_BL: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """A prompt's row `times` over, as `generate` does for several answers; our models repeat its media as well."""
    ids_NL, inputs = model._expand_inputs_for_generation(times, input_ids=ids_BL, **inputs)
    return ids_NL, inputs


def compile_on_any_device(config: Any) -> None:
    """Let a `CompileConfig` hold on a CPU, too; else transformers compiles on accelerators alone."""
    config._compile_all_devices = True


def forget_renamings(model: PreTrainedModel, patterns: Iterable[str]) -> None:
    """Forget that `from_pretrained` gave tensors other names by these patterns: `save_pretrained` takes all back."""
    known = getattr(model, "_weight_conversions", None) or []
    vars(model)["_weight_conversions"] = [c for c in known if set(c.source_patterns).isdisjoint(patterns)]


def saves_adapters_alone(model: PreTrainedModel) -> bool:
    """Whether transformers put adapters of peft onto a model (`add_adapter`), and `save_pretrained` saves these."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def forget_where_from(config: PreTrainedConfig) -> None:
    """A configuration without the place that it came from. (Its public name would turn None into the word.)"""
    config._name_or_path = ""


def saved_parts(
    processor_class: type[Any], names: list[str], folder: object, saved: object, **options: Any
) -> list[Any]:
    """The parts of a saved processor, in the order of `names`. transformers asks the class which parts it has: here
    one that knows only those that were saved."""
    from transformers import ProcessorMixin

    loader: Any = type(processor_class.__name__, (ProcessorMixin,), {"get_attributes": staticmethod(lambda: names)})
    parts: list[Any] = loader._get_arguments_from_pretrained(folder, saved, **options)
    return parts


def preprocess_of(image_processor_class: type[Any]) -> Any:
    """The method of an image processor that makes a batch of tensors from pictures."""
    return image_processor_class._preprocess


# -- timm -------------------------------------------------------------------------------------------------------------


def read_timm_config(folder: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """`pretrained_cfg`, architecture and `model_args` of a folder with timm's `config.json`."""
    from timm.models._hub import load_model_config_from_path

    found: tuple[dict[str, Any], str, dict[str, Any]] = load_model_config_from_path(folder)
    return found


# -- DeepSpeed --------------------------------------------------------------------------------------------------------


def start_optimizer_state(zero2: Any) -> None:
    """Let ZeRO-2's optimizer make what a checkpoint reads of it, before the first step has."""
    zero2._lazy_init_hp_params_optimizer_state()


# -- torch ------------------------------------------------------------------------------------------------------------


def times_written(tensor: Tensor) -> int:
    """How often a tensor has been written to in place, which inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def has_hooks(module: nn.Module) -> bool:
    """Whether something runs before or behind a module's own forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def remove_hooks(module: nn.Module) -> None:
    """Take away what runs before and behind the forward of a module and of those in it."""
    for part in module.modules():
        part._forward_pre_hooks.clear()
        part._forward_hooks.clear()


def computed_tables(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """The buffers within a module that no checkpoint holds, with the modules that own them and their names there."""
    kept = module.state_dict().keys()
    for path, part in module.named_modules():
        for name, table in part.named_buffers(recurse=False):
            if f"{path}.{name}".lstrip(".") not in kept:
                yield part, name, table


def undo_compile(module: nn.Module) -> None:
    """Take back `module.compile()`."""
    module._compiled_call_impl = None


def softmax_backward(grad: Tensor, weights: Tensor) -> Tensor:
    """The gradient of softmax's input over the last dimension, from those of its output `weights`, in one pass."""
    out: Tensor = torch.ops.aten._softmax_backward_data(grad, weights, -1, weights.dtype)
    return out


class _Operations(TorchDispatchMode):
    def __init__(self, seen: Callable[[object, tuple[Any, ...], dict[str, Any], object], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
        operation = func._overloadpacket
        stand_in = _ON_META.get(operation)
        if stand_in is not None and any(isinstance(a, Tensor) and a.is_meta for a in args):
            func = stand_in
        out: object = func(*args, **(kwargs or {}))
        self._seen(operation, args, kwargs or {}, out)
        return out


def _no(question: Tensor) -> bool:
    if question.dtype != torch.bool:
        raise NotImplementedError(f"a {question.dtype} of a tensor without numbers was asked for")
    return False


_ON_META: dict[object, Callable[..., object]] = {torch.ops.aten._local_scalar_dense: _no}
"""What torch does not do on the meta device. A yes-or-no question (is nothing of a mask padding?) is answered no."""


def operations(
    seen: Callable[[object, tuple[Any, ...], dict[str, Any], object], None],
) -> AbstractContextManager[object]:
    """Within it, each operation is told to `seen`, autograd's, too: which one, as torch's `flop_registry` calls it, its
    arguments, and what came out. On the meta device some go that torch has not there."""
    return _Operations(seen)


def tensors_in(tree: object) -> list[Tensor]:
    """All tensors within lists, tuples and dictionaries."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def grouped_product() -> Any:
    """The operation that multiplies each expert's rows by its matrix."""
    return torch.ops.aten._grouped_mm


def can_reorder(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies by weights of this precision that `reorder_weight` has laid out for it."""
    return (
        dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def reorder_weight(weight_ED: Tensor, rows: int) -> Tensor:
    """A linear layer's weight as oneDNN wants it for so many rows."""
    out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_ED, rows)
    return out


def reordered_linear(x_BD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` with a weight of `reorder_weight`'s."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x_BD, weight, bias, "none", [], "")
    return out


def copy_all(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """`copy_` of each value, in some kernels for all of them."""
    torch._foreach_copy_(list(into), list(values))


def assert_on_device(condition: Tensor, message: str) -> None:
    """See that a boolean is true, without a wait for its device: a later step raises where it was not."""
    torch._assert_async(condition, message)


def fake_tensors() -> tuple[Any, Callable[[], Any]]:
    """A context whose tensors have shapes, devices and no numbers, and one that steps out of it for a moment."""
    from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

    return FakeTensorMode(), unset_fake_temporarily
