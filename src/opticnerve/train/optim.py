"""Optimizers over float32 masters, a learning rate per part and layer, an average of the weights, warm-up and decay."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from opticnerve.common.private_names import copy_all
from opticnerve.common.shards import as_shard, whole
from opticnerve.language.quantization import bitsandbytes
from opticnerve.models.freeze import Frozen, decay_groups
from opticnerve.recipe import Stage
from opticnerve.types import OpticNerveError

_LAYER = re.compile(r"\.(\d+)\.")
_TABLES = re.compile(r"embed|lm_head|\.wte\.|\.wpe\.")  # Muon's paper leaves them to AdamW
# As torch's GradScaler: where the scale begins, and after how many good steps it doubles.
_FIRST_SCALE, _DOUBLE_AFTER = 2.0**16, 2000
_MOMENTS = ("exp_avg", "exp_avg_sq")
_SMALL_8BIT, _BLOCK_8BIT = 4096, 256  # bitsandbytes' own: fewer weights keep float32 moments; a scale for so many


class MasterAdamW:
    """AdamW (Loshchilov & Hutter 2019), or another optimizer, whose arithmetic is float32 even where the weights are
    bf16 or fp16.

    A bf16 weight has eight bits: most of Adam's small steps would be rounded away. So each such weight has a float32
    master that takes the step, and the weight is the master, rounded. float32 weights are their own masters.

    Args:
        name: `adamw`; `adamw_bf16`, see `AdamWBF16`; `adamw_8bit`, whose moments are 8-bit blocks (Dettmers et al.
            2021), bitsandbytes'; `muon` (Jordan et al. 2024) for matrices, its steps as long as AdamW's (Liu et al.
            2025, section 2.2), and AdamW for the rest; `adafactor` (Shazeer & Stern 2018). The last two are torch's.
        layer_decay: each layer's rate is this part of the rate of the layer above it (ELECTRA).
        ema: keep an average of the masters, of which a step leaves this share; less in the first steps.

    Attributes:
        scale: what losses are multiplied with before their backward pass, so that small gradients of fp16 weights are
            not rounded to nothing (Micikevicius et al. 2018, section 3.2); 1 without such weights.
    """

    def __init__(
        self, frozen: Frozen, *, betas: tuple[float, float], weight_decay: float, name: str = "adamw",
        layer_decay: float | None = None, ema: float | None = None,
    ) -> None:  # fmt: skip
        self.rates, self.ema, self.averaged_steps = dict(frozen.rates), ema, 0
        masters = [
            [w if w.dtype == torch.float32 else w.detach().float().requires_grad_() for w in group.values()]
            for group in frozen.groups.values()
        ]
        self.weights: list[tuple[str, nn.Parameter, torch.Tensor]] = [  # name, weight, master
            (name, weight, master)
            for group, mine in zip(frozen.groups.values(), masters, strict=True)
            for (name, weight), master in zip(group.items(), mine, strict=True)
        ]
        self._halved = any(weight.dtype == torch.float16 for _, weight, _ in self.weights)
        self.scale, self._good_steps = _FIRST_SCALE if self._halved else 1.0, 0
        names = {id(master): n for n, _, master in self.weights}
        groups = decay_groups(list(frozen.groups), masters, weight_decay)
        if layer_decay is not None:
            groups = list(_by_layer(groups, names, layer_decay))
        self.optimizers = _make(name, groups, names, betas)
        self.averages = {n: master.detach().clone() for n, _, master in self.weights} if ema is not None else {}

    def collect(self) -> None:
        """Move bf16 gradients into the float32 masters, adding up: no sum over micro-batches is made in bf16."""
        for _, weight, master in self.weights:
            if master is not weight and weight.grad is not None:
                master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
                weight.grad = None

    def clip(self, limit: float | None) -> torch.Tensor:
        """Bring the gradients together and their norm to `limit` at most; returns the norm before, a scalar that still
        lies on the device: reading it waits for all that was computed."""
        self.collect()
        masters = [m for _, _, m in self.weights]
        if self._halved:
            for master in masters:
                if master.grad is not None:
                    master.grad.div_(self.scale)
        return whole(torch.nn.utils.clip_grad_norm_(masters, limit if limit is not None else math.inf))

    def step(self, factor: float) -> None:
        """Take the step that the gradients, brought together by `clip`, say at `factor` × each part's learning rate."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = self.rates[group["part"]] * factor * group.get("scale", 1.0)
            optimizer.step()
        self.zero_grad()
        self._show({})
        if self._halved:
            self._good_steps += 1
            if self._good_steps % _DOUBLE_AFTER == 0:
                self.scale *= 2
        if self.ema is not None:
            # The first weights are not worth much: as torch-ema, timm and TensorFlow before them.
            keep = min(self.ema, (1 + self.averaged_steps) / (10 + self.averaged_steps))
            self.averaged_steps += 1
            for name, _, master in self.weights:
                self.averages[name].lerp_(master.detach(), 1 - keep)

    def overflowed(self) -> bool:
        """Whether gradients that are no numbers are so because the scale was too high, which is halved then; the step
        is not taken."""
        if self.scale <= 1:
            return False
        self.scale, self._good_steps = self.scale / 2, 0
        self.zero_grad()
        return True

    @torch.no_grad()
    def _show(self, values: Mapping[str, torch.Tensor]) -> None:
        """Let the weights be these values; the masters where there are none."""
        shown = [(w, v) for name, w, master in self.weights if (v := values.get(name, master)) is not w]
        if any(isinstance(weight, DTensor) for weight, _ in shown):  # shards know no such copy
            for weight, value in shown:
                weight.copy_(value)
        elif shown:  # some kernels for all of them, not one for each
            copy_all([weight for weight, _ in shown], [value for _, value in shown])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it, the weights are their averages, where such are kept."""
        if not self.averages:
            yield
            return
        # Rounded weights come back from their masters; those that are masters themselves change places.
        own = [(weight, weight.data, self.averages[n]) for n, weight, master in self.weights if master is weight]
        self._show({n: self.averages[n] for n, weight, master in self.weights if master is not weight})
        for weight, _, average in own:
            weight.data = average
        try:
            yield
        finally:
            for weight, data, _ in own:
                weight.data = data
            self._show({})

    def finish(self) -> None:
        """Leave the weights as their averages, where such are kept."""
        self._show(self.averages)

    def skip(self, tower: str) -> None:
        """Let the weights of a tower stay as they are in this step."""
        for name, weight, master in self.weights:
            if name.startswith(f"{tower}."):
                weight.grad = master.grad = None

    def zero_grad(self) -> None:
        """Forget the gradients of this step."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def master_tensors(self) -> dict[str, torch.Tensor]:
        """float32 values of the trained weights, by full name."""
        return {name: master.detach() for name, _, master in self.weights}

    def state_dict(self, *, keep: bool = True, in_shards: bool = False) -> dict[str, Any]:
        """Moments, masters and averages, whole also where they lie in shards: the same on any number of processes.

        Shards are brought together by all processes; those that say `keep=False` get nothing, and hold no more than one
        whole tensor at a time. With `in_shards` they stay as they lie.
        """
        found: dict[str, Any] = {}
        values = partial(_whole_values, keep=keep) if not in_shards else dict
        for kind, optimizer in self.optimizers.items():
            state = optimizer.state_dict()
            found[kind] = {**state, "state": {k: values(v) for k, v in state["state"].items()}}
        if self.ema is not None:
            found |= {"averages": values(self.averages), "averaged_steps": self.averaged_steps}
        if self._halved:
            found["scaler"] = {"scale": self.scale, "good_steps": self._good_steps}
        return {**found, "masters": values(self.master_tensors())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly: moments, masters, averages, and the weights rounded from them. Each process takes its
        shards."""
        for kind, optimizer in self.optimizers.items():
            masters = [p for group in optimizer.param_groups for p in group["params"]]
            moments = {
                k: {
                    n: as_shard(v, masters[k]) if getattr(v, "shape", None) == masters[k].shape else v
                    for n, v in values.items()
                }
                for k, values in state[kind]["state"].items()
            }
            optimizer.load_state_dict({**state[kind], "state": moments})
        with torch.no_grad():
            for name, weight, master in self.weights:
                master.copy_(as_shard(state["masters"][name], master))
                if master is not weight:
                    weight.copy_(master)
                if self.ema is not None:
                    self.averages[name].copy_(as_shard(state["averages"][name], master))
        self.averaged_steps = state.get("averaged_steps", 0)
        if self._halved:
            self.scale, self._good_steps = state["scaler"]["scale"], state["scaler"]["good_steps"]


def _make(
    name: str, groups: list[dict[str, Any]], names: dict[int, str], betas: tuple[float, float]
) -> dict[str, torch.optim.Optimizer]:
    """The optimizers of a name over groups of masters; `names`: of masters, by id."""
    if name == "adamw_8bit":
        bitsandbytes()
        eight_bit: Any = importlib.import_module("bitsandbytes.optim")
        return {"adam": eight_bit.AdamW8bit(groups, lr=0.0, betas=betas)}
    if name == "adamw_bf16":
        return {"adam": AdamWBF16(groups, betas)}
    if name == "adafactor":
        return {"adafactor": torch.optim.Adafactor(groups, lr=0.0)}
    if name == "muon":
        split = [
            [{**g, "params": [p for p in g["params"] if _is_matrix(names[id(p)], p) == matrix]} for g in groups]
            for matrix in (True, False)
        ]
        matrices, rest = ([g for g in half if g["params"]] for half in split)
        made: dict[str, torch.optim.Optimizer] = {}
        if matrices:
            made["muon"] = torch.optim.Muon(matrices, lr=0.0, adjust_lr_fn="match_rms_adamw")
        return made | ({"adam": torch.optim.AdamW(rest, lr=0.0, betas=betas, fused=True)} if rest else {})
    return {"adam": torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)}


class AdamWBF16(torch.optim.Optimizer):
    """AdamW on float32 weights whose two moments are kept in bf16, as DeepSeek-V3 was trained (DeepSeek-AI 2024,
    section 3.3.3).

    They are rounded up or down by chance, as often as it takes to be right on average: a second moment whose beta is
    0.999 shrinks by less in a step than bf16 can tell, and to the nearest it would never shrink. Chance is a function
    of the step and the weight's place, so that a resumed stage rounds alike and no other generator is moved.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": 1e-8, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step; weights without a gradient stay, with their moments."""
        places = enumerate((group, p) for group in self.param_groups for p in group["params"])
        for place, (group, weight) in places:
            if weight.grad is None:
                continue
            held = self.state[weight]
            if not held:
                held |= {"step": 0, **{k: torch.zeros_like(weight, dtype=torch.bfloat16) for k in _MOMENTS}}
            held["step"] += 1
            (first, second), decay = group["betas"], group["lr"] * group["weight_decay"]
            mean, square = (held[k].float() for k in _MOMENTS)
            mean.lerp_(weight.grad, 1 - first)
            square.mul_(second).addcmul_(weight.grad, weight.grad, value=1 - second)
            root = (square / (1 - second ** held["step"])).sqrt_().add_(group["eps"])
            weight.mul_(1 - decay).addcdiv_(mean, root, value=-group["lr"] / (1 - first ** held["step"]))
            chance = torch.Generator(weight.device).manual_seed(held["step"] * 1_000_003 + place)
            for key, moment in zip(_MOMENTS, (mean, square), strict=True):
                held[key].copy_(_rounded_by_chance(moment, chance))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch gives what it loads the weights' dtype; the moments have their own."""
        super().load_state_dict(state_dict)
        for held in self.state.values():
            held.update({k: held[k].bfloat16() for k in _MOMENTS})


def _rounded_by_chance(x: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    """float32 to bf16: the 16 bits that are cut off say how probable the larger of the two neighbours is."""
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=chance)
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()


def _is_matrix(name: str, weight: torch.Tensor) -> bool:
    """Whether Muon takes a weight."""
    return weight.ndim == 2 and _TABLES.search(name) is None


def state_bytes(name: str, weight: str, shape: torch.Size) -> int:
    """What an optimizer keeps for a weight of such a name and shape, its master and average not counted."""
    numel, moments = shape.numel(), 8
    if name == "adafactor" and len(shape) > 1:
        return 4 * (numel // shape[-1] + numel // shape[-2])
    if name in ("adafactor", "adamw_bf16") or (name == "muon" and len(shape) == 2 and _TABLES.search(weight) is None):
        moments = 4
    elif name == "adamw_8bit" and numel >= _SMALL_8BIT:
        return 2 * (numel + 4 * math.ceil(numel / _BLOCK_8BIT))
    return moments * numel


def _by_layer(groups: list[dict[str, Any]], names: dict[int, str], decay: float) -> Iterator[dict[str, Any]]:
    """Groups of one `scale` each: of encoders and language models, by how many layers are above a weight. What stands
    before the first layer (embeddings) is below it, what stands behind the last is at its full rate."""
    depth: dict[str, int] = {}
    for part in {g["part"] for g in groups}:
        mine = sorted(
            (n for g in groups if g["part"] == part for n in (names[id(p)] for p in g["params"])),
            key=list(names.values()).index,
        )
        numbers = [int(found[1]) if (found := _LAYER.search(n)) else None for n in mine]
        top, known = max((n for n in numbers if n is not None), default=None), False
        if top is None or not re.search(r"encoder|language", part):
            continue
        for name, number in zip(mine, numbers, strict=True):
            known = known or number is not None
            depth[name] = top + 1 if not known else 0 if number is None else top - number
    for group in groups:
        by_depth: dict[int, list[Any]] = {}
        for parameter in group["params"]:
            by_depth.setdefault(depth.get(names[id(parameter)], 0), []).append(parameter)
        for below, these in by_depth.items():
            yield {**group, "params": these, "scale": decay**below}


def schedule(step: int, steps: int, *, warmup: float, kind: str, cooldown: float = 0.1) -> float:
    """The factor on the learning rate at `step` (from 0) of `steps`: linear warm-up, then cosine, linear, constant, or
    `wsd` (Hu et al. 2024, MiniCPM, section 4): constant up to the last share `cooldown` of all steps, linear from
    there."""
    warm = math.ceil(warmup * steps)
    if step < warm:
        return (step + 1) / warm
    if kind == "wsd":
        falling = max(1, min(steps - warm, math.ceil(cooldown * steps)))
        return min(1.0, (steps - step) / falling)
    progress = (step - warm) / max(1, steps - warm)
    return {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}[kind]


def stage_factor(stage: Stage, step: int, steps: int) -> float:
    """A stage's schedule."""
    return schedule(step, steps, warmup=stage.warmup, kind=stage.schedule, cooldown=stage.cooldown or 0.1)


def check_lengthened(stage: Stage, done: int, was: int, now: int) -> None:
    """See that a stage that is made longer has trained as the longer one would have: at every step that is done both
    schedules give the same learning rate.

    Args:
        done: steps. was, now: how many the stage was to take, and is to take.

    Raises:
        OpticNerveError: they do not (a schedule that decays looks at the end from its first step on); or it would be
            shorter.
    """
    if now < was:
        raise OpticNerveError(
            f"stage {stage.name}: {now} steps are fewer than the {was} that it was begun with; it can be made longer "
            "alone",
            kind="conflict",
        )
    for step in range(done):
        before, after = (stage_factor(stage, step, steps) for steps in (was, now))
        if before != after:
            raise OpticNerveError(
                f"stage {stage.name}: at step {step + 1} the {stage.schedule} schedule of {was} steps had the learning "
                f"rate at {before:.4g} of its height, that of {now} has it at {after:.4g} (warm-up {stage.warmup:g}): "
                f"no run of {now} steps looks like this one. Go on from what it came to by a recipe with `model: "
                "{from: RUN}` and a stage of its own; `schedule: constant` can be made longer",
                kind="conflict",
            )


def _whole_values(tensors: dict[str, Any], keep: bool) -> dict[str, Any]:
    """The tensors of a mapping, whole; on the CPU those that lay in shards."""
    found = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor)
        if keep:
            found[name] = gathered if gathered is tensor else gathered.cpu()
    return found
