"""Direct preference optimisation: of two answers about a picture the model comes to prefer the one that people chose
(Rafailov et al. 2023, equation 7)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from opticnerve.data.collators.preference import PreferenceBatch, PreferenceCollator
from opticnerve.objectives.base import Objective
from opticnerve.objectives.next_token import batch_logits
from opticnerve.types import OpticNerveError

if TYPE_CHECKING:
    from opticnerve.recipe import Stage


class DPO(Objective):
    """The loss of P pairs of answers, against the model as it stood when the stage began.

    That reference costs no second model: the weights that the stage trains (an adapter, a connector) are kept as they
    were, and put back for a forward pass without gradients.

    Args:
        model: a docked model; what trains must be set before (`train.freeze`).
        beta: how dear it is to leave the reference.
        loss: "sigmoid" (Rafailov et al. 2023), or "ipo" (Azar et al. 2023, equation 17; answers' mean log-probability
            a token, as TRL has it).
        label_smoothing: the share of pairs thought to be labelled the wrong way round (Mitchell 2023, "cDPO").
        sft: weight of the chosen answer's negative log-likelihood a token, added to the loss (Pang et al. 2024,
            "iterative reasoning preference optimisation", equation 1).

    `metrics`: `accuracy` (pairs whose chosen answer has the higher reward), `margin`, `chosen` and `rejected` rewards
    (beta × log-probability over the reference's), means over the pairs.
    """

    def __init__(
        self, model: Any, *, beta: float = 0.1, loss: Literal["sigmoid", "ipo"] = "sigmoid",
        label_smoothing: float = 0.0, sft: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(model)
        if not beta > 0:
            raise OpticNerveError(f"dpo: beta is {beta}; give a positive number such as 0.1", kind="out-of-range")
        if loss not in ("sigmoid", "ipo"):
            raise OpticNerveError(f"dpo: unknown loss {loss!r}; known: sigmoid, ipo", kind="unknown-name")
        if not 0 <= label_smoothing < 0.5:
            raise OpticNerveError(
                f"dpo: label_smoothing is {label_smoothing}; give 0 or more, and less than 0.5", kind="out-of-range"
            )
        if sft < 0:
            raise OpticNerveError(f"dpo: sft is {sft}; give 0 or more", kind="out-of-range")
        self.beta, self.loss, self.label_smoothing, self.sft = beta, loss, label_smoothing, sft
        # A plain list: parameters of a module would be trained and saved.
        self._reference = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]

    @classmethod
    def collator(cls, processor: Any, stage: Stage, seed: int) -> PreferenceCollator:
        return PreferenceCollator(processor, max_length=stage.max_length)

    def forward(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """The float32 loss sum over pairs, and their number."""
        with torch.no_grad(), self._as_reference():
            reference_P2, _ = log_likelihoods(self.model, batch)
        policy_P2, tokens_P2 = log_likelihoods(self.model, batch)
        gain_P2 = policy_P2 - reference_P2
        if self.loss == "ipo":
            mean_P2 = gain_P2 / tokens_P2
            loss_P = (mean_P2[:, 0] - mean_P2[:, 1] - 1 / (2 * self.beta)).square()
        else:
            lead_P = self.beta * (gain_P2[:, 0] - gain_P2[:, 1])
            loss_P = -(1 - self.label_smoothing) * F.logsigmoid(lead_P) - self.label_smoothing * F.logsigmoid(-lead_P)
        if self.sft:
            loss_P = loss_P - self.sft * policy_P2[:, 0] / tokens_P2[:, 0]
        self.add_sources(batch.sources, loss_P)
        rewards_P2 = self.beta * gain_P2.detach()
        chosen, rejected = rewards_P2.mean(0)
        right = (rewards_P2[:, 0] > rewards_P2[:, 1]).float().mean()
        self.metrics = {"accuracy": right, "margin": chosen - rejected, "chosen": chosen, "rejected": rejected}
        return loss_P.sum(), loss_P.new_full((), batch.samples, dtype=torch.long)

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        """Within it the model has the weights that it had before the stage, and no dropout."""
        training = [m for m in self.model.modules() if m.training]
        now = []
        for k, (parameter, before) in enumerate(self._reference):
            if isinstance(parameter.data, DTensor):
                raise OpticNerveError(
                    "dpo keeps whole weights and cannot run where they are sharded; use DDP", kind="unsupported"
                )
            if before.device != parameter.device:
                before = before.to(parameter.device)
                self._reference[k] = parameter, before
            now.append(parameter.data)
            parameter.data = before
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for (parameter, _), data in zip(self._reference, now, strict=True):
                parameter.data = data
            for module in training:
                module.training = True


def log_likelihoods(model: nn.Module, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    """Of each pair's chosen and rejected answer: log-probability (P, 2), float32, and number of tokens (P, 2)."""
    targets_M, slots_M = (t.flatten()[batch.learned_M] for t in (batch.targets, batch.slots_BL))
    log_M = -F.cross_entropy(batch_logits(model, batch).float(), targets_M, reduction="none")
    sums = log_M.new_zeros(2 * batch.samples).index_add(0, slots_M, log_M)
    tokens = slots_M.new_zeros(2 * batch.samples).index_add(0, slots_M, torch.ones_like(slots_M))
    return sums.view(-1, 2), tokens.view(-1, 2)
