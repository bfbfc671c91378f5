"""AdamW whose state lies in DeepSpeed's flat partitions: the same steps as `MasterAdamW`, the same state in files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from opticnerve.private_names import start_optimizer_state
from opticnerve.train.freeze import Frozen
from opticnerve.train.optim import decay_groups
from opticnerve.types import OpticNerveError

if TYPE_CHECKING:
    from opticnerve.train.zero import Zero

MOMENTS = ("exp_avg", "exp_avg_sq")


class StillAdamW(torch.optim.AdamW):
    """AdamW that DeepSpeed steps, one flat group after the other; what a step may move is said before it.

    Attributes:
        names: of each group, the weights in it. still: nothing moves. resting: towers whose weights do not. scale: a
            factor on all gradients.
    """

    def __init__(self, frozen: Frozen, *, betas: tuple[float, float], weight_decay: float) -> None:
        self.still, self.scale, self.resting = False, 1.0, set[str]()
        tensors = [list(group.values()) for group in frozen.groups.values()]
        groups = decay_groups(list(frozen.groups), tensors, weight_decay)
        name_of = {id(p): n for group in frozen.groups.values() for n, p in group.items()}
        self.names = [[name_of[id(p)] for p in group["params"]] for group in groups]
        super().__init__(groups, lr=0.0, betas=betas, fused=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for flat in group["params"]:
                if self.still or group["part"].partition(".")[0] in self.resting:
                    flat.grad = None
                elif flat.grad is not None:
                    flat.grad.mul_(self.scale)
        super().step()


class ZeroAdamW:
    """The optimizer of a stage under ZeRO: what `MasterAdamW` does, over shares.

    Args:
        frozen: what trains: the weights that DeepSpeed has.
    """

    def __init__(self, frozen: Frozen, adam: StillAdamW, zero: Zero) -> None:
        self.adam, self._zero, self._rates = adam, zero, dict(frozen.rates)
        self._weights: dict[str, Any] = {n: p for group in frozen.groups.values() for n, p in group.items()}
        around = zero.partitions
        self._flats = around.single_partition_of_fp32_groups if zero.stage == 2 else around.fp32_partitioned_groups_flat
        for flat in self._flats:  # at once: a checkpoint may be written before anything has moved
            step = torch.zeros((), dtype=torch.float32, device=flat.device)
            adam.state[flat] = {"step": step, **{m: torch.zeros_like(flat) for m in MOMENTS}}
        if zero.stage == 2:
            start_optimizer_state(around)

    def backward(self, batches: Sequence[Any], factor: float) -> Tensor:
        """Gradients of `factor` × the loss sums of a step, averaged over processes; this process's loss sum."""
        return self._zero.backward(batches, factor)

    def clip(self, limit: float | None) -> Tensor:
        """Settle that the gradients' norm will be `limit` at most; returns the norm before, a scalar."""
        grads = [g for group in self._zero.partitions.averaged_gradients.values() for g in group]
        square = torch.stack([g.float().square().sum() for g in grads]).sum()
        dist.all_reduce(square)
        norm = square.sqrt()
        self.adam.scale = 1.0 if limit is None else min(1.0, limit / (float(norm) + 1e-6))
        return norm

    def rest(self, tower: str) -> None:
        """Let the weights of a tower stay as they are in this step."""
        self.adam.resting.add(tower)

    def move(self, factor: float) -> None:
        """Take the step that the gradients say."""
        for group in self.adam.param_groups:
            group["lr"] = self._rates[group["part"]] * factor
        self._zero.step()
        self.adam.resting.clear()

    def drop(self) -> None:
        """Forget the gradients of this step."""
        self.adam.still = True
        self._zero.step()
        self.adam.still = False
        self.adam.resting.clear()

    def master_tensors(self) -> dict[str, Tensor]:
        """The names of what trains; the values are whole in `state_dict` alone."""
        return dict(self._weights)

    def state_dict(self, *, keep: bool = True) -> dict[str, Any]:
        """Moments and masters, whole, as `MasterAdamW` gives them; nothing on processes that say `keep=False`."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state, masters, groups, number = {}, {}, [], 0
        for names, flat, group in zip(self.adam.names, self._flats, self.adam.param_groups, strict=True):
            step = self.adam.state[flat]["step"].cpu()
            for k, name in enumerate(names, number):
                weight = self._weights[name]
                master = safe_get_full_fp32_param(weight)
                moments = {m: safe_get_full_optimizer_state(weight, m) for m in MOMENTS}
                if keep:
                    masters[name] = master.cpu()
                    if step:  # as torch: no state before the first step
                        state[k] = {"step": step.clone(), **{m: v.cpu() for m, v in moments.items()}}
            own = {key: value for key, value in group.items() if not key.startswith("_ds")}
            groups.append({**own, "params": list(range(number, number + len(names)))})
            number += len(names)
        return {"adam": {"state": state, "param_groups": groups}, "masters": masters}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly, whichever engine wrote the state.

        Raises:
            OpticNerveError: weights of one part have moved differently often, which DeepSpeed cannot go on with.
        """
        number = 0
        for names, flat in zip(self.adam.names, self._flats, strict=True):
            given = {n: state["adam"]["state"].get(k) for k, n in enumerate(names, number)}
            steps = {float(values["step"]) for values in given.values() if values is not None}
            if len(steps) > 1:
                raise OpticNerveError(
                    f"the checkpoint's weights ({names[0]} …) have taken {sorted(steps)} steps, which DeepSpeed counts "
                    f"as one; resume by FSDP2 or DDP"
                )
            self.adam.state[flat]["step"].fill_(max(steps, default=0.0))
            for name, values in given.items():
                self._put(self._weights[name], state["masters"][name], values)
            number += len(names)

    def _put(self, weight: Any, master: Tensor, moments: dict[str, Tensor] | None) -> None:
        """Give a weight its master and moments; each process keeps its share."""
        from deepspeed import utils

        with self._zero.gathered([weight], write=True):
            weight.copy_(master)
        values: dict[str | None, Tensor] = {None: master}
        values |= {m: moments[m] for m in MOMENTS} if moments else {}
        for key, value in values.items():
            value = value.to(weight.device, torch.float32)
            if self._zero.stage == 2:
                weight.set_full_hp_param(value, key)
                continue
            # DeepSpeed's own way to set a whole tensor stumbles over lengths that do not divide evenly.
            share = weight.ds_tensor.numel()
            padded = torch.zeros(share * dist.get_world_size(), device=weight.device)
            padded[: value.numel()] = value.flatten()
            mine = padded[share * dist.get_rank() :][:share]
            if key is None:
                utils.safe_set_local_fp32_param(weight, mine)
            else:
                utils.safe_set_local_optimizer_state(weight, mine, key)
