"""Loading by transformers' conventions, with every tensor accounted for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import nn

from opticnerve.common import hub
from opticnerve.models.checkpoint.bounds import no_larger_than_files
from opticnerve.types import OpticNerveError

# `PreTrainedModel.from_pretrained` keeps `trust_remote_code` to itself; constructors need it for dotted paths.
_trusted: ContextVar[bool] = ContextVar("trust_remote_code", default=False)


def trusts(trust_remote_code: bool) -> bool:
    """Whether parts under dotted paths may run: the constructor was told so, or the loading that it is called in."""
    return trust_remote_code or _trusted.get()


class StrictLoading:
    """Before `PreTrainedModel` among a class's bases: missing, unexpected and mismatched tensors are an error that
    lists them. Parts under dotted paths (code from outside opticnerve) are run with `trust_remote_code=True` only."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a folder of `save_pretrained` or a hub name.

        Raises:
            OpticNerveError: the tensors are not those of config.json, config.json is damaged or describes a model much
                larger than the weights, or the files cannot be read.
        """
        wants_report = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # so that they are listed below with the others, and refused
        token = _trusted.set(bool(kwargs.get("trust_remote_code", False)))
        folder = Path(str(pretrained_model_name_or_path))
        try:
            with wrap_errors("the model", folder), no_larger_than_files(folder):
                loaded: Any = super().from_pretrained(  # type: ignore[misc]
                    pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
                )
        finally:
            _trusted.reset(token)
        model, report = loaded
        problems = {k: sorted(map(str, v)) for k, v in report.items() if k.endswith("_keys") and v}
        if problems:
            listing = "; ".join(f"{k.replace('_', ' ')}: {', '.join(v[:12])}" for k, v in problems.items())
            raise OpticNerveError(
                f"the weights in {pretrained_model_name_or_path} do not fit its config.json: {listing}"
            )
        with wrap_errors("the model", folder):
            model.restore_tables()
        return (model, report) if wants_report else model

    def restore_tables(self) -> None:
        """Compute again what a checkpoint does not carry; see `restore_buffers`."""
        raise NotImplementedError


@contextmanager
def wrap_errors(what: str, source: Any) -> Iterator[None]:
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
        raise OpticNerveError(f"{what} in {source} cannot be loaded: {said[:2_000]}") from e


def restore_buffers(module: nn.Module, rebuild: Callable[[], nn.Module]) -> None:
    """Compute again the non-persistent buffers of a part that is not transformers' own.

    `from_pretrained` builds the model without memory and fills in what the file holds; tables that a constructor
    computes (timm's rotary embeddings, relative positions) would stay empty. `rebuild` makes the part anew.
    """
    persistent = set(module.state_dict())
    missing = [name for name, _ in module.named_buffers() if name not in persistent]
    if not missing:
        return
    fresh = dict(rebuild().named_buffers())
    for name in missing:
        place = module.get_buffer(name)
        owner = module.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], fresh[name].to(device=place.device, dtype=place.dtype))
