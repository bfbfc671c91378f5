"""Connectors that change the number of tokens: which token sees what, masks, and what cannot be built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import refused
from opticnerve.connectors.abstractor import AbstractorConnector
from opticnerve.connectors.base import Connector
from opticnerve.connectors.mlp import PixelShuffleConnector
from opticnerve.connectors.resampler import ResamplerConnector
from opticnerve.models import OpticNerveForConditionalGeneration
from opticnerve.models.vlm.build import Dock
from opticnerve.types import Features

SMALL: dict[str, Any] = {"num_latents": 3, "depth": 2, "heads": 2, "key_value_heads": 1, "head_dim": 4}


def sizes(tokens: int) -> dict[str, int]:
    return {"in_size": 6, "out_size": 10, "in_tokens": tokens}


def random_features(tokens: int, count: int = 2, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(torch.randn(count, tokens, 6, generator=generator), torch.ones(count, tokens, dtype=torch.bool))


def influence(connector: Connector, tokens: int) -> torch.Tensor:
    """(out, in) bool: whether a soft token depends on a token of the encoder."""
    features = random_features(tokens, 1)
    features.tokens_BND.requires_grad_(True)
    out_MD = connector.eval()(features).tokens_BND[0]
    rows = [
        torch.autograd.grad(token.square().sum(), features.tokens_BND, retain_graph=True)[0][0].abs().sum(1) > 0
        for token in out_MD
    ]
    return torch.stack(rows)


class TestPixelShuffle:
    @settings(max_examples=20, deadline=None)
    @given(scale=st.integers(2, 4), squares=st.integers(1, 4), depth=st.integers(1, 3))
    def test_a_token_is_a_square_of_tokens(self, scale: int, squares: int, depth: int) -> None:
        side = scale * squares
        connector = PixelShuffleConnector(**sizes(side**2), scale=scale, depth=depth)
        assert connector.num_tokens == squares**2
        sees = influence(connector, side**2)
        for m in range(squares**2):
            row, column = divmod(m, squares)
            wanted = torch.zeros(side, side, dtype=torch.bool)
            wanted[row * scale : (row + 1) * scale, column * scale : (column + 1) * scale] = True
            assert torch.equal(sees[m], wanted.flatten())

    def test_nothing_is_thrown_away(self) -> None:
        """With the identity for a matrix the numbers themselves come out, each once."""
        connector = PixelShuffleConnector(in_size=6, out_size=24, in_tokens=16)
        with torch.no_grad():
            connector.layers[0].weight.copy_(torch.eye(24))
        features = random_features(16)
        out = connector(features).tokens_BND
        assert torch.equal(out.flatten().sort().values, features.tokens_BND.flatten().sort().values)
        # Within a square, row by row from the top left.
        first = [features.tokens_BND[0, i] for i in (0, 1, 4, 5)]
        assert torch.equal(out[0, 0], torch.cat(first))

    def test_a_token_is_real_if_any_of_its_square_is(self) -> None:
        features = random_features(16)
        features.mask_BN[0] = False
        features.mask_BN[0, 10] = True
        assert PixelShuffleConnector(**sizes(16))(features).mask_BN.tolist() == [
            [False, False, False, True],
            [True] * 4,
        ]

    def test_depth(self) -> None:
        def shapes(**options: Any) -> list[tuple[int, ...]]:
            return [tuple(p.shape) for p in PixelShuffleConnector(**sizes(16), **options).parameters()]

        assert shapes() == [(10, 24)]
        assert shapes(depth=2) == [(24,), (24,), (10, 24), (10,), (10, 10), (10,)]
        assert shapes(scale=4, depth=3)[2:] == [(10, 96), (10,), (10, 10), (10,), (10, 10), (10,)]

    @pytest.mark.parametrize(
        ("tokens", "options", "refusal"),
        [
            (15, {}, ("wrong-shape", 15, "3²", 9, "4²", 16, "class_token: drop")),
            (0, {}, ("wrong-shape", 0)),
            (49, {}, ("wrong-shape", "scale 2", 7, 49)),
            (1, {}, ("wrong-shape", "scale 2", "none")),
            (36, {"scale": 4}, ("wrong-shape", "scale 4", "2, 3, 6")),
            (16, {"scale": 1}, ("out-of-range", "scale", 2, 1)),
            (16, {"depth": 0}, ("out-of-range", "depth", 1, 0)),
            (16, {"depth": 2, "activation": "gelo"}, ("unknown-name", "'gelo'", "gelu")),
            (16, {"activation": "silu"}, ("conflict", "'silu'", 1)),
        ],
    )
    def test_refusals(self, tokens: int, options: dict[str, Any], refusal: tuple[Any, ...]) -> None:
        with refused(*refusal):
            PixelShuffleConnector(**sizes(tokens), **options)


class TestResampler:
    @pytest.mark.parametrize("tokens", [1, 7, 50])
    def test_as_many_tokens_as_one_likes_from_any_number(self, tokens: int) -> None:
        connector = ResamplerConnector(**sizes(tokens), **SMALL)
        out = connector(random_features(tokens))
        assert out.tokens_BND.shape == (2, connector.num_tokens, 10) == (2, 3, 10)
        assert out.mask_BN.all()
        assert influence(connector, tokens).all()

    def test_latents_differ_from_the_start(self) -> None:
        """Equal ones would get equal gradients, and the soft tokens would be copies of one for ever."""
        connector = ResamplerConnector(**sizes(9), **SMALL)
        tokens = connector(random_features(9)).tokens_BND
        assert float(tokens.detach().std(1).min()) > 1e-4
        tokens.square().sum().backward()
        grads = connector.perceiver_resampler.latents.grad
        assert not torch.allclose(grads[0], grads[1])  # type: ignore[index]

    def test_latents_differ_in_a_model_too(self, docked: Callable[..., Dock]) -> None:
        """A PreTrainedModel within another: nobody may reset its weights."""
        made = docked("llama", connector={"type": "resampler", **SMALL})
        fresh = OpticNerveForConditionalGeneration(made.model.config)
        for model in (made.model, fresh):
            latents = model.image.connector.perceiver_resampler.latents
            assert float(latents.detach().std(0).min()) > 0

    def test_masked_tokens_are_as_good_as_absent(self) -> None:
        connector = ResamplerConnector(**sizes(9), **SMALL).eval()
        features = random_features(9)
        features.mask_BN[:, 5:] = False
        shorter = Features(features.tokens_BND[:, :5], features.mask_BN[:, :5])
        torch.testing.assert_close(connector(features).tokens_BND, connector(shorter).tokens_BND)
        features.mask_BN[0] = False
        assert connector(features).mask_BN.tolist() == [[False] * 3, [True] * 3]

    @pytest.mark.parametrize(
        ("options", "refusal"),
        [
            ({"num_latents": 0}, ("out-of-range", "num_latents", 1, 0)),
            ({"depth": 0}, ("out-of-range", "depth", 1, 0)),
            ({"head_dim": -1}, ("out-of-range", "head_dim", 1, -1)),
            ({"intermediate_size": 0}, ("out-of-range", "intermediate_size", 1, 0)),
            ({"heads": 6, "key_value_heads": 4}, ("wrong-shape", 6, "key_value_heads", 4)),
            ({"heads": 2, "key_value_heads": 4}, ("wrong-shape", 2, "key_value_heads", 4)),
            ({"activation": "gelo"}, ("unknown-name", "'gelo'")),
        ],
    )
    def test_refusals(self, options: dict[str, Any], refusal: tuple[Any, ...]) -> None:
        with refused(*refusal):
            ResamplerConnector(**sizes(9), **{**SMALL, **options})


class TestAbstractor:
    @pytest.mark.parametrize(("tokens", "wanted"), [(1, 1), (4, 1), (9, 1), (16, 4), (49, 9), (196, 49), (576, 144)])
    def test_half_the_side_by_default(self, tokens: int, wanted: int) -> None:
        assert AbstractorConnector(**sizes(tokens), depth=1).num_tokens == wanted

    @pytest.mark.parametrize("out_tokens", [1, 4, 9, 16, 25])
    def test_any_square_number_up_to_what_comes_in(self, out_tokens: int) -> None:
        connector = AbstractorConnector(**sizes(25), depth=1, out_tokens=out_tokens)
        assert connector(random_features(25)).tokens_BND.shape == (2, out_tokens, 10)

    def test_a_token_sees_its_neighbourhood(self) -> None:
        """Locality, the paper's point. Only squeeze-and-excitation, which weighs channels, looks at the whole map; with
        its gates held still, a soft token sees its window, one place around for each 3 × 3, and nothing else."""
        connector = AbstractorConnector(**sizes(144), depth=1, out_tokens=36)
        assert influence(connector, 144).all()
        for name, parameter in connector.named_parameters():
            if "se.fc2.weight" in name:
                torch.nn.init.zeros_(parameter)
        sees = influence(connector, 144)
        for m in range(36):
            rows, columns = (
                # Pooled neighbours at - 1 to at + 1 are places 2 (at - 1) to 2 (at + 1) + 1; and one more around.
                slice(max(0, 2 * (at - 1) - 1), 2 * (at + 1) + 3)
                for at in divmod(m, 6)
            )
            wanted = torch.zeros(12, 12, dtype=torch.bool)
            wanted[rows, columns] = True
            assert torch.equal(sees[m], wanted.flatten())

    def test_places_count(self) -> None:
        """The same tokens in another order are another picture: convolutions, and a position of its own for each."""
        connector = AbstractorConnector(**sizes(16), depth=1, out_tokens=1).eval()
        features = random_features(16)
        turned = Features(features.tokens_BND.flip(1), features.mask_BN)
        assert not torch.allclose(connector(features).tokens_BND, connector(turned).tokens_BND, atol=1e-4)

    def test_a_token_is_real_if_any_of_its_window_is(self) -> None:
        features = random_features(16)
        features.mask_BN[0] = False
        features.mask_BN[0, 3] = True
        connector = AbstractorConnector(**sizes(16), depth=1)
        assert connector(features).mask_BN.tolist() == [[False, True, False, False], [True] * 4]

    @pytest.mark.parametrize(
        ("tokens", "options", "refusal"),
        [
            (15, {}, ("wrong-shape", 15, "3²", 9, "4²", 16)),
            (16, {"out_tokens": 5}, ("out-of-range", 1, 16, 5)),
            (16, {"out_tokens": 25}, ("out-of-range", "out_tokens", 25)),
            (16, {"out_tokens": 0}, ("out-of-range", "out_tokens", 0)),
            (16, {"out_tokens": -4}, ("out-of-range", "out_tokens", -4)),
            (16, {"depth": 0}, ("out-of-range", "depth", 1, 0)),
            (16, {"mlp_depth": 0}, ("out-of-range", "mlp_depth", 1, 0)),
            (16, {"hidden_size": 0}, ("out-of-range", "hidden_size", 1, 0)),
        ],
    )
    def test_refusals(self, tokens: int, options: dict[str, Any], refusal: tuple[Any, ...]) -> None:
        with refused(*refusal):
            AbstractorConnector(**sizes(tokens), **options)


@pytest.mark.parametrize(
    "connector", ["pixel_shuffle", {"type": "resampler", **SMALL}, {"type": "abstractor", "depth": 1}], ids=str
)
def test_in_a_dock_the_processor_counts_what_comes_out(connector: Any, docked: Callable[..., Dock]) -> None:
    made = docked("llama", connector=connector)
    tower = made.model.image
    pixels = torch.randn(2, 3, 32, 32)
    assert tower(pixels).tokens_BND.shape == (2, tower.num_tokens, 32)
    assert tower.num_tokens == {"resampler": 3}.get(made.model.config.towers["image"]["connector"]["type"], 4)
