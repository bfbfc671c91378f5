"""What all formats of stock transformers have in common: the language model's place, an answer's end, the check."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from opticnerve.common.private_names import forget_where_from
from opticnerve.export import parity, probe
from opticnerve.export.formats import Proof
from opticnerve.export.parity import Reference
from opticnerve.export.samples import Sample, as_job
from opticnerve.inference.generate import Answerer
from opticnerve.models.vlm.build import is_gated

# What scales or bends logits behind the head of a causal model: a class with a decoder and a head has nothing of it.
_BENDS = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0}
_NEAREST = "nearest: one of the Llama, Qwen2, Qwen3 or Mistral families"


def gate_refusals(model: Any) -> list[str]:
    """Why the adapter cannot be added into weights; empty if it can."""
    if not is_gated(model):
        return []
    return [
        "its adapter works beside pictures alone (lora.when: media), and such a gate cannot be added into weights; "
        "nearest: lora {when: always}, or the format merged"
    ]


def decoder_refusals(model: Any, holder: str) -> list[str]:
    """Why the language model is no plain decoder with a head, which is all that `holder` has room for."""
    language, reasons = model.language_model, gate_refusals(model)
    kind = language.config.model_type
    names = {n.partition(".")[0] for n in language.state_dict() if ".lora_" not in n}
    head = language.get_output_embeddings()
    if not names <= {"model", "lm_head"} or head is None or getattr(head, "bias", None) is not None:
        reasons.append(
            f"its language model ({kind}) is no plain decoder with a head without bias, which is what {holder} holds; "
            f"{_NEAREST}"
        )
    for key, plain in _BENDS.items():
        if getattr(language.config, key, plain) not in (plain, None):
            reasons.append(
                f"its language model ({kind}) has {key} {getattr(language.config, key)}, which {holder} leaves out; "
                f"{_NEAREST}"
            )
    return reasons


def table_rows(model: Any, processor: Any) -> int:
    """Rows of the embedding table: transformers looks the placeholder up before it puts the picture in its place."""
    return max(model.language_model.config.vocab_size, len(processor.tokenizer), model.config.image_token_id + 1)


def language_state(language: Any, rows: int) -> dict[str, Tensor]:
    """A causal model's tensors, tables lengthened to `rows`; a head that is the table itself is left out."""
    state = dict(language.state_dict())
    embedding, head = language.get_input_embeddings(), language.get_output_embeddings()
    paths = {id(module): path for path, module in language.named_modules()}
    for module in (embedding, head):
        for leaf in dict(module.named_parameters()):
            name = f"{paths[id(module)]}.{leaf}"
            state[name] = lengthened(state[name], rows)
    if head.weight is embedding.weight:
        del state[f"{paths[id(head)]}.weight"]
    return state


def lengthened(table: Tensor, rows: int) -> Tensor:
    """The table (V, D), or a bias (V,), with mean rows behind its own: such a row's logit is the mean of all logits,
    so never the largest."""
    more = rows - len(table)
    if more <= 0:
        return table
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(more, *table.shape[1:])])


def generation(model: Any, processor: Any, rows: int) -> Any:
    """Settings as the model has them, with the ends of a turn that training taught, and never a placeholder as a
    word."""
    made = copy.deepcopy(model.generation_config)
    stops = Answerer(model, processor).stops()
    made.eos_token_id, made.pad_token_id = stops["eos_token_id"], stops["pad_token_id"]
    own = model.language_model.config.vocab_size
    if rows > own:
        made.suppress_tokens = list(range(own, rows))
    return made


def save(folder: Path, model: Any, processor: Any, *, config: Any, state: dict[str, Tensor], theirs: Any) -> None:
    """Weights, configuration, stock processor (`theirs`) and an answer's end, as `from_pretrained` reads them."""
    save_torch_state_dict(state, folder, metadata={"format": "pt"})
    config.save_pretrained(folder)
    theirs.save_pretrained(folder)
    generation(model, processor, config.text_config.vocab_size).save_pretrained(folder)


def plain(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors as they go into the file."""
    return {n: (t.to(dtype) if t.is_floating_point() else t).detach().contiguous() for n, t in state.items()}


def nameless(config: Any, parts: Sequence[str], model_class: str, dtype: torch.dtype) -> Any:
    """The configuration without the places that its parts came from."""
    for part in (config, *(getattr(config, p) for p in parts)):
        part.dtype, part.architectures = dtype, None
        forget_where_from(part)
    config.architectures = [model_class]
    return config


def prove(
    folder: Path,
    model_class: str,
    samples: Sequence[Sample],
    wanted: Sequence[Reference],
    scratch: Path,
    *,
    pixels: Callable[[Tensor], Tensor] = lambda there: there,
) -> Proof:
    """Stock transformers' answers, in a process of its own, against ours. `pixels`: theirs in our shape.

    Raises:
        OpticNerveError: it does not load, a tensor is out of place, or it answers otherwise.
    """
    job = {
        "folder": str(folder), "model_class": model_class, "samples": as_job(samples), "last": parity.LAST,
        "greedy": parity.GREEDY,
    }  # fmt: skip
    said = probe.run("stock_transformers", job, scratch)
    parity.check_loaded(said)
    found = probe.samples_of(said)
    for sample in found:
        if sample["pixels"] is not None:
            sample["pixels"] = pixels(sample["pixels"])
    difference = parity.compare_logits(wanted, found, said["engine"])
    return Proof(said["engine"], difference, parity.TOLERANCE, "of the largest logit", len(samples))
