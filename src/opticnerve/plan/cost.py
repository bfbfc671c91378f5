"""What a training step costs: bytes and arithmetic, counted on the meta device, and seconds, measured or estimated.

Nothing is guessed per architecture: one micro-batch is sent through the model without memory; autograd is asked which
tensors it would keep for the backward pass, and torch's flop counter how much would be computed.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from opticnerve.common.private_names import grouped_product
from opticnerve.inference.load import default_device
from opticnerve.models.vlm.prompt import Prompt
from opticnerve.train.optim import state_bytes
from opticnerve.train.throughput import wait_for
from opticnerve.types import OpticNerveError

if TYPE_CHECKING:
    from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
    from opticnerve.models.vlm.tower import Tower

# The share of its bare matmul rate at which a machine trains. Measured on a 2-core CPU in bf16 with a 135M model: 0.3
# to 0.5; norms, activations and memory traffic take the rest.
EFFICIENCY = 0.4


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step. `activations` is an estimate; the rest is counted."""

    process: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    activations_checkpointed: int
    checkpointing: bool

    @property
    def total(self) -> int:
        kept = self.activations_checkpointed if self.checkpointing else self.activations
        return self.process + self.weights + self.gradients + self.optimizer + kept

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "total": self.total, "estimate": True}


@dataclass(frozen=True)
class Trace:
    """One micro-batch on the meta device: bytes that autograd keeps, and floating-point operations both ways."""

    kept: int
    checkpointed: int
    flops: int


def memory(
    model: nn.Module, trace: Trace, *, checkpointing: bool, process: int, packed: dict[int, int] | None = None,
    optimizer: str = "adamw", ema: bool = False,
) -> Memory:  # fmt: skip
    """Bytes of a step, by the rules of this package's optimizer.

    - weights: every parameter in its dtype; tied ones once. `packed`: the bytes of those that will be quantised, by id.
    - gradients: trained parameters in their dtype.
    - optimizer: what it keeps (AdamW's two float32 moments: 8 bytes a trained parameter), for bf16 weights a float32
      master (4 bytes more), and with `ema` an average (4 more). A step's float32 copies of bf16 gradients live for a
      moment and are not counted.
    - activations: see `trace_step`.
    """
    packed = packed or {}
    weights = sum(packed.get(id(p), p.numel() * p.element_size()) for p in model.parameters())
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = sum(p.numel() * p.element_size() for p in trained.values())
    copies = {n: p.numel() * 4 * ((p.dtype != torch.float32) + ema) for n, p in trained.items()}
    kept = sum(copies[n] + state_bytes(optimizer, n, p.shape) for n, p in trained.items())
    return Memory(process, weights, gradients, kept, trace.kept, trace.checkpointed, checkpointing)


def trace_step(
    model: OpticNerveForConditionalGeneration, *, rows: int, length: int, media: dict[str, int], supervised: int
) -> Trace:
    """Send one micro-batch of `rows` × `length` tokens and its media through the meta model, there and back.

    `media`: by modality, how many pieces (images or tiles, windows of sound) the micro-batch holds.

    The bytes kept are those of all tensors that autograd saves for the backward pass, each storage once, parameters not
    counted. Tensors whose last two sides are the length of the sequence are left out: fused attention never makes them.
    To it come logits and their gradient at the supervised positions, in the model's dtype and in float32:
    `supervised × vocabulary × (2 × 4 + bytes)`. With gradient checkpointing, each layer keeps its input alone
    (`layers × rows × length × width × bytes`), and one layer at a time is whole: `kept / layers` more.

    The meta device takes attention apart, which a real device does in one kernel that keeps less: measured on a 135M
    Llama, the estimate is a fifth above what autograd really keeps. On the other hand the allocator, and the encoder's
    forward pass for a moment, need more than is counted here.
    """
    if any(p.device.type != "meta" for p in model.parameters()):
        raise OpticNerveError("trace_step counts on the meta device; give it a `meta_model`", kind="missing-field")
    language = model.language_model
    embedding: Any = model.get_input_embeddings()
    width, dtype = embedding.embedding_dim, embedding.weight.dtype
    saved, counted = _Saved(model, length), {grouped_product(): _grouped_flops}
    with torch.device("meta"), FlopCounterMode(display=False, custom_mapping=counted) as counter:
        with torch.autograd.graph.saved_tensors_hooks(saved.note, lambda t: t):
            prompt = Prompt()
            for modality, tower in model.towers.items():
                if pieces := media.get(modality):
                    soft = _soft_tokens(tower, pieces, dtype)
                    prompt.soft[modality] = soft.tokens_BND
                    prompt.seen[modality] = tower.fusion.imagine(rows, length, soft)
            embeds = torch.empty(rows, length, width, dtype=dtype)
            opened = embedding.weight.requires_grad
            embeds.requires_grad_(opened or any(s.requires_grad for s in prompt.soft.values()))
            # A mask of its own, for deriving one would ask the meta device for values.
            mask = torch.empty(rows, 1, length, length, dtype=dtype)
            positions = torch.empty(rows, length, dtype=torch.long)
            with model.multimodal_context(prompt):
                hidden = language.base_model(
                    inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
                )[0]
        if hidden.requires_grad:
            hidden.backward(torch.empty_like(hidden), retain_graph=True)
        for soft_BND in prompt.soft.values():
            if soft_BND.requires_grad:
                soft_BND.backward(torch.empty_like(soft_BND))
    for parameter in model.parameters():
        parameter.grad = None
    head: Any = language.get_output_embeddings()
    vocabulary, head_ways = head.weight.shape[0], 3 if head.weight.requires_grad else 2
    flops = counter.get_total_flops() + 2 * head_ways * supervised * width * vocabulary
    logits = supervised * vocabulary * (8 + dtype.itemsize)
    layers = max((len(m) for m in language.modules() if isinstance(m, nn.ModuleList)), default=1)
    inputs = layers * rows * length * width * dtype.itemsize
    return Trace(saved.bytes + logits, inputs + saved.bytes // layers + logits, flops)


def _grouped_flops(a_shape: Any, b_shape: Any, *args: Any, **kwargs: Any) -> int:
    """Of products with the experts' matrices, each with its own rows: torch's counter passes over them. Rows × in times
    (experts, in, out), or, for a gradient of these, in × rows times rows × out."""
    return 2 * int(a_shape[0]) * int(a_shape[1]) * int(b_shape[-1])


def _soft_tokens(tower: Tower, pieces: int, dtype: torch.dtype) -> Any:
    """What connector and encoder make of so many pieces; arranging tiles costs nothing."""
    features = blank_features(tower, pieces, dtype)
    return tower.connector(features, *[torch.empty(pieces, 16, dtype=torch.long)] * (2 * tower.wants_text))


def blank_features(tower: Tower, pieces: int, dtype: torch.dtype) -> Any:
    """What the encoder makes of so many pieces; pictures that keep their shape are taken to fill the budget."""
    if (native := tower.encoder.native) is None:
        return tower.encoder(torch.empty(pieces, *tower.encoder.media_shape, dtype=dtype))
    (rows, columns), shape = native.largest, tower.encoder.media_shape
    patches_PE = torch.empty(pieces * rows * columns, *shape, dtype=dtype)
    return tower.encoder(patches_PE, [native.largest] * pieces)


class _Saved:
    """Sums what autograd saves; each storage once."""

    def __init__(self, model: nn.Module, length: int) -> None:
        self.length, self.bytes = length, 0
        # Held, so that no address is used twice while we count.
        storages = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
        self.known = {StorageWeakRef(s): s for s in storages}

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        place = StorageWeakRef(storage)
        square = tensor.ndim > 2 and tensor.shape[-1] == tensor.shape[-2] == self.length
        if place not in self.known and not square:
            self.known[place] = storage
            self.bytes += storage.nbytes()
        return tensor


def device() -> dict[str, Any]:
    """Where training would run and what there is: `type`, `name`, `cores`, `memory` and `free` in bytes."""
    if torch.cuda.is_available():
        kind, name = "cuda", torch.cuda.get_device_name()
        free, total = torch.cuda.mem_get_info()
    else:
        kind, name, memory = default_device(), platform.processor() or platform.machine(), psutil.virtual_memory()
        free, total = memory.available, memory.total
    return {"type": kind, "name": name, "cores": os.cpu_count(), "memory": total, "free": free}


def process_bytes() -> int:
    """What this process holds, with Python and torch loaded and no weights."""
    return int(psutil.Process().memory_info().rss)


def time_step(step: Callable[[], Any], kind: str) -> float:
    """Seconds of one call, after a first one that warms up."""
    wait_for(step, kind)
    started = time.perf_counter()
    wait_for(step, kind)
    return time.perf_counter() - started
