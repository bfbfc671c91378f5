"""DeepSpeed's ZeRO (Rajbhandari et al. 2020): the optimizer's state and the gradients spread over the processes (stage
2), and the weights as well (stage 3).

DeepSpeed gets to see only what it shares out: a twin of each weight that trains, and under stage 3 of all weights of
each layer of the language model and of each block of an encoder that trains. Such a layer is whole while it computes
(DeepSpeed calls it a leaf module), as a group of FSDP2 is. The rest stays whole on every process.

What a process does outside these layers depends on its pictures: a step without any puts an empty one through, and
touches weights in another order. But DeepSpeed sums gradients of different processes in the order in which they come.
So all trained weights outside the layers go through one function (`_Together`), behind which their gradients wait for
each other and arrive in the same order everywhere.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from opticnerve.common.private_names import start_optimizer_state
from opticnerve.distributed.fsdp import Twin, layers
from opticnerve.models.freeze import Frozen, decay_groups
from opticnerve.objectives.base import Objective
from opticnerve.types import AutogradContext, OpticNerveError, to_install

MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero(Twin):
    """DeepSpeed's; the weights that it shares out are the twin's own.

    Args:
        objective: frozen as the stage wants it. stage: 2 or 3, ZeRO's.

    Raises:
        OpticNerveError: DeepSpeed is not installed, or the weights that it would share out are of several dtypes.
    """

    def __init__(self, objective: Objective, *, stage: Literal[2, 3], device: torch.device) -> None:
        self._deepspeed = _import_deepspeed(device)
        self.stage, whole = stage, objective.model
        inner = [p for layer in layers(whole) for p in layer.parameters()]
        shared = [p for p in whole.parameters() if p.requires_grad] + (inner if stage == 3 else [])
        own = {id(p): nn.Parameter(p.data, requires_grad=p.requires_grad) for p in shared}
        super().__init__(objective, own)
        mine = {id(p) for p in own.values()}
        self.shares = {n: p for n, p in self.model.named_parameters() if id(p) in mine}
        dtypes = {p.dtype for p in self.shares.values()}
        if len(dtypes) > 1:
            raise OpticNerveError(
                f"DeepSpeed shares out weights of one dtype, these have {dtypes}; train by FSDP2", kind="conflict"
            )
        [self._dtype] = dtypes

    def optimizer(self, frozen: Frozen, *, betas: tuple[float, float], weight_decay: float, rows: int) -> ZeroAdamW:
        """AdamW over shares of `frozen` (as `trained` gives it). From here on DeepSpeed has the weights.

        Args:
            rows: how many rows a process has of each micro-batch (which DeepSpeed wants to know, for its counts).
        """
        adam = GatedAdamW(frozen, betas=betas, weight_decay=weight_decay)
        facade = _Facade(self.objective, self.shares, layers(self.model), stage=self.stage)
        zero = {"stage": self.stage, "overlap_comm": False, "sub_group_size": 1 << 60}
        if self.stage == 2:
            zero["compute_grad_norm"] = False  # it is computed here, before the step
        else:
            zero["stage3_param_persistence_threshold"] = 0
        half = self._dtype == torch.bfloat16
        config = {
            "train_micro_batch_size_per_gpu": rows, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True, "zero_optimization": zero, "bf16": {"enabled": half},
            "data_types": {"grad_accum_dtype": "fp32"}, "steps_per_print": 1 << 60,
        }  # fmt: skip
        adam.still = True  # DeepSpeed may try a step while it sets up
        engine, *_ = self._deepspeed.initialize(model=facade, optimizer=adam, config=config, dist_init_required=False)
        adam.still = False
        self.empty_whole()
        self.engine, self._facade = engine, facade
        return ZeroAdamW(frozen, adam, self)

    def backward(self, batches: Sequence[Any], factor: float) -> Tensor:
        """Gradients of `factor` × the loss sums of the micro-batches of a step, averaged over processes; this process's
        loss sum."""
        total = torch.zeros((), device=self.engine.device)
        for k, batch in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(k == len(batches) - 1)
            with self.gathered(self._facade.loose):
                loss = self.engine(batch)
                self.engine.backward(loss * factor, scale_wrt_gas=False)
            total += loss.detach()
        return total

    @contextmanager
    def gathered(self, weights: Sequence[Tensor], *, write: bool = False) -> Iterator[None]:
        """Within it, these weights are whole. `write`: what they are changed to (the same everywhere) holds after."""
        if self.stage == 2:
            yield
            return
        with self._deepspeed.zero.GatheredParameters(list(weights), modifier_rank=0 if write else None):
            yield

    @torch.no_grad()
    def bring_together(self) -> tuple[Any, Any]:
        """Give the whole model, on every process, the weights that the twins have come to; returns it, and its
        objective. DeepSpeed is done then."""
        own = dict(self.whole.named_parameters())
        for name, share in self.shares.items():
            with self.gathered([share]):
                own[name].data = share.detach().clone()
            if self.stage == 3:
                share.ds_tensor.data = share.ds_tensor.data.new_empty(0)
        self.engine.destroy()
        if self.stage == 3:
            from deepspeed.runtime.zero import parameter_offload

            parameter_offload.FWD_MODULE_STACK.clear()  # it would keep the twin in memory
        return self.whole, self._objective


class _Facade(nn.Module):
    """What DeepSpeed takes for the model: its layers, and the trained weights outside them."""

    def __init__(
        self, objective: Objective, shares: dict[str, nn.Parameter], layers: list[nn.Module], *, stage: int
    ) -> None:
        super().__init__()
        self._objective = [objective]  # a list: no module of this one
        inside = {id(p) for layer in layers for p in layer.parameters()}
        outside = {n: p for n, p in shares.items() if id(p) not in inside}
        self.names, self.loose = [f"model.{n}" for n in outside], list(outside.values())
        self.outside = nn.ParameterList(self.loose)
        if stage == 2:
            self.inside: nn.Module = nn.ParameterList([p for p in shares.values() if id(p) in inside])
            return
        from deepspeed.utils import set_z3_leaf_module

        self.inside = nn.ModuleList(layers)
        for layer in layers:
            set_z3_leaf_module(layer, True)
            layer.register_forward_pre_hook(_leads_back)

    def forward(self, batch: object) -> Tensor:
        """The float32 loss sum of a batch."""
        objective = self._objective[0]
        if not self.loose:
            loss: Tensor = objective(batch)[0]
            return loss
        taken = _Together.apply(*self.loose)
        loss = functional_call(objective, dict(zip(self.names, taken, strict=True)), (batch,))[0]
        out: Tensor = loss + taken[0].sum() * 0  # also where nothing else needs them
        return out


class _Together(torch.autograd.Function):
    """Weights, unchanged; their gradients come back all at once, zeros where a weight had no part."""

    @staticmethod
    def forward(ctx: AutogradContext, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(w.view_as(w) for w in weights)

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


def _leads_back(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """DeepSpeed sums a layer's gradients once that of its input is there: let the input of the first layer need one."""
    if not args:
        raise OpticNerveError(
            f"{type(layer).__name__} is called in a way in which ZeRO-3 cannot see its gradients; train by FSDP2",
            kind="unsupported",
        )
    if torch.is_grad_enabled() and not args[0].requires_grad:
        return (args[0].detach().requires_grad_(), *args[1:])
    return args


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as e:
        raise OpticNerveError(
            f"the launcher asks for DeepSpeed, which cannot be imported ({e}): {to_install('opticnerve[deepspeed]')}, "
            "or launch with recipes/launch/fsdp2.yaml, which shares out the same things",
            kind="not-installed",
        ) from e
    deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed


class GatedAdamW(torch.optim.AdamW):
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
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
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

    def __init__(self, frozen: Frozen, adam: GatedAdamW, zero: Zero) -> None:
        self.adam, self._zero, self._rates = adam, zero, dict(frozen.rates)
        self._weights: dict[str, Any] = {n: p for group in frozen.groups.values() for n, p in group.items()}
        around = zero.engine.optimizer  # DeepSpeed's own around ours, which knows the shares
        self._flats = around.single_partition_of_fp32_groups if zero.stage == 2 else around.fp32_partitioned_groups_flat
        for flat in self._flats:  # at once: a checkpoint may be written before anything has moved
            step = torch.zeros((), dtype=torch.float32, device=flat.device)
            adam.state[flat] = {"step": step, **{m: torch.zeros_like(flat) for m in MOMENTS}}
        if zero.stage == 2:
            start_optimizer_state(around)

    def clip(self, limit: float | None) -> Tensor:
        """Settle that the gradients' norm will be `limit` at most; returns the norm before, a scalar."""
        grads = [g for group in self._zero.engine.optimizer.averaged_gradients.values() for g in group]
        square = torch.stack([g.float().square().sum() for g in grads]).sum()
        dist.all_reduce(square)
        norm = square.sqrt()
        self.adam.scale = 1.0 if limit is None else min(1.0, limit / (float(norm) + 1e-6))
        return norm

    def skip(self, tower: str) -> None:
        """Let the weights of a tower stay as they are in this step."""
        self.adam.resting.add(tower)

    def step(self, factor: float) -> None:
        """Take the step that the gradients say."""
        for group in self.adam.param_groups:
            group["lr"] = self._rates[group["part"]] * factor
        self._zero.engine.step()
        self.adam.resting.clear()

    scale = 1.0

    def overflowed(self) -> bool:
        """Losses are not scaled here."""
        return False

    def averaged(self) -> AbstractContextManager[None]:
        """No averages are kept here."""
        return nullcontext()

    def finish(self) -> None:
        """The weights are as they were left."""

    def zero_grad(self) -> None:
        """Forget the gradients of this step."""
        self.adam.still = True
        self._zero.engine.step()
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
                    f"as one; resume by FSDP2 or DDP",
                    kind="mismatch",
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
