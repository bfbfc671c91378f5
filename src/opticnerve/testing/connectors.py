"""What a connector promises (`opticnerve.connectors.base.Connector`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opticnerve.connectors.base import Connector
from opticnerve.testing import contract
from opticnerve.testing.contract import COMMON, COUNT, SAME, Broken, Subject, apply, expect, stir, through_json
from opticnerve.types import Features

WORDS = 5  # tokens of the question, where a connector reads it


def check_connector(
    make: Callable[..., Connector],
    *,
    in_size: int = 24,
    out_size: int = 32,
    in_tokens: int = 16,
    vocabulary: int = 50,
    unused: tuple[str, ...] = (),
    fullgraph: bool = True,
    chooses: bool = False,
) -> None:
    """Run a connector through its contract.

    Args:
        make: the class, or a function that calls it with further options: `partial(MyConnector, depth=3)`.
        in_size, out_size, in_tokens: sizes to build it with; 16 tokens are a map of 4 × 4.
        vocabulary: how many token ids the question may hold, where the connector reads it.
        unused: beginnings of names of parameters that take no part in the forward pass.
        fullgraph: False where the forward pass depends on numbers that it computes (`.item()`): `torch.compile` then
            may need several graphs, and a device without numbers is not tried.
        chooses: whether rounding may turn a choice on which the numbers hang (see `Subject`).

    Raises:
        ContractError: the message lists every broken promise.
    """
    sizes: dict[str, Any] = {"in_size": in_size, "out_size": out_size, "in_tokens": in_tokens}
    part = make(**sizes).eval()
    stir(part)
    cls: Callable[..., Connector] = type(part)

    def inputs(count: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(count)
        tokens_BND = torch.randn(count, in_tokens, in_size, generator=generator)
        mask_BN = torch.ones(count, in_tokens, dtype=torch.bool)
        if not part.wants_text:
            return tokens_BND, mask_BN
        ids_BT = torch.randint(0, vocabulary, (count, WORDS), generator=generator)
        return tokens_BND, mask_BN, ids_BT, torch.ones_like(ids_BT)

    subject = Subject(
        part=part,
        rebuild=lambda **other: cls(**sizes, **{**through_json(part.options), **other}),
        inputs=inputs,
        run=lambda connector, tokens_BND, mask_BN, *text: connector(Features(tokens_BND, mask_BN), *text),
        size=out_size,
        unused=unused,
        fullgraph=fullgraph,
        chooses=chooses,
    )
    rules = (is_a_connector, *COMMON, refuses_another_width, ignores_masked_tokens, calibrates, keeps_the_grid)
    apply(rules, subject, type(part).__name__)


def is_a_connector(s: Subject) -> None:
    """A connector is an `opticnerve.connectors.base.Connector`. Its constructor takes `in_size`, `out_size`,
    `in_tokens` and `calibrate` as keywords; the three sizes come from the neighbours, so `options` leaves them out and
    holds `calibrate`."""
    expect(isinstance(s.part, Connector), f"{type(s.part).__name__} is no Connector")
    twice = {"in_size", "out_size", "in_tokens"} & set(s.part.options)
    expect(not twice, f"options hold {', '.join(sorted(twice))}")
    expect("calibrate" in s.part.options, "options lack calibrate: keep what Connector's constructor put there (|=)")


def refuses_another_width(s: Subject) -> None:
    """Features of another width than `in_size` are a ValueError with both numbers."""
    tokens_BND, *rest = s.inputs(COUNT)
    wide = torch.cat([tokens_BND, tokens_BND[..., :1]], dim=-1)
    try:
        s.out(wide, *rest)
    except ValueError as e:
        both = str(s.part.in_size) in str(e) and str(s.part.in_size + 1) in str(e)
        expect(both, f"the message lacks {s.part.in_size} or {s.part.in_size + 1}: {e}")
        return
    raise Broken(f"built for width {s.part.in_size}, it took {s.part.in_size + 1}")


def ignores_masked_tokens(s: Subject) -> None:
    """What a masked token holds changes no real token that comes out, nor which of them are real."""
    tokens_BND, mask_BN, *rest = s.inputs(COUNT)
    mask_BN[1, -1] = False
    mask_BN[2, ::2] = False
    one = s.out(tokens_BND, mask_BN, *rest)
    spoiled = torch.where(mask_BN.unsqueeze(-1), tokens_BND, 100 * torch.randn_like(tokens_BND))
    other = s.out(spoiled, mask_BN, *rest)
    expect(torch.equal(one.mask_BN, other.mask_BN), "which tokens are real depends on what masked ones hold")
    gap = contract.difference(other.tokens_BND[other.mask_BN], one.tokens_BND[one.mask_BN])
    expect(gap <= SAME, f"other numbers in masked tokens change real ones by {gap:.1e}")


def calibrates(s: Subject) -> None:
    """Before `calibrate` the calibration changes nothing, bit for bit; after it, what comes out has the deviation that
    was asked for, and a second call changes nothing. With `calibrate=False` nothing is ever measured."""
    inputs, text = s.inputs(16), s.inputs(16)[2:]
    features = Features(inputs[0] * 3 + 1, inputs[1])
    fresh = s.rebuild(calibrate=True).eval()
    plain = fresh.project(features, *text).tokens_BND
    expect(torch.equal(fresh(features, *text).tokens_BND, plain), "uncalibrated, forward differs from project")
    fresh.calibrate(features, 0.25, *text)
    out = fresh(features, *text)
    std = float(out.tokens_BND[out.mask_BN].detach().std())
    expect(abs(std - 0.25) <= 0.01, f"calibrated to a deviation of 0.25, tokens come out with {std:.3g}")
    fresh.calibrate(Features(features.tokens_BND * 2, features.mask_BN), 9.0, *text)
    again = fresh(features, *text).tokens_BND
    expect(torch.equal(out.tokens_BND, again), "a second calibration changed the numbers")
    never = s.rebuild(calibrate=False).eval()
    never.calibrate(features, 0.25, *text)
    expect(not bool(never.calibrated), "calibrate=False, and it was calibrated nevertheless")


def keeps_the_grid(s: Subject) -> None:
    """With `keeps_grid` the tokens that come out of a square map are a square map, row by row."""
    count = s.part.num_tokens
    if s.part.keeps_grid and math.isqrt(s.part.in_tokens) ** 2 == s.part.in_tokens:
        expect(math.isqrt(count) ** 2 == count, f"keeps_grid is True, and {count} tokens make no square map")
