"""What a training step costs: bytes and arithmetic, counted on the meta device, and seconds, measured or estimated.

Nothing is guessed per architecture: one micro-batch is sent through the model and back without memory; what lives at
the same time is added up, and by torch's formulas how much would be computed.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakSet, finalize

import psutil
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from opticnerve.common.private_names import grouped_product, keep_activations, operations, tensors_in
from opticnerve.inference.load import default_device
from opticnerve.models.vlm.prompt import Prompt
from opticnerve.ops.attention import plain_attention
from opticnerve.ops.fused_layers import fuse_layers
from opticnerve.ops.head import loss_in_pieces
from opticnerve.ops.segments import segments_of
from opticnerve.ops.varlen import supported, within
from opticnerve.train.memory import checkpoint_layers
from opticnerve.train.optim import state_bytes
from opticnerve.train.throughput import wait_for
from opticnerve.types import OpticNerveError

if TYPE_CHECKING:
    from opticnerve.models.family import FamilyModel
    from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
    from opticnerve.models.vlm.tower import Tower
    from opticnerve.objectives.base import Objective

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
    """One micro-batch on the meta device: bytes at its peak beside what the model and the optimizer hold, gradients
    among them; and floating-point operations both ways."""

    peak: int
    flops: int


def memory(
    model: nn.Module, plain: Trace, again: Trace, *, checkpointing: bool, process: int,
    packed: dict[int, int] | None = None, optimizer: str = "adamw", ema: bool = False, accumulate: int = 1,
    own: Mapping[str, nn.Parameter] = MappingProxyType({}),
) -> Memory:  # fmt: skip
    """Bytes of a step, by the rules of this package's optimizer.

    - weights: every parameter in its dtype; tied ones once. `packed`: the bytes of those that will be quantised, by id.
    - gradients: trained parameters in their dtype.
    - optimizer: what it keeps (AdamW's two float32 moments: 8 bytes a trained parameter), for bf16 weights a float32
      master (4 bytes more), and with `ema` an average (4 more).
    - activations: what the peak needs beside these. It comes in the backward pass, where some activations are gone and
      not all gradients are there yet (`trace_step`; with `accumulate`, float32 gradients of earlier micro-batches lie
      beside it), or in the optimizer's step, which has the gradients in float32.

    Args:
        plain, again: traces without and with gradient checkpointing.
        own: what trains of the objective's own; its weights are among what was traced.
    """
    packed = packed or {}
    weights = sum(packed.get(id(p), p.numel() * p.element_size()) for p in model.parameters())
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad} | dict(own)
    gradients = sum(p.numel() * p.element_size() for p in trained.values())
    copies = {n: p.numel() * 4 * ((p.dtype != torch.float32) + ema) for n, p in trained.items()}
    kept = sum(copies[n] + state_bytes(optimizer, n, p.shape) for n, p in trained.items())
    whole = sum(p.numel() * 4 for p in trained.values())  # gradients in float32

    def activations(trace: Trace) -> int:
        return max(trace.peak + (whole if accumulate > 1 else 0), whole, gradients) - gradients

    return Memory(process, weights, gradients, kept, activations(plain), activations(again), checkpointing)


def trace_step(
    model: OpticNerveForConditionalGeneration, *, rows: int, length: int, media: dict[str, int], supervised: int,
    recompute: int = 0, together: int = 1,
) -> Trace:  # fmt: skip
    """Send one micro-batch of `rows` × `length` tokens and its media through the meta model, there and back.

    Args:
        media: by modality, how many pieces (images or tiles, windows of sound) the micro-batch holds.
        recompute: of how many layers the activations are computed again.
        together: micro-batches of a step, whose media lie on the device at the same time.

    Layers, attention and head are those that a stage trains with. Tensors whose last two sides are the length of the
    sequence are left out: fused attention never makes them. The allocator's own need is not in it.
    """
    if any(p.device.type != "meta" for p in model.parameters()):
        raise OpticNerveError("trace_step counts on the meta device; give it a `meta_model`", kind="missing-field")
    language = model.language_model
    embedding: Any = model.get_input_embeddings()
    width, dtype = embedding.embedding_dim, embedding.weight.dtype
    live, segments = _Live(model, length), None
    if supported(language):
        rows_BL = torch.arange(length).expand(rows, -1)
        alone_BL = torch.zeros_like(rows_BL)
        segments = replace(segments_of(alone_BL, alone_BL, rows_BL), kernel="buckets")
    with (
        _recomputed(model, recompute), torch.device("meta"), operations(live.take_down), fuse_layers(language),
        plain_attention(model),
    ):  # fmt: skip
        prompt, pixels = Prompt(), []
        for modality, tower in model.towers.items():
            if pieces := media.get(modality):
                # Batches have them in float32 until the step is done.
                count = together - (dtype == torch.float32)
                pixels.append(torch.empty(count * pieces, *_input_shape(tower), dtype=torch.float32))
                soft = _soft_tokens(tower, pieces, dtype)
                prompt.soft[modality] = soft.tokens_BND
                prompt.seen[modality] = tower.fusion.imagine(rows, length, soft)
        embeds = torch.empty(rows, length, width, dtype=dtype)
        opened = embedding.weight.requires_grad
        embeds.requires_grad_(opened or any(s.requires_grad for s in prompt.soft.values()))
        # A mask of its own, for deriving one would ask the meta device for values.
        mask = None if segments is not None else torch.empty(rows, 1, length, length, dtype=dtype)
        positions = torch.empty(rows, length, dtype=torch.long)
        with model.multimodal_context(prompt), within(language, segments):
            hidden = language.base_model(
                inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
            )[0]
        counted, head = live.flops, language.get_output_embeddings()
        learned_MD = hidden.detach().flatten(0, 1)[:supervised].requires_grad_(hidden.requires_grad)
        loss_M = loss_in_pieces(head, learned_MD, torch.empty(len(learned_MD), dtype=torch.long))
        if loss_M.requires_grad:
            loss_M.sum().backward()
        del loss_M, learned_MD
        live.flops = counted
        ends = [t for t in (hidden, *prompt.soft.values()) if t.requires_grad]
        if ends:
            torch.autograd.backward(ends, [torch.empty_like(t) for t in ends])
        for parameter in model.parameters():
            parameter.grad = None
    vocabulary, head_ways = head.weight.shape[0], 3 if head.weight.requires_grad else 2
    flops = live.flops + 2 * head_ways * supervised * width * vocabulary
    return Trace(live.peak, flops)


def _grouped_flops(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int:
    """Of products with the experts' matrices, each with its own rows: torch's counter passes over them. Rows × in times
    (experts, in, out), or, for a gradient of these, in × rows times rows × out."""
    return 2 * a.shape[0] * a.shape[1] * b.shape[-1]


_ATEN = torch.ops.aten
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry, grouped_product(): _grouped_flops,
    _ATEN.addmm_: flop_registry[_ATEN.addmm], _ATEN.baddbmm_: flop_registry[_ATEN.baddbmm],
}  # fmt: skip


def _soft_tokens(tower: Tower, pieces: int, dtype: torch.dtype) -> Any:
    """What connector and encoder make of so many pieces; arranging tiles costs nothing."""
    features = blank_features(tower, pieces, dtype)
    return tower.connector(features, *[torch.empty(pieces, 16, dtype=torch.long)] * (2 * tower.wants_text))


def blank_features(tower: Tower, pieces: int, dtype: torch.dtype) -> Any:
    """What the encoder makes of so many pieces; pictures that keep their shape are taken to fill the budget."""
    pixels = torch.empty(pieces, *_input_shape(tower), dtype=dtype)
    if (native := tower.encoder.native) is None:
        return tower.encoder(pixels)
    return tower.encoder(pixels.flatten(0, 1), [native.largest] * pieces)


def _input_shape(tower: Tower) -> tuple[int, ...]:
    """What an encoder is given for a piece; (patches, …) where pictures keep their shape."""
    shape = tuple(tower.encoder.media_shape)
    return shape if (native := tower.encoder.native) is None else (math.prod(native.largest), *shape)


def trace_objective(
    make: Callable[[], Objective], batches: Sequence[Any], model: FamilyModel, *, recompute: int = 0
) -> tuple[Trace, dict[str, nn.Parameter]]:
    """Send the micro-batches of a step, as the objective's collator made them, through it over the meta model, there
    and back. They lie on the device together; all are computed where the objective takes a step's batch whole, else
    one.

    What a batch says of itself stays known on the host (`common.on_host`): an objective that asks the device for
    nothing in a step, as those here, runs as it does in training.

    Args:
        make: the objective, whose own weights and what it keeps (DPO's reference) are counted.

    Returns: the trace of a micro-batch, and the objective's own parameters.

    Raises:
        OpticNerveError: it asks tensors for their numbers, or refuses the batch.
    """
    language: Any = model.language_model
    whole = cast(nn.Module, model)
    live = _Live(whole, _length(batches[0]))
    with _recomputed(model, recompute), operations(live.take_down):
        with torch.device("meta"):
            objective = make()
        with fuse_layers(language or nn.Module()), plain_attention(whole):
            try:
                taken = [batch.to("meta") for batch in batches]
                if objective.whole_step:
                    objective.backward(taken, 1.0)
                else:
                    loss, _ = objective(taken[0])
                    if loss.requires_grad:
                        loss.backward()
                    del loss
            except RuntimeError as e:
                reason = str(e).partition("\n")[0]
                raise OpticNerveError(f"it cannot be computed without numbers: {reason}", kind="unsupported") from e
            finally:
                for parameter in objective.parameters():
                    parameter.grad = None
    flops = live.flops // (len(batches) if objective.whole_step else 1)
    return Trace(live.peak, flops), objective.own_parameters()


def _length(batch: object) -> int:
    """Tokens of a row of a batch that has such."""
    ids = getattr(batch, "input_ids", None)
    return int(ids.shape[1]) if isinstance(ids, Tensor) else 0


@contextmanager
def _recomputed(model: FamilyModel, layers: int) -> Iterator[None]:
    """Within it the activations of so many layers are computed again, and all modules train that did before."""
    if not layers:
        yield
        return
    training = [m for m in model.modules() if m.training]
    checkpoint_layers(model, layers)
    try:
        yield
    finally:
        keep_activations(model.language_model)
        model.eval()
        for module in training:
            module.training = True


class _Live:
    """Sums what lives, each storage once, from where it is made to where nobody holds it, and floating-point
    operations, as torch's counter, which itself would hold gradients.

    What the model holds is not counted, nor what is as long as the sequence both ways: scores that fused attention
    never makes.
    """

    def __init__(self, model: nn.Module, length: int) -> None:
        self.length, self.bytes, self.peak, self.flops = length, 0, 0, 0
        self.model = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
        self.known = WeakSet[torch.UntypedStorage](self.model)

    def take_down(self, operation: object, args: tuple[Any, ...], kwargs: dict[str, Any], out: object) -> None:
        if (formula := _FLOPS.get(operation)) is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        for made in tensors_in(out):
            if made.device.type == "meta":
                storage = made.untyped_storage()
                if storage not in self.known and not self._square(made):
                    self.bytes += (size := storage.nbytes())
                    self.peak = max(self.peak, self.bytes)
                    finalize(storage, self._freed, size).atexit = False
                self.known.add(storage)

    def _square(self, tensor: Tensor) -> bool:
        return tensor.ndim > 2 and tensor.shape[-1] == tensor.shape[-2] == self.length

    def _freed(self, size: int) -> None:
        self.bytes -= size


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
