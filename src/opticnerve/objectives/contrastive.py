"""The contrastive objectives: a picture and its own words closer together than any other pair of the batch.

CLIP's softmax loss (Radford et al. 2021, Learning Transferable Visual Models, figure 3) asks "which of these captions
is this picture's?", and the other way round; SigLIP's sigmoid loss (Zhai et al. 2023, Sigmoid Loss for Language Image
Pre-Training, section 3.2) asks of each pair alone "do these two belong together?".

The batch is what gives the negatives, so it must be big, and its pieces cannot be added up like the tokens of a
language model. Two means keep the loss that of one big batch: embeddings are gathered across processes with their
gradients, and GradCache (Gao et al. 2021, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup,
section 3) computes all embeddings without a graph, the loss and its gradient on them once, and then each micro-batch
again with its graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from opticnerve.common.on_host import on_host
from opticnerve.data.collators.contrastive import PairBatch, PairCollator
from opticnerve.objectives.base import Objective, gather, processes
from opticnerve.types import MediaProcessor, OpticNerveError

if TYPE_CHECKING:
    from opticnerve.recipe import Stage

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
MAX_SCALE = 100.0
"""CLIP's bound on the learned temperature: logits are scaled by no more (Radford et al. 2021, section 2.5). SigLIP has
none."""


@dataclass(frozen=True)
class Negatives:
    """What this process's pairs are told apart from: the embeddings of all processes, its own among them.

    `image_ND`, `text_ND`: L2-normalised. `first`: where this process's rows begin. `twin_BN`: True where row i of this
    process and row j of all say the same or show the same, though they are different pairs: no negatives.
    """

    image_ND: Tensor
    text_ND: Tensor
    first: int = 0
    twin_BN: Tensor | None = None


def clip_loss(image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor, negatives: Negatives | None = None) -> Tensor:
    """CLIP's loss, summed over this process's B pairs (divide by the number of all pairs for the mean); as
    `clip_losses`."""
    return clip_losses(image_BD, text_BD, logit_scale, negatives).sum()


def clip_losses(image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor, negatives: Negatives | None = None) -> Tensor:
    """CLIP's loss of each of this process's pairs (B,): the mean of its picture's and its text's.

    Args:
        image_BD, text_BD: embeddings of pairs, L2-normalised. logit_scale: what cosines are multiplied by (scalar).
        negatives: of all processes; this batch itself by default. Twins are left out of the softmax.
    """
    negatives = negatives or Negatives(image_BD, text_BD)
    _check_pairs(image_BD, text_BD)
    own_B = torch.arange(len(image_BD), device=image_BD.device) + negatives.first
    losses_B = image_BD.new_zeros(len(image_BD))
    for mine_BD, others_ND in ((image_BD, negatives.text_ND), (text_BD, negatives.image_ND)):
        logits_BN = logit_scale * mine_BD @ others_ND.T
        if negatives.twin_BN is not None:
            logits_BN = logits_BN.masked_fill(negatives.twin_BN, float("-inf"))
        losses_B = losses_B + F.cross_entropy(logits_BN, own_B, reduction="none") / 2
    return losses_B


def siglip_loss(
    image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor, logit_bias: Tensor, negatives: Negatives | None = None
) -> Tensor:
    """SigLIP's loss, summed over this process's B pictures against all N texts; as `siglip_losses`."""
    return siglip_losses(image_BD, text_BD, logit_scale, logit_bias, negatives).sum()


def siglip_losses(
    image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor, logit_bias: Tensor, negatives: Negatives | None = None
) -> Tensor:
    """SigLIP's loss of each of this process's pictures (B,) against all N texts.

    As in the paper and in transformers, the mean is taken over pictures, not over the N² pairs. Twins count neither as
    positive nor as negative.
    """
    negatives = negatives or Negatives(image_BD, text_BD)
    _check_pairs(image_BD, text_BD)
    rows_B = torch.arange(len(image_BD), device=image_BD.device)
    sign_BN = -torch.ones(len(image_BD), len(negatives.text_ND), device=image_BD.device, dtype=image_BD.dtype)
    sign_BN[rows_B, rows_B + negatives.first] = 1.0
    loss_BN = -F.logsigmoid(sign_BN * (logit_scale * image_BD @ negatives.text_ND.T + logit_bias))
    if negatives.twin_BN is not None:
        loss_BN = loss_BN.masked_fill(negatives.twin_BN, 0.0)
    return loss_BN.sum(1)


class Contrastive(Objective):
    """(batch) → (loss sum, count) for a `DualEncoder`, over the pairs of all processes.

    Args:
        model: `embed(batch)` gives normalised float32 (image_BD, text_BD); `config.loss` is "clip" or "siglip";
            `logit_scale` (the logarithm of the factor) and `logit_bias` are its temperature.
        duplicates: what to do where two pairs of the whole batch have the same caption or the same picture, and so
            are no negatives of each other. "refuse" raises and names them; "mask" leaves such pairs out of the loss.
    """

    whole_step = in_batch = True

    def __init__(self, model: Any, *, duplicates: Literal["refuse", "mask"] = "refuse") -> None:
        super().__init__(model)
        if duplicates not in ("refuse", "mask"):
            raise OpticNerveError(f"duplicates is 'refuse' or 'mask', not {duplicates!r}", kind="unknown-name")
        self.duplicates = duplicates

    @classmethod
    def collator(cls, processor: MediaProcessor, stage: Stage, seed: int) -> PairCollator:
        """What makes batches of captioned pictures; the stage's `max_length` is the captions'."""
        return PairCollator(processor, max_length=stage.max_length)

    def forward(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """The float32 loss sum over this process's pairs, and their number."""
        self._bound_temperature()
        image_BD, text_BD = self.model.embed(batch)
        return self._loss(image_BD, text_BD, [batch]), batch.image_keys.new_full((), len(image_BD))

    def backward(self, batches: Sequence[Any], scale: float, *, after_each: Callable[[], None] | None = None) -> Tensor:
        """Gradients of `scale` × the loss of all micro-batches as one big batch, added to `.grad`; returns this
        process's loss sum.

        On several processes the gradients are summed over them here; the module is not to be wrapped in
        `DistributedDataParallel`. `after_each` is called whenever gradients have been added (to collect them).

        Raises:
            OpticNerveError: a batch norm is in training while there are several micro-batches: its statistics would be
                those of a micro-batch, and the gradients not the big batch's.
        """
        self._bound_temperature()
        if len(batches) == 1:
            image_BD, text_BD = self.model.embed(batches[0])
            loss = self._loss(image_BD, text_BD, batches)
            (loss * scale).backward()
        else:
            loss = self._cached_backward(batches, scale, after_each)
        if processes()[1] > 1:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
        if after_each is not None:
            after_each()
        return loss.detach()

    def _cached_backward(self, batches: Sequence[Any], scale: float, after_each: Callable[[], None] | None) -> Tensor:
        _refuse_batch_norm(self.model)
        states, cached = [], []
        with torch.no_grad():
            for batch in batches:
                states.append((torch.get_rng_state(), get_device_states(batch.input_ids)))
                cached.append(self.model.embed(batch))
        image_BD, text_BD = (torch.cat(part).requires_grad_() for part in zip(*cached, strict=True))
        loss = self._loss(image_BD, text_BD, batches)
        (loss * scale).backward()  # fills the embeddings' gradients, and the temperature's
        assert image_BD.grad is not None
        assert text_BD.grad is not None
        sizes = [len(image) for image, _ in cached]
        parts = zip(batches, states, image_BD.grad.split(sizes), text_BD.grad.split(sizes), strict=True)
        for batch, (state, (devices, device_states)), image_grad_BD, text_grad_BD in parts:
            # The same dropout as in the first pass; afterwards the generators stand where one pass leaves them.
            with torch.random.fork_rng(devices):
                torch.set_rng_state(state)
                set_device_states(devices, device_states, device_type=batch.input_ids.device.type)
                again = self.model.embed(batch)
            graded = [(e, g) for e, g in zip(again, (image_grad_BD, text_grad_BD), strict=True) if e.requires_grad]
            if graded:
                torch.autograd.backward([e for e, _ in graded], [g for _, g in graded])
            if after_each is not None and processes()[1] == 1:
                after_each()
        return loss

    def _loss(self, image_BD: Tensor, text_BD: Tensor, batches: Sequence[Any]) -> Tensor:
        negatives = self._negatives(image_BD, text_BD, batches)
        scale = self.model.logit_scale.float().exp()
        self.metrics = {"logit_scale": scale.detach()}
        if self.model.config.loss == "clip":
            losses_B = clip_losses(image_BD, text_BD, scale, negatives)
        else:
            losses_B = siglip_losses(image_BD, text_BD, scale, self.model.logit_bias.float(), negatives)
        known = [b.sources for b in batches if b.sources is not None]
        self.add_sources(torch.cat(known) if len(known) == len(batches) else None, losses_B)
        return losses_B.sum()

    def _negatives(self, image_BD: Tensor, text_BD: Tensor, batches: Sequence[Any]) -> Negatives:
        _check_pairs(image_BD, text_BD)
        keys_B2 = _keys(batches, lambda keys_B: keys_B).to(image_BD.device)
        _check_even(len(image_BD), image_BD.device)
        first = processes()[0] * len(image_BD)
        image_ND, text_ND, keys_N2 = gather(image_BD), gather(text_BD), gather(keys_B2)
        if len(image_ND) < 2:
            raise OpticNerveError(
                "a batch of 1 pair has no negatives and teaches nothing; set batch_size to 2 or more",
                kind="out-of-range",
            )
        if self.duplicates == "refuse":
            # One process knows its own on the host, where looking costs no wait.
            _refuse_duplicates(keys_N2 if processes()[1] > 1 else _keys(batches, on_host), first, batches)
            return Negatives(image_ND, text_ND, first)
        twin_BN = (keys_B2[:, None, 0] == keys_N2[None, :, 0]) | (keys_B2[:, None, 1] == keys_N2[None, :, 1])
        rows_B = torch.arange(len(keys_B2), device=twin_BN.device)
        twin_BN[rows_B, rows_B + first] = False
        return Negatives(image_ND, text_ND, first, twin_BN)

    @torch.no_grad()
    def _bound_temperature(self) -> None:
        """What the last step made of the temperature, back within CLIP's bound; a frozen one is left alone."""
        scale = self.model.logit_scale
        if self.model.config.loss == "clip" and scale.requires_grad:
            scale.clamp_(max=math.log(MAX_SCALE))


def _keys(batches: Sequence[Any], seen: Callable[[Tensor], Tensor]) -> Tensor:
    """(B, 2): the captions' and the pictures' keys of all batches, each put through `seen`."""
    return torch.cat([torch.stack([seen(b.caption_keys), seen(b.image_keys)], 1) for b in batches])


def _check_pairs(image_BD: Tensor, text_BD: Tensor) -> None:
    if len(image_BD) != len(text_BD):
        raise OpticNerveError(
            f"{len(image_BD)} pictures and {len(text_BD)} captions are no pairs; give one caption to each picture",
            kind="wrong-shape",
        )


def _check_even(pairs: int, device: torch.device) -> None:
    """All processes must bring the same number of pairs; each learns of it, so that none waits for the others."""
    if processes()[1] == 1:
        return
    counts = gather(torch.tensor([pairs], device=device)).tolist()
    if len(set(counts)) > 1:
        raise OpticNerveError(
            f"the processes bring different numbers of pairs ({', '.join(map(str, counts))}); "
            f"choose a batch_size that splits evenly",
            kind="wrong-shape",
        )


def _refuse_duplicates(keys_N2: Tensor, first: int, batches: Sequence[Any]) -> None:
    """Looks at the pairs of all processes, so that all of them raise and none waits for the others."""
    for column, what in enumerate(("caption", "picture")):
        _, place_N, times = keys_N2[:, column].unique(return_inverse=True, return_counts=True)
        repeated_N = times[place_N] > 1
        if not bool(repeated_N.any()):
            continue
        names = [f"{i} ({text!r})" for b in batches for i, text in zip(b.ids, b.captions, strict=True)]
        mine = [name for name, again in zip(names, repeated_N[first:].tolist(), strict=False) if again]
        raise OpticNerveError(
            f"{int(repeated_N.sum())} of the batch's {len(keys_N2)} pairs share their {what} with another and would be "
            f"told apart from themselves: {', '.join(mine[:4]) or 'those of other processes'}"
            f"{' …' if len(mine) > 4 else ''}; set duplicates: mask, or remove the repetitions",
            kind="conflict",
        )


def _refuse_batch_norm(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS) and module.training:
            raise OpticNerveError(
                f"{name} normalises over the batch, so micro-batches cannot give the big batch's gradients; "
                f"set accumulate: 1, or leave the part with it frozen",
                kind="conflict",
            )
