"""Loading by transformers' conventions, with every tensor accounted for, and no model larger than its weights.

config.json says how large a model is built, long before a tensor is read. One that somebody altered, to a million
layers or a width of 2³⁰, would be built until memory or patience ends. So tensors and modules are counted while a model
is built, and building ends when there are more than the files could fill.
"""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from opticnerve.common import hub
from opticnerve.common.private_names import forget_renamings, saves_adapters_alone
from opticnerve.language.adapters import OLD_NAMES, our_layers
from opticnerve.models.checkpoint.options import spare
from opticnerve.models.checkpoint.readme import introduce, introduce_on_hub
from opticnerve.types import OpticNerveError

MAX_HEADER = 100_000_000  # bytes: what the safetensors library itself takes
# `PreTrainedModel.from_pretrained` keeps `trust_remote_code` to itself; constructors need it for dotted paths.
_trusted: ContextVar[bool] = ContextVar("trust_remote_code", default=False)


def trusts(trust_remote_code: bool) -> bool:
    """Whether parts under dotted paths may run: the constructor was told so, or the loading that it is called in."""
    return trust_remote_code or _trusted.get()


class StrictLoading:
    """Before `PreTrainedModel` among a class's bases: missing, unexpected and mismatched tensors are an error that
    lists them. Parts under dotted paths (code from outside opticnerve) are run with `trust_remote_code=True` only."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[Any] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a folder of `save_pretrained` or a hub name.

        Raises:
            OpticNerveError: the tensors are not those of config.json, config.json is damaged or describes a model much
                larger than the weights, or the files cannot be read.
        """
        wants_report = kwargs.pop("output_loading_info", False)
        kwargs["key_mapping"] = {**OLD_NAMES, **(kwargs.get("key_mapping") or {})}
        kwargs["ignore_mismatched_sizes"] = True  # so that they are listed below with the others, and refused
        if torch.get_default_device().type == "meta":
            # transformers refuses this itself, in words that its users know.
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]
        token = _trusted.set(bool(kwargs.get("trust_remote_code", False)))
        folder = Path(str(pretrained_model_name_or_path))
        try:
            with wrap_errors("the model", folder), no_larger_than_files(folder):
                spare(getattr(cls, "config_class", None), pretrained_model_name_or_path, kwargs)
                loaded: Any = super().from_pretrained(  # type: ignore[misc]
                    pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
                )
        finally:
            _trusted.reset(token)
        model, report = loaded
        forget_renamings(model, OLD_NAMES)  # else `save_pretrained` would write them again
        if listing := list_problems(report):
            raise OpticNerveError(
                f"the weights in {pretrained_model_name_or_path} do not fit its config.json: {listing}", kind="mismatch"
            )
        with wrap_errors("the model", folder):
            model.restore_tables()
        for _, layer in our_layers(model):
            layer.start_is_in = False  # PiSSA's, of weights that are all from the file
        return (model, report) if wants_report else model

    def save_pretrained(self: Any, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """As for any model of transformers; a folder without a README.md gets one that says how the model is loaded."""
        if not saves_adapters_alone(self) and kwargs.get("is_main_process", True):
            introduce(Path(save_directory), self.config)
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    if not TYPE_CHECKING:  # what transformers says of it does not fit a method of another class

        def push_to_hub(self, repo_id, **kwargs):
            """As for any model of transformers; a repository without a README.md gets the one of `save_pretrained`,
            but not where a branch or a pull request is asked for: that page goes to the main branch."""
            if kwargs.get("revision") is None and not kwargs.get("create_pr"):
                introduce_on_hub(repo_id, self.config, private=kwargs.get("private"), token=kwargs.get("token"))
            return super().push_to_hub(repo_id, **kwargs)

    def restore_tables(self) -> None:
        """Compute again what a checkpoint does not carry; see `restore_buffers`."""
        raise NotImplementedError


def list_problems(report: dict[str, Any]) -> str:
    """The tensors that transformers' `output_loading_info` calls missing, unexpected or mismatched; "" for none."""
    problems = {k.replace("_", " "): sorted(map(str, v)) for k, v in report.items() if k.endswith("_keys") and v}
    return "; ".join(f"{k}: {', '.join(v[:12])}" for k, v in problems.items())


@contextmanager
def wrap_errors(what: str, source: str | Path) -> Iterator[None]:
    """Whatever goes wrong while files of a checkpoint are read is one error that names them.

    What transformers, tokenizers and safetensors raise for an altered file depends on where their parsing trips over
    it: anything from OSError to tokenizers' bare Exception.
    """
    try:
        yield
    except (OpticNerveError, MemoryError):
        raise
    except BaseException as e:
        # Rust code that panics over a file (tokenizers) raises what is no Exception.
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        if found := hub.explain(e, str(source)):
            raise found from e
        said = f"{type(e).__name__}: {e}" if str(e).strip() else type(e).__name__
        raise OpticNerveError(f"{what} in {source} cannot be loaded: {said[:2_000]}", kind="damaged") from e


def restore_buffers(module: nn.Module, rebuild: Callable[[], nn.Module]) -> None:
    """Compute again the non-persistent buffers of a part that is not transformers' own.

    `from_pretrained` builds the model without memory and fills in what the file holds; tables that a constructor
    computes (timm's rotary embeddings, relative positions) would stay empty. `rebuild` makes the part anew.
    """
    persistent = set(module.state_dict())
    missing = [name for name, _ in module.named_buffers() if name not in persistent]
    fresh = dict(rebuild().named_buffers()) if missing else {}
    for name in missing:
        place = module.get_buffer(name)
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, fresh[name].to(device=place.device, dtype=place.dtype))


@contextmanager
def no_larger_than(source: str, tensors: int, elements: int) -> Iterator[None]:
    """Within it, modules that hold much more than so many tensors and numbers are refused while this thread builds
    them."""
    # Encoders are built up to four times (to probe their shapes, on the meta device), tied tensors under each of their
    # names, and tables that are computed stand in no file.
    most_tensors, most_elements, most_modules = 6 * tensors + 500, 6 * elements + 100_000_000, 40 * tensors + 3_000
    built, numbers, modules, thread = 0, 0, 0, threading.get_ident()

    def add_tensor(module: nn.Module, name: str, value: Tensor | None) -> None:
        nonlocal built, numbers
        # Weights that come to a module on the meta device replace what was counted when it was built.
        replaces = isinstance(getattr(module, name, None), Tensor)
        if value is None or replaces or threading.get_ident() != thread:
            return
        built, numbers = built + 1, numbers + value.numel()
        if built > most_tensors or numbers > most_elements:
            raise OpticNerveError(
                f"{source}: its configuration describes a model of more than {numbers:,} numbers in {built:,} tensors, "
                f"but its weights are {elements:,} in {tensors:,}; one of the two is not its own",
                kind="too-large",
            )

    def add_module(module: nn.Module, name: str, value: nn.Module | None) -> None:
        nonlocal modules
        if value is None or threading.get_ident() != thread:
            return
        modules += 1
        if modules > most_modules:
            raise OpticNerveError(
                f"{source}: its configuration describes a model of more than {most_modules:,} modules, but its weights "
                f"are {tensors:,} tensors; one of the two is not its own",
                kind="too-large",
            )

    handles = [
        hooks.register_module_parameter_registration_hook(add_tensor),
        hooks.register_module_buffer_registration_hook(add_tensor),
        hooks.register_module_module_registration_hook(add_module),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def no_larger_than_files(folder: Path) -> Iterator[None]:
    """`no_larger_than` the safetensors files in a folder; without any, there is nothing to compare with."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        yield
        return
    sizes = [shape for file in files for shape in shapes(file).values()]
    with no_larger_than(str(folder), len(sizes), sum(map(prod, sizes))):
        yield


def shapes(file: Path) -> dict[str, list[int]]:
    """Name → shape of the tensors that a safetensors file's header lists; no tensor is read.

    Raises:
        OpticNerveError: it has no such header.
    """
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > min(MAX_HEADER, file.stat().st_size):
                raise ValueError(f"a header of {length:,} bytes in a file of {file.stat().st_size:,}")
            header = json.loads(opened.read(length))
        found = {name: list(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
        for name, shape in found.items():
            if not all(isinstance(n, int) and 0 <= n < 2**48 for n in shape):
                raise ValueError(f"{name[:80]} has the shape {str(shape)[:80]}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as e:
        raise OpticNerveError(f"{file} is not a readable safetensors file: {str(e)[:200]}", kind="damaged") from e
    return found
