"""Soft tokens take the places of placeholders, in order, and nothing else moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from opticnerve.fusion.base import Splice
from opticnerve.types import Features


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_in_order(places: list[list[bool]]) -> None:
    placeholder = torch.tensor(places)
    count = int(placeholder.sum())
    embeds = torch.zeros(*placeholder.shape, 2)
    soft = torch.arange(1, count + 1).float().repeat_interleave(2).reshape(count, 1, 2)
    features = Features(soft, torch.ones(count, 1, dtype=torch.bool))
    out = Splice(language_size=2, language_layers=2).embed(embeds, placeholder, features)
    assert out[placeholder][:, 0].tolist() == list(range(1, count + 1))
    assert not out[~placeholder].any()
    assert not embeds.any()


def test_masked_tokens_are_left_out() -> None:
    features = Features(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[True, False, True]]))
    out = Splice(language_size=2, language_layers=2).embed(
        torch.zeros(1, 3, 1), torch.tensor([[True, False, True]]), features
    )
    assert out.flatten().tolist() == [1.0, 0.0, 3.0]


def test_a_mismatch_has_both_numbers() -> None:
    features = Features(torch.ones(1, 3, 1), torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="2 image placeholders in the text, but 3 visual tokens"):
        Splice(language_size=2, language_layers=2).embed(
            torch.zeros(1, 3, 1), torch.tensor([[True, False, True]]), features
        )


def test_gradients_reach_words_and_pictures() -> None:
    embeds, soft = torch.zeros(1, 3, 2, requires_grad=True), torch.ones(1, 1, 2, requires_grad=True)
    out = Splice(language_size=2, language_layers=2).embed(
        embeds, torch.tensor([[False, True, False]]), Features(soft, torch.ones(1, 1, dtype=torch.bool))
    )
    out.sum().backward()
    assert embeds.grad is not None
    assert soft.grad is not None
    assert embeds.grad[0].sum(-1).tolist() == [2.0, 0.0, 2.0]
    assert soft.grad.sum() == 2.0


def test_half_precision_words_take_float_pictures() -> None:
    features = Features(torch.ones(1, 1, 2), torch.ones(1, 1, dtype=torch.bool))
    out = Splice(language_size=2, language_layers=2).embed(
        torch.zeros(1, 2, 2, dtype=torch.bfloat16), torch.tensor([[True, False]]), features
    )
    assert out.dtype == torch.bfloat16


class Waits(TorchDispatchMode):
    """How often the host would wait for a device: for a number, or for how large what comes out is."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal")
        return func(*args, **(kwargs or {}))


def test_the_host_waits_once() -> None:
    """For the numbers that are compared."""
    features = Features(torch.ones(2, 3, 4), torch.tensor([[True, True, False], [True, True, True]]))
    placeholder = torch.tensor([[False, True, True, True, True, True]])
    with Waits() as waits:
        Splice(language_size=4, language_layers=2).embed(torch.zeros(1, 6, 4), placeholder, features)
    assert waits.count == 1
