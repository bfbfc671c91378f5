"""How fast a stage trains, and against what: samples and tokens a second, the share of the time that it waited for
data, the share of the machine's matrix rate that the model's own arithmetic takes (MFU), and the peak of memory."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from opticnerve.models.family import FamilyModel
from opticnerve.models.freeze import undisturbed
from opticnerve.models.vlm.tower import MEDIA_INPUT
from opticnerve.ops import tell
from opticnerve.recipe import Stage
from opticnerve.train.state import TrainState


class Throughput:
    """The figures of one life of a stage: what came before a resume counts for none of them.

    Arithmetic is counted as PaLM's MFU counts it (Chowdhery et al. 2022, appendix B), by the sizes of matrices: two
    operations a weight and token forward, two backward for what goes in, two for the weight where it trains; the head
    for supervised tokens alone; encoders as torch's counter has it, where they run. Attention's scores, adapters and
    connectors are left out, and layers that are computed again count once. Models without a language model have no MFU.
    """

    def __init__(self, model: FamilyModel, stage: Stage, state: TrainState, *, processes: int) -> None:
        language, self.state = model.language_model, state
        self._before = state.samples, state.elapsed
        self._rate = 0.0
        device = next(model.parameters()).device
        self._gpu = device if device.type == "cuda" else None  # whose memory is told, then, and not the process's
        if language is None or stage.compile:
            return
        head = language.get_output_embeddings().weight
        self._token, self._head = _matrix_flops(language, besides=head), _weight_flops(head.numel(), head.requires_grad)
        try:
            self._piece = self._media_flops(model, stage)
        except (RuntimeError, TypeError, ValueError) as e:  # a figure for the log stops no training
            tell(f"MFU is not told: an encoder cannot be counted on the meta device: {str(e).partition(chr(10))[0]}")
            return
        self._rate = usual_matmul_rate(device.type, next(language.parameters()).dtype) * processes
        self._flops = 0.0

    @staticmethod
    def _media_flops(model: FamilyModel, stage: Stage) -> list[int]:
        """Operations for a piece of each modality; 0 where its encoder does not run."""
        return [
            0 if (tower := model.towers.get(modality)) is None or (modality == "image" and stage.cache_features)
            else encoder_flops(tower.encoder)
            for modality in MEDIA_INPUT
        ]  # fmt: skip

    def line(self, *, tokens: int, supervised: int, pieces: Sequence[int], waited: float) -> dict[str, float]:
        """Figures for a line of metrics.jsonl, after one more step: `tokens`, `supervised` and `pieces` of media (by
        modality) on all processes; `waited`: seconds for data, of this process, so far."""
        samples, elapsed = self._before
        seconds = self.state.elapsed - elapsed
        found = {
            "samples_per_second": round((self.state.samples - samples) / seconds, 3),
            "waiting": round(waited / seconds, 4),
            "peak_memory_bytes": torch.cuda.max_memory_allocated(self._gpu) if self._gpu is not None else peak_memory(),
        }
        if self._rate:
            media = sum(n * flops for n, flops in zip(pieces, self._piece, strict=True))
            self._flops += tokens * self._token + supervised * self._head + media
            found["mfu"] = round(self._flops / seconds / self._rate, 4)
        return found


def peak_memory() -> int:
    """The most memory this process has held, in bytes (Linux counts in KiB, macOS in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def encoder_flops(encoder: nn.Module) -> int:
    """Operations for one piece (a picture, a window of sound; of pictures that keep their shape a patch of one that
    fills the budget), counted on the meta device: three times as many as forward where the encoder trains."""
    tensors: dict[str, Tensor] = {**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}
    imagined = {n: torch.empty_like(t, device="meta") for n, t in tensors.items()}
    shape: tuple[int, ...] = encoder.media_shape  # type: ignore[assignment]
    kind = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
    native = getattr(encoder, "native", None)
    pieces, grids = (1, ()) if native is None else (math.prod(native.largest), ([native.largest],))
    # Of an encoder whose last blocks train, some modules are in `train()`, and others are not.
    with undisturbed(encoder), FlopCounterMode(display=False) as counter:
        media = torch.empty(pieces, *shape, dtype=kind, device="meta")
        functional_call(encoder, imagined, (media, *grids))
    trained = any(p.requires_grad for p in encoder.parameters())
    return int(counter.get_total_flops()) * (3 if trained else 1) // pieces


def _matrix_flops(language: nn.Module, *, besides: Tensor) -> int:
    """Operations a token of all matrices but the embeddings and the head. A linear layer tells its own sizes: quantised
    weights lie packed."""
    total = 0
    for module in language.modules():
        if isinstance(module, nn.Embedding):
            continue
        for weight in module.parameters(recurse=False):
            if weight.ndim >= 2 and weight is not besides:
                count = weight.numel()
                if isinstance(module, nn.Linear):
                    count = module.in_features * module.out_features
                total += _weight_flops(count, weight.requires_grad)
    return total


def _weight_flops(count: int, trained: bool) -> int:
    return 2 * count * (3 if trained else 2)


# -- the machine ------------------------------------------------------------------------------------------------------


@cache
def usual_matmul_rate(kind: str, dtype: torch.dtype) -> float:
    """`matmul_rate`, measured once in a process."""
    return matmul_rate(kind, dtype, seconds=0.1)


def matmul_rate(kind: str, dtype: torch.dtype, *, seconds: float = 0.3) -> float:
    """Floating-point operations a second of a bare matrix product of a language model's size. Training's random numbers
    stay what they are."""
    m, k, n = (8192, 4096, 4096) if kind == "cuda" else (1600, 576, 1536)
    own = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=own).to(kind, dtype) for shape in ((m, k), (k, n)))
    wait_for(lambda: a @ b, kind)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        wait_for(lambda: a @ b, kind)
        count += 1
    return 2 * m * k * n * count / (time.perf_counter() - started)


def wait_for(work: Callable[[], Any], kind: str) -> None:
    """Call it, and wait for a device's queue. (torch's `Timer` imports what warns of a CUDA without a GPU.)"""
    work()
    if kind != "cpu":
        torch.accelerator.synchronize()
