"""Rules, and what encoders and connectors promise alike.

A rule is a function whose docstring is the contract's text; it raises `Broken` where the part does otherwise.
"""

from __future__ import annotations

import copy
import inspect
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opticnerve.common.private_names import fake_tensors
from opticnerve.types import Features

SAME = 1e-5  # largest difference between two ways to the same numbers, in units of the largest number (at least 1)
COUNT = 3  # pieces of media in a batch


class ContractError(AssertionError):
    """A part breaks promises; the message lists what happened, and what the contract says."""


class Broken(Exception):
    """What a rule found."""


@dataclass
class Subject:
    """A part under test: how to feed it and how to build another.

    `rebuild`: the same module from its options (or others, as keywords), with other weights. `inputs`: a batch of so
    many pieces, floats first. `run`: a forward pass. `size`: width of what comes out. `unused`: beginnings of the names
    of parameters that take no part in the forward pass, or are no weights (a table of sinusoids). `fullgraph`: the
    forward pass depends on no number that it computes. `chooses`: what comes out hangs on choices that rounding may
    turn (the highest of two numbers): in bfloat16 the numbers are not compared.
    """

    part: Any
    rebuild: Callable[..., Any]
    inputs: Callable[[int], tuple[Tensor, ...]]
    run: Callable[..., Features]
    size: int
    unused: tuple[str, ...] = ()
    fullgraph: bool = True
    chooses: bool = False
    same: float = SAME

    def out(self, *inputs: Tensor) -> Features:
        """What the part makes of a batch."""
        return self.run(self.part, *inputs)

    def again(self) -> Subject:
        """Another of the same options, with other weights."""
        return replace(self, part=self.rebuild().eval())

    def elsewhere(self, to: torch.device | torch.dtype | str) -> Subject:
        """A copy on another device, or in another dtype."""
        return replace(self, part=copy.deepcopy(self.part).to(to))


Rule = Callable[[Any], None]


def apply(rules: Iterable[Rule], subject: object, name: str) -> None:
    """Run every rule.

    Raises:
        ContractError: one or more are broken.
    """
    found: list[str] = []
    cause: Exception | None = None
    for rule in rules:
        try:
            with _seeded():
                rule(subject)
        except Broken as e:
            found.append(_report(rule, str(e)))
        except Exception as e:  # whatever the part raises is a finding, and the next rule has its turn
            found.append(_report(rule, f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"))
            cause = cause or e
    if found:
        raise ContractError(f"{name} breaks {len(found)} of its promises\n\n" + "\n\n".join(found)) from cause


def _report(rule: Rule, happened: str) -> str:
    text = " ".join(inspect.getdoc(rule).split())  # type: ignore[union-attr]
    return f"- {rule.__name__.replace('_', ' ')}: {happened}\n  The contract: {text}"


@contextmanager
def _seeded() -> Iterator[None]:
    """The same random numbers for each rule, and the caller's generator as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def expect(condition: bool, happened: str) -> None:
    if not condition:
        raise Broken(happened)


def stir(module: nn.Module) -> None:
    """Move every weight off its neutral start (zeros, ones, closed gates), so that each has a part in the result."""
    with torch.no_grad(), _seeded():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference, in units of the largest number (at least 1)."""
    return float((one.detach() - other.detach()).abs().max()) / max(1.0, float(other.detach().abs().max()))


def moved(inputs: tuple[Tensor, ...], to: torch.device | torch.dtype | str) -> tuple[Tensor, ...]:
    """`Tensor.to` for a device or a dtype; what is no float keeps its dtype."""
    return tuple(t.to(to) if isinstance(to, str) or t.is_floating_point() else t for t in inputs)


# -- what encoders and connectors promise alike ---------------------------------------------------------------------


def declared_shapes(s: Subject) -> None:
    """For a batch of B pieces come `Features`: float tokens of shape (B, num_tokens, width), the declared numbers, and
    a bool mask (B, num_tokens), True where a token is real; both on the device and in the dtype of the weights."""
    expect(isinstance(s.part.num_tokens, int), f"num_tokens is {s.part.num_tokens!r}, no whole number")
    for count in (1, COUNT):
        out = s.out(*s.inputs(count))
        expect(isinstance(out, Features), f"forward gave {type(out).__name__}, no Features")
        wanted = (count, s.part.num_tokens, s.size)
        expect(tuple(out.tokens_BND.shape) == wanted, f"tokens of {tuple(out.tokens_BND.shape)}, declared are {wanted}")
        expect(out.mask_BN.dtype == torch.bool, f"the mask is {out.mask_BN.dtype}, not bool")
        expect(bool(out.mask_BN.any(1).all()), "a piece whose tokens are all real comes out without a real token")
        expect(bool(out.tokens_BND.isfinite().all()), "tokens are not finite")


def options_are_json(s: Subject) -> None:
    """`options` is a dict of plain JSON values: it goes into config.json, and the part is built from what is read
    there."""
    expect(isinstance(s.part.options, dict), f"options is a {type(s.part.options).__name__}, no dict")
    try:
        json.dumps(s.part.options, allow_nan=False)
    except (TypeError, ValueError) as e:
        raise Broken(f"options are no JSON: {e}") from e


def through_json(options: dict[str, Any]) -> dict[str, Any]:
    """What is read where `options` were written."""
    read: dict[str, Any] = json.loads(json.dumps(options))
    return read


def saves_and_loads(s: Subject) -> None:
    """`options` build the same module again, and its state dict carries all else that it learned: written to a
    safetensors file and read into a rebuilt module, it gives the same numbers."""
    again = s.again()
    before, after = through_json(s.part.options), through_json(again.part.options)
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    expect(not changed, f"rebuilt from its options, it has others: {', '.join(changed)}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "part.safetensors"
        save_file({k: v.contiguous().clone() for k, v in s.part.state_dict().items()}, file)
        again.part.load_state_dict(load_file(file))
    inputs = s.inputs(COUNT)
    gap = difference(again.out(*inputs).tokens_BND, s.out(*inputs).tokens_BND)
    # (Where a tensor lies in memory may choose another kernel of a convolution.)
    expect(gap <= s.same, f"after saving and loading, numbers differ by {gap:.1e}")


def is_deterministic(s: Subject) -> None:
    """In `eval()` the same input gives the same output, bit for bit, and leaves the module as it was."""
    before = {k: v.clone() for k, v in s.part.state_dict().items()}
    inputs = s.inputs(COUNT)
    one, other = s.out(*inputs).tokens_BND, s.out(*inputs).tokens_BND
    expect(torch.equal(one, other), f"two passes differ by {difference(one, other):.1e}")
    changed = [k for k, v in s.part.state_dict().items() if not torch.equal(v, before[k])]
    expect(not changed, f"a forward pass in eval() changed {', '.join(changed)}")


def does_not_mix_the_batch(s: Subject) -> None:
    """A piece of media alone gives what it gives within a batch (to 1e-5): batches are cut as memory allows."""
    inputs = s.inputs(COUNT)
    together = s.out(*inputs).tokens_BND
    for i in range(COUNT):
        alone = s.out(*(t[i : i + 1] for t in inputs)).tokens_BND
        gap = difference(alone[0], together[i])
        expect(gap <= SAME, f"piece {i} alone and in a batch of {COUNT} differ by {gap:.1e}")


def gradients_flow(s: Subject) -> None:
    """The part freezes nothing by itself (training says what trains): from the real tokens, finite gradients reach
    every parameter (those declared as unused excepted) and each piece of the input."""
    media, *rest = s.inputs(COUNT)
    media.requires_grad_(True)
    s.part.zero_grad()
    out = s.out(media, *rest)
    (out.tokens_BND * torch.randn_like(out.tokens_BND))[out.mask_BN].sum().backward()
    named = {n: p for n, p in s.part.named_parameters() if not (s.unused and n.startswith(s.unused))}
    frozen = [n for n, p in named.items() if not p.requires_grad]
    expect(not frozen, f"frozen from the start: {', '.join(frozen[:5])}")
    without = [n for n, p in named.items() if p.grad is None]
    expect(not without, f"no gradient reaches {', '.join(without[:5])} ({len(without)} parameters in all)")
    wild = [n for n, p in named.items() if not p.grad.isfinite().all()]
    expect(not wild, f"the gradients of {', '.join(wild[:5])} are not finite")
    expect(not named or any(p.grad.any() for p in named.values()), "all gradients are zero")
    s.part.zero_grad()
    expect(media.grad is not None, "no gradient reaches the input")
    blind = [i for i, g in enumerate(media.grad) if not g.isfinite().all() or not g.any()]  # type: ignore[arg-type]
    expect(not blind, f"the gradient of the input is zero or not finite for pieces {blind}")


def moves_to_bfloat16(s: Subject) -> None:
    """`.to(torch.bfloat16)` is all it takes: bfloat16 in, bfloat16 out, and the numbers of float32 within the
    rounding (finite ones, where rounding may turn a choice)."""
    inputs = s.inputs(COUNT)
    wanted = s.out(*inputs).tokens_BND.detach()
    out = s.elsewhere(torch.bfloat16).out(*moved(inputs, torch.bfloat16)).tokens_BND.detach()
    expect(out.dtype == torch.bfloat16, f"tokens come out as {out.dtype}")
    expect(bool(out.isfinite().all()), "some numbers are not finite")
    gap = float((out.float() - wanted).norm() / wanted.norm())
    expect(s.chooses or gap <= 0.1, f"the numbers are {gap:.0%} away from float32's")


def moves_to_another_device(s: Subject) -> None:
    """The part builds under `torch.device("meta")` (`opticnerve plan` counts there). `.to(device)` moves all of it, so
    every tensor is a parameter or a buffer, or made on the device of the input (tried on a device without numbers)."""
    with torch.device("meta"):
        built = s.rebuild()
    real = [n for n, t in [*built.named_parameters(), *built.named_buffers()] if not t.is_meta]
    expect(not real, f"built under torch.device('meta'), {', '.join(real[:5])} lie elsewhere")
    inputs = s.inputs(COUNT)
    wanted = s.out(*inputs)
    if s.fullgraph:
        with imagined("cuda") as there:
            out = s.run(there(s.part), *(there(t) for t in inputs))
            places = {out.tokens_BND.device.type, out.mask_BN.device.type}
            expect(places == {"cuda"}, f"from cuda, tokens and mask come on {' and '.join(sorted(places))}")
    if torch.cuda.is_available():
        out = s.elsewhere("cuda").out(*moved(inputs, "cuda"))
        expect(torch.equal(out.mask_BN.cpu(), wanted.mask_BN), "on cuda, the mask differs")
        gap = float((out.tokens_BND.cpu() - wanted.tokens_BND).norm() / wanted.tokens_BND.norm())
        expect(gap <= 1e-2, f"on cuda, the numbers are {gap:.1%} away")


@contextmanager
def imagined(device: str) -> Iterator[Callable[[Any], Any]]:
    """A device that need not exist: tensors there have shapes and no numbers, and refuse to mix with other devices.

    Gives a function that takes a tensor, or a copy of a module with its parameters and buffers, there.
    """
    mode, outside = fake_tensors()

    def there(what: nn.Module | Tensor) -> Any:
        if isinstance(what, Tensor):
            return torch.empty(what.shape, dtype=what.dtype, device=device)
        with outside():
            what = copy.deepcopy(what)
        for module in what.modules():
            for name, weight in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                setattr(module, name, nn.Parameter(there(weight), requires_grad=weight.requires_grad))
            for name, table in list(module.named_buffers(recurse=False, remove_duplicate=False)):
                setattr(module, name, there(table))
        return what

    with mode:
        yield there


def compiles(s: Subject) -> None:
    """`torch.compile` gives the same numbers (to 1e-5), in one graph unless the check is told otherwise."""
    inputs = s.inputs(COUNT)
    wanted = s.out(*inputs)

    def pass_through(*given: Tensor) -> tuple[Tensor, Tensor]:
        out = s.out(*given)
        return out.tokens_BND, out.mask_BN

    torch.compiler.reset()
    try:
        with torch.no_grad():
            tokens, mask = torch.compile(pass_through, backend="eager", fullgraph=s.fullgraph)(*inputs)
    finally:
        torch.compiler.reset()
    gap = difference(tokens, wanted.tokens_BND)
    expect(gap <= SAME, f"compiled, numbers differ by {gap:.1e}")
    expect(torch.equal(mask, wanted.mask_BN), "compiled, the mask differs")


COMMON: tuple[Rule, ...] = (
    declared_shapes, options_are_json, saves_and_loads, is_deterministic, does_not_mix_the_batch, gradients_flow,
    moves_to_bfloat16, moves_to_another_device, compiles,
)  # fmt: skip
