"""Connectors: shapes, calibration, and none of it where it is not wanted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import refused
from opticnerve import registry
from opticnerve.connectors.base import Connector
from opticnerve.connectors.mlp import LinearConnector, MLPConnector
from opticnerve.types import Features

SIZES = {"in_size": 6, "out_size": 10, "in_tokens": 4}


def features(count: int = 3, *, seed: int = 0, width: int = 6, scale: float = 1.0, shift: float = 0.0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, 4, width, generator=generator) * scale + shift
    return Features(tokens, torch.ones(count, 4, dtype=torch.bool))


@pytest.mark.parametrize("name", list(registry.connectors))
class TestEveryConnector:
    def make(self, name: str, **options: Any) -> Connector:
        torch.manual_seed(0)
        # (Where nothing is sure to be a character, nothing comes out of a text_spotter.)
        sure = {"threshold": 1e-6} if name == "text_spotter" else {}
        return registry.connectors.get(name)(**SIZES, **sure, **options)

    def test_shapes(self, name: str) -> None:
        connector = self.make(name)
        out = connector(features())
        assert out.tokens_BND.shape == (3, connector.num_tokens, 10)
        assert out.mask_BN.shape == (3, connector.num_tokens)
        with pytest.raises(ValueError, match="takes width 6, the encoder gave 7"):
            connector(features(width=7))

    def test_options_build_it_again(self, name: str) -> None:
        connector = self.make(name)
        again = type(connector)(**SIZES, **connector.options)
        again.load_state_dict(connector.state_dict())
        assert torch.equal(again(features()).tokens_BND, connector(features()).tokens_BND)

    def test_before_calibration_nothing_is_changed(self, name: str) -> None:
        with_it, without = self.make(name), self.make(name, calibrate=False)
        without.load_state_dict(with_it.state_dict())
        plain = with_it.project(features()).tokens_BND
        assert torch.equal(with_it(features()).tokens_BND, plain)
        assert torch.equal(without(features()).tokens_BND, plain)

    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 99), scale=st.floats(1e-2, 1e2), shift=st.floats(-50, 50), target=st.floats(1e-3, 10))
    def test_calibration(self, name: str, seed: int, scale: float, shift: float, target: float) -> None:
        connector, seen = self.make(name, calibrate=True), features(16, seed=seed, scale=scale, shift=shift)
        connector.calibrate(seen, target)
        inner = (seen.tokens_BND - connector.input_mean) / connector.input_std
        assert inner.mean((0, 1)).abs().max() < 1e-2
        assert (inner.std((0, 1), correction=0) - 1).abs().max() < 2e-2
        assert float(connector(seen).tokens_BND.detach().std()) == pytest.approx(target, rel=1e-2)

    def test_a_second_time_changes_nothing(self, name: str) -> None:
        connector = self.make(name)
        connector.calibrate(features(), 0.3)
        before = {n: t.clone() for n, t in connector.state_dict().items()}
        connector.calibrate(features(seed=5, scale=9.0), 2.0)
        assert all(torch.equal(t, before[n]) for n, t in connector.state_dict().items())

    def test_uncalibrated_by_wish(self, name: str) -> None:
        connector = self.make(name, calibrate=False)
        connector.calibrate(features(), 0.3)
        assert not bool(connector.calibrated)
        assert torch.equal(connector(features()).tokens_BND, connector.project(features()).tokens_BND)

    def test_a_channel_that_never_moves(self, name: str) -> None:
        connector, seen = self.make(name), features(16)
        seen.tokens_BND[..., 2] = 5.0
        connector.calibrate(seen, 0.3)
        out = connector(Features(seen.tokens_BND + 1e-4, seen.mask_BN)).tokens_BND
        assert out.isfinite().all()
        assert float(out.detach().std()) < 1.0

    def test_masked_tokens_are_not_measured(self, name: str) -> None:
        one, other, seen = self.make(name), self.make(name), features(16)
        mask = seen.mask_BN.clone()
        mask[:, 3] = False
        one.calibrate(Features(seen.tokens_BND, mask), 0.3)
        spoiled = seen.tokens_BND.clone()
        spoiled[:, 3] = 1e6
        other.calibrate(Features(spoiled, mask), 0.3)
        assert torch.equal(one.input_mean, other.input_mean)
        assert torch.equal(one.output_scale, other.output_scale)


def test_mlp_is_llavas_projector_bit_for_bit() -> None:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(hidden_size=6, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1),
        text_config=tf.LlamaConfig(hidden_size=10, num_attention_heads=1), projector_hidden_act="gelu",
    )  # fmt: skip
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    theirs = LlavaMultiModalProjector(config)
    ours = MLPConnector(**SIZES, depth=2, activation="gelu", calibrate=False)
    ours.layers[0].load_state_dict(theirs.linear_1.state_dict())
    ours.layers[2].load_state_dict(theirs.linear_2.state_dict())
    assert torch.equal(ours(features()).tokens_BND, theirs(features().tokens_BND))


def test_linear_is_one_matrix() -> None:
    connector = LinearConnector(**SIZES, bias=False)
    assert [n for n, _ in connector.named_parameters()] == ["linear.weight"]
    torch.testing.assert_close(connector(features()).tokens_BND, features().tokens_BND @ connector.linear.weight.T)


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_depth(depth: int) -> None:
    connector = MLPConnector(**SIZES, depth=depth)
    linears = [m for m in connector.layers if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linears] == [(6, 10)] + [(10, 10)] * (depth - 1)


def test_refusals() -> None:
    with refused("out-of-range", "depth", 2, 1):
        MLPConnector(**SIZES, depth=1)
    with refused("unknown-name", "'gelo'", "gelu"):
        MLPConnector(**SIZES, activation="gelo")
