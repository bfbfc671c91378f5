"""Connectors against the implementations that the field trusts: same weights, same inputs, fp32, within 1e-5."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers as tf
from torch.nn import functional as F
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from opticnerve.connectors.abstractor import AbstractorConnector
from opticnerve.connectors.base import Connector
from opticnerve.connectors.mlp import MLPConnector, PixelShuffleConnector
from opticnerve.connectors.resampler import ResamplerConnector
from opticnerve.types import Features

WIDTH, LANGUAGE = 24, 40
VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TEXT: dict[str, Any] = {
    "hidden_size": LANGUAGE,
    "intermediate_size": 56,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
TOLERANCE = 1e-5


def seen(tokens: int, *, masked: int = 0, count: int = 3) -> Features:
    """Random features; in each row but the first, `masked` tokens at random places are not real."""
    generator = torch.Generator().manual_seed(7)
    mask = torch.ones(count, tokens, dtype=torch.bool)
    for row in range(1, count):
        mask[row, torch.randperm(tokens, generator=generator)[:masked]] = False
    return Features(2 * torch.randn(count, tokens, WIDTH, generator=generator), mask)


def random_weights(module: torch.nn.Module, seed: int = 0) -> Any:
    """Every parameter away from its neutral start, so that none can be forgotten unnoticed."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def sizes(tokens: int) -> dict[str, int]:
    return {"in_size": WIDTH, "out_size": LANGUAGE, "in_tokens": tokens}


def close(ours: Connector, features: Features, theirs: torch.Tensor) -> None:
    with torch.no_grad():
        got = ours.eval()(features).tokens_BND
    assert got.shape == theirs.shape
    assert float((got - theirs).abs().max()) <= TOLERANCE
    assert float(theirs.std()) > 1e-2  # numbers that say something


@pytest.mark.parametrize("activation", ["gelu", "silu", "gelu_pytorch_tanh"])
@torch.no_grad()
def test_mlp_is_llavas_projector(activation: str) -> None:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION), text_config=tf.LlamaConfig(**TEXT), projector_hidden_act=activation
    )
    theirs = random_weights(LlavaMultiModalProjector(config))
    ours = MLPConnector(**sizes(9), activation=activation)
    ours.layers[0].load_state_dict(theirs.linear_1.state_dict())
    ours.layers[2].load_state_dict(theirs.linear_2.state_dict())
    close(ours, seen(9), theirs(seen(9).tokens_BND))


@pytest.mark.parametrize(("scale", "side"), [(2, 4), (2, 10), (3, 9), (4, 8), (5, 5)])
@torch.no_grad()
def test_pixel_shuffle_is_idefics3s_connector(scale: int, side: int) -> None:
    config = tf.Idefics3Config(vision_config=VISION, text_config=tf.LlamaConfig(**TEXT).to_dict(), scale_factor=scale)
    theirs = random_weights(Idefics3Connector(config))
    ours = PixelShuffleConnector(**sizes(side**2), scale=scale)
    ours.layers[0].load_state_dict(theirs.modality_projection.proj.state_dict())
    assert len(ours.state_dict()) - len(theirs.state_dict()) == 4  # the calibration, and nothing else
    close(ours, seen(side**2), theirs(seen(side**2).tokens_BND))


@pytest.mark.parametrize(("scale", "side"), [(2, 6), (4, 8)])
@torch.no_grad()
def test_pixel_shuffle_of_depth_two_is_internvls_projector(scale: int, side: int) -> None:
    config = tf.InternVLConfig(
        vision_config={**VISION, "image_size": [28, 28], "patch_size": [14, 14]},
        text_config=tf.Qwen2Config(**TEXT).to_dict(),
        downsample_ratio=1 / scale,
    )
    theirs = random_weights(InternVLMultiModalProjector(config))
    ours = PixelShuffleConnector(**sizes(side**2), scale=scale, depth=2, activation=config.projector_hidden_act)
    for at, part in {0: theirs.layer_norm, 1: theirs.linear_1, 3: theirs.linear_2}.items():
        ours.layers[at].load_state_dict(part.state_dict())
    tokens = seen(side**2).tokens_BND
    shuffled = InternVLModel.pixel_shuffle(None, tokens.unflatten(1, (side, side)), 1 / scale)
    close(ours, seen(side**2), theirs(shuffled.flatten(1, 2)))


@pytest.mark.parametrize("masked", [0, 1, 10])
@pytest.mark.parametrize(("heads", "key_value_heads"), [(4, 4), (4, 2), (6, 1)])
@torch.no_grad()
def test_resampler_is_idefics2s_connector(masked: int, heads: int, key_value_heads: int) -> None:
    perceiver = {
        "hidden_size": LANGUAGE, "resampler_n_latents": 5, "resampler_depth": 2, "resampler_n_heads": heads,
        "resampler_head_dim": 8, "num_key_value_heads": key_value_heads,
    }  # fmt: skip
    config = tf.Idefics2Config(
        vision_config=VISION, text_config=tf.MistralConfig(**TEXT).to_dict(), perceiver_config=perceiver
    )
    theirs = random_weights(Idefics2Connector(config))
    ours = ResamplerConnector(
        **sizes(11), num_latents=5, depth=2, heads=heads, key_value_heads=key_value_heads, head_dim=8,
        intermediate_size=56,
    )  # fmt: skip
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert (set(missing), unexpected) == ({"input_mean", "input_std", "output_scale", "calibrated"}, [])
    features = seen(11, masked=masked)
    close(ours, features, theirs(features.tokens_BND, features.mask_BN.long()))


def test_resamplers_own_sizes_are_idefics2_8bs() -> None:
    """Width 4,096: the connector of Idefics2-8B from the default options."""
    with torch.device("meta"):
        ours = ResamplerConnector(in_size=1152, out_size=4096, in_tokens=4900)
        theirs = Idefics2Connector(
            tf.Idefics2Config(
                vision_config={"hidden_size": 1152},
                text_config={"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336},
                perceiver_config={"hidden_size": 4096},
            )
        )
    wanted = {n: p.shape for n, p in theirs.named_parameters()}
    assert {n: p.shape for n, p in ours.named_parameters()} == wanted


class TestAbstractor:
    """No model library holds it: it is derived once more here, by hand, from the same weights."""

    @pytest.mark.parametrize(
        ("side", "out_tokens", "hidden_size", "depth"),
        [(6, 9, None, 2), (5, 4, 20, 1), (4, 16, 28, 2), (7, None, 24, 1)],
    )
    @torch.no_grad()
    def test_the_derivation(self, side: int, out_tokens: int | None, hidden_size: int | None, depth: int) -> None:
        ours = random_weights(
            AbstractorConnector(
                **sizes(side**2), out_tokens=out_tokens, hidden_size=hidden_size, depth=depth, mlp_depth=3
            )
        )
        weights = dict(ours.named_parameters())
        tokens = seen(side**2).tokens_BND
        map_BDHW = (tokens + weights["pos_emb"]).mT.reshape(3, WIDTH, side, side)
        for i in range(depth):
            map_BDHW = bottleneck(map_BDHW, weights, f"net.0.b{i + 1}.")
        map_BDHW = pooled(map_BDHW, math.isqrt(ours.num_tokens))
        for i in range(depth):
            map_BDHW = bottleneck(map_BDHW, weights, f"net.2.b{i + 1}.")
        rows_BMD = map_BDHW.flatten(2).mT
        for i in (0, 2, 4):
            rows_BMD = rows_BMD @ weights[f"readout.{i}.weight"].T + weights[f"readout.{i}.bias"]
            rows_BMD = rows_BMD if i == 4 else rows_BMD * torch.sigmoid(rows_BMD)
        close(ours, seen(side**2), rows_BMD)

    def test_honeybees_own_sizes(self) -> None:
        """CLIP-L/14 at 336 px: 24 × 24 tokens of width 1,024 become 144; two stages of three blocks, as published."""
        with torch.device("meta"):
            ours = AbstractorConnector(in_size=1024, out_size=4096, in_tokens=576)
        assert ours.num_tokens == 144
        shapes = {n: tuple(p.shape) for n, p in ours.named_parameters()}
        assert shapes["pos_emb"] == (1, 576, 1024)
        assert [n for n in shapes if n.endswith("conv2.conv.weight")] == [
            f"net.{stage}.b{block}.conv2.conv.weight" for stage in (0, 2) for block in (1, 2, 3)
        ]
        assert shapes["net.0.b1.conv2.conv.weight"] == (1024, 1, 3, 3)  # each channel by itself
        assert shapes["net.0.b1.se.fc1.weight"] == (256, 1024, 1, 1)
        assert [shapes[f"readout.{i}.weight"] for i in (0, 2)] == [(4096, 1024), (4096, 4096)]


def norm(x_BDHW: torch.Tensor, weights: dict[str, Any], name: str) -> torch.Tensor:
    """Layer norm over the channels of each place."""
    centred = x_BDHW - x_BDHW.mean(1, keepdim=True)
    scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    return scaled * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]


def bottleneck(x_BDHW: torch.Tensor, weights: dict[str, Any], block: str) -> torch.Tensor:
    """1 × 1, depthwise 3 × 3, squeeze and excitation, 1 × 1; a shortcut around it; SiLU."""

    def one_by_one(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.einsum("oi,bihw->bohw", weights[f"{block}{name}.weight"][:, :, 0, 0], x)

    def silu(x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)

    inner = silu(norm(one_by_one(x_BDHW, "conv1.conv"), weights, f"{block}conv1.bn"))
    batch, channels, height, width = inner.shape
    padded, kernel = F.pad(inner, (1, 1, 1, 1)), weights[f"{block}conv2.conv.weight"]
    neighbours = sum(
        padded[:, :, dy : dy + height, dx : dx + width] * kernel[:, 0, dy, dx][:, None, None]
        for dy in range(3)
        for dx in range(3)
    )
    inner = silu(norm(neighbours, weights, f"{block}conv2.bn"))
    mean_BD11 = inner.mean((2, 3), keepdim=True)
    squeezed = silu(one_by_one(mean_BD11, "se.fc1") + weights[f"{block}se.fc1.bias"][:, None, None])
    gate = torch.sigmoid(one_by_one(squeezed, "se.fc2") + weights[f"{block}se.fc2.bias"][:, None, None])
    assert gate.shape == (batch, channels, 1, 1)
    inner = norm(one_by_one(inner * gate, "conv3.conv"), weights, f"{block}conv3.bn")
    shortcut = x_BDHW
    if f"{block}downsample.conv.weight" in weights:
        shortcut = norm(one_by_one(x_BDHW, "downsample.conv"), weights, f"{block}downsample.bn")
    return silu(inner + shortcut)


def pooled(x_BDHW: torch.Tensor, side: int) -> torch.Tensor:
    """Adaptive average pooling: window i of m over n places goes from ⌊i·n/m⌋ to ⌈(i+1)·n/m⌉."""
    n = x_BDHW.shape[-1]
    windows = [slice(i * n // side, -(-(i + 1) * n // side)) for i in range(side)]
    rows = [torch.stack([x_BDHW[:, :, h, w].mean((2, 3)) for w in windows], dim=-1) for h in windows]
    return torch.stack(rows, dim=-2)
