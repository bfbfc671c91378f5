"""Folding leaves the function as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from opticnerve.export.hf.blip2 import final_norm, fold_scales
from opticnerve.export.parity import cast
from opticnerve.export.simplify import connector_matrices, fix_picture_size, fold_calibration, fold_into_norm
from opticnerve.inference.load import load_model

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.mark.parametrize("connector", ["linear", {"type": "linear", "bias": False}, {"type": "mlp", "bias": False}])
@pytest.mark.parametrize("vision_encoder", ["clip_vision_model", "siglip_vision_model"])
@torch.no_grad()
def test_calibration_and_picture_size_go_into_the_weights(
    saved: Callable[..., Path], vision_encoder: str, connector: Any
) -> None:
    model, _ = load_model(saved("llama", vision_encoder, connector=connector, image_size=48), device="cpu")
    tower, pixels = model.image, torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    before = tower(pixels).tokens_BND
    fold_calibration(tower.connector, *connector_matrices(tower.connector))
    fix_picture_size(tower.encoder)
    torch.testing.assert_close(tower(pixels).tokens_BND, before, rtol=1e-4, atol=1e-4)
    # The vision encoder alone, as another engine runs it: without being asked to interpolate.
    states = tower.encoder.model(pixel_values=pixels).last_hidden_state
    bare = states[:, tower.encoder.prefix_tokens :]
    torch.testing.assert_close(tower.encoder(pixels).tokens_BND, bare)
    assert tower.connector.output_scale == 1


@pytest.mark.parametrize(
    ("vision_encoder", "connector"),
    [
        ("vit", {"type": "qformer", "num_queries": 3, "hidden_size": 16, "depth": 2, "heads": 2}),
        ("dinov2", {"type": "qformer", "num_queries": 3, "hidden_size": 16, "depth": 2, "heads": 2}),
        ("blip_2_vision_model", {"type": "pixel_shuffle"}),
    ],
)
@torch.no_grad()
def test_calibration_goes_into_the_norm_and_scales_into_the_matrices(
    saved: Callable[..., Path], vision_encoder: str, connector: Any
) -> None:
    model, _ = load_model(saved("llama", vision_encoder, connector=connector, image_size=48), device="cpu")
    tower, pixels = model.image, torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    for name, parameter in tower.encoder.named_parameters():
        if "layer_scale" in name:
            parameter.uniform_(0.5, 2)
    before = tower(pixels).tokens_BND
    _, last = connector_matrices(tower.connector)
    fold_into_norm(tower.connector, final_norm(tower.encoder.model), last)
    fold_scales(tower.encoder.model)
    fix_picture_size(tower.encoder)
    torch.testing.assert_close(tower(pixels).tokens_BND, before, rtol=1e-4, atol=1e-4)
    assert all(bool((p == 1).all()) for n, p in tower.encoder.named_parameters() if "layer_scale" in n)
    assert bool((tower.connector.input_mean == 0).all())


def test_casting_keeps_the_digits_of_tables(saved: Callable[..., Path]) -> None:
    model, _ = load_model(saved("llama", "siglip_vision_model"), device="cpu")
    frequencies = model.language_model.model.rotary_emb.inv_freq.clone()
    weight = model.language_model.model.norm.weight
    cast(model, torch.bfloat16)
    assert weight.dtype == torch.bfloat16
    cast(model, torch.float32)
    assert torch.equal(model.language_model.model.rotary_emb.inv_freq, frequencies)
